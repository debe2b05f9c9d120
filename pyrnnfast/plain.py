"""The shortest road: eager calls on plain tensors, a whole stack of layers or a single step in one call of ``_cpu`` or
``_cuda`` forward and one back.

Whatever is not as plain as that goes by :func:`pyrnnfast.functional.call`, which knows what to do.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from . import amp, cuda, layers, obstacles, roads, stack
from .obstacles import PLAIN
from .passes import CELLS
from .stack import Form

INPUTS = (Tensor, PackedSequence)
"""The types of input of which a call may be plain."""


def suits(num_layers: int, dropout: float, training: bool, cell_states: bool) -> bool:
    """Whether calls of a module with these options may be plain: nothing happens between its layers or besides them."""
    return not ((num_layers > 1 and training and dropout > 0) or cell_states)


def call(
    form: Form,
    input_size: int,
    hidden_size: int,
    outputs: int,
    input: Tensor | PackedSequence,
    hx: Any,
    weights: Sequence[Tensor],
    otherwise: Callable[[Any, Any], Any],
    owner: Any = None,
) -> Any:
    """What torch.nn's module would return, or None where the call is not plain.

    Args:
        outputs: columns of h of a direction, P of projections or H
        input: of exactly one of these types; [T, B, I], [B, T, I] with ``batch_first``, or [T, I] unbatched; or of a
            step [B, I]
        hx: None, or [layers·D, B, H] (without B when unbatched; of a step [B, H]), or of the LSTM a pair of them
        weights: weight_ih, weight_hh and perhaps bias_ih, bias_hh of each layer and direction, and with projections
            weight_hr behind them
        otherwise: torch's own way to do it, given input and hx
        owner: the module that has the weights, if one has (and not what it has prepacked, for which a compiler, which
            does not come so far, would have to look)

    Raises:
        ValueError: as :func:`pyrnnfast.obstacles.check_packed`
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
        spec = stack.spec_of(form, input_size, hidden_size, outputs, weights)
        by_torch = roads.are_all_torchs(x, form[3])
        if not by_torch:
            if form[3] or spec.proj_size or torch.is_autocast_enabled("cuda"):
                return None
            if len(weights) != spec.weights or type(weights[0]) not in PLAIN:
                return None
            obstacles.check_packed(spec, "eager", input)
            problem = roads.problem(spec, input, hx, weights)
            by_torch = cuda.choose(x, problem, None).by_torch
        if by_torch:
            harmless = batch_sizes is None and obstacles.is_harmless(spec, hx, weights)
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
    prepacked = None if owner is None else owner._prepacked
    results = stack.run(form, problem, input_size, hidden_size, outputs, x, batch_sizes, hx, weights, prepacked)
    if results is None:
        return None
    if batch_sizes is None:
        return results if rounded_to is None else results.to(rounded_to)
    y, states = results
    if order is not None and order.shape != (states[0] if has_cell else states).shape[1:2]:
        return None
    return PackedSequence(y, batch_sizes, order, back), layers.permuted(states, back)
