"""The recurrences as the textbook has them: plain torch, one step at a time.

Slow and plain on purpose. This is the ground truth of the tests, and the road of what the kernels do not have, such as
double backward. The equations stand here and in ``csrc/cells.h``, and nowhere else.

Shapes: ``T`` steps, ``B`` sequences, ``I`` inputs, ``H`` hidden units, ``G`` gates (1, 3 or 4), ``D`` directions,
``N = sum(batch_sizes)`` rows of time-major data, longest sequences first, as in ``PackedSequence``; dense data have the
constant batch size ``B``; padded data are [T, B, I]. Gate order and parameter names are torch's.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

State = tuple[Tensor, ...]
"""``(h,)``, or ``(h, c)`` for the LSTM, each [rows, H]; projected, h is [rows, P]."""

Weights = Sequence[Tensor | None]
"""``weight_ih`` [G·H, I], ``weight_hh`` [G·H, H], ``bias_ih`` and ``bias_hh`` [G·H] or None. Of an LSTM with a
projection ``weight_hh`` is [4·H, P], and a fifth one ``weight_hr`` [P, H]."""


def rnn_tanh(xgates: Tensor, hgates: Tensor, state: State) -> State:
    """Elman 1990, "Finding structure in time": h = tanh(W_ih x + b_ih + W_hh h + b_hh)."""
    return (torch.tanh(xgates + hgates),)


def rnn_relu(xgates: Tensor, hgates: Tensor, state: State) -> State:
    """The same with a rectifier (Le, Jaitly, Hinton 2015)."""
    return (torch.relu(xgates + hgates),)


def gru(xgates: Tensor, hgates: Tensor, state: State) -> State:
    """Cho et al. 2014, in the form of cuDNN and torch, where the reset gate acts after the product:

    r = σ(x_r + h_r)    z = σ(x_z + h_z)    n = tanh(x_n + r ⊙ h_n)    h' = (1 − z) ⊙ n + z ⊙ h
    """
    (h,) = state
    x_r, x_z, x_n = xgates.chunk(3, -1)
    h_r, h_z, h_n = hgates.chunk(3, -1)
    r = torch.sigmoid(x_r + h_r)
    z = torch.sigmoid(x_z + h_z)
    n = torch.tanh(x_n + r * h_n)
    return ((1 - z) * n + z * h,)


def lstm(xgates: Tensor, hgates: Tensor, state: State) -> State:
    """Hochreiter & Schmidhuber 1997 with the forget gate of Gers, Schmidhuber & Cummins 2000:

    i, f, o = σ(·)    g = tanh(·)    c' = f ⊙ c + i ⊙ g    h' = o ⊙ tanh(c')
    """
    _, c = state
    i, f, g, o = (xgates + hgates).chunk(4, -1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


class Padding(NamedTuple):
    """Which steps of padded data sequences have, and where they begin anew; [T, B], bool."""

    real: Tensor
    reset: Tensor
    """Whether the state is cleared before the step, in the order of time."""


STEPS: dict[str, Callable[[Tensor, Tensor, State], State]] = {
    "rnn_tanh": rnn_tanh,
    "rnn_relu": rnn_relu,
    "gru": gru,
    "lstm": lstm,
}


def _step(cell: str, xgates: Tensor, state: State, weights: Weights) -> State:
    """One step of a layer. Sak, Senior & Beaufays 2014: with a projection, h' = W_hr (o ⊙ tanh(c'))."""
    _, weight_hh, _, bias_hh, *weight_hr = weights
    assert weight_hh is not None
    h, *c = STEPS[cell](xgates, F.linear(state[0], weight_hh, bias_hh), state)
    for projection in weight_hr:
        assert projection is not None
        h = F.linear(h, projection)
    return h, *c


def direction(
    cell: str, x: Tensor, initial: State, weights: Weights, batch_sizes: Sequence[int], reverse: bool
) -> tuple[State, State]:
    """One layer in one direction.

    Args:
        x: [N, I]
        initial: the state before the first step of each sequence, [B, H] each

    Returns:
        The state after every step [N, H] each, and after the last step of each sequence, [B, H] each.
    """
    weight_ih, _, bias_ih, *_ = weights
    assert weight_ih is not None
    xgates = F.linear(x, weight_ih, bias_ih).split(list(batch_sizes))  # T × [batch_sizes[t], G·H]
    order = range(len(batch_sizes))
    outputs: dict[int, State] = {}
    state = tuple(s[:0] for s in initial)
    ended: list[State] = []
    for t in reversed(order) if reverse else order:
        rows, active = state[0].shape[0], batch_sizes[t]
        if active < rows:  # going forward, the shortest sequences end
            ended.append(tuple(s[active:] for s in state))
            state = tuple(s[:active] for s in state)
        elif active > rows:  # they start here: at the first step, or going backward at their end
            state = tuple(torch.cat([s, first[rows:active]]) for s, first in zip(state, initial, strict=True))
        state = _step(cell, xgates[t], state, weights)
        outputs[t] = state
    final = tuple(torch.cat(parts) for parts in zip(state, *reversed(ended), strict=True))
    return tuple(torch.cat(parts) for parts in zip(*(outputs[t] for t in order), strict=True)), final


def direction_of_padded(
    cell: str, x: Tensor, initial: State, weights: Weights, padding: Padding, reverse: bool
) -> tuple[State, State]:
    """:func:`direction` of x [T, B, I]. Nothing follows from what stands in the padding; states there are zero."""
    weight_ih, _, bias_ih, *_ = weights
    assert weight_ih is not None
    real, reset = (t.unsqueeze(-1) for t in padding)
    # Whether the state before a step is one to go on from: not where it is padding, nor behind a reset, which backward
    # in time is that of the step before.
    begins = real & reset
    goes_on = real & ~(torch.cat([begins[1:], torch.zeros_like(begins[:1])]) if reverse else begins)
    # Zeros are multiplied instead of what is in the padding, as zero times NaN is no zero in the gradients.
    xgates = F.linear(x.where(real, x.new_zeros(())), weight_ih, bias_ih)
    state, outputs = initial, []
    steps = list(zip(xgates.unbind(), real.unbind(), goes_on.unbind(), strict=True))
    for xgates_t, real_t, goes_on_t in reversed(steps) if reverse else steps:
        before = tuple(s.where(goes_on_t, s.new_zeros(())) for s in state)
        after = _step(cell, xgates_t, before, weights)
        state = tuple(a.where(real_t, s) for a, s in zip(after, state, strict=True))
        outputs.append(state)
    states = (torch.stack(parts[::-1] if reverse else parts) for parts in zip(*outputs, strict=True))
    return tuple(s.where(real, s.new_zeros(())) for s in states), state


def layer(
    cell: str, x: Tensor, initial: State | None, weights: Sequence[Weights], steps: Sequence[int] | Padding
) -> tuple[State, State]:
    """One layer in one or both directions, the second one backward in time.

    Args:
        x: [N, I]; [T, B, I] when padded
        initial: [D, B, H] each; None: zeros
        weights: of each direction
        steps: ``batch_sizes``, or what there is of padded data

    Returns:
        The states of both directions side by side after every step [N, D·H] (padded: [T, B, D·H]) each, the first of
        which is the output; and the final ones [D, B, H] each. Projected, h has P columns for H.
    """
    _, weight_hh, *_ = weights[0]
    assert weight_hh is not None
    if initial is None:
        batch = x.shape[1] if isinstance(steps, Padding) else steps[0]
        zeros = x.new_zeros(len(weights), batch, weight_hh.shape[1])
        initial = (zeros, x.new_zeros(len(weights), batch, weight_hh.shape[0] // 4)) if cell == "lstm" else (zeros,)
    runs = []
    for d, own in enumerate(weights):
        first = tuple(s[d] for s in initial)
        if isinstance(steps, Padding):
            runs.append(direction_of_padded(cell, x, first, own, steps, reverse=d == 1))
        else:
            runs.append(direction(cell, x, first, own, steps, reverse=d == 1))
    final = tuple(torch.stack(states) for states in zip(*(state for _, state in runs), strict=True))
    return tuple(torch.cat(parts, -1) for parts in zip(*(states for states, _ in runs), strict=True)), final


def stack(
    cell: str,
    x: Tensor,
    initial: State | None,
    weights: Sequence[Sequence[Weights]],
    batch_sizes: Sequence[int],
    dropout: float = 0.0,
) -> tuple[Tensor, State]:
    """Several layers, each fed with the output of the one below, with dropout between them.

    Args:
        x: [N, I]
        initial: [layers·D, B, H] each; None: zeros
        weights: of each layer and direction

    Returns:
        The output of the last layer [N, D·H], and the final states [layers·D, B, H] each.
    """
    finals = []
    for k, layer_weights in enumerate(weights):
        if k > 0:
            x = F.dropout(x, dropout)
        directions = len(layer_weights)
        first = None if initial is None else tuple(s[k * directions : (k + 1) * directions] for s in initial)
        (x, *_), final = layer(cell, x, first, layer_weights, batch_sizes)
        finals.append(final)
    return x, tuple(torch.cat(states) for states in zip(*finals, strict=True))
