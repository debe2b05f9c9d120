"""The stage that runs tests/gpu, one process for each file: a kernel that crashes leaves its process without CUDA."""

import json
import time
from collections.abc import Sequence
from pathlib import Path

from . import place
from .place import LOGS, ROOT
from .record import Record

TESTS = ROOT / "tests" / "gpu"

LIMIT = 540.0  # seconds of all files together
FILE_LIMIT = 300.0
NO_OUTCOME = " (no outcome)"


def files() -> list[str]:
    return sorted(path.name for path in TESTS.glob("test_*.py"))


def read(outcomes: str) -> Record:
    """Counts and failures, from the lines that tests/gpu/conftest.py writes as the tests go.

    A test that began and has no outcome took the process with it, or was stopped: it failed.
    """
    state: dict[str, str] = {}
    for line in outcomes.splitlines():
        entry = json.loads(line)
        state[entry["test"]] = entry["outcome"]  # a test that passed may fail yet, in what comes after it
    failed = [test if outcome == "failed" else f"{test}{NO_OUTCOME}" for test, outcome in state.items()]
    failed = [name for name, outcome in zip(failed, state.values(), strict=True) if outcome in ("failed", "begun")]
    counted = list(state.values())
    return {
        "passed": counted.count("passed"),
        "failed": len(failed),
        "skipped": counted.count("skipped"),
        "failures": failed[:50],
    }


def run(names: Sequence[str], limit: float = LIMIT) -> Record:
    """Runs these files; returns what `record.merge` takes."""
    end = time.monotonic() + limit
    tests: dict[str, Record] = {}
    problems: dict[str, list[str]] = {}
    for name in names:
        outcomes = LOGS / f"{Path(name).stem}.outcomes"
        outcomes.parent.mkdir(parents=True, exist_ok=True)
        outcomes.write_text("")
        command = place.python("-m", "pytest", "-c", str(TESTS / "pytest.ini"), str(TESTS / name))
        # Of the time for all, so that one that hangs does not take the others'.
        left = min(end - time.monotonic(), FILE_LIMIT)
        # Plugins that happen to be installed have no part.
        alone = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
        done = place.run([*command, "--outcomes", str(outcomes)], Path(name).stem, left, alone)
        found = tests[name] = read(outcomes.read_text())
        # pytest's status is 1 where tests failed, which are counted; any other is a matter of its own.
        problems[name] = [] if done.status in (0, 1) else [f"{name} {done.why(left)}\n{done.tail(20)}"]
        # After one that began and did not end there may be others that did not even begin.
        problems[name] += [f"{name} ended in {test}" for test in found["failures"] if test.endswith(NO_OUTCOME)]
        print(
            f"{name}: {found['passed']} passed, {found['failed']} failed, {found['skipped']} skipped, "
            f"{done.seconds:.0f} s, {done.log}",
            flush=True,
        )
        print("\n".join(f"  {failure}" for failure in found["failures"]), end="\n" if found["failures"] else "")
        if found["failed"]:
            print(done.tail(60), flush=True)
    return {"tests": tests, "problems": problems}
