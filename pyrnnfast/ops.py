"""A recurrent layer as operators of torch, for whoever must see operators: torch.compile, torch.export, dispatch modes.

``torch.ops.pyrnnfast.layer`` and ``layer_backward`` are opaque: no trace goes through their steps, so that a compiled
graph serves any T and B. They are differentiable to any order, the first by kernels. Eager calls take a lighter way
(autograd.py).
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .autograd import Outputs, differentiable, run_by_reference, second_backward
from .passes import (
    CELLS,
    Mask,
    Steps,
    Tensors,
    Upstream,
    backward,
    forward,
    room_for_cells,
    room_for_gates,
    side_by_side,
    sizes,
)
from .segments import Segments, of_padded

# On CUDA by whatever form of a pass cuda.py finds best; where `_cuda` is missing, the operators raise.
_DEVICES = ("CPU", "CUDA")

Five = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]

# Weights are two or four for each direction, and one more with a projection. Results are always five: what does not
# apply, or is not asked for, has no elements.
torch.library.define(
    "pyrnnfast::layer",
    "(str cell, Tensor x, Tensor? batch_sizes, Tensor? h0, Tensor? c0, Tensor[] weights, int directions, bool keep,"
    " bool cell_states, Tensor? lengths=None, Tensor? reset=None)"
    " -> (Tensor y, Tensor h_n, Tensor c_n, Tensor gates, Tensor cells)",
)
# Of x, h0, c0 and each weight those gradients that are needed.
torch.library.define(
    "pyrnnfast::layer_backward",
    "(str cell, bool[] needs, Tensor x, Tensor? batch_sizes, Tensor? h0, Tensor? c0, Tensor[] weights, int directions,"
    " Tensor y, Tensor gates, Tensor cells, Tensor? grad_y, Tensor? grad_h_n, Tensor? grad_c_n, Tensor? grad_cells,"
    " Tensor? lengths=None, Tensor? reset=None)"
    " -> Tensor[]",
)


def _with_biases(weights: Sequence[Tensor], directions: int) -> list[Tensor | None]:
    """Four for each direction, or five with a projection."""
    each = len(weights) // directions
    parts = [weights[k : k + each] for k in range(0, len(weights), each)]
    return [t for part in parts for t in (part if each > 3 else (*part[:2], None, None, *part[2:]))]


def _steps(batch_sizes: Tensor | None, lengths: Tensor | None, reset: Tensor | None) -> Steps:
    return batch_sizes if lengths is None and reset is None else Mask(lengths, reset)


def _refuse_forward_mode() -> None:
    """An operator without a derivative forward would give tangents of zero, and no error."""
    if torch.autograd.forward_ad._current_level >= 0:
        raise NotImplementedError(
            "pyrnnfast's operators have no forward-mode derivative; its modules and functions have"
        )


def _room(
    cell: str, x: Tensor, weights: Sequence[Tensor | None], keep: bool, cell_states: bool
) -> tuple[Tensor, Tensor]:
    """gates [..., D·saved·H] and cells [..., D·H]."""
    has_gates, has_cells = keep and CELLS[cell].saved > 0, CELLS[cell].has_cell and (keep or cell_states)
    gates = room_for_gates(cell, x, weights) if has_gates else x.new_empty(0)
    return gates, room_for_cells(x, weights) if has_cells else x.new_empty(0)


def _kept(cell: str, gates: Tensor, cells: Tensor, weights: Sequence[Tensor | None]) -> Tensors:
    return side_by_side(gates if CELLS[cell].saved else None, cells if CELLS[cell].has_cell else None, weights)


@torch.library.impl("pyrnnfast::layer", _DEVICES)
def _layer(
    cell: str,
    x: Tensor,
    batch_sizes: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    directions: int,
    keep: bool,
    cell_states: bool,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
) -> Five:
    _refuse_forward_mode()
    given = _with_biases(weights, directions)
    if x.shape[0] == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    gates, cells = _room(cell, x, given, keep, cell_states)
    if x.shape[:-1].numel() == 0:  # an empty batch
        _, hidden, outputs = sizes(given)
        last = x.new_empty(directions, 0, hidden) if CELLS[cell].has_cell else x.new_empty(0)
        empty = x.new_empty(*x.shape[:-1], directions * outputs), x.new_empty(directions, 0, outputs)
        return *empty, last, gates, cells
    kept: Tensors = ()
    if keep:
        kept = _kept(cell, gates, cells, given)
    elif cell_states:
        kept = side_by_side(None, cells, given)
    y, h_n, c_n, _ = forward(cell, x, _steps(batch_sizes, lengths, reset), h0, c0, given, kept)
    return y, h_n, x.new_empty(0) if c_n is None else c_n, gates, cells


@torch.library.register_fake("pyrnnfast::layer")  # type: ignore[untyped-decorator]
def _fake_layer(
    cell: str,
    x: Tensor,
    batch_sizes: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    directions: int,
    keep: bool,
    cell_states: bool,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
) -> Five:
    _refuse_forward_mode()
    given = _with_biases(weights, directions)
    _, hidden, outputs = sizes(given)
    batch: int | torch.SymInt = x.shape[1] if h0 is None else h0.shape[1]
    if batch_sizes is not None and h0 is None:  # the first of them, which nobody knows here
        batch = torch.library.get_ctx().new_dynamic_size()
    h_n = x.new_empty(directions, batch, outputs)
    c_n = x.new_empty(directions, batch, hidden) if CELLS[cell].has_cell else x.new_empty(0)
    return x.new_empty(*x.shape[:-1], directions * outputs), h_n, c_n, *_room(cell, x, given, keep, cell_states)


@torch.library.impl("pyrnnfast::layer_backward", _DEVICES)
def _layer_backward(
    cell: str,
    needs: Sequence[bool],
    x: Tensor,
    batch_sizes: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    directions: int,
    y: Tensor,
    gates: Tensor,
    cells: Tensor,
    grad_y: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    grad_cells: Tensor | None,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
) -> list[Tensor]:
    _refuse_forward_mode()
    if x.shape[:-1].numel() == 0:  # an empty batch
        operands = zip((x, h0, c0, *weights), needs, strict=True)
        return [torch.zeros_like(t) for t, need in operands if need and t is not None]
    upstream = Upstream(grad_y, grad_h_n, grad_c_n, grad_cells)
    given = _with_biases(weights, directions)
    kept = _kept(cell, gates, cells, given)
    needed = _with_biases(needs[3:], directions)  # type: ignore[arg-type]
    steps = _steps(batch_sizes, lengths, reset)
    found = backward(cell, [*needs[:3], *(bool(n) for n in needed)], x, steps, h0, c0, given, y, kept, upstream)
    return [g for g in (found.x, found.h0, found.c0, *found.weights) if g is not None]


@torch.library.register_fake("pyrnnfast::layer_backward")  # type: ignore[untyped-decorator]
def _fake_layer_backward(
    cell: str,
    needs: Sequence[bool],
    x: Tensor,
    batch_sizes: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    *_: Any,
) -> list[Tensor]:
    _refuse_forward_mode()
    operands = zip((x, h0, c0, *weights), needs, strict=True)
    return [
        torch.empty_like(t, memory_format=torch.contiguous_format) for t, need in operands if need and t is not None
    ]


def _spread(
    found: Sequence[Tensor | None], needs: Sequence[bool], operands: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Each to its operand, None where there is none."""
    results = iter(found)
    return [next(results) if need and t is not None else None for t, need in zip(operands, needs, strict=True)]


def _undifferentiable(ctx: Any, count: int) -> tuple[None, ...]:
    """Of the operands behind the first ``count``; the last ones, where they have their default values, are none."""
    return (None,) * (len(ctx.needs_input_grad) - count)


def _setup_layer(ctx: Any, inputs: tuple[Any, ...], output: Five) -> None:
    ctx.cell, x, batch_sizes, h0, c0, weights, ctx.directions, ctx.keep, _, lengths, reset = inputs
    ctx.count = len(weights)
    ctx.set_materialize_grads(False)
    y, _, _, gates, cells = output
    ctx.mark_non_differentiable(gates)
    ctx.save_for_backward(x, batch_sizes, lengths, reset, h0, c0, *weights, y, gates, cells)


def _backward_of_layer(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    if not ctx.keep:
        raise RuntimeError("pyrnnfast::layer was called with keep=False, so there is nothing to go back through")
    x, batch_sizes, lengths, reset, h0, c0, *rest = ctx.saved_tensors
    weights, (y, gates, cells) = rest[: ctx.count], rest[ctx.count :]
    grad_y, grad_h_n, grad_c_n, _, grad_cells = grads
    if not CELLS[ctx.cell].has_cell:
        grad_c_n = grad_cells = None
    nothing = None, None, None, None, None, [None] * ctx.count, *_undifferentiable(ctx, 6)
    if grad_y is None and grad_h_n is None and grad_c_n is None and grad_cells is None:
        return nothing
    _, need_x, _, need_h0, need_c0, need_weights, *_ = ctx.needs_input_grad
    needs = [bool(n) for n in (need_x, need_h0, need_c0, *need_weights)]
    found = torch.ops.pyrnnfast.layer_backward(
        ctx.cell,
        needs,
        x,
        batch_sizes,
        h0,
        c0,
        weights,
        ctx.directions,
        y,
        gates,
        cells,
        grad_y,
        grad_h_n,
        grad_c_n,
        grad_cells,
        lengths,
        reset,
    )
    dx, dh0, dc0, *dweights = _spread(found, needs, (x, h0, c0, *weights))
    return None, dx, None, dh0, dc0, dweights, *_undifferentiable(ctx, 6)


torch.library.register_autograd("pyrnnfast::layer", _backward_of_layer, setup_context=_setup_layer)


def _setup_backward(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    ctx.cell, ctx.needs, x, batch_sizes, h0, c0, weights, ctx.directions, _, _, _, *grads, lengths, reset = inputs
    ctx.count = len(weights)
    ctx.save_for_backward(x, batch_sizes, lengths, reset, h0, c0, *weights, *grads)


def _backward_of_backward(ctx: Any, grad: list[Tensor | None]) -> tuple[Any, ...]:
    x, batch_sizes, lengths, reset, h0, c0, *rest = ctx.saved_tensors
    weights, upstream = _with_biases(rest[: ctx.count], ctx.directions), Upstream(*rest[ctx.count :])
    needs = [*ctx.needs[:3], *(bool(n) for n in _with_biases(ctx.needs[3:], ctx.directions))]
    operands = (x, h0, c0, *weights)
    run = run_by_reference(ctx.cell, _steps(batch_sizes, lengths, reset))
    of_operands, of_upstream = second_backward(run, needs, operands, upstream, _spread(grad, needs, operands))
    dx, dh0, dc0, *others = of_operands
    dweights = [g for g, w in zip(others, weights, strict=True) if w is not None]
    return None, None, dx, None, dh0, dc0, dweights, None, None, None, None, *of_upstream, *_undifferentiable(ctx, 15)


torch.library.register_autograd("pyrnnfast::layer_backward", _backward_of_backward, setup_context=_setup_backward)


def layer(
    cell: str,
    x: Tensor,
    steps: Steps,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor | None],
    cell_states: bool,
) -> Outputs:
    """:func:`pyrnnfast.autograd.layer` by way of the operators."""
    batch_sizes, mask = (None, steps) if isinstance(steps, Mask) else (steps, Mask(None, None))
    keep = differentiable(x, h0, c0, *weights)
    given = [w for w in weights if w is not None]
    y, h_n, c_n, _, cells = torch.ops.pyrnnfast.layer(
        cell, x, batch_sizes, h0, c0, given, sizes(weights).directions, keep, cell_states, *mask
    )
    if not CELLS[cell].has_cell:
        return Outputs(y, h_n, None, None)
    return Outputs(y, h_n, c_n, cells if cell_states else None)


@register_flop_formula(torch.ops.pyrnnfast.layer)
def _flops(
    cell: str, x: Sequence[int], _: Any, h0: Any, c0: Any, weights: Sequence[Sequence[int]], *__: Any, **___: Any
) -> int:
    """Of the products, as ``torch.utils.flop_counter`` counts them of torch's operators; tensors are shapes here."""
    rows = math.prod(x[:-1])
    return sum(2 * rows * math.prod(w) for w in weights if len(w) == 2)


@register_flop_formula(torch.ops.pyrnnfast.layer_backward)
def _flops_back(
    cell: str,
    needs: Sequence[bool],
    x: Sequence[int],
    batch_sizes: Sequence[int] | None,
    h0: Any,
    c0: Any,
    weights: Sequence[Sequence[int]],
    directions: int,
    *_: Any,
    **__: Any,
) -> int:
    """The same of the gradients of the weights, of x and of the states, the first of which h0 alone may want."""
    rows, total = math.prod(x[:-1]), 0
    first = 0 if needs[1] or batch_sizes is not None else x[1]
    each = len(weights) // directions
    for k, (w, wanted) in enumerate(zip(weights, needs[3:], strict=True)):
        if len(w) == 2:
            back = (rows * needs[0], rows - first, rows)[min(k % each, 2)]
            total += 2 * math.prod(w) * (rows * wanted + back)
    return total


# What a compiled graph returns as a view of something that it keeps for backward, anybody may change in place, and
# autograd does not notice. Opaque, as Inductor takes a clone of the same strides out.
torch.library.define("pyrnnfast::copy", "(Tensor t) -> Tensor")
torch.library.register_fake("pyrnnfast::copy", torch.empty_like)
torch.library.register_autograd("pyrnnfast::copy", lambda _, grad: grad)


@torch.library.impl("pyrnnfast::copy", _DEVICES)
def _copy(t: Tensor) -> Tensor:
    _refuse_forward_mode()
    return t.clone()


def apart(t: Tensor) -> Tensor:
    """A view of a layer's output as a result of a call: a copy, if backward in a compiled graph may need the output."""
    # Exported, operators are autograd's own business. (Dynamo of torch 2.11 takes all that it compiles for exported.)
    exported = torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()
    found: Tensor = torch.ops.pyrnnfast.copy(t) if t.requires_grad and not exported else t
    return found


# How many rows, steps and segments there are follows from values. Wherever those come from, they are read, and what is
# made of them is made, on the CPU.
torch.library.define(
    "pyrnnfast::segments",
    "(Tensor? lengths, Tensor? reset, SymInt steps, SymInt batch, bool batch_first)"
    " -> (Tensor places, Tensor batch_sizes, Tensor sequence, Tensor from_start, Tensor from_end, Tensor first,"
    " Tensor last, Tensor any_steps)",
)


@torch.library.impl("pyrnnfast::segments", _DEVICES)
def _segments(
    lengths: Tensor | None, reset: Tensor | None, steps: int, batch: int, batch_first: bool
) -> tuple[Tensor, ...]:
    found = of_padded(lengths, reset, steps, batch, batch_first)
    if len(found.places) > 0:
        return tuple(found)
    # All sequences are empty. A graph does not ask, so it is given a row, which layers.py clears.
    one, no = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.bool)
    return one, found.batch_sizes, one.clone(), no, no.clone(), *found[5:]


@torch.library.register_fake("pyrnnfast::segments")  # type: ignore[untyped-decorator]
def _fake_segments(
    lengths: Tensor | None, reset: Tensor | None, steps: int, batch: int, batch_first: bool
) -> tuple[Tensor, ...]:
    context = torch.library.get_ctx()
    rows, longest, count = (context.new_dynamic_size() for _ in range(3))
    sizes: tuple[int | torch.SymInt, ...] = (rows, longest, count, count, count, batch, batch, batch)
    masks = (False, False, False, True, True, False, False, True)
    like = reset if lengths is None else lengths
    assert like is not None
    return tuple(
        like.new_empty((n,), dtype=torch.bool if mask else torch.int64, device="cpu")
        for n, mask in zip(sizes, masks, strict=True)
    )


def segments(lengths: Tensor | None, reset: Tensor | None, steps: int, batch: int, batch_first: bool) -> Segments:
    """:func:`pyrnnfast.segments.of_padded` by way of the operator."""
    return Segments(*torch.ops.pyrnnfast.segments(lengths, reset, steps, batch, batch_first))


def enable_compile() -> None:
    """Lets ``torch.compile`` and strict ``torch.export`` take our layers in.

    They refuse every instance of torch.nn.RNN, GRU or LSTM, which ours are too, unless
    ``torch._dynamo.config.allow_rnn`` is set; this sets it. Layers of torch.nn itself are then traced as well, step by
    step. Cells, the functional form and ``torch.export`` that is not strict need nothing.
    """
    import torch._dynamo.config  # takes more than a second: not for those who do not compile

    torch._dynamo.config.allow_rnn = True
