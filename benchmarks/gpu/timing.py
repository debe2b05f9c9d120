"""Times calls against each other on the card: by CUDA events, turn by turn in one process, medians."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

_LEAST_MS = 1.5  # of one sample: calls that take less are made several times, so that the launch latency is spread


def milliseconds(fn: Callable[[], object], calls: int) -> float:
    """Of one of so many calls, from an idle card to an idle card."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    for _ in range(calls):
        fn()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / calls


class Times(NamedTuple):
    medians: dict[str, float]  # milliseconds of one call, by side
    rounds: int


def turn_by_turn(
    sides: Mapping[str, Callable[[], object]], seconds: float, least: int = 5, most: int = 60, clock: object = None
) -> Times:
    """Calls every side once a round, each round beginning with another one, for about ``seconds``.

    Args:
        clock: instead of :func:`milliseconds`
    """
    measure: Callable[[Callable[[], object], int], float] = milliseconds if clock is None else clock  # type: ignore[assignment]
    names = list(sides)
    calls = {}
    for name, fn in sides.items():
        measure(fn, 1)
        calls[name] = max(1, min(50, round(_LEAST_MS / max(measure(fn, 1), 1e-3))))
    times: dict[str, list[float]] = {name: [] for name in names}
    begin, rounds = time.monotonic(), 0
    while rounds < least or (rounds < most and time.monotonic() - begin < seconds):
        first = rounds % len(names)
        for name in names[first:] + names[:first]:
            times[name].append(measure(sides[name], calls[name]))
        rounds += 1
    return Times({name: statistics.median(values) for name, values in times.items()}, rounds)
