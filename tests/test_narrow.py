"""bfloat16 and float16: what is rounded, and that nothing else is.

The kernels read and write them and compute in float32. So forward each result is the exact one rounded once, and
backward, given what forward has kept (which is as narrow, but for the LSTM's cells), so is each gradient. On processors
that multiply bfloat16 themselves, this is so given the operands of their products: the h of the step before and dgates,
rounded. All of it is held to that bound here, against the cells' equations in float64. Through modules,
whose layers read one another's rounded results, the measure is torch's own error.
"""

import math
from dataclasses import replace
from functools import cache
from itertools import pairwise
from types import ModuleType

import pytest
import torch
from cases import CELLS, Case, gradients, result_weights
from kernels import SCHEDULES, WIDTHS, Layer, Operands, backward_operands, forward_operands, use
from torch import Tensor

import pyrnnfast
from pyrnnfast import _cpu

BF16, FP16 = torch.bfloat16, torch.float16
narrow = pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
# The largest relative error of rounding to nearest with 8 or 11 significant bits, and the largest error of what is
# smaller than the normal numbers.
UNIT = {BF16: 2.0**-8, FP16: 2.0**-11}
LEAST = {BF16: 2.0**-134, FP16: 2.0**-25}
# What float32 arithmetic may add, in units of a tensor's largest element: hardly more than nothing beside UNIT.
NOISE = 2.0**-17


def narrow_products(dtype: torch.dtype) -> bool:
    """Whether the kernels leave products to the processor's own bfloat16.

    h and dgates are rounded for them, and what is smaller than the normal numbers counts as zero.
    """
    return dtype is BF16 and _cpu.instruction_set() == "avx512bf16"


def flushed(factor: Tensor) -> Tensor:
    """As those products see it."""
    return torch.where(factor.abs() < torch.finfo(BF16).tiny, 0.0, factor)


# One rounding -----------------------------------------------------------------------------------------------------


def spans(layer: Layer, direction: int) -> list[tuple[slice, int, slice | None, int]]:
    """In the order of a direction: the rows of a step, how many, and those of the step before, and how many of them
    go on."""
    offsets = [0]
    for size in layer.batch_sizes:
        offsets.append(offsets[-1] + size)
    rows = [slice(a, b) for a, b in pairwise(offsets)]
    if direction == 1:
        rows.reverse()
    before = [None, *rows[:-1]]
    sizes = [r.stop - r.start for r in rows]
    return [
        (now, size, last, 0 if last is None else min(size, last.stop - last.start))
        for now, size, last in zip(rows, sizes, before, strict=True)
    ]


def of_direction(operands: Operands, layer: Layer, direction: int) -> dict[str, Tensor]:
    """Data as [N, features] and states as [B, H] of one direction, in float64."""
    H = layer.hidden
    found = {}
    for name in ("x", "y", "h0", "c0", "grad_y", "grad_h_n", "grad_c_n", "grad_cells", "dgates"):
        t = operands.get(name)
        if t is None:
            continue
        if name in ("y", "grad_y", "grad_cells", "dgates"):
            t = t.reshape(layer.rows, -1).chunk(layer.directions, 1)[direction]
        elif name == "x":
            t = t.reshape(layer.rows, -1)
        else:
            t = t.reshape(layer.directions, -1, H)[direction]
        found[name] = t.double()
    for kind, t in zip(("w_ih", "w_hh", "b_ih", "b_hh"), operands["weights"][4 * direction :], strict=False):
        found[kind] = t.double()
    for kind, t in zip(("saved", "cells"), operands["kept"][2 * direction :], strict=False):
        if t is not None:
            found[kind] = t.double()
    return found


def textbook_forward(
    cell: str, layer: Layer, direction: int, o: dict[str, Tensor], rounds_h: bool
) -> dict[str, Tensor]:
    H, widths = layer.hidden, WIDTHS[cell]
    h, c = o["h0"].clone(), o["c0"].clone() if widths.has_cell else None
    out = {"y": torch.zeros(layer.rows, H).double()}
    if widths.saved:
        out["saved"] = torch.zeros(layer.rows, widths.saved * H).double()
    if widths.has_cell:
        out["cells"] = torch.zeros(layer.rows, H).double()
    operand = h.clone() if rounds_h else h
    for rows, size, _, _ in spans(layer, direction):
        x = (o["x"][rows] @ o["w_ih"].t() + o["b_ih"]).split(H, 1)
        a = (operand[:size] @ o["w_hh"].t() + o["b_hh"]).split(H, 1)
        if cell == "lstm":
            i, f, g, s = (x[k] + a[k] for k in range(4))
            gates = [i.sigmoid(), f.sigmoid(), g.tanh(), s.sigmoid()]
            c[:size] = gates[1] * c[:size] + gates[0] * gates[2]
            out["cells"][rows] = c[:size]
            new = gates[3] * c[:size].tanh()
        elif cell == "gru":
            r, z = (x[0] + a[0]).sigmoid(), (x[1] + a[1]).sigmoid()
            n = (x[2] + r * a[2]).tanh()
            gates = [r, z, n, a[2]]
            new = n + z * (h[:size] - n)
        else:
            gates = []
            new = (x[0] + a[0]).tanh() if cell == "rnn_tanh" else (x[0] + a[0]).relu()
        if gates:
            out["saved"][rows] = torch.cat(gates, 1)
        h[:size] = new
        out["y"][rows] = new
        if operand is not h:
            operand[:size] = o["y"][rows]
    return out | {"h_n": h} | ({} if c is None else {"c_n": c})


def gate_gradients(
    cell: str, o: dict[str, Tensor], rows: slice, h_prev: Tensor, c_prev: Tensor | None, d: Tensor, dc: Tensor | None
) -> tuple[Tensor, Tensor]:
    """dgates, and what is carried, from the gradients d of the states h and dc of the cells."""
    H = d.shape[1]
    if cell == "lstm":
        assert c_prev is not None
        assert dc is not None
        i, f, g, s = o["saved"][rows].split(H, 1)
        tanh_c = o["cells"][rows].tanh()
        dcell = d * s * (1 - tanh_c**2) + dc
        parts = [dcell * g * i * (1 - i), dcell * c_prev * f * (1 - f), dcell * i * (1 - g**2)]
        return torch.cat([*parts, d * tanh_c * s * (1 - s)], 1), dcell * f
    if cell == "gru":
        r, z, n, a = o["saved"][rows].split(H, 1)
        dn = d * (1 - z) * (1 - n**2)
        return torch.cat([dn * a * r * (1 - r), d * (h_prev - n) * z * (1 - z), dn, dn * r], 1), d * z
    y = o["y"][rows]
    return d * (1 - y**2) if cell == "rnn_tanh" else d * (y > 0), torch.zeros_like(d)


def textbook_backward(
    cell: str, layer: Layer, direction: int, o: dict[str, Tensor], rounds_dgates: bool
) -> dict[str, Tensor]:
    """The gradients that follow exactly from y, saved and cells as they are, and from the dgates that were found where
    the kernels round them for their products."""
    H, has_cell = layer.hidden, WIDTHS[cell].has_cell
    dh, dc = o["grad_h_n"].clone(), o["grad_c_n"].clone() if has_cell else None
    out = {"dx": torch.zeros_like(o["x"]), "dgates": torch.zeros_like(o["dgates"])}
    out |= {f"d{kind}": torch.zeros_like(o[kind]) for kind in ("w_ih", "w_hh", "b_ih", "b_hh")}
    for rows, size, last, continuing in reversed(spans(layer, direction)):
        # A sequence that has its first step here comes from the initial state.
        h_prev, c_prev = o["h0"][:size].clone(), o["c0"][:size].clone() if has_cell else None
        if last is not None:
            h_prev[:continuing] = o["y"][last][:continuing]
            if c_prev is not None:
                c_prev[:continuing] = o["cells"][last][:continuing]
        d, dc_now = dh[:size] + o["grad_y"][rows], None if dc is None else dc[:size] + o["grad_cells"][rows]
        exact, carried = gate_gradients(cell, o, rows, h_prev, c_prev, d, dc_now)
        out["dgates"][rows] = exact
        used = (o["dgates"][rows] if rounds_dgates else exact).split(H, 1)
        for_x = torch.cat(used[: WIDTHS[cell].gates], 1)
        for_h = torch.cat((*used[:2], used[3]) if cell == "gru" else used, 1)
        out["dx"][rows] = for_x @ o["w_ih"]
        out["dw_ih"] += for_x.t() @ o["x"][rows]
        out["dw_hh"] += for_h.t() @ h_prev
        out["db_ih"] += for_x.sum(0)
        out["db_hh"] += for_h.sum(0)
        dh[:size] = for_h @ o["w_hh"]
        if dc is None:
            dh[:size] += carried
        else:
            dc[:size] = carried
    return out | {"dh0": dh} | ({} if dc is None else {"dc0": dc})


def assert_one_rounding(name: str, found: Tensor, true: Tensor, before: Tensor | float = 0.0) -> None:
    """`before`: what was rounded already before something was added to it."""
    rounding, least = UNIT.get(found.dtype, 0.0), LEAST.get(found.dtype, 0.0)
    bound = rounding * (1 + rounding) * (true.abs() + abs(before)) + least + NOISE * true.abs().max()
    excess = (found.double() - true).abs() - bound
    assert bool((excess <= 0).all()), f"{name}: {float(excess.max()):.2e} more than one rounding"


# Below 8 sequences the kernels keep their weights narrow, from 8 on in float32.
LAYERS = (
    Layer((1,) * 9, 5, inputs=3, directions=2),
    Layer((2,) * 40, 33, inputs=20),
    Layer((7,) * 6, 67, inputs=17, directions=2),
    Layer((8,) * 6, 67, inputs=17, directions=2),
    Layer((13,) * 12, 20, inputs=530),
    Layer((9, 9, 7, 4, 4, 2, 1), 21, inputs=9, directions=2, packed=True),
    Layer((6, 5, 5, 3, 1), 40, inputs=9, directions=2, packed=True),
    Layer((3,), 19, inputs=8, single_step=True),
    Layer((70,), 19, inputs=8, single_step=True),
)


def check_one_rounding(cell: str, layer: Layer, dtype: torch.dtype) -> None:
    H, rounds_operands = layer.hidden, narrow_products(dtype)
    forward = forward_operands(cell, layer, dtype)
    _cpu.forward(*forward.values())
    backward = backward_operands(forward)
    _cpu.backward(*backward.values())
    dx_before: Tensor | float = 0.0
    for direction in range(layer.directions):
        operands = of_direction(backward, layer, direction)
        true = textbook_forward(cell, layer, direction, operands, rounds_operands)
        columns = forward["y"].reshape(layer.rows, -1)[:, direction * H : (direction + 1) * H]
        assert_one_rounding("y", columns, true["y"])
        for name in ("h_n", "c_n"):
            if name in true:
                assert_one_rounding(name, forward[name].reshape(layer.directions, -1, H)[direction], true[name])
        for name, kept in zip(("saved", "cells"), forward["kept"][2 * direction :], strict=False):
            if kept is not None:
                assert_one_rounding(name, kept, true[name])
        true = textbook_backward(cell, layer, direction, operands, rounds_operands)
        assert_one_rounding("dgates", operands["dgates"].to(dtype), true["dgates"])
        for name in ("dh0", "dc0"):
            if name in true:
                found = backward[name].reshape(layer.directions, -1, H)[direction]
                assert_one_rounding(name, found, true[name])
        kinds = ("dw_ih", "dw_hh", "db_ih", "db_hh")
        for name, found in zip(kinds, backward["dweights"][4 * direction :], strict=False):
            assert_one_rounding(name, found, true[name])
        if direction == layer.directions - 1:
            dx = backward["dx"].reshape(layer.rows, -1)
            assert_one_rounding("dx", dx, true["dx"] + dx_before, before=dx_before)
        dx_before = true["dx"]


@narrow
@pytest.mark.parametrize("layer", LAYERS, ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_one_rounding(cell: str, layer: Layer, dtype: torch.dtype, instruction_set: str) -> None:
    check_one_rounding(cell, layer, dtype)


@narrow
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("layer", LAYERS, ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_one_rounding_under_any_schedule(
    cell: str, layer: Layer, schedule: str, dtype: torch.dtype, instruction_set: str
) -> None:
    """Sums that go on from chunk to chunk among them."""
    use(schedule)
    check_one_rounding(cell, layer, dtype)


# Every bit --------------------------------------------------------------------------------------------------------


@narrow
@pytest.mark.parametrize(("inputs", "hidden"), [(64, 96), (37, 160)])
@pytest.mark.parametrize("threads", [1, 2])
def test_gradients_of_weights_anywhere_in_memory(
    inputs: int, hidden: int, threads: int, dtype: torch.dtype, instruction_set: str
) -> None:
    """Rows that begin with a cache line are written past the caches, others are not: the same bits, and nothing beside
    them."""
    layer = Layer((9,), hidden, inputs, single_step=True)
    _cpu.set_threshold("serial_operations", 0)
    forward = forward_operands("lstm", layer, dtype, threads)
    _cpu.forward(*forward.values())
    found = []
    for offset in (0, 1, 16, 32):
        operands = backward_operands(forward)
        buffers = [torch.full((offset + w.numel() + 64,), math.nan, dtype=dtype) for w in operands["dweights"]]
        if offset == 0:
            assert all(b.data_ptr() % 64 == 0 for b in buffers)
        within = [slice(offset, offset + w.numel()) for w in operands["dweights"]]
        operands["dweights"] = tuple(
            b[at].view_as(w) for b, at, w in zip(buffers, within, operands["dweights"], strict=True)
        )
        _cpu.backward(*operands.values())
        found.append([w.clone() for w in operands["dweights"]])
        for buffer, at in zip(buffers, within, strict=True):
            buffer[at] = math.nan
            assert buffer.isnan().all()
    for others in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))


def assert_same_numbers(found: Tensor, expected: Tensor) -> None:
    assert found.dtype is expected.dtype
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.nan_to_num(0.0, math.inf, -math.inf), expected.nan_to_num(0.0, math.inf, -math.inf))


def summands(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Two vectors whose sums lie anywhere between neighbours of a dtype, often in the middle, and beyond all."""
    unit, info = UNIT[dtype], torch.finfo(dtype)
    fractions = 1 + torch.arange(0, 128, 5) * 2 * unit
    special = [
        math.inf,
        -math.inf,
        math.nan,
        0.0,
        info.smallest_normal / 100,
        info.smallest_normal,
        info.max,
        info.max / 3,
    ]
    first = torch.cat([fractions, -fractions, torch.tensor(special)])
    large = [info.max * unit * f for f in (0.25, 0.5, 1.0)]
    powers = torch.tensor([unit / 4, unit / 2, unit, 2 * unit, 0.5, 1.0, info.smallest_normal / 4, *large])
    second = torch.cat([powers, -powers, unit * fractions, torch.zeros(1)])
    return first.to(dtype), second.to(dtype)


@narrow
def test_the_summands_have_ties(dtype: torch.dtype) -> None:
    """Both to be rounded up and to be rounded down, of both signs."""
    first, second = summands(dtype)
    sums = first.float()[:, None] + second.float()
    dropped = 16 if dtype is BF16 else 13  # bits of a normal number
    bits = sums[sums.isfinite() & (sums.abs() >= torch.finfo(dtype).smallest_normal)].view(torch.int32)
    ties = bits[(bits & ((1 << dropped) - 1)) == 1 << (dropped - 1)]
    assert {(bool(b < 0), int(b >> dropped) & 1) for b in ties} == {(s, odd) for s in (False, True) for odd in (0, 1)}
    assert (sums.isfinite() & sums.to(dtype).isinf()).any()


@narrow
@pytest.mark.parametrize("schedule", ["unpacked", "packed"])
def test_stores_round_to_nearest_even(schedule: str, dtype: torch.dtype, instruction_set: str) -> None:
    """A rectifier of x + b, in the lanes of whole vectors and of the last."""
    use(schedule)
    x, bias = summands(dtype)
    for hidden in (len(bias), len(bias) - 1, 7, 1):
        for rows in (len(x), 7, 1):
            y = torch.full((rows, hidden), math.nan, dtype=dtype)
            weights = torch.ones(hidden, 1, dtype=dtype), torch.zeros(hidden, hidden, dtype=dtype), bias[-hidden:], None
            _cpu.forward("rnn_relu", x[-rows:, None], None, None, weights, y, y, None, (), None, 1)
            factor = x[-rows:, None].float()
            if narrow_products(dtype) and schedule == "packed":
                factor = flushed(factor)
            assert_same_numbers(y, torch.relu(factor + bias[-hidden:].float()).to(dtype))


@narrow
@pytest.mark.parametrize("batch", [3, 60])
def test_gradients_round_to_nearest_even(batch: int, dtype: torch.dtype, instruction_set: str) -> None:
    """dx = g + w of either sign: with a rectifier that lets two gradients pass, g and 1, and weights 1 and w."""
    g, w = summands(dtype)
    g, w = g[g.isfinite()][-batch:], w[w.isfinite()]
    rows, inputs = len(g), len(w)
    ones = torch.ones(rows, 2, dtype=dtype)
    weights = torch.stack([torch.ones_like(w), w]), torch.zeros(2, 2, dtype=dtype), None, None
    dx = torch.full((rows, inputs), math.nan, dtype=dtype)
    grad_y = torch.stack([g, torch.ones_like(g)], 1)
    x = torch.zeros(rows, inputs, dtype=dtype)
    gradients = {"grad_y": grad_y, "grad_h_n": None, "grad_c_n": None, "grad_cells": None}
    results = {"dx": dx, "dh0": None, "dc0": None, "dweights": (None,) * 4, "dgates": None}
    operands = {"x": x, "h0": None, "c0": None, "weights": weights, "y": ones, "kept": (None, None)}
    _cpu.backward(cell="rnn_relu", **operands, **gradients, **results, batch_sizes=None, threads=1)
    g, w = g.float()[:, None], w.float()
    if narrow_products(dtype):
        g, w = flushed(g), flushed(w)
    assert_same_numbers(dx, (g + w).to(dtype))


@narrow
@pytest.mark.parametrize("hidden", [1, 7, 251, 256])
def test_every_value_passes_unchanged(hidden: int, dtype: torch.dtype, instruction_set: str) -> None:
    """Through an LSTM whose forget gate is 1 and whose input is 0, and its gradient back; NaN stays NaN."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    batch = -(-len(every) // hidden)
    states = torch.cat([every, every[: batch * hidden - len(every)]]).view(batch, hidden)
    assert states.isnan().any()
    assert states.isinf().any()
    layer = Layer((batch,), hidden, inputs=1)
    forward = forward_operands("lstm", layer, dtype)
    gates = torch.zeros(4, hidden, dtype=dtype)
    gates[1] = 60.0
    zeros = [torch.zeros_like(w) for w in forward["weights"][:2]]
    c_n = torch.full((1, batch, hidden), math.nan, dtype=dtype)
    forward |= {"h0": None, "c0": states[None], "weights": (*zeros, gates.flatten(), None), "c_n": c_n}
    _cpu.forward(*forward.values())
    assert_same_numbers(c_n[0], states)

    forward |= {"c0": torch.ones_like(c_n), "weights": (*zeros, gates.flatten(), None)}
    _cpu.forward(*forward.values())
    backward = backward_operands(forward) | {
        "grad_y": None,
        "grad_h_n": None,
        "grad_c_n": states[None],
        "grad_cells": None,
        # Its gates' gradients are not finite, so nothing may be multiplied by them.
        "dx": None,
        "dh0": None,
        "dweights": (None,) * 4,
        "dgates": None,
    }
    _cpu.backward(*backward.values())
    assert_same_numbers(backward["dc0"][0], states)


# Through modules --------------------------------------------------------------------------------------------------


def _table() -> tuple[Case, ...]:
    cases = []
    for cell in CELLS:
        plain = Case(cell, steps=6, hidden=18)
        cases += [replace(plain, batch=batch, hidden=hidden) for batch in (2, 7, 8, 13) for hidden in (5, 67)]
        cases += [
            replace(plain, steps=40, batch=3, bidirectional=True),
            replace(plain, steps=40, batch=9, bidirectional=True, batch_first=True),
            replace(plain, batch=9, layers=2, bidirectional=True),
            replace(plain, batch=3, bias=False, initial=False),
            replace(plain, unbatched=True),
            replace(plain, lengths=(2, 5, 1, 4, 3)),
            replace(plain, lengths=(1, 9, 2, 8, 3, 7, 4, 6, 5), bidirectional=True),
            replace(plain, lengths=(5, 5, 5, 5, 5, 5, 5, 4, 4, 3, 2, 2, 1), bidirectional=True, initial=False),
            replace(plain, batch=5, single_step=True),
            replace(plain, batch=13, single_step=True, bias=False),
        ]
        if cell == "lstm":
            cases += [
                replace(plain, batch=batch, hidden=hidden, projected=projected)
                for batch, hidden, projected in ((2, 19, 18), (9, 67, 33), (13, 40, 7), (7, 67, 65))
            ]
            cases += [
                replace(plain, steps=40, batch=9, projected=9, layers=2, bidirectional=True),
                replace(plain, lengths=(1, 9, 2, 8, 3, 7, 4, 6, 5), projected=17, bidirectional=True),
            ]
    return tuple(cases)


def run(case: Case, library: ModuleType, dtype: torch.dtype) -> dict[str, Tensor]:
    module = case.module(library, dtype)
    x, states = case.operands(dtype)
    outputs = case.run(module, x, states)
    assert all(t.dtype is dtype for t in outputs.values())
    return outputs | gradients(module, x, states, outputs)


@cache
def truth(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """The textbook in float64, of the same values."""
    module = case.module(torch.nn, dtype).double()
    x, states = case.operands(dtype)
    x, *states = (t.detach().double().requires_grad_() for t in (x, *states))
    outputs = case.run_reference(module, x, tuple(states))
    weights = {name: w.double() for name, w in result_weights({k: t.to(dtype) for k, t in outputs.items()}).items()}
    return outputs | gradients(module, x, tuple(states), outputs, weights=weights)


@cache
def errors_of_torch(case: Case, dtype: torch.dtype) -> dict[str, float]:
    return errors(run(case, torch.nn, dtype), truth(case, dtype))


def errors(found: dict[str, Tensor], true: dict[str, Tensor]) -> dict[str, float]:
    """The largest error of each tensor, in units of its largest element."""
    assert found.keys() == true.keys()
    return {
        name: float((found[name].double() - t).detach().abs().max() / t.detach().abs().max())
        for name, t in true.items()
    }


@narrow
@pytest.mark.parametrize("case", _table(), ids=str)
def test_as_accurate_as_torch(case: Case, dtype: torch.dtype, instruction_set: str) -> None:
    x, states = case.operands(dtype)
    assert pyrnnfast.explain(case.module(pyrnnfast, dtype), case.packed(x), case.hx(states)).path == "fused"
    theirs = errors_of_torch(case, dtype)
    for name, error in errors(run(case, pyrnnfast, dtype), truth(case, dtype)).items():
        if narrow_products(dtype) and case.cell == "rnn_relu" and name.startswith("grad"):
            # A rectifier's derivative jumps: whose h is rounded across zero is a matter of luck. On average, see below.
            continue
        assert error <= 2 * theirs[name] + UNIT[dtype], f"{name}: error {error:.2e}, torch's {theirs[name]:.2e}"


@narrow
@pytest.mark.parametrize("cell", CELLS)
def test_more_accurate_than_torch_on_average(cell: str, dtype: torch.dtype, instruction_set: str) -> None:
    """torch rounds more than the state of each step; the gradients of rectifiers are among these."""
    ours, theirs = [], []
    for case in _table():
        if case.cell == cell:
            ours += errors(run(case, pyrnnfast, dtype), truth(case, dtype)).values()
            theirs += errors_of_torch(case, dtype).values()
    assert sum(ours) < sum(theirs)
