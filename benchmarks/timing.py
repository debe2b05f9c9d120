"""Times callables against each other: in one process, turn by turn, so that all see the same noise."""

import contextlib
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch

from pyrnnfast import _cpu


@contextlib.contextmanager
def thread_count(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def seconds_of(fn: Callable[[], object]) -> float:
    begin = time.perf_counter()
    fn()
    return time.perf_counter() - begin


class Times(NamedTuple):
    """Medians of the seconds of one call, by side."""

    medians: dict[str, float]  # behind a call of its own
    first: dict[str, float]  # behind another side's
    rounds: int


def turn_by_turn(sides: Mapping[str, Callable[[], object]], seconds: float, least: int = 5, most: int = 5000) -> Times:
    """Gives every side a turn a round, after a round to warm up, for about ``seconds`` and at least ``least`` rounds.

    A turn is two calls, the second of which counts, as it would in a loop. The first finds caches, heap and threads as
    another side has left them, which says more of that one: behind 100 ms of single small operators the team is asleep,
    and others have taken the caches.

    Each round begins with another side: going first, or behind a large product, is worth some per cent.
    """
    names = list(sides)
    for name in names:
        sides[name]()
    first: dict[str, list[float]] = {name: [] for name in names}
    second: dict[str, list[float]] = {name: [] for name in names}
    begin, rounds = time.perf_counter(), 0
    while rounds < least or (rounds < most and time.perf_counter() - begin < seconds):
        k = rounds % len(names)
        for name in names[k:] + names[:k]:
            first[name].append(seconds_of(sides[name]))
            second[name].append(seconds_of(sides[name]))
        rounds += 1
    medians, of_first = ({name: statistics.median(values) for name, values in t.items()} for t in (second, first))
    return Times(medians, of_first, rounds)


def _cpu_seconds_of_others() -> float:
    """What all cores have done for other programs, and for other machines on the same processor ("steal")."""
    # user nice system idle iowait irq softirq steal
    fields = [int(field) for field in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]
    return (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK") - time.process_time()


T = TypeVar("T")


def undisturbed(
    measure: Callable[[], T], threads: int, watch: "Watch | None" = None, attempts: int = 3
) -> tuple[T, bool]:
    """``measure()``, again when others had a core that its threads need; and whether it was so to the last.

    Args:
        watch: is asked, too, before and after
    """
    free = (os.cpu_count() or 1) - threads + 0.2  # cores that others may have
    for _ in range(attempts):
        before = watch is None or watch.wait()
        begin, others = time.perf_counter(), _cpu_seconds_of_others()
        result = measure()
        taken = (_cpu_seconds_of_others() - others) / (time.perf_counter() - begin)
        if taken <= free and before and (watch is None or watch.all_is_well()):
            return result, False
        if watch is not None and watch.patience <= 0:
            break
    return result, True


class Watch:
    """Notices that the cores do not deliver what they did, or stand elsewhere than they did.

    They do not deliver when a neighbour on the machine takes one of them. The measure is a matrix product of some
    milliseconds on all the threads: without one of the cores it takes about twice as long. A spinning team of threads
    suffers much more than that, so what is timed meanwhile is worthless.

    Where they stand changes on a virtual machine: its host moves them. Now a barrier takes 25 to 60 ns, as between
    cores that share a cache, now 0.3 μs, and a step of a small recurrence, which hands its state over as well, up to
    twice as long. The two are not to be mixed.

    Args:
        threads: on which all this is measured; a single one stands nowhere
        apart: what is timed is to be timed on cores that stand apart, instead of ones near to each other
        patience: seconds to wait for cores to come to stand so, in all
    """

    _SIZE = 512
    _LOWEST = 0.8  # of the usual speed
    _APART = 3.0  # times the shortest meeting that was seen

    def __init__(self, threads: int, apart: bool = False, patience: float = 900.0) -> None:
        self.threads = threads
        self.apart = apart
        self.patience = patience
        self._a, self._b, self._out = (torch.ones(self._SIZE, self._SIZE) for _ in range(3))
        self._usual, _ = undisturbed(lambda: self._median(60), threads, attempts=20)
        self.met_in = self._shortest = self.seconds_to_meet()

    def _median(self, samples: int) -> float:
        with thread_count(self.threads):
            product = partial(torch.mm, self._a, self._b, out=self._out)
            return statistics.median(seconds_of(product) for _ in range(samples))

    def seconds_to_meet(self) -> float:
        """What a barrier of the threads takes."""
        with thread_count(self.threads):
            return min(_cpu.seconds_to_meet(self.threads, 100) for _ in range(10))

    def steady(self) -> bool:
        return self._median(5) * self._LOWEST <= self._usual

    def stands_right(self) -> bool:
        """Whether the cores stand as they should; true as long as cores that stand apart have seen no others."""
        if self.threads == 1:
            return True
        self.met_in = self.seconds_to_meet()
        self._shortest = min(self._shortest, self.met_in)
        return self.right(self.met_in)

    def right(self, met_in: float) -> bool:
        """Whether the cores stood as they should when a barrier took so long, by all that is known by now."""
        return (met_in > self._APART * self._shortest) == self.apart

    def wait(self, seconds: float = 2.0) -> bool:
        """Until the cores stand right, and then until they deliver, but not for ever; whether they do."""
        begin = time.perf_counter()
        while not (right := self.stands_right()) and time.perf_counter() - begin < self.patience:
            # The host moves what works or wakes.
            self._median(5)
            time.sleep(0.1)
        self.patience -= time.perf_counter() - begin
        end = time.perf_counter() + seconds
        while not (steady := self.steady()) and time.perf_counter() < end:
            time.sleep(0.05)
        return right and steady

    def all_is_well(self) -> bool:
        """Right after something was timed: whether nothing has changed meanwhile."""
        return self.stands_right() and self.steady()
