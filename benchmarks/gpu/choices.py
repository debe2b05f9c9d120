"""Turns the record of a check into the package's table of choices: ``python -m benchmarks.gpu.choices RECORD.json``

pyrnnfast/cuda_choices.json, the format of which pyrnnfast/choices.py tells, then holds what was measured on that card,
for each row the faster of our paths that were timed, in place of what it had of a card of that name. A record of which
anything failed, that is not whole, or that is of other sources than those here, gives none.

``--also EARLIER.json``: a record of the same card and versions, from before something was made faster, for the rows
that RECORD has not reached. It stands in the table by itself, with its own commit.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from pyrnnfast import choices

from . import record, tests
from .record import ROW, Record

KEPT = ("device", "capability", "driver", "versions", "commit", "sources", "date", "tests_passed", "tests_failed")


class Refused(ValueError):
    """The record is not one to choose by."""


def entry(found: Record, test_files: Iterable[str]) -> Record:
    """What the table holds of a record.

    Raises:
        Refused: it has failures, or lacks something.
    """
    if failed := record.failures(found):
        raise Refused("; ".join(failed))
    if lacks := record.missing(found, test_files):
        raise Refused(f"it lacks {', '.join(lacks)}")
    if found["commit"] is None:
        raise Refused("it is of no commit")
    fastest: dict[str, Record] = {}
    for row in found["rows"]:
        key = record.row_key(row)
        if row["path"] != "cudnn" and (key not in fastest or row["ours_ms"] < fastest[key]["ours_ms"]):
            fastest[key] = row
    names = (*ROW, "path", "ours_ms", "torch_ms")
    return {name: found[name] for name in KEPT} | {
        "sanitizer_errors": found["sanitizer_errors"]["total"],
        "rows": [{name: row[name] for name in names} for row in fastest.values()],
    }


def updated(table: Sequence[Record], new: Sequence[Record]) -> list[Record]:
    """Args: new: of one device"""
    return [old for old in table if old["device"] != new[0]["device"]] + list(new)


def besides(earlier: Record, new: Record) -> Record:
    """Of an entry what another does not have.

    Raises:
        Refused: it is of another card, or of other versions.
    """
    other = [name for name in record.IDENTITY[:4] if earlier[name] != new[name]]
    if other:
        raise Refused(f"the earlier record is of another {', '.join(other)}")
    known = {record.row_key(row) for row in new["rows"]}
    return earlier | {"rows": [row for row in earlier["rows"] if record.row_key(row) not in known]}


def text(table: Sequence[Record]) -> str:
    """As JSON, a line for each row."""

    def of(one: Record) -> str:
        head = {name: value for name, value in one.items() if name != "rows"}
        rows = ",\n".join(f"  {json.dumps(row)}" for row in one["rows"])
        return f'{json.dumps(head)[:-1]}, "rows": [\n{rows}\n]}}'

    return "[" + ",\n".join(map(of, table)) + "]\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.choices", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("record", help="path, or NAME in benchmarks/results")
    parser.add_argument("--also", help="an earlier record, for the rows that this one has not reached")
    parser.add_argument("--table", type=Path, default=choices.FILE, help="default: %(default)s")
    options = parser.parse_args(arguments)
    found = record.load(record.location(options.record))
    try:
        if found["sources"] != record.sources():
            raise Refused(f"it is of other sources than these, those of commit {found['commit']}")
        new = [entry(found, tests.files())]
        if options.also:
            new.insert(0, besides(entry(record.load(record.location(options.also)), tests.files()), new[0]))
    except Refused as reason:
        print(f"{options.record} chooses nothing: {reason}", file=sys.stderr)
        return 1
    table = text(updated(json.loads(options.table.read_text()), new))
    choices.read(table)  # raises, rather than that the package does when it is imported
    options.table.write_text(table)
    rows = [row for one in new for row in one["rows"]]
    faster = sum(row["ours_ms"] < row["torch_ms"] for row in rows)
    print(f"{options.table}: {new[0]['device']}, {faster} of {len(rows)} rows are faster on our kernels")
    return 0


if __name__ == "__main__":
    sys.exit(main())
