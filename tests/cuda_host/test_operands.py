"""Operands that a call may do without, one by one, and rows that do not lie side by side; both forms."""

from collections.abc import Iterator

import pytest
import torch
from emulated import (
    CELLS,
    NUMBERS,
    Change,
    assert_backward,
    assert_forward,
    dense,
    forward_results,
    ragged,
    run_backward,
    run_forward,
    unchanged,
)
from kernels import Layer, Operands
from torch import Tensor

GUARD = 1234.5

LAYERS = (dense(4, 5, 17, inputs=3, directions=2), ragged(9, 9, 4, 1, hidden=18, inputs=3))
FORMS = (
    ("step", "float64"),
    ("step", "float32"),
    ("step", "bfloat16"),
    ("persistent", "tf32"),
    ("persistent", "float16"),
)


def spread(t: Tensor, between_directions: bool) -> Tensor:
    """The same values with something between the rows, and perhaps between the directions."""
    shape = list(t.shape)
    shape[-1] += 3
    if between_directions and t.dim() == 3:
        shape[1] += 1
    around = torch.full(shape, GUARD, dtype=t.dtype)
    inside = around[..., : t.shape[-2], : t.shape[-1]]
    return inside.copy_(t)


def spread_all(operands: Operands) -> Operands:
    def apart(name: str, value: object) -> object:
        if isinstance(value, tuple):
            return tuple(apart(name, element) for element in value)
        # States have a number of their own between their directions; the rows of all else go on from step to step.
        states = name in ("h0", "c0", "h_n", "c_n", "grad_h_n", "grad_c_n", "dh0", "dc0")
        return spread(value, states) if isinstance(value, Tensor) and value.dim() > 1 else value

    return {name: apart(name, value) for name, value in operands.items()}


def assert_guards(operands: Operands) -> int:
    """What lies between the rows is as it was."""
    count = 0
    for name, value in operands.items():
        for t in value if isinstance(value, tuple) else (value,):
            if isinstance(t, Tensor) and t.dim() > 1:
                around, count = t._base, count + 1
                assert around is not None
                inside = torch.zeros_like(around, dtype=torch.bool)
                inside[..., : t.shape[-2], : t.shape[-1]] = True
                assert bool((around[~inside] == GUARD).all()), name
    return count


def without(*names: str) -> Change:
    return lambda operands: dict.fromkeys(names)


def without_element(name: str, *indices: int) -> Change:
    """Of every direction."""

    def change(operands: Operands) -> Operands:
        each = 4 if name in ("weights", "dweights") else 2
        return {name: tuple(None if i % each in indices else t for i, t in enumerate(operands[name]))}

    return change


FORWARD: dict[str, Change] = {
    "no_h0": without("h0"),
    "no_c0": without("c0"),
    "no_states": without("h0", "c0"),
    "no_bias_ih": without_element("weights", 2),
    "no_bias_hh": without_element("weights", 3),
    "no_biases": without_element("weights", 2, 3),
}
UPSTREAM = ("grad_y", "grad_h_n", "grad_c_n", "grad_cells")
BACKWARD: dict[str, Change] = (
    {f"no_{name}": without(name) for name in (*UPSTREAM, "dx", "dh0", "dc0", "dgates")}
    | {f"only_{name}": without(*(n for n in UPSTREAM if n != name)) for name in UPSTREAM}
    | {
        f"no_{n}": without_element("dweights", i)
        for i, n in enumerate(("dweight_ih", "dweight_hh", "dbias_ih", "dbias_hh"))
    }
    | {
        "no_dweights": without_element("dweights", 0, 1, 2, 3),
        "no_states": without("dh0", "dc0"),
        "dx_alone": lambda o: without("dh0", "dc0", "dgates")(o) | without_element("dweights", 0, 1, 2, 3)(o),
        "nothing_comes": without(*UPSTREAM),
    }
)


def changes() -> Iterator[tuple[str, Change, Change]]:
    for name, change in FORWARD.items():
        yield f"forward_{name}", change, unchanged
    for name, change in BACKWARD.items():
        yield f"backward_{name}", unchanged, change
        yield f"zeros_first_backward_{name}", FORWARD["no_states"], change


CHANGES = tuple(changes())


@pytest.mark.parametrize("layer", LAYERS, ids=str)
@pytest.mark.parametrize(("form", "numbers"), FORMS)
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize(("forward_change", "backward_change"), [c[1:] for c in CHANGES], ids=[c[0] for c in CHANGES])
def test_absent(
    forward_change: Change, backward_change: Change, cell: str, form: str, numbers: str, layer: Layer
) -> None:
    forward = run_forward(cell, layer, NUMBERS[numbers], form, forward_change)
    assert_forward(forward, NUMBERS[numbers])
    backward = run_backward(forward, NUMBERS[numbers], form, backward_change)
    if all(backward[name] is None for name in UPSTREAM):
        assert all(t is None or not t.any() for t in (backward["dx"], backward["dgates"], *backward["dweights"]))
    else:
        assert_backward(backward, NUMBERS[numbers])


@pytest.mark.parametrize("kept", [(), (None,) * 4], ids=["no_kept", "kept_none"])
@pytest.mark.parametrize(("form", "numbers"), FORMS)
@pytest.mark.parametrize("cell", CELLS)
def test_nothing_kept_gives_the_same_bits(cell: str, form: str, numbers: str, kept: tuple[None, ...]) -> None:
    layer = LAYERS[0]
    expected = forward_results(run_forward(cell, layer, NUMBERS[numbers], form))
    found = forward_results(run_forward(cell, layer, NUMBERS[numbers], form, lambda o: {"kept": kept}))
    assert {"y", "h_n"} <= found.keys()
    for name, t in found.items():
        assert torch.equal(t, expected[name]), name


@pytest.mark.parametrize("layer", LAYERS, ids=str)
@pytest.mark.parametrize(("form", "numbers"), FORMS)
@pytest.mark.parametrize("cell", CELLS)
def test_rows_apart(cell: str, form: str, numbers: str, layer: Layer) -> None:
    forward = run_forward(cell, layer, NUMBERS[numbers], form, spread_all)
    assert_forward(forward, NUMBERS[numbers])
    assert assert_guards(forward) >= 6
    backward = run_backward(forward, NUMBERS[numbers], form, spread_all)
    assert_backward(backward, NUMBERS[numbers])
    assert assert_guards(backward) >= 10
