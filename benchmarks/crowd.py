"""Calls that share the cores with others, ours against torch.nn's: ``python -m benchmarks.crowd [--out NAME] …``

Others are programs that do nothing but count, processes or threads of Python that make the same calls, or threads of a
team beyond the number of cores. Each side's processes have been started before and take turns: all of one side work for
a while, then all of the other's, and what counts is how many calls they get done, not the median of one: a thread that
waits for another that has no core takes a time slice of milliseconds, now and then.
"""

import argparse
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, NamedTuple

from . import record, rows
from .__main__ import add_filters, verify
from .processes import Workers, by_turns, setting, work
from .rows import Row

SIDES = ("ours", "torch")
CORES = len(os.sched_getaffinity(0))
CALLS: tuple[tuple[str, str, rows.Shape], ...] = (
    ("lstm", "inference", (100, 1, 128, 128)),
    ("gru", "training", (100, 1, 128, 128)),
    ("lstm", "inference", (1000, 1, 256, 256)),
    ("lstm", "training", (100, 16, 128, 128)),
    ("lstm", "training", (100, 32, 256, 256)),
)


class Crowd(NamedTuple):
    processes: int  # that make calls
    threads: int  # of each of them
    busy: int = 0  # programs that count
    callers: int = 1  # threads of Python in each process, with a team each

    def __str__(self) -> str:
        each = f" of {self.callers} callers" if self.callers > 1 else ""
        beside = f", {self.busy} busy programs" if self.busy else ""
        return f"{self.processes} process(es){each} of {self.threads} threads{beside}"


CROWDS = (
    Crowd(1, CORES),
    Crowd(1, CORES, 1),
    Crowd(1, CORES, CORES),
    Crowd(2, CORES),
    Crowd(4, CORES),
    Crowd(1, CORES, callers=2),
    Crowd(1, CORES, callers=4),
    Crowd(1, 2 * CORES),
    Crowd(1, 8 * CORES),
)


def measure(row: Row, crowd: Crowd, seconds: float, rounds: int) -> dict[str, float]:
    """Calls a second of each side, on an average."""
    callers = ["--callers", str(crowd.callers)]
    with ExitStack() as until:
        sides = {side: Workers("benchmarks.crowd", row, side, crowd.processes, until, callers) for side in SIDES}
        for _ in range(crowd.busy):
            busy = until.enter_context(subprocess.Popen([sys.executable, "-c", "while True: pass"]))
            until.callback(busy.kill)
        return {side: statistics.mean(calls) for side, calls in by_turns(sides, seconds, rounds).items()}


def table(calls: Sequence[Row], crowds: Sequence[Crowd], seconds: float, rounds: int) -> Iterator[dict[str, Any]]:
    for crowd in crowds:
        print(crowd)
        for call in calls:
            row = replace(call, threads=crowd.threads)
            with setting(row):
                verify(row, rows.sides(row))
            found = measure(row, crowd, seconds, rounds)
            sizes = ",".join(map(str, row.shape))
            figures = "".join(f"{side} {found[side]:9.1f} calls a second  " for side in SIDES)
            name = f"{row.cell:5}{row.mode:10}{sizes:>17} {row.dtype}"
            print(f"  {name}  {figures}{found['ours'] / found['torch']:7.2f} times torch's", flush=True)
            yield {
                "cell": row.cell, "mode": row.mode, "shape": list(row.shape), "dtype": row.dtype,
                **crowd._asdict(), **{f"{side}_calls": round(value, 3) for side, value in found.items()},
            }  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.crowd", description=(__doc__ or "").splitlines()[0])
    add_filters(parser)
    parser.add_argument("--mode", choices=rows.MODES, action="append", help="default: both")
    parser.add_argument("--seconds", type=float, default=1.0, help="of a turn of each side")
    parser.add_argument("--rounds", type=int, default=4, help="turns of each side")
    parser.add_argument("--out", help="write benchmarks/results/NAME.json")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)  # what a process of a side runs
    parser.add_argument("--threads", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--callers", type=int, default=1, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    cells, modes = options.cell or list(rows.CELLS), options.mode or list(rows.MODES)
    dtypes = options.dtype or ["float32"]
    if options.shape:
        calls = list(rows.table(["layer"], cells, modes, options.shape, [options.threads or CORES], dtypes))
    else:
        calls = [
            Row("layer", *call, CORES, dtype)
            for dtype in dtypes
            for call in CALLS
            if call[0] in cells and call[1] in modes
        ]
    if options.side:
        row = calls[0]
        work(row, rows.step(row, rows.module(row, ours=options.side == "ours")), options.callers)
        return 0
    found = list(table(calls, CROWDS, options.seconds, options.rounds))
    if options.out:
        settings = {"seconds": options.seconds, "rounds": options.rounds, "cores": CORES}
        print(record.save(options.out, record.origin(settings) | {"rows": found}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
