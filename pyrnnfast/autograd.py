"""A recurrent layer as a differentiable function: the form of plain eager calls.

The first derivative is :mod:`pyrnnfast.passes`; one that has to be differentiated itself goes through
:mod:`pyrnnfast.reference`. Under torch.compile and torch.func other forms are at work: ops.py and transforms.py.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

from . import _cpu, reference
from .obstacles import PLAIN
from .passes import (
    Gradients,
    Mask,
    Steps,
    Upstream,
    apart,
    backward,
    cells_dtype,
    forward,
    gradient,
    room_for_cells,
    room_for_gates,
    room_to_keep,
    side_by_side,
    sizes,
)

_P = ParamSpec("_P")
_Result = TypeVar("_Result")


class Outputs(NamedTuple):
    """Of a layer: y [T, B, D·H] or [N, D·H], h_n and c_n [D, B, H], and all cell states [..., D·H] where asked for."""

    y: Tensor
    h_n: Tensor
    c_n: Tensor | None
    cells: Tensor | None


def without_autocast(function: Callable[_P, _Result]) -> Callable[_P, _Result]:
    """What goes back by way of the reference, with products that keep their dtype where it is called inside an autocast
    region; the forward ran outside. The kernels do not ask."""

    @functools.wraps(function)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _Result:
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return function(*args, **kwargs)

    return run


def beyond_kernels(grads: Sequence[Tensor | None]) -> bool:
    """Whether a backward pass with these gradients has to go by the reference.

    So it is where the result has to be differentiated itself (``create_graph``, or forward mode around backward), and
    where the gradients have a dimension that torch hides (``is_grads_batched``, or ``torch.vmap`` around backward).
    """
    if (
        torch.is_grad_enabled()
        or torch.autograd.forward_ad._current_level >= 0
        or torch._C._are_functorch_transforms_active()
    ):
        return True
    for g in grads:  # noqa: SIM110 - any() of a generator takes three times as long, of which a single step has little
        if g is not None and torch._C._functorch.is_legacy_batchedtensor(g):
            return True
    return False


class _Layer(torch.autograd.Function):
    """y, h_n[, c_n[, cells]] = layer(cell, cell_states, x, steps, h0, c0, *weights)"""

    @staticmethod
    def forward(
        ctx: Any,
        cell: str,
        cell_states: bool,
        x: Tensor,
        steps: Steps,
        h0: Tensor | None,
        c0: Tensor | None,
        *weights: Tensor | None,
    ) -> tuple[Tensor, ...]:
        ctx.cell, ctx.count, ctx.cell_states = cell, len(weights), cell_states
        ctx.set_materialize_grads(False)
        ctx.masked = isinstance(steps, Mask)
        of_steps = steps if isinstance(steps, Mask) else (steps, None)
        if cell_states:
            gates, cells = room_for_gates(cell, x, weights), room_for_cells(x, weights)
            kept = side_by_side(gates, cells, weights)
            y, h_n, c_n, _ = forward(cell, x, steps, h0, c0, weights, kept)
            # Whole, as they are results, and not by their columns: autograd then sees when somebody changes them.
            ctx.save_for_backward(x, *of_steps, h0, c0, *weights, y, gates, cells)
            assert c_n is not None
            return y, h_n, c_n, cells
        y, h_n, c_n, kept = forward(cell, x, steps, h0, c0, weights, room_to_keep(cell, x, weights))
        ctx.save_for_backward(x, *of_steps, h0, c0, *weights, y, *kept)
        return (y, h_n) if c_n is None else (y, h_n, c_n)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        # Once: checkpointing lets them be unpacked only once.
        x, *of_steps, h0, c0 = (saved := ctx.saved_tensors)[:5]
        rest, steps = saved[5:], Mask(*of_steps) if ctx.masked else of_steps[0]
        cell, count = ctx.cell, ctx.count
        weights, y, kept = rest[:count], rest[count], tuple(rest[count + 1 :])
        if ctx.cell_states:
            kept = side_by_side(kept[0], kept[1], weights)
        _, _, need_x, _, *needs = ctx.needs_input_grad
        needs = [need_x, *needs]
        if all(g is None for g in grads):
            return (None,) * len(ctx.needs_input_grad)
        upstream = Upstream(*grads)
        if beyond_kernels(grads):
            found = differentiable_backward(cell, needs, x, steps, h0, c0, weights, upstream)
        else:
            found = backward(cell, needs, x, steps, h0, c0, weights, y, kept, upstream)
        return None, None, found.x, None, found.h0, found.c0, *found.weights


class _Plain(torch.autograd.Function):
    """y, h_n[, c_n], or of a step h[, c], = plain(cell, batch_first, results, kept, x, h0, c0, *weights)

    ``_cpu.forward_plain`` has made the results; here is their derivative.
    """

    @staticmethod
    def forward(
        ctx: Any,
        cell: str,
        batch_first: bool,
        results: tuple[Tensor, ...],
        kept: tuple[Tensor, ...],
        x: Tensor,
        h0: Tensor | None,
        c0: Tensor | None,
        *weights: Tensor | None,
    ) -> tuple[Tensor, ...]:
        ctx.cell, ctx.batch_first = cell, batch_first
        ctx.set_materialize_grads(False)
        # Of a step, only the vanilla RNN's backward looks at h; who else changes theirs in place may.
        y = None if kept and x.dim() == 2 else results[0]
        ctx.save_for_backward(x, h0, c0, *weights, y, *kept)
        return results

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        (x, h0, c0), weights, y, kept = saved[:3], saved[3:7], saved[7], saved[8:]
        cell, batch_first, needs = ctx.cell, ctx.batch_first, ctx.needs_input_grad[4:]
        step = x.dim() == 2
        upstream = (None, *grads) if step else grads
        by_reference = beyond_kernels(grads)
        if not by_reference:
            own = [None if g is None else gradient(g) for g in upstream]
            grad_y, grad_h_n, grad_c_n = own if len(own) == 3 else (*own, None)
            short = _cpu.backward_plain(
                PLAIN,
                cell,
                needs,
                batch_first,
                x,
                h0,
                c0,
                weights,
                y,
                kept,
                grad_y,
                grad_h_n,
                grad_c_n,
                torch.get_num_threads(),
            )
            if short is not None:
                return None, None, None, None, *short
        if all(g is None for g in grads):
            return (None,) * len(ctx.needs_input_grad)

        def turned(t: Tensor | None) -> Tensor | None:
            return t.transpose(0, 1) if batch_first and t is not None else t

        x, y = turned(x), turned(y)
        upstream = turned(upstream[0]), *upstream[1:]
        if by_reference:
            if step:
                x, h0, c0 = (None if t is None else t.unsqueeze(0) for t in (x, h0, c0))
                upstream = tuple(None if g is None else g.unsqueeze(0) for g in upstream)
            found = differentiable_backward(cell, needs, x, None, h0, c0, weights, Upstream(*upstream))
            if step:
                x, h0, c0 = (None if g is None else g.squeeze(0) for g in (found.x, found.h0, found.c0))
                found = Gradients(x, h0, c0, found.weights)
        else:
            # Something has changed what was saved, as hooks of torch may: its rows are where the kernels do not read
            # them.
            if y is None:
                y = kept[0][:, : sizes(weights)[1]]  # for its size, where its values are of no use
            own = [None if g is None else gradient(g) for g in upstream]
            assert x is not None
            assert y is not None
            found = backward(cell, needs, x, None, h0, c0, weights, y, apart(cell, kept, weights), Upstream(*own))
        return None, None, None, None, turned(found.x), found.h0, found.c0, *found.weights


# Function.apply first looks for functorch's transforms and wrappers, and for default arguments. Here are none
# (obstacles.py), and a single step would feel it.
_apply_layer = super(torch.autograd.Function, _Layer).apply
_apply_plain = super(torch.autograd.Function, _Plain).apply


def reference_layer(
    cell: str,
    x: Tensor,
    steps: Steps,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor | None],
    cell_states: bool = True,
) -> Outputs:
    """A layer by :mod:`pyrnnfast.reference`: slow, of torch's operators alone, and so whatever they can do.

    Of 16 bits the kernels keep the operands and results only, and so does this.
    """
    wide = cells_dtype(x)
    data, h0, c0, *own = (t if t is None else t.to(wide) for t in (x, h0, c0, *weights))
    assert data is not None
    initial = None if h0 is None else (h0,) if c0 is None else (h0, c0)
    by_direction = [own[k : k + 4] for k in range(0, len(own), 4)]
    if isinstance(steps, Mask):
        states, final = reference.layer(cell, data, initial, by_direction, _padding(steps, x))
    else:
        sizes = [x.shape[1]] * x.shape[0] if steps is None else steps.tolist()
        states, final = reference.layer(cell, data.reshape(-1, x.shape[-1]), initial, by_direction, sizes)
    y, *cells = (s.view(*x.shape[:-1], s.shape[-1]) for s in states)
    h_n, *c_n = (s.to(x.dtype) for s in final)
    return Outputs(y.to(x.dtype), h_n, c_n[0] if c_n else None, cells[0] if cells and cell_states else None)


def _padding(mask: Mask, x: Tensor) -> reference.Padding:
    """Of data x [T, B, I]."""
    none = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
    steps = torch.arange(x.shape[0], device=x.device).unsqueeze(-1)
    return reference.Padding(
        ~none if mask.lengths is None else steps < mask.lengths, none if mask.reset is None else mask.reset
    )


@without_autocast
def differentiable_backward(
    cell: str,
    needs: Sequence[bool],
    x: Tensor,
    batch_sizes: Steps,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor | None],
    grads: Upstream,
) -> Gradients:
    """The gradients of a layer as functions that can be differentiated, by way of the reference.

    Args:
        needs: of x, h0, c0 and each weight, whether its gradient is wanted
    """
    if torch._C._are_functorch_transforms_active():
        return _backward_inside_transforms(cell, needs, x, batch_sizes, h0, c0, weights, grads)
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # A name of its own for each input: one tensor may come in twice, and each gets its own share of the gradient.
        inputs = [
            None if t is None else _named_anew(t, need) for t, need in zip((x, h0, c0, *weights), needs, strict=True)
        ]
        data, h0, c0, *weights = inputs
        assert data is not None
        outputs = reference_layer(cell, data, batch_sizes, h0, c0, weights)
    asked = [t for t, need in zip(inputs, needs, strict=True) if need and t is not None]
    used = [(o, g) for o, g in zip(outputs, grads, strict=True) if g is not None and o is not None]
    results = iter(
        torch.autograd.grad([o for o, _ in used], asked, [g for _, g in used], create_graph=again, allow_unused=True)
    )
    found = [next(results) if need and t is not None else None for t, need in zip(inputs, needs, strict=True)]
    return Gradients(found[0], found[1], found[2], tuple(found[3:]))


def _backward_inside_transforms(
    cell: str,
    needs: Sequence[bool],
    x: Tensor,
    batch_sizes: Steps,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor | None],
    grads: Upstream,
) -> Gradients:
    """The same where torch.func does not let autograd be used."""
    operands = (x, h0, c0, *weights)
    asked = [k for k, (t, need) in enumerate(zip(operands, needs, strict=True)) if need and t is not None]

    def forward(*chosen: Tensor | None) -> tuple[Tensor, ...]:
        own = list(operands)
        for k, t in zip(asked, chosen, strict=True):
            own[k] = t
        data, first, first_cell, *rest = own
        assert data is not None
        outputs = reference_layer(cell, data, batch_sizes, first, first_cell, rest)
        return tuple(o for o, g in zip(outputs, grads, strict=True) if g is not None and o is not None)

    back = torch.func.vjp(forward, *(operands[k] for k in asked))[1]
    found: list[Tensor | None] = [None] * len(operands)
    for k, g in zip(asked, back(tuple(g for g in grads if g is not None)), strict=True):
        found[k] = g
    return Gradients(found[0], found[1], found[2], tuple(found[3:]))


def _named_anew(t: Tensor, need: bool) -> Tensor:
    """A tensor that stands for this one alone, and has a gradient where it is needed, whatever becomes of it."""
    alias = t.view_as(t)
    # Asked of the alias: what a transform of torch.func has left behind only says that it does.
    return alias.detach().requires_grad_() if need and not alias.requires_grad else alias


@without_autocast
def second_backward(
    cell: str,
    needs: Sequence[bool],
    operands: Sequence[Tensor | None],
    batch_sizes: Steps,
    upstream: Upstream,
    grads: Sequence[Tensor | None],
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Back through a backward pass: the gradients of its operands and of its upstream gradients.

    What a forward pass has kept is a function of the operands, and the reference knows which: all goes to them.

    Args:
        needs: as of the backward pass
        operands: x, h0, c0 and the weights
        grads: of the gradients that the backward pass gave, as many as the operands
    """
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        own = [None if t is None else _named_anew(t, True) for t in operands]
        upper = [None if g is None else _named_anew(g, True) for g in upstream]
        data, h0, c0, *weights = own
        assert data is not None
        found = differentiable_backward(cell, needs, data, batch_sizes, h0, c0, weights, Upstream(*upper))
        used = [
            (r, g) for r, g in zip((*found[:3], *found.weights), grads, strict=True) if r is not None and g is not None
        ]
        asked = [t for t in (*own, *upper) if t is not None]
        second: Sequence[Tensor | None] = (
            torch.autograd.grad(
                [r for r, _ in used], asked, [g for _, g in used], create_graph=again, allow_unused=True
            )
            if used
            else [None] * len(asked)
        )
    results = iter(second)
    spread = [None if t is None else next(results) for t in (*own, *upper)]
    return spread[: len(own)], spread[len(own) :]


def differentiable(*tensors: Tensor | None) -> bool:
    """Whether autograd has to know of a call with these tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def layer(
    cell: str,
    x: Tensor,
    batch_sizes: Steps,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor | None],
    cell_states: bool,
) -> Outputs:
    """A layer with whatever of autograd the moment asks for.

    Arguments as of :func:`pyrnnfast.passes.forward`; ``cell_states``: whether all cell states are a result (LSTM).
    """
    if differentiable(x, h0, c0, *weights):
        found = _apply_layer(cell, cell_states, x, batch_sizes, h0, c0, *weights)
        return Outputs(*found, *(None,) * (4 - len(found)))
    if not cell_states:
        return Outputs(*forward(cell, x, batch_sizes, h0, c0, weights, ())[:3], None)
    cells = room_for_cells(x, weights)
    y, h_n, c_n, _ = forward(cell, x, batch_sizes, h0, c0, weights, side_by_side(None, cells, weights))
    return Outputs(y, h_n, c_n, cells)


def of_plain(
    cell: str,
    batch_first: bool,
    results: tuple[Tensor, ...],
    kept: tuple[Tensor, ...],
    x: Tensor,
    hx: Any,
    weights: tuple[Tensor, ...],
) -> Any:
    """What ``_cpu.forward_plain`` has made of these operands, with its derivative, as torch.nn's modules return it."""
    h0, c0 = hx if cell == "lstm" and hx is not None else (hx, None)
    found = _apply_plain(cell, batch_first, results, kept, x, h0, c0, *weights, *(None,) * (4 - len(weights)))
    y, *states = found if x.dim() == 3 else (None, *found)
    state = tuple(states) if cell == "lstm" else states[0]
    return state if y is None else (y, state)
