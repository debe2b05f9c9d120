"""The stage that runs tests/gpu, several processes side by side: most of a test is work of the host.

A kernel that crashes takes its process with it, and one that hangs is ended with it after the time that tests/gpu's
pytest.ini gives a test; the tests that are left then go on in a new one.
"""

import json
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from . import place
from .place import LOGS, ROOT
from .record import Record

TESTS = ROOT / "tests" / "gpu"

LIMIT = 540.0  # seconds
SHARDS = {"test_accuracy.py": 8, "test_features.py": 5}
"""Processes for a file, if not one."""
MOST_PROCESSES = 10
"""One after the other for a part of a file, where tests take theirs with them."""
ALONE = ("test_streams.py",)
"""Looks at the memory of the whole card, and at who waits for it."""
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
    """Runs these files side by side; returns what `record.merge` takes."""
    end = time.monotonic() + limit
    with ThreadPoolExecutor(max(len(names), 1)) as pool:
        results = list(pool.map(lambda name: _file(name, end), names))
    return {kind: {name: value for r in results for name, value in r[kind].items()} for kind in ("tests", "problems")}


def _file(name: str, end: float) -> Record:
    begin, shards = time.monotonic(), SHARDS.get(name, 1)
    with ThreadPoolExecutor(shards) as pool:
        parts = list(pool.map(lambda part: _shard(name, part, shards, end), range(shards)))
    found = read("".join(outcomes for outcomes, _ in parts))
    problems = [problem for _, own in parts for problem in own]
    if not any(found[outcome] for outcome in ("passed", "failed", "skipped")):
        problems.append(f"{name}: no test was run")
    # After one that began and did not end there may be others that did not even begin.
    problems += [f"{name} ended in {test}" for test in found["failures"] if test.endswith(NO_OUTCOME)]
    print(
        f"{name}: {found['passed']} passed, {found['failed']} failed, {found['skipped']} skipped, "
        f"{time.monotonic() - begin:.0f} s, {place.LOGS}",
        flush=True,
    )
    print("\n".join(f"  {failure}" for failure in found["failures"]), end="\n" if found["failures"] else "")
    return {"tests": {name: found}, "problems": {name: problems}}


def _shard(name: str, part: int, shards: int, end: float) -> tuple[str, list[str]]:
    """Outcomes of a part of a file, and problems that are none of single tests."""
    stem = f"{Path(name).stem}-{part}"
    outcomes = LOGS / f"{stem}.outcomes"
    outcomes.parent.mkdir(parents=True, exist_ok=True)
    outcomes.write_text("")
    command = place.python("-m", "pytest", "-c", str(TESTS / "pytest.ini"), str(TESTS / name))
    command += ["--shard", f"{part}/{shards}", "--outcomes", str(outcomes)]
    # Plugins that happen to be installed have no part.
    alone = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    for attempt in range(MOST_PROCESSES):
        left, before = end - time.monotonic(), outcomes.read_text()
        done = place.run(command, f"{stem}-{attempt}", left, alone)
        after = outcomes.read_text()
        # pytest's status is 1 where tests failed, which are counted, and 5 where none are left. Of any other, or where
        # a test has not ended, what is left goes on in a new process, unless that does not come any further.
        ended = not after or json.loads(after.splitlines()[-1])["outcome"] != "begun"
        if done.status == 5 or (ended and done.status in (0, 1)):
            return after, []
        if done.status is None or after == before:
            break
    return after, [f"{name}, part {part}, {done.why(left)}\n{done.tail(20)}"]
