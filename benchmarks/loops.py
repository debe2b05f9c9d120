"""Cells called step after step, ours against torch.nn's: ``python -m benchmarks.loops [--steps 20] [--out NAME] …``

With the same weights, and results that are compared before, in float32 and in float32 under autocast to bfloat16;
training goes back from the last state. Both take turns in one process.
"""

import argparse
import contextlib
import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

import pyrnnfast

from . import record
from .timing import Watch, thread_count, turn_by_turn, undisturbed

CELLS: dict[str, Callable[..., torch.nn.Module]] = {
    "lstm": torch.nn.LSTMCell,
    "gru": torch.nn.GRUCell,
    "rnn_tanh": torch.nn.RNNCell,
}
SIZES = ((1, 64), (1, 256), (1, 512), (8, 256), (8, 512), (32, 64), (32, 256), (32, 512))  # batch, units and inputs
TOLERANCE = {"float32": 1e-3, "autocast": 0.1}  # of the largest value


def unrolled(module: torch.nn.Module, x: Tensor, mode: str, dtype: str) -> list[Tensor]:
    """The last output and, in training, the gradients of the weights."""
    training = mode == "training"
    autocast = torch.autocast("cpu", torch.bfloat16) if dtype == "autocast" else contextlib.nullcontext()
    state: Any = None
    with torch.set_grad_enabled(training):
        with autocast:
            for step in x:
                state = module(step, state)
        output = state[0] if isinstance(state, tuple) else state
        if training:
            return [output, *torch.autograd.grad(output, list(module.parameters()), torch.ones_like(output))]
    return [output]


def check(ours: list[Tensor], theirs: list[Tensor], dtype: str, name: str) -> None:
    for a, b in zip(ours, theirs, strict=True):
        if not (a.float() - b.float()).abs().max() <= TOLERANCE[dtype] * b.float().abs().max().clamp(min=1):
            raise SystemExit(f"{name}: ours differs from torch's")


def rows(steps: int, seconds: float, threads: int) -> Iterator[dict[str, Any]]:
    watch = Watch(threads)
    for cell, make in CELLS.items():
        for batch, size in SIZES:
            torch.manual_seed(0)
            stock = make(size, size)
            ours, x = pyrnnfast.replace(copy.deepcopy(stock)), torch.randn(steps, batch, size)
            for dtype in TOLERANCE:
                with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "autocast"):
                    path = pyrnnfast.explain(ours, x[0]).path
                for mode in ("inference", "training"):
                    name = f"{cell} {mode} {steps},{batch},{size},{size} {dtype}"
                    check(unrolled(ours, x, mode, dtype), unrolled(stock, x, mode, dtype), dtype, name)
                    sides = {
                        "ours": partial(unrolled, ours, x, mode, dtype),
                        "torch": partial(unrolled, stock, x, mode, dtype),
                    }
                    times, disturbed = undisturbed(partial(turn_by_turn, sides, seconds), threads, watch)
                    found = {f"{side}_ms": 1e3 * s for side, s in times.medians.items()}
                    ratio = found["torch_ms"] / found["ours_ms"]
                    print(
                        f"{name:45} {found['ours_ms']:9.3f} ms  torch {ratio:5.2f} times as long ({path})", flush=True
                    )
                    yield {
                        "cell": cell, "mode": mode, "shape": [steps, batch, size, size], "dtype": dtype,
                        "threads": threads, "path": path, "disturbed": disturbed, **found,
                    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=0.4, help="of each comparison")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", help="write benchmarks/results/NAME.json")
    options = parser.parse_args()
    with thread_count(options.threads):
        found = list(rows(options.steps, options.seconds, options.threads))
    if options.out:
        settings = {"seconds": options.seconds, "threads": options.threads, "steps": options.steps}
        print(record.save(options.out, record.origin(settings) | {"rows": found}))


if __name__ == "__main__":
    main()
