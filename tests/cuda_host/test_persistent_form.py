"""The persistent form: against the float64 kernels of the CPU, and, much closer, against the step form.

The two forms round the same numbers at the same places and differ in the order of their sums alone. So they agree in
all but the rare element whose sum falls on the other side of a tie, and, as a whole, far better than one rounding.
"""

import _emulation
import pytest
from emulated import (
    CELLS,
    LAYERS,
    NUMBERS,
    PERSISTENT,
    Numbers,
    assert_backward,
    assert_forward,
    backward_results,
    dense,
    distances,
    forward_results,
    plan_of,
    ragged,
    run_backward,
    run_forward,
)
from kernels import Layer

# In the norm of a tensor, in roundings of the coarsest kind. Of the recurrence itself: 1 in 1000 elements rounded to
# the other side makes 0.06, and the few of a small tensor up to 0.15; a state that one form rounds and the other does
# not makes 0.3 and more. What is made of it is rounded once more, and may have few elements: a single one that is
# rounded to the other side makes 1 or more.
SHARE = 0.25
SHARE_OF_PRODUCTS = 1.5
PRODUCTS = ("dx", "dh0", "dc0", "dweights")
# Biases' gradients: by steps of gate gradients that are rounded, here of those that are not. Both are held to float64.
OTHERWISE = ("dweights[2]", "dweights[3]", "dweights[6]", "dweights[7]")


def assert_right(cell: str, layer: Layer, numbers: Numbers) -> None:
    by_steps, at_once = (run_forward(cell, layer, numbers, form) for form in ("step", "persistent"))
    assert_forward(at_once, numbers)
    pairs = [(forward_results(at_once), forward_results(by_steps))]
    # Both after the same forward pass.
    by_steps, at_once = (run_backward(by_steps, numbers, form) for form in ("step", "persistent"))
    assert_backward(at_once, numbers)
    pairs.append((backward_results(at_once), backward_results(by_steps)))
    for found, other in pairs:
        for name, distance in distances(found, other).items():
            if name in OTHERWISE:
                continue
            share = SHARE_OF_PRODUCTS if name.startswith(PRODUCTS) else SHARE
            assert distance <= share * numbers.coarsest, f"{name}: {distance / numbers.coarsest:.2f} of a rounding"


@pytest.mark.parametrize("layer", LAYERS, ids=str)
@pytest.mark.parametrize("numbers", PERSISTENT)
@pytest.mark.parametrize("cell", CELLS)
def test_values(cell: str, numbers: str, layer: Layer) -> None:
    assert_right(cell, layer, PERSISTENT[numbers])


# On so few multiprocessors: tiles of rows to a block, groups of rows, whether both directions go at once.
TILED: tuple[tuple[Layer, int, tuple[int, int, bool]], ...] = (
    (dense(3, 33, 17), 132, (1, 5, False)),
    (dense(3, 33, 17), 9, (2, 3, False)),
    (dense(3, 33, 17), 5, (4, 2, False)),
    (dense(3, 41, 16, directions=2), 12, (1, 6, True)),
    (dense(3, 41, 16, directions=2), 6, (2, 3, True)),
    (dense(3, 49, 5, directions=2), 6, (4, 2, True)),
    (dense(3, 8, 16, directions=2), 1, (1, 1, False)),
    (dense(3, 31, 33, directions=2), 3, (4, 1, False)),
    (dense(2, 32, 130), 9, (4, 1, False)),
    (ragged(40, 33, 20, 8, 8, 1, hidden=50, directions=2), 132, (1, 5, True)),
    (ragged(40, 33, 20, 8, 8, 1, hidden=50, directions=2), 15, (2, 3, False)),
    (ragged(40, 33, 20, 8, 8, 1, hidden=50, directions=2), 8, (4, 2, False)),
    (ragged(65, 40, 1, hidden=16), 3, (4, 3, False)),
)


@pytest.mark.parametrize(("layer", "multiprocessors", "tiling"), TILED, ids=str)
@pytest.mark.parametrize("numbers", PERSISTENT)
@pytest.mark.parametrize("cell", CELLS)
def test_tilings(cell: str, numbers: str, layer: Layer, multiprocessors: int, tiling: tuple[int, int, bool]) -> None:
    for backward in (False, True):
        plan = plan_of(cell, layer, NUMBERS[numbers], backward, multiprocessors)
        assert (plan["row_tiles"], plan["row_groups"], plan["together"]) == tiling
    _emulation.set_threshold("multiprocessors", multiprocessors)
    assert_right(cell, layer, NUMBERS[numbers])


# Weights of which a part has no room in registers: the cell, the numbers, H, multiprocessors, row tiles.
SPARE = (
    ("lstm", "tf32", 656, 41, 1),
    ("lstm", "tf32", 397, 25, 4),
    # Not as many in registers as go well with the number that is loaded at once: an H200 said what that gave.
    ("lstm", "tf32", 528, 33, 2),
    ("gru", "tf32", 784, 49, 1),
    ("gru", "tf32", 528, 33, 4),
    ("gru", "bfloat16", 784, 49, 4),
    ("rnn_tanh", "tf32", 1168, 73, 4),
)


@pytest.mark.parametrize(("cell", "numbers", "hidden", "multiprocessors", "row_tiles"), SPARE)
def test_weights_in_shared_memory(cell: str, numbers: str, hidden: int, multiprocessors: int, row_tiles: int) -> None:
    layer = dense(2, 8 * row_tiles - 1, hidden, inputs=3)
    for backward in (False, True):
        plan = plan_of(cell, layer, NUMBERS[numbers], backward, multiprocessors)
        assert plan["row_tiles"] == row_tiles and plan["spare"] > 1
    _emulation.set_threshold("multiprocessors", multiprocessors)
    assert_right(cell, layer, NUMBERS[numbers])
