"""From module to gradients: the whole of the Python road to the CUDA kernels, with their emulation at its end.

CPU tensors stand for CUDA tensors, as in tests/test_cuda.py, which has the kernels of the CPU there.
"""

from collections.abc import Iterator

import _emulation
import pytest
import stand_in
import torch
from cases import CELLS, Case, gradients, result_weights
from emulated import NUMBERS
from test_correctness import assert_as_accurate_as_torch, errors, run, truth

import pyrnnfast
from pyrnnfast import cuda


def _cases() -> Iterator[Case]:
    for cell in CELLS:
        yield Case(cell, hidden=19, batch=9)
        yield Case(cell, layers=2, bidirectional=True, batch_first=True)
        yield Case(cell, bias=False, initial=False, steps=5)
        yield Case(cell, unbatched=True)
        yield Case(cell, lengths=(2, 5, 1, 4, 3), hidden=18, bidirectional=True)
        yield Case(cell, lengths=(6, 6, 2, 2, 2, 1, 1), layers=2, initial=False)
        yield Case(cell, single_step=True, hidden=17)
        yield Case(cell, steps=1, initial=False)


CASES = tuple(_cases())

# Of the norm of a result: what several steps, layers and the products after them make of one rounding each.
ROUNDINGS = 4


@pytest.fixture
def emulation(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = torch.backends.cudnn.allow_tf32
    stand_in.install(monkeypatch, _emulation)
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.mark.parametrize("case", CASES, ids=str)
def test_step_form(case: Case, emulation: None) -> None:
    torch.backends.cudnn.allow_tf32 = False
    with cuda.use("step"):
        assert_explained(case, torch.float32, "fused")
        assert_as_accurate_as_torch(case, run(case, pyrnnfast, torch.float32))
        for name, error in errors(run(case, pyrnnfast, torch.float64), truth(case)).items():
            assert error <= 1e-13, f"{name}: {error:.2e}"


def assert_explained(case: Case, dtype: torch.dtype, path: str) -> None:
    """Not by torch's layers, which would be right too."""
    x, states = case.operands(dtype)
    said = pyrnnfast.explain(case.module(pyrnnfast, dtype), case.packed(x), case.hx(states))
    assert said.path == path, said


@pytest.mark.parametrize("case", [c for c in CASES if c.steps > 1 and not c.single_step], ids=str)
@pytest.mark.parametrize("numbers", ["tf32", "bfloat16", "float16"])
def test_persistent_form(case: Case, numbers: str, emulation: None) -> None:
    """Against float64 on the operands as they are rounded; in norm, as a ReLU at its kink may go either way."""
    torch.backends.cudnn.allow_tf32 = True
    n = NUMBERS[numbers]
    with cuda.use("persistent"):
        assert_explained(case, n.dtype, "persistent")
        found = run(case, pyrnnfast, n.dtype)
    module, (x, states) = case.module(torch.nn, n.dtype).double(), case.operands(n.dtype)
    x, states = x.detach().double().requires_grad_(), tuple(s.detach().double().requires_grad_() for s in states)
    outputs = case.run_reference(module, x, states)
    weights = {name: t.to(n.dtype).double() for name, t in result_weights(outputs).items()}
    expected = outputs | gradients(module, x, states, outputs, weights=weights)
    assert found.keys() == expected.keys()
    for name, t in expected.items():
        distance = float((found[name].detach().double() - t.detach()).norm() / t.detach().norm())
        assert distance <= ROUNDINGS * n.coarsest, f"{name}: {distance / n.coarsest:.1f} roundings"
