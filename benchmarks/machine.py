"""What this machine can do, measured when first asked: products, reading and writing, the kernels' activations.

Every figure is the best of several samples: these are limits, and nothing but noise makes a sample slower.
"""

import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from pyrnnfast import _cpu

from .rows import DTYPES
from .timing import seconds_of, thread_count, undisturbed


def _best(fn: Callable[[], object], seconds: float = 0.1) -> float:
    """Of samples over some time, as a core that is busy with something else is so for some time."""
    fn()
    samples, begin = [seconds_of(fn)], time.perf_counter()
    while len(samples) < 5 or time.perf_counter() - begin < seconds:
        samples.append(seconds_of(fn))
    return min(samples)


class Machine:
    """Measures each figure once.

    ``measured`` has those so far, by what they are, and ``disturbed`` the names of those that other programs disturbed.
    """

    def __init__(self) -> None:
        self.measured: dict[str, float] = {}
        self.disturbed: list[str] = []

    def _once(self, name: str, threads: int, measure: Callable[[], float]) -> float:
        name += f", {threads} thread(s)"
        if name not in self.measured:
            self.measured[name], disturbed = undisturbed(measure, threads, attempts=10)
            self.disturbed += [name] if disturbed else []
        return self.measured[name]

    def peak(self, threads: int, dtype: str) -> float:
        """FLOP/s of matrix products: the best of all that are at hand.

        In narrow dtypes no less than in float32, to which a kernel may widen its operands.
        """
        products = [(name, kind) for kind in {dtype, "float32"} for name in _PRODUCTS[kind]]
        return 1e9 * max(
            self._once(f"GFLOP/s, {name}, {kind}", threads, partial(_peak, name, kind, threads))
            for name, kind in products
        )

    def read(self, threads: int, size: int) -> float:
        """bytes/s of reading ``size`` bytes again and again, shared among the threads."""
        return 1e9 * self._once(f"GB/s read, {size} bytes", threads, partial(_read, threads, size))

    def write(self, threads: int, size: int) -> float:
        """bytes/s of writing ``size`` bytes to pages that have been written before."""
        return 1e9 * self._once(f"GB/s written, {size} bytes", threads, partial(_write, threads, size))

    def activation(self, name: str) -> float:
        """Seconds of one ``sigmoid`` or ``tanh`` of the kernels, on one thread and data in the cache."""
        return 1e-9 * self._once(f"ns of a {name}", 1, partial(_activation, name))

    def multiplication(self) -> float:
        """Seconds of one product of two numbers, on one thread and data in the cache."""
        return 1e-9 * self._once("ns of a multiplication", 1, _multiplication)


_SIZE = 2048


def _onednn(a: Tensor, b: Tensor) -> Callable[[], object]:
    # On processors that are not Intel's it may be more than twice as fast as MKL, to which torch.mm goes.
    packed = torch.ops.mkldnn._reorder_linear_weight(b, len(a))
    return lambda: torch.ops.mkldnn._linear_pointwise(a, packed, None, "none", [], "")


def _ours(a: Tensor, b: Tensor) -> Callable[[], object]:
    out = torch.empty_like(a)
    return lambda: _cpu.matmul(a, b, out, torch.get_num_threads())


def _torch(a: Tensor, b: Tensor) -> Callable[[], object]:
    return lambda: torch.mm(a, b)


_PRODUCTS = {
    "float32": {"torch.mm": _torch, "oneDNN": _onednn, "ours": _ours},
    "bfloat16": {"torch.mm": _torch},
    "float16": {"torch.mm": _torch},
}


def _peak(name: str, dtype: str, threads: int) -> float:
    a, b = (torch.ones(_SIZE, _SIZE, dtype=DTYPES[dtype]) for _ in range(2))
    with thread_count(threads):
        return 2e-9 * _SIZE**3 / _best(_PRODUCTS[dtype][name](a, b), 0.5)


def _read(threads: int, size: int) -> float:
    """A sum: each thread reads its part over and over, the stride of the repetition being 0. GB/s."""
    numbers = max(1, size // 4 // threads)
    repetitions = max(1, (8 << 20) // (numbers * 4 * threads))
    again = torch.ones(threads, 1, numbers).expand(-1, repetitions, -1)
    out = torch.empty(threads)
    with thread_count(threads):
        return 1e-9 * again.numel() * 4 / _best(lambda: torch.sum(again, (1, 2), out=out))


_CALL = 16
"""Elements of a call that is nothing but overhead, which is subtracted."""


def _write(threads: int, size: int) -> float:
    buffer = torch.empty(max(64 * _CALL, size // 4))
    few = buffer[:_CALL]
    with thread_count(threads):
        overhead = _best(lambda: few.fill_(1.0))
        full = _best(lambda: buffer.fill_(1.0))
    return 1e-9 * buffer.numel() * 4 / max(full - overhead, 0.1 * full)


# 64k numbers: some hundred KB, which fit the second cache, and a call far longer than its overhead.
_IN_CACHE = 1 << 16


def _nanoseconds(call: Callable[[int], object]) -> float:
    """Of one element of a call of so many."""
    with thread_count(1):
        overhead, full = _best(lambda: call(_CALL)), _best(lambda: call(_IN_CACHE))
    return 1e9 * (full - overhead) / (_IN_CACHE - _CALL)


def _activation(name: str) -> float:
    x, out = torch.randn(_IN_CACHE), torch.empty(_IN_CACHE)
    return _nanoseconds(lambda n: _cpu.activation(name, x[:n], out[:n]))


def _multiplication() -> float:
    x, y, out = (torch.ones(_IN_CACHE) for _ in range(3))
    return _nanoseconds(lambda n: torch.mul(x[:n], y[:n], out=out[:n]))
