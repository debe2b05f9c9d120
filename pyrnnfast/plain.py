"""The shortest road: eager calls on plain tensors, a whole stack of layers or a single step in one call of ``_cpu`` or
``_cuda`` forward and one back.

Whatever is not as plain as that goes by :func:`pyrnnfast.functional.call`, which knows what to do.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from . import _cpu, amp, cuda, layers, loops, obstacles, roads
from .autograd import beyond_kernels, connected, differentiable_backward, needed, saved_weights, with_own_memory
from .choices import Problem
from .obstacles import PLAIN, Spec
from .passes import CELLS
from .profiling import profiled

Form = tuple[str, int, int, bool, bool]
"""Of a call what is no tensor: cell, layers, directions, single_step, batch_first."""

INPUTS = (Tensor, PackedSequence)
"""The types of input of which a call may be plain."""


def suits(num_layers: int, dropout: float, training: bool, proj_size: int, cell_states: bool) -> bool:
    """Whether calls of a module with these options may be plain: nothing happens between its layers or besides them."""
    return not ((num_layers > 1 and training and dropout > 0) or proj_size or cell_states)


def call(
    form: Form,
    input_size: int,
    hidden_size: int,
    input: Tensor | PackedSequence,
    hx: Any,
    weights: Sequence[Tensor],
    otherwise: Callable[[Any, Any], Any],
) -> Any:
    """What torch.nn's module would return, or None where the call is not plain.

    Args:
        input: of exactly one of these types; [T, B, I], [B, T, I] with ``batch_first``, or [T, I] unbatched; or of a
            step [B, I]
        hx: None, or [layers·D, B, H] (without B when unbatched; of a step [B, H]), or of the LSTM a pair of them
        weights: weight_ih, weight_hh and perhaps bias_ih, bias_hh of each layer and direction
        otherwise: torch's own way to do it, given input and hx
    """
    cell = CELLS.get(form[0])
    if cell is None or obstacles.is_busy():
        return None
    rounded_to = problem = batch_sizes = order = None
    x: Any = input
    if isinstance(input, PackedSequence):
        x, batch_sizes, order, back = input
        if type(x) not in PLAIN or not (x.is_cpu or cuda.takes(x)):  # before anything is done to hx
            return None
    weights = tuple(weights)
    if cuda.takes(x):
        if roads.are_all_torchs(x, form[3]):
            by_torch = True
        elif form[3] or torch.is_autocast_enabled("cuda"):
            return None
        else:
            choice, problem = roads.eager(_spec(form, input_size, hidden_size, weights), input, hx, weights)
            by_torch = choice.by_torch
        if by_torch:
            harmless = batch_sizes is None and _is_harmless(form, input_size, hidden_size, hx, weights)
            return otherwise(input, hx) if harmless else None
    elif torch.is_autocast_enabled("cpu"):
        step = amp.plain_step(form[0], input, hx, weights) if form[3] else None
        if step is None:
            return None
        if step.by_torch:
            return otherwise(input, hx)
        _, x, hx, rounded_to = step
    has_cell = cell.has_cell
    if order is not None and hx is not None:
        states = hx if isinstance(hx, tuple) else (hx,)
        if len(states) != 1 + has_cell:
            return None
        if not all(isinstance(s, Tensor) and s.dim() == 3 and s.shape[1:2] == order.shape for s in states):
            return None
        hx = layers.permuted(hx, order)
    run, own = _pass(problem, x, False)
    operands = x, batch_sizes, weights, input_size, hidden_size, hx, torch.is_grad_enabled()
    found = profiled(form[0], "forward", run, PLAIN, form, *operands, *own)
    if found is None:
        # Those of the CPU do not have float16.
        if problem is not None or batch_sizes is not None or x.dtype is not torch.float16 or x.is_meta:
            return None
        return otherwise(input, hx) if _is_harmless(form, input_size, hidden_size, hx, weights) else None
    results, kept = found
    if kept is not None:
        h0, c0 = hx if has_cell and hx is not None else (hx, None)
        x = layers.savable(x)  # it may be features of a frozen model
        if not form[3]:  # torch's cells save data as they are
            x, h0, c0 = with_own_memory(x), with_own_memory(h0), with_own_memory(c0)
        sizes = None if batch_sizes is None else layers.savable(batch_sizes)
        loop = loops.join(form[0], weights) if form[3] else None
        if loop is None or loop.gate is None:
            results = _apply(form, problem, loop, results, kept, x, sizes, h0, c0, None, *weights)
        else:
            results = _apply(form, problem, loop, results, kept, x, sizes, h0, c0, loop.gate)
        if has_cell:
            results = (results[0], results[1:]) if len(results) == 3 else results
        elif form[3]:
            results = results[0]
    if batch_sizes is None:
        return results if rounded_to is None else results.to(rounded_to)
    y, states = results
    if order is not None and order.shape != (states[0] if has_cell else states).shape[1:2]:
        return None
    return PackedSequence(y, batch_sizes, order, back), layers.permuted(states, back)


def _is_harmless(form: Form, input_size: int, hidden_size: int, hx: Any, weights: tuple[Tensor, ...]) -> bool:
    cell, count, directions, single_step, _ = form
    return obstacles.is_harmless(cell, (input_size, hidden_size, count), directions, single_step, hx, weights)


def _pass(problem: Problem | None, x: Tensor, back: bool) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """What takes the operands of a pass, and what it is given behind them. The problem: of a call on CUDA."""
    if problem is not None:
        return cuda.plain_pass(x, problem, back)
    return _cpu.backward_plain if back else _cpu.forward_plain, (torch.get_num_threads(),)


class _Plain(torch.autograd.Function):
    """y, h_n[, c_n], or of a step h[, c],
    = plain(form, problem, loop, results, kept, x, batch_sizes, h0, c0, gate, *weights)

    ``forward_plain`` has made the results; here is their derivative. Of a step in a loop with a ``gate``, that one
    stands for the weights.
    """

    @staticmethod
    def forward(
        ctx: Any,
        form: Form,
        problem: Problem | None,
        loop: loops.Loop | None,
        results: tuple[Tensor, ...],
        kept: tuple[Tensor, ...],
        x: Tensor,
        batch_sizes: Tensor | None,
        h0: Tensor | None,
        c0: Tensor | None,
        gate: Tensor | None,
        *weights: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.form, ctx.problem, ctx.loop, ctx.count = form, problem, loop, len(kept)
        ctx.set_materialize_grads(False)
        # Of a step, only the vanilla RNN's backward looks at h; who else changes theirs in place may.
        y = None if kept and form[3] else results[0]
        saved, ctx.leaves = saved_weights(weights) if loop is None else (loop.saved, loop.weights)
        ctx.save_for_backward(x, batch_sizes, h0, c0, y, *kept, *saved)
        return results

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, batch_sizes, h0, c0, y, *rest = ctx.saved_tensors
        kept, weights = tuple(rest[: ctx.count]), tuple(rest[ctx.count :])
        _, _, _, _, _, need_x, _, need_h0, need_c0, in_loop, *needs_weights = needed(ctx, x, len(weights[0]))
        in_loop = in_loop and ctx.loop.is_wanted()  # else what is left there would stay
        needs = (need_x, need_h0, need_c0, *(needs_weights or (False,) * len(weights)))
        found: Sequence[Tensor | None]
        if not beyond_kernels(grads):
            run, own = _pass(ctx.problem, x, True)
            operands = x, batch_sizes, weights, needs, h0, c0, y, kept, grads, in_loop
            found = profiled(ctx.form[0], "backward", run, PLAIN, ctx.form, *operands, *own)
            if in_loop and found[-1] is not None:
                ctx.loop.gradients().leave(x, h0, found[-1])
        elif all(g is None for g in grads):
            return (None,) * len(ctx.needs_input_grad)
        else:
            run = functools.partial(_by_reference, ctx.form, batch_sizes)
            needs = (*needs[:3], *((True,) * len(weights) if in_loop else needs[3:]))
            found = differentiable_backward(run, needs, (x, h0, c0, *connected(weights, ctx.leaves)), grads)
            if in_loop:
                ctx.loop.gradients().add(found[3:])
        of_weights = found[3 : 3 + len(needs_weights)]
        of_gate = ctx.loop.nothing if in_loop else None
        return None, None, None, None, None, found[0], None, found[1], found[2], of_gate, *of_weights


# Function.apply first looks for functorch's transforms and wrappers, and for default arguments. Here are none
# (obstacles.py), and a single step would feel it.
_apply = super(torch.autograd.Function, _Plain).apply


def _spec(form: Form, input_size: int, hidden_size: int, weights: Sequence[Tensor]) -> Spec:
    cell, count, directions, single_step, batch_first = form
    return Spec(
        cell,
        input_size,
        hidden_size,
        count,
        bias=len(weights) == 4 * count * directions,
        batch_first=batch_first,
        bidirectional=directions == 2,
        single_step=single_step,
    )


def _by_reference(
    form: Form, batch_sizes: Tensor | None, x: Tensor, h0: Tensor | None, c0: Tensor | None, *weights: Tensor
) -> list[Tensor]:
    """The results of such a call by :mod:`pyrnnfast.reference`."""
    single_step = form[3]
    spec = _spec(form, weights[0].shape[1], weights[1].shape[1], weights)
    input = x if batch_sizes is None else PackedSequence(x, batch_sizes)
    hx = h0 if h0 is None or c0 is None else (h0, c0)
    found = layers.run(spec, "reference", input, hx, weights, layers.NO_EXTRAS)
    y, states = (None, found) if single_step else found
    rows = () if y is None else (y.data if isinstance(y, PackedSequence) else y,)
    return [*rows, *(states if isinstance(states, tuple) else (states,))]
