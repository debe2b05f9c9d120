"""A recurrent layer as a differentiable function: the form of eager calls that stack.py does not take, as those with
masks or all cell states.

The first derivative is :mod:`pyrnnfast.passes`; one that has to be differentiated itself goes through
:mod:`pyrnnfast.reference`. Under torch.compile and torch.func other forms are at work: ops.py and transforms.py.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

from . import reference
from .passes import (
    Mask,
    Steps,
    Upstream,
    backward,
    cells_dtype,
    forward,
    room_for_cells,
    room_for_gates,
    room_to_keep,
    side_by_side,
    weights_each,
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


def savable(t: Tensor) -> Tensor:
    """For backward, which takes no tensors of inference mode; a graph makes its own."""
    if torch.compiler.is_compiling():
        return t
    return t.clone() if t.is_inference() and not torch.is_inference_mode_enabled() else t


def with_own_memory(t: Tensor | None) -> Tensor | None:
    """Data for a graph to save, as the views that torch's layers save are: who gives a tensor other memory, by way of
    ``.data``, does not change what the graph has."""
    return None if t is None else t.view_as(t) if t.requires_grad else t.detach()


Weights = tuple[Tensor | None, ...]


def saved_weights(weights: Sequence[Tensor | None]) -> tuple[Weights, Weights]:
    """The same of weights that are leaves, without a node of the graph for each: what to save of all, and those leaves
    that :func:`connected` will want beside it."""
    saved = tuple(w.detach() if w is not None and w.is_leaf else w for w in weights)
    return saved, tuple(w if w is not None and w.is_leaf and w.requires_grad else None for w in weights)


class _InPlaceOf(torch.autograd.Function):
    """The values of ``saved``, as a function of ``leaf``."""

    generate_vmap_rule = True

    @staticmethod
    def forward(saved: Tensor, leaf: Tensor) -> Tensor:
        return saved.view_as(saved)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, grad


def connected(saved: Sequence[Tensor | None], leaves: Sequence[Tensor | None]) -> list[Tensor | None]:
    """What was saved of weights, as functions of them."""
    return [
        t if t is None or leaf is None else _InPlaceOf.apply(t, leaf) for t, leaf in zip(saved, leaves, strict=True)
    ]


# To ask takes up to 20 µs, on the machines that cards have 65: a small part of a pass that has so many products.
_PRODUCTS_WORTH_ASKING, _OF_A_CARD = 1 << 22, 1 << 34


def needed(ctx: Any, x: Tensor, gates: int) -> Sequence[bool]:
    """Of each input of a Function, whether the backward pass that is going on comes to where it is from.

    ``ctx.needs_input_grad`` tells that some pass might: in ``torch.autograd.grad(loss, x)`` it has the weights', too.

    Args:
        x: the data, of whose rows each is multiplied with the rows of weights for ``gates``
    """
    if x.numel() * gates < (_PRODUCTS_WORTH_ASKING if x.is_cpu else _OF_A_CARD):
        return ctx.needs_input_grad  # type: ignore[no-any-return]
    nodes = (node for node, _ in ctx.next_functions if node is not None)  # of each input that requires gradients
    found = []
    leaves_asked_for = 0
    for need in ctx.needs_input_grad:
        # Each leaf that is asked for takes 10 µs to know of: after two, the other inputs are taken to be, too.
        if need and leaves_asked_for < 2:
            try:
                need = torch._C._will_engine_execute_node(next(nodes))
            except RuntimeError:  # what it does for leaves that torch.autograd.grad is asked for
                leaves_asked_for += 1
        found.append(need)
    return found


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
        saved, ctx.leaves = saved_weights(weights)
        ctx.set_materialize_grads(False)
        ctx.masked = isinstance(steps, Mask)
        of_steps = steps if isinstance(steps, Mask) else (steps, None)
        if cell_states:
            gates, cells = room_for_gates(cell, x, weights), room_for_cells(x, weights)
            kept = side_by_side(gates, cells, weights)
            y, h_n, c_n, _ = forward(cell, x, steps, h0, c0, weights, kept)
            # Whole, as they are results, and not by their columns: autograd then sees when somebody changes them.
            ctx.save_for_backward(x, *of_steps, h0, c0, *saved, y, gates, cells)
            assert c_n is not None
            return y, h_n, c_n, cells
        y, h_n, c_n, kept = forward(cell, x, steps, h0, c0, weights, room_to_keep(cell, x, weights))
        ctx.save_for_backward(x, *of_steps, h0, c0, *saved, y, *kept)
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
        _, _, need_x, _, *needs = needed(ctx, x, len(weights[0]))
        needs = [need_x, *needs]
        if all(g is None for g in grads):
            return (None,) * len(ctx.needs_input_grad)
        upstream = Upstream(*grads)
        if beyond_kernels(grads):
            operands = (x, h0, c0, *connected(weights, ctx.leaves))
            dx, *others = differentiable_backward(run_by_reference(cell, steps), needs, operands, upstream)
            return None, None, dx, None, *others
        found = backward(cell, needs, x, steps, h0, c0, weights, y, kept, upstream)
        return None, None, found.x, None, found.h0, found.c0, *found.weights


# Not by way of Function.apply, which looks for functorch's transforms: here are none (obstacles.py).
_apply_layer = super(torch.autograd.Function, _Layer).apply


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
    each = weights_each(own)
    by_direction = [own[k : k + each] for k in range(0, len(own), each)]
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


Run = Callable[..., Sequence[Tensor | None]]
"""The results of x, h0, c0 and the weights of a call, by torch's own operators; None for what a cell does not have."""


@without_autocast
def differentiable_backward(
    run: Run, needs: Sequence[bool], operands: Sequence[Tensor | None], grads: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """The gradients of the operands as functions that can be differentiated, by way of the reference.

    Args:
        needs: of each operand, whether its gradient is wanted
        grads: of the results of ``run``
    """
    asked = [k for k, (t, need) in enumerate(zip(operands, needs, strict=True)) if need and t is not None]
    back = _back_inside_transforms if torch._C._are_functorch_transforms_active() else _back
    found: list[Tensor | None] = [None] * len(operands)
    for k, g in zip(asked, back(run, asked, operands, grads), strict=True):
        found[k] = g
    return found


def _back(
    run: Run, asked: Sequence[int], operands: Sequence[Tensor | None], grads: Sequence[Tensor | None]
) -> Sequence[Tensor | None]:
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # A name of its own for each operand: one tensor may come in twice, and each gets its own share of the gradient.
        own = [None if t is None else _named_anew(t, k in asked) for k, t in enumerate(operands)]
        results = run(*own)
    used = [(r, g) for r, g in zip(results, grads, strict=True) if g is not None and r is not None]
    inputs = [t for k in asked if (t := own[k]) is not None]
    return torch.autograd.grad(
        [r for r, _ in used], inputs, [g for _, g in used], create_graph=again, allow_unused=True
    )


def _back_inside_transforms(
    run: Run, asked: Sequence[int], operands: Sequence[Tensor | None], grads: Sequence[Tensor | None]
) -> Sequence[Tensor | None]:
    """The same where torch.func does not let autograd be used."""

    def forward(*chosen: Tensor | None) -> tuple[Tensor, ...]:
        own = list(operands)
        for k, t in zip(asked, chosen, strict=True):
            own[k] = t
        return tuple(r for r, g in zip(run(*own), grads, strict=True) if g is not None and r is not None)

    back = torch.func.vjp(forward, *(operands[k] for k in asked))[1]
    found: Sequence[Tensor | None] = back(tuple(g for g in grads if g is not None))
    return found


def run_by_reference(cell: str, steps: Steps) -> Run:
    """A layer as a function of its operands, for :func:`differentiable_backward`."""

    def run(x: Tensor, h0: Tensor | None, c0: Tensor | None, *weights: Tensor | None) -> Outputs:
        return reference_layer(cell, x, steps, h0, c0, weights)

    return run


def _named_anew(t: Tensor, need: bool) -> Tensor:
    """A tensor that stands for this one alone, and has a gradient where it is needed, whatever becomes of it."""
    alias = t.view_as(t)
    # Asked of the alias: what a transform of torch.func has left behind only says that it does.
    return alias.detach().requires_grad_() if need and not alias.requires_grad else alias


@without_autocast
def second_backward(
    run: Run,
    needs: Sequence[bool],
    operands: Sequence[Tensor | None],
    upstream: Sequence[Tensor | None],
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
        found = differentiable_backward(run, needs, own, upper)
        used = [(r, g) for r, g in zip(found, grads, strict=True) if r is not None and g is not None]
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
        data = (with_own_memory(t) for t in (x, h0, c0))
        found = _apply_layer(cell, cell_states, next(data), batch_sizes, *data, *weights)
        return Outputs(*found, *(None,) * (4 - len(found)))
    if not cell_states:
        return Outputs(*forward(cell, x, batch_sizes, h0, c0, weights, ())[:3], None)
    cells = room_for_cells(x, weights)
    y, h_n, c_n, _ = forward(cell, x, batch_sizes, h0, c0, weights, side_by_side(None, cells, weights))
    return Outputs(y, h_n, c_n, cells)
