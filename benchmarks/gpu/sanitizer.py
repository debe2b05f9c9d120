"""The stage that runs compute-sanitizer over `exercise`, and reads what its four tools say.

Only kernels of ours are looked at: those with ``pyrnnfast``, their namespace, in their names. initcheck is the
exception: it has to see all kernels, as memory written by one that it does not watch counts as never written; of what
it then reports, only what it says of our kernels counts. Nor does it see what the copy engine writes, by which some of
cuBLAS's kernels do: there NaN is written first. And it is given one launch at a time: with two streams at work it once
named numbers as never written that a kernel had written, in the same stream, right before; so it names none. What
streams owe to each other it thus does not see; tests/gpu compares what they make.

A tool that says nothing proves nothing, so each is first run on a program with a mistake of its kind (planted.cu),
which it has to find; and an output without the tool's summary, or of an exercise that did not get to its end, is a
failure. Races between blocks through global memory are beyond racecheck, which looks at shared memory.
"""

import json
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from . import build, place
from .record import TOOLS, Record

LIMIT = 540.0  # seconds

OURS = "pyrnnfast"

_PREFIX = "========="
_SUMMARY = re.compile(r"ERROR SUMMARY: (\d+) errors?\s*$")
_RACES = re.compile(r"RACECHECK SUMMARY: (\d+) hazards? displayed \((\d+) errors?, (\d+) warnings?\)")
_UNPRINTED = re.compile(r"(\d+) errors? (?:was|were) not printed")


class NoSummary(ValueError):
    """The tool did not come to its end, or says something that this does not understand."""


class Found(NamedTuple):
    ours: int
    others: int
    """What it says of kernels that are not ours."""


def _reports(text: str) -> list[str]:
    """The reports in a tool's output: each begins with a line that is not indented, and goes on with those that are."""
    reports: list[str] = []
    for line in text.splitlines():
        if not line.startswith(_PREFIX):
            continue
        content = line.removeprefix(_PREFIX)
        if content.startswith("  ") and reports:
            reports[-1] += "\n" + content
        else:
            reports.append(content.strip())
    return reports


def read(tool: str, text: str) -> Found:
    """What a tool found, from its output.

    Raises:
        NoSummary: the output does not say how many.
    """
    if tool == "racecheck":
        races = [tuple(map(int, numbers)) for numbers in _RACES.findall(text)]
        if not races:
            raise NoSummary("there is no line RACECHECK SUMMARY")
        # A mistake in another place than in shared memory has a summary of its own.
        also = sum(int(count) for count in _summaries(text))
        return Found(sum(max(displayed, errors + warnings) for displayed, errors, warnings in races) + also, 0)
    counts = _summaries(text)
    if not counts:
        raise NoSummary("there is no line ERROR SUMMARY")
    total = sum(map(int, counts))
    if tool != "initcheck":
        return Found(total, 0)
    reports = [r for r in _reports(text) if r.startswith(("Uninitialized", "Host API"))]
    ours = sum(OURS in report for report in reports)
    unprinted = sum(map(int, _UNPRINTED.findall(text)))
    if unprinted:
        raise NoSummary(f"{unprinted} reports were not printed, and may be of our kernels")
    # Whatever else it counts is nobody else's.
    unknown = total - len(reports)
    return Found(ours + max(unknown, 0), len(reports) - ours)


def _summaries(text: str) -> list[str]:
    return [match[1] for line in text.splitlines() if (match := _SUMMARY.search(line))]


def command(tool: str, compute_sanitizer: str) -> list[str]:
    """The tool's command line, up to the program that it watches."""
    result = [compute_sanitizer, "--tool", tool, "--show-backtrace", "device", "--print-limit"]
    # Of ours every report would be one too many; of others' there may be many.
    result += ["0"] if tool == "initcheck" else ["20", "--kernel-name", f"kernel_substring={OURS}"]
    # Room between allocations, so that what goes beyond one does not land in the next. torch tries calls that may fail;
    # ours check their own.
    return result + (["--padding", "64", "--report-api-errors", "no"] if tool == "memcheck" else [])


def exercised(output: str) -> dict[str, int]:
    """The calls that `exercise` made, by path; none where it did not get to its end."""
    for line in reversed(output.splitlines()):
        if line.startswith("{"):
            return json.loads(line)  # type: ignore[no-any-return]
    return {}


def run(tools: Sequence[str] = TOOLS, limit: float = LIMIT) -> Record:
    """Runs these tools side by side; returns what `record.merge` takes."""
    with ThreadPoolExecutor(len(tools)) as pool:
        results = list(pool.map(lambda tool: _run(tool, limit), tools))
    kinds = ("sanitizer_errors", "problems", "calls")
    return {kind: {name: value for r in results for name, value in r[kind].items()} for kind in kinds}


def _run(tool: str, limit: float) -> Record:
    problems: list[str] = []
    result: Record = {"sanitizer_errors": {}, "problems": {tool: problems}, "calls": {}}
    sanitizer = place.tool("compute-sanitizer")
    if sanitizer is None:
        problems.append("there is no compute-sanitizer")
        return result
    base = command(tool, sanitizer)
    planted = place.run([*base, str(build.program("planted")), tool], f"{tool}-planted", limit / 3)
    try:
        seen = read(tool, planted.log.read_text(errors="replace")).ours
    except NoSummary as reason:
        problems.append(f"{tool} on a planted mistake: {reason}\n{planted.tail(10)}")
        return result
    if seen == 0:
        problems.append(f"{tool} does not find a planted mistake\n{planted.tail(10)}")
    quick = ["--quick", "--poison"] if tool == "initcheck" else []
    # Every tensor an allocation of its own: torch's blocks would hide what goes beyond one.
    alone = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} | ({"CUDA_LAUNCH_BLOCKING": "1"} if tool == "initcheck" else {})
    limit -= planted.seconds
    done = place.run([*base, *place.python("-m", "benchmarks.gpu.exercise", *quick)], tool, limit, alone)
    text = done.log.read_text(errors="replace")
    result["calls"][tool] = calls = exercised(text)
    if done.status is None or not calls:
        problems.append(f"the exercise under {tool} {done.why(limit)}\n{done.tail(20)}")
    problems += [f"no call took the path {path} under {tool}" for path in missing(calls)]
    try:
        found = read(tool, text)
    except NoSummary as reason:
        problems.append(f"{tool}: {reason}\n{done.tail(10)}")
        return result
    result["sanitizer_errors"][tool] = found.ours
    if found.ours:
        print(text[:4000], flush=True)
    print(
        f"{tool}: {found.ours} errors, {found.others} of others' kernels, calls {calls}, {done.seconds:.0f} s, "
        f"{done.log}",
        flush=True,
    )
    return result


def missing(counts: dict[str, int]) -> list[str]:
    return [path for path in ("fused", "persistent") if counts and not counts.get(path)]
