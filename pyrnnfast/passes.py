"""One recurrent layer, forward and back through time: the kernels' operands and results.

All arithmetic of a pass, products included, happens in one call of ``_cpu``, or of ``_cuda`` by way of cuda.py. Here is
what surrounds it: memory for the results, and rows that are contiguous. Written once for all cells, layers and single
steps.

Notation as in :mod:`pyrnnfast.reference`. Data are [T, B, features], [N, features] when packed, or [B, features] for a
single step, whose states then are [B, H] instead of [D, B, H].
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import _cpu, cuda
from .profiling import profiled

Tensors = tuple[Tensor | None, ...]

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
"""What the kernels serve."""

NARROW = (torch.bfloat16, torch.float16)
"""Those of them that are for memory: what is computed with is float32."""


class Mask(NamedTuple):
    """Which steps of padded data are real, for kernels on CUDA and the reference: nobody waits to know the values."""

    lengths: Tensor | None
    """[B], int64: how many steps each sequence has; beyond 0 … T as near."""
    reset: Tensor | None
    """[T, B], bool: whether its state is cleared before a step."""


Steps = Tensor | Mask | None
"""Which steps sequences have: ``batch_sizes`` of packed data, a mask of padded data, or all of dense data."""


class Cell(NamedTuple):
    """What of a cell matters out here, as in ``csrc/cells.h``."""

    gates: int
    saved: int  # columns kept for backward, in units of H
    dgates: int  # columns of gate gradients, likewise
    has_cell: bool


CELLS = {
    "rnn_tanh": Cell(1, 0, 1, has_cell=False),
    "rnn_relu": Cell(1, 0, 1, has_cell=False),
    "gru": Cell(3, 4, 4, has_cell=False),
    "lstm": Cell(4, 4, 4, has_cell=True),
}


def _rows(matrix: Tensor | None) -> Tensor | None:
    """The same values, contiguous: the kernels want equally distant rows of contiguous elements."""
    return matrix if matrix is None or matrix.is_contiguous() else matrix.contiguous()


def _columns_together(kept: Tensor | None) -> Tensor | None:
    """The same of what a forward pass has kept, whose rows may be apart: hooks for saved tensors may change strides."""
    return kept if kept is None or kept.stride(-1) == 1 else kept.contiguous()


def gradient(matrix: Tensor | None) -> Tensor | None:
    """The same of an upstream gradient, which autograd may hand over with a lazy sign that only torch knows of, or as
    zeros that have no memory."""
    if matrix is None:
        return None
    return _rows(matrix.clone() if matrix._is_zerotensor() else matrix.resolve_neg())


class Results(NamedTuple):
    """Of :func:`forward`: y [T, B, D·H] or [N, D·H]; h_n and c_n [D, B, H]; what backward needs."""

    y: Tensor
    h_n: Tensor
    c_n: Tensor | None
    kept: Tensors


def forward(
    cell: str,
    x: Tensor,
    batch_sizes: Steps,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor | None],
    kept: Tensors,
) -> Results:
    """Runs a layer forward.

    Args:
        x: [T, B, I], or [N, I] when packed
        batch_sizes: of packed data, int64 [T] on the CPU; or, on CUDA, a mask of padded data
        h0, c0: [D, B, H] or None
        weights: weight_ih, weight_hh, bias_ih, bias_hh of each direction
        kept: room for what backward needs, see :func:`room_to_keep`; (): there will be none
    """
    directions, hidden, outputs = sizes(weights)
    batch = int(batch_sizes[0]) if isinstance(batch_sizes, Tensor) else x.shape[1]
    y = x.new_empty(*x.shape[:-1], directions * outputs)
    h_n = x.new_empty(directions, batch, outputs)
    c_n = x.new_empty(directions, batch, hidden) if CELLS[cell].has_cell else None
    run: Callable[..., None] = cuda.forward if cuda.takes(x) else _cpu.forward
    own = tuple([_rows(w) for w in weights])
    operands = _rows(x), _rows(h0), _rows(c0), own, y, h_n, c_n, kept, batch_sizes
    profiled(cell, "forward", run, cell, *operands, torch.get_num_threads())
    return Results(y, h_n, c_n, kept)


class Sizes(NamedTuple):
    """Of a layer."""

    directions: int
    hidden: int
    outputs: int
    """Columns of h of a direction: H, or P of an LSTM with a projection."""


def weights_each(weights: Sequence[object]) -> int:
    """How many weights a direction has: five with ``weight_hr``, else four, some of which may be None. These are all of
    one or of two directions."""
    return 5 if len(weights) in (5, 10) else 4


def sizes(weights: Sequence[Tensor | None]) -> Sizes:
    each = weights_each(weights)
    weight_hh, last = weights[1], weights[each - 1]
    assert weight_hh is not None
    outputs = hidden = weight_hh.shape[1]
    if each == 5:
        assert last is not None
        hidden = last.shape[1]
    return Sizes(len(weights) // each, hidden, outputs)


def cells_dtype(x: Tensor) -> torch.dtype:
    """The cell state stays in float32 where the data are narrower."""
    return torch.float32 if x.dtype in NARROW else x.dtype


def room_to_keep(name: str, x: Tensor, weights: Sequence[Tensor | None]) -> Tensors:
    """What a forward pass is to fill for backward: of each direction gates [N, saved·H] and cells [N, H]."""
    cell, (directions, hidden, _) = CELLS[name], sizes(weights)
    if not cell.saved:
        return (None, None) * directions
    rows, columns = x.shape[:-1].numel(), cell.saved * hidden
    kept: Tensors = ()
    for _ in range(directions):
        if not cell.has_cell:
            kept += x.new_empty(rows, columns), None
        elif cells_dtype(x) is not x.dtype:
            kept += x.new_empty(rows, columns), x.new_empty(rows, hidden, dtype=cells_dtype(x))
        else:
            # One block: glibc keeps twice as much free memory as the largest block that it has seen, up to 32 MB, and
            # gives the rest back to the system, so that it comes fresh, page by page, at every step. The fewer blocks
            # the better.
            kept += tuple(x.new_empty(rows, columns + hidden).split([columns, hidden], 1))
    return kept


def room_for_gates(cell: str, x: Tensor, weights: Sequence[Tensor | None]) -> Tensor:
    """For what backward needs of the gates of all directions, side by side: [..., D·saved·H]."""
    directions, hidden, _ = sizes(weights)
    return x.new_empty(*x.shape[:-1], directions * CELLS[cell].saved * hidden)


def room_for_cells(x: Tensor, weights: Sequence[Tensor | None]) -> Tensor:
    """Likewise for all cell states: [..., D·H]."""
    directions, hidden, _ = sizes(weights)
    return x.new_empty(*x.shape[:-1], directions * hidden, dtype=cells_dtype(x))


def side_by_side(gates: Tensor | None, cells: Tensor | None, weights: Sequence[Tensor | None]) -> Tensors:
    """The columns of each direction, as a pass takes them; None for what a cell does not have or nobody asks for."""
    directions = sizes(weights).directions
    parts = [
        (None,) * directions if t is None else t.reshape(-1, t.shape[-1]).chunk(directions, 1) for t in (gates, cells)
    ]
    return tuple(t for pair in zip(*parts, strict=True) for t in pair)


class Gradients(NamedTuple):
    """Of a layer's operands; None where nobody asks."""

    x: Tensor | None
    h0: Tensor | None
    c0: Tensor | None
    weights: Tensors


class Upstream(NamedTuple):
    """The gradients of a layer's results: as y, h_n and c_n, and that of all cell states [..., D·H]."""

    y: Tensor | None
    h_n: Tensor | None
    c_n: Tensor | None = None
    cells: Tensor | None = None


def backward(
    cell: str,
    needs: Sequence[bool],
    x: Tensor,
    batch_sizes: Steps,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor | None],
    y: Tensor,
    kept: Tensors,
    grads: Upstream,
    dgates: Tensor | None = None,
) -> Gradients:
    """Runs a layer, or a single step, back through time.

    Args:
        needs: of x, h0, c0 and each weight, whether its gradient is wanted
        x, batch_sizes, h0, c0, weights, y, kept: operands and results of :func:`forward`; of a step, [B, …] each
        dgates: to be filled with the gate gradients of each row and direction, [..., D·dgates·H]
    """
    dx, dh0, dc0, *dweights = [
        torch.empty_like(t, memory_format=torch.contiguous_format) if need and t is not None else None
        for t, need in zip((x, h0, c0, *weights), needs, strict=True)
    ]
    run: Callable[..., None] = cuda.backward if cuda.takes(x) else _cpu.backward
    profiled(
        cell,
        "backward",
        run,
        cell,
        _rows(x),
        _rows(h0),
        _rows(c0),
        tuple([_rows(w) for w in weights]),
        _rows(y),
        tuple([_columns_together(k) for k in kept]),
        gradient(grads.y),
        gradient(grads.h_n),
        gradient(grads.c_n),
        gradient(grads.cells),
        dx,
        dh0,
        dc0,
        tuple(dweights),
        dgates,
        batch_sizes,
        torch.get_num_threads(),
    )
    return Gradients(dx, dh0, dc0, tuple(dweights))
