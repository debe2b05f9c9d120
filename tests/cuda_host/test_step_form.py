"""The step form, every cell and dtype, against the float64 kernels of the CPU."""

import pytest
from emulated import CELLS, LAYERS, NUMBERS, SINGLE, assert_backward, assert_forward, dense, run_backward, run_forward
from kernels import Layer


@pytest.mark.parametrize("layer", LAYERS + SINGLE, ids=str)
@pytest.mark.parametrize("numbers", NUMBERS)
@pytest.mark.parametrize("cell", CELLS)
def test_values(cell: str, numbers: str, layer: Layer) -> None:
    forward = run_forward(cell, layer, NUMBERS[numbers], "step")
    assert_forward(forward, NUMBERS[numbers])
    assert_backward(run_backward(forward, NUMBERS[numbers], "step"), NUMBERS[numbers])


@pytest.mark.parametrize("cell", CELLS)
def test_bias_gradients_are_not_rounded_to_tf32(cell: str) -> None:
    """They are sums, which a product with ones computes, but torch would not."""
    layer = dense(5, 13, 19)
    backward = run_backward(run_forward(cell, layer, NUMBERS["tf32"], "step"), NUMBERS["tf32"], "step")
    found, gates = backward["dweights"][2], backward["dgates"].flatten(0, -2)
    expected = gates.double().sum(0)[: len(found)]
    assert float((found - expected).abs().max()) <= layer.rows * 2.0**-24 * float(gates.abs().max())
