"""Weights that stay packed from call to call (pyrnnfast.prepack): the same numbers, changes noticed, nothing left over.

That they do stay is seen by changing one number behind torch's back, where nobody looks for it.
"""

import copy
import gc
import io
import pickle
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import CELLS, TABLE, Case
from torch import Tensor
from torch.nn.utils import parametrizations

import pyrnnfast
from pyrnnfast import _cpu, passes

# All that are plain: nothing happens between layers, and a step has a batch.
PLAIN = [
    *(c for c in TABLE if not (c.dropout > 0 and c.layers > 1) and not (c.single_step and c.unbatched)),
    *(Case(cell, steps=1, batch=batch, hidden=hidden) for cell in CELLS for batch in (1, 9) for hidden in (16, 37)),
]


def flat(result: Any) -> list[Tensor]:
    return [t for t in torch.utils._pytree.tree_leaves(result) if isinstance(t, Tensor)]


def same(a: Any, b: Any) -> bool:
    return all(torch.equal(x, y) for x, y in zip(flat(a), flat(b), strict=True))


@pytest.mark.parametrize(("dtype", "threads"), [(torch.float32, 1), *((dtype, 3) for dtype in passes.DTYPES)], ids=str)
@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_the_same_bits_as_of_weights_packed_at_each_call(case: Case, dtype: torch.dtype, threads: int) -> None:
    """But of one row, for which so few weights are not kept."""
    torch.set_num_threads(threads)
    _cpu.set_threshold("serial_operations", 0)
    case = replace(case, dropout=0.0)
    module, prepacked = case.module(pyrnnfast, dtype), pyrnnfast.prepack(case.module(pyrnnfast, dtype))
    x, states = case.operands(dtype)
    with torch.no_grad():
        _cpu.set_threshold("unpacked_rows", -1 if case.steps * case.batch == 1 else 0)
        expected = module(case.packed(x), case.hx(states))
        _cpu.set_threshold("unpacked_rows", -1)
        torch.testing.assert_close(prepacked(case.packed(x), case.hx(states)), expected)
        for _ in range(3):  # the call that packs, and others
            assert same(prepacked(case.packed(x), case.hx(states)), expected)


@pytest.mark.parametrize("case", [Case(cell, steps=3, batch=4, hidden=37) for cell in CELLS], ids=str)
def test_right_on_every_instruction_set(case: Case, instruction_set: str) -> None:
    truth = case.module(pyrnnfast, torch.float64)
    module = pyrnnfast.prepack(case.module(pyrnnfast))
    x, states = case.operands()
    expected = case.run_reference(truth, x.double(), tuple(s.double() for s in states))
    with torch.inference_mode():
        for _ in range(3):
            found = case.run(module, x, states)
            torch.testing.assert_close(found, {k: v.float() for k, v in expected.items()}, rtol=1e-5, atol=1e-5)


def test_instruction_sets_by_turns() -> None:
    """Of 16 units, for which all of them have as much memory."""
    module = pyrnnfast.prepack(pyrnnfast.GRU(5, 16))
    x = torch.randn(2, 3, 5)
    with torch.no_grad():
        expected = module(x)
        for name in _cpu.instruction_sets() * 2:
            _cpu.select_instruction_set(name)
            torch.testing.assert_close(module(x), expected)


STEP = Case("lstm", steps=1, batch=3, inputs=20, hidden=33)
"""Whose weights have rows and columns, such as the second, of which no element is looked at."""


def called(module: torch.nn.Module, *operands: Any) -> Any:
    """The results of a call that finds its weights packed."""
    for _ in range(2):
        module(*operands)
    return module(*operands)


def secretly_changed(module: torch.nn.Module, name: str = "weight_hh_l0") -> None:
    """One number of it."""
    weight = module.get_parameter(name)
    version = weight._version
    weight.data[1, 1] += 100
    assert weight._version == version


@pytest.mark.parametrize("name", ["weight_ih_l0", "weight_hh_l0"])
def test_they_stay(name: str) -> None:
    x, states = STEP.operands()
    module, fresh = pyrnnfast.prepack(STEP.module(pyrnnfast)), STEP.module(pyrnnfast)
    with torch.no_grad():
        before = called(module, x, states)
        for m in (module, fresh):
            secretly_changed(m, name)
        changed = fresh(x, states)
        assert not torch.allclose(changed[0], before[0])
        assert same(module(x, states), before)
    # With gradients they are not used: weights of those change.
    torch.testing.assert_close(module(x, states), changed)
    with torch.no_grad():
        assert same(module(x, states), before)
        pyrnnfast.prepack(module)
        torch.testing.assert_close(called(module, x, states), changed)


def test_other_calls_share_them() -> None:
    x, states = STEP.operands()
    module, fresh = pyrnnfast.prepack(STEP.module(pyrnnfast)), STEP.module(pyrnnfast)
    with torch.no_grad():
        before = called(module, x, states)
        secretly_changed(module)
        torch.set_num_threads(2)
        _cpu.set_threshold("serial_operations", 0)
        assert same(module(x, states), before)
        longer = module(x.expand(4, -1, -1), states)
        torch.testing.assert_close(longer[0][:1], before[0])
        torch.testing.assert_close(module(x[:, :2], tuple(s[:, :2].contiguous() for s in states))[0], before[0][:, :2])
        # A first step without a state has no use for W_hh, and is as it would be.
        torch.testing.assert_close(module(x), fresh(x))
        assert same(module(x, states), before)


def test_many_weights_stay_for_one_row() -> None:
    module = pyrnnfast.prepack(pyrnnfast.GRUCell(300, 200))
    x, h = torch.randn(1, 300), torch.randn(1, 200)
    with torch.no_grad():
        before = called(module, x, h)
        module.weight_hh.data[1, 1] += 100
        assert same(module(x, h), before)


def test_explain_tells_how_much() -> None:
    module = pyrnnfast.prepack(pyrnnfast.LSTM(256, 256))
    x = torch.randn(2, 1, 256)
    with torch.no_grad():
        assert pyrnnfast.explain(module, x).reason == "served by pyrnnfast._cpu (prepack keeps 0.0 MiB)"
        called(module, x)
        assert pyrnnfast.explain(module, x).reason == "served by pyrnnfast._cpu (prepack keeps 2.0 MiB)"


def step_of_an_optimizer(module: torch.nn.Module) -> None:
    with torch.enable_grad():
        module(torch.ones(2, 3, 20))[0].sum().backward()
    torch.optim.SGD(module.parameters(), lr=0.1).step()


def fused_step_of_an_optimizer(module: torch.nn.Module) -> None:
    """Which torch does not count, and of which the sample need not see anything."""
    weight = module.get_parameter("weight_hh_l0")
    weight.grad = torch.zeros_like(weight)
    weight.grad[1, 1] = 100.0
    version = weight._version
    torch.optim.SGD([weight], lr=0.1, fused=True).step()
    assert weight._version == version


def in_place(module: torch.nn.Module) -> None:
    module.get_parameter("weight_hh_l0")[1, 1] = 3.0


def a_slice_in_place(module: torch.nn.Module) -> None:
    module.get_parameter("weight_ih_l0")[:5].mul_(2.0)


def by_a_view_of_data(module: torch.nn.Module) -> None:
    module.get_parameter("weight_hh_l0").data.mul_(1.001)


def by_numpy(module: torch.nn.Module) -> None:
    module.get_parameter("weight_ih_l0").detach().numpy()[:] *= 1.5


def other_data(module: torch.nn.Module) -> None:
    weight = module.get_parameter("weight_hh_l0")
    for _ in range(3):  # each time where the last but one has been, unless somebody still has it
        weight.data = weight.data.clone()
    weight.data[1, 1] = 3.0


def other_parameter(module: torch.nn.Module) -> None:
    changed = module.get_parameter("weight_hh_l0").clone()
    changed[1, 1] = 3.0
    module.weight_hh_l0 = torch.nn.Parameter(changed)


def transposed(module: torch.nn.Module) -> None:
    """Not contiguous: what is multiplied with is a copy."""
    weight = module.get_parameter("weight_hh_l0")
    weight.data = weight.data.as_strided(weight.shape, (1, 4 * 33))


def parameter_of_the_same_data(module: torch.nn.Module) -> None:
    """With its own count of changes."""
    module.weight_hh_l0 = torch.nn.Parameter(module.get_parameter("weight_hh_l0").data)
    module.weight_hh_l0[1, 1] += 3.0
    assert module.weight_hh_l0._version > 0


def parameters_of_the_same_data(module: torch.nn.Module) -> None:
    for _ in range(2):
        parameter_of_the_same_data(module)


def loaded(module: torch.nn.Module) -> None:
    state = copy.deepcopy(module.state_dict())
    state["weight_hh_l0"][1, 1] = 3.0
    module.load_state_dict(state)


def assigned(module: torch.nn.Module) -> None:
    state = copy.deepcopy(module.state_dict())
    state["weight_hh_l0"][1, 1] = 3.0
    module.load_state_dict(state, assign=True)


def rounded(module: torch.nn.Module) -> None:
    module.half().float()


def moved(module: torch.nn.Module) -> None:
    module.share_memory()
    module.get_parameter("weight_hh_l0")[1, 1] = 3.0


def of_double_precision(module: torch.nn.Module) -> None:
    module.double()


CHANGES = [
    step_of_an_optimizer,
    fused_step_of_an_optimizer,
    in_place,
    a_slice_in_place,
    by_a_view_of_data,
    by_numpy,
    other_data,
    other_parameter,
    parameter_of_the_same_data,
    parameters_of_the_same_data,
    transposed,
    loaded,
    assigned,
    rounded,
    moved,
    of_double_precision,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("without_gradients", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference"])
@pytest.mark.parametrize("steps", [1, 5])
def test_changes_are_noticed(
    change: Callable[[torch.nn.Module], None], steps: int, without_gradients: Callable[[], Any]
) -> None:
    case = replace(STEP, steps=steps)
    module, prepacked = case.module(pyrnnfast), pyrnnfast.prepack(case.module(pyrnnfast))
    x, states = case.operands()
    with without_gradients():
        before = called(prepacked, x, states)
    for _ in range(2):
        with torch.no_grad():
            change(module)
            change(prepacked)
        dtype = module.get_parameter("weight_hh_l0").dtype
        own = x.to(dtype), tuple(s.to(dtype) for s in states)
        with without_gradients():
            expected = module(*own)
            for _ in range(3):
                found = prepacked(*own)
                torch.testing.assert_close(found, expected)
    assert not torch.equal(found[0], before[0])


def test_changes_in_inference_mode() -> None:
    module, prepacked = STEP.module(pyrnnfast), pyrnnfast.prepack(STEP.module(pyrnnfast))
    x, states = STEP.operands()
    with torch.inference_mode():
        called(prepacked, x, states)
        for m in (module, prepacked):
            in_place(m)
        torch.testing.assert_close(prepacked(x, states), module(x, states))


def test_weights_of_inference_mode_are_packed_each_time() -> None:
    """torch does not count their changes."""
    with torch.inference_mode():
        module, fresh = (STEP.module(pyrnnfast) for _ in range(2))
        x, states = STEP.operands()
        pyrnnfast.prepack(module)
        for _ in range(4):
            torch.testing.assert_close(module(x, states), fresh(x, states))
            for m in (module, fresh):
                m.get_parameter("weight_hh_l0")[1, 1] += 100


def test_bidirectional_stack_of_which_one_weight_changes() -> None:
    case = Case("gru", steps=1, batch=2, inputs=20, hidden=33, layers=3, bidirectional=True)
    module, prepacked = case.module(pyrnnfast), pyrnnfast.prepack(case.module(pyrnnfast))
    x, states = case.operands()
    with torch.no_grad():
        for name, _ in module.named_parameters():
            called(prepacked, x, case.hx(states))
            for m in (module, prepacked):
                m.get_parameter(name).view(-1)[-2] += 5.0
            torch.testing.assert_close(prepacked(x, case.hx(states)), module(x, case.hx(states)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("projected", [0, 7])
def test_narrow_weights_for_few_and_for_many_rows(dtype: torch.dtype, projected: int, instruction_set: str) -> None:
    case = replace(STEP, projected=projected, steps=2)
    module, prepacked = case.module(pyrnnfast, dtype), pyrnnfast.prepack(case.module(pyrnnfast, dtype))
    _cpu.set_threshold("serial_operations", 0)
    with torch.no_grad():
        for batch in (1, 20, 1, 20, 9, 1):
            x = torch.randn(2, batch, 20).to(dtype)
            for threads in (1, 3):
                torch.set_num_threads(threads)
                torch.testing.assert_close(prepacked(x), module(x))


def test_all_modules_of_a_model_and_none_left_behind() -> None:
    model = torch.nn.ModuleDict({"a": pyrnnfast.LSTM(20, 33), "b": pyrnnfast.GRUCell(3, 4), "c": torch.nn.GRU(3, 4)})
    assert pyrnnfast.prepack(model) is model
    assert [hasattr(m, "_prepacked") and m._prepacked is not None for m in model.values()] == [True, True, False]
    stock = model["a"].to_torch()
    assert set(vars(stock)) == set(vars(torch.nn.LSTM(20, 33)))
    assert pyrnnfast.prepack(model, False) is model
    assert all("_prepacked" not in vars(m) for m in model.values())
    pyrnnfast.restore(pyrnnfast.prepack(model))
    assert set(vars(model["a"])) == set(vars(torch.nn.LSTM(20, 33)))
    with pytest.raises(ValueError, match="no recurrent module of pyrnnfast"):
        pyrnnfast.prepack(torch.nn.Sequential(torch.nn.LSTM(3, 4)))
    pyrnnfast.prepack(torch.nn.Linear(1, 1), False)


def by_file(module: torch.nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, lambda m: pickle.loads(pickle.dumps(m)), by_file])
def test_copies(copied: Callable[[torch.nn.Module], Any]) -> None:
    module = pyrnnfast.prepack(STEP.module(pyrnnfast))
    x, states = STEP.operands()
    with torch.no_grad():
        before = called(module, x, states)
        other = copied(module)
        assert isinstance(other._prepacked, _cpu.Prepacked)
        assert same(called(other, x, states), before)
        if other.weight_hh_l0 is not module.get_parameter("weight_hh_l0"):
            assert other._prepacked is not module._prepacked
            other.weight_hh_l0.zero_()
            assert not same(other(x, states), before)
        assert same(called(module, x, states), before)


def test_weights_that_are_not_the_modules_own() -> None:
    module = pyrnnfast.prepack(STEP.module(pyrnnfast))
    x, states = STEP.operands()
    with torch.no_grad():
        before = called(module, x, states)
        zeros = {name: torch.zeros_like(p) for name, p in module.named_parameters()}
        given = torch.func.functional_call(module, zeros, (x, states))
        torch.testing.assert_close(given[0][0], torch.sigmoid(torch.tensor(0.0)) * torch.tanh(states[1] * 0.5)[0])
        assert same(called(module, x, states), before)
    parametrizations.weight_norm(module, "weight_hh_l0")
    assert isinstance(module.parametrizations.weight_hh_l0.original0, Tensor)  # type: ignore[union-attr]
    with torch.no_grad():
        for _ in range(3):
            module.parametrizations.weight_hh_l0.original0.mul_(1.1)  # type: ignore[union-attr]
            expected = pyrnnfast.functional.lstm(x, states, [getattr(module, n) for n in module._flat_weights_names])  # type: ignore[attr-defined]
            torch.testing.assert_close(module(x, states), expected)


def test_compiled() -> None:
    pyrnnfast.enable_compile()
    module = pyrnnfast.prepack(STEP.module(pyrnnfast))
    x, states = STEP.operands()
    with torch.no_grad():
        compiled = torch.compile(module, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x, states), module(x, states))


def test_nothing_stays_alive() -> None:
    module = pyrnnfast.prepack(STEP.module(pyrnnfast))
    x, states = STEP.operands()
    with torch.no_grad():
        module(x, states)
    weight = weakref.ref(module.get_parameter("weight_hh_l0"))
    module.get_parameter("weight_hh_l0").register_hook(lambda g, owner=module: g)  # a cycle
    gone = weakref.ref(module)
    del module
    gc.collect()
    assert gone() is None
    assert weight() is None


def test_one_weight_in_two_places() -> None:
    case = replace(STEP, layers=2, inputs=33)
    module, prepacked = case.module(pyrnnfast), pyrnnfast.prepack(case.module(pyrnnfast))
    x, states = case.operands()
    with torch.no_grad():
        for m in (module, prepacked):
            m.weight_hh_l1 = m.weight_hh_l0
            m.weight_ih_l1.data = m.weight_ih_l0.data  # of which each counts its own changes
        called(prepacked, x, states)
        for name in ("weight_hh_l0", "weight_ih_l0"):
            for m in (module, prepacked):
                m.get_parameter(name)[1, 1] += 100
            torch.testing.assert_close(called(prepacked, x, states), module(x, states))


def test_what_is_kept_for_as_many_matrices_of_other_layers() -> None:
    """Six of two layers with projections, six of three layers: the same tensors, in the same memory."""
    keeping = _cpu.Prepacked()
    memory = torch.randn(4 * 6 * 6)
    weights = tuple(torch.empty(0) for _ in range(6))
    x = torch.randn(2, 3, 6)

    def call(layers: int, shapes: tuple[tuple[int, int], ...], own: _cpu.Prepacked | None) -> Any:
        for weight, (n, k) in zip(weights, shapes * layers, strict=True):
            weight.data = memory[: n * k].view(n, k)
        form, outputs = ("lstm", layers, 1, False, False), shapes[1][1]
        return _cpu.forward_plain((Tensor,), form, x, None, weights, 6, 6, outputs, None, False, own, 1)

    for _ in range(3):
        for layers, shapes in ((2, ((24, 6), (24, 6), (6, 6))), (3, ((24, 6), (24, 6)))):
            expected = call(layers, shapes, None)
            assert expected is not None
            for _ in range(3):
                torch.testing.assert_close(call(layers, shapes, keeping), expected)


def test_junk() -> None:
    for junk in (object(), 3, STEP):
        with pytest.raises(TypeError, match="prepacked must be"):
            _cpu.forward_plain((), (), None, None, (), 1, 1, 1, None, False, junk, 1)  # type: ignore[arg-type]


FORKING = """
import os, threading, torch, pyrnnfast
module, x, h = pyrnnfast.prepack(pyrnnfast.GRUCell(20, 33)), torch.ones(3, 20), torch.ones(3, 33)
stop = False
def call():
    with torch.no_grad():
        while not stop:
            module(x, h)
with torch.no_grad():
    expected = [module(x, h) for _ in range(3)][-1]
threads = [threading.Thread(target=call) for _ in range(2)]
for thread in threads:
    thread.start()
codes = []
for _ in range(10):
    child = os.fork()
    if child == 0:
        with torch.no_grad():
            os._exit(0 if all(torch.equal(module(x, h), expected) for _ in range(3)) else 1)
    codes.append(os.waitpid(child, 0)[1])
stop = True
print(codes)
"""


def test_forked_beside_calls() -> None:
    result = subprocess.run([sys.executable, "-c", FORKING], capture_output=True, text=True, timeout=120, check=True)
    assert result.stdout == f"{[0] * 10}\n"


def test_threads_of_python_share_them_while_weights_change() -> None:
    module, fresh = pyrnnfast.prepack(STEP.module(pyrnnfast)), STEP.module(pyrnnfast)
    x, states = STEP.operands()
    count, rounds = 4, 50
    expected: list[Any] = []
    wrong: list[int] = []

    def change() -> None:
        with torch.no_grad():
            for m in (module, fresh):
                m.get_parameter("weight_hh_l0")[1, 1] += 1
            expected.append(fresh(x, states))

    begin, end = threading.Barrier(count, action=change), threading.Barrier(count)

    def call() -> None:
        for k in range(rounds):
            begin.wait()
            for _ in range(3):
                with torch.no_grad():
                    found = flat(module(x, states))
                if not all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, flat(expected[k]), strict=True)):
                    wrong.append(k)
            end.wait()

    threads = [threading.Thread(target=call) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(expected) == rounds
    assert not wrong
