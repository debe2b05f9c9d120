"""The least that a row could take on the card, of three figures that are measured on it in the same run.

- the rate of large matrix products in the row's dtype: the input's, and in training the gradients' of weights and input
- the bandwidth of the card's memory: weights, input, output, and in training their gradients, each once
- the time in which one multiprocessor hands a value to another through the L2 cache (probe.cu). Every step of a layer
  that is spread over several of them waits for that once, forward and back, whatever else it does; a step whose
  recurrent product takes longer at the rate above takes that

Nothing is counted that a kernel could do without, such as saved activations, launches, or the latency of the product's
own instructions, and layers are taken one after the other. So it is a bound from below, which no kernel reaches. One
exception: a cluster's multiprocessors exchange through distributed shared memory in less than the third figure, so a
kernel made for Hopper may beat the bound at small sizes. A figure that could not be measured leaves no bound: null.
"""

import statistics
import subprocess
from collections.abc import Callable
from typing import NamedTuple

import torch

from . import build
from .rows import DTYPES, KINDS, Row, precision
from .timing import milliseconds

GATES = {"lstm": 4, "gru": 3, "rnn": 1}

_SIZE = 8192  # of the products
_BYTES = 1 << 30


class Figures(NamedTuple):
    peak: dict[str, float]  # FLOP/s by dtype, "tf32" for float32 with it
    bandwidth: float  # bytes/s, read and written together
    handoff: float | None  # s

    def asdict(self) -> dict[str, float | None]:
        """For the record."""
        found = {f"TFLOP/s, {name}": round(rate * 1e-12, 1) for name, rate in self.peak.items()}
        handoff = None if self.handoff is None else round(self.handoff * 1e9, 1)
        return found | {"GB/s": round(self.bandwidth * 1e-9), "ns to hand a value on": handoff}


def _kind(row: Row) -> str:
    return "tf32" if row.tf32 else row.dtype


def _best(fn: Callable[[], object], samples: int = 5) -> float:
    """Seconds. The best: what is measured here are limits, and nothing but noise makes a sample slower."""
    fn()
    return 1e-3 * min(milliseconds(fn, 1) for _ in range(samples))


def measure() -> Figures:
    peak = {}
    for dtype, tf32 in KINDS.values():
        size = _SIZE // 2 if (dtype, tf32) in (("float32", False), ("float64", False)) else _SIZE
        # On zeros, or ones, a card runs faster than on anything else.
        a, b = (torch.randn(size, size, device="cuda").to(DTYPES[dtype]) for _ in range(2))
        with precision(tf32):
            peak["tf32" if tf32 else dtype] = 2 * size**3 / _best(lambda a=a, b=b: torch.mm(a, b))  # type: ignore[misc]
    source, target = (torch.empty(_BYTES, dtype=torch.uint8, device="cuda") for _ in range(2))
    return Figures(peak, 2 * _BYTES / _best(lambda: target.copy_(source)), _handoff())


def _handoff() -> float | None:
    """The program was built beside the package; None where it does not run."""
    try:
        command = [str(build.program("probe"))]
        found = [
            float(subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout)
            for _ in range(3)
        ]
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        print(f"no figure for handing a value on, so no limits: {error}", flush=True)
        return None
    return 1e-9 * statistics.median(found)


def limit(row: Row, figures: Figures) -> float | None:
    """Seconds."""
    if figures.handoff is None:
        return None
    _, _, inputs, hidden = row.shape
    training, rows, directions = row.mode == "training", sum(row.batch_sizes), row.directions
    peak, size, gates = figures.peak[_kind(row)], DTYPES[row.dtype].itemsize, GATES[row.cell] * hidden
    passes = 2 if training else 1
    seconds = 0.0
    for _ in range(row.layers):
        to_gates = 2 * rows * directions * gates * inputs  # operations of the product with the input
        across = 2 * rows * directions * gates * hidden  # likewise of all recurrent ones
        products = to_gates + (2 * to_gates + across if training else 0)  # dx, dW_ih; dW_hh
        weights = directions * gates * (inputs + hidden)
        moved = passes * size * (weights + rows * inputs + rows * directions * hidden)
        steps = sum(max(figures.handoff, across * batch / rows / peak) for batch in row.batch_sizes)
        seconds += max(products / peak, moved / figures.bandwidth) + passes * steps
        inputs = directions * hidden
    return seconds
