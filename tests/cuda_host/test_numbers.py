"""The arithmetic of csrc/cuda/numbers.h, as both forms show it: roundings, activations, NaN and infinity."""

from collections.abc import Callable

import pytest
import torch
from emulated import CELLS, NUMBERS, Numbers, backward_results, dense, forward_results, run_backward, run_forward
from kernels import Layer, Operands
from torch import Tensor

INF, NAN = float("inf"), float("nan")


def of_all_exponents(dtype: torch.dtype, count: int = 4096) -> Tensor:
    """Random bits: every exponent, infinities and NaN among them."""
    generator = torch.Generator().manual_seed(1)
    kind = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    bits = torch.iinfo(kind).bits
    return torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (count,), generator=generator).to(kind).view(dtype)


def same(found: Tensor, expected: Tensor) -> Tensor:
    return (found == expected) | (found.isnan() & expected.isnan())


# Roundings ---------------------------------------------------------------------------------------------------------


def relu_of_biases(numbers: Numbers, a: Tensor, b: Tensor) -> Tensor:
    """relu(a + b), computed in float32 and stored: with a unit for each, and no products."""
    H = len(a)
    layer = Layer((1,), H, inputs=1)

    def change(operands: Operands) -> Operands:
        zeros = torch.zeros(H, 1, dtype=numbers.dtype)
        weights = zeros, torch.zeros(H, H, dtype=numbers.dtype), a, b
        return {"weights": weights, "h0": None}

    return run_forward("rnn_relu", layer, numbers, "step", change)["y"].flatten()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_results_are_rounded_to_nearest_even(dtype: torch.dtype) -> None:
    """As torch does it, with ties, numbers too small to be normal ones and too large to be any."""
    a = of_all_exponents(dtype)
    # The second a little smaller than the first, so that their sum falls between two numbers; of the same exponent, so
    # that it is a tie half the times; or another number altogether.
    tie = 2.0 ** torch.frexp(a.float().nan_to_num(1, 1, 1)).exponent * torch.finfo(dtype).eps / 4
    kinds = set()
    for b in (a * torch.finfo(dtype).eps * 1.37, tie.to(dtype), a, -a, a.flip(0)):
        wide = a.float() + b.float()
        expected = torch.where(wide < 0, 0.0, wide).to(dtype)
        found = relu_of_biases(Numbers(dtype), a, b)
        assert bool(same(found, expected).all())
        kinds |= {n for n in (INF, 0.0) if (expected == n).any()} | ({"nan"} if expected.isnan().any() else set())
    assert kinds == {INF, 0.0, "nan"}


def rounded_to_tf32(t: Tensor) -> Tensor:
    """To 10 bits of mantissa, ties away from zero, as cvt.rna.tf32 does; what is not finite stays."""
    bits = t.view(torch.int32).long() & 0xFFFFFFFF
    rounded = (bits + 0x1000) & 0xFFFFE000
    signed = torch.where(rounded >= 2**31, rounded - 2**32, rounded).to(torch.int32)
    return torch.where(t.isfinite(), signed.view(torch.float32), t)


def of_tf32(count: int = 256) -> Tensor:
    """Positive and finite, ties among them."""
    t = of_all_exponents(torch.float32, count).abs().nan_to_num(1.5, 2.5, 3.5)
    bits = t.view(torch.int32)
    bits[::3] = (bits[::3] & ~0x1FFF) | 0x1000
    # Rounding the largest gives infinity, and so NaN beside a weight of 0.
    t[t > 3e38] = 1.0
    return t


@pytest.mark.parametrize("tf32", [False, True], ids=["float32", "tf32"])
def test_operands_of_products_are_rounded_to_tf32(tf32: bool) -> None:
    """Products by 1, in the step form; of the input and of the weights."""
    values = of_tf32()
    numbers = Numbers(torch.float32, tf32)
    expected = rounded_to_tf32(values) if tf32 else values
    assert tf32 == (not torch.equal(expected, values))

    def of_inputs(operands: Operands) -> Operands:
        one = torch.ones(1, 1)
        return {"x": values[None, :, None], "weights": (one, one * 0, None, None), "h0": None}

    def of_weights(operands: Operands) -> Operands:
        return {"x": torch.ones(1, 1, 1), "weights": (values[:, None], torch.zeros(256, 256), None, None), "h0": None}

    for layer, change in ((dense(1, 256, 1, inputs=1), of_inputs), (dense(1, 1, 256, inputs=1), of_weights)):
        found = run_forward("rnn_relu", layer, numbers, "step", change)["y"].flatten()
        assert torch.equal(found, expected)


def test_the_exchange_and_the_weights_are_rounded_to_tf32() -> None:
    """h0 times the weights 1, 1 times the weights; in the persistent form."""
    values, H = of_tf32(), 16
    ones = torch.eye(H)
    rows = values.reshape(16, H)

    def of_states(operands: Operands) -> Operands:
        weights = torch.zeros(H, 1), ones, None, None
        return {"x": torch.zeros(2, 16, 1), "weights": weights, "h0": rows[None].contiguous()}

    def of_weights(operands: Operands) -> Operands:
        weights = torch.zeros(H, 1), rows.T.contiguous(), None, None
        return {"x": torch.zeros(2, 16, 1), "weights": weights, "h0": ones[None].contiguous()}

    for change in (of_states, of_weights):
        found = run_forward("rnn_relu", dense(2, 16, H, inputs=1), NUMBERS["tf32"], "persistent", change)["y"][0]
        assert torch.equal(found, rounded_to_tf32(rows))


# Activations -------------------------------------------------------------------------------------------------------


def lstm_gates(gate: Tensor, numbers: Numbers) -> Tensor:
    """σ, σ, tanh, σ of these numbers: [count, 4]."""
    one = torch.ones(4, 1, dtype=numbers.dtype)

    def change(operands: Operands) -> Operands:
        return {"x": gate[None, :, None], "weights": (one, one * 0, None, None), "h0": None, "c0": None}

    saved: Tensor = run_forward("lstm", dense(1, len(gate), 1, inputs=1), numbers, "step", change)["kept"][0]
    return saved


@pytest.mark.parametrize("numbers", ["float32", "float64", "bfloat16", "float16"])
def test_activations(numbers: str) -> None:
    """At most 4 units in the last place (tanh, exp and a division have their share), and exact at the ends."""
    n = NUMBERS[numbers]
    few = torch.linspace(-30, 30, 4001, dtype=torch.float64).to(n.dtype)
    wild = few if n.dtype is torch.float64 else of_all_exponents(n.dtype)
    gate = torch.cat([few, wild, torch.tensor([INF, -INF, NAN, 0.0, 1e4, -1e4], dtype=n.dtype)])
    found, wide = lstm_gates(gate, n).double(), gate.double()
    expected = torch.stack([wide.sigmoid(), wide.sigmoid(), wide.tanh(), wide.sigmoid()], 1)
    # Where e⁻ˣ is not a finite number of float32, σ is 0.
    smallest = torch.finfo(n.dtype).tiny if n.dtype.itemsize == 2 else torch.finfo(torch.float32).tiny
    error = (found - expected).abs() - (4 * n.computed + n.stored) * expected.abs()
    slack = max(smallest * torch.finfo(n.dtype).eps, 2.0**-126 if n.dtype is not torch.float64 else 0.0)
    assert bool(((error <= slack) | (found.isnan() & expected.isnan())).all())
    assert found[-6:].nan_to_num(9).tolist() == [
        [1, 1, 1, 1],
        [0, 0, -1, 0],
        [9] * 4,
        [0.5, 0.5, 0, 0.5],
        [1] * 4,
        [0, 0, -1, 0],
    ]


# NaN and infinity --------------------------------------------------------------------------------------------------

FORMS = [("step", "float64"), ("step", "tf32"), ("step", "float16"), ("persistent", "tf32"), ("persistent", "bfloat16")]
SICK = 2
LAYERS = (dense(4, 11, 21, inputs=3, directions=2), Layer((11, 11, 7, 3), 21, inputs=3, directions=2, packed=True))


def with_sick(name: str, value: float, layer: Layer) -> Callable[[Operands], Operands]:
    """One number of sequence SICK is not finite, at its second step where there are steps."""

    def change(operands: Operands) -> Operands:
        t = operands[name].clone()
        if name in ("x", "grad_y"):
            t.reshape(layer.rows, -1)[layer.batch_sizes[0] + SICK, 1] = value
        else:
            t[0, SICK, 1] = value
        return {name: t}

    return change


def healthy(results: dict[str, Tensor], layer: Layer) -> dict[str, Tensor]:
    """All that belongs to the other sequences."""
    sequence = torch.cat([torch.arange(size) for size in layer.batch_sizes])
    of_rows = {"y", "dx", "dgates"} | {name for name in results if name.startswith("kept")}
    found = {}
    for name, t in results.items():
        if name in of_rows:
            found[name] = t.reshape(layer.rows, -1)[sequence != SICK]
        elif not name.startswith("dweights"):
            found[name] = t[:, torch.arange(layer.batch_sizes[0]) != SICK]
    return found


def assert_others_unmoved(found: dict[str, Tensor], expected: dict[str, Tensor], layer: Layer) -> None:
    kept = healthy(expected, layer)
    assert len(kept) >= 2
    for name, t in healthy(found, layer).items():
        assert torch.equal(t, kept[name]), name


@pytest.mark.parametrize("layer", LAYERS, ids=str)
@pytest.mark.parametrize("value", [NAN, INF], ids=str)
@pytest.mark.parametrize(("form", "numbers"), FORMS)
@pytest.mark.parametrize("cell", CELLS)
def test_what_is_not_finite_stays_in_its_sequence(
    cell: str, form: str, numbers: str, value: float, layer: Layer
) -> None:
    n = NUMBERS[numbers]
    sound = run_forward(cell, layer, n, form)
    sound_back = backward_results(run_backward(sound, n, form))
    for name in ("x", "h0") if sound["c0"] is None else ("x", "h0", "c0"):
        sick = run_forward(cell, layer, n, form, with_sick(name, value, layer))
        assert_others_unmoved(forward_results(sick), forward_results(sound), layer)
        assert_others_unmoved(backward_results(run_backward(sick, n, form)), sound_back, layer)
    for name in ("grad_y", "grad_h_n") if sound["c0"] is None else ("grad_y", "grad_h_n", "grad_c_n"):
        back = backward_results(run_backward(sound, n, form, with_sick(name, value, layer)))
        assert_others_unmoved(back, sound_back, layer)
        # And there it arrives, unless the unit is one of those that a ReLU holds still.
        assert cell == "rnn_relu" or not back["dgates"].isfinite().all()


@pytest.mark.parametrize(("form", "numbers"), FORMS)
@pytest.mark.parametrize("cell", CELLS)
def test_nan_goes_on_with_its_sequence(cell: str, form: str, numbers: str) -> None:
    """From its step to the end, in all units; relu among them, which must not swallow it."""
    layer = dense(4, 11, 21, inputs=3)
    y = run_forward(cell, layer, NUMBERS[numbers], form, with_sick("x", NAN, layer))["y"]
    assert y[1:, SICK].isnan().all()
    assert y[0, SICK].isfinite().all()


@pytest.mark.parametrize("scale", [30.0, 1e4, 3e4])
@pytest.mark.parametrize(("form", "numbers"), FORMS)
@pytest.mark.parametrize("cell", ["rnn_tanh", "gru", "lstm"])
def test_large_inputs_saturate(cell: str, form: str, numbers: str, scale: float) -> None:
    """Gates far out in the flat parts: states within their bounds, gradients that vanish instead of becoming NaN."""
    layer, n = dense(4, 5, 17, inputs=3), NUMBERS[numbers]
    forward = run_forward(cell, layer, n, form, lambda o: {"x": o["x"] / o["x"].abs() * scale, "h0": None, "c0": None})
    y = forward["y"]
    assert y.isfinite().all() and float(y.abs().max()) <= 1
    assert all(t.isfinite().all() for t in backward_results(run_backward(forward, n, form)).values())
