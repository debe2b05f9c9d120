"""Values and gradients of the whole table, against the textbook in float64 and against torch.nn."""

from dataclasses import replace
from functools import cache
from types import ModuleType

import pytest
import torch
from cases import CELLS, OUTPUTS, SMALL, TABLE, Case, gradients
from kernels import SCHEDULES, use
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

import pyrnnfast
from pyrnnfast import reference

Results = dict[str, Tensor]


def run(case: Case, library: ModuleType, dtype: torch.dtype, used: tuple[str, ...] = OUTPUTS) -> Results:
    module = case.module(library, dtype)
    x, states = case.operands(dtype)
    torch.manual_seed(3)  # of the dropout
    outputs = case.run(module, x, states)
    return outputs | gradients(module, x, states, outputs, used)


# Roundings of the largest element that an error may have where torch happens to be nearly exact. The largest that the
# table needs is 7, in the gradient of a GRU's initial state, a sum over 390 products.
FLOOR = 8.0


@cache
def run_torch(case: Case, dtype: torch.dtype, used: tuple[str, ...] = OUTPUTS) -> Results:
    return run(case, torch.nn, dtype, used)


@cache
def truth(case: Case, used: tuple[str, ...] = OUTPUTS) -> Results:
    """The textbook in float64, on the float32 values. Dropout inside a packed batch is torch's, in float64."""
    if case.lengths is not None and case.dropout > 0:
        return run_torch(case, torch.float64, used)
    module = case.module(torch.nn, torch.float64)
    x, states = case.operands(torch.float64)
    torch.manual_seed(3)
    outputs = case.run_reference(module, x, states)
    return outputs | gradients(module, x, states, outputs, used)


def errors(found: Results, expected: Results) -> dict[str, float]:
    """The largest error of each tensor, in units of its largest element."""
    assert found.keys() == expected.keys()
    out = {}
    for name, true in expected.items():
        assert found[name].shape == true.shape, name
        scale = max(float(true.detach().abs().max()), 1e-3)
        out[name] = float((found[name].double() - true).detach().abs().max()) / scale
    return out


def assert_as_accurate_as_torch(case: Case, found: Results, used: tuple[str, ...] = OUTPUTS) -> None:
    """float32: at most twice torch's own error, or, where torch is nearly exact, a few roundings."""
    true = truth(case, used)
    theirs = errors(run_torch(case, torch.float32, used), true)
    floor = FLOOR * torch.finfo(torch.float32).eps
    for name, error in errors(found, true).items():
        assert error <= 2 * theirs[name] + floor, f"{name}: error {error:.2e}, torch's {theirs[name]:.2e}"


@pytest.mark.parametrize("case", TABLE, ids=str)
def test_float32_is_as_accurate_as_torch(case: Case, instruction_set: str) -> None:
    assert_as_accurate_as_torch(case, run(case, pyrnnfast, torch.float32))


@pytest.mark.parametrize("case", TABLE, ids=str)
def test_float64_is_the_textbook(case: Case, instruction_set: str) -> None:
    found = run(case, pyrnnfast, torch.float64)
    for expected in (truth(case), run_torch(case, torch.float64)):
        for name, error in errors(found, expected).items():
            assert error <= 1e-13, f"{name}: {error:.2e}"


@pytest.mark.parametrize("case", TABLE, ids=str)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_values_under_any_schedule(case: Case, schedule: str, instruction_set: str) -> None:
    """The sizes of the table are small, so by themselves they would see little of how large ones are cut up."""
    use(schedule)
    assert_as_accurate_as_torch(case, run(case, pyrnnfast, torch.float32))
    for name, error in errors(run(case, pyrnnfast, torch.float64), truth(case)).items():
        assert error <= 1e-13, f"{name}: {error:.2e}"


@pytest.mark.parametrize("cell", CELLS)
def test_float32_is_as_accurate_as_torch_on_average(cell: str, instruction_set: str) -> None:
    """The table as a whole leaves less room for a systematic loss than its cases one by one."""
    ours: dict[str, list[float]] = {}
    theirs: dict[str, list[float]] = {}
    for case in TABLE:
        if case.cell != cell:
            continue
        true = truth(case)
        for results, into in ((run(case, pyrnnfast, torch.float32), ours), (run_torch(case, torch.float32), theirs)):
            for name, error in errors(results, true).items():
                into.setdefault(name.split("_l")[0], []).append(error)
    for name in ours:
        our_mean, their_mean = (sum(of[name]) / len(of[name]) for of in (ours, theirs))
        assert our_mean <= 1.25 * their_mean + 0.1 * torch.finfo(torch.float32).eps, name


_PARTIAL = [(case, (name,)) for case in SMALL for name in case.outputs]


@pytest.mark.parametrize(("case", "used"), _PARTIAL, ids=[f"{case}-only_{used[0]}" for case, used in _PARTIAL])
def test_gradients_when_one_output_is_used(case: Case, used: tuple[str, ...]) -> None:
    assert_as_accurate_as_torch(case, run(case, pyrnnfast, torch.float32, used), used)
    found = run(case, pyrnnfast, torch.float64, used)
    for name, error in errors(found, truth(case, used)).items():
        assert error <= 1e-13, f"{name}: {error:.2e}"


def strides(t: Tensor) -> list[int]:
    """Where a dimension has but one element its stride says nothing."""
    return [stride for size, stride in zip(t.shape, t.stride(), strict=True) if size > 1]


@pytest.mark.parametrize("case", TABLE, ids=str)
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
def test_layout_is_that_of_torch(case: Case, grad: bool) -> None:
    def outputs(library: ModuleType) -> list[Tensor]:
        x, states = case.operands()
        with torch.set_grad_enabled(grad):
            result = case.module(library)(case.packed(x), case.hx(states))
        if isinstance(result, Tensor):
            return [result]
        y, final = (None, result) if case.single_step else result
        if isinstance(y, PackedSequence):
            y = y.data
        final = [final] if isinstance(final, Tensor) else list(final)
        return final if y is None else [y, *final]

    ours, theirs = outputs(pyrnnfast), outputs(torch.nn)
    for our, their in zip(ours, theirs, strict=True):
        assert our.shape == their.shape
        assert strides(our) == strides(their)
        assert our.dtype == their.dtype
        assert our.requires_grad == their.requires_grad
        assert our.is_leaf == their.is_leaf
    addresses = [t.untyped_storage().data_ptr() for t in ours]
    assert len(set(addresses)) == len(addresses), "outputs share memory"


@pytest.mark.parametrize("case", [c for c in TABLE if c.lengths is not None and c.dropout == 0], ids=str)
def test_packed_output_is_indexed_as_torch_does(case: Case) -> None:
    x, states = case.operands()
    ours, theirs = (case.module(lib)(case.packed(x), case.hx(states))[0] for lib in (pyrnnfast, torch.nn))
    assert type(ours) is PackedSequence
    assert torch.equal(ours.batch_sizes, theirs.batch_sizes)
    for name in ("sorted_indices", "unsorted_indices"):
        our, their = getattr(ours, name), getattr(theirs, name)
        assert (our is None) == (their is None)
        assert our is None or torch.equal(our, their)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("bidirectional", [False, True], ids=["uni", "bi"])
def test_reference_of_ragged_rows_is_that_of_each_sequence(cell: str, bidirectional: bool) -> None:
    """The table runs the reference on one sequence at a time; double backward runs it on ragged rows."""
    case = Case(cell, lengths=(5, 3, 3, 1), bidirectional=bidirectional, layers=2)
    module = case.module(torch.nn, torch.float64)
    x, states = case.operands(torch.float64)
    packed = case.packed(x)
    assert isinstance(packed, PackedSequence)
    y, final = reference.stack(cell, packed.data, states, case.weights(module), packed.batch_sizes.tolist())
    expected = case.run_reference(module, x, states)
    assert torch.allclose(y, case.packed(expected["y"]).data, rtol=0, atol=1e-15)
    for state, name in zip(final, case.outputs[1:], strict=True):
        assert torch.allclose(state, expected[name], rtol=0, atol=1e-15)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_inference_gives_the_bits_of_training(case: Case) -> None:
    module = case.module(pyrnnfast)
    x, states = case.operands()
    with_grad = case.run(module, x, states)
    with torch.no_grad():
        without = case.run(module, x, states)
    with torch.inference_mode():
        inference = case.run(module, x, states)
    for name, t in with_grad.items():
        assert torch.equal(t, without[name])
        assert torch.equal(t, inference[name])
        assert inference[name].is_inference()


@pytest.mark.parametrize("cell", CELLS)
def test_large_inputs_saturate(cell: str) -> None:
    """Gates far out in the flat parts, and values that overflow on the way, as torch has them."""
    case = Case(cell, steps=4, batch=4, hidden=17, initial=False)
    for scale in (30.0, 1e4, 1e30):
        found = []
        for library in (pyrnnfast, torch.nn):
            x, _ = case.operands()
            with torch.no_grad():
                found.append(case.run(case.module(library), x * scale, ())["y"])
        assert torch.allclose(found[0], found[1], rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("cell", CELLS)
def test_long_sequences(cell: str) -> None:
    case = replace(Case(cell), steps=1000, batch=2, hidden=8, bidirectional=True)
    for name, error in errors(run(case, pyrnnfast, torch.float64), run_torch(case, torch.float64)).items():
        assert error <= 1e-12, f"{name}: {error:.2e}"


@pytest.mark.parametrize("cell", CELLS)
def test_gradients_of_very_many_rows_stay_exact(cell: str) -> None:
    """Sums over 200,000 rows of one sign, in parts: as one chain of float32 they would be off by 10⁻⁴ and more."""
    steps, batch = 3125, 64
    case = Case(cell, steps=steps, batch=batch, inputs=64, hidden=16, initial=False)
    module = case.module(pyrnnfast)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
        # Gates that let all pass alike at every step.
        module.bias_ih_l0.fill_(0.1)
    x = torch.full((steps, batch, 64), 0.1)
    results = {}
    for dtype in (torch.float32, torch.float64):
        y, _ = module.to(dtype)(x.to(dtype))
        results[dtype] = torch.autograd.grad(y.sum(), list(module.parameters()))
    for found, expected in zip(results[torch.float32], results[torch.float64], strict=True):
        # 256 rows at a time, and then the sums of those.
        roundings = 256 + steps * batch / 256
        assert (found.double() - expected).abs().max() <= roundings * 2.0**-24 * expected.abs().max()
