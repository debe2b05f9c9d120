"""One recurrent layer, in one or both directions, as a differentiable function: written once for all cells.

The kernels of ``_cpu`` do the products that have to wait for a step before them and, for all but small batches, the
input's, ``x W_ihᵀ + b``, along the way. Around them stand torch's products over all steps at once: that one otherwise,
``dx``, ``dW_ih``, ``dW_hh`` and ``db`` after the backward pass, and the product of the initial state, ``h0 W_hhᵀ``.

Notation as in :mod:`pyrnnfast.reference`; rows are time-major.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _cpu, reference


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
    """Runs a layer on the kernels, outside autograd's sight.

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


class _Direction(NamedTuple):
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


def _backward_direction(
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
) -> _Direction:
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
    return _Direction(
        dgates_in,
        grad_h0,
        carry if need_c0 else None,
        torch.mm(dgates_in.t(), x) if need_weight_ih else None,
        _weight_hh_gradient(call, dgates, y, h_first, neighbours, reverse) if need_weight_hh else None,
        grad_bias_ih if need_bias_ih else None,
        grad_bias_hh if need_bias_hh else None,
    )


def _without_autocast(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A backward whose products keep their dtype where it runs inside an autocast region; the forward ran outside."""

    @functools.wraps(backward)
    def run(ctx: Any, *grads: Tensor | None) -> Any:
        if not torch.is_autocast_enabled("cpu"):
            return backward(ctx, *grads)
        with torch.autocast("cpu", enabled=False):
            return backward(ctx, *grads)

    return run


class _Layer(torch.autograd.Function):
    """y, h_n[, c_n] = layer(call, x, h0, c0, *weights)"""

    @staticmethod
    def forward(
        ctx: Any, call: Call, x: Tensor, h0: Tensor | None, c0: Tensor | None, *weights: Tensor | None
    ) -> tuple[Tensor, ...]:
        y, h_n, c_n, kept = forward(call, x, h0, c0, weights, keep=True)
        ctx.call = call
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(call.batch_sizes, x, h0, c0, *weights, y, *(t for saved in kept for t in saved))
        return (y, h_n) if c_n is None else (y, h_n, c_n)

    @staticmethod
    @_without_autocast
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        # Once: checkpointing lets them be unpacked only once.
        batch_sizes, x, h0, c0, *rest = ctx.saved_tensors
        call: Call = ctx.call._replace(batch_sizes=batch_sizes)
        directions = (len(rest) - 1) // 6
        weights, y, kept = rest[: 4 * directions], rest[4 * directions], rest[4 * directions + 1 :]
        if all(g is None for g in grads):
            return (None,) * len(ctx.needs_input_grad)
        if torch.is_grad_enabled():
            # create_graph: the gradient has to be differentiable itself, so it goes through the reference.
            return _differentiable_backward(call, ctx.needs_input_grad, (x, h0, c0, *weights), grads)
        _, need_x, need_h0, need_c0, *need_weights = ctx.needs_input_grad
        grad_y, grad_h_n, grad_c_n = (*grads, None)[:3]
        hidden = y.shape[-1] // directions
        flat_x, flat_y = x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1])
        flat_grad_y = None if grad_y is None else grad_y.reshape(flat_y.shape)
        grad_x: Tensor | None = None
        parts = []
        for d in range(directions):
            columns = slice(d * hidden, (d + 1) * hidden)
            part = _backward_direction(
                call,
                d == 1,
                (need_h0, need_c0, *need_weights[4 * d : 4 * d + 4]),
                flat_x,
                flat_y[:, columns],
                None if h0 is None else h0[d],
                None if c0 is None else c0[d],
                weights[4 * d : 4 * d + 4],
                Saved(*kept[2 * d : 2 * d + 2]),
                (
                    None if flat_grad_y is None else flat_grad_y[:, columns],
                    None if grad_h_n is None else grad_h_n[d],
                    None if grad_c_n is None else grad_c_n[d],
                ),
            )
            if need_x:
                weight_ih = weights[4 * d]
                grad_x = (
                    torch.mm(part.dgates_in, weight_ih) if grad_x is None else grad_x.addmm_(part.dgates_in, weight_ih)
                )
            parts.append(part)
        return (
            None,
            None if grad_x is None else grad_x.view(x.shape),
            torch.stack([p.h0 for p in parts]) if need_h0 else None,  # type: ignore[misc]
            torch.stack([p.c0 for p in parts]) if need_c0 else None,  # type: ignore[misc]
            *(g for p in parts for g in p[3:]),
        )


class _Step(torch.autograd.Function):
    """h[, c] = step(call, x, h0, c0, *weights): a layer of one step and one direction, without its extra dimensions."""

    @staticmethod
    def forward(
        ctx: Any, call: Call, x: Tensor, h0: Tensor | None, c0: Tensor | None, *weights: Tensor | None
    ) -> Tensor | tuple[Tensor, Tensor]:
        h, c, saved = forward_step(call, x, h0, c0, weights, keep=True)
        ctx.call = call
        ctx.set_materialize_grads(False)
        # Only the vanilla RNN's backward looks at h; who else changes theirs in place may.
        ctx.save_for_backward(x, h0, c0, *weights, h if saved.gates is None else None, *saved)
        return h if c is None else (h, c)

    @staticmethod
    @_without_autocast
    def backward(ctx: Any, grad_h: Tensor | None, grad_c: Tensor | None = None) -> tuple[Tensor | None, ...]:
        call: Call = ctx.call
        x, h0, c0, *weights, h, gates, cells = ctx.saved_tensors
        needs = ctx.needs_input_grad
        if grad_h is None and grad_c is None:
            return (None,) * len(needs)
        if torch.is_grad_enabled():
            lead = [None if t is None else t.unsqueeze(0) for t in (x, h0, c0, grad_h, grad_c)]
            finals = lead[3:] if CELLS[call.cell].has_cell else lead[3:4]
            grads = _differentiable_backward(call, needs, (*lead[:3], *weights), (None, *finals))
            return (None, *(None if g is None else g.squeeze(0) for g in grads[1:4]), *grads[4:])
        if h is None:
            h = gates[:, : gates.shape[1] // CELLS[call.cell].saved]  # for its size
        part = _backward_direction(
            call, False, needs[2:], x, h, h0, c0, weights, Saved(gates, cells), (None, grad_h, grad_c)
        )
        return None, torch.mm(part.dgates_in, weights[0]) if needs[1] else None, *part[1:]


def _differentiable_backward(
    call: Call, needs: Sequence[bool], inputs: Sequence[Tensor | None], grads: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...]:
    # A name of its own for each input: one tensor may come in twice, and each gets its own share of the gradient.
    inputs = [None if t is None else t.view_as(t) for t in inputs]
    x, h0, c0, *weights = inputs
    assert x is not None
    sizes = [call.batch] * x.shape[0] if call.batch_sizes is None else call.batch_sizes.tolist()
    initial = None if h0 is None else (h0,) if c0 is None else (h0, c0)
    by_direction = [weights[k : k + 4] for k in range(0, len(weights), 4)]
    y, final = reference.layer(call.cell, x.reshape(-1, x.shape[-1]), initial, by_direction, sizes)
    outputs = (y.view(*x.shape[:-1], -1), *final)
    asked = [t for t, need in zip(inputs, needs[1:], strict=True) if need and t is not None]
    used = [(o, g) for o, g in zip(outputs, grads, strict=True) if g is not None]
    results = iter(
        torch.autograd.grad([o for o, _ in used], asked, [g for _, g in used], create_graph=True, allow_unused=True)
    )
    return (
        None,
        *(next(results) if need and t is not None else None for t, need in zip(inputs, needs[1:], strict=True)),
    )


def _differentiable(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def layer(
    call: Call, x: Tensor, h0: Tensor | None, c0: Tensor | None, weights: Sequence[Tensor | None]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """A layer with whatever of autograd the moment asks for. Arguments and first results as of :func:`forward`."""
    if _differentiable(x, h0, c0, *weights):
        y, h_n, *c_n = _Layer.apply(call, x, h0, c0, *weights)
        return y, h_n, c_n[0] if c_n else None
    return forward(call, x, h0, c0, weights, keep=False)[:3]


def step(
    call: Call, x: Tensor, h0: Tensor | None, c0: Tensor | None, weights: Sequence[Tensor | None]
) -> Tensor | tuple[Tensor, Tensor]:
    """One step of a cell likewise. Arguments as of :func:`forward_step`; returns h, or h and c for the LSTM."""
    if _differentiable(x, h0, c0, *weights):
        return _Step.apply(call, x, h0, c0, *weights)  # type: ignore[no-any-return]
    h, c, _ = forward_step(call, x, h0, c0, weights, keep=False)
    return h if c is None else (h, c)
