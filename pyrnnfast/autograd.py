"""A recurrent layer, and a step of a cell, as differentiable functions: written once for all cells.

The first derivative is :mod:`pyrnnfast.passes`; one that has to be differentiated itself goes through
:mod:`pyrnnfast.reference`.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import reference
from .passes import CELLS, Call, Saved, backward_direction, forward, forward_step


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
            part = backward_direction(
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
        part = backward_direction(
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
    """A layer with whatever of autograd the moment asks for.

    Arguments and first results as of :func:`pyrnnfast.passes.forward`.
    """
    if _differentiable(x, h0, c0, *weights):
        y, h_n, *c_n = _Layer.apply(call, x, h0, c0, *weights)
        return y, h_n, c_n[0] if c_n else None
    return forward(call, x, h0, c0, weights, keep=False)[:3]


def step(
    call: Call, x: Tensor, h0: Tensor | None, c0: Tensor | None, weights: Sequence[Tensor | None]
) -> Tensor | tuple[Tensor, Tensor]:
    """One step of a cell likewise.

    Arguments as of :func:`pyrnnfast.passes.forward_step`; returns h, or h and c for the LSTM.
    """
    if _differentiable(x, h0, c0, *weights):
        return _Step.apply(call, x, h0, c0, *weights)  # type: ignore[no-any-return]
    h, c, _ = forward_step(call, x, h0, c0, weights, keep=False)
    return h if c is None else (h, c)
