"""``python -m benchmarks.activations``: sigmoid and tanh of the kernels for every float32, on every instruction set.

Checks what ``csrc/activations.h`` promises: at most 4 units in the last place where the result is a normal number,
2⁻¹²⁶ absolute elsewhere, exact at ±inf, and NaN in exactly the places where the input is NaN. Takes some minutes, as
there are 2³² values. Exits with 1 if the promise is broken.

The truth is torch's function in float64. Its own error of a few units of float64 is 2⁻²⁷ units of float32; before the
run a sample of it is checked against arithmetic of 60 digits.
"""

import argparse
import math
import random
import sys
import time
from collections.abc import Callable

import mpmath
import torch
from torch import Tensor

import pyrnnfast  # noqa: F401  (loads torch's threads before the kernels)
from pyrnnfast import _cpu

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {"sigmoid": torch.sigmoid, "tanh": torch.tanh}
BOUND_ULP = 4.0
BOUND_TINY = 2.0**-126
SMALLEST_NORMAL = 2.0**-126


class Worst:
    """The largest errors so far, and where."""

    def __init__(self) -> None:
        self.ulp, self.ulp_at = 0.0, math.nan
        self.tiny, self.tiny_at = 0.0, math.nan
        self.wrong: list[float] = []  # NaN or infinity where it should not be, or not where it should be

    def holds(self) -> bool:
        return self.ulp <= BOUND_ULP and self.tiny <= BOUND_TINY and not self.wrong

    def __str__(self) -> str:
        text = f"{self.ulp:.3f} ulp at {self.ulp_at:.9g}; {self.tiny / BOUND_TINY:.3f} · 2⁻¹²⁶ at {self.tiny_at:.9g}"
        return text + (f"; {len(self.wrong)} wrong special values, such as {self.wrong[0]!r}" if self.wrong else "")


def check_truth(name: str) -> float:
    """The largest error of torch's float64 function on a sample, in units in the last place of float64."""
    rng = random.Random(0)
    values = [rng.choice((-1, 1)) * 2.0 ** rng.uniform(-140, 7) for _ in range(2000)]
    values += [rng.uniform(-90, 90) for _ in range(2000)]
    found = FUNCTIONS[name](torch.tensor(values, dtype=torch.float64)).tolist()
    worst = 0.0
    with mpmath.workdps(60):
        for x, y in zip(values, found, strict=True):
            exact = mpmath.tanh(x) if name == "tanh" else 1 / (1 + mpmath.exp(-mpmath.mpf(x)))
            worst = max(worst, float(abs(mpmath.mpf(y) - exact)) / math.ulp(float(exact)))
    return worst


def compare(x: Tensor, wide: Tensor, out: Tensor, true: Tensor, rounded: Tensor, worst: Worst) -> None:
    """Args: x, out: float32; wide, true: float64; rounded: `true` in float32."""
    # As integers, neighbouring floats differ by 1: at most half a unit from the real error, and fast.
    apart = out.view(torch.int32).sub(rounded.view(torch.int32)).abs_()
    # Below zero: the difference overflowed, as it does between a number and its opposite.
    suspect = (apart >= max(1, math.ceil(worst.ulp - 0.5))) | (apart < 0) | x.isinf()
    at = suspect.nonzero().squeeze(1)
    if len(at) == 0:
        return
    x, wide, out, true = x[at], wide[at], out[at].double(), true[at]
    fine = (out == true) | (out.isnan() & wide.isnan())
    wrong = ~fine & (wide.isnan() | wide.isinf() | ~out.isfinite())
    worst.wrong += x[wrong][:5].tolist()
    error = torch.where(fine | wrong, 0.0, (out - true).abs())
    normal = true.abs() >= SMALLEST_NORMAL
    tiny = torch.where(normal, 0.0, error)
    at = tiny.argmax()
    if float(tiny[at]) > worst.tiny:
        worst.tiny, worst.tiny_at = float(tiny[at]), float(x[at])
    # A unit in the last place of a float32 is 2⁻²³ of its power of two; `frexp` gives twice that power.
    ulps = torch.where(normal, error / torch.exp2(torch.frexp(true.nan_to_num(1.0)).exponent.double() - 24), 0.0)
    at = ulps.argmax()
    if float(ulps[at]) > worst.ulp:
        worst.ulp, worst.ulp_at = float(ulps[at]), float(x[at])


def run(names: list[str], sets: list[str], bits: int) -> bool:
    worst = {(name, isa): Worst() for name in names for isa in sets}
    chunk, chunks, began = 1 << bits, 1 << (32 - bits), time.monotonic()
    out = torch.empty(chunk)
    for k in range(chunks):
        first = k * chunk - (1 << 31)
        x = torch.arange(first, first + chunk, dtype=torch.int32).view(torch.float32)
        wide = x.double()
        for name in names:
            true = FUNCTIONS[name](wide)
            rounded = true.float()
            for isa in sets:
                _cpu.select_instruction_set(isa)
                _cpu.activation(name, x, out)
                compare(x, wide, out, true, rounded, worst[name, isa])
        left = (time.monotonic() - began) / (k + 1) * (chunks - k - 1)
        highest = max(w.ulp for w in worst.values())
        end = "\r" if sys.stdout.isatty() else "\n"
        if end == "\r" or (k + 1) % max(chunks // 16, 1) == 0:
            print(f"{(k + 1) / chunks:6.1%}  worst {highest:.3f} ulp  {left:5.0f} s left ", end=end, flush=True)
    print()
    for (name, isa), w in worst.items():
        print(f"{name:8} {isa:8} {'ok  ' if w.holds() else 'FAIL'} {w}")
    return all(w.holds() for w in worst.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chunk-bits", type=int, default=20, help="log2 of the values looked at together")
    args = parser.parse_args()
    good = True
    for name in FUNCTIONS:
        error = check_truth(name)
        print(f"torch's {name} in float64: {error:.2f} ulp on a sample")
        good &= error < 2**20
    good &= run(list(FUNCTIONS), _cpu.instruction_sets(), args.chunk_bits)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
