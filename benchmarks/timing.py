"""Times two callables against each other: in one process, turn by turn, so that both see the same noise."""

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple


class Pair(NamedTuple):
    """Median times of one call, in milliseconds."""

    ours_ms: float
    torch_ms: float
    rounds: int


def _milliseconds(fn: Callable[[], object]) -> float:
    begin = time.perf_counter()
    fn()
    return (time.perf_counter() - begin) * 1e3


def compare(ours: Callable[[], object], stock: Callable[[], object], seconds: float = 1.5) -> Pair:
    """Calls both in turn for about ``seconds``, at least five times each after two calls to warm up."""
    for _ in range(2):
        stock()
        ours()
    once = _milliseconds(stock) + _milliseconds(ours)
    rounds = max(5, min(500, int(seconds * 1e3 / once)))
    times = [(_milliseconds(stock), _milliseconds(ours)) for _ in range(rounds)]
    return Pair(
        ours_ms=statistics.median(ours_ms for _, ours_ms in times),
        torch_ms=statistics.median(torch_ms for torch_ms, _ in times),
        rounds=rounds,
    )
