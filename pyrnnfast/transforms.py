"""A recurrent layer under torch.func: grad, vmap, and vmap over grad, on the kernels; what is deeper, on the reference.

vmap folds its dimension into the batch. Where the weights are mapped (an ensemble), each member runs by itself. The
gradients of each sample (vmap over grad) come from one pass back through time: it yields the gate gradients, and each
sample's weight gradients are products of its own rows.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import TransformType, get_interpreter_stack

from . import _cpu
from .autograd import (
    Outputs,
    beyond_kernels,
    differentiable,
    differentiable_backward,
    run_by_reference,
    second_backward,
)
from .passes import CELLS, Tensors, Upstream, backward, forward, room_for_cells, room_for_gates, side_by_side, sizes
from .segments import inside

# What the functions below are made for, the outermost first.
_SERVED = (
    [TransformType.Grad],
    [TransformType.Vmap],
    [TransformType.Vmap, TransformType.Vmap],
    [TransformType.Vmap, TransformType.Grad],
)


class _Layer(torch.autograd.Function):
    """y, h_n, c_n, cells, gates = layer(cell, keep, x, h0, c0, *weights)

    Dense, with the batch in dimension 1 of all: x [T, B, I], y and cells [T, B, D·H], gates [T, B, D·saved·H], states
    [D, B, H]. What a cell does not have is None; so are the gates that are not kept for backward.
    """

    @staticmethod
    def forward(
        cell: str, keep: bool, x: Tensor, h0: Tensor | None, c0: Tensor | None, *weights: Tensor | None
    ) -> Tensors:
        cells = room_for_cells(x, weights) if CELLS[cell].has_cell else None
        gates = room_for_gates(cell, x, weights) if CELLS[cell].saved and keep else None
        kept = side_by_side(gates, cells, weights)
        y, h_n, c_n, _ = forward(cell, x, None, h0, c0, weights, kept)
        return y, h_n, c_n, cells, gates

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
        cell, _, x, h0, c0, *weights = inputs
        y, _, _, cells, gates = output
        ctx.cell, ctx.count = cell, len(weights)
        if gates is not None:
            ctx.mark_non_differentiable(gates)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, h0, c0, *weights, y, gates, cells)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, h0, c0, *rest = ctx.saved_tensors
        weights, kept = rest[: ctx.count], rest[ctx.count :]
        _, _, *needs = ctx.needs_input_grad
        upstream = grads[:4]
        if all(g is None for g in upstream):
            return (None,) * len(ctx.needs_input_grad)
        # torch.func enables gradients for whatever it does; what it asks for by that, the kernels have.
        transformed = torch._C._are_functorch_transforms_active() and torch.autograd.forward_ad._current_level < 0
        if not transformed and beyond_kernels(upstream):
            run, operands = run_by_reference(ctx.cell, None), (x, h0, c0, *weights)
            return None, None, *differentiable_backward(run, needs, operands, Upstream(*upstream))
        *found, _ = _Backward.apply(ctx.cell, tuple(needs), False, x, h0, c0, *kept, *upstream, *weights)
        return None, None, *found

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], cell: str, keep: bool, *operands: Any) -> tuple[Any, Any]:
        data, weights = operands[:3], operands[3:]
        data_dims, weight_dims = in_dims[2:5], in_dims[5:]
        if any(d is not None for d in weight_dims):
            return _one_by_one(_Layer, (cell, keep), info.batch_size, in_dims[2:], operands)
        folded = [_fold(t, d, info.batch_size) for t, d in zip(data, data_dims, strict=True)]
        return _unfolded(_Layer.apply(cell, keep, *folded, *weights), info.batch_size)


class _Backward(torch.autograd.Function):
    """dx, dh0, dc0, *dweights, dgates = backward(cell, needs, dgates?, x, h0, c0, y, gates, cells, *grads, *weights)

    The batch in dimension 1 of all but the weights, as above; dgates [T, B, D·dgates·H].
    """

    @staticmethod
    def forward(cell: str, needs: tuple[bool, ...], with_dgates: bool, *operands: Tensor | None) -> Tensors:
        x, h0, c0, y, gates, cells, *rest = operands
        upstream, weights = Upstream(*rest[:4]), rest[4:]
        assert x is not None
        assert y is not None
        directions, hidden, _ = sizes(weights)
        dgates = x.new_empty(*x.shape[:2], directions * CELLS[cell].dgates * hidden) if with_dgates else None
        kept = side_by_side(gates, cells, weights)
        found = backward(cell, needs, x, None, h0, c0, weights, y, kept, upstream, dgates)
        return found.x, found.h0, found.c0, *found.weights, dgates

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
        ctx.cell, ctx.needs, ctx.with_dgates, x, h0, c0, _, _, _, *rest = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, h0, c0, *rest)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Of ordinary autograd, outside of the transforms that the kernels have served."""
        assert not ctx.with_dgates
        x, h0, c0, *rest = ctx.saved_tensors
        upstream, operands = Upstream(*rest[:4]), (x, h0, c0, *rest[4:])
        run = run_by_reference(ctx.cell, None)
        of_operands, of_upstream = second_backward(run, ctx.needs, operands, upstream, grads[:-1])
        return None, None, None, *of_operands[:3], None, None, None, *of_upstream, *of_operands[3:]

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], cell: str, needs: tuple[bool, ...], with_dgates: bool, *operands: Any
    ) -> tuple[Any, Any]:
        dims, size = in_dims[3:], info.batch_size
        # dgates have no derivative, so what ordinary autograd will come back to does without them.
        if any(d is not None for d in dims[10:]) or (any(needs[3:]) and differentiable(*operands)):
            return _one_by_one(_Backward, (cell, needs, with_dgates), size, dims, operands)
        weights = operands[10:]
        folded = [_fold(t, d, size) for t, d in zip(operands[:10], dims, strict=False)]
        own_needs, each_sample = needs[:3] + (False,) * len(weights), any(needs[3:])
        run = _Backward.apply(cell, own_needs, each_sample or with_dgates, *folded, *weights)
        (*found, dgates), _ = _unfolded(run, size)
        if each_sample:
            x, h0, _, y = (None if t is None else t.unflatten(1, (size, -1)) for t in folded[:4])
            assert x is not None
            assert y is not None
            assert dgates is not None
            found[3:] = _weight_gradients(cell, needs[3:], x, h0, y, dgates)
        results = *found, dgates if with_dgates else None
        ours = [None if t is None else 1 for t in found[:3]] + [None if t is None else 0 for t in found[3:]]
        return results, (*ours, 1 if with_dgates else None)


def _fold(t: Tensor | None, dim: int | None, size: int) -> Tensor | None:
    """The mapped dimension made one with the batch, in rows that do not share memory."""
    if t is None:
        return None
    mapped = t.unsqueeze(1).expand(t.shape[0], size, *t.shape[1:]) if dim is None else t.movedim(dim, 1)
    return mapped.flatten(1, 2).contiguous()


def _unfolded(results: Sequence[Tensor | None], size: int) -> tuple[Tensors, tuple[int | None, ...]]:
    """And back, with the places of the mapped dimensions."""
    found = tuple(None if t is None else t.unflatten(1, (size, -1)) for t in results)
    return found, tuple(None if t is None else 1 for t in found)


def _one_by_one(
    function: type[torch.autograd.Function],
    options: tuple[Any, ...],
    size: int,
    dims: Sequence[int | None],
    operands: Sequence[Tensor | None],
) -> tuple[Tensors, tuple[int | None, ...]]:
    """Each of the mapped calls of a function by itself, the results stacked."""
    # What apply does besides takes as long as a short layer: only for those who look, other transforms or autograd.
    call = function.apply if _active() or differentiable(*operands) else function.forward
    each = [(t,) * size if t is None or d is None else t.unbind(d) for t, d in zip(operands, dims, strict=True)]
    runs = [call(*options, *one) for one in zip(*each, strict=True)]
    found = tuple(None if parts[0] is None else torch.stack(parts) for parts in zip(*runs, strict=True))
    return found, tuple(None if t is None else 0 for t in found)


def _weight_gradients(
    cell: str, needs: Sequence[bool], x: Tensor, h0: Tensor | None, y: Tensor, dgates: Tensor
) -> list[Tensor | None]:
    """Of each sample: the products of its own rows.

    Args:
        x, h0, y, dgates: [T or D, samples, B, ...]
    """
    directions = len(needs) // 4
    found: list[Tensor | None] = []
    for d in range(directions):
        states, own = y.chunk(directions, -1)[d], dgates.chunk(directions, -1)[d]
        first = torch.zeros_like(states[:1]) if h0 is None else h0[d : d + 1]
        previous = torch.cat([first, states[:-1]] if d == 0 else [states[1:], first])
        x_rows, h_rows, left = (t.movedim(1, 0).flatten(1, 2) for t in (x, previous, own))
        hidden = left.shape[-1] // CELLS[cell].dgates
        for_x = [left[..., : CELLS[cell].gates * hidden]]
        # Of the GRU's: r and z, and the recurrent half of n, which stands behind the other one.
        for_h = [left[..., : 2 * hidden], left[..., 3 * hidden :]] if cell == "gru" else for_x
        need = needs[4 * d : 4 * d + 4]
        found += [
            _joined([_outer_products(part, x_rows) for part in for_x]) if need[0] else None,
            _joined([_outer_products(part, h_rows) for part in for_h]) if need[1] else None,
            _joined([part.sum(1) for part in for_x]) if need[2] else None,
            _joined([part.sum(1) for part in for_h]) if need[3] else None,
        ]
    return found


def _outer_products(a: Tensor, b: Tensor) -> Tensor:
    """Of each sample the sum over its rows of their outer products: [S, K, M] and [S, K, N] give [S, M, N]."""
    if not a.is_cpu or a.dtype not in (torch.float32, torch.float64) or differentiable(a, b):
        return a.mT @ b
    out = a.new_empty(len(a), a.shape[2], b.shape[2])
    _cpu.outer_products(a, b, out, torch.get_num_threads())
    return out


def _joined(parts: list[Tensor]) -> Tensor:
    """[samples, rows, ...] each, one below the other; without a copy where there is one."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def on_kernels() -> bool:
    """Whether the kernels serve the transforms that are active, of dense data; forward mode is one of them.

    Where somebody records operators as well, they get those that the reference is made of.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        return False
    return _active() in _SERVED and torch.autograd.forward_ad._current_level < 0


def _active() -> list[TransformType]:
    return [interpreter.key() for interpreter in get_interpreter_stack() or ()]


def layer(
    cell: str,
    x: Tensor,
    batch_sizes: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor | None],
    cell_states: bool,
) -> Outputs:
    """:func:`pyrnnfast.autograd.layer` under the transforms that are active."""
    assert batch_sizes is None
    keep = TransformType.Grad in _active() or differentiable(
        # What vmap has wrapped says nothing of gradients by itself.
        *(None if t is None else inside(t) for t in (x, h0, c0, *weights))
    )
    y, h_n, c_n, cells, _ = _Layer.apply(cell, keep, x, h0, c0, *weights)
    return Outputs(y, h_n, c_n, cells if cell_states else None)
