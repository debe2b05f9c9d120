"""The order in which the blocks of a persistent launch meet makes no difference; and these tests would see if it did.

Delays are put in at random before every wait and every publication. The schedule is right if no seed changes a bit or
ends in a deadlock, and if ThreadSanitizer sees every access to the exchanges ordered by a flag. That such a test can
fail is shown by faults put into a copy of the sources.
"""

import os
import shutil
import subprocess
from pathlib import Path

import _emulation
import pytest
from emulated import CELLS, PERSISTENT, assert_same, dense, ragged, run_both
from kernels import Layer

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
SEEDS = 200
DEADLOCK = "deadlock: the blocks of a persistent launch wait for each other for ever"
RACE = "WARNING: ThreadSanitizer: data race"

LAYERS = (
    dense(7, 17, 70, inputs=3),
    ragged(19, 17, 9, 9, 1, 1, hidden=40, inputs=3, directions=2),
)

# Replacements in persistent.h, each of a text that stands there once.
_WAIT = "block.wait(flags + writer, (after < run.unit_blocks ? after : run.unit_blocks) - writer, step);"
_FINISH = "block.meet();\n    each_element("
_PUBLISH = "block.publish(flags + unit_block, static_cast<int32_t>(step + 1));"
FAULTS: dict[str, tuple[str, str]] = {
    "no_wait": (_WAIT, "(void)writer, (void)after;"),
    "waits_for_the_step_before": (_WAIT, _WAIT.replace("step)", "step - 1)")),
    "waits_for_one_block_of_several": (
        _WAIT,
        _WAIT.replace("(after < run.unit_blocks ? after : run.unit_blocks) - writer", "after > writer"),
    ),
    "one_exchange": ("exchange + ((step % 2) * exchange_rows + row) * depth", "exchange + row * depth"),
    "publishes_before_it_writes": (_FINISH, f"block.meet();\n    {_PUBLISH}\n    each_element("),
}
DEADLOCKS: dict[str, tuple[str, str]] = {
    "waits_for_the_step_after": (_WAIT, _WAIT.replace("step)", "step + 1)")),
    "publishes_nothing": (_PUBLISH, ""),
}
RACES = ("no_wait", "one_exchange", "publishes_before_it_writes")


def replaced(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert text.count(old) == 1, f"{path.name} has {text.count(old)} times {old!r}"
    path.write_text(text.replace(old, new))


def build(place: Path, fault: tuple[str, str] | None = None, *options: str) -> Path:
    """Compiles schedule.cpp with a copy of the sources, perhaps a faulty one."""
    sources, program = place / "csrc", place / "schedule"
    shutil.copytree(CSRC, sources)
    if fault is not None:
        replaced(sources / "cuda" / "persistent.h", *fault)
    # What ends in a deadlock does so after milliseconds; a minute is for machines that are busy with all else.
    replaced(sources / "cuda" / "host.h", "std::chrono::seconds(60)", "std::chrono::seconds(3)")
    compiler = os.environ.get("CXX", "c++")
    flags = ("-std=c++17", "-O1", "-pthread", "-Wno-unknown-pragmas", *options, f"-I{sources / 'cuda'}")
    subprocess.run([compiler, *flags, HERE / "schedule.cpp", sources / "cuda" / "plan.cpp", "-o", program], check=True)
    return program


def digests(program: Path, seeds: int) -> list[str]:
    """What each seed gives, seed 0 being without delays."""
    run = subprocess.run([program, "0", str(seeds)], check=True, capture_output=True, text=True, timeout=300)
    return run.stdout.splitlines()


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The one result of the schedule as it is, under all seeds."""
    program = build(tmp_path_factory.mktemp("sound"))
    found = digests(program, SEEDS)
    assert len(found) == SEEDS
    assert len(set(found)) == 1, set(found)
    assert DEADLOCK not in found
    return found[0]


def test_delays_change_no_bit_of_the_program(sound: str) -> None:
    assert len(sound) == 16


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_schedule_is_seen(fault: str, tmp_path: Path, sound: str) -> None:
    found = digests(build(tmp_path, FAULTS[fault]), 10)
    assert len(found) == 10
    # Not only under one lucky seed.
    assert sum(result != sound for result in found[1:]) >= 3, found


@pytest.mark.parametrize("fault", DEADLOCKS)
def test_a_deadlock_is_seen(fault: str, tmp_path: Path) -> None:
    assert digests(build(tmp_path, DEADLOCKS[fault]), 1) == [DEADLOCK]


def races(program: Path, seeds: int) -> tuple[int, str]:
    environment = os.environ | {"TSAN_OPTIONS": "halt_on_error=0"}
    run = subprocess.run([program, "1", str(1 + seeds)], capture_output=True, text=True, timeout=300, env=environment)
    assert "FATAL" not in run.stderr, run.stderr
    assert len(run.stdout.splitlines()) == seeds, run.stderr[-3000:]
    return run.stderr.count(RACE), run.stderr


def test_no_access_races_another(tmp_path: Path) -> None:
    count, text = races(build(tmp_path, None, "-g", "-fsanitize=thread"), 20)
    assert count == 0, text[:3000]


@pytest.mark.parametrize("fault", RACES)
def test_a_race_is_seen(fault: str, tmp_path: Path) -> None:
    count, text = races(build(tmp_path, FAULTS[fault], "-g", "-fsanitize=thread"), 1)
    assert count > 0
    assert "persistent.h" in text


@pytest.mark.parametrize("layer", LAYERS, ids=str)
@pytest.mark.parametrize("numbers", PERSISTENT)
@pytest.mark.parametrize("cell", CELLS)
def test_delays_change_no_bit(cell: str, numbers: str, layer: Layer) -> None:
    """The whole table of what is instantiated, both directions in one launch and in chunks too."""
    _emulation.set_threshold("chunk_bytes", 20_000)
    expected = run_both(cell, layer, PERSISTENT[numbers], "persistent")
    for seed in range(1, 7):
        _emulation.set_threshold("delays", seed)
        assert_same(run_both(cell, layer, PERSISTENT[numbers], "persistent"), expected)
