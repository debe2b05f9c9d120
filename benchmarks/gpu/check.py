"""Everything that a card can tell: ``python -m benchmarks.gpu.check [--stage build,tests,sanitizer,benchmark]``

Each stage ends within ten minutes, so that each can be a command of its own; all of them write to one record. Ends with
status 0 where whatever was asked for went well: all tests passed, and there were some; compute-sanitizer found nothing;
ours and cuDNN agree in all rows. What the record then still lacks of a whole check is printed.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from .. import files
from . import build, place, record, sanitizer, tests
from .record import STAGES, TOOLS, Record


def _listed(choices: Sequence[str]) -> Any:
    def read(text: str) -> list[str]:
        names = text.split(",")
        unknown = [name for name in names if name not in choices]
        if unknown:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: not of {', '.join(choices)}")
        return names

    return read


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.check", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--stage", type=_listed(STAGES), default=list(STAGES), help="default: all, one after the other")
    parser.add_argument("--out", default=str(place.BUILD / "check.json"), help="path, or NAME in benchmarks/results")
    parser.add_argument("--commit", help="of the sources; default: what git or .git says")
    parser.add_argument("--tests", type=_listed(tests.files()), default=tests.files(), help="files; default: all")
    parser.add_argument("--tools", type=_listed(TOOLS), default=list(TOOLS), help="of compute-sanitizer; default: all")
    parser.add_argument("--limit", type=float, default=540, help="seconds for tests or sanitizer; default: %(default)s")
    parser.add_argument("--seconds", type=float, default=360, help="for the benchmark; default: %(default)s")
    parser.add_argument("--architectures", help="to compile for; default: this card's")
    parser.add_argument(
        "--bench", default="", help="further options of python -m benchmarks.gpu.bench, such as '--cell lstm'"
    )
    return parser.parse_args(arguments)


def facts() -> Record:
    """Of the card; ends the program where there is none."""
    asked = subprocess.run(
        place.python("-m", "benchmarks.gpu.facts"),
        cwd=place.ROOT,
        env=place.environment(),
        capture_output=True,
        text=True,
    )
    if asked.returncode != 0:
        raise SystemExit(f"gpu-check needs a CUDA device, and there is none here: {asked.stderr.strip()}")
    found: Record = json.loads(asked.stdout.splitlines()[-1])
    return found


def _build(options: argparse.Namespace, card: Record) -> Record:
    try:
        build.build(options.architectures or card["capability"].replace(".", ""))
    except build.Failed as reason:
        return {"problems": {"build": [str(reason)]}}
    return {"problems": {"build": []}}


def _tests(options: argparse.Namespace, beside: Future[Record] | None) -> Record:
    """The files in tests.ALONE come last, and behind what runs beside the others."""
    end = time.monotonic() + options.limit
    result = tests.run([name for name in options.tests if name not in tests.ALONE], options.limit)
    if beside:
        wait([beside])
    alone = [name for name in options.tests if name in tests.ALONE]
    more = tests.run(alone, max(end - time.monotonic(), 60.0))
    return {kind: result[kind] | more[kind] for kind in result}


def _benchmark(options: argparse.Namespace, out: Path) -> Record:
    lines = place.LOGS / "rows.jsonl"
    lines.parent.mkdir(parents=True, exist_ok=True)
    lines.write_text("")
    command = place.python("-m", "benchmarks.gpu.bench", str(lines), "--seconds", str(options.seconds))
    command += [*(["--done", str(out)] if out.exists() else []), *options.bench.split()]
    limit = options.seconds + 120
    done = place.run(command, "benchmark", limit)
    print(done.tail(400), flush=True)
    found = read_rows(lines.read_text())
    if done.status != 0:
        found["problems"]["benchmark"].append(f"the benchmark {done.why(limit)}\n{done.tail(20)}")
    return found


def read_rows(lines: str) -> Record:
    """What `bench` has written, whole or not, as `record.merge` takes it."""
    entries = [json.loads(line) for line in lines.splitlines()]
    kinds = ("measured", "wanted", "begun", "ended", "row", "wrong", "failed")
    of = {kind: [entry[kind] for entry in entries if kind in entry] for kind in kinds}
    begun, ended = ({record.row_key(row): row for row in of[kind]} for kind in ("begun", "ended"))
    # By row, so that one that did not come to its end is remembered until it does.
    why = {record.row_key(row): row["why"] for row in of["failed"]}
    hung = {
        key: [] if key in ended else [f"this row did not come to its end: {row}: {why.get(key, 'it was stopped')}"]
        for key, row in begun.items()
    }
    return {
        "measured": of["measured"][0] if of["measured"] else {},
        "rows": of["row"],
        "rows_wrong": of["wrong"],
        "rows_not_reached": [row for rows in of["wanted"] for row in rows if record.row_key(row) not in begun],
        "problems": {"benchmark": []} | hung,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    card = facts()
    identity = card | {"commit": options.commit or record.commit(), "sources": record.sources()}
    out = record.location(options.out)
    print(f"{card['device']}, driver {card['driver']}, {card['versions']}, commit {identity['commit']}", flush=True)
    found = record.open_or_new(out, identity)
    beside: Future[Record] | None = None
    for stage in options.stage:
        begin = time.monotonic()
        print(f"-- {stage}", flush=True)
        if stage == "build":
            result = _build(options, card)
        elif not place.SITE.exists():
            raise SystemExit(f"{stage} needs what --stage build leaves in {place.SITE}")
        elif stage == "tests":
            if "sanitizer" in options.stage[options.stage.index("tests") :]:
                # Both are work of the host for the most part.
                beside = ThreadPoolExecutor(1).submit(sanitizer.run, options.tools, options.limit)
            result = _tests(options, beside)
        elif stage == "sanitizer":
            result = beside.result() if beside else sanitizer.run(options.tools, options.limit)
        else:
            files.write(out, found)  # for the rows that it has
            result = _benchmark(options, out)
        found = record.merge(found, stage, time.monotonic() - begin, result)
        files.write(out, found)
        if stage == "build" and record.failures(found, ["build"]):
            break
    failed = record.failures(found, options.stage)
    print(
        f"{out}: {found['tests_passed']} tests passed, sanitizer {found['sanitizer_errors']}, {len(found['rows'])} rows"
    )
    print(*(f"FAILED {failure}" for failure in failed), sep="\n")
    lacks = record.missing(found, tests.files())
    print(f"still to be done for a whole check: {', '.join(lacks)}" if lacks else "the check is whole")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
