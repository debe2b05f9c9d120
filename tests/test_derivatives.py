"""First and second derivatives by finite differences, and gradients of gradients against torch.nn's."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import CELLS, SMALL, Case
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence

import pyrnnfast
from pyrnnfast import _cpu, autograd, plain


def as_function(case: Case) -> tuple[Callable[..., tuple[Tensor, ...]], tuple[Tensor, ...]]:
    """A case as a function of its input, states and parameters."""
    module = case.module(pyrnnfast, torch.float64)
    names = [name for name, _ in module.named_parameters()]
    x, states = case.operands(torch.float64)

    class Call(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = module

        def forward(self, *operands: Tensor) -> tuple[Tensor, ...]:
            return tuple(case.run(self.layer, operands[0], operands[1:]).values())

    call = Call()

    def function(x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        states, weights = rest[: len(rest) - len(names)], rest[len(rest) - len(names) :]
        parameters = {f"layer.{name}": w for name, w in zip(names, weights, strict=True)}
        result: tuple[Tensor, ...] = torch.func.functional_call(call, parameters, (x, *states))
        return result

    leaves = (x, *states, *(p.detach().clone().requires_grad_() for p in module.parameters()))
    return function, leaves


# A rectifier has no second derivative to compare and a kink that finite differences may step over: the seeds do not.
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_gradcheck(case: Case) -> None:
    function, leaves = as_function(case)
    assert torch.autograd.gradcheck(function, leaves, fast_mode=case.layers > 1)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_gradgradcheck(case: Case) -> None:
    function, leaves = as_function(case)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("cell", CELLS)
def test_weights_shared_between_directions_and_kinds(cell: str) -> None:
    """One tensor that comes in four times gets the sum of four gradients, of first and second order."""
    case = Case(cell, inputs=3, hidden=3, bidirectional=True, lengths=(3, 1, 2))
    names = [name for name, _ in case.module(torch.nn).named_parameters()]
    x, states = case.operands(torch.float64)
    rows = case.module(torch.nn).weight_ih_l0.shape[0]
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(rows, 3, generator=generator, dtype=torch.float64).requires_grad_()
    bias = torch.randn(rows, generator=generator, dtype=torch.float64).requires_grad_()
    results = []
    for library in (pyrnnfast, torch.nn):
        module = case.module(library, torch.float64)
        shared = {name: weight if "weight" in name else bias for name in names}
        y, _ = torch.func.functional_call(module, shared, (case.packed(x), case.hx(states)))
        first = torch.autograd.grad(y.data.pow(2).sum(), (weight, bias, x, *states), create_graph=True)
        second = torch.autograd.grad(sum(g.pow(2).sum() for g in first), (weight, bias, x, *states))
        results.append((*first, *second))
    for our, their in zip(*results, strict=True):
        assert torch.allclose(our, their, rtol=1e-10, atol=1e-12)

    def function(weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
        module = case.module(pyrnnfast, torch.float64)
        shared = {name: weight if "weight" in name else bias for name in names}
        y: Tensor = torch.func.functional_call(module, shared, (case.packed(x), None))[0].data
        return y

    assert torch.autograd.gradcheck(function, (weight, bias, x))


@pytest.mark.parametrize("case", SMALL, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_gradient_penalty(case: Case, dtype: torch.dtype) -> None:
    """‖∂y/∂x‖² as part of a loss: its gradients must neither vanish nor differ from torch's."""
    results = []
    for library in (pyrnnfast, torch.nn):
        module = case.module(library, dtype)
        x, states = case.operands(dtype)
        outputs = case.run(module, x, states)
        (slope,) = torch.autograd.grad(sum(t.sum() for t in outputs.values()), x, create_graph=True)
        assert slope.requires_grad
        loss = slope.pow(2).sum() + sum(t.pow(2).sum() for t in outputs.values())
        results.append([slope, loss, *torch.autograd.grad(loss, (x, *states, *module.parameters()))])
    for our, their in zip(*results, strict=True):
        tolerance = 1e-12 if dtype is torch.float64 else 2e-5
        assert torch.allclose(our, their, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("cell", CELLS)
def test_third_derivative(cell: str) -> None:
    case = Case(cell, hidden=2, steps=2, batch=1)
    results = []
    for library in (pyrnnfast, torch.nn):
        module = case.module(library, torch.float64)
        x, states = case.operands(torch.float64)
        value = case.run(module, x, states)["y"].pow(3).sum()
        for _ in range(3):
            (slope,) = torch.autograd.grad(value, x, create_graph=True)
            value = slope.pow(2).sum()
        results.append(slope)
    assert torch.allclose(*results, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("cell", CELLS)
def test_forward_mode_is_right_or_raises(cell: str) -> None:
    """A tangent of zero would be silently wrong. torch's own float32 LSTM raises; float64 has a formula."""
    case = Case(cell, hidden=3)
    x, states = case.operands(torch.float64)
    module = case.module(pyrnnfast, torch.float64)
    step = torch.ones_like(x)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x.detach(), step)
        y = case.run(module, dual, tuple(s.detach() for s in states))["y"]
        tangent = torch.autograd.forward_ad.unpack_dual(y).tangent
    assert tangent is not None
    ahead, behind = (case.run(module, x + h * step, states)["y"] for h in (1e-6, -1e-6))
    assert torch.allclose(tangent, (ahead - behind) / 2e-6, rtol=1e-6, atol=1e-8)


# What torch may do to a gradient, or around one


@pytest.mark.parametrize("name", ["RNN", "GRU", "LSTM"])
def test_backward_inside_autocast(name: str) -> None:
    """The forward ran outside, in float32: so does the backward, to the bit."""
    torch.manual_seed(0)
    layer = getattr(pyrnnfast, name)(3, 5, bidirectional=True)
    x = torch.randn(4, 2, 3, requires_grad=True)
    plain = torch.autograd.grad(layer(x)[0].sum(), [x, *layer.parameters()])
    loss = layer(x)[0].sum()
    with torch.autocast("cpu", torch.bfloat16):
        inside = torch.autograd.grad(loss, [x, *layer.parameters()])
    for a, b in zip(plain, inside, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["RNNCell", "GRUCell", "LSTMCell"])
def test_cell_backward_inside_autocast(name: str) -> None:
    torch.manual_seed(0)
    cell = getattr(pyrnnfast, name)(3, 5)
    x, h = torch.randn(2, 3, requires_grad=True), torch.randn(2, 5, requires_grad=True)

    def loss() -> torch.Tensor:
        state = cell(x, (h, h) if name == "LSTMCell" else h)
        return (state[0] if name == "LSTMCell" else state).sum()

    plain = torch.autograd.grad(loss(), [x, h])
    outside = loss()
    with torch.autocast("cpu", torch.bfloat16):
        inside = torch.autograd.grad(outside, [x, h])
    for a, b in zip(plain, inside, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["RNNCell", "GRUCell", "LSTMCell"])
@pytest.mark.parametrize("size", [1, 4])
def test_lazily_negated_gradient(name: str, size: int) -> None:
    """torch.complex(...).conj() gives its second part the gradient as a view that is negated when it is read."""
    torch.manual_seed(0)
    results = []
    stock = getattr(torch.nn, name)(3, size)
    for cell in (stock, pyrnnfast.replace(copy.deepcopy(stock))):
        x = torch.ones(size, 3, requires_grad=True)
        y = cell(x)
        y = y[0] if isinstance(y, tuple) else y
        (torch.complex(torch.zeros_like(y), y).conj() * (1 + 2j)).real.sum().backward()
        results.append(x.grad)
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("name", ["GRUCell", "LSTMCell"])
def test_a_state_may_be_changed_in_place(name: str) -> None:
    """As with torch's own cells: backward does not look at it."""
    torch.manual_seed(0)
    stock = getattr(torch.nn, name)(3, 4)
    x = torch.randn(2, 3)
    gradients_of = []
    for cell in (stock, pyrnnfast.replace(copy.deepcopy(stock))):
        state = cell(x)
        h = state[0] if isinstance(state, tuple) else state
        torch.nn.functional.relu(h, inplace=True).sum().backward()
        gradients_of.append([p.grad for p in cell.parameters()])
    for a, b in zip(*gradients_of, strict=True):
        torch.testing.assert_close(a, b)


def test_changed_batch_sizes_are_noticed() -> None:
    packed = pack_padded_sequence(torch.randn(4, 3, 3), torch.tensor([4, 4, 1]))
    layer = pyrnnfast.LSTM(3, 5)
    loss = layer(packed)[0].data.sum()
    packed.batch_sizes[:] = torch.tensor([3, 3, 2, 1])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("road", ["plain", "layer by layer"])
@pytest.mark.parametrize("name", ["RNN", "GRU", "LSTM", "GRUCell"])
def test_only_gradients_that_are_asked_for_are_computed(name: str, road: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is asked for, by whichever way, it is as right as when all is computed."""
    monkeypatch.setattr(autograd, "_PRODUCTS_WORTH_ASKING", 0)
    if road == "layer by layer":
        monkeypatch.setattr(plain, "call", lambda *_: None)
    asked: list[list[bool]] = []
    long, short = autograd.backward, _cpu.backward_plain

    def watch_long(cell: str, needs: Any, *rest: Any) -> Any:
        asked.append([bool(n) for n in needs])
        return long(cell, needs, *rest)

    def watch_short(*operands: Any) -> Any:
        asked.append(list(operands[5]))
        return short(*operands)

    monkeypatch.setattr(autograd, "backward", watch_long)
    monkeypatch.setattr(_cpu, "backward_plain", watch_short)
    module = getattr(pyrnnfast, name)(3, 5).double()
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    leaf = torch.randn(4, 2, 3, dtype=torch.float64, requires_grad=True)
    if name.endswith("Cell"):
        leaf = leaf.detach()[0].requires_grad_()
    weights = dict(module.named_parameters())

    def loss() -> Tensor:
        out = module(leaf * scale)
        return (out[0] if isinstance(out, tuple) else out).sin().sum()

    everything = dict(zip(("x", *weights), torch.autograd.grad(loss(), [leaf, *weights.values()]), strict=True))
    (of_scale,) = torch.autograd.grad(loss(), scale)
    asked.clear()
    for wanted in (["x"], ["x", *weights], list(weights), *([w] for w in weights), ["x", list(weights)[1]]):
        leaves = {"x": leaf} | weights
        for found, key in zip(torch.autograd.grad(loss(), [leaves[k] for k in wanted]), wanted, strict=True):
            torch.testing.assert_close(found, everything[key])
        (needs,) = asked
        assert needs[0] is ("x" in wanted)
        if len(wanted) == 1:  # of several, what is not asked for may be taken to be
            assert needs[3:] == [k in wanted for k in weights]
        assert any(needs[3:]) is any(k in weights for k in wanted)
        asked.clear()
    torch.testing.assert_close(torch.autograd.grad(loss(), scale)[0], of_scale)
    asked.clear()
    loss().backward(inputs=[weights[w] for w in list(weights)[:1]])
    loss().backward()
    for key, weight in weights.items():
        torch.testing.assert_close(weight.grad, everything[key] * (2 if key == next(iter(weights)) else 1))
    assert not asked[0][0]
    assert asked[1][0]
    assert all(asked[1][3:])
