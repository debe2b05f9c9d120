"""Several chunks of steps instead of one: the recurrence gives the same bits, and the products over rows are right."""

import _emulation
import pytest
from emulated import (
    CELLS,
    NUMBERS,
    PERSISTENT,
    assert_backward,
    assert_forward,
    assert_same,
    backward_results,
    dense,
    forward_results,
    plan_of,
    ragged,
    run_backward,
    run_forward,
)
from kernels import Layer

LAYERS = (
    dense(7, 5, 17, inputs=3),
    dense(7, 3, 9, inputs=4, directions=2),
    ragged(9, 9, 5, 4, 4, 2, 1, hidden=18, inputs=3),
    ragged(9, 9, 5, 4, 4, 2, 1, hidden=18, inputs=3, directions=2),
)
# A step at a time; and several, which T is no multiple of.
CHUNK_BYTES = (1, 3_500)
FORMS = [("step", numbers) for numbers in NUMBERS] + [("persistent", numbers) for numbers in PERSISTENT]


@pytest.mark.parametrize("chunk_bytes", CHUNK_BYTES)
@pytest.mark.parametrize("layer", LAYERS, ids=str)
@pytest.mark.parametrize(("form", "numbers"), FORMS)
@pytest.mark.parametrize("cell", CELLS)
def test_chunks(cell: str, form: str, numbers: str, layer: Layer, chunk_bytes: int) -> None:
    whole = run_forward(cell, layer, NUMBERS[numbers], form)
    whole_back = run_backward(whole, NUMBERS[numbers], form)
    _emulation.set_threshold("chunk_bytes", chunk_bytes)
    cut = run_forward(cell, layer, NUMBERS[numbers], form)
    assert_same(forward_results(cut), forward_results(whole))
    assert_forward(cut, NUMBERS[numbers])
    cut_back = run_backward(cut, NUMBERS[numbers], form)
    recurrent = ("dgates", "dh0", "dc0")
    found, expected = ({n: t for n, t in backward_results(b).items() if n in recurrent} for b in (cut_back, whole_back))
    assert_same(found, expected)
    # dx has been rounded once for each direction and is added up in what it is stored in; the rest is summed up wide.
    assert_backward(cut_back, NUMBERS[numbers])


def test_the_chunks_are_several() -> None:
    steps = [
        plan_of(cell, layer, NUMBERS[numbers], backward, None)["chunk_steps"]
        for chunk_bytes in CHUNK_BYTES
        for cell in CELLS
        for numbers in NUMBERS
        for layer in LAYERS
        for backward in (False, True)
        if _emulation.set_threshold("chunk_bytes", chunk_bytes) is None
    ]
    assert {1, 2, 3} <= set(steps)
    assert sum(s < 7 for s in steps) > 0.8 * len(steps)
