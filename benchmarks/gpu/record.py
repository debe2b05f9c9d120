"""The record of a check: what one card said of one state of the sources, stage by stage.

A record is of one card, one set of versions and one state of the sources; a stage on another begins a new one. It is
written whole or not at all, after every stage, so that a run that is cut off leaves the stages that it has done.
"""

import datetime
import hashlib
import json
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .place import ROOT

STAGES = ("build", "tests", "sanitizer", "benchmark")
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
RESULTS = ROOT / "benchmarks" / "results"

Record = dict[str, Any]

IDENTITY = ("device", "capability", "driver", "versions", "commit", "sources")
ROW = ("cell", "mode", "shape", "dtype", "tf32", "layers", "bidirectional", "packed", "padded")
"""What makes a row one, besides its path."""


def location(out: str) -> Path:
    """A bare name is one of benchmarks/results, anything else a path."""
    return Path(out) if out.endswith(".json") or "/" in out else RESULTS / f"{out}.json"


# Where it comes from -------------------------------------------------------------------------------------------------


def commit(root: Path = ROOT) -> str | None:
    """That of the working tree, without git where it is not installed; None where there is no repository."""
    try:
        command = ["git", "-C", str(root), "rev-parse", "HEAD"]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        pass
    try:
        head = (root / ".git" / "HEAD").read_text().strip()
        if not head.startswith("ref: "):
            return head
        name = head.removeprefix("ref: ")
        loose, packed = root / ".git" / name, root / ".git" / "packed-refs"
        if loose.exists():
            return loose.read_text().strip()
        return next(line.split()[0] for line in packed.read_text().splitlines() if line.endswith(f" {name}"))
    except (OSError, StopIteration):
        return None


def sources(root: Path = ROOT) -> str:
    """A digest of all that decides over the results: with it a record is known to be of these files, commit or not."""
    digest = hashlib.sha256()
    files = [root / "CMakeLists.txt"]
    for directory, pattern in (("csrc", "*"), ("pyrnnfast", "*.py"), ("tests/gpu", "*.py")):
        files += sorted(f for f in (root / directory).rglob(pattern) if f.is_file())
    for file in files:
        digest.update(f"{file.relative_to(root)}\0".encode() + file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


# Reading, merging, writing -------------------------------------------------------------------------------------------


def new(identity: Record) -> Record:
    return {name: identity[name] for name in IDENTITY} | {
        "date": datetime.date.today().isoformat(),
        "stages": {},
        "tests_passed": 0,
        "tests_failed": 0,
        "tests_skipped": 0,
        "tests": {},
        "sanitizer_errors": {"total": 0},
        "measured": {},
        "rows": [],
        "rows_wrong": [],
        "rows_not_reached": [],
    }


def load(path: Path) -> Record:
    record: Record = json.loads(path.read_text())
    return record


def open_or_new(path: Path, identity: Record) -> Record:
    """The record at a path if it is of this card and these sources, else an empty one."""
    if path.exists():
        found = load(path)
        other = [name for name in IDENTITY if found.get(name) != identity[name]]
        if not other:
            return found
        print(f"{path} is of another {', '.join(other)}: begun anew", flush=True)
    return new(identity)


def merge(record: Record, stage: str, seconds: float, found: Record) -> Record:
    """The record with what a stage has found, or found again.

    ``found`` may have ``tests``: by file ``passed``, ``failed``, ``skipped`` and the names of the ``failures``;
    ``sanitizer_errors``: by tool; ``measured``; ``rows``, ``rows_wrong`` and ``rows_not_reached``; ``problems``.
    """
    result = json.loads(json.dumps(record))
    before = result["stages"].get(stage, {}).get("problems", {})
    # Problems by the part of the stage that has them, so that a part that is run again may have lost them.
    problems = {part: p for part, p in before.items() if part not in found["problems"]} | found["problems"]
    result["stages"][stage] = {
        "seconds": round(seconds, 1),
        "problems": {part: p for part, p in problems.items() if p},
    } | {name: value for name, value in found.items() if name in ("calls", "planted")}
    result["tests"] |= found.get("tests", {})
    for outcome in ("passed", "failed", "skipped"):
        result[f"tests_{outcome}"] = sum(of_file[outcome] for of_file in result["tests"].values())
    errors = result["sanitizer_errors"] | found.get("sanitizer_errors", {})
    result["sanitizer_errors"] = errors | {"total": sum(n for name, n in errors.items() if name != "total")}
    result["measured"] |= found.get("measured", {})
    if stage == "benchmark":
        result["rows"] = list(_by_key([*result["rows"], *found["rows"]], path=True).values())
        wrong = _by_key([*result["rows_wrong"], *found["rows_wrong"]], path=True)
        timed = _by_key(found["rows"], path=True)
        result["rows_wrong"] = [row for key, row in wrong.items() if key not in timed]
        reached = _by_key([*result["rows"], *result["rows_wrong"]])
        left = _by_key([*result["rows_not_reached"], *found["rows_not_reached"]])
        result["rows_not_reached"] = [row for key, row in left.items() if key not in reached]
    return result  # type: ignore[no-any-return]


def row_key(row: Record, path: bool = False) -> str:
    return json.dumps([row[name] for name in (*ROW, "path")[: len(ROW) + path]])


def _by_key(rows: Iterable[Record], path: bool = False) -> dict[str, Record]:
    return {row_key(row, path): row for row in rows}


# What it says --------------------------------------------------------------------------------------------------------


def failures(record: Record, stages: Iterable[str] = STAGES) -> list[str]:
    """What went wrong in these stages; a stage that has not run is nothing that went wrong."""
    result = []
    for stage in stages:
        done = record["stages"].get(stage)
        result += [f"{stage}: {problem}" for part in (done or {}).get("problems", {}).values() for problem in part]
        if stage == "tests" and done is not None:
            result += ["tests: not one GPU test passed"] if record["tests_passed"] == 0 else []
            failed = record["tests_failed"]
            result += [f"tests: {failed} failed"] if failed else []
        if stage == "sanitizer":
            for tool, count in record["sanitizer_errors"].items():
                result += [f"sanitizer: {tool} found {count}"] if count and tool != "total" else []
        if stage == "benchmark" and record["rows_wrong"]:
            result.append(f"benchmark: {len(record['rows_wrong'])} rows where ours and cuDNN differ")
    return result


def missing(record: Record, test_files: Iterable[str]) -> list[str]:
    """What a whole check has and this record does not."""
    result = [stage for stage in STAGES if stage not in record["stages"]]
    result += [name for name in test_files if name not in record["tests"]]
    result += [tool for tool in TOOLS if tool not in record["sanitizer_errors"]]
    return result + ([] if record["rows"] else ["rows of the benchmark"])
