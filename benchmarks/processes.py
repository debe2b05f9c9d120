"""Processes that make the calls of one side each and take turns, as two sides in one would be in each other's way."""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import torch

from .rows import Row
from .timing import thread_count

_REST = 0.1  # seconds


@contextmanager
def setting(row: Row) -> Iterator[None]:
    """Of the thread that makes a row's calls: both are each thread's own."""
    with thread_count(row.threads), torch.set_grad_enabled(row.mode == "training"):
        yield


def work(row: Row, step: Callable[[], object], callers: int = 1) -> None:
    """Of one process: for each line, a number of seconds, makes calls for so long, and tells how many a second; with
    several callers, threads of Python that make them at the same time, of all together."""

    def calls_a_second(seconds: float) -> float:
        done = 0
        with setting(row):
            begin = time.perf_counter()
            while (taken := time.perf_counter() - begin) < seconds or done == 0:
                step()
                done += 1
        return done / taken if taken > 0 else 0.0

    with ThreadPoolExecutor(callers) as pool:
        for _ in range(2):
            list(pool.map(calls_a_second, [0.0] * callers))
        print("ready", flush=True)
        for line in sys.stdin:
            print(sum(pool.map(calls_a_second, [float(line)] * callers)), flush=True)


class Workers:
    """The processes of one side, each a benchmark that is told to ``work`` at a row."""

    def __init__(
        self, benchmark: str, row: Row, side: str, count: int, until: ExitStack, options: Sequence[str] = ()
    ) -> None:
        shape = ",".join(map(str, row.shape))
        filters = ["--cell", row.cell, "--shape", shape, "--dtype", row.dtype, "--mode", row.mode]
        command = [sys.executable, "-m", benchmark, "--side", side, "--threads", str(row.threads), *filters, *options]
        self._processes = [
            until.enter_context(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
            for _ in range(count)
        ]
        for process in self._processes:
            until.callback(process.kill)
        self._answers()

    def calls_a_second(self, seconds: float) -> float:
        """Of all of them together."""
        for process in self._processes:
            assert process.stdin is not None
            print(seconds, file=process.stdin, flush=True)
        return sum(map(float, self._answers()))

    def _answers(self) -> list[str]:
        answers = []
        for process in self._processes:
            assert process.stdout is not None
            answers.append(process.stdout.readline())
        if not all(answers):
            raise SystemExit("a process ended before its time")
        return answers


def by_turns(sides: Mapping[str, Workers], seconds: float, rounds: int) -> dict[str, list[float]]:
    """Calls a second of each side, in each of its turns; each round begins with another side.

    Before a turn is a rest: threads of the last one go on looking for work for a while, and ours would take them for
    company.
    """
    names = list(sides)
    found: dict[str, list[float]] = {side: [] for side in names}
    for turn in range(rounds):
        k = turn % len(names)
        for side in names[k:] + names[:k]:
            time.sleep(_REST)
            found[side].append(sides[side].calls_a_second(seconds))
    return found
