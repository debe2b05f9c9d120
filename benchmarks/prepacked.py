"""What ``pyrnnfast.prepack`` gives: ``python -m benchmarks.prepacked [--out NAME] …``

Cells, and layers that are fed a few steps at a time, with the state that they gave last: ours with weights that stay
packed, ours without, and torch.nn's, turn by turn in one process.
"""

import argparse
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from . import record, rows, targets
from .__main__ import TOLERANCE, difference
from .rows import Row
from .timing import Watch, thread_count, turn_by_turn, undisturbed

SIZES = (128, 256, 512, 1024)  # units and inputs
CALLS = (
    *(("cell", 1, batch) for batch in (1, 8, 32)),
    *(("streaming", steps, 1) for steps in (4, 10, 20)),
    ("streaming", 10, 8),
)
"""Kind, steps and sequences."""


def sides(row: Row) -> dict[str, rows.Step]:
    """All of them give the same, call by call."""
    torchs = rows.step(row, rows.module(row, ours=False))
    return {"ours": rows.our_step(row), "torch": torchs, "prepacked": rows.our_step(row, prepacked=True)}


def verify(row: Row, each: dict[str, rows.Step]) -> None:
    for _ in range(3):  # a first one, the one that packs, and one that finds it done
        found = {side: step() for side, step in each.items()}
        for side in ("ours", "prepacked"):
            for ours, torchs in zip(found[side], found["torch"], strict=True):
                if not difference(ours, torchs) <= TOLERANCE[row.dtype]:
                    raise SystemExit(f"{row}: {side} and torch differ; nothing timed")


def table(chosen: list[Row], seconds: float) -> Iterator[dict[str, Any]]:
    watches = {threads: Watch(threads) for threads in {row.threads for row in chosen}}
    for row in chosen:
        with thread_count(row.threads), torch.no_grad():
            each = sides(row)
            verify(row, each)
            times, disturbed = undisturbed(partial(turn_by_turn, each, seconds), row.threads, watches[row.threads])
        found = {f"{side}_ms": 1e3 * value for side, value in times.medians.items()}
        ours, torchs = (found[f"{side}_ms"] / found["prepacked_ms"] for side in ("ours", "torch"))
        print(
            f"{row!s:58} {found['prepacked_ms']:9.4f} ms, else {ours:.2f} times as long, torch {torchs:.2f}", flush=True
        )
        yield {
            "kind": row.kind, "cell": row.cell, "shape": list(row.shape), "dtype": row.dtype, "threads": row.threads,
            "disturbed": disturbed, **found,
        }  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cell", action="append", choices=tuple(rows.CELLS), help="default: all")
    parser.add_argument("--dtype", action="append", choices=tuple(rows.DTYPES), help="default: float32")
    parser.add_argument("--threads", type=int, action="append", help="default: 1")
    parser.add_argument("--seconds", type=float, default=0.3, help="of each row")
    parser.add_argument("--out", help="write benchmarks/results/NAME.json")
    options = parser.parse_args(arguments)
    chosen = [
        Row(kind, cell, "inference", (steps, batch, size, size), threads, dtype)
        for dtype in options.dtype or ["float32"]
        for cell in options.cell or rows.CELLS
        for size in SIZES
        for kind, steps, batch in CALLS
        for threads in options.threads or [1]
    ]
    found = list(table(chosen, options.seconds))
    for cell in dict.fromkeys(row.cell for row in chosen):
        own = [e for e in found if e["cell"] == cell]
        gain, ratio = (targets.mean(e[f"{side}_ms"] / e["prepacked_ms"] for e in own) for side in ("ours", "torch"))
        print(f"{cell}: geometric means, else {gain:.2f} times as long, torch {ratio:.2f}")
    if options.out:
        settings = {"seconds": options.seconds, "threads": options.threads or [1]}
        print(record.save(options.out, record.origin(settings) | {"rows": found}))


if __name__ == "__main__":
    main()
