"""What calls make of other programs on their cores (csrc/cpu/company.h), with times that are made up."""

import itertools

import pytest

from pyrnnfast import _cpu

MS = 1_000_000


class Machine:
    """Calls one after the other, on so many cores that others leave, of which a team with too few is slowed down."""

    def __init__(self, threads: int, length: float = 8.0, fine: bool = True) -> None:
        self.threads, self.length, self.fine = threads, length, fine
        self.calls: list[tuple[int, int, int, int, int]] = []
        self.now = 1000.0  # ms

    @property
    def limit(self) -> int:
        return _cpu.limits_beside_company(self.calls)[-1] if self.calls else self.threads

    def call(self, cores: float) -> int:
        """How many threads it had."""
        size = self.limit
        assert 1 <= size <= self.threads
        missing = max(0.0, size - cores)
        speed = size / (1 + 3 * missing) if self.fine else min(size, cores)
        taken = self.length / speed
        self.now += taken
        self.calls.append((int(self.now * MS), size, 1000, int(taken * MS), int(missing * taken * MS)))
        return size

    def run(self, cores: float, milliseconds: float) -> list[int]:
        end, found = self.now + milliseconds, []
        while self.now < end:
            found.append(self.call(cores))
        return found


@pytest.mark.parametrize("length", [0.1, 8.0, 300.0])
@pytest.mark.parametrize("threads", [2, 16])
def test_alone_nothing_changes(threads: int, length: float) -> None:
    machine = Machine(threads, length)
    assert set(machine.run(threads - 0.2, min(500, 600 * length))) == {threads}


@pytest.mark.parametrize(("threads", "cores", "fewer"), [(2, 1.5, 1), (2, 1.0, 1), (16, 14.0, 14), (16, 8.2, 8)])
def test_as_many_threads_as_have_cores(threads: int, cores: float, fewer: int) -> None:
    machine = Machine(threads)
    machine.run(cores, 2000)
    late = machine.run(cores, 6000)
    assert set(late) <= {threads, *range(1, fewer + 2)}
    # They are tried again, and seldom.
    assert 1 <= late.count(threads) <= 0.05 * len(late)
    assert sum(size in (fewer, fewer + 1) for size in late) >= 0.9 * len(late)


def test_not_where_fewer_get_less_done() -> None:
    """Threads that seldom meet use what is there, however much it is."""
    machine = Machine(2, fine=False)
    machine.run(1.7, 2000)
    late = machine.run(1.7, 6000)
    assert late.count(1) <= 0.05 * len(late)


def test_all_of_them_soon_after_the_others_are_gone() -> None:
    machine = Machine(2)
    machine.run(1.0, 5000)
    machine.run(2.0, 2000)
    assert set(machine.run(2.0, 500)) == {2}


def test_a_trial_that_nobody_has_ended() -> None:
    machine = Machine(2)
    while machine.limit == 2:
        machine.call(1.0)
    machine.now += 17_000
    assert machine.call(2.0) == 1  # whose limit is that of the time of the last one
    assert set(machine.run(2.0, 500)) == {2}


def test_a_short_disturbance_is_none() -> None:
    machine = Machine(2, length=1.0)
    for _ in range(20):
        assert set(machine.run(2.0, 50)) == {2}
        machine.run(1.0, 2)  # of 52 ms


@pytest.mark.parametrize("length", [1.0, 3.0])
def test_neither_are_some_milliseconds_every_now_and_then(length: float) -> None:
    """As by processes that take turns, whose threads go on looking for work for a while."""
    machine = Machine(2, length)
    sizes = []
    for _ in range(8):
        sizes += machine.run(1.0, 25) + machine.run(2.0, 175)
    assert sizes.count(1) <= 0.15 * len(sizes)


def test_short_calls_are_listened_to_seldom() -> None:
    """Of calls of 0.1 ms, four in a row and then none for 2 ms; 200 of them are enough."""
    calls = [(1000 * MS + k * MS // 10, 2, 10, MS // 10, MS // 10) for k in range(1, 2000)]
    first = _cpu.limits_beside_company(calls).index(1)
    assert 200 / 4 * 23 - 30 <= first <= 200 / 4 * 24


def test_a_call_that_wants_other_numbers() -> None:
    """Two threads were judged and lacked a core: of sixteen one is lacking, too."""
    crowded = [(1000 * MS + 10 * k * MS, 16, 10, 10 * MS, 20 * MS) for k in range(1, 5)]
    assert _cpu.limits_beside_company(crowded)[-1] == 14
    one_missing = [(1000 * MS + 10 * k * MS, 2, 10, 10 * MS, 10 * MS) for k in range(1, 5)]
    later = (1041 * MS, 16, 10, MS // 10, 0)
    assert _cpu.limits_beside_company([*one_missing, later])[-2:] == [1, 15]


def test_calls_of_long_ago_do_not_count() -> None:
    calls = [(1000 * MS + 2000 * k * MS, 2, 10, 10 * MS, 10 * MS) for k in range(1, 50)]
    assert set(_cpu.limits_beside_company(calls)) == {2}


def test_junk() -> None:
    good = (1, 1, 1, 1, 1)
    for place, bad in itertools.product(range(5), (-1, 2**41)):
        with pytest.raises(ValueError, match=r"from [01] to"):
            _cpu.limits_beside_company([(*good[:place], bad, *good[place + 1 :])])  # type: ignore[list-item]
    for bad_call in ((1, 2), (1, 1, 1, 1, "1"), None, 3):
        with pytest.raises(TypeError):
            _cpu.limits_beside_company([bad_call])  # type: ignore[list-item]
