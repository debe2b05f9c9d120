"""Threads of all kinds: those of torch's team inside a call, Python's around it, and forked processes."""

import multiprocessing
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from cases import CELLS, Case, gradients
from torch import Tensor

import pyrnnfast
from pyrnnfast import _cpu
from pyrnnfast.passes import CELLS as WIDTHS


@dataclass(frozen=True)
class Size:
    """A call large enough for the kernels to share it among threads: 2·G·N·H² of at least 4·10⁶ operations."""

    batch_sizes: tuple[int, ...]
    hidden: int
    packed: bool = False

    @property
    def rows(self) -> int:
        return sum(self.batch_sizes)

    def __str__(self) -> str:
        return f"{'packed' if self.packed else 'dense'}-T{len(self.batch_sizes)}-B{self.batch_sizes[0]}-H{self.hidden}"


# Fewer than 8 rows: the units are shared. From 8 on: the rows, in as many groups as have 4 each, units within a group.
SIZES = (
    Size((1,) * 60, 193),
    Size((2,) * 40, 200),
    Size((7,) * 20, 150),
    Size((8,) * 20, 150),
    Size((13,) * 20, 131),
    Size((33,) * 20, 100),
    Size((1,) * 1300, 40),  # fewer blocks of units than threads
    Size((9,) * 5 + (7,) * 5 + (2,) * 30 + (1,) * 20, 160, packed=True),
    Size((23, 20, 20, 11, 8, 8, 7) + (5,) * 10 + (1,) * 20, 160, packed=True),
)


def run_kernels(
    cell: str, size: Size, reverse: bool, threads: int, dtype: torch.dtype, from_x: bool = False
) -> dict[str, Tensor]:
    """Forward and backward straight on ``_cpu``, with fixed operands; every output of both.

    from_x: the kernel makes the input's half of the gates itself.
    """
    widths = WIDTHS[cell]
    generator = torch.Generator().manual_seed(7)
    B, N, H = size.batch_sizes[0], size.rows, size.hidden

    def random(rows: int, columns: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(rows, columns, generator=generator)).to(dtype)

    def out(rows: int, columns: int) -> Tensor:
        return torch.full((rows, columns), float("nan"), dtype=dtype)

    batch_sizes = torch.tensor(size.batch_sizes) if size.packed else None
    weight_hh = random(widths.gates * H, H, H**-0.5)
    if from_x:
        inputs = None, random(N, 37), random(widths.gates * H, 37), random(1, widths.gates * H)
    else:
        inputs = random(N, widths.gates * H), None, None, None
    h0, c0 = random(B, H), random(B, H) if widths.has_cell else None
    bias_hn = random(1, H) if widths.inner_bias else None
    results = {"y": out(N, H), "h_n": out(B, H), "dgates": out(N, widths.dgates * H)}
    if widths.has_cell:
        results |= {"c_n": out(B, H), "cells": out(N, H)}
    if widths.saved:
        results["saved"] = out(N, widths.saved * H)
        results["carry"] = out(B, H)
    get = results.get
    _cpu.forward(
        cell, *inputs, weight_hh, bias_hn, h0 @ weight_hh.t(), h0, c0,
        results["y"], results["h_n"], get("c_n"), get("saved"), get("cells"), batch_sizes, reverse, threads,
    )  # fmt: skip
    grad_c_n = random(B, H) if widths.has_cell else None
    _cpu.backward(
        cell, B, results["y"], get("saved"), get("cells"), weight_hh, h0, c0, random(N, H), random(B, H), grad_c_n,
        results["dgates"], get("carry"), batch_sizes, reverse, threads,
    )  # fmt: skip
    return results


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_bits_do_not_depend_on_threads(cell: str, size: Size, instruction_set: str) -> None:
    """More threads than cores among them; then the same again, which must not depend on what ran before."""
    widths = WIDTHS[cell]
    assert 2 * widths.gates * size.rows * size.hidden**2 >= 4e6, "too small to be shared"
    for dtype, reverse, from_x in (
        (torch.float32, False, False),
        (torch.float64, True, False),
        (torch.float32, True, True),
        (torch.float64, False, True),
    ):
        one = run_kernels(cell, size, reverse, 1, dtype, from_x)
        assert all(t.isfinite().all() for t in one.values())
        for threads in (2, 3, 4, 1):
            for name, t in run_kernels(cell, size, reverse, threads, dtype, from_x).items():
                assert torch.equal(t, one[name]), f"{name} with {threads} threads"


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
real = _cpu.forward
_cpu.forward = lambda *args: (asked.append(args[-1]), real(*args))
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
    size = Size((16,) * 200, 256)
    used = {}
    for threads in (1, 2):
        run_kernels("lstm", size, False, threads, torch.float32)
        before = {int(t): task_time(t) for t in os.listdir("/proc/self/task")}
        for _ in range(5):
            run_kernels("lstm", size, False, threads, torch.float32)
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
    size = SIZES[4]
    expected = {cell: run_kernels(cell, size, False, 1, torch.float32) for cell in CELLS}

    def work(k: int) -> bool:
        cell = CELLS[k % len(CELLS)]
        found = run_kernels(cell, size, False, 2, torch.float32)
        return all(torch.equal(t, expected[cell][name]) for name, t in found.items())

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(64)))


def test_the_interpreter_is_free_during_a_call() -> None:
    """While a thread is inside one long kernel call, this one goes on."""
    size = Size((16,) * 1500, 256)
    times: dict[str, float] = {}
    inside = threading.Event()
    real_forward = _cpu.forward

    def long_call() -> None:
        widths = WIDTHS["lstm"]
        N, H = size.rows, size.hidden
        xgates, weight_hh = torch.randn(N, widths.gates * H), torch.randn(widths.gates * H, H) / 16
        y, h_n, c_n = torch.empty(N, H), torch.empty(16, H), torch.empty(16, H)
        inside.set()
        times["begin"] = time.perf_counter()
        inputs = xgates, None, None, None
        real_forward("lstm", *inputs, weight_hh, None, None, None, None, y, h_n, c_n, None, None, None, False, 1)
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
    run_kernels("lstm", SIZES[5], False, 2, torch.float32)
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
    run_kernels("lstm", SIZES[5], False, 2, torch.float32)
    big = torch.randn(400, 400)
    expected = module(x)[0].detach(), big @ big
    kernel = run_kernels("gru", SIZES[4], False, 2, torch.float32)

    def child(pipe: Any) -> None:
        product = big @ big
        y, _ = module(x)
        y.sum().backward()
        again = run_kernels("gru", SIZES[4], False, torch.get_num_threads(), torch.float32)
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
    run_kernels("lstm", SIZES[5], False, 2, torch.float32)
