"""The order in which the blocks of a persistent launch meet makes no difference; and these tests would see if it did.

Delays are put in at random around everything that blocks wait for or hand over. The schedule is right if no seed
changes a bit or ends in a deadlock, and if ThreadSanitizer sees nothing shared but atomic words. That such a test can
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

# Replacements in a file of csrc/cuda, each of a text that stands there once.
_LOADED = "while (!block.all(arrived));"
_TAGGED = "static_cast<uint32_t>(step + 1) & 0x1fffu"
FAULTS: dict[str, tuple[str, str, str]] = {
    "no_wait": ("persistent.h", _LOADED, "while (block.all(arrived), false);"),
    "waits_for_no_step_in_particular": ("numbers.h", _TAGGED, "static_cast<uint32_t>(step > 0) + 1"),
    "looks_at_one_of_several": ("persistent.h", "(one | other)", "(words.word[0] ^ tag)"),
    "one_exchange": ("tails.h", "(step & 1) * half", "0 * half"),
    "no_wait_back": ("scatter.h", _LOADED, "while (block.all(arrived), false);"),
    "waits_for_no_step_in_particular_back": ("numbers.h", "static_cast<uint32_t>(step + 1) & kTag", "(void(step), 1u)"),
    "carries_nothing": (
        "tails.h",
        "    e.h = carried.one;\n    e.c = carried.other;\n",
        "    (void)e, (void)carried;\n",
    ),
}
DEADLOCKS: dict[str, tuple[str, str, str]] = {
    "waits_for_the_step_after": (
        "persistent.h",
        "const auto tag = Tagged<E>::tag(step);",
        "const auto tag = Tagged<E>::tag(step + 1);",
    ),
    "hands_nothing_over": ("tails.h", "hand_over(to, Tagged<E>::from(e.h, step + 1));", "(void)to;"),
    "forgets_units_that_are_none": (
        "tails.h",
        "hand_over(run.exchange_row(step, row) + unit, Tagged<E>::from(A(0), step));",
        "(void)run, (void)step, (void)row, (void)unit;",
    ),
    "hands_no_parts_over": ("scatter.h", "if (next < run.end()) {", "if (next < 0) {"),
}


def replaced(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert text.count(old) == 1, f"{path.name} has {text.count(old)} times {old!r}"
    path.write_text(text.replace(old, new))


def build(place: Path, fault: tuple[str, str, str] | None = None, *options: str) -> Path:
    """Compiles schedule.cpp with a copy of the sources, perhaps a faulty one."""
    sources, program = place / "csrc", place / "schedule"
    shutil.copytree(CSRC, sources)
    if fault is not None:
        file, old, new = fault
        replaced(sources / "cuda" / file, old, new)
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
    found = digests(build(tmp_path, FAULTS[fault]), 60)
    assert len(found) == 60
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


def test_a_race_is_seen(tmp_path: Path) -> None:
    # The words that blocks hand over are atomic; what else they might share is not.
    plain = ("tails.h", "__atomic_store_n(to, word, __ATOMIC_RELAXED);", "*to = word;")
    count, text = races(build(tmp_path, plain, "-g", "-fsanitize=thread"), 1)
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
