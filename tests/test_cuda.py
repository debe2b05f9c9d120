"""CUDA tensors: which road they take, and the road to the kernels, without a card.

CPU tensors stand for CUDA tensors, and a module by the CPU's kernels for ``_cuda`` (stand_in.py); where only the device
of a tensor matters, it is a fake one on "cuda". What the real kernels compute is tested elsewhere.
"""

import importlib
import os
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import SMALL, Case, gradients
from stand_in import Fake, install
from test_choices import of, record, row, table
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils.rnn import PackedSequence

import pyrnnfast
from pyrnnfast import amp, cuda, ops, roads
from pyrnnfast.choices import Problem, Table

RECORDED = of(row(2.0, shape=[1000, 1, 1, 1]))  # of this card, but nothing like the calls below
SERVED = [case for case in SMALL if not case.projected]
LAYER = Case("lstm", steps=10, batch=4, inputs=8, hidden=16)
SHAPE = [10, 4, 8, 16]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    """Kernels without a record."""
    module = Fake()
    install(monkeypatch, module)
    return module


@pytest.fixture
def tf32_as_before() -> Iterator[None]:
    before = torch.backends.cudnn.allow_tf32
    yield
    torch.backends.cudnn.allow_tf32 = before


def explained(case: Case = LAYER, **given: Any) -> pyrnnfast.Explanation:
    x, states = case.operands()
    return pyrnnfast.explain(case.module(pyrnnfast), case.packed(x), case.hx(states), **given)


def called(case: Case = LAYER) -> None:
    """Forward and backward."""
    module = case.module(pyrnnfast)
    x, states = case.operands()
    gradients(module, x, states, case.run(module, x, states))


# The path that is asked for ---------------------------------------------------------------------------------------


def test_use_is_undone() -> None:
    assert cuda.asked() is None
    with cuda.use("step"):
        assert cuda.asked() == "fused"
        with cuda.use("persistent"):
            assert cuda.asked() == "persistent"
            with cuda.use(None):
                assert cuda.asked() is None
        with pytest.raises(KeyError), cuda.use("cudnn"):
            raise KeyError
        assert cuda.asked() == "fused"
    assert cuda.asked() is None


def test_use_of_no_path() -> None:
    with pytest.raises(ValueError, match="path 'fast': one of cudnn, fused, persistent, step is expected"):
        cuda.use("fast").__enter__()
    assert cuda.asked() is None


def child(path: str) -> subprocess.CompletedProcess[str]:
    code = "import pyrnnfast; print(pyrnnfast.cuda.asked())"
    environment = os.environ | {"PYRNNFAST_CUDA_PATH": path}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment)


@pytest.mark.parametrize(
    ("path", "asked"), [("", "None"), ("fused", "fused"), ("step", "fused"), ("persistent",) * 2, ("cudnn",) * 2]
)
def test_the_environment_chooses(path: str, asked: str) -> None:
    result = child(path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == asked


@pytest.mark.parametrize("path", ["fast", "CUDNN", " step"])
def test_an_unknown_path_fails_at_import(path: str) -> None:
    result = child(path)
    assert result.returncode == 1
    assert f"PYRNNFAST_CUDA_PATH {path!r}: one of cudnn, fused, persistent, step is expected" in result.stderr


# What there is ----------------------------------------------------------------------------------------------------


def loaded_with(monkeypatch: pytest.MonkeyPatch, import_module: Callable[[str], Any]) -> cuda.Loaded:
    monkeypatch.setattr(importlib, "import_module", import_module)
    return cuda.load.__wrapped__()  # not from the cache, and not into it


def test_a_build_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    found = loaded_with(monkeypatch, missing)
    assert found.module is None
    assert found.reason is not None
    assert "PYRNNFAST_CUDA=on" in found.reason


def test_kernels_that_cannot_be_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> Any:
        raise ImportError("libfoo.so: no such file")

    assert loaded_with(monkeypatch, broken).reason == "pyrnnfast._cuda cannot be loaded: libfoo.so: no such file"


def test_a_missing_module_of_another_name_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def other(name: str) -> Any:
        raise ModuleNotFoundError("No module named 'numpy'", name="numpy")

    with pytest.raises(ModuleNotFoundError, match="numpy"):
        loaded_with(monkeypatch, other)


def test_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def devices() -> None:
        raise RuntimeError("CUDA driver version is insufficient")

    module = types.SimpleNamespace(architectures=lambda: "80;90", devices=devices)
    found = loaded_with(monkeypatch, lambda name: module)
    assert vars(found) == vars(cuda.Loaded(module, "80;90", (), "no CUDA device: CUDA driver version is insufficient"))


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.SimpleNamespace(architectures=lambda: "90", devices=lambda: [{"name": "a"}, {"name": "b"}])
    found = loaded_with(monkeypatch, lambda name: module)
    assert vars(found) == vars(cuda.Loaded(module, "90", ({"name": "a"}, {"name": "b"})))


@pytest.mark.parametrize(
    ("architectures", "served", "not_served"),
    [
        ("80", [(8, 0), (8, 6), (8, 9)], [(7, 5), (9, 0), (12, 0)]),
        ("86", [(8, 6), (8, 9)], [(8, 0), (9, 0)]),
        ("90a", [(9, 0)], [(8, 0), (10, 0)]),
        ("100a", [(10, 0)], [(10, 3), (12, 0)]),
        ("80+PTX", [(8, 0), (8, 7), (9, 0), (12, 1)], [(7, 5)]),
        ("80;86;90;120+PTX", [(8, 0), (9, 0), (12, 0), (13, 0)], [(7, 5), (10, 0)]),
        ("", [], [(9, 0)]),
    ],
)
def test_what_runs_where(architectures: str, served: list[tuple[int, int]], not_served: list[tuple[int, int]]) -> None:
    assert all(cuda.runs_on(architectures, *card) for card in served)
    assert not any(cuda.runs_on(architectures, *card) for card in not_served)


def test_nothing_is_imported_before_it_is_needed() -> None:
    code = """
import sys, torch, pyrnnfast
from pyrnnfast import cuda
pyrnnfast.LSTM(3, 4)(torch.ones(2, 1, 3))[0].sum().backward()
assert cuda.load.cache_info().currsize == 0
assert cuda.table.cache_info().currsize == 0
pyrnnfast.info()
assert cuda.load.cache_info().currsize == 1
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr


# The choice -------------------------------------------------------------------------------------------------------


def test_without_kernels_torch_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, None, of(row(0.5, shape=SHAPE)), reason="no kernels here")
    assert explained() == ("cudnn", "no kernels here")
    with cuda.use("step"):
        assert explained() == ("cudnn", "no kernels here")
    called()


def test_without_a_record_torch_takes_it(fake: Fake) -> None:
    path, reason = explained()
    assert path == "cudnn"
    assert reason == "our kernels have no record from a card of compute capability 9.0"
    called()
    assert fake.passes == []
    assert fake.planned == []


def test_without_a_green_record_torch_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, Fake(), table(record(row(0.5, shape=SHAPE), tests_failed=1)))
    assert explained() == ("cudnn", "our kernels have no record from a card of compute capability 9.0")


def test_switched_off_it_is_not_cudnn(fake: Fake) -> None:
    with torch.backends.cudnn.flags(enabled=False):
        assert explained().path == "torch"


def test_a_card_that_they_are_not_compiled_for(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "load", lambda: cuda.Loaded(fake, "80", ({"name": "Big", "major": 9, "minor": 0},)))
    with cuda.use("step"):
        assert explained() == (
            "cudnn",
            "the CUDA kernels are compiled for 80, and Big has compute capability 9.0",
        )


@pytest.mark.parametrize("path", ["fused", "persistent"])
def test_the_faster_side_is_taken(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = Fake()
    install(monkeypatch, module, of(row(0.5, shape=SHAPE, path=path)))
    assert explained() == (
        path,
        "served by pyrnnfast._cuda: cuDNN took 2.00 times as long for lstm training 10,4,8,16 float32 on Fake 90, "
        "commit abc1234",
    )
    called()
    form = {"fused": "step", "persistent": "persistent"}[path]
    assert [p[:2] for p in module.passes] == [("forward", form), ("backward", form)]
    # Nothing is known of a call without gradients.
    with torch.no_grad():
        assert explained() == ("cudnn", "no shape near this one was measured")


def test_the_slower_side_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    module = Fake()
    install(monkeypatch, module, of(row(2.0, shape=SHAPE)))
    path, reason = explained()
    assert path == "cudnn"
    assert reason.startswith("it took 0.50 of our time for lstm training 10,4,8,16")
    called()
    assert module.passes == []
    with cuda.use("step"):
        called()
    assert len(module.passes) == 2


PROBLEM = Problem("lstm", True, "float32", True, 10, 4, 8, 16, bidirectional=False, packed=False)
PROBLEMS = {
    "plain": (LAYER, {}),
    "batch_first": (Case("lstm", 10, 4, 8, 16, batch_first=True), {}),
    "unbatched": (Case("lstm", 10, 4, 8, 16, unbatched=True, batch_first=True), {"batch": 1}),
    "packed": (Case("gru", inputs=8, hidden=16, lengths=(3, 10, 5, 5)), {"cell": "gru", "packed": True}),
    "stack": (Case("lstm", 10, 4, 8, 16, layers=2, bidirectional=True), {"layers": 2, "bidirectional": True}),
    "step": (Case("rnn_relu", 1, 4, 8, 16, single_step=True), {"cell": "rnn_relu", "steps": 1}),
    "unbatched step": (
        Case("lstm", 1, 4, 8, 16, single_step=True, unbatched=True),
        {"steps": 1, "batch": 1},
    ),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_what_is_looked_up(name: str) -> None:
    case, other = PROBLEMS[name]
    module = case.module(pyrnnfast)
    x, states = case.operands()
    assert roads.problem(module._spec(), case.packed(x), case.hx(states), module._weights()) == (
        PROBLEM._replace(**other)
    )


def test_what_is_looked_up_of_gradients_and_dtypes(tf32_as_before: None) -> None:
    def problem(module: torch.nn.Module, x: Any) -> Problem | None:
        return roads.problem(module._spec(), x, None, module._weights())

    module, x = LAYER.module(pyrnnfast), torch.ones(10, 4, 8)
    assert problem(module, x) == PROBLEM
    with torch.no_grad():
        assert problem(module, x) == PROBLEM._replace(training=False)
    module.requires_grad_(False)
    assert problem(module, x) == PROBLEM._replace(training=False)
    assert problem(module, x.clone().requires_grad_()) == PROBLEM
    assert problem(module, x.double()) == PROBLEM._replace(training=False, dtype="float64", tf32=False)
    torch.backends.cudnn.allow_tf32 = False
    assert problem(module, x) == PROBLEM._replace(training=False, tf32=False)
    for bad in (None, [1.0], x[0, 0], x[None], x[:0]):
        assert problem(module, bad) is None


@pytest.mark.parametrize("case", SERVED, ids=str)
@pytest.mark.parametrize("path", ["step", "persistent"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_asked_for(case: Case, path: str, dtype: torch.dtype, fake: Fake) -> None:
    """The whole road, forward and back, in every dtype that CUDA has."""
    ours, theirs = case.module(pyrnnfast, dtype), case.module(torch.nn, dtype)
    x, states = case.operands(dtype)
    with cuda.use(path):
        assert pyrnnfast.explain(ours, case.packed(x), case.hx(states)) == (
            {"step": "fused", "persistent": "persistent"}[path],
            "served by pyrnnfast._cuda: it is asked for",
        )
        found = case.run(ours, x, states)
        found |= gradients(ours, x, states, found)
    assert [p[:2] for p in fake.passes] == [("forward", path)] * case.layers + [("backward", path)] * case.layers
    expected = case.run(theirs, x, states)
    expected |= gradients(theirs, x, states, expected)
    assert found.keys() == expected.keys()
    tolerance = {torch.bfloat16: 0.1, torch.float16: 0.02, torch.float32: 1e-5, torch.float64: 1e-12}[dtype]
    for name, t in found.items():
        assert t.dtype is dtype
        torch.testing.assert_close(t, expected[name], rtol=tolerance, atol=tolerance)


def test_persistent_without_a_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    module = Fake(persistent=False)
    install(monkeypatch, module)
    with cuda.use("persistent"):
        assert explained() == (
            "fused",
            "served by pyrnnfast._cuda: it is asked for; a kernel for each step: the weights do not fit",
        )
        called()
    assert [p[:2] for p in module.passes] == [("forward", "step"), ("backward", "step")]


def test_persistent_with_a_plan_for_some(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each layer and pass has its own."""

    class Narrow(Fake):
        def plan(self, device: dict[str, Any], backward: bool, *problem: Any) -> dict[str, Any]:
            self.persistent = not backward and problem[4] == 8
            return super().plan(device, backward, *problem)

    module = Narrow()
    install(monkeypatch, module)
    case = Case("gru", steps=10, batch=4, inputs=8, hidden=16, layers=3, bidirectional=True)
    with cuda.use("persistent"):
        path, reason = explained(case)
        assert path == "persistent"
        assert reason.endswith("it is asked for; some passes with a kernel for each step: the weights do not fit")
        assert module.planned == [
            (back, "gru", "float32", 10, 4, inputs, 16, 2, True) for inputs in (8, 32) for back in (False, True)
        ]
        called(case)
    assert [p[:2] for p in module.passes] == [
        ("forward", "persistent"),
        *[("forward", "step")] * 2,
        *[("backward", "step")] * 3,
    ]


@pytest.mark.parametrize("path", (None, "step", "persistent"))
def test_sizes_that_nobody_knows_yet(path: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is nothing to look up by them, nor to remember."""
    install(monkeypatch, Fake(), of(row(0.5, shape=SHAPE, path="persistent")))
    module = pyrnnfast.LSTM(3, 5)
    x = torch.randn(7, 2, 3)
    with cuda.use(path):
        graph = make_fx(lambda t: module(t)[0], tracing_mode="symbolic", _allow_non_fake_inputs=True)(x)
        assert torch.allclose(graph(x), module(x)[0], atol=1e-6)


def test_a_call_is_decided_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What took longer than to issue a launch; and a decision is only remembered for what it follows from."""
    module = Fake()
    install(monkeypatch, module, of(row(0.5, shape=SHAPE, path="persistent")))
    assert explained().path == "persistent"
    count = len(module.planned)
    assert explained().path == "persistent" and len(module.planned) == count
    with cuda.use("step"):
        assert explained().path == "fused"
    install(monkeypatch, module, of(row(2.0, shape=SHAPE, path="persistent")))
    assert explained().path == "cudnn"
    monkeypatch.setattr(torch.backends.cudnn, "enabled", False)
    assert explained().path == "torch"


def test_what_torch_would_crash_on_raises_whoever_takes_the_call(fake: Fake) -> None:
    """Calls that are torch's go there by the shortest road, too, and not past :func:`pyrnnfast.obstacles.guard`."""

    def layer() -> pyrnnfast.LSTM:
        return pyrnnfast.LSTM(3, 5, num_layers=2)

    x, h = torch.ones(4, 2, 3), torch.zeros(2, 5)
    wrong = layer()
    wrong.weight_hh_l1 = torch.nn.Parameter(torch.ones(20, 4))
    without = layer()
    del without._flat_weights_names[-1]
    packed = torch.nn.utils.rnn.pack_padded_sequence(x, torch.tensor([4, 2]))
    cell, on_meta = pyrnnfast.LSTMCell(3, 5), pyrnnfast.GRUCell(3, 5, device="meta")
    for path in (None, "cudnn"):
        with cuda.use(path):
            for module in (wrong, without):
                with pytest.raises(RuntimeError, match=r"LSTM: .* expected"):
                    module(x)
            with pytest.raises(RuntimeError, match=r"Expected hidden\[0\] size"):
                layer()(packed, (h, h))
            with pytest.raises(ValueError, match="batch_sizes"):
                layer()(PackedSequence(packed.data, torch.tensor([1, 5])))
            for no_pair in (h, (), (h,)):
                with pytest.raises(TypeError, match="hx to be a pair"):
                    cell(x[0], no_pair)
            with pytest.raises(RuntimeError, match="not at the same device"):
                on_meta(x[0])
            with pytest.raises(RuntimeError, match="not at the same device"):
                cell(x[0], (h, h.to("meta")))
            found = layer()(x)[0]
            assert found.shape == (4, 2, 5) and cell(x[0], (h, h))[0].shape == (2, 5)
    assert fake.passes == []


@pytest.mark.parametrize("path", [None, "cudnn", "step", "persistent"])
@pytest.mark.parametrize("recorded", [False, True], ids=["no record", "recorded"])
def test_bad_packed_input_and_weights(path: str | None, recorded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is made of them before they have been looked at."""
    install(monkeypatch, Fake(), of(row(0.5, shape=SHAPE, packed=True)) if recorded else None)
    for cell in (pyrnnfast.GRU, pyrnnfast.LSTM):
        for bad in ([], 3, [[3, 3]], [0, 6], [-1, 6], [3, 4], [3, 2], [7]):
            packed = PackedSequence(torch.randn(6, 3), torch.tensor(bad, dtype=torch.int64))
            with cuda.use(path), pytest.raises(ValueError, match=r"batch_sizes|Expected sequence length"):
                cell(3, 5)(packed)
    many, without = pyrnnfast.GRU(3, 5), pyrnnfast.GRU(3, 5)
    many.num_layers = 10**6
    without.weight_ih_l0 = None
    with cuda.use(path):
        before = cuda._forms_of_layers.cache_info().currsize
        for wrong in (many, without):
            with pytest.raises((RuntimeError, AttributeError, IndexError)):
                wrong(torch.ones(4, 2, 3))
        assert cuda._forms_of_layers.cache_info().currsize == before


def test_memory_is_bounded() -> None:
    for remembered in (cuda._for_all, cuda._for_call, cuda._form, cuda._forms_of_layers, cuda._missing):
        assert (remembered.cache_info().maxsize or 1 << 30) <= 4096


def test_threads_that_ask_may_leave_in_any_order() -> None:
    first, second = cuda.use("step"), cuda.use("persistent")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert cuda.asked() == "persistent"
    second.__exit__(None, None, None)
    assert cuda.asked() is None


def test_a_measured_form_without_a_plan_is_no_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing says that the other form is faster than cuDNN."""
    module = Fake(persistent=False)
    install(monkeypatch, module, of(row(0.5, shape=SHAPE, path="persistent")))
    path, reason = explained()
    assert path == "cudnn"
    assert "has no plan" in reason
    module.persistent = True
    cuda._form.cache_clear()
    cuda._for_call.cache_clear()
    assert explained().path == "persistent"


def test_backward_takes_what_is_asked_for_when_it_runs(fake: Fake) -> None:
    module = LAYER.module(pyrnnfast)
    with cuda.use("persistent"):
        y, _ = module(LAYER.operands()[0])
    y.sum().backward()
    assert [p[:2] for p in fake.passes] == [("forward", "persistent"), ("backward", "step")]


SWITCHES: dict[str, Callable[[], Any]] = {
    "allow_tf32": lambda: setattr(torch.backends.cudnn, "allow_tf32", False),
    "rnn": lambda: setattr(torch.backends.cudnn.rnn, "fp32_precision", "ieee"),
    "cudnn": lambda: (
        setattr(torch.backends.cudnn.rnn, "fp32_precision", "none"),
        setattr(torch.backends.cudnn, "fp32_precision", "ieee"),
    ),
}


@pytest.mark.parametrize("switch", SWITCHES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
def test_tf32_follows_the_switches_of_torch(switch: str, dtype: torch.dtype, fake: Fake) -> None:
    module, x = LAYER.module(pyrnnfast, dtype), torch.ones(10, 4, 8, dtype=dtype)
    # In a process of their own the switches would not have to be put back, but this one has no CUDA to disturb.
    before = torch._C._get_fp32_precision_getter("cuda", "rnn"), torch._C._get_fp32_precision_getter("cuda", "all")
    try:
        with cuda.use("step"):
            module(x)
            SWITCHES[switch]()
            module(x)
    finally:
        torch.backends.cudnn.allow_tf32 = True
        torch._C._set_fp32_precision_setter("cuda", "rnn", before[0])
        torch._C._set_fp32_precision_setter("cuda", "all", before[1])
    is_float32 = dtype is torch.float32
    assert fake.passes == [("forward", "step", is_float32), ("forward", "step", False)]
    assert cuda.tf32()


# What torch's layers do not have ----------------------------------------------------------------------------------


NO_RECORD = "our kernels have no record from a card of compute capability 9.0"
LENGTHS = torch.tensor([10, 0, 3, 7], dtype=torch.int32)


def test_lengths_and_resets_on_ours(fake: Fake) -> None:
    """What the kernels make of them: tests/cuda_host/test_masks.py."""
    module, x = LAYER.module(pyrnnfast), LAYER.operands()[0]
    reset = torch.rand(10, 4) < 0.2
    with cuda.use("step"):
        assert explained(lengths=LENGTHS) == ("fused", "served by pyrnnfast._cuda: it is asked for")
        output, _ = module(x, lengths=LENGTHS, reset=reset)
        output.sum().backward()
    assert [p[:2] for p in fake.passes] == [("forward", "step"), ("backward", "step")]
    assert len(fake.masks) == 2
    for mask in fake.masks:
        torch.testing.assert_close(mask.lengths, LENGTHS.long())
        torch.testing.assert_close(mask.reset, reset)


@pytest.mark.parametrize("path", [None, "cudnn"])
def test_lengths_and_resets_are_packed_for_torch(path: str | None, fake: Fake) -> None:
    """What comes of it: tests/test_lengths.py."""
    module, x = LAYER.module(pyrnnfast), LAYER.operands()[0]
    with cuda.use(path):
        assert explained(lengths=LENGTHS) == ("cudnn", "it is asked for" if path else NO_RECORD)
        assert explained(reset=torch.ones(10, 4, dtype=torch.bool)).path == "cudnn"
        module(x, lengths=LENGTHS)[0].sum().backward()
    assert fake.passes == []


@pytest.mark.parametrize("ratio", [0.5, 2.0])
@pytest.mark.parametrize("path", ["fused", "persistent"])
def test_lengths_and_resets_where_they_were_measured(path: str, ratio: float, monkeypatch: pytest.MonkeyPatch) -> None:
    module = Fake()
    install(monkeypatch, module, of(row(ratio, shape=SHAPE, padded=True, path=path)))
    assert explained(lengths=LENGTHS).path == (path if ratio < 1 else "cudnn")
    assert explained().path == "cudnn"
    LAYER.module(pyrnnfast)(LAYER.operands()[0], lengths=LENGTHS)[0].sum().backward()
    form = {"fused": "step", "persistent": "persistent"}[path]
    assert [p[:2] for p in module.passes] == ([("forward", form), ("backward", form)] if ratio < 1 else [])


@pytest.mark.parametrize("packed", [False, True])
def test_what_is_packed_for_torch_goes_to_torch(packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is known of dense or packed calls: that is not what these are compared with."""
    module = Fake()
    install(monkeypatch, module, of(row(0.5, shape=SHAPE, packed=packed)))
    for lengths in (LENGTHS, torch.full((4,), 10)):
        assert explained(lengths=lengths) == ("cudnn", "no shape near this one was measured")
        LAYER.module(pyrnnfast)(LAYER.operands()[0], lengths=lengths)
    assert module.passes == []


def test_projections_are_torchs(fake: Fake) -> None:
    """Dense and packed; and nobody has lengths then."""
    case = Case("lstm", projected=3, bidirectional=True)
    reason = r"a projection \(proj_size\) on CUDA is left to torch"
    with cuda.use("step"):
        for given in (case, replace(case, lengths=(3, 1)), replace(case, layers=2, dropout=0.5)):
            module, stock = given.module(pyrnnfast), given.module(torch.nn)
            x, states = given.operands()
            assert pyrnnfast.explain(module, given.packed(x), given.hx(states)).path == "torch"
            found = []
            for m in (module, stock):
                torch.manual_seed(0)
                found.append(given.run(m, x, states))
            assert all(torch.equal(found[0][name], t) for name, t in found[1].items())
            weights = list(module.parameters())
            options: Any = {"num_layers": given.layers, "bidirectional": True, "dropout": given.dropout}
            torch.manual_seed(0)
            y, _ = pyrnnfast.functional.lstm(given.packed(x), given.hx(states), weights, **options)
            assert y.data.shape[-1] == 6
    assert fake.passes == []
    with pytest.raises(ValueError, match=f"or cell_states, and {reason}"):
        case.module(pyrnnfast)(torch.ones(10, 4, 3), lengths=LENGTHS)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int64], ids=str)
def test_lengths_in_narrow_integers(dtype: torch.dtype, fake: Fake) -> None:
    """Compared in their own type, 300 would be 44 there."""
    x = torch.randn(300, 2, 8)
    with cuda.use("step"):
        LAYER.module(pyrnnfast)(x, lengths=torch.tensor([100, 50], dtype=dtype))
        assert fake.masks[0].lengths.tolist() == [100, 50]
        with pytest.raises(ValueError, match="lengths must be from 0 to 30"):
            LAYER.module(pyrnnfast)(x[:30], lengths=torch.tensor([100, 50], dtype=dtype))


def test_lengths_and_resets_of_inference_mode(fake: Fake) -> None:
    with torch.inference_mode():
        lengths, reset = torch.tensor([10, 0, 3, 7]), torch.zeros(10, 4, dtype=torch.bool)
    module, x = LAYER.module(pyrnnfast), LAYER.operands()[0]
    for path in ("step", None):
        with cuda.use(path):
            module(x, lengths=lengths, reset=reset)[0].sum().backward()
        assert x.grad is not None
        x.grad = None


@pytest.mark.parametrize("path", [None, "step"])
def test_lengths_that_are_on_the_cpu_are_looked_at(path: str | None, fake: Fake) -> None:
    with cuda.use(path), pytest.raises(ValueError, match="lengths must be from 0 to 10, the number of steps"):
        LAYER.module(pyrnnfast)(LAYER.operands()[0], lengths=torch.tensor([10, 11, 0, 1]))


CELL_STATES = {
    "recorded": ("fused", "served by pyrnnfast._cuda: torch's layers have no cell_states"),
    "asked for": ("fused", "served by pyrnnfast._cuda: it is asked for"),
    "not recorded": ("reference", f"torch's layers have no cell_states, and {NO_RECORD}"),
    "cudnn": ("reference", "torch's layers have no cell_states, and it is asked for"),
    "missing": ("reference", "torch's layers have no cell_states, and this build has no kernels"),
}


@pytest.mark.parametrize("when", CELL_STATES)
def test_cell_states(when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    module, x = pyrnnfast.LSTM(8, 16, cell_states=True), torch.randn(10, 4, 8)
    expected = module(x)
    fake = None if when == "missing" else Fake()
    install(
        monkeypatch,
        fake,
        RECORDED if when == "recorded" else None,
        reason=None if fake else "this build has no kernels",
    )
    with cuda.use({"asked for": "step", "cudnn": "cudnn"}.get(when)):
        assert pyrnnfast.explain(module, x) == CELL_STATES[when]
        torch.testing.assert_close(module(x), expected)
    if fake is not None:
        assert fake.passes == [("forward", "step", True)] * (CELL_STATES[when][0] == "fused")


def test_cell_states_with_lengths_without_a_record(fake: Fake) -> None:
    """More of it: tests/test_cell_states.py."""
    module, x = pyrnnfast.LSTM(8, 16, cell_states=True), torch.randn(10, 4, 8)
    assert pyrnnfast.explain(module, x, lengths=LENGTHS).path == "reference"
    y, (h_n, c_n), cells = module(x, lengths=LENGTHS)
    assert torch.equal(h_n[0, 2], y[2, 2])
    assert torch.equal(c_n[0, 2], cells[2, 2])
    with pytest.raises(ValueError, match="lengths must be from 0 to 9, the number of steps"):
        module(x[:9], lengths=LENGTHS)
    assert fake.passes == []


def test_cells_are_torchs_until_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    module = Fake()
    install(monkeypatch, module, of(row(0.5, shape=[1, 4, 8, 16])))
    case = Case("lstm", batch=4, inputs=8, hidden=16, single_step=True)
    assert explained(case) == ("torch", "a step by ours was not measured against torch's own")
    called(case)
    assert module.passes == []
    with cuda.use("step"):
        assert explained(case).path == "fused"
        called(case)
    assert len(module.passes) == 2


# What is wrong ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [None, "step"])
@pytest.mark.parametrize(
    "x", [torch.ones(2, 2, 2, 8), torch.ones(8), torch.ones(2, 2, 5), torch.ones(2, 2, 8).double(), None], ids=str
)
def test_bad_input_gets_the_words_of_torch(x: Any, path: str | None, fake: Fake) -> None:
    ours, theirs = LAYER.module(pyrnnfast), LAYER.module(torch.nn)
    with pytest.raises(Exception) as expected:
        theirs(x)
    with cuda.use(path), pytest.raises(type(expected.value)) as found:
        ours(x)
    assert str(found.value) == str(expected.value)
    assert fake.passes == []


@pytest.mark.parametrize("path", [None, "step"])
def test_what_torch_would_crash_on_raises(path: str | None, fake: Fake) -> None:
    packed = PackedSequence(torch.ones(3, 8), torch.tensor([1, 2]))
    with cuda.use(path):
        with pytest.raises(ValueError, match="batch_sizes must not increase"):
            LAYER.module(pyrnnfast)(packed)
        module = LAYER.module(pyrnnfast)
        module.weight_hh_l0 = torch.nn.Parameter(torch.ones(64, 15))
        with pytest.raises(RuntimeError, match="a weight has the shape"):
            module(torch.ones(2, 2, 8))


def test_what_escaped_from_a_transform_is_left_to_torch(fake: Fake) -> None:
    module, x = LAYER.module(pyrnnfast), torch.ones(10, 4, 8)
    escaped: list[Tensor] = []
    torch.func.grad(lambda t: (escaped.append(t), t.sum())[1])(x)
    with cuda.use("step"):
        assert pyrnnfast.explain(module, escaped[0]) == ("torch", "an operand has no memory of its own")
        module(escaped[0])
    assert fake.passes == []


def test_the_operators_raise_where_there_are_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, None, reason="this build has no kernels")
    weights = [p.detach() for p in LAYER.module(pyrnnfast).parameters()]
    with pytest.raises(RuntimeError, match="do not serve cpu: this build has no kernels"):
        torch.ops.pyrnnfast.layer("lstm", torch.ones(10, 4, 8), None, None, None, weights, 1, False, False)


# Autocast ---------------------------------------------------------------------------------------------------------


@pytest.fixture(params=[torch.float16, torch.bfloat16], ids=str)
def autocast(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    """Of CUDA; ``torch.autocast`` itself does nothing for a device that is not there."""
    before = torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", request.param)
    yield request.param
    torch.set_autocast_enabled("cuda", False)
    torch.set_autocast_dtype("cuda", before)


@pytest.mark.parametrize("case", SERVED, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast(case: Case, dtype: torch.dtype, autocast: torch.dtype, fake: Fake) -> None:
    """Layers give float16 whatever is asked for, as torch's wrapper of cuDNN's does; steps what is asked for."""
    module = case.module(pyrnnfast, dtype)
    x, states = case.operands(dtype)
    with cuda.use("step"):
        assert pyrnnfast.explain(module, case.packed(x), case.hx(states)).path == "fused"
        found = case.run(module, x, states)
        narrow = autocast if case.single_step else torch.float16
        assert {t.dtype for t in found.values()} == {narrow}
        grads = gradients(module, x, states, found)
    assert {g.dtype for g in grads.values()} == {dtype}
    assert len(fake.passes) == 2 * case.layers
    assert torch.is_autocast_enabled("cuda")
    expected = case.run_reference(module, x, states)
    for name, t in found.items():
        torch.testing.assert_close(t.float(), expected[name].float(), rtol=0.05, atol=0.05)


def test_autocast_leaves_float64(autocast: torch.dtype, fake: Fake) -> None:
    module, x = LAYER.module(pyrnnfast, torch.float64), torch.ones(10, 4, 8, dtype=torch.float64)
    with cuda.use("step"):
        y, _ = module(x)
    assert y.dtype is torch.float64
    assert amp.dtype_for("cuda", module._spec()) is torch.float16


def test_autocast_of_cuda_is_not_that_of_the_cpu(autocast: torch.dtype) -> None:
    assert LAYER.module(pyrnnfast)(torch.ones(10, 4, 8))[0].dtype is torch.float32


def test_autocast_of_the_cpu_is_not_that_of_cuda(fake: Fake) -> None:
    with torch.autocast("cpu", torch.bfloat16), cuda.use("step"):
        assert LAYER.module(pyrnnfast)(torch.ones(10, 4, 8))[0].dtype is torch.float32
    assert len(fake.passes) == 1


def test_second_derivatives_under_autocast(autocast: torch.dtype, fake: Fake) -> None:
    """By the reference, whose products autocast would narrow once more."""
    module, x = LAYER.module(pyrnnfast, torch.float64), torch.randn(10, 4, 8, dtype=torch.float64, requires_grad=True)

    def second() -> Tensor:
        (grad,) = torch.autograd.grad(module(x)[0].sum(), x, create_graph=True)
        (found,) = torch.autograd.grad(grad.square().sum(), x)
        return found

    with cuda.use("step"):
        found = second()
        torch.set_autocast_enabled("cuda", False)
        torch.testing.assert_close(found, second(), rtol=1e-12, atol=1e-12)


# Graphs and transforms --------------------------------------------------------------------------------------------


@pytest.fixture
def compiled() -> Iterator[Callable[..., Any]]:
    torch._dynamo.reset()
    allowed = torch._dynamo.config.allow_rnn
    pyrnnfast.enable_compile()
    yield lambda module: torch.compile(module, backend="aot_eager", fullgraph=True)
    torch._dynamo.config.allow_rnn = allowed
    torch._dynamo.reset()


def test_compiled(compiled: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """On a card with a record, ours, whatever the shape: torch would record its layers step by step."""
    module = Fake()
    install(monkeypatch, module, RECORDED)
    layer, x = LAYER.module(pyrnnfast), LAYER.operands()[0]
    assert explained().path == "cudnn"
    y, _ = compiled(layer)(x)
    found = torch.autograd.grad(y.sum(), [x, *layer.parameters()])
    assert [p[:2] for p in module.passes] == [("forward", "step"), ("backward", "step")]
    expected = torch.autograd.grad(layer(x)[0].sum(), [x, *layer.parameters()])
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("path", "passes"), [("step", 1), ("persistent", 1), ("cudnn", 0), (None, 0)])
def test_compiled_as_asked(path: str | None, passes: int, compiled: Callable[..., Any], fake: Fake) -> None:
    """Without a record torch's steps are recorded, unless ours are asked for."""
    layer, x = LAYER.module(pyrnnfast), LAYER.operands()[0][:3]
    call = compiled(layer)
    with torch.no_grad():
        with cuda.use(path):
            y, _ = call(x)
        assert [p[:2] for p in fake.passes] == [("forward", path)] * passes
        torch.testing.assert_close(y, layer(x)[0])
        with cuda.use("step"):  # which is another graph
            call(x)
        assert len(fake.passes) == passes + 1


def test_compiled_lengths(compiled: Callable[..., Any], fake: Fake) -> None:
    """Read on the device, in a graph, too."""
    layer, x, lengths = LAYER.module(pyrnnfast), LAYER.operands()[0], torch.tensor([3, 10, 0, 5])
    with cuda.use("step"):
        y, _ = compiled(layer)(x, lengths=lengths)
        y.sum().backward()
    assert fake.passes == [("forward", "step", True), ("backward", "step", True)]
    assert [m.lengths.tolist() for m in fake.masks] == [lengths.tolist()] * 2


def test_compiled_lengths_without_a_record(compiled: Callable[..., Any], fake: Fake) -> None:
    """By the operators of torch, which a graph has of its layers too."""
    case = Case("gru", 5, 4, 8, 16, layers=2, bidirectional=True)
    layer, x, lengths = case.module(pyrnnfast), case.operands()[0], torch.tensor([3, 5, 0, 5])
    reset = torch.zeros(5, 4, dtype=torch.bool).index_fill(0, torch.tensor([2]), True)
    given = {"lengths": lengths, "reset": reset}
    call = compiled(layer)
    found, expected = [
        (y, h_n, *torch.autograd.grad(y.sin().sum() + h_n.sum(), [x, *layer.parameters()]))
        for y, h_n in (call(x, **given), layer(x, **given))
    ]
    torch.testing.assert_close(found, expected)
    with torch.no_grad(), pytest.raises(RuntimeError, match="lengths must be from 0 to T, the number of steps"):
        call(x, lengths=lengths + 1, reset=reset)
    assert fake.passes == []


def test_compiled_lengths_for_any_time(compiled: Callable[..., Any], fake: Fake) -> None:
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    layer = LAYER.module(pyrnnfast)
    call: Any = torch.compile(layer, backend=counter, fullgraph=True, dynamic=True)
    with cuda.use("step"), torch.no_grad():
        counts = []
        for steps in (7, 10, 5):
            call(torch.randn(steps, 4, 8), lengths=torch.tensor([3, 5, 0, 5]))
            counts.append(counter.frame_count)
        with pytest.raises(RuntimeError, match="lengths must be from 0 to T, the number of steps"):
            call(torch.randn(3, 4, 8), lengths=torch.tensor([3, 5, 0, 5]))
    assert {*counts, counter.frame_count} == {counts[0]}
    assert len(fake.masks) == 3


@pytest.mark.parametrize("path", [None, "step"])
def test_compiled_lengths_of_nobody(path: str | None, compiled: Callable[..., Any], fake: Fake) -> None:
    layer = LAYER.module(pyrnnfast)
    with cuda.use(path), torch.no_grad():
        y, (h_n, _) = compiled(layer)(torch.randn(5, 0, 8), lengths=torch.zeros(0, dtype=torch.int64))
    assert y.shape == (5, 0, 16)
    assert h_n.shape == (1, 0, 16)


@pytest.mark.parametrize("path", [None, "step"])
def test_recorded_lengths_are_not_settled(path: str | None, fake: Fake) -> None:
    """Whoever records operators without torch.compile gets a function of the lengths, too."""
    layer, x = LAYER.module(pyrnnfast), torch.randn(5, 4, 8)
    lengths = torch.tensor([3, 5, 0, 1])

    def call(x: Tensor, lengths: Tensor) -> Tensor:
        y: Tensor = layer(x, lengths=lengths)[0]
        return y

    with cuda.use(path), torch.no_grad():
        graph = make_fx(call)(x, torch.full((4,), 5))
        assert "pyrnnfast.layer" in str(graph.code) if path else fake.passes == []
        if path is None:
            torch.testing.assert_close(graph(x, lengths), call(x, lengths))
        else:
            graph(x, lengths)
            assert fake.masks[-1].lengths.tolist() == lengths.tolist()


def test_compiled_cell_states_without_a_record(compiled: Callable[..., Any], fake: Fake) -> None:
    layer, x = pyrnnfast.LSTM(8, 16, cell_states=True), torch.randn(5, 4, 8)
    torch.testing.assert_close(compiled(layer)(x), layer(x))
    assert fake.passes == []


def test_compiled_steps_stay_torchs(compiled: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    module = Fake()
    install(monkeypatch, module, RECORDED)
    step, x = pyrnnfast.LSTMCell(8, 16), torch.randn(4, 8)
    torch.testing.assert_close(compiled(step)(x), step(x))
    assert module.passes == []


def test_exported(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, Fake(), RECORDED)
    program = torch.export.export(LAYER.module(pyrnnfast), (torch.ones(10, 4, 8),), strict=False)
    assert any("pyrnnfast.layer" in str(node.target) for node in program.graph.nodes)


def test_transforms_run_on_ours_where_there_is_a_record(monkeypatch: pytest.MonkeyPatch) -> None:
    module = Fake()
    install(monkeypatch, module, RECORDED)
    layer, x = LAYER.module(pyrnnfast), torch.randn(10, 4, 8)
    xs = torch.randn(3, 10, 4, 8)
    paths = []

    def loss(x: Tensor) -> Tensor:
        paths.append(pyrnnfast.explain(layer, x).path)
        y: Tensor = layer(x)[0]
        return y.sum()

    found = torch.func.grad(loss)(x), torch.func.vmap(loss)(xs), torch.func.vmap(torch.func.grad(loss))(xs)
    assert paths == ["fused"] * 3
    assert len(module.passes) == 2 + 1 + 2
    module.passes.clear()
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(torch.nn.LSTM.forward(layer, leaf)[0].sum(), leaf)
    torch.testing.assert_close(found[0], expected)
    torch.testing.assert_close(found[1], torch.stack([torch.nn.LSTM.forward(layer, x)[0].sum() for x in xs]))
    assert module.passes == []


def test_transforms_without_a_record(fake: Fake) -> None:
    """torch's layers have a gradient; of what they do not have, the reference does what no kernel does."""
    layer, x, paths = LAYER.module(pyrnnfast), torch.randn(10, 4, 8), []

    def loss(x: Tensor) -> Tensor:
        paths.append(pyrnnfast.explain(layer, x).path)
        y: Tensor = layer(x)[0]
        return y.sum()

    found = torch.func.grad(loss)(x)
    torch.testing.assert_close(torch.func.jvp(loss, (x,), (torch.ones_like(x),))[1], found.sum())
    torch.func.grad(lambda x: torch.func.grad(loss)(x).square().sum())(x)
    assert paths == ["torch", "reference", "reference"]
    assert fake.passes == []


def test_transforms_of_lengths_without_a_record(fake: Fake) -> None:
    layer, x = LAYER.module(pyrnnfast), torch.randn(10, 4, 8)

    def loss(x: Tensor) -> Tensor:
        assert pyrnnfast.explain(layer, x, lengths=LENGTHS).path == "reference"
        y: Tensor = layer(x, lengths=LENGTHS)[0]
        return y.sum()

    found = torch.func.grad(loss)(x)
    leaf = x.clone().requires_grad_()
    layer(leaf, lengths=LENGTHS)[0].sum().backward()
    torch.testing.assert_close(found, leaf.grad)
    assert fake.passes == []


def test_packed_gradients_of_torch_func(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which neither our kernels nor torch's layers have."""
    install(monkeypatch, Fake(), RECORDED)
    layer, rows, paths = pyrnnfast.GRU(3, 5), torch.randn(5, 3, requires_grad=True), []

    def loss(rows: Tensor) -> Tensor:
        packed = PackedSequence(rows, torch.tensor([2, 2, 1]))
        paths.append(pyrnnfast.explain(layer, packed).path)
        y: Tensor = layer(packed)[0].data
        return y.sum()

    found = torch.func.grad(loss)(rows.detach())
    torch.testing.assert_close(found, torch.autograd.grad(loss(rows), rows)[0])
    assert paths == ["reference", "cudnn"]


def test_second_derivatives(fake: Fake) -> None:
    module, x = LAYER.module(pyrnnfast, torch.float64), torch.randn(3, 2, 8, dtype=torch.float64, requires_grad=True)
    with cuda.use("step"):
        assert torch.autograd.gradgradcheck(lambda x: module(x)[0], x)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_tracing_records_the_operators_of_torch(fake: Fake) -> None:
    module, x = LAYER.module(pyrnnfast), torch.ones(10, 4, 8)
    with cuda.use("step"):
        traced = torch.jit.trace(module, x, check_trace=False)
    assert "aten::lstm(" in str(traced.inlined_graph)
    assert fake.passes == []


# Tensors on "cuda", which are fake ----------------------------------------------------------------------------------


@pytest.fixture
def fakes() -> Iterator[None]:
    with FakeTensorMode():
        yield


def test_cuda_tensors_are_ours_to_choose_for(fakes: None) -> None:
    x = torch.empty(2, device="cuda")
    assert cuda.takes(x)
    assert not cuda.takes(torch.empty(2))
    assert not cuda.takes(torch.empty(2, device="meta"))
    assert roads.device_type([x]) == "cuda"
    assert roads.device_type([torch.empty(2)]) == roads.device_type([]) == "cpu"


def test_each_device_by_its_number(fakes: None, monkeypatch: pytest.MonkeyPatch) -> None:
    devices = ({"name": "A", "major": 8, "minor": 0}, {"name": "B", "major": 9, "minor": 0})
    monkeypatch.setattr(cuda, "load", lambda: cuda.Loaded(Fake(), "80;90", devices))
    monkeypatch.setattr(cuda, "table", lambda: of(row(0.5)))
    found = [cuda.choose_for_all(torch.empty(1, device=f"cuda:{k}")) for k in range(3)]
    assert found[0] == ("cudnn", "our kernels have no record from a card of compute capability 8.0")
    assert found[1] is None
    assert found[2] == ("cudnn", "the CUDA kernels see 2 devices, and cuda:2 is not among them")


@pytest.mark.parametrize("cell", ["rnn_tanh", "gru", "lstm"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_results_are_where_the_operands_are(cell: str, dtype: torch.dtype) -> None:
    shapes = [p.shape for p in Case(cell, bidirectional=True).module(torch.nn).parameters()]
    with FakeTensorMode():
        weights = [torch.empty(shape, device="cuda", dtype=dtype) for shape in shapes]
        x = torch.empty(3, 2, 3, device="cuda", dtype=dtype)
        results = torch.ops.pyrnnfast.layer(cell, x, None, None, None, weights, 2, True, True)
    assert {r.device for r in results} == {x.device}
    assert [r.dtype for r in results[:4]] == [dtype] * 4
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    assert results[4].dtype is (wide if cell == "lstm" else dtype)


def test_segments_are_cut_on_the_cpu() -> None:
    with FakeTensorMode(shape_env=torch.fx.experimental.symbolic_shapes.ShapeEnv()):
        found = ops.segments(torch.empty(4, dtype=torch.int64, device="cuda"), None, 10, 4, False)
        assert {t.device.type for t in found} == {"cpu"}
        moved = pyrnnfast.segments.on(torch.device("cuda:0"), found)
        assert {name: t.device.type for name, t in moved._asdict().items()} == {
            name: "cpu" if name == "batch_sizes" else "cuda" for name in moved._fields
        }


def test_the_operators_have_kernels_for_cuda() -> None:
    for name in ("layer", "layer_backward", "segments"):
        for key in ("CPU", "CUDA"):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"pyrnnfast::{name}", key)


def test_the_current_device_is_that_of_the_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    entered: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda device: entered.append(device))
    with FakeTensorMode():
        cuda._on_device_of(torch.empty(1, device="cuda:0"))
        cuda._on_device_of(torch.empty(1))
        assert entered == []
        cuda._on_device_of(torch.empty(1, device="cuda:1"))
    assert entered == [torch.device("cuda:1")]


def test_nothing_is_left_behind() -> None:
    """The fixtures undo themselves: without them, the CPU's tensors take the CPU's way."""
    assert explained() == ("fused", "served by pyrnnfast._cpu")
    assert isinstance(cuda.table(), Table)
