"""Random shapes, lengths and options, against the textbook and torch.nn.

``HYPOTHESIS_PROFILE=thorough`` tries many more, and others in every run.
"""

import torch
from cases import CELLS, Case, gradients
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import pyrnnfast
from pyrnnfast import _cpu

# Small numbers are likelier to meet in a fault, large ones reach more blocks and tiles.
sizes = st.one_of(st.integers(1, 9), st.integers(1, 70))


@st.composite
def cases(draw: st.DrawFn, packed: bool) -> Case:
    cell = draw(st.sampled_from(CELLS))
    options = {
        "inputs": draw(st.integers(1, 12)),
        "hidden": draw(sizes),
        "bias": draw(st.booleans()),
        "initial": draw(st.booleans()),
    }
    if not packed and draw(st.integers(0, 5)) == 0:
        return Case(cell, batch=draw(st.integers(1, 20)), single_step=True, **options)
    options |= {
        "layers": draw(st.integers(1, 2 if packed else 3)),
        "bidirectional": draw(st.booleans()),
        "batch_first": draw(st.booleans()),
    }
    if packed:
        return Case(cell, lengths=tuple(draw(st.lists(st.integers(1, 8), min_size=1, max_size=9))), **options)
    unbatched = draw(st.integers(0, 4)) == 0
    return Case(cell, draw(st.integers(1, 12)), draw(st.integers(1, 20)), unbatched=unbatched, **options)


def results(case: Case, dtype: torch.dtype, how: str, seed: int) -> dict[str, Tensor]:
    module = case.module(pyrnnfast if how == "ours" else torch.nn, dtype, seed)
    x, states = case.operands(dtype, seed + 1)
    outputs = (case.run_reference if how == "reference" else case.run)(module, x, states)
    return outputs | gradients(module, x, states, outputs)


def check(case: Case, isa: str, seed: int) -> None:
    _cpu.select_instruction_set(isa)
    true = results(case, torch.float64, "reference", seed)
    exact = results(case, torch.float64, "ours", seed)
    single = results(case, torch.float32, "ours", seed)
    assert true.keys() == exact.keys() == single.keys()
    for name, t in true.items():
        scale = max(1.0, float(t.detach().abs().max()))
        assert float((exact[name] - t).detach().abs().max()) <= 1e-12 * scale, name
        # A rectifier's gradient jumps, so a rounding of its input may change it by more than a rounding.
        if case.cell != "rnn_relu":
            assert float((single[name].double() - t).detach().abs().max()) <= 2e-5 * scale, name


any_isa = st.sampled_from(_cpu.instruction_sets())
any_seed = st.integers(0, 2**16)


@given(cases(packed=False), any_isa, any_seed)
def test_dense(case: Case, isa: str, seed: int) -> None:
    check(case, isa, seed)


@given(cases(packed=True), any_isa, any_seed)
def test_packed(case: Case, isa: str, seed: int) -> None:
    check(case, isa, seed)
