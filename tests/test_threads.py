"""Threads of all kinds: those of torch's team inside a call, Python's around it, and forked processes."""

import multiprocessing
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from cases import CELLS, Case, gradients
from kernels import SCHEDULES, Layer, forward_operands, run, use
from torch import Tensor

import pyrnnfast
from pyrnnfast import _cpu, passes
from pyrnnfast.passes import CELLS as WIDTHS


def operations(cell: str, layer: Layer) -> int:
    """Of a pass, as csrc/cpu/schedule.cpp counts them: with 4·10⁶ or more it is shared among threads."""
    products = 2 * WIDTHS[cell].gates * (layer.inputs + layer.hidden)
    return layer.rows * layer.hidden * (products + 100)


# Fewer than 8 rows: the units are shared. From 8 on: the rows, in as many groups as have 4 each, units within a group.
LAYERS = (
    Layer((1,) * 60, 193, directions=2),
    Layer((2,) * 40, 200),
    Layer((7,) * 20, 150, inputs=600),
    Layer((8,) * 20, 150, directions=2),
    Layer((13,) * 20, 131),
    Layer((33,) * 20, 100, inputs=1),
    Layer((1,) * 1300, 40),  # fewer blocks of units than threads
    Layer((160,), 150, single_step=True),
    Layer((9,) * 5 + (7,) * 5 + (2,) * 30 + (1,) * 20, 160, directions=2, packed=True),
    Layer((23, 20, 20, 11, 8, 8, 7) + (5,) * 10 + (1,) * 20, 160, packed=True),
    Layer((600,) * 3, 64, inputs=64),  # rows that are what a panel is, more than one stretch of a sum has
    Layer((12,) * 20, 256, inputs=128),  # whole panels for each of two threads
    # Long, and in chunks whose steps have fewer and fewer rows: a group that runs ahead of another by a chunk shows.
    Layer(tuple(size for size in range(64, 8, -2) for _ in range(6)), 100, packed=True),
)


def assert_same_bits(cell: str, layer: Layer, dtype: torch.dtype, threads: tuple[int, ...]) -> None:
    one = run(cell, layer, dtype)
    assert all(t.isfinite().all() for t in one.values())
    for count in threads:
        for name, t in run(cell, layer, dtype, count).items():
            assert torch.equal(t, one[name]), f"{name} in {dtype} with {count} threads"


@pytest.mark.parametrize("layer", LAYERS, ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_bits_do_not_depend_on_threads(cell: str, layer: Layer, instruction_set: str) -> None:
    """More threads than cores among them; then the same again, which must not depend on what ran before."""
    assert operations(cell, layer) >= 4e6, "too small to be shared"
    assert_same_bits(cell, layer, torch.float32, (2, 3, 4, 1))
    assert_same_bits(cell, layer, torch.float64, (3,))
    for dtype in passes.NARROW:
        assert_same_bits(cell, layer, dtype, (2,))


# Groups of rows whose chunks have other numbers of rows for each step, and whose rows end at different steps.
SMALL_LAYERS = (
    Layer((1,) * 30, 21, inputs=5, directions=2),
    Layer((3,) * 9, 70, inputs=20),
    Layer((5,) * 9, 9, inputs=33),
    Layer((8,) * 9, 35, inputs=3, directions=2),
    Layer((14,) * 9, 20, inputs=520),
    Layer((13,), 70, inputs=7, single_step=True),
    # A single step whose panels are dealt out evenly, each packed by the thread that uses it.
    Layer((13,), 128, inputs=70, single_step=True),
    Layer((30,), 256, inputs=128, directions=2),
    Layer((13, 13, 12, 9, 9, 9, 5, 4) + (3,) * 4 + (1,) * 9, 40, inputs=6, directions=2, packed=True),
    Layer((31, 20, 20, 11, 8, 8, 7) + (5,) * 10 + (1,) * 20, 19, packed=True),
    Layer((9,) * 9, 64, inputs=32, directions=2),
    Layer((13, 13, 12, 9, 9, 9, 5, 4) + (3,) * 4 + (1,) * 9, 64, inputs=16, packed=True),
)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("layer", SMALL_LAYERS, ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_bits_do_not_depend_on_threads_under_any_schedule(
    cell: str, layer: Layer, schedule: str, instruction_set: str
) -> None:
    use(schedule)
    _cpu.set_threshold("serial_operations", 0)
    for dtype in passes.DTYPES:
        # Several times: what one thread takes from another too early or too late is not always wrong.
        assert_same_bits(cell, layer, dtype, (2, 3, 2, 3))


PROJECTED_LAYERS = (
    Layer((1,) * 60, 193, directions=2, projected=130),
    Layer((7,) * 20, 150, inputs=600, projected=70),
    Layer((160,), 150, projected=149),
    Layer((9,) * 5 + (7,) * 5 + (2,) * 30 + (1,) * 20, 160, directions=2, packed=True, projected=64),
    Layer((12,) * 20, 256, inputs=128, projected=128),  # whole panels for each of two threads
)
SMALL_PROJECTED_LAYERS = (
    Layer((1,) * 30, 21, inputs=5, directions=2, projected=20),
    Layer((8,) * 9, 35, inputs=3, directions=2, projected=9),
    Layer((13, 13, 12, 9, 9, 9, 5, 4) + (3,) * 4 + (1,) * 9, 70, inputs=16, packed=True, projected=65),
    Layer((30,), 128, inputs=70, projected=64),
)


@pytest.mark.parametrize("layer", PROJECTED_LAYERS, ids=str)
def test_bits_of_projections_do_not_depend_on_threads(layer: Layer, instruction_set: str) -> None:
    assert operations("lstm", layer) >= 4e6, "too small to be shared"
    for dtype in passes.DTYPES:
        assert_same_bits("lstm", layer, dtype, (2, 3))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("layer", SMALL_PROJECTED_LAYERS, ids=str)
def test_bits_of_projections_do_not_depend_on_threads_under_any_schedule(
    layer: Layer, schedule: str, instruction_set: str
) -> None:
    use(schedule)
    _cpu.set_threshold("serial_operations", 0)
    for dtype in passes.DTYPES:
        assert_same_bits("lstm", layer, dtype, (2, 3, 2, 3))


def in_fresh_process(code: str, timeout: float = 120, **environment: str) -> str:
    """What a child prints. It has to end by itself, with success."""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=timeout, env=os.environ | environment
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="needs /proc")
def test_threads_are_those_of_torch() -> None:
    """torch's setting is obeyed, and no thread beside torch's team ever starts."""
    code = """
import os
import torch
import pyrnnfast
from pyrnnfast import _cpu

asked = []
real = _cpu.forward_plain
_cpu.forward_plain = lambda *args: (asked.append(args[-1]), real(*args))[1]
count = lambda: len(os.listdir("/proc/self/task"))
module, x = pyrnnfast.LSTM(64, 128), torch.randn(50, 16, 64)
torch.set_num_threads(1)
alone = count()
module(x)[0].sum()
print(count() - alone)
torch.set_num_threads(3)
torch.ones(1 << 22).exp_()  # torch starts its team
module(x)[0].sum()
team = count()
for _ in range(3):
    module(x)[0].sum().backward()
with_backward = count()
for _ in range(3):
    module(x)[0].sum().backward()
print(team - alone, count() - with_backward, asked[0], set(asked[1:]))
"""
    first, second = in_fresh_process(code, OMP_NUM_THREADS="3").splitlines()
    assert first == "0"
    assert second == "2 0 1 {3}"


def test_the_team_really_shares_the_work() -> None:
    """On several cores, processor time has to exceed the time on the wall."""
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one core")
    layer = Layer((16,) * 200, 256)
    used = {}
    for threads in (1, 2):
        run("lstm", layer, torch.float32, threads)
        before = {int(t): task_time(t) for t in os.listdir("/proc/self/task")}
        for _ in range(5):
            run("lstm", layer, torch.float32, threads)
        main = threading.get_native_id()
        used[threads] = sum(
            task_time(t) - before.get(int(t), 0) for t in os.listdir("/proc/self/task") if int(t) != main
        )
    assert used[2] > used[1]


def task_time(task: str) -> int:
    """Ticks of the processor that a thread of this process has had."""
    with open(f"/proc/self/task/{task}/stat") as file:
        fields = file.read().rsplit(")", 1)[1].split()
    return int(fields[11]) + int(fields[12])


# Threads of Python -------------------------------------------------------------------------------------------------


def test_eight_threads_at_once_get_the_bits_of_one() -> None:
    """torch's random generator is shared, so the cases come with their weights made beforehand."""
    torch.set_num_threads(1)
    jobs = []
    for seed in range(8):
        cell = CELLS[seed % len(CELLS)]
        for case in (
            Case(cell, steps=40, batch=9, hidden=70),
            Case(cell, hidden=24, lengths=(1, 9, 2, 8, 3), bidirectional=True, layers=2),
            Case(cell, steps=5, batch=2, hidden=33, batch_first=True),
        ):
            jobs.append((case, case.module(pyrnnfast, seed=seed), case.operands(seed=seed)))

    def work(seed: int) -> list[Tensor]:
        out: list[Tensor] = []
        for case, module, (x, states) in jobs[3 * seed : 3 * seed + 3]:
            outputs = case.run(module, x, states)
            out += [*outputs.values(), *gradients(module, x, states, outputs).values()]
        return out

    serial = [work(seed) for seed in range(8)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        start = threading.Barrier(8)

        def many(seed: int) -> list[list[Tensor]]:
            # Each thread has a setting of its own, which begins at the number of cores.
            torch.set_num_threads(1)
            start.wait()
            return [work(seed) for _ in range(10)]

        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(many, range(8)))
    finally:
        sys.setswitchinterval(interval)
    for seed, rounds in enumerate(found):
        for results in rounds:
            assert all(torch.equal(a, b) for a, b in zip(results, serial[seed], strict=True))


def test_threads_that_compete_for_the_team_get_the_same_bits() -> None:
    layer = LAYERS[4]
    expected = {cell: run(cell, layer, torch.float32) for cell in CELLS}

    def work(k: int) -> bool:
        cell = CELLS[k % len(CELLS)]
        found = run(cell, layer, torch.float32, 2)
        return all(torch.equal(t, expected[cell][name]) for name, t in found.items())

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(64)))


def test_calls_at_the_same_time_share_the_processors() -> None:
    """Each has what those before it have left, at least one, and an even share at most."""

    def team_of(threads: int) -> int:
        for size in range(threads, 1, -1):
            try:
                _cpu.seconds_to_meet(size, 1)
            except RuntimeError:
                continue
            return size
        return 1

    operands = forward_operands("lstm", Layer((16,) * 2500, 256), torch.float32) | {"threads": 2}

    def while_another_has_two(processors: int, wanted: int) -> int:
        _cpu.set_threshold("processors", processors)
        with ThreadPoolExecutor(1) as pool:
            long_call = pool.submit(_cpu.forward, *operands.values())
            while team_of(processors) == processors:  # it has not begun
                assert not long_call.done(), "too short to tell"
            found = team_of(wanted)
            assert not long_call.done(), "too short to tell"
        assert team_of(min(wanted, processors)) == min(wanted, processors), "it was not given back"
        return found

    assert while_another_has_two(processors=2, wanted=2) == 1
    assert while_another_has_two(processors=3, wanted=2) == 1
    assert while_another_has_two(processors=4, wanted=4) == 2
    assert while_another_has_two(processors=5, wanted=4) == 2
    assert while_another_has_two(processors=8, wanted=4) == 4
    _cpu.set_threshold("processors", 2)
    assert team_of(4) == 2


def test_the_interpreter_is_free_during_a_call() -> None:
    """While a thread is inside one long kernel call, this one goes on."""
    operands = forward_operands("lstm", Layer((16,) * 1500, 256), torch.float32)
    times: dict[str, float] = {}
    inside = threading.Event()

    def long_call() -> None:
        inside.set()
        times["begin"] = time.perf_counter()
        _cpu.forward(*operands.values())
        times["end"] = time.perf_counter()

    thread = threading.Thread(target=long_call)
    thread.start()
    inside.wait()
    ticks = []
    while thread.is_alive():
        ticks.append(time.perf_counter())
        time.sleep(0.001)
    thread.join()
    took = times["end"] - times["begin"]
    assert took > 0.02, "too short to tell"
    during = [t for t in ticks if times["begin"] + 0.1 * took < t < times["end"] - 0.1 * took]
    assert len(during) >= 5


# Processes ---------------------------------------------------------------------------------------------------------


class Layers(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """Items that layers of ours compute, forward and back, in the workers."""

    def __init__(self) -> None:
        self.case = Case("gru", steps=20, batch=12, hidden=64, inputs=8)
        self.module = self.case.module(pyrnnfast)

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x, states = self.case.operands(seed=index)
        outputs = self.case.run(self.module, x, states)
        found = gradients(self.module, x, states, outputs)
        return outputs["y"].detach(), found["grad x"]


@pytest.mark.timeout(120)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_data_loader_with_workers_after_parallel_work() -> None:
    torch.set_num_threads(2)
    data = Layers()
    expected = [data[i] for i in range(len(data))]
    run("lstm", LAYERS[5], torch.float32, 2)
    torch.mm(torch.ones(300, 300), torch.ones(300, 300))
    loader = torch.utils.data.DataLoader(
        data, batch_size=None, num_workers=2, timeout=60, multiprocessing_context="fork"
    )
    found = list(loader)
    for ours, theirs in zip(found, expected, strict=True):
        assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.timeout(120)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_child_after_parallel_work() -> None:
    """Layers and torch's own products run on in the child, where torch's team is gone."""
    torch.set_num_threads(2)
    module, x = pyrnnfast.LSTM(64, 128), torch.randn(40, 16, 64)
    run("lstm", LAYERS[5], torch.float32, 2)
    big = torch.randn(400, 400)
    expected = module(x)[0].detach(), big @ big
    kernel = run("gru", LAYERS[4], torch.float32, 2)

    def child(pipe: Any) -> None:
        product = big @ big
        y, _ = module(x)
        y.sum().backward()
        again = run("gru", LAYERS[4], torch.float32, torch.get_num_threads())
        pipe.send(
            (
                torch.allclose(y, expected[0], rtol=1e-5, atol=1e-6),
                torch.allclose(product, expected[1], rtol=1e-4, atol=1e-3),
                all(torch.equal(t, kernel[name]) for name, t in again.items()),
                torch.get_num_threads(),
            )
        )

    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=child, args=(theirs,))
    process.start()
    try:
        assert ours.poll(60), "the child hangs"
        assert ours.recv() == (True, True, True, 1)
        process.join(30)
        assert process.exitcode == 0
    finally:
        process.kill()
    assert torch.get_num_threads() == 2
    run("lstm", LAYERS[5], torch.float32, 2)
