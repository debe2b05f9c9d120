"""The state carried from window to window, and the language model that is trained in this way."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from cases import CELLS, Case
from torch import Tensor

import pyrnnfast
from pyrnnfast.tbptt import carry

WINDOW = 3
every_cell = pytest.mark.parametrize("cell", CELLS)
RESET = torch.tensor([False, True, False, True])


def tensors(state: Any) -> tuple[Tensor, ...]:
    return (state,) if isinstance(state, Tensor) else state


@every_cell
def test_windows_are_the_whole_sequence(cell: str) -> None:
    case = Case(cell, steps=7, batch=4, layers=2)
    module = case.module(pyrnnfast, torch.float64)
    x, states = case.operands(torch.float64)
    expected, after = module(x, case.hx(states))
    hx, outputs = case.hx(states), []
    for window in x.split(WINDOW):
        y, hx = module(window, carry(hx))
        outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(hx, after, rtol=1e-12, atol=1e-12)


@every_cell
@pytest.mark.parametrize("reset", [None, RESET], ids=["kept", "reset"])
def test_no_gradient_crosses_windows(cell: str, reset: Tensor | None) -> None:
    case = Case(cell, steps=6, batch=4)
    module = case.module(pyrnnfast)
    x, states = case.operands()
    _, hx = module(x[:WINDOW], case.hx(states))
    carried = carry(hx, reset)
    assert all(t.requires_grad for t in tensors(hx))
    assert not any(t.requires_grad for t in tensors(carried))
    y, _ = module(x[WINDOW:], carried)
    y.sum().backward()
    assert x.grad is not None
    assert x.grad[WINDOW:].abs().min() > 0
    assert x.grad[:WINDOW].abs().max() == 0
    assert all(s.grad is None for s in states)


@every_cell
def test_a_reset_begins_anew_in_its_rows_alone(cell: str) -> None:
    """As every sequence by itself has it, and as a layer's own `reset` in the first step of the window."""
    case = Case(cell, steps=6, batch=4)
    module = case.module(pyrnnfast, torch.float64)
    x, states = case.operands(torch.float64)
    _, hx = module(x[:WINDOW], case.hx(states))
    y, after = module(x[WINDOW:], carry(hx, RESET))
    for b, anew in enumerate(RESET.tolist()):
        one = [None if anew else s[:, b : b + 1] for s in tensors(hx)]
        own, last = module(x[WINDOW:, b : b + 1], None if anew else case.hx(tuple(one)))
        torch.testing.assert_close(y[:, b : b + 1], own, rtol=1e-12, atol=1e-12)
        for found, expected in zip(tensors(after), tensors(last), strict=True):
            torch.testing.assert_close(found[:, b : b + 1], expected, rtol=1e-12, atol=1e-12)
    reset = torch.zeros(WINDOW, 4, dtype=torch.bool)
    reset[0] = RESET
    same, _ = module(x[WINDOW:], carry(hx), reset=reset)
    torch.testing.assert_close(y, same, rtol=1e-12, atol=1e-12)


@every_cell
def test_states_of_cells(cell: str) -> None:
    case = Case(cell, batch=4, single_step=True)
    module = case.module(pyrnnfast)
    x, states = case.operands()
    hx = module(x, case.hx(states))
    for found, before in zip(tensors(carry(hx, RESET)), tensors(hx), strict=True):
        assert not found.requires_grad
        assert torch.equal(found[~RESET], before[~RESET])
        assert found[RESET].abs().max() == 0 < before[RESET].abs().max()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_reset_ends_nan(bad: float) -> None:
    state = torch.full((2, 4, 5), bad)
    found = carry(state, RESET)
    assert torch.equal(found[:, RESET], torch.zeros(2, 2, 5))
    assert not found[:, ~RESET].isfinite().any()
    assert not state.isfinite().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reset", [None, RESET], ids=["kept", "reset"])
def test_structure_and_dtype_are_kept(dtype: torch.dtype, reset: Tensor | None) -> None:
    h = torch.ones(1, 4, 5, dtype=dtype, requires_grad=True)
    assert carry(None, reset) is None
    for given in (h, (h, h), [h, h], [(h, h), (h, h)], (h, None)):
        leaves, structure = torch.utils._pytree.tree_flatten(given)
        found, same = torch.utils._pytree.tree_flatten(carry(given, reset))
        assert structure == same
        for t, before in zip(found, leaves, strict=True):
            assert (t is None) == (before is None)
            if t is not None:
                assert t.dtype is dtype
                assert t.shape == before.shape
                assert not t.requires_grad


STATE = torch.ones(2, 4, 5)
ERRORS: dict[str, tuple[Any, Any, type[Exception], str]] = {
    "reset of another batch": (STATE, RESET[:3], ValueError, r"reset: expected size \[4\], got \[3\]"),
    "reset of one": (STATE, RESET[:1], ValueError, r"reset: expected size \[4\], got \[1\]"),
    "reset of steps": (STATE, RESET.expand(3, 4), ValueError, r"reset: expected size \[4\], got \[3, 4\]"),
    "second of a pair": ((STATE, STATE[:, :2]), RESET, ValueError, r"reset: expected size \[2\], got \[4\]"),
    "unbatched": (STATE[0, 0], RESET, ValueError, r"reset is for states \[..., B, H\], got \[5\]"),
    "reset of integers": (STATE, RESET.long(), TypeError, "reset must be a tensor of bool"),
    "reset a list": (STATE, RESET.tolist(), TypeError, "reset must be a tensor of bool"),
    "reset a list, no state yet": (None, RESET.tolist(), TypeError, "reset must be a tensor of bool"),
    "no state": ({"h": STATE}, None, TypeError, "a state is a tensor, or tuples or lists of them, not dict"),
    "a pair of none": ((STATE, 0.0), RESET, TypeError, "a state is a tensor, or tuples or lists of them, not float"),
}


@pytest.mark.parametrize(("hx", "reset", "error", "text"), ERRORS.values(), ids=ERRORS.keys())
def test_errors(hx: Any, reset: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        carry(hx, reset)


EXAMPLE = Path(__file__).parents[1] / "examples" / "language_model.py"


def test_the_language_model_learns() -> None:
    """From about 6.5 bits per character, a guess among 90 kinds, by 2 bits at least, on text that it has not seen."""
    sizes = ["--passes", "2", "--characters", "40000", "--streams", "16", "--window", "20", "--hidden", "32"]
    result = subprocess.run([sys.executable, EXAMPLE, *sizes], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    held_out = [float(bits) for bits in re.findall(r"held out (\d+\.\d+)", result.stdout)]
    assert len(held_out) == 3, result.stdout
    assert held_out[0] > 6
    assert held_out[-1] < held_out[0] - 2


def test_named_tuples_stay_what_they_are() -> None:
    class State(NamedTuple):
        h: Tensor
        c: Tensor

    found = carry(State(torch.ones(1, 2, 3), torch.ones(1, 2, 3)), torch.tensor([True, False]))
    assert type(found) is State
    assert found.c[:, 0].eq(0).all()
