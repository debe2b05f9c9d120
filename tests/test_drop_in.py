"""What code written for torch.nn's recurrent modules relies on, and ours therefore keep."""

import copy
import gc
import io
import math
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from cases import CELLS, SMALL, Case, gradients
from torch import Tensor
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils.rnn import PackedSequence
from torch.utils.checkpoint import checkpoint

import pyrnnfast
from pyrnnfast import plain

LAYERS = tuple(case for case in SMALL if not case.single_step)
STEPS = tuple(case for case in SMALL if case.single_step)
NAMES = ("RNN", "GRU", "LSTM", "RNNCell", "GRUCell", "LSTMCell")


def both(case: Case) -> tuple[torch.nn.Module, torch.nn.Module]:
    return case.module(pyrnnfast), case.module(torch.nn)


def assert_same_results(case: Case, ours: torch.nn.Module, theirs: torch.nn.Module) -> None:
    """Outputs and all gradients, to float32's rounding."""
    results = []
    for module in (ours, theirs):
        x, states = case.operands()
        torch.manual_seed(5)
        outputs = case.run(module, x, states)
        results.append(outputs | gradients(module, x, states, outputs))
    assert results[0].keys() == results[1].keys()
    for name, their in results[1].items():
        torch.testing.assert_close(results[0][name], their, rtol=1e-4, atol=1e-5, msg=name)


# Construction and state --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_is_a_module_of_torch(name: str) -> None:
    ours, theirs = getattr(pyrnnfast, name), getattr(torch.nn, name)
    assert issubclass(ours, theirs)
    assert ours.__name__ == name


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_same_seed_same_weights(case: Case) -> None:
    ours, theirs = both(case)
    pairs = list(zip(ours.named_parameters(), theirs.named_parameters(), strict=True))
    for (our_name, our), (their_name, their) in pairs:
        assert our_name == their_name
        assert torch.equal(our, their)
    assert repr(ours) == repr(theirs)
    assert list(ours.buffers()) == []
    assert vars(ours).keys() == vars(theirs).keys()
    for key, value in vars(theirs).items():
        if isinstance(value, (int, float, str, bool)):
            assert getattr(ours, key) == value, key
    # The generator stands where torch's does afterwards, too.
    case.module(pyrnnfast)
    here = torch.rand(1)
    case.module(torch.nn)
    assert torch.equal(here, torch.rand(1))


DROPOUT = tuple(
    Case(cell, hidden=9, layers=3, dropout=0.5, bidirectional=bi, batch_first=first, lengths=lengths)
    for cell in CELLS
    for bi, first, lengths in ((False, False, None), (True, True, None), (True, False, (1, 4, 2)))
)


@pytest.mark.parametrize("case", DROPOUT, ids=str)
def test_dropout_draws_as_torch_does(case: Case) -> None:
    ours, theirs = both(case)
    assert_same_results(case, ours, theirs)
    x, states = case.operands()
    torch.manual_seed(5)
    in_training = case.run(ours, x, states)["y"]
    here = torch.rand(1)
    torch.manual_seed(5)
    case.run(theirs, x, states)
    assert torch.equal(here, torch.rand(1)), "the generator stands elsewhere"
    assert not torch.allclose(in_training, case.run(ours.eval(), x, states)["y"])
    assert_same_results(case, ours, theirs.eval())


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_state_dicts_are_interchangeable(case: Case) -> None:
    ours, theirs = case.module(pyrnnfast, seed=1), case.module(torch.nn, seed=2)
    ours.load_state_dict(theirs.state_dict())
    assert_same_results(case, ours, theirs)
    other = case.module(torch.nn, seed=3)
    other.load_state_dict(ours.state_dict())
    assert_same_results(case, ours, other)


@pytest.mark.parametrize("case", SMALL, ids=str)
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "save"])
def test_copies(case: Case, how: str) -> None:
    module = case.module(pyrnnfast)
    module.eval()
    if how == "deepcopy":
        copied = copy.deepcopy(module)
    elif how == "pickle":
        copied = pickle.loads(pickle.dumps(module))
    else:
        file = io.BytesIO()
        torch.save(module, file)
        file.seek(0)
        copied = torch.load(file, weights_only=False)
    assert type(copied) is type(module)
    assert not copied.training
    assert all(a is not b for a, b in zip(module.parameters(), copied.parameters(), strict=True))
    assert_same_results(case, copied, module)
    addresses = [{p.data_ptr() for p in m.parameters()} for m in (module, copied)]
    assert not addresses[0] & addresses[1], "the copy shares memory"


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_after_use_nothing_is_kept(case: Case) -> None:
    """No graph or operand outlives its call in the module."""
    module = case.module(pyrnnfast)
    x, states = case.operands()
    outputs = case.run(module, x, states)
    gradients(module, x, states, outputs)
    kept = weakref.ref(x)
    del x, states, outputs
    gc.collect()
    assert kept() is None


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_construction_with_dtype_and_device(case: Case) -> None:
    name = type(case.module(torch.nn)).__name__
    module = getattr(pyrnnfast, name)(3, 4, dtype=torch.float64, device="cpu")
    assert {p.dtype for p in module.parameters()} == {torch.float64}
    meta = getattr(pyrnnfast, name)(3, 4, device="meta")
    assert {p.device.type for p in meta.parameters()} == {"meta"}


@pytest.mark.parametrize("case", STEPS, ids=str)
def test_skip_init(case: Case) -> None:
    name = type(case.module(torch.nn)).__name__
    module = torch.nn.utils.skip_init(getattr(pyrnnfast, name), case.inputs, case.hidden, bias=case.bias)
    theirs = case.module(torch.nn)
    if case.cell == "rnn_relu":
        module.nonlinearity = "relu"
    module.load_state_dict(theirs.state_dict())
    assert_same_results(case, module, theirs)


@pytest.mark.parametrize("case", LAYERS, ids=str)
def test_layer_attributes(case: Case) -> None:
    ours, theirs = both(case)
    ours.flatten_parameters()
    assert ours._flat_weights_names == theirs._flat_weights_names
    assert all(a is b for a, b in zip(ours._flat_weights, ours.parameters(), strict=True))
    for our, their in zip(ours.all_weights, theirs.all_weights, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(our, their, strict=True))
    assert_same_results(case, ours, theirs)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_moving_and_casting(case: Case) -> None:
    ours, theirs = both(case)
    assert_same_results(case, ours.double().float(), theirs)
    assert_same_results(case, ours.to("cpu"), theirs)
    ours.to_empty(device="cpu")
    ours.load_state_dict(theirs.state_dict())
    assert_same_results(case, ours, theirs)


# Weights that are not plain parameters -----------------------------------------------------------------------------


class Doubled(torch.nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return 2 * w


def weight_name(case: Case) -> str:
    return "weight_hh" if case.single_step else "weight_hh_l0"


CHANGES: dict[str, Callable[[torch.nn.Module, str], Any]] = {
    "parametrize": lambda m, n: parametrize.register_parametrization(m, n, Doubled()),
    "weight_norm": lambda m, n: parametrizations.weight_norm(m, n),
    "old_weight_norm": lambda m, n: torch.nn.utils.weight_norm(m, n),
    "spectral_norm": lambda m, n: parametrizations.spectral_norm(m, n),
    "orthogonal": lambda m, n: parametrizations.orthogonal(m, n),
    "prune": lambda m, n: prune.l1_unstructured(m, n, amount=0.3),
    "frozen": lambda m, n: getattr(m, n).requires_grad_(False),
    "another_parameter": lambda m, n: setattr(m, n, torch.nn.Parameter(torch.full_like(getattr(m, n), 0.1))),
    "changed_in_place": lambda m, n: getattr(m, n).data.mul_(0.5),
    "other_data": lambda m, n: setattr(getattr(m, n), "data", torch.full_like(getattr(m, n), 0.2)),
    "transposed_memory": lambda m, n: setattr(getattr(m, n), "data", getattr(m, n).data.t().contiguous().t()),
}


@pytest.mark.parametrize("case", SMALL, ids=str)
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("after_use", [False, True], ids=["before_use", "after_use"])
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:`torch.nn.utils.weight_norm` is deprecated")
def test_weights_made_otherwise(case: Case, change: str, after_use: bool) -> None:
    """What stands under a weight's name at the time of the call is what counts."""
    results = []
    modules = both(case)
    for module in modules:
        if after_use:
            case.run(module, *case.operands())
        torch.manual_seed(6)
        CHANGES[change](module, weight_name(case))
        if change == "spectral_norm":
            module.eval()  # else each look at the weight would change it
        x, states = case.operands()
        if change == "frozen":
            results.append(case.run(module, x, states))
            sum(t.sum() for t in results[-1].values()).backward()
            frozen = getattr(module, weight_name(case))
            assert frozen.grad is None
            results[-1] |= {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
        else:
            outputs = case.run(module, x, states)
            results.append(outputs | gradients(module, x, states, outputs))
        if module is modules[0]:
            assert pyrnnfast.explain(module, case.packed(x), case.hx(states)).path == "fused"
    assert results[0].keys() == results[1].keys()
    for name, their in results[1].items():
        torch.testing.assert_close(results[0][name], their, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_functional_call(case: Case) -> None:
    ours, theirs = both(case)
    results = []
    for module in (ours, theirs):
        x, states = case.operands()
        given = {name: (3 * p.detach()).requires_grad_() for name, p in module.named_parameters()}
        found = torch.func.functional_call(module, given, (case.packed(x), case.hx(states)))
        leaves = [t.data if isinstance(t, PackedSequence) else t for t in torch.utils._pytree.tree_leaves(found)]
        tensors = [t for t in leaves if t is not None and t.is_floating_point()]
        results.append([*tensors, *torch.autograd.grad(sum(t.sum() for t in tensors), list(given.values()))])
    for our, their in zip(*results, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-4, atol=1e-5)


# Hooks, graphs and modes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_hooks(case: Case) -> None:
    calls: list[str] = []
    module = case.module(pyrnnfast)
    module.register_forward_pre_hook(lambda m, args: calls.append("before"))
    module.register_forward_hook(lambda m, args, out: calls.append("after"))
    next(module.parameters()).register_hook(lambda g: calls.append("gradient"))
    x, states = case.operands()
    outputs = case.run(module, x, states)
    sum(t.sum() for t in outputs.values()).backward()
    assert calls == ["before", "after", "gradient"]


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_retained_and_interleaved_graphs(case: Case) -> None:
    module = case.module(pyrnnfast)
    first, second = case.operands(seed=1), case.operands(seed=2)
    alone = []
    for x, states in (first, second):
        alone.append(gradients(module, x, states, case.run(module, x, states)))
    a = case.run(module, *first)
    b = case.run(module, *second)
    loss = sum((t * w).sum() for t, w in zip(a.values(), map(torch.ones_like, a.values()), strict=True))
    leaves = [first[0], *first[1], *module.parameters()]
    once = torch.autograd.grad(loss, leaves, retain_graph=True)
    for name, g in gradients(module, *second, b).items():
        assert torch.equal(g, alone[1][name])
    twice = torch.autograd.grad(loss, leaves, retain_graph=True)
    assert all(torch.equal(g, h) for g, h in zip(once, twice, strict=True))
    for name, g in gradients(module, *first, a).items():
        assert torch.equal(g, alone[0][name])
    with pytest.raises(RuntimeError, match="Trying to backward through the graph a second time"):
        torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_gradients_accumulate(case: Case) -> None:
    module = case.module(pyrnnfast)
    x, states = case.operands()
    for _ in range(2):
        sum(t.sum() for t in case.run(module, x, states).values()).backward()
    double = {name: p.grad.clone() for name, p in module.named_parameters()}
    module.zero_grad()
    sum(t.sum() for t in case.run(module, x, states).values()).backward()
    for name, p in module.named_parameters():
        torch.testing.assert_close(double[name], 2 * p.grad)


@pytest.mark.parametrize("case", LAYERS, ids=str)
def test_a_changed_output_is_noticed(case: Case) -> None:
    module = case.module(pyrnnfast)
    x, states = case.operands()
    y, _ = module(case.packed(x), case.hx(states))
    y = y.data if isinstance(y, PackedSequence) else y
    loss = y.sum()
    with torch.no_grad():
        y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_a_changed_weight_is_noticed(case: Case) -> None:
    module = case.module(pyrnnfast)
    x, states = case.operands()
    loss = sum(t.sum() for t in case.run(module, x, states).values())
    with torch.no_grad():
        getattr(module, weight_name(case)).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("case", SMALL, ids=str)
@pytest.mark.parametrize("road", ["plain", "layer by layer", "twice"])
def test_a_graph_keeps_the_memory_it_was_made_with(case: Case, road: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever gives weights, or data of layers, other memory before backward, as quantizers do, gets the derivative at
    the values that the forward pass had."""
    if road == "layer by layer":
        monkeypatch.setattr(plain, "call", lambda *_: None)
    found = []
    for changed in (False, True):
        module = case.module(pyrnnfast, torch.float64)
        x, states = case.operands(torch.float64)
        operands = (x, *states, *module.parameters())
        data = tuple(t * 1 for t in (x, *states))
        outputs = case.run(module, data[0], data[1:])
        loss = torch.stack([t.square().sum() for t in outputs.values()]).sum()
        if changed:
            for t in module.parameters() if case.single_step else (*operands, *data):
                t.data = t.data * 1e8
        if road == "twice":
            first = torch.autograd.grad(loss, operands, create_graph=True)
            loss = torch.stack([g.square().sum() for g in first]).sum()
        found.append(torch.autograd.grad(loss, operands))
    for before, after in zip(*found, strict=True):
        torch.testing.assert_close(after, before, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_gradients_of_some_tensors_only(case: Case) -> None:
    """Whatever else is frozen, the rest is the same."""
    module = case.module(pyrnnfast)
    x, states = case.operands()
    leaves = {"x": x} | {f"state{i}": s for i, s in enumerate(states)} | dict(module.named_parameters())
    everything = gradients(module, x, states, case.run(module, x, states))
    for name, leaf in leaves.items():
        for other in leaves.values():
            other.requires_grad_(other is leaf)
        outputs = case.run(module, x, states)
        weights = [
            torch.randn(t.shape, generator=g).to(t.dtype)
            for g in [torch.Generator().manual_seed(2)]
            for t in outputs.values()
        ]
        (found,) = torch.autograd.grad(list(outputs.values()), leaf, weights)
        torch.testing.assert_close(found, everything[f"grad {name}"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_saved_tensor_hooks_and_checkpoint(case: Case) -> None:
    module = case.module(pyrnnfast)
    x, states = case.operands()
    expected = gradients(module, x, states, case.run(module, x, states))
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t.shape) or t.clone(), lambda t: t):
        outputs = case.run(module, x, states)
    assert packed
    for name, g in gradients(module, x, states, outputs).items():
        assert torch.equal(g, expected[name])
    with torch.autograd.graph.save_on_cpu():
        outputs = case.run(module, x, states)
    for name, g in gradients(module, x, states, outputs).items():
        assert torch.equal(g, expected[name])
    values = checkpoint(lambda x, *s: tuple(case.run(module, x, s).values()), x, *states, use_reentrant=False)
    found = gradients(module, x, states, dict(zip(case.outputs, values, strict=True)))
    for name, g in found.items():
        assert torch.equal(g, expected[name])


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_expanded_and_strided_gradients(case: Case) -> None:
    """y.sum() sends a gradient without memory of its own, a transpose one with other strides."""
    results = []
    for module in both(case):
        x, states = case.operands()
        outputs = case.run(module, x, states)
        plain = sum(t.sum() for t in outputs.values())
        turned = sum((t.movedim(0, -1).contiguous() ** 2).sum() for t in outputs.values())
        halves = sum((t[..., ::2] ** 3).sum() for t in outputs.values())
        results.append(torch.autograd.grad(plain + turned + halves, [x, *states, *module.parameters()]))
    for our, their in zip(*results, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-4, atol=1e-5)


def strided(t: Tensor, how: str) -> Tensor:
    """The same values in another layout."""
    if how == "transposed":
        return t.movedim(-1, 0).contiguous().movedim(0, -1)
    if how == "sliced":
        return torch.stack([t, t + 1], -1).flatten(-2)[..., ::2]
    if how == "offset":
        return torch.nn.functional.pad(t, (3, 2))[..., 3:-2]
    if how == "flipped_order":
        return t.transpose(0, -2).contiguous().transpose(0, -2) if t.dim() > 1 else t
    return t[..., :1].expand(t.shape)  # expanded


@pytest.mark.parametrize("how", ["transposed", "sliced", "offset", "flipped_order", "expanded"])
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_layouts_of_operands(case: Case, how: str) -> None:
    results = []
    for module in both(case):
        x, states = case.operands()
        with torch.no_grad():
            for p in module.parameters():
                p.data = strided(p.data, how)
        outputs = case.run(module, strided(x, how), tuple(strided(s, how) for s in states))
        results.append(outputs | gradients(module, x, states, outputs))
    for name, their in results[1].items():
        torch.testing.assert_close(results[0][name], their, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("cell", CELLS)
def test_one_tensor_for_several_states(cell: str) -> None:
    case = Case(cell, hidden=3)
    results = []
    for module in both(case):
        x, (state, *_) = case.operands()
        hx = (state, state) if cell == "lstm" else state
        y, _ = module(x, hx)
        results.append(torch.autograd.grad(y.pow(2).sum(), (x, state)))
    for our, their in zip(*results, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_operands_are_left_as_they_were(case: Case) -> None:
    module = case.module(pyrnnfast)
    x, states = case.operands()
    operands = [x, *states, *module.parameters()]
    before = [t.detach().clone() for t in operands]
    outputs = case.run(module, x, states)
    gradients(module, x, states, outputs)
    assert all(torch.equal(a, b) for a, b in zip(operands, before, strict=True))
    assert all(t._version == 0 for t in (x, *states))


# replace and restore -----------------------------------------------------------------------------------------------


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = torch.nn.ModuleDict({"lstm": torch.nn.LSTM(3, 4, num_layers=2, batch_first=True)})
        self.stack = torch.nn.ModuleList([torch.nn.GRU(4, 4, bidirectional=True), torch.nn.RNN(8, 4)])
        self.cells = torch.nn.Sequential(torch.nn.GRUCell(4, 4), torch.nn.RNNCell(4, 4))
        self.last = torch.nn.LSTMCell(4, 4)
        self.shared = self.last
        self.out = torch.nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.encoder["lstm"](x)
        for layer in self.stack:
            y, _ = layer(y)
        h, _ = self.last(self.cells(y[-1]))
        result: Tensor = self.out(self.shared(h)[0])
        return result


def recurrent_types(model: torch.nn.Module) -> list[type]:
    kinds = (torch.nn.RNNBase, torch.nn.RNNCellBase)
    return [type(m) for m in model.modules() if isinstance(m, kinds)]


def test_replace_and_restore() -> None:
    model = Model().eval()
    x = torch.randn(5, 3, 3)
    expected, before = model(x), recurrent_types(model)
    parameters = {name: p for name, p in model.named_parameters()}
    assert pyrnnfast.replace(model) is model
    assert recurrent_types(model) == [getattr(pyrnnfast, t.__name__) for t in before]
    assert type(model.out) is torch.nn.Linear
    assert model.shared is model.last
    assert not any(m.training for m in model.modules())
    assert dict(model.named_parameters()).keys() == parameters.keys()
    assert all(p is parameters[name] for name, p in model.named_parameters())
    torch.testing.assert_close(model(x), expected)
    kinds = recurrent_types(model)
    assert recurrent_types(pyrnnfast.replace(model)) == kinds
    assert pyrnnfast.restore(model) is model
    assert recurrent_types(model) == before
    assert recurrent_types(pyrnnfast.restore(model)) == before
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("name", NAMES)
def test_replace_a_bare_module(name: str) -> None:
    module = getattr(torch.nn, name)(3, 4)
    assert type(pyrnnfast.replace(module)) is getattr(pyrnnfast, name)
    assert type(pyrnnfast.restore(module)) is getattr(torch.nn, name)


def test_training_goes_on_after_replace() -> None:
    """The optimizer, its moments and the hooks stay; the losses are those of torch alone."""

    def train(swap: bool) -> tuple[list[float], int]:
        torch.manual_seed(0)
        model, x, target = Model(), torch.randn(5, 3, 3), torch.randn(3, 2)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        hooked: list[int] = []
        model.encoder["lstm"].register_forward_hook(lambda *args: hooked.append(1))
        losses = []
        for step in range(9):
            if swap and step in (3, 6):
                (pyrnnfast.replace if step == 3 else pyrnnfast.restore)(model)
            loss = torch.nn.functional.mse_loss(model(x), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        return losses, len(hooked)

    (ours, our_hooks), (theirs, their_hooks) = train(True), train(False)
    assert our_hooks == their_hooks == 9
    assert ours == pytest.approx(theirs, rel=1e-4)
    assert ours[-1] < ours[0]


def test_subclasses_with_a_behaviour_of_their_own_are_left_alone() -> None:
    class Special(torch.nn.LSTM):
        pass

    model = torch.nn.Sequential(Special(3, 4))
    pyrnnfast.replace(model)
    assert type(model[0]) is Special


@pytest.mark.parametrize("name", NAMES)
def test_parametrized_modules_are_replaced(name: str) -> None:
    """torch gives a parametrized module a class of its own; the module is still torch's."""
    module = getattr(torch.nn, name)(3, 4)
    weight = "weight_hh" if name.endswith("Cell") else "weight_hh_l0"
    parametrize.register_parametrization(module, weight, Doubled())
    x = torch.randn(2, 3) if name.endswith("Cell") else torch.randn(5, 2, 3)
    expected = torch.utils._pytree.tree_leaves(module(x))
    pyrnnfast.replace(module)
    assert pyrnnfast.explain(module, x).path == "fused"
    assert isinstance(module, getattr(pyrnnfast, name))
    assert parametrize.is_parametrized(module, weight)
    for a, b in zip(torch.utils._pytree.tree_leaves(module(x)), expected, strict=True):
        torch.testing.assert_close(a, b)
    pyrnnfast.restore(module)
    assert pyrnnfast.explain(module, x).path == "torch"
    assert not isinstance(module, getattr(pyrnnfast, name))
    parametrize.remove_parametrizations(module, weight)
    assert type(module) is getattr(torch.nn, name)


# Tensors of all kinds ---------------------------------------------------------------------------------------------


def assert_learns_from_frozen_features(module: torch.nn.Module, *shape: int) -> None:
    """Computed in inference mode. The gradients are those of features computed as usual."""
    found = []
    for mode in (torch.inference_mode(), torch.no_grad()):
        with mode:
            x = torch.linspace(-1, 1, math.prod(shape)).reshape(shape)
        assert x.is_inference() is (not found)
        torch.manual_seed(0)  # of dropout
        results = module(x)
        y = results if isinstance(results, Tensor) else results[0]
        found.append(torch.autograd.grad(y.sum(), list(module.parameters())))
    for frozen, usual in zip(*found, strict=True):
        assert torch.equal(frozen, usual)


@pytest.mark.parametrize("name", ["RNN", "GRU", "LSTM"])
@pytest.mark.parametrize("options", [{}, {"batch_first": True}, {"num_layers": 2, "dropout": 0.5}], ids=str)
def test_frozen_features(name: str, options: dict[str, Any]) -> None:
    """torch takes them where it saves a copy, as their layout is another."""
    assert_learns_from_frozen_features(getattr(pyrnnfast, name)(3, 5, **options), 2, 4, 3)


@pytest.mark.parametrize("name", ["RNNCell", "GRUCell", "LSTMCell"])
def test_frozen_features_of_a_step(name: str) -> None:
    assert_learns_from_frozen_features(getattr(pyrnnfast, name)(3, 5), 2, 3)


@pytest.mark.parametrize("name", ["RNNCell", "GRUCell", "LSTMCell"])
def test_sizes_that_are_numpys(name: str) -> None:
    """torch's cells take them; its layers, and so ours, do not."""
    torch.manual_seed(0)
    cell = getattr(pyrnnfast, name)(np.int64(3), np.int64(5))
    torch.manual_seed(0)
    stock = getattr(torch.nn, name)(np.int64(3), np.int64(5))
    torch.testing.assert_close(cell(torch.ones(2, 3)), stock(torch.ones(2, 3)))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_of_the_older_layout() -> None:
    """Left to torch, whose GRU takes them where their sequences are equally long."""
    torch.manual_seed(0)
    gru, x = pyrnnfast.GRU(3, 5), torch.randn(2, 4, 3)
    nested = torch.nested.nested_tensor(list(x))
    assert pyrnnfast.explain(gru, nested).path == "torch"
    torch.testing.assert_close(gru(nested)[0], gru(x)[0])


@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "dropout": 0.5}], ids=str)
def test_zeros_without_memory(options: dict[str, Any]) -> None:
    gru, x = pyrnnfast.GRU(3, 5, **options), torch.ones(4, 2, 3)
    gru.eval()
    zeros = torch._efficientzerotensor((4, 2, 3))
    torch.testing.assert_close(gru(zeros)[0], gru(torch.zeros(4, 2, 3))[0])
    gru.train()
    y, _ = gru(x)
    gradients = torch.autograd.grad(y, list(gru.parameters()), torch._efficientzerotensor(y.shape))
    assert all((g == 0).all() for g in gradients)


def test_an_expanded_state_is_copied_only_if_it_fits() -> None:
    gru, x, row = pyrnnfast.GRU(3, 5), torch.ones(4, 2, 3), torch.rand(1, 1, 5)
    torch.testing.assert_close(gru(x, row.expand(1, 2, 5))[0], gru(x, row.repeat(1, 2, 1))[0])
    with pytest.raises(RuntimeError, match=r"Expected hidden size \(1, 2, 5\), got \[1, 1099511627776, 5\]"):
        gru(x, row.expand(1, 2**40, 5))


def test_packed_frozen_features() -> None:
    """By the road that keeps all cell states."""
    lstm = pyrnnfast.LSTM(3, 5, cell_states=True)
    with torch.inference_mode():
        data = torch.ones(6, 3)
    y, _, _ = lstm(PackedSequence(data, torch.tensor([3, 2, 1])))
    y.data.sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in lstm.parameters())


@pytest.mark.parametrize("name", ["RNNCell", "GRUCell", "LSTMCell"])
def test_a_cells_biases_are_those_that_it_has(name: str) -> None:
    """Whatever `bias` says after the constructor, and one without the other."""
    for bias in (True, False):
        stock = getattr(torch.nn, name)(3, 5, bias=bias)
        ours = pyrnnfast.replace(copy.deepcopy(stock))
        x = torch.randn(2, 3)
        for said in (not bias, bias):
            stock.bias = ours.bias = said
            assert pyrnnfast.explain(ours, x).path == "fused"
            torch.testing.assert_close(ours(x), stock(x))
    stock, ours = getattr(torch.nn, name)(3, 5), getattr(pyrnnfast, name)(3, 5)
    ours.load_state_dict(stock.state_dict())
    stock.bias_ih = ours.bias_ih = None
    assert pyrnnfast.explain(ours, x).path == "torch"
    torch.testing.assert_close(ours(x), stock(x))
