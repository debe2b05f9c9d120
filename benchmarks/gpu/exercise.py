"""Every kernel once, on small sizes: what compute-sanitizer watches. Prints, as JSON, the calls that took each path.

No more of torch runs than has to: operands are made on the CPU and copied. Nothing is compared: tests/gpu does that.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import pyrnnfast
from pyrnnfast import cuda

from .rows import KINDS, precision

CELLS = {"rnn_tanh": pyrnnfast.RNN, "rnn_relu": pyrnnfast.RNN, "gru": pyrnnfast.GRU, "lstm": pyrnnfast.LSTM}


class Call(NamedTuple):
    inputs: int
    hidden: int
    lengths: tuple[int, ...]
    """Of the sequences; dense where they are all alike."""
    bidirectional: bool = False
    training: bool = True
    padded: bool = False
    """With the lengths, and resets, in tensors on the device; else packed."""
    thresholds: tuple[tuple[str, int], ...] = ()
    """Of the module, other than its own: so few multiprocessors that a block has more sequences or a part of the
    weights no room in registers, or so few bytes that steps are cut into chunks."""


# Odd sizes, so that every edge of a tile is one, and cuBLAS does not take those of its kernels that write by the copy
# engine, which racecheck dies of; a batch of more than one tile; both directions; sequences that end.
STEP = (
    Call(5, 7, (3, 3, 3)),
    Call(3, 33, (3, 1, 2), bidirectional=True),
    Call(15, 15, (2,) * 17, training=False),
    Call(3, 9, (0, 3, 2), bidirectional=True, padded=True),
)
# Several blocks that wait for each other, over more steps than there are buffers.
PERSISTENT = (
    Call(23, 63, (5,) * 3),
    Call(23, 71, (4, 2, 2, 1), bidirectional=True),
    Call(15, 127, (3,) * 20),
    Call(23, 63, (3,) * 2, training=False),
    Call(23, 39, (0, 4, 2, 1), bidirectional=True, padded=True),
    # Blocks of 16 and of 32 sequences; of 32, and not all weights in registers; chunks of a step or two.
    Call(15, 63, (3,) * 11, thresholds=(("multiprocessors", 4),)),
    Call(15, 63, (3,) * 19 + (2,), thresholds=(("multiprocessors", 4),)),
    Call(7, 399, (2,) * 17, thresholds=(("multiprocessors", 25),)),
    Call(15, 63, (5,) * 3, bidirectional=True, thresholds=(("chunk_bytes", 4000),)),
)
_ALL = 1 << 20  # multiprocessors
_EVERYTHING = {"step": STEP, "persistent": PERSISTENT}


def calls(quick: bool) -> Iterator[tuple[str, str, str, Call]]:
    for path, sizes in _EVERYTHING.items():
        for kind in KINDS:
            for cell in CELLS:
                for call in sizes[:2] if quick else sizes:
                    yield path, kind, cell, call


def run(path: str, kind: str, cell: str, call: Call, device: str = "cuda") -> str:
    """Forward, and backward where the call is one of training; returns the path that it took."""
    dtype, tf32 = KINDS[kind]
    options = {"nonlinearity": cell[4:]} if cell.startswith("rnn_") else {}
    module = CELLS[cell](call.inputs, call.hidden, bidirectional=call.bidirectional, **options)
    module = module.to(getattr(torch, dtype)).to(device)
    like = next(module.parameters())
    steps, batch, directions = max(call.lengths), len(call.lengths), 2 if call.bidirectional else 1
    padded = torch.randn(steps, batch, call.inputs).to(like).requires_grad_(call.training)
    state = torch.randn(directions, batch, call.hidden).to(like).requires_grad_(call.training)
    x: torch.Tensor | PackedSequence = padded
    extras = {}
    if call.padded:
        extras["lengths"] = torch.tensor(call.lengths).to(device)
        extras["reset"] = (torch.arange(steps)[:, None] == torch.tensor([1, *[0] * (batch - 1)])).to(device)
    elif len(set(call.lengths)) > 1:
        x = pack_padded_sequence(padded, torch.tensor(call.lengths), enforce_sorted=False)
    hx = (state, state) if cell == "lstm" else state
    with _set(call.thresholds), precision(tf32), cuda.use(path), torch.set_grad_enabled(call.training):
        taken: str = pyrnnfast.explain(module, x, hx, **extras).path
        y, final = module(x, hx, **extras)
        results = [y.data if isinstance(y, PackedSequence) else y, *(final if cell == "lstm" else (final,))]
        if call.training:
            upstream = [torch.randn(t.shape).to(t) for t in results]
            torch.autograd.grad(results, [padded, state, *module.parameters()], upstream)
    return taken


@contextmanager
def _set(thresholds: Iterable[tuple[str, int]]) -> Iterator[None]:
    module = cuda.load().module
    for name, value in thresholds:
        module.set_threshold(name, value)
    try:
        yield
    finally:
        for name, _ in thresholds:
            module.set_threshold(name, module.CHUNK_BYTES if name == "chunk_bytes" else _ALL)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.exercise")
    parser.add_argument("--quick", action="store_true", help="the first two sizes of each")
    parser.add_argument("--poison", action="store_true", help="NaN before every product that cuBLAS writes")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    if options.poison:
        cuda.load().module.set_threshold("poison", 1)
    taken: Counter[str] = Counter()
    for call in calls(options.quick):
        print(*call, file=sys.stderr)  # what it dies in, should it
        taken[run(*call)] += 1
        torch.cuda.synchronize()
    print(json.dumps(taken))
    return 0


if __name__ == "__main__":
    sys.exit(main())
