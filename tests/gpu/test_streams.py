"""What a kernel owes to CUDA: the current stream, graphs, no waiting, torch's memory alone, the same bits each time."""

import gc
from collections.abc import Callable
from typing import Any

import oracle
import pytest
import torch
from cases import CELLS, Case
from torch import Tensor

import pyrnnfast
from pyrnnfast import cuda

# With both paths: sizes and a dtype for which the persistent one has a plan.
SIZES = {"steps": 16, "batch": 12, "inputs": 32, "hidden": 128}
KIND = "bf16"
DTYPE = oracle.KINDS[KIND][0]

both = pytest.mark.parametrize("path", oracle.PATHS)
every_cell = pytest.mark.parametrize("cell", CELLS)


def planned(case: Case, path: str) -> oracle.Operands:
    """The operands of a case that has to take the path."""
    given = oracle.operands(case, DTYPE)
    assert oracle.takes(case, given, path), "these sizes are here because they have a plan"
    return given


def call(case: Case, given: oracle.Operands, path: str) -> dict[str, Tensor]:
    with cuda.use(path):
        return oracle.all_results(case, given.ours, given.x, given.states)


def packed_once(case: Case, given: oracle.Operands) -> tuple[Any, Any, Tensor]:
    """The input, the state, and the leaf of the input's data: packing, which reads lengths, is no part of a call."""
    x = case.packed(given.x.detach())
    data = x if isinstance(x, Tensor) else x.data
    return x, case.hx(given.states), data.requires_grad_()


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


CASES = [Case(cell, **SIZES, bidirectional=bidirectional) for cell in CELLS for bidirectional in (False, True)]
CASES += [Case(cell, lengths=(16, 16, 9, 5, 5, 1), inputs=32, hidden=128) for cell in CELLS]
CASES += [Case(cell, lengths=(3, 1, 2), hidden=33, bidirectional=True) for cell in CELLS]


def soil() -> None:
    """What torch's allocator hands out next is full of ones, which as numbers are NaN."""
    for size, count in ((512, 200), (1 << 16, 50), (1 << 20, 8), (20 << 20, 2)):
        blocks = [torch.full((size,), 255, dtype=torch.uint8, device=oracle.DEVICE) for _ in range(count)]
        del blocks


@both
@pytest.mark.parametrize("kind", oracle.KINDS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_same_bits_in_every_run(case: Case, kind: str, path: str) -> None:
    """Whatever stands in the memory that it gets."""
    given = oracle.operands(case, oracle.KINDS[kind][0])
    with oracle.precision(kind):
        first = oracle.ours(case, given, path)
        for _ in range(9):
            soil()
            assert same(call(case, given, path), first)


@both
@every_cell
def test_two_streams_at_once(cell: str, path: str) -> None:
    case = Case(cell, **(SIZES | {"steps": 100}))
    all_given = [planned(case, path) for _ in range(2)]
    for given in all_given[1:]:
        given.x.data.neg_()  # other data, or a mix-up would not show
        given.ours.weight_hh_l0.data.mul_(0.5)
    alone = [call(case, given, path) for given in all_given]
    assert not torch.equal(alone[0]["y"], alone[1]["y"])
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in all_given]
    for _ in range(5):
        together = []
        for stream, given in zip(streams, all_given, strict=True):
            with torch.cuda.stream(stream):
                together.append(call(case, given, path))
        torch.cuda.synchronize()
        for found, expected in zip(together, alone, strict=True):
            assert same(found, expected)


@both
@every_cell
def test_the_current_stream_is_used(cell: str, path: str) -> None:
    # On another stream than this one's the call would not wait for the input, which a long sleep is in front of.
    case = Case(cell, **SIZES)
    given = planned(case, path)
    expected = call(case, given, path)
    values = given.x.detach().clone()
    given.x.data.zero_()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # cycles: about 0.1 s
        given.x.data.copy_(values)
        found = call(case, given, path)
    stream.synchronize()
    assert same(found, expected)


@both
@pytest.mark.parametrize("packed", (False, True))
@every_cell
def test_no_call_waits_for_the_card(cell: str, packed: bool, path: str) -> None:
    case = Case(cell, lengths=(16, 9, 5, 1), inputs=32, hidden=128) if packed else Case(cell, **SIZES)
    given = planned(case, path)
    x, hx, data = packed_once(case, given)
    upstream = torch.ones_like(given.ours(x, hx)[0].data)

    def train() -> None:
        with cuda.use(path):
            y = given.ours(x, hx)[0]
            torch.autograd.grad(y[0] if packed else y, [data, *given.ours.parameters()], upstream)

    train()  # what is done once, such as loading a kernel, may wait
    torch.cuda.synchronize()
    done = torch.cuda.Event()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(1_000_000_000)  # about half a second
        train()
        done.record()
        waited = done.query()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not waited, "the call returned after the work in front of it was done"


@both
@every_cell
def test_memory_is_torchs_alone(cell: str, path: str) -> None:
    case = Case(cell, **(SIZES | {"steps": 300, "batch": 40}))
    given = planned(case, path)
    for _ in range(2):
        call(case, given, path)
    gc.collect()  # of other tests
    torch.cuda.synchronize()
    free, reserved, allocated = (
        torch.cuda.mem_get_info()[0],
        torch.cuda.memory_reserved(),
        torch.cuda.memory_allocated(),
    )
    for _ in range(5):
        call(case, given, path)
    torch.cuda.synchronize()
    assert torch.cuda.memory_reserved() == reserved
    assert torch.cuda.memory_allocated() == allocated
    # The driver may load a little more of a kernel when it pleases.
    assert torch.cuda.mem_get_info()[0] >= free - 2**21


def _captured(fn: Callable[[], dict[str, Tensor]]) -> tuple[torch.cuda.CUDAGraph, dict[str, Tensor]]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            fn()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        static = fn()
    return graph, static


def _near(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    # cuBLAS may choose otherwise while it is captured, so not to the bit.
    for name, value in expected.items():
        error = (found[name].float() - value.float()).norm() / value.float().norm()
        assert error.item() < 0.01, name


@both
@pytest.mark.parametrize("training", (False, True))
@pytest.mark.parametrize("packed", (False, True))
@every_cell
def test_a_captured_graph(cell: str, packed: bool, training: bool, path: str) -> None:
    case = Case(cell, lengths=(16, 9, 5, 1), inputs=32, hidden=128) if packed else Case(cell, **SIZES)
    given = planned(case, path)
    x, hx, data = packed_once(case, given)
    leaves = [data, *given.states, *given.ours.parameters()]
    upstream = torch.randn_like(given.ours(x, hx)[0].data.detach())

    def run() -> dict[str, Tensor]:
        with cuda.use(path), torch.set_grad_enabled(training):
            y = given.ours(x, hx)[0]
            y = y[0] if packed else y
            grads = torch.autograd.grad(y, leaves, upstream) if training else ()
        return {"y": y.detach()} | {f"grad {i}": g for i, g in enumerate(grads)}

    graph, static = _captured(run)
    for seed in range(3):
        with torch.no_grad():
            torch.manual_seed(seed)
            data.copy_(torch.randn_like(data))
            given.ours.weight_hh_l0.mul_(0.9)
        graph.replay()
        torch.cuda.synchronize()
        found = {name: t.clone() for name, t in static.items()}
        _near(found, run())


@both
@every_cell
def test_lengths_and_resets_in_a_graph(cell: str, path: str) -> None:
    """Nobody waits for their values, so that a graph may be captured, and replayed with others."""
    case = Case(cell, **SIZES)
    given = planned(case, path)
    hx = case.hx(given.states)
    steps, batch = given.x.shape[:2]
    lengths = torch.full((batch,), steps, device=oracle.DEVICE)
    reset = torch.zeros(steps, batch, dtype=torch.bool, device=oracle.DEVICE)

    def run() -> dict[str, Tensor]:
        with cuda.use(path):
            y = given.ours(given.x, hx, lengths=lengths, reset=reset)[0]
            (grad,) = torch.autograd.grad(y.float().square().sum(), given.x)
        return {"y": y.detach(), "grad": grad}

    graph, static = _captured(run)
    graph.replay()
    torch.cuda.synchronize()
    whole = static["y"].clone()
    _near({"y": whole}, {"y": run()["y"]})
    lengths.copy_(torch.arange(batch) % (steps + 1))
    reset.copy_(torch.rand(steps, batch) < 0.2)
    graph.replay()
    torch.cuda.synchronize()
    found = {name: t.clone() for name, t in static.items()}
    assert not torch.equal(found["y"], whole)
    _near(found, run())


@both
@every_cell
def test_a_graph_is_captured_while_another_thread_works(cell: str, path: str) -> None:
    # Both directions, the second of which has a stream of its own in the step form.
    import threading

    case = Case(cell, **SIZES, bidirectional=True)
    given, other = planned(case, path), planned(case, path)
    expected = call(case, other, path)["y"]
    started, stop = threading.Event(), threading.Event()
    found: list[Tensor] = []

    def work() -> None:
        with torch.cuda.stream(torch.cuda.Stream()), torch.no_grad(), cuda.use(path):
            while not stop.is_set():
                y = other.ours(other.x, case.hx(other.states))[0]
                started.set()
            torch.cuda.current_stream().synchronize()
            found.append(y)

    def run() -> dict[str, Tensor]:
        with cuda.use(path), torch.no_grad():
            return {"y": given.ours(given.x, case.hx(given.states))[0]}

    graph = torch.cuda.CUDAGraph()
    run()
    torch.cuda.synchronize()
    thread = threading.Thread(target=work)
    with cuda.use(path):  # for the whole process, so that no thread's end of it changes the other's path
        thread.start()
        try:
            assert started.wait(60)
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                static = run()
        finally:
            stop.set()
            thread.join(60)
    graph.replay()
    torch.cuda.synchronize()
    _near({"y": static["y"].clone()}, run())
    assert len(found) == 1
    assert torch.equal(found[0], expected)


@every_cell
def test_a_non_contiguous_and_a_misaligned_input(cell: str) -> None:
    # Kernels that read 16 bytes at once must not take it for granted that they may.
    case = Case(cell, **(SIZES | {"inputs": 33}))
    for path in oracle.PATHS:
        given = oracle.operands(case, DTYPE)
        expected = call(case, given, path)
        buffer = torch.zeros(given.x.numel() + 1, device=oracle.DEVICE, dtype=DTYPE)
        buffer[1:] = given.x.detach().flatten()
        shifted = buffer[1:].view_as(given.x).requires_grad_()
        transposed = given.x.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
        for x in (shifted, transposed):
            _near(call(case, given._replace(x=x), path), expected)


def test_weights_that_are_views() -> None:
    case = Case("lstm", **SIZES)
    for path in oracle.PATHS:
        given = planned(case, path)
        expected = call(case, given, path)
        buffer = torch.zeros(given.ours.weight_hh_l0.numel() + 1, device=oracle.DEVICE, dtype=DTYPE)
        buffer[1:] = given.ours.weight_hh_l0.detach().flatten()
        given.ours.weight_hh_l0 = torch.nn.Parameter(buffer[1:].view(given.ours.weight_hh_l0.shape))
        assert given.ours.weight_hh_l0.data_ptr() % 16
        _near(call(case, given, path), expected)


def test_autograd_from_another_thread_and_stream() -> None:
    # torch goes back through time on its own thread, on the stream of the forward pass.
    case = Case("gru", **SIZES)
    for path in oracle.PATHS:
        given = planned(case, path)
        expected = call(case, given, path)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with cuda.use(path):
            with torch.cuda.stream(stream):
                outputs = case.run(given.ours, given.x, given.states)
            torch.cuda.current_stream().wait_stream(stream)
            found = oracle.with_gradients(given.ours, given.x, given.states, outputs)
        assert same(found, expected)


def test_many_calls_at_once_from_threads() -> None:
    import threading

    case = Case("lstm", **SIZES)
    given = planned(case, "persistent")
    with cuda.use("persistent"), torch.no_grad():
        expected = given.ours(given.x, case.hx(given.states))[0]
        torch.cuda.synchronize()
        found: list[Tensor] = []

        def work() -> None:
            with torch.cuda.stream(torch.cuda.Stream()), torch.no_grad():
                for _ in range(20):
                    y = given.ours(given.x, case.hx(given.states))[0]
                torch.cuda.current_stream().synchronize()
                found.append(y)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert len(found) == 4
    assert all(torch.equal(y, expected) for y in found)


def test_our_module_is_what_ran() -> None:
    # The whole file would pass on torch's own layers, did they not say so.
    case = Case("lstm", **SIZES)
    for path, name in oracle.PATHS.items():
        given = planned(case, path)
        with cuda.use(path), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            given.ours(given.x, case.hx(given.states))
            torch.cuda.synchronize()
        kernels = {event.key for event in profile.key_averages()}
        assert any("pyrnnfast" in kernel for kernel in kernels), (name, kernels)
        assert isinstance(given.ours, pyrnnfast.LSTM)
