"""What runs on our kernels, what is left to torch, and that ``explain`` says so."""

import sys
import types
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import CELLS, SMALL, TABLE, Case, gradients
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import pyrnnfast
from pyrnnfast import _cpu, functional, obstacles

_OPERATORS = ("rnn_tanh", "rnn_relu", "gru", "lstm")
OPERATORS = (*_OPERATORS, *(f"{name}_cell" for name in _OPERATORS))


@pytest.fixture
def without_torch_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's recurrent operators, of dense and packed input alike, raise."""

    def removed(*args: object, **kwargs: object) -> None:
        raise AssertionError("a recurrent operator of torch was called")

    for place in (torch._VF, torch.nn.modules.rnn._VF, torch):
        for name in OPERATORS:
            monkeypatch.setattr(place, name, removed)
    for name in torch.nn.modules.rnn._rnn_impls:
        monkeypatch.setitem(torch.nn.modules.rnn._rnn_impls, name, removed)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_the_fixture_removes_what_torch_uses(case: Case, without_torch_operators: None) -> None:
    with pytest.raises(AssertionError, match="operator of torch was called"):
        case.run(case.module(torch.nn), *case.operands())


@pytest.mark.parametrize("case", TABLE, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_kernels_serve_everything(case: Case, dtype: torch.dtype, without_torch_operators: None) -> None:
    module = case.module(pyrnnfast, dtype)
    x, states = case.operands(dtype)
    assert pyrnnfast.explain(module, case.packed(x), case.hx(states)).path == "fused"
    outputs = case.run(module, x, states)
    assert gradients(module, x, states, outputs)
    with torch.no_grad():
        case.run(module, x, states)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_kernels_serve_the_functional_form(case: Case, without_torch_operators: None) -> None:
    module = case.module(pyrnnfast)
    x, states = case.operands()
    weights, options = list(module.parameters()), {}
    name = case.cell.split("_")[0] + ("_cell" if case.single_step else "")
    if case.cell.startswith("rnn_"):
        options["nonlinearity"] = case.cell[4:]
    if not case.single_step:
        options |= {
            "num_layers": case.layers,
            "bias": case.bias,
            "batch_first": case.batch_first,
            "bidirectional": case.bidirectional,
        }
    found = getattr(functional, name)(case.packed(x), case.hx(states), weights, **options)
    expected = module(case.packed(x), case.hx(states))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def count_kernel_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    calls: list[str] = []
    for name in ("forward", "backward", "forward_plain", "backward_plain"):
        real = getattr(_cpu, name)

        def counted(*args: Any, real: Callable[..., Any] = real, name: str = name) -> Any:
            calls.append(name)
            return real(*args)

        monkeypatch.setattr(_cpu, name, counted)
    return calls


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize(
    "form",
    [
        Case("gru", single_step=True),
        Case("gru", layers=2, bidirectional=True),
        Case("gru", layers=2, bidirectional=True, lengths=(3, 1, 2)),
    ],
    ids=str,
)
def test_one_kernel_call_for_each_pass(cell: str, form: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    case = replace(form, cell=cell)
    calls = count_kernel_calls(monkeypatch)
    module = case.module(pyrnnfast)
    x, states = case.operands()
    outputs = case.run(module, x, states)
    assert calls == ["forward_plain"]
    gradients(module, x, states, outputs)
    assert calls == ["forward_plain", "backward_plain"]


@pytest.mark.parametrize("cell", CELLS)
def test_one_kernel_call_for_each_layer_with_dropout(cell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(cell, layers=2, bidirectional=True, dropout=0.4)
    calls = count_kernel_calls(monkeypatch)
    module = case.module(pyrnnfast)
    x, states = case.operands()
    gradients(module, x, states, case.run(module, x, states))
    assert calls == ["forward_plain"] * 2 + ["backward_plain"] * 2


# What products, biases and sums over directions would need; memory, views and copies are torch's.
_ARITHMETIC = ("mm", "addmm", "bmm", "matmul", "linear", "add", "mul", "sum", "cat", "tanh", "sigmoid")


@pytest.mark.parametrize("case", [c for c in SMALL if c.layers == 1], ids=str)
def test_torch_does_no_arithmetic(case: Case) -> None:
    """Forward and back, products and sums over both directions included."""
    module = case.module(pyrnnfast)
    x, states = case.operands()
    packed, hx = case.packed(x), case.hx(states)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as forward:
        result = module(packed, hx)
    output = torch.utils._pytree.tree_leaves(result)[0]
    grad = torch.ones_like(output)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as backward:
        torch.autograd.grad(output, [x, *states, *module.parameters()], grad, allow_unused=True)
    for profile in (forward, backward):
        used = {event.key.removeprefix("aten::") for event in profile.key_averages()}
        assert used
        assert not used & set(_ARITHMETIC), used


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("single_step", [False, True], ids=["layer", "cell"])
def test_inference_keeps_nothing_for_backward(cell: str, single_step: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[tuple[Tensor | None, ...]] = []
    real = _cpu.forward

    def spied(*args: Any) -> None:
        kept.append(args[-3])
        real(*args)

    monkeypatch.setattr(_cpu, "forward", spied)
    monkeypatch.setattr(_cpu, "forward_plain", lambda *args: None)
    case = Case(cell, single_step=single_step, bidirectional=not single_step)
    module = case.module(pyrnnfast)
    x, states = case.operands()
    case.run(module, x, states)
    keeps = kept.pop()
    assert len(keeps) == 2 * case.directions
    for saved, cells in zip(keeps[::2], keeps[1::2], strict=True):
        assert (saved is not None) == (cell in ("gru", "lstm"))
        assert (cells is not None) == (cell == "lstm")
    frozen = case.module(pyrnnfast).requires_grad_(False)
    with torch.no_grad():
        case.run(module, x, states)
    with torch.inference_mode():
        case.run(module, x, states)
    case.run(frozen, x.detach(), tuple(s.detach() for s in states))
    assert kept == [(), (), ()]


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("single_step", [False, True], ids=["layer", "cell"])
def test_plain_inference_keeps_nothing_either(cell: str, single_step: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Any] = []
    real = _cpu.forward_plain

    def spied(*args: Any) -> Any:
        found = real(*args)
        assert found is not None
        kept.append(found[1])
        return found

    monkeypatch.setattr(_cpu, "forward_plain", spied)
    case = Case(cell, single_step=single_step)
    module = case.module(pyrnnfast)
    x, states = case.operands()
    case.run(module, x, states)
    assert len(kept.pop()) == (cell in ("gru", "lstm"))
    with torch.no_grad():
        case.run(module, x, states)
    with torch.inference_mode():
        case.run(module, x, states)
    case.run(case.module(pyrnnfast).requires_grad_(False), x.detach(), tuple(s.detach() for s in states))
    assert kept == [None, None, None]


@pytest.mark.parametrize("cell", CELLS)
def test_only_gradients_that_are_wanted_are_computed(cell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[bool]] = []
    real = _cpu.backward

    def spied(*args: Any) -> None:
        dx, dh0, _, dweights = args[-7:-3]
        asked.append([t is not None for t in (dx, dh0, *dweights)])
        real(*args)

    monkeypatch.setattr(_cpu, "backward", spied)
    monkeypatch.setattr(_cpu, "forward_plain", lambda *args: None)  # of which tests/test_plain.py tells the same
    case = Case(cell)
    module = case.module(pyrnnfast)
    x, states = case.operands()
    leaves = [x, states[0], *module.parameters()]
    for k, leaf in enumerate(leaves):
        for other in leaves:
            other.requires_grad_(other is leaf)
        case.run(module, x, tuple(s.requires_grad_(s is leaf) for s in states))["y"].sum().backward()
        assert asked.pop() == [i == k for i in range(len(leaves))]


# What is left to torch --------------------------------------------------------------------------------------------


def explained(module: torch.nn.Module, x: Any, hx: Any = None) -> str:
    explanation = pyrnnfast.explain(module, x, hx)
    assert explanation.path == "torch", explanation
    assert str(explanation) == f"torch: {explanation.reason}"
    return explanation.reason


@pytest.mark.parametrize("cell", [cell for cell in CELLS if cell != "rnn_relu"])  # complex numbers have no order
def test_other_dtypes_are_left_to_torch(cell: str) -> None:
    dtype = torch.complex64
    for case in (Case(cell), Case(cell, lengths=(3, 1)), Case(cell, single_step=True)):
        ours, theirs = case.module(pyrnnfast, dtype), case.module(torch.nn, dtype)
        x, states = case.operands(dtype)
        x = x.detach()  # torch packs no complex numbers with gradients
        assert str(dtype) in explained(ours, case.packed(x), case.hx(states))
        with torch.no_grad():
            for our, their in zip(
                case.run(ours, x, states).values(), case.run(theirs, x, states).values(), strict=True
            ):
                assert our.dtype is dtype
                assert torch.equal(our, their)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("single_step", [False, True], ids=["layer", "cell"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_tracing_records_the_operators_of_torch(cell: str, single_step: bool) -> None:
    case = Case(cell, single_step=single_step)
    module = case.module(pyrnnfast)
    x, _ = case.operands()
    reasons = []

    class Wrapper(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = module

        def forward(self, x: Tensor) -> Tensor:
            reasons.append(explained(self.inner, x) if torch.jit.is_tracing() else "")
            out = self.inner(x)
            return out if isinstance(out, Tensor) else out[0]

    wrapper = Wrapper()
    traced = torch.jit.trace(wrapper, x.detach(), check_trace=False)
    assert any("torch.jit" in reason for reason in reasons)
    if not single_step:  # of a cell torch records the operators that it is made of
        assert f"aten::{cell}(" in str(traced.inlined_graph)
    longer = case.operands(seed=5)[0].detach()
    torch.testing.assert_close(traced(longer), wrapper(longer))


def test_stock_modules_are_explained_as_stock() -> None:
    assert "replace" in explained(torch.nn.LSTM(3, 4), torch.ones(2, 2, 3))
    assert "replace" in explained(torch.nn.GRUCell(3, 4), torch.ones(2, 3))
    with pytest.raises(TypeError, match="Linear"):
        pyrnnfast.explain(torch.nn.Linear(3, 4), torch.ones(2, 3))


@pytest.mark.parametrize(
    ("x", "hx", "word"),
    [
        (torch.ones(2, 2, 2, 3), None, "4 dimensions"),
        (torch.ones(3), None, "1 dimensions"),
        (torch.ones(2, 2, 5), None, "5 features"),
        (torch.ones(2, 2, 3, dtype=torch.float64), None, "float64"),
        (torch.ones(2, 2, 3, dtype=torch.bfloat16), None, "bfloat16"),
        (torch.ones(2, 2, 3, dtype=torch.int64), None, "int64"),
        (torch.ones(0, 2, 3), None, "empty"),
        (torch.ones(2, 0, 3), None, "empty"),
        (torch.ones(2, 2, 3), torch.ones(1, 3, 4), "[1, 3, 4]"),
        (torch.ones(2, 2, 3), torch.ones(2, 4), "[2, 4]"),
        (torch.ones(2, 2, 3), torch.ones(1, 2, 4, dtype=torch.float64), "float64"),
        (torch.ones(2, 2, 3), (torch.ones(1, 2, 4),), "tuple"),
        (torch.ones(2, 2, 3).to_sparse(), None, "sparse"),
        ([[1.0]], None, "list"),
        (None, None, "NoneType"),
    ],
    ids=lambda p: "",
)
def test_bad_input_is_explained(x: Any, hx: Any, word: str) -> None:
    assert word in explained(pyrnnfast.GRU(3, 4), x, hx)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("single_step", [False, True], ids=["layer", "cell"])
def test_what_escaped_from_a_transform_is_left_to_torch(single_step: bool, grad: bool) -> None:
    """Such a tensor looks like any other, but has no memory of its own."""
    case = Case("gru", single_step=single_step)
    module = case.module(pyrnnfast)
    x = case.operands()[0].detach()
    escaped: list[Tensor] = []
    torch.func.grad(lambda t: (escaped.append(t), t.sum())[1])(x)
    assert "memory" in explained(module, escaped[0])
    with torch.set_grad_enabled(grad):
        found, expected = module(escaped[0]), module(x)
    torch.testing.assert_close(found, expected)


def test_subclasses_of_tensor_are_left_to_torch() -> None:
    class Marked(Tensor):
        pass

    module = pyrnnfast.GRU(3, 4)
    x = torch.ones(2, 2, 3)
    marked = x.as_subclass(Marked)
    assert "Marked" in explained(module, marked)
    y, _ = module(marked)
    torch.testing.assert_close(y.as_subclass(Tensor), module(x)[0])


def test_packed_input_is_explained() -> None:
    packed = PackedSequence(torch.ones(3, 3), torch.tensor([2, 1]))
    assert pyrnnfast.explain(pyrnnfast.GRU(3, 4), packed).path == "fused"
    assert "4 features" in explained(pyrnnfast.GRU(3, 4), PackedSequence(torch.ones(3, 4), torch.tensor([2, 1])))
    with pytest.raises(ValueError, match="batch_sizes must not increase"):
        pyrnnfast.explain(pyrnnfast.GRU(3, 4), PackedSequence(torch.ones(3, 3), torch.tensor([1, 2])))


@pytest.mark.parametrize("name", ["RNN", "GRU", "LSTM"])
def test_tracing_packed_input(name: str) -> None:
    """Recorded with torch's operators, so the trace holds for other lengths."""
    torch.manual_seed(0)

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = getattr(pyrnnfast, name)(3, 4)

        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            output: Tensor = self.layer(pack_padded_sequence(x, lengths))[0].data
            return output

    model = Model()
    traced = torch.jit.trace(model, (torch.randn(5, 3, 3), torch.tensor([5, 4, 2])), check_trace=False)
    x, lengths = torch.randn(7, 2, 3), torch.tensor([7, 1])
    torch.testing.assert_close(traced(x, lengths), model(x, lengths))


def test_sorted_indices_without_dimension() -> None:
    packed = pack_padded_sequence(torch.randn(4, 1, 3), torch.tensor([4]))
    broken = PackedSequence(packed.data, packed.batch_sizes, torch.tensor(0), torch.tensor(0))
    assert pyrnnfast.explain(pyrnnfast.GRU(3, 4), broken).path == "torch"


@pytest.mark.parametrize("state", ["none", "vmap", "forward_mode", "dispatch", "jit", "onnx", "compiling"])
def test_what_is_busy_is_what_another_form_or_nobody_serves(state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The short question of plain.py and the two long ones agree."""
    found: list[tuple[bool, bool]] = []

    def ask(x: Tensor) -> Tensor:
        found.append((obstacles.is_busy(), obstacles.form(x) != "eager" or obstacles.recording_obstacle() is not None))
        return x

    x = torch.ones(2, 3)
    if state == "none":
        ask(x)
    elif state == "vmap":
        torch.vmap(ask)(x)
    elif state == "forward_mode":
        with torch.autograd.forward_ad.dual_level():
            ask(x)
    elif state == "dispatch":
        with FakeTensorMode():
            ask(x)
    elif state == "jit":
        torch.jit.trace(ask, x, check_trace=False)
    elif state == "onnx":
        monkeypatch.setitem(sys.modules, obstacles._EXPORTER, types.SimpleNamespace(_is_onnx_exporting=True))
        ask(x)
    else:
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        ask(x)
    assert found
    assert set(found) == {(state != "none",) * 2}
