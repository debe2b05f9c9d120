"""Both passes of one layer on the host emulation of the CUDA path, and what they ought to give, in float64.

The bounds that the tests set come from here. What a number is stored in decides most of them, so both passes are judged
by what they were given, not by what an exact pass before them would have given: every row of the forward pass by the
states that this very pass has stored for the step before, and the backward pass by the states and gates that it reads.
So errors do not pile up, and no unit of a ReLU is on one side of its kink here and on the other there.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import _emulation
import torch
from kernels import Layer, Operands, backward_operands, forward_operands, tensors
from torch import Tensor

from pyrnnfast import _cpu
from pyrnnfast.passes import CELLS as WIDTHS

CELLS = tuple(WIDTHS)
FORWARD_RESULTS = ("y", "h_n", "c_n", "kept")
BACKWARD_RESULTS = ("dx", "dh0", "dc0", "dweights", "dgates")

Results = dict[str, Tensor]


@dataclass(frozen=True)
class Numbers:
    """What the operands are stored in, and what the tensor cores make of them."""

    dtype: torch.dtype
    tf32: bool = False

    @property
    def stored(self) -> float:
        """The relative error of rounding a result; none where it is computed in what it is stored in."""
        return torch.finfo(self.dtype).eps / 2 if self.dtype.itemsize == 2 else 0.0

    @property
    def computed(self) -> float:
        """The relative error of one rounding of what is computed with."""
        return torch.finfo(torch.float64 if self.dtype is torch.float64 else torch.float32).eps / 2

    @property
    def multiplied(self) -> float:
        """The relative error of rounding an operand of a product. Narrow operands enter it as they are."""
        return 2.0**-11 if self.tf32 else 0.0

    @property
    def coarsest(self) -> float:
        return max(self.stored, self.multiplied, self.computed)


NUMBERS = {
    "float64": Numbers(torch.float64),
    "float32": Numbers(torch.float32),
    "tf32": Numbers(torch.float32, tf32=True),
    "bfloat16": Numbers(torch.bfloat16),
    "float16": Numbers(torch.float16),
}
PERSISTENT = {name: n for name, n in NUMBERS.items() if name in ("tf32", "bfloat16", "float16")}


# Calls -------------------------------------------------------------------------------------------------------------

Change = Callable[[Operands], Operands]


def unchanged(operands: Operands) -> Operands:
    return {}


def run_forward(
    cell: str, layer: Layer, numbers: Numbers, form: str, change: Change = unchanged, seed: int = 7
) -> Operands:
    """The operands after the call; `change` gives those that are to be others."""
    operands = forward_operands(cell, layer, numbers.dtype, seed=seed)
    del operands["threads"]
    operands |= change(operands)
    _emulation.forward(**operands, form=form, tf32=numbers.tf32)
    return operands


def run_backward(forward: Operands, numbers: Numbers, form: str, change: Change = unchanged) -> Operands:
    """Likewise, after the forward pass whose operands are given."""
    operands = backward_operands(forward | {"threads": None})
    del operands["threads"]
    # The gradient of an operand that is absent, and so zeros, may be asked for.
    for name in ("h", "c"):
        final = forward[f"{name}_n"]
        operands[f"d{name}0"] = None if final is None else torch.full_like(final, float("nan"))
    bias = operands["dgates"].new_full((len(forward["weights"][0]),), float("nan"))
    operands["dweights"] = tuple(bias.clone() if t is None else t for t in operands["dweights"])
    operands |= change(operands)
    _emulation.backward(**operands, form=form, tf32=numbers.tf32)
    return operands


def forward_results(operands: Operands) -> Results:
    return tensors(operands, FORWARD_RESULTS)


def backward_results(operands: Operands) -> Results:
    return tensors(operands, BACKWARD_RESULTS)


def run_both(cell: str, layer: Layer, numbers: Numbers, form: str) -> Results:
    forward = run_forward(cell, layer, numbers, form)
    return forward_results(forward) | backward_results(run_backward(forward, numbers, form))


# The truth ---------------------------------------------------------------------------------------------------------


def widened(value: Any) -> Any:
    """A float64 copy, elements of tuples likewise."""
    if isinstance(value, tuple):
        return tuple(widened(element) for element in value)
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.to(torch.float64, copy=True)
    return value


def sizes_of(forward: Operands) -> list[int]:
    x, sizes = forward["x"], forward["batch_sizes"]
    if sizes is not None:
        return list(sizes.tolist())
    return [x.shape[0]] if x.dim() == 2 else [x.shape[1]] * x.shape[0]


def rows_before(sizes: list[int], reverse: bool) -> tuple[list[int], list[int]]:
    """The row that each row's states come from, or −1 − b, sequence b's initial state; and each sequence's last row."""
    before = []
    last = [0] * sizes[0]
    offsets = [sum(sizes[:t]) for t in range(len(sizes))]
    for t, size in enumerate(sizes):
        other = t + 1 if reverse else t - 1
        for b in range(size):
            inside = 0 <= other < len(sizes) and b < sizes[other]
            before.append(offsets[other] + b if inside else -1 - b)
            if t == 0 or not reverse:
                last[b] = offsets[t] + b
    return before, last


def true_forward(forward: Operands) -> Results:
    """Every row as a single step from the states that were stored for the step before."""
    cell, widths = forward["cell"], WIDTHS[forward["cell"]]
    directions = len(forward["weights"]) // 4
    x = widened(forward["x"]).flatten(0, -2)
    rows, H = len(x), forward["y"].shape[-1] // directions
    y = widened(forward["y"]).reshape(rows, directions, H)
    out: dict[str, list[Tensor]] = {"y": [], "h_n": [], "c_n": []}
    found: Results = {}
    for d in range(directions):
        before, last = rows_before(sizes_of(forward), reverse=d == 1)

        def states(rows: Tensor, first: Tensor | None, d: int = d, before: list[int] = before) -> Tensor:
            first = torch.zeros(max(-b for b in before), H) if first is None else first
            first = widened(first).reshape(-1, *first.shape[-2:])[d if first.dim() == 3 else 0]
            return torch.cat([rows, first.flip(0)])[before].contiguous()

        h = states(y[:, d], forward["h0"])
        kept = forward["kept"][2 * d : 2 * d + 2] or (None, None)
        c = states(widened(kept[1]), forward["c0"]) if widths.has_cell else None
        true_y, h_n = torch.empty(rows, H, dtype=torch.float64), torch.empty(rows, H, dtype=torch.float64)
        c_n = torch.empty_like(h_n) if widths.has_cell else None
        true_kept = tuple(None if t is None else torch.empty(t.shape, dtype=torch.float64) for t in kept)
        weights = widened(forward["weights"][4 * d : 4 * d + 4])
        _cpu.forward(cell, x, h, c, weights, true_y, h_n, c_n, true_kept, None, 1)
        out["y"].append(true_y)
        found |= {f"kept[{2 * d + i}]": t for i, t in enumerate(true_kept) if t is not None}
        # These hold what is stored elsewhere, and nothing is computed for them.
        out["h_n"].append(y[last, d])
        out["c_n"] += [widened(kept[1])[last]] if widths.has_cell else []
    found["y"] = torch.stack(out["y"], 1).reshape(forward["y"].shape)
    found["h_n"] = torch.stack(out["h_n"]).reshape(forward["h_n"].shape)
    if widths.has_cell:
        found["c_n"] = torch.stack(out["c_n"]).reshape(forward["c_n"].shape)
    return found


def true_backward(backward: Operands) -> Results:
    """The gate gradients among them, whether or not they were asked for."""
    operands = {name: widened(value) for name, value in backward.items()}
    if operands["dgates"] is None:
        y = operands["y"]
        operands["dgates"] = torch.cat([y] * WIDTHS[backward["cell"]].dgates, -1)
    _cpu.backward(**operands, threads=1)
    return backward_results(operands)


# Bounds ------------------------------------------------------------------------------------------------------------


def assert_forward(forward: Operands, numbers: Numbers) -> None:
    """Element by element: one rounding to what it is stored in, and the errors of a gate's sum.

    Those of float32 and float64 are a few roundings of the largest element. With operands rounded to TF32, a gate of
    weights and inputs of size 1 is a sum of errors of 2⁻¹¹ at most, in random directions: their root mean square is
    about 2⁻¹², and the largest of thousands 5 times that. (A gate that took another's place would be off by 1.)
    """
    true, found = true_forward(forward), forward_results(forward)
    assert found.keys() == true.keys()
    for name, t in true.items():
        scale = max(1.0, float(t.abs().max()))
        slack = (FORWARD_ROUNDINGS * numbers.computed + TF32_ROUNDINGS * numbers.multiplied) * scale
        excess = (found[name].double() - t).abs() - numbers.stored * t.abs()
        assert bool((excess <= slack).all()), f"{name}: {float(excess.max()):.2e} beyond rounding, allowed {slack:.2e}"


FORWARD_ROUNDINGS = 32
TF32_ROUNDINGS = 6
BACKWARD_ROUNDINGS = {"stored": 3, "multiplied": 3, "computed": 32}


def assert_backward(backward: Operands, numbers: Numbers) -> None:
    """Gate gradients are rounded before they go on to the step before, and all else is made of them.

    So errors are told in units of the largest element of a tensor, or of the gate gradients: two that nearly cancel
    leave the error of either.
    """
    allowed = sum(count * getattr(numbers, kind) for kind, count in BACKWARD_ROUNDINGS.items())
    true, found = true_backward(backward), backward_results(backward)
    largest = {name: float(t.abs().max()) for name, t in true.items()}
    for name, t in found.items():
        error, limit = float((t.double() - true[name]).abs().max()), allowed * max(largest[name], largest["dgates"])
        assert error <= limit, f"{name}: {error:.2e}, allowed {limit:.2e}"


def distances(found: Results, other: Results) -> dict[str, float]:
    """Of each tensor, ‖found − other‖ / ‖other‖."""
    assert found.keys() == other.keys()
    return {
        name: float((found[name].double() - t.double()).norm() / max(float(t.double().norm()), 1e-30))
        for name, t in other.items()
    }


def assert_same(found: Results, expected: Results) -> None:
    """The same bits."""
    assert found.keys() == expected.keys()
    for name, t in expected.items():
        assert not t.isnan().any(), name
        assert torch.equal(found[name], t), name


# Where the sizes decide --------------------------------------------------------------------------------------------


def device(multiprocessors: int | None = None) -> dict[str, Any]:
    own: dict[str, Any] = dict(_emulation.devices()[0])
    return own | ({} if multiprocessors is None else {"multiprocessors": multiprocessors})


def plan_of(cell: str, layer: Layer, numbers: Numbers, backward: bool, multiprocessors: int | None) -> dict[str, Any]:
    sizes = len(layer.batch_sizes), layer.batch_sizes[0], layer.inputs, layer.hidden, layer.directions
    dtype = str(numbers.dtype).removeprefix("torch.")
    found: dict[str, Any] = _emulation.plan(device(multiprocessors), backward, cell, dtype, *sizes, numbers.tf32)
    return found


def dense(steps: int, batch: int, hidden: int, **others: Any) -> Layer:
    return Layer((batch,) * steps, hidden, **others)


def ragged(*batch_sizes: int, hidden: int, **others: Any) -> Layer:
    return Layer(batch_sizes, hidden, packed=True, **others)


# One and its neighbours, primes, and a number to either side of every 8, 16 and 32: of sequences (tiles of 8), of units
# (blocks of 16), of inputs.
LAYERS = (
    dense(2, 1, 1),
    dense(3, 2, 5, inputs=1),
    dense(5, 7, 7, inputs=13),
    dense(4, 9, 9),
    dense(3, 8, 8),
    dense(3, 3, 15, inputs=16),
    dense(3, 17, 16),
    dense(4, 5, 17),
    dense(3, 31, 31, inputs=3),
    dense(2, 33, 32, inputs=5),
    dense(3, 15, 33),
    dense(6, 1, 64, inputs=8),
    dense(3, 2, 130, inputs=4),
    dense(17, 3, 23),
    dense(4, 5, 17, directions=2),
    dense(3, 11, 37, directions=2),
    dense(2, 1, 3, directions=2, inputs=2),
    ragged(5, 4, 4, 1, hidden=9),
    ragged(1, 1, 1, hidden=16),
    ragged(13, 13, 9, 8, 8, 1, hidden=33),
    ragged(5, 4, 4, 2, 1, hidden=17, directions=2),
    ragged(19, 17, 9, 9, 1, 1, hidden=18, directions=2, inputs=5),
    ragged(3, 3, hidden=6, directions=2),
)
SINGLE = (
    dense(1, 5, 19),
    dense(1, 1, 1, inputs=1),
    dense(1, 9, 16, directions=2),
    ragged(4, hidden=5, directions=2),
    replace(dense(1, 9, 17), single_step=True),
    replace(dense(1, 1, 64), single_step=True),
)
