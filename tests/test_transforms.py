"""torch.func and forward mode: every transform gives the numbers that a loop over the reference gives, in float64."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import CELLS, Case
from torch import Tensor

import pyrnnfast
from pyrnnfast import autograd, layers

SAMPLES = 3


def _cases() -> list[Case]:
    cases = []
    for cell in CELLS:
        plain = Case(cell, steps=4, batch=2, inputs=3, hidden=5)
        cases += [
            plain,
            replace(plain, layers=2, bidirectional=True),
            replace(plain, initial=False, bias=False, batch_first=True),
            replace(plain, unbatched=True),
            replace(plain, single_step=True),
            replace(plain, single_step=True, unbatched=True, initial=False),
        ]
    return cases


every_case = pytest.mark.parametrize("case", _cases(), ids=str)
Parameters = dict[str, Tensor]
Loss = Callable[[Parameters, Tensor, tuple[Tensor, ...]], Tensor]


def problem(case: Case) -> tuple[Loss, Loss, Parameters, Tensor, tuple[Tensor, ...]]:
    """A loss by way of our module and by way of the reference, and what they are functions of."""
    module = case.module(pyrnnfast, torch.float64)
    x, states = case.operands(torch.float64)

    def loss(run: Callable[..., dict[str, Tensor]], *args: Any) -> Tensor:
        terms = [(t.sin() * torch.arange(1.0, t.numel() + 1).view(t.shape)).sum() for t in run(*args).values()]
        return torch.stack(terms).sum()

    def ours(parameters: Parameters, x: Tensor, states: tuple[Tensor, ...]) -> Tensor:
        def call(x: Tensor, hx: Any) -> Any:
            return torch.func.functional_call(module, parameters, (x, hx))

        return loss(case.run, call, x, states)

    def theirs(parameters: Parameters, x: Tensor, states: tuple[Tensor, ...]) -> Tensor:
        holder = torch.nn.Module()
        for name, value in parameters.items():
            setattr(holder, name, value)
        return loss(case.run_reference, holder, x, states)

    parameters = {name: p.detach() for name, p in module.named_parameters()}
    return ours, theirs, parameters, x.detach(), tuple(s.detach() for s in states)


def assert_close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


def several(t: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(SAMPLES, *t.shape, generator=generator, dtype=t.dtype)


def forbid_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("the reference was used")

    monkeypatch.setattr(autograd, "reference_layer", refuse)
    monkeypatch.setitem(layers._LAYERS, "reference", refuse)


@every_case
def test_grad(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs, *args = problem(case)
    expected = torch.func.grad(theirs, argnums=(0, 1, 2))(*args)
    forbid_the_reference(monkeypatch)
    assert_close(torch.func.grad(ours, argnums=(0, 1, 2))(*args), expected)


@every_case
@pytest.mark.parametrize("dim", [0, -1])
def test_vmap_over_inputs(case: Case, dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs, parameters, x, states = problem(case)
    xs, many = several(x, 1), tuple(several(s, 2 + k) for k, s in enumerate(states))
    expected = torch.stack([theirs(parameters, xs[k], tuple(s[k] for s in many)) for k in range(SAMPLES)])
    forbid_the_reference(monkeypatch)
    found = torch.func.vmap(ours, in_dims=(None, dim, 0))(parameters, xs.movedim(0, dim), many)
    assert_close(found, expected)
    if states:  # the input is the same for all
        expected = torch.stack([theirs(parameters, x, tuple(s[k] for s in many)) for k in range(SAMPLES)])
        assert_close(torch.func.vmap(ours, in_dims=(None, None, 0))(parameters, x, many), expected)


@every_case
def test_vmap_over_stacked_weights(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs, parameters, x, states = problem(case)
    members = {name: several(p, k) for k, (name, p) in enumerate(parameters.items())}
    expected = torch.stack([theirs({n: p[k] for n, p in members.items()}, x, states) for k in range(SAMPLES)])
    forbid_the_reference(monkeypatch)
    assert_close(torch.func.vmap(ours, in_dims=(0, None, None))(members, x, states), expected)


@every_case
def test_gradients_of_each_sample(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs, parameters, x, states = problem(case)
    xs = several(x, 1)
    expected = [torch.func.grad(theirs, argnums=(0, 1, 2))(parameters, xs[k], states) for k in range(SAMPLES)]
    forbid_the_reference(monkeypatch)
    found = torch.func.vmap(torch.func.grad(ours, argnums=(0, 1, 2)), in_dims=(None, 0, None))(parameters, xs, states)
    assert_close(found, torch.utils._pytree.tree_map(lambda *parts: torch.stack(parts), *expected))


@every_case
def test_gradients_of_each_member_of_an_ensemble(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs, parameters, x, states = problem(case)
    members = {name: several(p, k) for k, (name, p) in enumerate(parameters.items())}
    expected = [
        torch.func.grad(theirs, argnums=(0, 1))({n: p[k] for n, p in members.items()}, x, states)
        for k in range(SAMPLES)
    ]
    forbid_the_reference(monkeypatch)
    found = torch.func.vmap(torch.func.grad(ours, argnums=(0, 1)), in_dims=(0, None, None))(members, x, states)
    assert_close(found, torch.utils._pytree.tree_map(lambda *parts: torch.stack(parts), *expected))


@every_case
def test_vmap_of_vmap(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs, parameters, x, states = problem(case)
    xs = torch.stack([several(x, 1), several(x, 2)])
    expected = torch.stack([torch.stack([theirs(parameters, one, states) for one in row]) for row in xs])
    forbid_the_reference(monkeypatch)
    inner = torch.func.vmap(ours, in_dims=(None, 0, None))
    assert_close(torch.func.vmap(inner, in_dims=(None, 0, None))(parameters, xs, states), expected)


@every_case
def test_gradient_through_vmap_by_autograd(case: Case) -> None:
    """A mapped call inside ordinary autograd; once and twice differentiable."""
    ours, theirs, parameters, x, states = problem(case)
    leaves = {name: p.clone().requires_grad_() for name, p in parameters.items()}
    xs = several(x, 1).requires_grad_()
    results = []
    for fn in (torch.func.vmap(ours, in_dims=(None, 0, None)), None):
        values = fn(leaves, xs, states) if fn else torch.stack([theirs(leaves, one, states) for one in xs])
        first = torch.autograd.grad(values.sum(), [xs, *leaves.values()], create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), [xs, *leaves.values()])
        results.append((values, first, second))
    assert_close(*results)


@pytest.mark.parametrize("mapped", ["weights", "input", "both"])
@every_case
def test_gradient_of_what_is_mapped_by_autograd(case: Case, mapped: str) -> None:
    """Nothing that is not mapped asks for gradients: an ensemble that is trained, or attributions of a frozen model."""
    ours, theirs, parameters, x, states = problem(case)
    x, states = x.detach(), tuple(s.detach() for s in states)
    own = {name: torch.stack([p * (1 + 0.1 * k) for k in range(SAMPLES)]) for name, p in parameters.items()}
    given = own if mapped != "input" else parameters
    xs = several(x, 1).detach() if mapped != "weights" else x
    leaves = [*(p.requires_grad_() for p in own.values() if mapped != "input"), *([xs] if mapped != "weights" else [])]
    xs.requires_grad_(mapped != "weights")
    dims = (None if mapped == "input" else 0, None if mapped == "weights" else 0, None)
    values = torch.func.vmap(ours, in_dims=dims)(given, xs, states)
    expected = torch.stack(
        [
            theirs(
                given if mapped == "input" else {name: p[k] for name, p in given.items()},
                xs if mapped == "weights" else xs[k],
                states,
            )
            for k in range(SAMPLES)
        ]
    )
    found, right = (torch.autograd.grad(v.sum(), leaves) for v in (values, expected))
    assert_close((values, found), (expected, right))


@every_case
def test_forward_mode(case: Case) -> None:
    ours, theirs, parameters, x, states = problem(case)
    tangents = ({n: torch.randn_like(p) for n, p in parameters.items()}, torch.randn_like(x))
    rest = tuple(torch.randn_like(s) for s in states)
    args = (parameters, x, states), (*tangents, rest)
    expected = torch.func.jvp(theirs, *args)
    assert_close(torch.func.jvp(ours, *args), expected)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, tangents[1])
        found = torch.autograd.forward_ad.unpack_dual(ours(parameters, dual, states))
    own = torch.func.jvp(lambda x: theirs(parameters, x, states), (x,), (tangents[1],))
    assert found.tangent is not None
    assert_close((found.primal, found.tangent), own)


@every_case
def test_deeper_stacks(case: Case) -> None:
    """Second derivatives of both modes, and per-sample ones."""
    ours, theirs, parameters, x, states = problem(case)
    found, expected = (
        (
            torch.func.hessian(lambda x, fn=fn: fn(parameters, x, states))(x),
            torch.func.jacrev(torch.func.grad(fn, argnums=1), argnums=1)(parameters, x, states),
            torch.func.grad(lambda p, fn=fn: sum(g.square().sum() for g in torch.func.grad(fn)(p, x, states).values()))(
                parameters
            ),
            torch.func.vmap(lambda one, fn=fn: torch.func.jvp(lambda x: fn(parameters, x, states), (one,), (x,)))(
                several(x, 1)
            ),
        )
        for fn in (ours, theirs)
    )
    assert_close(found, expected)


@every_case
def test_jacobians_of_one_sequence(case: Case) -> None:
    """By vmap over backward alone, of torch.func and of torch.autograd."""
    module = replace(case, batch=1).module(pyrnnfast, torch.float64)
    x, states = replace(case, batch=1).operands(torch.float64)
    hx = case.hx(tuple(s.detach() for s in states))

    def run(x: Tensor) -> Tensor:
        found = module(x, hx)
        return found if isinstance(found, Tensor) else found[0]

    expected = torch.autograd.functional.jacobian(run, x.detach())
    assert_close(torch.func.jacrev(run)(x.detach()), expected)
    assert_close(torch.autograd.functional.jacobian(run, x.detach(), vectorize=True), expected)


@pytest.mark.parametrize("cell", CELLS)
def test_gradient_of_the_weights_with_packed_input(cell: str) -> None:
    """Packed inside the transform, where torch wraps even batch_sizes."""
    case = Case(cell, lengths=(2, 4, 1), bidirectional=True)
    module = case.module(pyrnnfast, torch.float64)
    x = case.operands(torch.float64)[0].detach()

    def loss(parameters: Parameters) -> Tensor:
        y, _ = torch.func.functional_call(module, parameters, (case.packed(x),))
        return y.data.sin().sum()

    parameters = dict(module.named_parameters())
    expected = torch.autograd.grad(loss(parameters), list(parameters.values()))
    found = torch.func.grad(loss)({name: p.detach() for name, p in parameters.items()})
    assert_close(list(found.values()), list(expected))


# Ordinary autograd around transforms, and the other way round --------------------------------------------------------


@every_case
def test_a_step_of_gradient_descent_is_differentiable(case: Case) -> None:
    """As in meta-learning: torch.func.grad inside, autograd outside."""
    ours, theirs, parameters, x, states = problem(case)
    leaves = {name: p.clone().requires_grad_() for name, p in parameters.items()}
    results = []
    for fn in (ours, theirs):
        g = torch.func.grad(fn)(leaves, x, states)
        after = fn({name: p - 0.1 * g[name] for name, p in leaves.items()}, x, states)
        results.append((after, torch.autograd.grad(after, list(leaves.values()))))
    assert_close(*results)


@every_case
def test_gradients_of_each_sample_are_differentiable(case: Case) -> None:
    ours, theirs, parameters, x, states = problem(case)
    leaves = {name: p.clone().requires_grad_() for name, p in parameters.items()}
    xs = several(x, 1)
    found = torch.func.vmap(torch.func.grad(ours), (None, 0, None))(leaves, xs, states)
    each = [torch.func.grad(theirs)(leaves, one, states) for one in xs]
    expected = {name: torch.stack([g[name] for g in each]) for name in leaves}
    results = [
        torch.autograd.grad(sum(g.square().sum() for g in grads.values()), list(leaves.values()))
        for grads in (found, expected)
    ]
    assert_close(*results)
    found_x = torch.func.vmap(torch.func.grad(ours, argnums=1), (None, 0, None))(leaves, xs, states)
    expected_x = torch.stack([torch.func.grad(theirs, argnums=1)(leaves, one, states) for one in xs])
    assert_close(*(torch.autograd.grad(g.square().sum(), list(leaves.values())) for g in (found_x, expected_x)))


@every_case
def test_vjp_functions_outlive_their_transform(case: Case) -> None:
    ours, theirs, parameters, x, states = problem(case)
    results = []
    for fn in (ours, theirs):
        value, back = torch.func.vjp(lambda x, fn=fn: fn(parameters, x, states), x)
        one = torch.ones_like(value)
        tangents = torch.func.jvp(lambda g, back=back: back(g)[0], (one,), (2 * one,))
        results.append((value, back(one), torch.func.vmap(back)(torch.stack([one, 3 * one])), tangents))
    assert_close(*results)


@every_case
def test_forward_mode_around_backward(case: Case) -> None:
    """A dual gradient sent back through a graph that knows of no forward mode."""
    ours, theirs, parameters, x, states = problem(case)
    leaf = x.clone().requires_grad_()
    results = []
    for fn in (ours, theirs):
        value = fn(parameters, leaf, states)
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(torch.ones_like(value), 2 * torch.ones_like(value))
            (found,) = torch.autograd.grad(value, leaf, dual)
            results.append(tuple(torch.autograd.forward_ad.unpack_dual(found)))
    assert results[0][1] is not None
    assert_close(*results)
