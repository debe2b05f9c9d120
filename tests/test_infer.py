"""The shortest road, of calls without gradients: who takes it, that it gives the same bits, and what does not."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import CELLS, TABLE, Case
from torch import Tensor

import pyrnnfast
from pyrnnfast import _cpu

PLAIN = [c for c in TABLE if c.layers == 1 and not (c.bidirectional or c.batch_first or c.lengths or c.unbatched)]


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each time that the road is tried, whether it leads anywhere."""
    found: list[bool] = []
    real = _cpu.infer

    def watched(*args: Any) -> Any:
        result = real(*args)
        found.append(result is not None)
        return result

    monkeypatch.setattr(_cpu, "infer", watched)
    return found


def flat(result: Any) -> list[Tensor]:
    leaves: list[Tensor] = torch.utils._pytree.tree_leaves(result)
    return leaves


@pytest.mark.parametrize("case", PLAIN, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_plain_calls_take_it_and_get_the_same_bits(case: Case, dtype: torch.dtype, taken: list[bool]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # dropout of a single layer
        module = case.module(pyrnnfast, dtype)
    x, states = case.operands(dtype)
    longer = flat(module(x, case.hx(states)))
    assert taken == []
    for without_gradients in (torch.no_grad, torch.inference_mode):
        with without_gradients():
            shorter = flat(module(x, case.hx(states)))
        assert [t.shape for t in shorter] == [t.shape for t in longer]
        assert all(torch.equal(a, b) and a.dtype is b.dtype for a, b in zip(shorter, longer, strict=True))
        assert not any(t.requires_grad for t in shorter)
    assert taken == [True, True]
    storages = [t.untyped_storage().data_ptr() for t in shorter]
    assert len(set(storages)) == len(storages), "results share memory"


ODDITIES: dict[str, Callable[[Case, torch.nn.Module, Tensor, tuple[Tensor, ...]], tuple[Any, Any]]] = {
    "rows_apart": lambda case, m, x, s: (torch.stack([x, x], -1)[..., 0], case.hx(s)),
    "expanded": lambda case, m, x, s: (x[:1].expand(x.shape), case.hx(s)),
    "negated": lambda case, m, x, s: (torch._neg_view(x), case.hx(s)),
    "states_apart": lambda case, m, x, s: (x, case.hx(tuple(torch.stack([t, t], -1)[..., 0] for t in s))),
    "list_of_states": lambda case, m, x, s: (x, list(s) if case.cell == "lstm" else s[0]),
}


@pytest.mark.parametrize("oddity", ODDITIES)
@pytest.mark.parametrize("single_step", [False, True], ids=["layer", "cell"])
@pytest.mark.parametrize("cell", CELLS)
def test_oddities_come_out_right(cell: str, single_step: bool, oddity: str) -> None:
    case = Case(cell, steps=3, batch=4, hidden=19, single_step=single_step)
    module = case.module(pyrnnfast)
    x, states = (t.detach() if isinstance(t, Tensor) else tuple(s.detach() for s in t) for t in case.operands())
    odd_x, odd_hx = ODDITIES[oddity](case, module, x, states)
    expected = flat(pyrnnfast.restore(case.module(pyrnnfast))(odd_x, odd_hx))
    with torch.no_grad():
        torch.testing.assert_close(flat(module(odd_x, odd_hx)), expected)


BAD: dict[str, Callable[[Case, Tensor, Any], tuple[Any, Any]]] = {
    "features": lambda case, x, hx: (x[..., :-1], hx),
    "dtype": lambda case, x, hx: (x.double(), hx),
    "hidden_size": lambda case, x, hx: (x, torch.utils._pytree.tree_map(lambda t: t[..., :-1], hx)),
    "batch": lambda case, x, hx: (x, torch.utils._pytree.tree_map(lambda t: t[..., :-1, :], hx)),
    "dimensions": lambda case, x, hx: (x[None], hx),
    "states_of_another_layout": lambda case, x, hx: (x, torch.utils._pytree.tree_map(lambda t: t[None], hx)),
    "no_tensor": lambda case, x, hx: (x.tolist(), hx),
    "pair": lambda case, x, hx: (x, hx[0] if case.cell == "lstm" else (hx, hx)),
}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("single_step", [False, True], ids=["layer", "cell"])
@pytest.mark.parametrize("cell", CELLS)
def test_bad_calls_raise_what_they_raise_elsewhere(cell: str, single_step: bool, bad: str) -> None:
    case = Case(cell, steps=3, batch=4, hidden=19, single_step=single_step)
    module = case.module(pyrnnfast)
    x, states = case.operands()
    bad_x, bad_hx = BAD[bad](case, x.detach(), case.hx(tuple(s.detach() for s in states)))
    with pytest.raises(Exception) as longer:
        module(bad_x, bad_hx)
    with torch.no_grad(), pytest.raises(type(longer.value)) as shorter:
        module(bad_x, bad_hx)
    assert str(shorter.value) == str(longer.value)


def test_changed_weights_are_seen(taken: list[bool]) -> None:
    """By parametrizations, in place, and through ``functional_call``."""
    module = pyrnnfast.GRU(4, 5)
    x = torch.randn(2, 3, 4)
    with torch.no_grad():
        first, _ = module(x)
        module.weight_hh_l0.mul_(2)
        second, _ = module(x)
        other = {name: p + 1 for name, p in module.named_parameters()}
        third, _ = torch.func.functional_call(module, other, (x,))
        torch.nn.utils.parametrizations.spectral_norm(module, "weight_hh_l0").eval()
        fourth, _ = module(x)
        results = [first, second, third, fourth]
        assert all(not torch.equal(a, b) for k, a in enumerate(results) for b in results[:k])
        torch.testing.assert_close(fourth, pyrnnfast.restore(module)(x)[0])
    assert len(taken) == 4


def test_junk_raises_or_is_refused() -> None:
    types = (Tensor, torch.nn.Parameter)
    weights = (torch.ones(9, 4), torch.ones(9, 3), torch.ones(9), torch.ones(9))
    good = (types, "gru", 4, 3, torch.ones(2, 1, 4), None, weights, 1)
    assert _cpu.infer(*good) is not None
    for index, junk in enumerate(((), "no cell", 5, 4, object(), 3, (), None)):
        bad = (*good[:index], junk, *good[index + 1 :])
        if index == len(good) - 1:
            with pytest.raises(TypeError, match="threads must be an int"):
                _cpu.infer(*bad)
        else:
            assert _cpu.infer(*bad) is None, index
    for index in (0, 6):
        with pytest.raises(TypeError, match="must be a tuple"):
            _cpu.infer(*good[:index], [], *good[index + 1 :])
    for k in range(4):
        for junk in (None, torch.ones(9, 4, 1), torch.ones(2), torch.ones(9, 4, device="meta"), "x"):
            assert _cpu.infer(*good[:6], (*weights[:k], junk, *weights[k + 1 :]), 1) is None, (k, junk)
