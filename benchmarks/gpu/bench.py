"""The stage that times: our paths, each by force, against torch.nn's layers, which are cuDNN's, on the card.

``python -m benchmarks.gpu.bench FILE …`` writes lines of JSON as it goes: ``{"wanted": [row, …]}``, ``{"measured":
…}``, ``{"begun": row}`` and ``{"ended": row}`` around each row, in between ``{"row": entry}`` for each path that was
timed and ``{"wrong": entry}`` for each on which the two sides differ. `check` reads what there is, also when this was
stopped.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import limits, record
from .rows import CELLS, KINDS, PATHS, Row, Step, precision, sides, table
from .timing import turn_by_turn

# In parts of the largest value. cuDNN rounds to 16 bits at other places than we do, and over a thousand steps in other
# orders; what is wrong is off by much more.
TOLERANCE = {"float64": 1e-10, "float32": 2e-4, "tf32": 0.03, "float16": 0.03, "bfloat16": 0.12}


def verify(row: Row, calls: Mapping[str, Step]) -> dict[str, float]:
    """By path the largest difference between ours and torch's, relative to the largest value."""
    true = calls["torch"]()
    return {
        path: max(_difference(found, expected) for found, expected in zip(call(), true, strict=True))
        for path, call in calls.items()
        if path != "torch"
    }


def tolerance(row: Row) -> float:
    return TOLERANCE["tf32" if row.tf32 else row.dtype]


def _difference(found: Tensor, expected: Tensor) -> float:
    expected = expected.float() if expected.dtype.itemsize < 4 else expected
    error = (found.to(expected) - expected).abs().max().item() / max(expected.abs().max().item(), 1e-30)
    return error if math.isfinite(error) else math.inf  # not NaN, which is neither more nor less than anything


def run_row(row: Row, paths: Sequence[str], seconds: float, figures: limits.Figures) -> tuple[list[Any], list[Any]]:
    """An entry for every path of ours, and one for every path that is wrong."""
    bound = limits.limit(row, figures)
    with precision(row.tf32), torch.set_grad_enabled(row.mode == "training"):
        # Where there is a persistent form, the other took several times as long on the first card.
        calls = sides(row, paths or ("persistent", "step"), every=bool(paths))
        errors = verify(row, calls)
        right = {path for path, error in errors.items() if error <= tolerance(row)}
        wrong = [
            row.asdict() | {"path": path, "error": e if math.isfinite(e) else None}  # JSON has no infinity
            for path, e in errors.items()
            if path not in right
        ]
        timed = {path: call for path, call in calls.items() if path in right or path == "torch"}
        times = turn_by_turn(timed, seconds) if right else None
    entries = [
        row.asdict()
        | {
            "path": path,
            "ours_ms": round(times.medians[path], 5),
            "torch_ms": round(times.medians["torch"], 5),
            "limit_ms": None if bound is None else round(bound * 1e3, 5),
            "error": errors[path],
            "rounds": times.rounds,
        }
        for path in timed
        if times is not None and path != "torch"
    ]
    return entries, wrong


def line(entry: Mapping[str, Any]) -> str:
    row = Row(**{name: entry[name] for name in record.ROW})
    ratio, bound = entry["torch_ms"] / entry["ours_ms"], entry["limit_ms"]
    far = f"{entry['ours_ms'] / bound:8.2f} × limit" if bound else ""
    return f"{row!s:52}{entry['path']:>11}{entry['ours_ms']:10.4g} ms{ratio:7.2f} × cuDNN{far}"


def add_filters(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cell", choices=CELLS, action="append", help="default: all")
    parser.add_argument("--dtype", choices=KINDS, action="append", help="default: all")
    parser.add_argument(
        "--path", choices=PATHS, action="append", help="default: persistent where it has a plan, else step"
    )
    parser.add_argument("--seconds", type=float, default=360, help="for all rows; default: %(default)s")
    parser.add_argument("--row-seconds", type=float, default=0.35, help="for each row; default: %(default)s")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.bench", description=(__doc__ or "").splitlines()[0])
    add_filters(parser)
    parser.add_argument("file", type=Path, help="where a line goes for every row")
    parser.add_argument("--done", type=Path, help="a record, the rows of which are not timed again")
    options = parser.parse_args(arguments)
    end = time.monotonic() + options.seconds
    # Whoever asks for paths wants them timed.
    skipped = record.load(options.done)["rows"] if options.done and not options.path else []
    known = {record.row_key(entry) for entry in skipped}
    with options.file.open("w") as file:

        def write(what: str, value: object) -> None:
            file.write(json.dumps({what: value}) + "\n")
            file.flush()

        chosen = [
            row
            for row in table(options.cell or CELLS, options.dtype or KINDS)
            if record.row_key(row.asdict()) not in known
        ]
        write("wanted", [row.asdict() for row in chosen])
        figures = limits.measure()
        write("measured", figures.asdict())
        print(figures.asdict(), flush=True)
        for row in chosen:
            if time.monotonic() > end:
                print("the time is up", flush=True)
                break
            write("begun", row.asdict())
            try:
                entries, wrong = run_row(row, options.path or (), options.row_seconds, figures)
            except Exception as error:  # of this row, such as want of memory; it is a problem of the record
                write("failed", row.asdict() | {"why": f"{type(error).__name__}: {str(error)[:500]}"})
                print(f"{row}: {type(error).__name__}: {error}", flush=True)
                torch.cuda.synchronize()  # raises, and ends it, where nothing more can run
                continue
            for entry in entries:
                write("row", entry)
                print(line(entry), flush=True)
            for entry in wrong:
                write("wrong", entry)
                print(f"{row} {entry['path']}: ours and torch differ by {entry['error']}; not timed", flush=True)
            write("ended", row.asdict())
    return 0


if __name__ == "__main__":
    sys.exit(main())
