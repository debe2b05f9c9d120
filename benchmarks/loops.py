"""Cells called step after step, ours against torch.nn's: ``python -m benchmarks.loops [--compiled] [--out NAME] …``

With the same weights, and results that are compared before, in float32 and, but for compiled loops, in float32 under
autocast to bfloat16; training goes back from the last state. Both take turns in one process. Compiled, the loop of each
side is one graph, and ours is timed without a compiler, too.
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


class Loop(torch.nn.Module):
    """All steps of a cell, and the last output."""

    def __init__(self, cell: torch.nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor) -> Tensor:
        state: Any = None
        for step in x:
            state = self.cell(step, state)
        found: Tensor = state[0] if isinstance(state, tuple) else state
        return found


def unrolled(loop: torch.nn.Module, x: Tensor, mode: str, dtype: str) -> list[Tensor]:
    """The last output and, in training, the gradients of the weights."""
    training = mode == "training"
    autocast = torch.autocast("cpu", torch.bfloat16) if dtype == "autocast" else contextlib.nullcontext()
    with torch.set_grad_enabled(training):
        with autocast:
            output: Tensor = loop(x)
        if training:
            return [output, *torch.autograd.grad(output, list(loop.parameters()), torch.ones_like(output))]
    return [output]


def check(ours: list[Tensor], theirs: list[Tensor], dtype: str, name: str) -> None:
    for a, b in zip(ours, theirs, strict=True):
        if not (a.float() - b.float()).abs().max() <= TOLERANCE[dtype] * b.float().abs().max().clamp(min=1):
            raise SystemExit(f"{name}: ours differs from torch's")


def rows(steps: int, seconds: float, threads: int, compiled: bool) -> Iterator[dict[str, Any]]:
    watch = Watch(threads)
    for cell, make in CELLS.items():
        for batch, size in SIZES:
            torch.manual_seed(0)
            stock = make(size, size)
            ours, x = pyrnnfast.replace(copy.deepcopy(stock)), torch.randn(steps, batch, size)
            for dtype in ("float32",) if compiled else TOLERANCE:
                with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "autocast"):
                    path = "compiled" if compiled else pyrnnfast.explain(ours, x[0]).path
                for mode in ("inference", "training"):
                    name = f"{cell} {mode} {steps},{batch},{size},{size} {dtype}"
                    loops: dict[str, Any] = {"ours": Loop(ours), "torch": Loop(stock)}
                    if compiled:
                        torch.compiler.reset()
                        loops = {side: torch.compile(loop, fullgraph=True) for side, loop in loops.items()}
                        loops["eager"] = Loop(ours)
                    sides = {side: partial(unrolled, loop, x, mode, dtype) for side, loop in loops.items()}
                    check(sides["ours"](), sides["torch"](), dtype, name)
                    times, disturbed = undisturbed(partial(turn_by_turn, sides, seconds), threads, watch)
                    found = {f"{side}_ms": 1e3 * s for side, s in times.medians.items()}
                    ratio = found["torch_ms"] / found["ours_ms"]
                    eager = f"; ours without a compiler {found['eager_ms']:9.3f} ms" if compiled else f" ({path})"
                    print(f"{name:45} {found['ours_ms']:9.3f} ms  torch {ratio:5.2f} times as long{eager}", flush=True)
                    yield {
                        "cell": cell, "mode": mode, "shape": [steps, batch, size, size], "dtype": dtype,
                        "threads": threads, "path": path, "disturbed": disturbed, **found,
                    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=0.4, help="of each comparison")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--compiled", action="store_true", help="both sides by torch.compile, each loop one graph")
    parser.add_argument("--out", help="write benchmarks/results/NAME.json")
    options = parser.parse_args()
    with thread_count(options.threads):
        found = list(rows(options.steps, options.seconds, options.threads, options.compiled))
    if options.out:
        settings = {name: getattr(options, name) for name in ("seconds", "threads", "steps", "compiled")}
        print(record.save(options.out, record.origin(settings) | {"rows": found}))


if __name__ == "__main__":
    main()
