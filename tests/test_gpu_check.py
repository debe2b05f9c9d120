"""`make gpu-check` as far as it shows without a card: what it reads, merges and refuses, and that it fails here."""

import copy
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import files
from benchmarks.gpu import (
    bench,
    check,
    choices,
    limits,
    place,
    profile,
    record,
    report,
    rows,
    samples,
    sanitizer,
    tests,
    timing,
)
from benchmarks.gpu.rows import Row
from benchmarks.gpu.sanitizer import NoSummary
from pyrnnfast import choices as table_of_choices

ROOT = Path(__file__).parents[1]

no_card = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")


# A run without a card ------------------------------------------------------------------------------------------------


@no_card
@pytest.mark.parametrize("stage", ("build", "tests", "sanitizer", "benchmark", "build,tests,sanitizer,benchmark"))
def test_without_a_card_the_check_fails_and_records_nothing(stage: str, tmp_path: Path) -> None:
    out = tmp_path / "record.json"
    command = [sys.executable, "-m", "benchmarks.gpu.check", "--stage", stage, "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode not in (0, None)
    assert "needs a CUDA device, and there is none here: torch sees no CUDA device" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


@no_card
def test_without_a_card_the_tests_fail_rather_than_skip(tmp_path: Path) -> None:
    outcomes = tmp_path / "outcomes"
    ini = ROOT / "tests" / "gpu" / "pytest.ini"
    command = [sys.executable, "-m", "pytest", "-c", str(ini), str(ini.parent), "--outcomes", str(outcomes)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode not in (0, 1, 5), "neither passed, nor an ordinary failure, nor nothing collected"
    assert "need a CUDA device" in done.stdout + done.stderr
    assert outcomes.read_text() == ""
    assert tests.read("")["passed"] == 0


def test_the_ordinary_run_does_not_collect_the_tests_of_the_card() -> None:
    gpu = ROOT / "tests" / "gpu"
    assert len(tests.files()) >= 4
    assert all((gpu / name).exists() for name in tests.files())
    # Everything but the files right in tests/: what then is collected lies deeper.
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "tests", f"--ignore-glob={ROOT}/tests/test_*.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == pytest.ExitCode.NO_TESTS_COLLECTED, done.stdout


def test_the_tests_of_the_card_can_be_collected() -> None:
    ini = ROOT / "tests" / "gpu" / "pytest.ini"
    command = [sys.executable, "-m", "pytest", "-c", str(ini), str(ini.parent), "--collect-only"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    collected = [line for line in done.stdout.splitlines() if "::" in line]
    for cell in ("rnn_tanh", "rnn_relu", "gru", "lstm"):
        for kind in ("fp64", "fp32", "tf32", "fp16", "bf16"):
            for path in ("step", "persistent"):
                mine = [line for line in collected if f"[{cell}-" in line and line.endswith(f"-{kind}-{path}]")]
                assert len(mine) > 50


# Other programs ------------------------------------------------------------------------------------------------------


@pytest.fixture
def logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(place, "LOGS", tmp_path / "logs")
    return tmp_path / "logs"


def runs(pid: int) -> bool:
    try:
        return "zombie" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):  # Gone before the file was opened, or before it was read.
        return False


def test_a_program_and_its_children_end_at_the_limit(logs: Path) -> None:
    script = "sleep 60 & echo $! ; wait"
    done = place.run(["bash", "-c", script], "sleeper", 1.0)
    assert done.status is None
    assert done.seconds < 20
    # A signal is sent, not delivered, when kill returns: the child may be seen running for a moment more.
    until = time.monotonic() + 20
    while runs(int(done.tail())) and time.monotonic() < until:
        time.sleep(0.01)
    assert not runs(int(done.tail()))
    assert "stopped after 1 s" in done.why(1.0)


def test_output_and_status_of_a_program(logs: Path) -> None:
    done = place.run(["bash", "-c", "echo out; echo err >&2; echo $MORE; exit 3"], "three", 60, {"MORE": "more"})
    assert (done.status, done.tail()) == (3, "out\nerr\nmore")
    assert done.why(1.0) == "ended with status 3"
    assert done.log == logs / "three.log"


# The record ----------------------------------------------------------------------------------------------------------

IDENTITY = {
    "device": "NVIDIA H100 80GB HBM3",
    "capability": "9.0",
    "driver": "580.159.04",
    "versions": {"torch": "2.11.0+cu130", "cuda": "13.0", "cudnn": 91900, "nvcc": "13.0.88", "python": "3.12.3"},
    "commit": "0" * 40,
    "sources": "abcd",
}


def entry(path: str, ours: float, torch_ms: float = 2.0, **more: Any) -> dict[str, Any]:
    row = Row("lstm", "training", (128, 16, 512, 512), "bfloat16").asdict()
    return row | {"path": path, "ours_ms": ours, "torch_ms": torch_ms, "limit_ms": None} | more


def of_file(passed: int, failed: int = 0, skipped: int = 0) -> dict[str, Any]:
    return {"passed": passed, "failed": failed, "skipped": skipped, "failures": ["a test"] * failed}


GREEN: dict[str, dict[str, Any]] = {
    "build": {"problems": {"build": []}},
    "tests": {"problems": {}, "tests": {name: of_file(10, skipped=2) for name in tests.files()}},
    "sanitizer": {"problems": {}, "sanitizer_errors": dict.fromkeys(record.TOOLS, 0)},
    "benchmark": {
        "problems": {},
        "measured": {"GB/s": 3000},
        "rows": [entry("fused", 3.0), entry("persistent", 1.0)],
        "rows_wrong": [],
        "rows_not_reached": [],
    },
}


def made(change: Callable[[dict[str, Any]], None] | None = None) -> dict[str, Any]:
    """A record of all stages, green but for the change."""
    stages = copy.deepcopy(GREEN)
    if change is not None:
        change(stages)
    result = record.new(IDENTITY)
    for stage, found in stages.items():
        result = record.merge(result, stage, 1.0, found)
    return result


def test_a_whole_green_record() -> None:
    found = made()
    assert record.failures(found) == []
    assert record.missing(found, tests.files()) == []
    assert {name: found[name] for name in IDENTITY} == IDENTITY
    assert found["tests_passed"] == 10 * len(tests.files())
    assert (found["tests_failed"], found["tests_skipped"]) == (0, 2 * len(tests.files()))
    assert found["sanitizer_errors"] == dict.fromkeys(record.TOOLS, 0) | {"total": 0}
    assert len(found["rows"]) == 2


FAILURES: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "build": (lambda s: s["build"]["problems"].update(build=["nvcc died"]), "build: nvcc died"),
    "one_test": (lambda s: s["tests"]["tests"].update({tests.files()[0]: of_file(9, 1)}), "tests: 1 failed"),
    "no_test": (
        lambda s: s["tests"].update(tests={name: of_file(0, skipped=9) for name in tests.files()}),
        "tests: not one GPU test passed",
    ),
    "a_stopped_test": (
        lambda s: s["tests"]["problems"].update(a=["a stopped after 9 s"]),
        "tests: a stopped after 9 s",
    ),
    "race": (lambda s: s["sanitizer"]["sanitizer_errors"].update(racecheck=2), "sanitizer: racecheck found 2"),
    "no_summary": (lambda s: s["sanitizer"]["problems"].update(memcheck=["no line"]), "sanitizer: no line"),
    "a_wrong_row": (
        lambda s: s["benchmark"]["rows_wrong"].append(entry("fused", 1.0, cell="gru")),
        "benchmark: 1 rows where ours and cuDNN differ",
    ),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_failure_is_told_and_chooses_nothing(name: str) -> None:
    change, message = FAILURES[name]
    found = made(change)
    assert record.failures(found) == [message]
    with pytest.raises(choices.Refused, match=message):
        choices.entry(found, tests.files())


@pytest.mark.parametrize(
    ("change", "lacks"),
    [
        (lambda s: s.pop("build"), ["build"]),
        (lambda s: s.pop("tests"), ["tests", *tests.files()]),
        (lambda s: s["tests"]["tests"].pop(tests.files()[1]), [tests.files()[1]]),
        (lambda s: s["sanitizer"]["sanitizer_errors"].pop("synccheck"), ["synccheck"]),
        (lambda s: s["benchmark"].update(rows=[]), ["rows of the benchmark"]),
    ],
)
def test_what_a_record_lacks_is_told_and_chooses_nothing(
    change: Callable[[dict[str, Any]], None], lacks: list[str]
) -> None:
    found = made(change)
    assert record.missing(found, tests.files()) == lacks
    with pytest.raises(choices.Refused, match=f"lacks {lacks[0]}"):
        choices.entry(found, tests.files())


def test_stages_may_come_in_parts() -> None:
    first, *others = tests.files()
    found = record.merge(record.new(IDENTITY), "tests", 5.0, {"problems": {first: []}, "tests": {first: of_file(3, 1)}})
    assert record.failures(found, ["tests"]) == ["tests: 1 failed"]
    more = {"problems": {name: [] for name in others}, "tests": {name: of_file(2) for name in others}}
    found = record.merge(found, "tests", 5.0, more)
    assert (found["tests_passed"], found["tests_failed"]) == (3 + 2 * len(others), 1)
    # Again, and now it passes.
    found = record.merge(found, "tests", 5.0, {"problems": {first: []}, "tests": {first: of_file(4)}})
    assert (found["tests_passed"], found["tests_failed"]) == (4 + 2 * len(others), 0)
    assert record.failures(found, ["tests"]) == []
    assert record.missing(found, tests.files()) == [
        "build",
        "sanitizer",
        "benchmark",
        *record.TOOLS,
        "rows of the benchmark",
    ]


def test_the_total_of_the_sanitizer_is_of_all_its_tools() -> None:
    found = record.new(IDENTITY)
    for tool, count in (("memcheck", 3), ("racecheck", 4), ("memcheck", 1)):
        found = record.merge(found, "sanitizer", 1.0, {"problems": {tool: []}, "sanitizer_errors": {tool: count}})
    assert found["sanitizer_errors"] == {"memcheck": 1, "racecheck": 4, "total": 5}


def test_a_problem_stays_until_its_part_is_run_again() -> None:
    found = record.merge(
        record.new(IDENTITY), "sanitizer", 1.0, {"problems": {"memcheck": ["bad"], "racecheck": ["bad"]}}
    )
    found = record.merge(found, "sanitizer", 1.0, {"problems": {"memcheck": []}})
    assert found["stages"]["sanitizer"]["problems"] == {"racecheck": ["bad"]}


def test_rows_are_merged_by_what_they_are_of() -> None:
    def timed(
        *entries: dict[str, Any], left: list[Any] | None = None, wrong: list[Any] | None = None
    ) -> dict[str, Any]:
        return {"problems": {}, "rows": list(entries), "rows_wrong": wrong or [], "rows_not_reached": left or []}

    other = Row("gru", "inference", (128, 1, 256, 256), "float16").asdict()
    found = record.merge(record.new(IDENTITY), "benchmark", 1.0, timed(entry("fused", 3.0), left=[other]))
    assert found["rows_not_reached"] == [other]
    found = record.merge(found, "benchmark", 1.0, timed(entry("fused", 2.0), entry("persistent", 1.0)))
    assert [(row["path"], row["ours_ms"]) for row in found["rows"]] == [("fused", 2.0), ("persistent", 1.0)]
    assert found["rows_not_reached"] == [other]
    wrong = other | {"path": "fused", "error": 0.5}
    found = record.merge(found, "benchmark", 1.0, timed(wrong=[wrong]))
    assert (found["rows_not_reached"], found["rows_wrong"]) == ([], [wrong])
    right = other | {"path": "fused", "ours_ms": 1.0, "torch_ms": 1.0, "limit_ms": None}
    found = record.merge(found, "benchmark", 1.0, timed(right))
    assert found["rows_wrong"] == []
    assert right in found["rows"]


def test_a_record_is_of_one_card_and_one_state_of_the_sources(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "deep" / "record.json"
    files.write(path, made())
    assert record.open_or_new(path, IDENTITY) == made()
    for name in ("device", "commit", "sources", "versions"):
        fresh = record.open_or_new(path, IDENTITY | {name: "another"})
        assert fresh["stages"] == {}
        assert fresh["tests_passed"] == 0
        assert f"is of another {name}" in capsys.readouterr().out


def test_a_record_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "record.json"
    files.write(path, {"good": 1})
    with pytest.raises(TypeError):
        files.write(path, {"bad": object()})
    assert record.load(path) == {"good": 1}

    write = Path.write_text

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda source, target: None)
        files.write(path, {"good": 3})
    assert record.load(path) == {"good": 1}, "written otherwise than by replacing it"

    def cut_off(self: Path, text: str) -> int:
        write(self, text[:5])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", cut_off)
    with pytest.raises(KeyboardInterrupt):
        files.write(path, {"good": 2})
    assert record.load(path) == {"good": 1}


def test_names_and_paths_of_records() -> None:
    assert record.location("h100") == ROOT / "benchmarks" / "results" / "h100.json"
    assert record.location("build/h100") == Path("build/h100")
    assert record.location("h100.json") == Path("h100.json")


def test_the_commit_is_read_without_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert record.commit(tmp_path) is None
    git = tmp_path / ".git"
    (git / "refs" / "heads").mkdir(parents=True)
    (git / "HEAD").write_text("ref: refs/heads/main\n")
    (git / "packed-refs").write_text(f"# pack-refs\n{'b' * 40} refs/heads/other\n{'c' * 40} refs/heads/main\n")
    assert record.commit(tmp_path) == "c" * 40
    (git / "refs" / "heads" / "main").write_text("a" * 40 + "\n")
    assert record.commit(tmp_path) == "a" * 40
    (git / "HEAD").write_text("d" * 40 + "\n")
    assert record.commit(tmp_path) == "d" * 40


def test_the_digest_of_the_sources(tmp_path: Path) -> None:
    (tmp_path / "csrc" / "cuda").mkdir(parents=True)
    (tmp_path / "pyrnnfast").mkdir()
    (tmp_path / "CMakeLists.txt").write_text("project()")
    kernel, table = tmp_path / "csrc" / "cuda" / "step.cu", tmp_path / "pyrnnfast" / "cuda_choices.json"
    kernel.write_text("kernel")
    before = record.sources(tmp_path)
    table.write_text("[]")  # which follows from records, and decides over none
    assert record.sources(tmp_path) == before
    kernel.write_text("another kernel")
    assert record.sources(tmp_path) != before


# The program ------------------------------------------------------------------------------------------------------


@pytest.fixture
def card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, Any]]:
    """As if there were a card, on which all stages find what is in here; an exception is raised."""
    found = copy.deepcopy(GREEN)

    def stage(name: str) -> Any:
        result = found[name]
        if "raises" in result:
            raise result["raises"]
        return result

    monkeypatch.setattr(check, "facts", lambda: {name: IDENTITY[name] for name in record.IDENTITY[:4]})
    monkeypatch.setattr(record, "sources", lambda: IDENTITY["sources"])
    monkeypatch.setattr(place, "SITE", tmp_path)
    monkeypatch.setattr(check, "_build", lambda options, facts: stage("build"))
    monkeypatch.setattr(tests, "run", lambda files, limit: stage("tests"))
    monkeypatch.setattr(sanitizer, "run", lambda tools, limit: stage("sanitizer"))
    monkeypatch.setattr(check, "_benchmark", lambda options, out: stage("benchmark"))
    return found


Card = dict[str, dict[str, Any]]


def test_a_whole_check(card: Card, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "record.json"
    assert check.main(["--out", str(out), "--commit", IDENTITY["commit"]]) == 0
    found = record.load(out)
    assert {name: found[name] for name in IDENTITY} == IDENTITY
    assert "the check is whole" in capsys.readouterr().out
    assert choices.entry(found, tests.files())["sanitizer_errors"] == 0


@pytest.mark.parametrize("name", FAILURES)
def test_a_check_fails_by_its_status(name: str, card: Card, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change, message = FAILURES[name]
    change(card)
    assert check.main(["--out", str(tmp_path / "record.json"), "--commit", IDENTITY["commit"]]) == 1
    assert f"FAILED {message}" in capsys.readouterr().out


def test_a_check_in_several_commands(card: Card, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["--out", str(tmp_path / "record.json"), "--commit", IDENTITY["commit"]]
    for stage in record.STAGES:
        assert check.main([*common, "--stage", stage]) == 0
        told = capsys.readouterr().out
        assert ("the check is whole" in told) == (stage == "benchmark")
    assert record.missing(record.load(tmp_path / "record.json"), tests.files()) == []


def test_a_check_that_is_cut_off_leaves_the_stages_done(card: Card, tmp_path: Path) -> None:
    out = tmp_path / "record.json"
    card["sanitizer"]["raises"] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        check.main(["--out", str(out)])
    assert list(record.load(out)["stages"]) == ["build", "tests"]
    assert record.load(out)["tests_passed"] > 0


def test_nothing_runs_on_what_did_not_build(card: Card, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "record.json"
    card["build"]["problems"]["build"] = ["nvcc died"]
    assert check.main(["--out", str(out)]) == 1
    assert list(record.load(out)["stages"]) == ["build"]
    monkeypatch.setattr(place, "SITE", tmp_path / "nowhere")
    with pytest.raises(SystemExit, match="tests needs what --stage build leaves"):
        check.main(["--stage", "tests", "--out", str(tmp_path / "other.json")])


@no_card
def test_a_benchmark_that_dies_is_told(logs: Path, tmp_path: Path) -> None:
    options = check._options(["--seconds", "60", "--bench", "--cell gru --dtype fp16"])
    found = check._benchmark(options, tmp_path / "record.json")
    assert "the benchmark ended with status 1" in found["problems"]["benchmark"][0]
    assert {(row["cell"], row["dtype"]) for row in found["rows_not_reached"]} == {("gru", "float16")}
    assert found["rows"] == []


# Tests ---------------------------------------------------------------------------------------------------------------


def test_outcomes_of_tests() -> None:
    def lines(*entries: tuple[str, str]) -> str:
        return "".join(json.dumps({"test": test, "outcome": outcome}) + "\n" for test, outcome in entries)

    text = lines(
        *(("a", "begun"), ("a", "passed")),
        *(("b", "begun"), ("b", "failed")),
        *(("c", "begun"), ("c", "skipped")),
        *(("d", "begun"), ("d", "passed"), ("d", "failed")),  # in what comes after it
        ("e", "begun"),  # and was stopped
    )
    assert tests.read(text) == {"passed": 1, "failed": 3, "skipped": 1, "failures": ["b", "d", "e (no outcome)"]}


def test_a_test_file_that_dies_is_told(tmp_path: Path, logs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tests, "LOGS", logs)
    monkeypatch.setattr(tests, "TESTS", tmp_path)
    source = ROOT / "tests" / "gpu" / "conftest.py"
    # As on a machine with a card, but for the card, which a test can break.
    text = source.read_text().replace("not torch.cuda.is_available()", "False")
    text = text.replace("torch.cuda.synchronize()", "[][: 1 // (not BROKEN)]")
    text = text.replace("RuntimeError as error", "ZeroDivisionError as error")
    (tmp_path / "conftest.py").write_text(text + "\nBROKEN: list[int] = []\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "test_good.py").write_text("def test_one():\n    assert 1\ndef test_two():\n    assert 0\n")
    (tmp_path / "test_dies.py").write_text(
        "import os\ndef test_one():\n    assert 1\ndef test_dies():\n    os._exit(7)\ndef test_never():\n    assert 1\n"
    )
    (tmp_path / "test_breaks.py").write_text(
        "import conftest\ndef test_breaks():\n    conftest.BROKEN.append(1)\n    assert 0\n"
        "def test_whole():\n    assert 1\n"
    )
    (tmp_path / "test_hangs.py").write_text("import time\ndef test_hangs():\n    time.sleep(60)\n")
    monkeypatch.setattr(tests, "SHARDS", {"test_good.py": 2})
    found = tests.run(["test_good.py", "test_dies.py", "test_breaks.py"])
    assert {name: (f["passed"], f["failed"]) for name, f in found["tests"].items()} == {
        "test_good.py": (1, 1),
        # What is behind a test that took its process, or the card, with it, goes on in another process.
        "test_dies.py": (2, 1),
        "test_breaks.py": (1, 1),
    }
    assert found["tests"]["test_dies.py"]["failures"] == ["test_dies.py::test_dies (no outcome)"]
    assert found["problems"]["test_good.py"] == found["problems"]["test_breaks.py"] == []
    assert found["problems"]["test_dies.py"] == ["test_dies.py ended in test_dies.py::test_dies (no outcome)"]
    found = tests.run(["test_hangs.py"], limit=8.0)
    assert found["tests"]["test_hangs.py"]["failures"] == ["test_hangs.py::test_hangs (no outcome)"]
    assert "test_hangs.py, part 0, stopped after 8 s" in found["problems"]["test_hangs.py"][0]


# compute-sanitizer ---------------------------------------------------------------------------------------------------


def test_what_each_tool_is_given(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    runs: dict[str, tuple[list[str], Any]] = {}

    def run(command: list[str], name: str, limit: float, more: Any = None) -> place.Finished:
        runs[name] = command, more
        log = tmp_path / name
        log.write_text((CLEAN_RACES if "racecheck" in name else CLEAN).format('{"fused": 1, "persistent": 1}'))
        return place.Finished(0, 1.0, log)

    monkeypatch.setattr(place, "run", run)
    monkeypatch.setattr(place, "tool", lambda name: name)
    found = sanitizer.run()
    assert found["sanitizer_errors"] == dict.fromkeys(record.TOOLS, 0)
    for tool in record.TOOLS:
        command, more = runs[tool]
        initcheck = tool == "initcheck"
        assert ("--poison" in command) is initcheck
        assert ("CUDA_LAUNCH_BLOCKING" in more) is initcheck
        assert more["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"
        assert found["problems"][tool][0].startswith(f"{tool} does not find a planted mistake")


CLEAN = "========= COMPUTE-SANITIZER\n{}\n========= ERROR SUMMARY: 0 errors\n"
CLEAN_RACES = "========= COMPUTE-SANITIZER\n========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n"
MEMORY = """========= COMPUTE-SANITIZER
========= Invalid __global__ write of size 4 bytes
=========     at void pyrnnfast::<unnamed>::step<pyrnnfast::Lstm, float>(pyrnnfast::Pass)+0x130 in step.cu:9
=========     by thread (1,0,0) in block (1,0,0)
=========     Access at 0x7f5f4e200404 is out of bounds
=========     and is 1 bytes after the nearest allocation at 0x7f5f4e200000 of size 1,024 bytes
=========
========= Target application returned an error
========= ERROR SUMMARY: 23 errors
========= ERROR SUMMARY: 3 errors were not printed. Use --print-limit option to adjust the number of printed errors
"""
RACES = """========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at pyrnnfast::<unnamed>::race(float *)+0x130 in planted.cu:16
=========     and Read access at pyrnnfast::<unnamed>::race(float *)+0x150 in planted.cu:17 [34 hazards]
=========
========= RACECHECK SUMMARY: {}
"""
UNINITIALIZED = """========= COMPUTE-SANITIZER
========= Uninitialized __global__ memory read of size 4 bytes
=========     at void at::native::elementwise_kernel<128, 4>(int, T3)+0x250 in CUDALoops.cuh:12
=========     by thread (0,0,0) in block (0,0,0)
=========     Access at 0x7f5f4e200404
=========
========= Uninitialized __global__ memory read of size 4 bytes
=========     at __ldg(const float *)+0x2a0 in sm_32_intrinsics.hpp:60
=========     by thread (0,0,0) in block (0,0,0)
=========         Device Frame: pyrnnfast::<unnamed>::step(pyrnnfast::Pass)+0x2a0 in step.cu:49
=========
========= Uninitialized __global__ memory read of size 2 bytes
=========     at sm80_xmma_gemm_bf16bf16_bf16f32_f32_tn_n+0x90
=========     by thread (31,0,0) in block (1,0,0)
=========
========= ERROR SUMMARY: 3 errors
"""
BARRIER = """========= COMPUTE-SANITIZER
========= Barrier error detected. Invalid arguments.
=========     at __syncwarp(unsigned int)+0xe0 in sm_30_intrinsics.hpp:110
=========     by thread (0,0,0) in block (0,0,0)
=========         Device Frame: pyrnnfast::<unnamed>::wrong_mask(float *)+0xb0 in planted.cu:25
=========
========= ERROR SUMMARY: 1 error
"""
FAILED_TO_START = """========= COMPUTE-SANITIZER
========= Error: Target application terminated before first instrumented API call
"""


@pytest.mark.parametrize("tool", ("memcheck", "synccheck", "initcheck"))
@pytest.mark.parametrize("between", ("", '{"fused": 60}', "========= nothing"))
def test_a_clean_output(tool: str, between: str) -> None:
    assert sanitizer.read(tool, CLEAN.format(between)) == (0, 0)


@pytest.mark.parametrize(
    ("tool", "text", "ours", "others"),
    [
        ("memcheck", MEMORY, 23, 0),
        ("synccheck", BARRIER, 1, 0),
        ("racecheck", CLEAN_RACES, 0, 0),
        ("racecheck", RACES.format("1 hazard displayed (1 error, 0 warnings)"), 1, 0),
        ("racecheck", RACES.format("12 hazards displayed (0 errors, 12 warnings)"), 12, 0),
        ("racecheck", RACES.format("20 hazards displayed (256 errors, 0 warnings)"), 256, 0),
        ("racecheck", CLEAN_RACES + "========= ERROR SUMMARY: 2 errors\n", 2, 0),
        ("racecheck", RACES.format("1 hazard displayed (1 error, 0 warnings)") + CLEAN_RACES, 1, 0),
        ("initcheck", UNINITIALIZED, 1, 2),
        # Two more, of which nothing was printed that could be somebody else's.
        ("initcheck", UNINITIALIZED.replace("3 errors", "5 errors"), 3, 2),
    ],
)
def test_what_the_tools_find(tool: str, text: str, ours: int, others: int) -> None:
    assert sanitizer.read(tool, text) == (ours, others)


@pytest.mark.parametrize("tool", record.TOOLS)
@pytest.mark.parametrize("text", ("", FAILED_TO_START, "ERROR SUMMARY: many errors", "RACECHECK SUMMARY: no hazards"))
def test_an_output_without_a_summary_is_no_clean_one(tool: str, text: str) -> None:
    with pytest.raises(NoSummary):
        sanitizer.read(tool, text)


def test_a_summary_of_another_tool_is_none() -> None:
    with pytest.raises(NoSummary):
        sanitizer.read("racecheck", CLEAN)
    with pytest.raises(NoSummary):
        sanitizer.read("memcheck", CLEAN_RACES)


def test_reports_that_were_not_printed_may_be_ours() -> None:
    unprinted = "========= ERROR SUMMARY: 7 errors were not printed. Use --print-limit option to adjust the number\n"
    with pytest.raises(NoSummary, match="7 reports"):
        sanitizer.read("initcheck", UNINITIALIZED + unprinted)


def test_only_our_kernels_are_watched_but_where_all_have_to_be() -> None:
    for tool in record.TOOLS:
        command = sanitizer.command(tool, "compute-sanitizer")
        assert command[:3] == ["compute-sanitizer", "--tool", tool]
        assert ("--kernel-name" in command) == (tool != "initcheck")


FAKE = """#!{python}
import sys
tool = sys.argv[sys.argv.index("--tool") + 1]
planted = sys.argv[-1] == tool
{body}
"""


@pytest.mark.parametrize(
    ("body", "errors", "problem"),
    [
        ("print(MISTAKE[tool] if planted else DONE + CLEAN[tool])", 0, None),
        ("print(MISTAKE[tool] if planted else DONE + MISTAKE[tool])", 1, None),
        ("print(DONE + CLEAN[tool])", 0, "does not find a planted mistake"),
        ("print(MISTAKE[tool] if planted else CLEAN[tool])", 0, "the exercise under"),
        ("print(MISTAKE[tool] if planted else DONE)", None, "there is no line"),
        ("print(MISTAKE[tool] if planted else ONE + CLEAN[tool])", 0, "no call took the path persistent"),
        ("print('broken')", None, "on a planted mistake: there is no line"),
    ],
)
def test_a_run_of_the_tools(
    body: str, errors: int | None, problem: str | None, tmp_path: Path, logs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clean = {tool: CLEAN_RACES if tool == "racecheck" else CLEAN.format("") for tool in record.TOOLS}
    one = CLEAN.format("").replace("0 errors", "1 error")
    mistake = {
        "memcheck": one,
        "synccheck": BARRIER,
        "racecheck": RACES.format("1 hazard displayed (1 error, 0 warnings)"),
        "initcheck": UNINITIALIZED,
    }
    names = f"MISTAKE = {mistake!r}\nCLEAN = {clean!r}\n"
    names += 'DONE = \'{"fused": 60, "persistent": 40}\\n\'\nONE = \'{"fused": 60}\\n\''
    program = tmp_path / "compute-sanitizer"
    program.write_text(FAKE.format(python=sys.executable, body=f"{names}\n{body}"))
    program.chmod(0o755)
    monkeypatch.setattr(place, "tool", lambda name: str(program))
    found = sanitizer.run()
    assert found["sanitizer_errors"] == ({} if errors is None else dict.fromkeys(record.TOOLS, errors))
    for tool in record.TOOLS:
        told = found["problems"][tool]
        assert (problem is None and told == []) or (problem is not None and problem in told[0] and tool in told[0])


def test_without_the_sanitizer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(place, "tool", lambda name: None)
    found = record.merge(record.new(IDENTITY), "sanitizer", 1.0, sanitizer.run())
    assert record.failures(found) == ["sanitizer: there is no compute-sanitizer"] * 4
    assert record.missing(found, ())[-5:-1] == list(record.TOOLS)


# The benchmark -------------------------------------------------------------------------------------------------------


def test_the_table_of_rows() -> None:
    table = list(rows.table())
    assert len(set(table)) == len(table)
    shapes = {(t, b, h, h) for t in (128, 1024) for b in (1, 16, 64, 128) for h in (256, 512, 1024)}
    for cell in ("lstm", "gru", "rnn"):
        for mode in ("inference", "training"):
            for dtype, tf32 in (("bfloat16", False), ("float16", False), ("float32", False), ("float32", True)):
                mine = [r for r in table if (r.cell, r.mode, r.dtype, r.tf32) == (cell, mode, dtype, tf32)]
                plain = {
                    r.shape for r in mine if (r.layers, r.bidirectional, r.packed or r.padded) == (1, False, False)
                }
                assert shapes <= plain
                assert {r.shape[3] for r in mine if r.shape in plain} == {256, 512, 768, 1024, 2048}
                assert any(r.layers == 2 and r.bidirectional for r in mine)
                assert any(r.packed for r in mine)
                assert any(r.padded for r in mine)
    # Cut off early, there still is something of every kind.
    first = table[: len(table) // 6]
    assert {(r.cell, r.mode, r.dtype, r.tf32) for r in first} >= {
        (r.cell, r.mode, r.dtype, r.tf32) for r in table[:200]
    }
    assert any(r.layers == 2 and r.bidirectional for r in first)
    assert any(r.packed for r in first)
    assert any(r.padded for r in first)


def test_rows_of_some_cells_and_dtypes() -> None:
    chosen = list(rows.table(["gru"], ["tf32"]))
    assert {(r.cell, r.dtype, r.tf32) for r in chosen} == {("gru", "float32", True)}
    assert [r for r in rows.table() if (r.cell, r.tf32) == ("gru", True)] == chosen


@pytest.mark.parametrize("mode", rows.MODES)
@pytest.mark.parametrize("cell", rows.CELLS)
@pytest.mark.parametrize("kind", ({}, {"packed": True}, {"padded": True}, {"layers": 2, "bidirectional": True}))
def test_both_sides_do_the_same(kind: dict[str, Any], cell: str, mode: str) -> None:
    # On the CPU, where ours is `fused` whatever is asked for.
    row = Row(cell, mode, (5, 3, 4, 6), "float32", **kind)
    with torch.set_grad_enabled(mode == "training"):
        sides = rows.sides(row, ["step"], device="cpu")
        assert set(sides) == {"torch", "fused"}
        assert bench.verify(row, sides)["fused"] < 1e-5
        parameters = len(list(rows.module(row, True, "cpu").parameters()))
        assert len(sides["fused"]()) == (1 if mode == "inference" else 2 + parameters)


def test_a_path_that_is_not_taken_is_not_timed() -> None:
    row = Row("lstm", "inference", (2, 1, 3, 3), "float32")
    with torch.no_grad():
        assert set(rows.sides(row, ["persistent", "cudnn"], device="cpu")) == {"torch"}


@pytest.mark.parametrize("factor", (1.5, float("nan")))
def test_rows_that_differ_are_not_timed(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    one = torch.arange(3.0)
    calls = {"torch": lambda: [one] * 3, "fused": lambda: [one, one * factor, one], "persistent": lambda: [one] * 3}
    monkeypatch.setattr(bench, "sides", lambda row, paths, every: calls)
    monkeypatch.setattr(bench, "turn_by_turn", lambda calls, seconds: timing.Times(dict.fromkeys(calls, 2.0), rounds=5))
    row = Row("lstm", "inference", (2, 1, 3, 3), "bfloat16")
    entries, wrong = bench.run_row(row, ["step", "persistent"], 0.1, FIGURES._replace(handoff=None))
    assert [(e["path"], e["ours_ms"], e["torch_ms"], e["limit_ms"]) for e in entries] == [
        ("persistent", 2.0, 2.0, None)
    ]
    assert [(w["path"], w["error"]) for w in wrong] == [("fused", 0.5 if factor == 1.5 else None)]
    assert set(record.ROW) < set(entries[0])
    assert "persistent" in bench.line(entries[0])


def test_sides_are_timed_turn_by_turn() -> None:
    order = []
    cost = {"a": 1.0, "b": 5.0}

    def clock(fn: Callable[[], object], calls: int) -> float:
        fn()
        return cost[order[-1]]

    sides = {name: (lambda name=name: order.append(name)) for name in cost}  # type: ignore[misc]
    times = timing.turn_by_turn(sides, 0.0, least=4, clock=clock)
    assert times == ({"a": 1.0, "b": 5.0}, 4)
    assert order[-8:] == ["a", "b", "b", "a", "a", "b", "b", "a"]


FIGURES = limits.Figures({"bfloat16": 1e12, "float32": 1e11, "tf32": 5e11}, 1e11, 1e-6)


def test_the_limit() -> None:
    # 4 gates; a step's product takes 2·2·20·5/1e12, much less than to hand a value on.
    row = Row("lstm", "inference", (7, 2, 3, 5), "bfloat16")
    moved = 2 * (20 * (3 + 5) + 14 * 3 + 14 * 5)
    to_gates = 2 * 14 * 20 * 3
    assert limits.limit(row, FIGURES) == pytest.approx(max(to_gates / 1e12, moved / 1e11) + 7e-6)
    # Large: products count, back through time three times those with the input, and three times the recurrent ones.
    row = Row("gru", "training", (100, 1000, 512, 512), "float32")
    product = 2 * 100 * 1000 * 1536 * 512
    assert limits.limit(row, FIGURES) == pytest.approx((3 * product + product + 2 * product) / 1e11)
    with_tf32 = Row("gru", "training", (100, 1000, 512, 512), "float32", tf32=True)
    assert limits.limit(with_tf32, FIGURES) == pytest.approx(6 * product / 5e11)
    assert limits.limit(row, FIGURES._replace(handoff=None)) is None


def test_the_limit_of_packed_and_stacked_rows() -> None:
    plain = Row("rnn", "inference", (64, 8, 4, 4), "bfloat16")
    bound = limits.limit(plain, FIGURES)
    assert bound is not None and bound > 64e-6
    packed = limits.limit(Row("rnn", "inference", (64, 8, 4, 4), "bfloat16", packed=True), FIGURES)
    assert packed is not None and 64e-6 < packed < bound
    both = limits.limit(Row("rnn", "inference", (64, 8, 4, 4), "bfloat16", layers=2, bidirectional=True), FIGURES)
    # The directions of a layer go on at once, its layers one after the other.
    assert both == pytest.approx(2 * 64e-6, rel=0.02)


def test_lines_of_a_benchmark_that_was_cut_off() -> None:
    first, second, third = (Row("lstm", "training", (1, 1, 1, n), "float16").asdict() for n in (1, 2, 3))
    timed = first | {"path": "fused", "ours_ms": 1.0, "torch_ms": 2.0, "limit_ms": None}
    lines = [
        {"wanted": [first, second, third]},
        {"measured": {"GB/s": 3000}},
        {"begun": first},
        {"row": timed},
        {"ended": first},
        {"begun": second},
    ]
    found = check.read_rows("\n".join(map(json.dumps, lines)))
    assert (found["measured"], found["rows"], found["rows_not_reached"]) == ({"GB/s": 3000}, [timed], [third])
    merged = record.merge(record.new(IDENTITY), "benchmark", 1.0, found)
    assert len(record.failures(merged)) == 1
    assert f"did not come to its end: {second}" in record.failures(merged)[0]
    # Another part of the benchmark does not make up for it; the same row does.
    again = check.read_rows("\n".join(map(json.dumps, [{"begun": third}, {"ended": third}])))
    merged = record.merge(merged, "benchmark", 1.0, again)
    assert len(record.failures(merged)) == 1
    again = check.read_rows("\n".join(map(json.dumps, [{"begun": second}, {"ended": second}])))
    assert record.failures(record.merge(merged, "benchmark", 1.0, again)) == []
    assert check.read_rows("")["rows"] == []


# Choices -------------------------------------------------------------------------------------------------------------


def chosen(*entries: dict[str, Any], **identity: Any) -> dict[str, Any]:
    found = made(lambda s: s["benchmark"].update(rows=list(entries))) | identity
    return choices.entry(found, tests.files())


def test_the_fastest_path_of_each_row_is_kept() -> None:
    gru = {"cell": "gru"}
    found = chosen(
        *(entry("fused", 3.0), entry("persistent", 1.0), entry("cudnn", 0.5)),
        *(entry("persistent", 4.0, **gru), entry("fused", 3.0, **gru)),
    )
    kept = [(row["cell"], row["path"], row["ours_ms"], row["torch_ms"]) for row in found["rows"]]
    assert kept == [("lstm", "persistent", 1.0, 2.0), ("gru", "fused", 3.0, 2.0)]


@pytest.fixture
def _these_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "sources", lambda: IDENTITY["sources"])


@pytest.mark.usefixtures("_these_sources")
def test_the_package_reads_what_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table, path = tmp_path / "table.json", tmp_path / "record.json"
    table.write_text("[]")
    files.write(path, made())
    assert choices.main([str(path), "--table", str(table)]) == 0
    assert "1 of 1 rows are faster" in capsys.readouterr().out
    (read,) = table_of_choices.read(table.read_text())
    assert (read.device, read.capability, read.commit) == (IDENTITY["device"], "9.0", IDENTITY["commit"])
    assert read.refusal is None
    (row,) = read.rows
    assert (row.path, row.ratio, row.problem.shape) == ("persistent", 0.5, (128, 16, 512, 512))
    # The same card again replaces what there was of it, another one comes beside it.
    assert choices.main([str(path), "--table", str(table)]) == 0
    files.write(path, made() | {"device": "NVIDIA H200"})
    assert choices.main([str(path), "--table", str(table)]) == 0
    read_again = table_of_choices.read(table.read_text())
    assert [r.device for r in read_again] == [IDENTITY["device"], "NVIDIA H200"]


@pytest.mark.usefixtures("_these_sources")
def test_a_refused_record_leaves_the_table_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table, path = tmp_path / "table.json", tmp_path / "record.json"
    table.write_text("[]")
    for found, reason in (
        (made(FAILURES["race"][0]), "sanitizer: racecheck found 2"),
        (made() | {"sources": "of yesterday"}, "it is of other sources than these"),
    ):
        files.write(path, found)
        assert choices.main([str(path), "--table", str(table)]) == 1
        assert table.read_text() == "[]"
        assert f"chooses nothing: {reason}" in capsys.readouterr().err


@pytest.mark.usefixtures("_these_sources")
def test_an_earlier_record_stands_in_for_rows_that_were_not_reached(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table, path, earlier = (tmp_path / f"{name}.json" for name in ("table", "record", "earlier"))
    table.write_text("[]")
    more = [entry("fused", 1.0, cell="gru"), entry("persistent", 3.0)]
    slower = made(lambda stages: stages["benchmark"].update(rows=more)) | {"commit": "before", "sources": "of before"}
    files.write(path, made())
    files.write(earlier, slower)
    command = [str(path), "--also", str(earlier), "--table", str(table)]
    for _ in range(2):  # the second time in place of the first
        assert choices.main(command) == 0
        found = table_of_choices.read(table.read_text())
        kept = [(r.commit, [(row.problem.cell, row.ratio) for row in r.rows]) for r in found]
        # The LSTM is of the new one alone, though the other has it, too.
        assert kept == [("before", [("gru", 0.5)]), (IDENTITY["commit"], [("lstm", 0.5)])]
    capsys.readouterr()
    for change, reason in (
        ({"driver": "another"}, "the earlier record is of another driver"),
        ({"tests_failed": 1}, "1 failed"),
    ):
        files.write(earlier, slower | change)
        before = table.read_text()
        assert choices.main(command) == 1
        assert reason in capsys.readouterr().err and table.read_text() == before


def test_a_record_of_no_commit_is_refused() -> None:
    with pytest.raises(choices.Refused, match="no commit"):
        chosen(entry("fused", 1.0), commit=None)


# For people ----------------------------------------------------------------------------------------------------------


def test_the_table_of_a_record() -> None:
    text = report.table(made())
    # Of the two paths of the row, the faster one.
    one = "| 1 | 2.00 | 2.00 | 2.00 | 2.00 | none |"
    assert text.splitlines()[2:] == [f"| bfloat16, one launch {one}", f"| bfloat16, TF32, GRU, packed {one}"]
    slower = made(lambda stages: stages["benchmark"]["rows"].__setitem__(1, entry("persistent", 4.0)))
    # By default cuDNN has it.
    assert "| bfloat16, by steps | 1 | 0.67 | 1.00 | 0.67 | 0.67 | 1 |" in report.table(slower)
    like_cudnn = entry("persistent", 1.6) | {"dtype": "float16", "shape": [128, 16, 512, 512]}
    also = made(lambda stages: stages["benchmark"]["rows"].append(like_cudnn))
    assert "| LSTMs that cuDNN has in one launch | 1 |" in report.table(also)


def test_the_picture_of_a_record(tmp_path: Path) -> None:
    report.draw(made(), tmp_path / "record.png")
    assert (tmp_path / "record.png").read_bytes().startswith(b"\x89PNG")


def test_where_the_samples_of_a_kernel_lie() -> None:
    names = ["Source", "# Samples", "Instructions Executed", "stall_wait", "stall_long_sb", "stall_wait (Not Issued)"]
    table = [
        ["Kernel Name", "void sweep_kernel"],
        names,
        ["  MOV R1, R2", "1", "8", "1", "0", "1"],
        ["@P0 LDG.E.128.STRONG.GPU R4, [R2]", "0", "8", "0", "0", "0"],
        ["  LOP3.LUT R4, R5", "98", "8", "3", "95", "0"],
        ["  EXIT", "1", "0", "1", "0", "0"],
    ]
    found = list(samples.lines(table, 2))
    assert [line.split() for line in found] == [
        ["95.0%", "long_sb"],
        ["5.0%", "wait"],
        # Where no sample lies, but a part of a step begins; then what takes the time. The others were seldom seen, or
        # never executed.
        ["1", "8", "0.00%", "1.0%", "@P0", "LDG.E.128.STRONG.GPU", "R4,", "[R2]"],
        ["2", "8", "98.00%", "99.0%", "LOP3.LUT", "R4,", "R5", "long_sb"],
    ]


def test_the_table_in_the_readme_is_of_the_record() -> None:
    assert report.table(record.load(record.location("h200"))) in (ROOT / "README.md").read_text()


@pytest.mark.parametrize(
    ("kernel", "name"),
    (
        (
            "void pyrnnfast::<unnamed>::sweep_kernel<pyrnnfast::<unnamed>::ForwardTail<Lstm, float>, 1>(R)",
            "sweep Forward",
        ),
        ("void pyrnnfast::<unnamed>::sweep_kernel<BackwardTail<Rnn<(bool)1>, float>, (int)4>(R)", "sweep Backward"),
        ("void pyrnnfast::<unnamed>::each_element<pyrnnfast::<unnamed>::BiasGradients<Lstm, float>>(T1)", "each Bias"),
        ("nvjet_hsh_64x8_64x16_1x4_h_bz_NNT", "product"),
        ("Memset (Device)", "Memset"),
    ),
)
def test_names_of_kernels(kernel: str, name: str) -> None:
    assert profile._name(kernel).startswith(name)


@pytest.mark.parametrize("mode", rows.MODES)
def test_what_does_nothing_has_the_operands_and_the_results_of_a_layer(mode: str) -> None:
    row = Row("gru", mode, (5, 3, 4, 6), "float32")
    layer = rows.module(row, False, "cpu")
    x = rows.input_of(row, next(layer.parameters()))
    with torch.set_grad_enabled(mode == "training"):
        expected = rows.step(row, layer, x)()
        found = rows.step(row, profile.DoesNothing(layer, x), x)()
    assert [t.shape for t in found] == [t.shape for t in expected]
