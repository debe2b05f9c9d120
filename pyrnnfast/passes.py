"""One recurrent layer, forward and back through time: the kernels' operands and results.

All arithmetic of a pass, products included, happens in one call of ``_cpu``. Here is what surrounds it: memory for the
results, and rows that are contiguous. Written once for all cells, layers and single steps.

Notation as in :mod:`pyrnnfast.reference`. Data are [T, B, features], [N, features] when packed, or [B, features] for a
single step, whose states then are [B, H] instead of [D, B, H].
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import _cpu

Tensors = tuple[Tensor | None, ...]


class Cell(NamedTuple):
    """What of a cell matters out here, as in ``csrc/cells.h``."""

    gates: int
    saved: int  # columns kept for backward, in units of H
    has_cell: bool


CELLS = {
    "rnn_tanh": Cell(1, 0, has_cell=False),
    "rnn_relu": Cell(1, 0, has_cell=False),
    "gru": Cell(3, 4, has_cell=False),
    "lstm": Cell(4, 4, has_cell=True),
}


def _rows(matrix: Tensor | None) -> Tensor | None:
    """The same values, contiguous: the kernels want equally distant rows of contiguous elements."""
    return matrix if matrix is None or matrix.is_contiguous() else matrix.contiguous()


def _gradient(matrix: Tensor | None) -> Tensor | None:
    """The same of a gradient, which autograd may hand over with a lazy sign that only torch knows of."""
    return None if matrix is None else _rows(matrix.resolve_neg())


def forward(
    cell: str,
    x: Tensor,
    batch_sizes: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor | None],
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensors]:
    """Runs a layer forward.

    Args:
        x: [T, B, I], or [N, I] when packed
        batch_sizes: of packed data, int64 [T] on the CPU
        h0, c0: [D, B, H] or None
        weights: weight_ih, weight_hh, bias_ih, bias_hh of each direction
        keep: whether backward will follow

    Returns:
        y [T, B, D·H] or [N, D·H], h_n and c_n [D, B, H], and what backward needs.
    """
    directions, hidden = _sizes(weights)
    if batch_sizes is None:
        steps, batch, _ = x.shape
        y = x.new_empty(steps, batch, directions * hidden)
    else:
        batch = int(batch_sizes[0])
        y = x.new_empty(x.shape[0], directions * hidden)
    h_n = x.new_empty(directions, batch, hidden)
    c_n, kept = _forward(cell, x, batch_sizes, h0, c0, weights, y, h_n, keep)
    return y, h_n, c_n, kept


def forward_step(
    cell: str, x: Tensor, h0: Tensor | None, c0: Tensor | None, weights: Sequence[Tensor | None], keep: bool
) -> tuple[Tensor, Tensor | None, Tensors]:
    """:func:`forward` of one step in one direction. x: [B, I]; h0, c0, and the results h and c: [B, H]."""
    h = x.new_empty(x.shape[0], _sizes(weights)[1])
    # With one step, its output and the final state are the same values: the kernel writes them to the same place.
    c, kept = _forward(cell, x, None, h0, c0, weights, h, h, keep)
    return h, c, kept


def _sizes(weights: Sequence[Tensor | None]) -> tuple[int, int]:
    """Directions and H."""
    weight_hh = weights[1]
    assert weight_hh is not None
    return len(weights) // 4, weight_hh.shape[1]


def _forward(
    name: str,
    x: Tensor,
    batch_sizes: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor | None],
    y: Tensor,
    h_n: Tensor,
    keep: bool,
) -> tuple[Tensor | None, Tensors]:
    """Returns c_n, and what backward needs: of each direction gates [N, saved·H] and cells [N, H]."""
    cell = CELLS[name]
    c_n = torch.empty_like(h_n) if cell.has_cell else None
    kept: Tensors = ()
    if keep:
        directions, hidden = _sizes(weights)
        for _ in range(directions):
            kept += _room_to_keep(cell, x, hidden)
    _cpu.forward(
        name,
        _rows(x),  # type: ignore[arg-type]
        _rows(h0),
        _rows(c0),
        tuple([_rows(w) for w in weights]),
        y,
        h_n,
        c_n,
        kept,
        batch_sizes,
        torch.get_num_threads(),
    )
    return c_n, kept


def _room_to_keep(cell: Cell, x: Tensor, hidden: int) -> tuple[Tensor | None, Tensor | None]:
    rows, columns = x.shape[:-1].numel(), cell.saved * hidden
    if not cell.has_cell:
        return x.new_empty(rows, columns) if columns else None, None
    if x.dtype is torch.bfloat16:  # the cell state stays in float32
        return x.new_empty(rows, columns), x.new_empty(rows, hidden, dtype=torch.float32)
    # One block: glibc keeps twice as much free memory as the largest block that it has seen, up to 32 MB, and gives the
    # rest back to the system, so that it comes fresh, page by page, at every step. The fewer blocks the better.
    gates, cells = x.new_empty(rows, columns + hidden).split([columns, hidden], 1)
    return gates, cells


class Gradients(NamedTuple):
    """Of a layer's operands; None where nobody asks."""

    x: Tensor | None
    h0: Tensor | None
    c0: Tensor | None
    weights: Tensors


def backward(
    cell: str,
    needs: Sequence[bool],
    x: Tensor,
    batch_sizes: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor | None],
    y: Tensor,
    kept: Tensors,
    grads: Sequence[Tensor | None],
) -> Gradients:
    """Runs a layer, or a single step, back through time.

    Args:
        needs: of x, h0, c0 and each weight, whether its gradient is wanted
        x, batch_sizes, h0, c0, weights, y, kept: operands and results of :func:`forward` or :func:`forward_step`
        grads: of y, h_n and c_n
    """
    dx, dh0, dc0, *dweights = [
        torch.empty_like(t, memory_format=torch.contiguous_format) if need and t is not None else None
        for t, need in zip((x, h0, c0, *weights), needs, strict=True)
    ]
    grad_y, grad_h_n, grad_c_n = grads
    out = Gradients(dx, dh0, dc0, tuple(dweights))
    _cpu.backward(
        cell,
        _rows(x),  # type: ignore[arg-type]
        _rows(h0),
        _rows(c0),
        tuple([_rows(w) for w in weights]),
        y,
        kept,
        _gradient(grad_y),
        _gradient(grad_h_n),
        _gradient(grad_c_n),
        *out,
        batch_sizes,
        torch.get_num_threads(),
    )
    return out
