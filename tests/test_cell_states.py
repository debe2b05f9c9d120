"""``cell_states``: the LSTM's third result, all cell states of its last layer, against the reference."""

import copy
import pickle
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch._dynamo
from cases import Case, gradients, result_weights
from stand_in import install
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import pyrnnfast
from pyrnnfast import functional, reference

OUTPUTS = ("y", "h_n", "c_n", "cells")
# The largest relative error of rounding to bfloat16.
UNIT = 2.0**-8


def lstm(case: Case, dtype: torch.dtype = torch.float64, **options: Any) -> pyrnnfast.LSTM:
    """The module of a case, with ``cell_states``."""
    torch.manual_seed(0)
    return pyrnnfast.LSTM(
        case.inputs,
        case.hidden,
        case.layers,
        bias=case.bias,
        batch_first=case.batch_first,
        bidirectional=case.bidirectional,
        cell_states=True,
        proj_size=case.projected,
        dtype=dtype,
        **options,
    )


def run(case: Case, module: torch.nn.Module, x: Any, states: tuple[Tensor, ...], **extras: Tensor) -> dict[str, Tensor]:
    y, final, cells = module(x, case.hx(states), **extras)
    if isinstance(y, PackedSequence):
        y, cells = (pad_packed_sequence(t, case.batch_first)[0] for t in (y, cells))
    return dict(zip(OUTPUTS, (y, *final, cells), strict=True))


def truth(
    case: Case, module: torch.nn.Module, x: Tensor, states: tuple[Tensor, ...], lengths: list[int], reset: Tensor
) -> dict[str, Tensor]:
    """Every segment of every sequence by itself. reset: [T, B]"""
    rows = case.layers * case.directions
    backward = (torch.arange(rows) % case.directions == 1)[:, None]
    x = x.unsqueeze(1) if case.unbatched else x.transpose(0, 1) if case.batch_first else x
    states = tuple(s.unsqueeze(1) for s in states) if case.unbatched else states
    states = states or (x.new_zeros(rows, case.batch, case.hidden),) * 2
    columns, finals = [], []
    for b, length in enumerate(lengths):
        cuts = [0, *(t for t in range(1, length) if reset[t, b]), length]
        parts, final = [], [s[:, b] for s in states]
        for first, end in pairwise(cuts) if length else ():
            given = torch.where(backward, end == length, first == 0 and not reset[0, b])
            ends_here = torch.where(backward, first == 0, end == length)
            initial = tuple(torch.where(given, s[:, b], 0.0).unsqueeze(1) for s in states)
            data, after = x[first:end, b], []
            for k, weights in enumerate(case.weights(module)):
                own = slice(k * case.directions, (k + 1) * case.directions)
                (data, cells), of_layer = reference.layer(
                    "lstm", data, tuple(s[own] for s in initial), weights, [1] * (end - first)
                )
                after.append(of_layer)
            parts.append((data, cells))
            last = [torch.cat(s).squeeze(1) for s in zip(*after, strict=True)]
            final = [torch.where(ends_here, new, old) for new, old in zip(last, final, strict=True)]
        widths = (case.projected or case.hidden, case.hidden)
        blanks = [x.new_zeros(case.steps - length, case.directions * width) for width in widths]
        columns.append([torch.cat([*(p[k] for p in parts), blanks[k]]) for k in range(2)])
        finals.append(final)
    y, cells = (torch.stack(column, 1) for column in zip(*columns, strict=True))
    h_n, c_n = (torch.stack(s, 1) for s in zip(*finals, strict=True))
    if case.unbatched:
        y, h_n, c_n, cells = (t.squeeze(1) for t in (y, h_n, c_n, cells))
    elif case.batch_first:
        y, cells = y.transpose(0, 1), cells.transpose(0, 1)
    return dict(zip(OUTPUTS, (y, h_n, c_n, cells), strict=True))


def assert_close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def gradients_of(
    module: torch.nn.Module, x: Tensor, states: tuple[Tensor, ...], outputs: dict[str, Tensor], used: tuple[str, ...]
) -> dict[str, Tensor]:
    """As ``cases.gradients``, but again and again, and zeros where no path leads: one side may know, the other not."""
    leaves = {"x": x} | {f"state{i}": s for i, s in enumerate(states)} | dict(module.named_parameters())
    weights = result_weights(outputs)
    found = torch.autograd.grad(
        [outputs[name] for name in used],
        list(leaves.values()),
        [weights[name] for name in used],
        retain_graph=True,
        materialize_grads=True,
    )
    return dict(zip(leaves, found, strict=True))


PLAIN = Case("lstm", steps=7, batch=5, inputs=3, hidden=6)
DEEP = replace(PLAIN, layers=2, bidirectional=True)
CASES = (
    PLAIN,
    DEEP,
    replace(PLAIN, batch_first=True, layers=3, initial=False, bias=False),
    replace(PLAIN, batch_first=True, bidirectional=True),
    replace(PLAIN, steps=1),
    replace(PLAIN, unbatched=True),
    replace(DEEP, unbatched=True, batch_first=True),
    replace(DEEP, projected=4),
)
KINDS = ("whole", "lengths", "reset", "both", "packed")


@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "CUDA without kernels"])
@pytest.mark.parametrize(
    ("case", "kind"), [(c, kind) for c in CASES for kind in KINDS[: 4 if c.unbatched else 5]], ids=str
)
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_against_the_reference(case: Case, kind: str, kernels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values; gradients of all results together and of each alone; and the same values where none are wanted."""
    module = lstm(case)
    x, states = case.operands(torch.float64)
    if not kernels:
        install(monkeypatch, None, reason="there are none")
        if case.projected:
            with pytest.raises(ValueError, match="or cell_states, and a projection"):
                module(x)
            return
    lengths, reset = [case.steps] * case.batch, torch.zeros(case.steps, case.batch, dtype=torch.bool)
    data: Any = x
    extras = {}
    if kind == "packed":  # at least one step each, and the longest of all steps, to be padded again to as many
        lengths = [min(n, case.steps) for n in (4, 7, 1, 5, 2)]
        data = pack_padded_sequence(x, torch.tensor(lengths), case.batch_first, enforce_sorted=False)
    if kind in ("lengths", "both"):
        lengths = [min(n, case.steps) for n in (4, 6, 1, 0, 5)][: case.batch]
        extras["lengths"] = torch.tensor(lengths)[0 if case.unbatched else slice(None)]
    if kind in ("reset", "both"):
        reset = torch.rand(reset.shape, generator=torch.Generator().manual_seed(3)) < 0.3
        extras["reset"] = reset[:, 0] if case.unbatched else reset.t() if case.batch_first else reset
    found = run(case, module, data, states, **extras)
    expected = truth(case, module, x, states, lengths, reset)
    assert_close(found, expected)
    for used in (OUTPUTS, *((name,) for name in OUTPUTS)):
        ours, theirs = (gradients_of(module, x, states, outputs, used) for outputs in (found, expected))
        assert_close(ours, theirs)
    for off in (torch.no_grad, torch.inference_mode):
        with off():
            assert_close(run(case, module, data, states, **extras), {k: t.detach() for k, t in expected.items()})


# Other dtypes ------------------------------------------------------------------------------------------------------


def test_bfloat16() -> None:
    """Each cell state is rounded once, as the final ones are; gradients are those of the same weights in float32."""
    case = replace(PLAIN, bidirectional=True)
    module, wide = lstm(case, torch.bfloat16), lstm(case, torch.bfloat16).float()
    x, states = case.operands(torch.bfloat16)
    wide_x, wide_states = (
        x.detach().float().requires_grad_(),
        tuple(s.detach().float().requires_grad_() for s in states),
    )
    found, expected = run(case, module, x, states), run(case, wide, wide_x, wide_states)
    assert all(t.dtype is torch.bfloat16 for t in found.values())
    ahead, back = found["cells"].chunk(2, -1)
    assert torch.equal(torch.stack([ahead[-1], back[0]]), found["c_n"])
    weights = result_weights(found)
    ours = gradients(module, x, states, found, ("cells",), weights)
    theirs = gradients(wide, wide_x, wide_states, expected, ("cells",), {k: t.float() for k, t in weights.items()})
    for name, t in {"cells": expected["cells"].detach(), **theirs}.items():
        own = {"cells": found["cells"].detach(), **ours}[name].float()
        assert (own - t).abs().max() < 2 * UNIT * t.abs().max(), name


def test_double_backward_in_bfloat16() -> None:
    """Whose cell states are float32 on their way."""
    case = replace(PLAIN, bidirectional=True)

    def second(dtype: torch.dtype) -> Tensor:
        module = lstm(case, torch.bfloat16).to(dtype)
        x, states = case.operands(torch.bfloat16)
        x = x.detach().to(dtype).requires_grad_()
        found = run(case, module, x, tuple(s.detach().to(dtype) for s in states))
        (first,) = torch.autograd.grad(sum(found[name].sin().sum() for name in OUTPUTS), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)[0]

    found, expected = second(torch.bfloat16), second(torch.float64)
    assert (found - expected).norm() < UNIT * expected.norm()


def test_under_autocast() -> None:
    """Exactly what the module converted to bfloat16 does, with gradients of the parameters' own dtype."""
    case = DEEP
    module, narrow = lstm(case, torch.float32), lstm(case, torch.float32).bfloat16()
    x, states = case.operands()
    with torch.autocast("cpu", torch.bfloat16):
        found = run(case, module, x, states)
    narrow_x, narrow_states = x.detach().bfloat16(), tuple(s.detach().bfloat16() for s in states)
    expected = run(case, narrow, narrow_x, narrow_states)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    ours = torch.autograd.grad(found["cells"].sum(), list(module.parameters()))
    theirs = torch.autograd.grad(expected["cells"].sum(), list(narrow.parameters()))
    torch.testing.assert_close(ours, tuple(g.float() for g in theirs), rtol=0, atol=0)


# Transforms and compilers --------------------------------------------------------------------------------------------


def weighted(found: Any) -> Tensor:
    """A number that depends on every element in a way of its own."""
    y, (h_n, c_n), cells = found
    parts = [(t.sin() * torch.arange(1.0, t.numel() + 1).view(t.shape)).sum() for t in (y, h_n, c_n, cells)]
    return torch.stack(parts).sum()


@pytest.mark.parametrize("case", [PLAIN, DEEP], ids=str)
def test_torch_func(case: Case) -> None:
    """grad, per-sample gradients, and an ensemble of stacked weights."""
    module = lstm(case)
    x, states = case.operands(torch.float64)
    x, states = x.detach(), tuple(s.detach() for s in states)
    parameters = {name: p.detach() for name, p in module.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return weighted(torch.func.functional_call(module, parameters, (x, states)))

    def by_autograd(parameters: dict[str, Tensor], x: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        leaves = {name: p.clone().requires_grad_() for name, p in parameters.items()}
        x = x.clone().requires_grad_()
        found = torch.autograd.grad(loss(leaves, x), [*leaves.values(), x])
        return dict(zip(leaves, found[:-1], strict=True)), found[-1]

    grad = torch.func.grad(loss, argnums=(0, 1))
    assert_close(grad(parameters, x), by_autograd(parameters, x))
    xs = torch.stack([x, x.flip(0)])
    members = {name: torch.stack([p, p.flip(0)]) for name, p in parameters.items()}
    samples = [by_autograd(parameters, one) for one in xs]
    ensemble = [by_autograd({name: p[k] for name, p in members.items()}, x) for k in range(2)]
    stack = torch.utils._pytree.tree_map
    assert_close(torch.func.vmap(grad, (None, 0))(parameters, xs), stack(lambda *t: torch.stack(t), *samples))
    assert_close(torch.func.vmap(grad, (0, None))(members, x), stack(lambda *t: torch.stack(t), *ensemble))
    cells = torch.func.vmap(lambda one: module(one, states)[2])(xs)
    assert_close(cells, torch.stack([module(one, states)[2] for one in xs]))


@pytest.fixture
def compiler() -> Iterator[None]:
    torch._dynamo.reset()
    with torch._dynamo.config.patch(allow_rnn=True):
        yield
    torch._dynamo.reset()


@pytest.mark.parametrize("case", [PLAIN, replace(DEEP, batch_first=True)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_compiled(case: Case, dtype: torch.dtype, compiler: None) -> None:
    module = lstm(case, dtype)
    compiled: Any = torch.compile(module, backend="aot_eager", fullgraph=True)
    x, states = case.operands(dtype)
    found, expected = run(case, compiled, x, states), run(case, module, x, states)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    ours, theirs = gradients(module, x, states, found, OUTPUTS), gradients(module, x, states, expected, OUTPUTS)
    torch.testing.assert_close(ours, theirs)
    with torch.no_grad():
        found = run(case, compiled, x, states)
    torch.testing.assert_close(found, {name: t.detach() for name, t in expected.items()}, rtol=0, atol=0)


# The module and the function -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))], ids=["deepcopy", "pickle"]
)
def test_copies_keep_it(copied: Any) -> None:
    module = lstm(PLAIN)
    x, states = PLAIN.operands(torch.float64)
    torch.testing.assert_close(copied(module)(x, states), module(x, states), rtol=0, atol=0)


def test_representation_shows_it() -> None:
    assert repr(pyrnnfast.LSTM(3, 6, cell_states=True)) == "LSTM(3, 6, cell_states=True)"
    assert repr(pyrnnfast.LSTM(3, 6, cell_states=False)) == "LSTM(3, 6)"


def test_parameters_are_those_of_torchs_module() -> None:
    ours = lstm(DEEP).state_dict()
    theirs = DEEP.module(torch.nn, torch.float64).state_dict()
    assert list(ours) == list(theirs)
    # Drawn in float32 on the one side.
    drawn = lstm(DEEP, torch.float32).state_dict()
    assert all(torch.equal(drawn[name].double(), t) for name, t in theirs.items())
    lstm(DEEP).load_state_dict(theirs)


def test_functional_form() -> None:
    module = lstm(DEEP)
    x, states = DEEP.operands(torch.float64)
    options: Any = {"num_layers": 2, "bidirectional": True, "cell_states": True}
    found = functional.lstm(x, (states[0], states[1]), list(module.parameters()), **options)
    torch.testing.assert_close(found, module(x, states), rtol=0, atol=0)


def test_for_the_lstm_alone() -> None:
    x, weights = torch.zeros(7, 5, 3), list(torch.nn.GRU(3, 6).parameters())
    with pytest.raises(ValueError, match="cell_states is for the LSTM alone"):
        functional.gru(x, None, weights, cell_states=True)
    with pytest.raises(ValueError, match="cell_states is for the LSTM alone"):
        functional.rnn(x, None, list(torch.nn.RNN(3, 6).parameters()), cell_states=True)
    for name in ("GRU", "RNN"):
        with pytest.raises(TypeError, match="unexpected keyword argument 'cell_states'"):
            getattr(pyrnnfast, name)(3, 6, cell_states=True)


def test_not_on_torchs_own_road() -> None:
    """torch has no such result."""
    with pytest.raises(ValueError, match="or cell_states, and the kernels serve float32"):
        lstm(PLAIN, torch.complex64)(torch.zeros(7, 5, 3, dtype=torch.complex64))
    with pytest.raises(ValueError, match="or cell_states, and the input has 4 features"):
        lstm(PLAIN, torch.float32)(torch.zeros(7, 5, 4))


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("recorded", [True, False])
def test_a_change_in_place_before_backward_raises(batch_first: bool, recorded: bool) -> None:
    """Backward needs them as they were."""
    case = replace(PLAIN, batch_first=batch_first)
    y, _, cells = lstm(case)(case.operands(torch.float64)[0])
    with torch.set_grad_enabled(recorded):
        cells.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace"):
        y.sum().backward()
