"""A stack of layers, or a single step, in one call of ``_cpu`` or ``_cuda`` forward and one back, as a differentiable
function.

For eager calls of plain tensors that the kernels serve; the extension finds out whether they are. What is around them
is in plain.py, for whole calls, and in layers.py, which makes such calls of others, layer by layer.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from . import _cpu, autograd, cuda, loops
from .autograd import (
    beyond_kernels,
    connected,
    differentiable_backward,
    needed,
    savable,
    saved_weights,
    with_own_memory,
)
from .choices import Problem
from .obstacles import PLAIN, Spec
from .passes import CELLS, Mask, Steps, sizes
from .profiling import profiled

Form = tuple[str, int, int, bool, bool]
"""Of a call what is no tensor: cell, layers, directions, single_step, batch_first."""


def run(
    form: Form,
    problem: Problem | None,
    input_size: int,
    hidden_size: int,
    outputs: int,
    x: Tensor,
    batch_sizes: Tensor | None,
    hx: Any,
    weights: tuple[Tensor, ...],
    prepacked: _cpu.Prepacked | None = None,
) -> Any:
    """(y, h_n) or (y, (h_n, c_n)), or of a step h or (h, c); None where anything is unusual.

    Args:
        problem: of a call on CUDA, what it is
        outputs: columns of h of a direction, P of projections or H
        x: [T, B, I], [B, T, I] with ``batch_first``, [T, I] unbatched, [N, I] with ``batch_sizes``; or of a step [B, I]
        hx: None, or [layers·D, B, H] (without B when unbatched; of a step [B, H]), or of the LSTM a pair of them
        weights: weight_ih, weight_hh and perhaps bias_ih, bias_hh of each layer and direction, and with projections
            weight_hr behind them
        prepacked: what is kept of the weights between calls, of which those with gradients make no use: theirs change
    """
    grad = torch.is_grad_enabled()
    kernel, own = _forward_pass(problem, x, None if grad else prepacked)
    operands = x, batch_sizes, weights, input_size, hidden_size, outputs, hx, grad
    found = profiled(form[0], "forward", kernel, PLAIN, form, *operands, *own)
    if found is None:
        return None
    results, kept = found
    if kept is None:
        return results
    has_cell = CELLS[form[0]].has_cell
    h0, c0 = hx if has_cell and hx is not None else (hx, None)
    own_x: Tensor | None = savable(x)  # it may be features of a frozen model
    if not form[3]:  # torch's cells save data as they are
        own_x, h0, c0 = with_own_memory(own_x), with_own_memory(h0), with_own_memory(c0)
    steps = None if batch_sizes is None else savable(batch_sizes)
    loop = loops.join(form[0], weights) if form[3] else None
    if loop is None or loop.gate is None:
        results = _apply(form, problem, loop, results, kept, own_x, steps, h0, c0, None, *weights)
    else:
        results = _apply(form, problem, loop, results, kept, own_x, steps, h0, c0, loop.gate)
    if has_cell:
        return (results[0], results[1:]) if len(results) == 3 else results
    return results[0] if form[3] else results


def layer(
    cell: str,
    x: Tensor,
    steps: Steps,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor | None],
    cell_states: bool,
) -> autograd.Outputs:
    """One layer, as :func:`pyrnnfast.autograd.layer`, which does what is unusual."""
    if not cell_states and not isinstance(steps, Mask):
        directions, hidden, outputs = sizes(weights)
        given = tuple([w for w in weights if w is not None])
        problem = None
        if cuda.takes(x):
            training = autograd.differentiable(x, h0, c0, *given)
            problem = cuda.problem_of_layer(cell, x, steps, hidden, directions == 2, training)
        hx = h0 if c0 is None else (h0, c0)
        found = run((cell, 1, directions, False, False), problem, x.shape[-1], hidden, outputs, x, steps, hx, given)
        if found is not None:
            y, states = found
            h_n, c_n = states if isinstance(states, tuple) else (states, None)
            return autograd.Outputs(y, h_n, c_n, None)
    return autograd.layer(cell, x, steps, h0, c0, weights, cell_states)


_Pass = tuple[Callable[..., Any], tuple[Any, ...]]
"""What takes the operands of a pass, and what it is given behind them."""


def _forward_pass(problem: Problem | None, x: Tensor, prepacked: _cpu.Prepacked | None) -> _Pass:
    """The problem: of a call on CUDA."""
    if problem is not None:
        return cuda.plain_pass(x, problem, False)
    return _cpu.forward_plain, (prepacked, torch.get_num_threads())


def _backward_pass(problem: Problem | None, x: Tensor) -> _Pass:
    if problem is not None:
        return cuda.plain_pass(x, problem, True)
    return _cpu.backward_plain, (torch.get_num_threads(),)


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
            run, own = _backward_pass(ctx.problem, x)
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


def spec_of(form: Form, input_size: int, hidden_size: int, outputs: int, weights: Sequence[Tensor]) -> Spec:
    cell, count, directions, single_step, batch_first = form
    each = len(weights) // (count * directions)
    return Spec(
        cell,
        input_size,
        hidden_size,
        count,
        bias=each > 3,
        batch_first=batch_first,
        bidirectional=directions == 2,
        proj_size=outputs if each % 2 else 0,
        single_step=single_step,
    )


def _by_reference(
    form: Form, batch_sizes: Tensor | None, x: Tensor, h0: Tensor | None, c0: Tensor | None, *weights: Tensor
) -> list[Tensor]:
    """The results of such a call by :mod:`pyrnnfast.reference`."""
    single_step = form[3]
    hidden_size, outputs = len(weights[0]) // CELLS[form[0]].gates, weights[1].shape[1]
    spec = spec_of(form, weights[0].shape[1], hidden_size, outputs, weights)
    from . import layers  # which has this for eager calls

    input = x if batch_sizes is None else PackedSequence(x, batch_sizes)
    hx = h0 if h0 is None or c0 is None else (h0, c0)
    found = layers.run(spec, "reference", input, hx, weights, layers.NO_EXTRAS)
    y, states = (None, found) if single_step else found
    rows = () if y is None else (y.data if isinstance(y, PackedSequence) else y,)
    return [*rows, *(states if isinstance(states, tuple) else (states,))]
