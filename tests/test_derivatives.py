"""First and second derivatives by finite differences, and gradients of gradients against torch.nn's."""

from collections.abc import Callable

import pytest
import torch
from cases import CELLS, SMALL, Case
from torch import Tensor

import pyrnnfast


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
