"""One recurrent layer, forward and back through time: the kernels, and torch's products around them.

The kernels of ``_cpu`` do the products that have to wait for a step before them and, for all but small batches, the
input's, ``x W_ihᵀ + b``, along the way. Around them stand torch's products over all steps at once: that one otherwise,
``dx``, ``dW_ih``, ``dW_hh`` and ``db`` after the backward pass, and the product of the initial state, ``h0 W_hhᵀ``.

Written once for all cells. Notation as in :mod:`pyrnnfast.reference`; rows are time-major.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import _cpu


class Cell(NamedTuple):
    """What of a cell matters out here. Columns in units of H, as in ``csrc/cells.h``."""

    gates: int
    saved: int  # columns kept for backward
    dgates: int
    # Slices of weight_hh's rows with the columns of dgates that are their gradient.
    recurrent: tuple[tuple[slice, slice], ...]
    has_cell: bool
    # The last gate's recurrent bias stays inside: r ⊙ (W_hn h + b_hn).
    inner_bias: bool


_RNN = Cell(1, 0, 1, ((slice(0, 1), slice(0, 1)),), has_cell=False, inner_bias=False)
CELLS = {
    "rnn_tanh": _RNN,
    "rnn_relu": _RNN,
    "gru": Cell(
        3,
        4,
        4,
        ((slice(0, 2), slice(0, 2)), (slice(2, 3), slice(3, 4))),
        has_cell=False,
        inner_bias=True,
    ),
    "lstm": Cell(4, 4, 4, ((slice(0, 4), slice(0, 4)),), has_cell=True, inner_bias=False),
}


class Call(NamedTuple):
    """A layer's call, apart from its tensors."""

    cell: str
    batch: int
    batch_sizes: Tensor | None  # of packed data: int64 [T] on the CPU


class Saved(NamedTuple):
    """What one direction keeps for backward."""

    gates: Tensor | None  # [N, saved·H]
    cells: Tensor | None  # [N, H]


def _scaled(columns: slice, hidden: int) -> slice:
    return slice(columns.start * hidden, columns.stop * hidden)


def _rows(matrix: Tensor | None) -> Tensor | None:
    """The matrix with contiguous, non-overlapping rows, as the kernels want them."""
    if matrix is None:
        return None
    if matrix.is_neg():  # a lazy sign, which only torch knows of; gradients may have it
        matrix = matrix.resolve_neg()
    return matrix if matrix.stride(-1) == 1 and matrix.stride(0) >= matrix.shape[-1] else matrix.contiguous()


def _biases(cell: Cell, bias_ih: Tensor | None, bias_hh: Tensor | None, hidden: int) -> tuple[Tensor | None, ...]:
    """The bias that goes into xgates, and the one inside the cell."""
    if bias_ih is None or bias_hh is None:
        return None, None
    if not cell.inner_bias:
        return bias_ih + bias_hh, None
    outer = bias_ih.clone()
    outer[:-hidden] += bias_hh[:-hidden]
    return outer, _rows(bias_hh[-hidden:])


def _forward_direction(
    call: Call,
    reverse: bool,
    x: Tensor,
    h_first: Tensor | None,
    c_first: Tensor | None,
    weights: Sequence[Tensor | None],
    out: tuple[Tensor, Tensor, Tensor | None],
    keep: bool,
) -> Saved:
    """Args: x: [N, I]; h_first, c_first: [B, H] or None; out: y [N, H], h_n and c_n [B, H], all written here."""
    cell = CELLS[call.cell]
    weight_ih, weight_hh, bias_ih, bias_hh = weights
    assert weight_ih is not None and weight_hh is not None
    y, h_n, c_n = out
    rows, hidden = y.shape
    bias, bias_hn = _biases(cell, bias_ih, bias_hh, hidden)
    cells = x.new_empty(rows, hidden) if keep and cell.has_cell else None

    def recur(
        inputs: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None],
        y: Tensor,
        h0: Tensor | None,
        c0: Tensor | None,
        gates: Tensor | None,
    ) -> None:
        """inputs: xgates, or else x, weight_ih and bias; gates: where to save them."""
        _cpu.forward(
            call.cell,
            *inputs,
            _rows(weight_hh),
            bias_hn,
            None if h0 is None else torch.mm(h0, weight_hh.t()),
            _rows(h0),
            _rows(c0),
            y,
            h_n,
            c_n,
            gates,
            cells,
            call.batch_sizes,
            reverse,
            torch.get_num_threads(),
        )

    if rows > call.batch >= _FUSED_INPUT_BATCH and _cpu.instruction_set() != "generic":
        gates = x.new_empty(rows, cell.saved * hidden) if keep and cell.saved else None
        recur((None, _rows(x), _rows(weight_ih), bias), y, h_first, c_first, gates)
        return Saved(gates, cells)
    # The kernel overwrites xgates with what it saves, so they get the room of both: [N, max(gates, saved)·H].
    width = max(cell.gates, cell.saved if keep else 0) * hidden
    stretch = rows if keep or call.batch_sizes is not None else _stretch(rows, call.batch, width * x.element_size())
    workspace = x.new_empty(stretch, width)
    gates = workspace if keep and cell.saved else None
    for start in reversed(range(0, rows, stretch)) if reverse else range(0, rows, stretch):
        end = min(start + stretch, rows)
        x_part, y_part = (x, y) if end - start == rows else (x[start:end], y[start:end])
        xgates = workspace if len(x_part) == stretch else workspace[: end - start]
        if width > cell.gates * hidden:
            xgates = xgates[:, : cell.gates * hidden]
        if bias is None:
            torch.mm(x_part, weight_ih.t(), out=xgates)
        else:
            torch.addmm(bias, x_part, weight_ih.t(), out=xgates)
        recur((xgates, None, None, None), y_part, h_first, c_first, gates)
        h_first, c_first = h_n, c_n
    return Saved(gates, cells)


# From this batch size on the kernel applies the input product as well: its tile is as fast as torch's product then, and
# xgates need not be written and read again. With fewer rows, reading W_ih at every step would cost more.
_FUSED_INPUT_BATCH = 8

# Inference needs xgates of all steps at once for no reason but speed. Memory of some megabytes is taken from the heap
# again and again; beyond 32 MB glibc asks the system each time, whose fresh pages cost more than the whole recurrence.
_WORKSPACE_BYTES = 16 << 20


def _stretch(rows: int, batch: int, row_bytes: int) -> int:
    """Rows, a whole number of steps, to which inference applies the input product at once."""
    return min(rows, max(1, _WORKSPACE_BYTES // (batch * row_bytes)) * batch)


def forward(
    call: Call, x: Tensor, h0: Tensor | None, c0: Tensor | None, weights: Sequence[Tensor | None], keep: bool
) -> tuple[Tensor, Tensor, Tensor | None, list[Saved]]:
    """Runs a layer forward.

    Args:
        x: [T, B, I], or [N, I] when packed
        h0, c0: [D, B, H] or None
        weights: weight_ih, weight_hh, bias_ih, bias_hh of each direction
        keep: whether backward will follow

    Returns:
        y [T, B, D·H] or [N, D·H], h_n and c_n [D, B, H], and what backward needs of each direction.
    """
    directions = len(weights) // 4
    weight_hh = weights[1]
    assert weight_hh is not None
    hidden = weight_hh.shape[1]
    flat = x.reshape(-1, x.shape[-1])  # [N, I]
    y = x.new_empty(*x.shape[:-1], directions * hidden)
    outputs = y.view(len(flat), -1)
    h_n = x.new_empty(directions, call.batch, hidden)
    c_n = torch.empty_like(h_n) if CELLS[call.cell].has_cell else None
    kept = [
        _forward_direction(
            call,
            d == 1,
            flat,
            None if h0 is None else h0[d],
            None if c0 is None else c0[d],
            weights[4 * d : 4 * d + 4],
            (outputs[:, d * hidden : (d + 1) * hidden], h_n[d], None if c_n is None else c_n[d]),
            keep,
        )
        for d in range(directions)
    ]
    return y, h_n, c_n, kept


def forward_step(
    call: Call, x: Tensor, h0: Tensor | None, c0: Tensor | None, weights: Sequence[Tensor | None], keep: bool
) -> tuple[Tensor, Tensor | None, Saved]:
    """:func:`forward` of one step in one direction. x: [B, I]; h0, c0, and the results h and c: [B, H]."""
    weight_hh = weights[1]
    assert weight_hh is not None
    h = x.new_empty(call.batch, weight_hh.shape[1])
    c = torch.empty_like(h) if CELLS[call.cell].has_cell else None
    # With one step, its output and the final state are the same values: the kernel writes them to the same place.
    return h, c, _forward_direction(call, False, x, h0, c0, weights, (h, h, c), keep)


def _packed_neighbours(batch_sizes: Tensor, reverse: bool) -> Tensor:
    """For each row of packed data, the row of its sequence one step earlier in processing order, int64 [N].

    Sequence r has none at its first step: the index is N + r there.
    """
    steps = torch.arange(len(batch_sizes)).repeat_interleave(batch_sizes)  # of each row
    rows = torch.arange(len(steps))
    sequence = rows - (batch_sizes.cumsum(0) - batch_sizes)[steps]
    if reverse:
        after = torch.cat([batch_sizes[1:], batch_sizes.new_zeros(1)])[steps]
        return torch.where(sequence < after, rows + batch_sizes[steps], len(steps) + sequence)
    return torch.where(steps > 0, rows - batch_sizes[steps - 1], len(steps) + sequence)


class DirectionGradients(NamedTuple):
    """Gradients of one direction's operands; None where nobody asks."""

    dgates_in: Tensor  # [N, G·H], with respect to xgates
    h0: Tensor | None
    c0: Tensor | None
    weight_ih: Tensor | None
    weight_hh: Tensor | None
    bias_ih: Tensor | None
    bias_hh: Tensor | None


def _weight_hh_gradient(
    call: Call, dgates: Tensor, y: Tensor, h_first: Tensor | None, neighbours: Tensor | None, reverse: bool
) -> Tensor:
    """dW_hh = Σ_t dgates_tᵀ h_{t−1}, as products over all steps.

    Args:
        dgates: [N, D·H]; y: [N, H]; h_first: [B, H] or None
        neighbours: of packed data
    """
    cell = CELLS[call.cell]
    hidden = y.shape[1]
    if neighbours is not None:
        first = y.new_zeros(call.batch, hidden) if h_first is None else h_first
        pairs = [(dgates, torch.cat([y, first]).index_select(0, neighbours))]
    else:
        inner = len(y) - call.batch
        later, earlier = (
            (slice(0, inner), slice(call.batch, None)) if reverse else (slice(call.batch, None), slice(0, inner))
        )
        start = slice(inner, None) if reverse else slice(0, call.batch)
        pairs = [(dgates[later], y[earlier])] if inner > 0 else []
        if h_first is not None:
            pairs.append((dgates[start], h_first))
    out = y.new_empty(cell.gates * hidden, hidden)
    if not pairs:
        return out.zero_()
    for rows, columns in cell.recurrent:
        part = out[_scaled(rows, hidden)]
        for k, (gradient, states) in enumerate(pairs):
            left = gradient[:, _scaled(columns, hidden)].t()
            if k == 0:
                torch.mm(left, states, out=part)
            else:
                part.addmm_(left, states)
    return out


def _initial_rows(call: Call, dgates: Tensor, neighbours: Tensor | None, reverse: bool) -> Tensor:
    """The rows of dgates at the first step of each sequence, in processing order: [B, D·H]."""
    if not reverse:
        return dgates[: call.batch]
    if neighbours is None:
        return dgates[-call.batch :]
    starts = torch.nonzero(neighbours >= len(neighbours)).squeeze(1)
    order = neighbours.index_select(0, starts).argsort()
    return dgates.index_select(0, starts.index_select(0, order))


def backward_direction(
    call: Call,
    reverse: bool,
    needs: Sequence[bool],
    x: Tensor,
    y: Tensor,
    h_first: Tensor | None,
    c_first: Tensor | None,
    weights: Sequence[Tensor | None],
    saved: Saved,
    grads: Sequence[Tensor | None],
) -> DirectionGradients:
    """Args: needs: of h0, c0, weight_ih, weight_hh, bias_ih, bias_hh; x [N, I]; y [N, H]; grads: of y, h_n, c_n."""
    cell = CELLS[call.cell]
    weight_hh = weights[1]
    assert weight_hh is not None
    rows, hidden = y.shape
    grad_y, grad_h_n, grad_c_n = grads
    need_h0, need_c0, need_weight_ih, need_weight_hh, need_bias_ih, need_bias_hh = needs
    dgates = y.new_empty(rows, cell.dgates * hidden)
    carry = y.new_empty(call.batch, hidden) if cell.has_cell or cell.inner_bias else None
    _cpu.backward(
        call.cell,
        call.batch,
        y,
        saved.gates,
        saved.cells,
        _rows(weight_hh),
        _rows(h_first),
        _rows(c_first),
        _rows(grad_y),
        _rows(grad_h_n),
        _rows(grad_c_n),
        dgates,
        carry,
        call.batch_sizes,
        reverse,
        torch.get_num_threads(),
    )
    dgates_in = dgates[:, : cell.gates * hidden]
    neighbours = None
    if call.batch_sizes is not None and (need_weight_hh or (need_h0 and reverse)):
        neighbours = _packed_neighbours(call.batch_sizes, reverse)
    grad_h0 = None
    if need_h0:
        first = _initial_rows(call, dgates, neighbours, reverse)
        for weight_rows, columns in cell.recurrent:
            left, right = first[:, _scaled(columns, hidden)], weight_hh[_scaled(weight_rows, hidden)]
            grad_h0 = torch.mm(left, right) if grad_h0 is None else grad_h0.addmm_(left, right)
        if cell.inner_bias:
            # Last: it is large beside the products, which would all be rounded to its size.
            assert grad_h0 is not None and carry is not None
            grad_h0 += carry
    grad_bias_ih = grad_bias_hh = None
    if need_bias_ih or need_bias_hh:
        sums = dgates.sum(0)
        grad_bias_ih = sums[: cell.gates * hidden]
        grad_bias_hh = torch.cat([sums[_scaled(columns, hidden)] for _, columns in cell.recurrent])
    return DirectionGradients(
        dgates_in,
        grad_h0,
        carry if need_c0 else None,
        torch.mm(dgates_in.t(), x) if need_weight_ih else None,
        _weight_hh_gradient(call, dgates, y, h_first, neighbours, reverse) if need_weight_hh else None,
        grad_bias_ih if need_bias_ih else None,
        grad_bias_hh if need_bias_hh else None,
    )
