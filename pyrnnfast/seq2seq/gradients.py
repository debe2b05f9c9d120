"""Vanishing and exploding gradients, measured (Bengio et al. 1994; Pascanu et al. 2013)."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..modules import LSTM, RNN


def scaled_rnn(hidden_size: int, gain: float, input_size: int = 1) -> RNN:
    """A tanh RNN with normal recurrent weights of deviation gain / sqrt(H), so of spectral radius about ``gain``.

    Below 1 it contracts. Well above 1 it is chaotic (Sompolinsky et al. 1988): neighbouring states part, though tanh
    saturates, so gradients grow back through time with states of ordinary size, not near zero only.
    """
    layer = RNN(input_size, hidden_size, bias=False)
    nn.init.normal_(layer.get_parameter("weight_hh_l0"), std=gain / math.sqrt(hidden_size))
    return layer


def chrono_lstm(hidden_size: int, steps: int, input_size: int = 1) -> LSTM:
    """An LSTM that remembers for about ``steps`` steps: forget bias log(steps - 1), input bias its negative.

    The initialisation of Tallec & Ollivier (2018, section 2), with one time scale for all units.
    """
    layer = LSTM(input_size, hidden_size)
    with torch.no_grad():
        layer.get_parameter("bias_hh_l0").zero_()
        input_gate, forget_gate, _, _ = layer.get_parameter("bias_ih_l0").zero_().chunk(4)
        forget_gate.fill_(math.log(steps - 1))
        input_gate.fill_(-math.log(steps - 1))
    return layer


def state_gradient_norms(layer: RNN | LSTM, inputs: Tensor, direction: Tensor) -> list[float]:
    """‖∂L/∂h_t‖ for every step t, where L = direction · h_T.

    The layer is run a step at a time, so that every h_t is a tensor whose gradient autograd keeps.

    Args:
        layer: one layer, one direction.
        inputs: [T, I].
        direction: [H].

    Returns:
        T norms; the last is that of ``direction``.
    """
    state: Tensor | tuple[Tensor, Tensor] | None = None
    hidden: list[Tensor] = []
    for x in torch.split(inputs, 1):
        _, state = layer(x, state)
        h = state[0] if isinstance(state, tuple) else state
        h.retain_grad()
        hidden.append(h)
    torch.autograd.backward(hidden[-1].flatten() @ direction)
    # In double precision, for squares of small numbers vanish too.
    return [0.0 if h.grad is None else float(h.grad.double().norm()) for h in hidden]


def vanishing(steps: int = 200, hidden_size: int = 128, seed: int = 0) -> Mapping[str, list[float]]:
    """‖∂L/∂h_t‖ of each step for four recurrences on the same inputs; the key describes the recurrence."""
    torch.manual_seed(seed)
    inputs = torch.randn(steps, 1)
    direction = nn.functional.normalize(torch.randn(hidden_size), dim=0)
    layers: dict[str, RNN | LSTM] = {
        "RNN, contracting (gain 0.8)": scaled_rnn(hidden_size, 0.8),
        "RNN, expanding (gain 2)": scaled_rnn(hidden_size, 2.0),
        f"LSTM, forget bias log {steps - 1}": chrono_lstm(hidden_size, steps),
        "LSTM, torch's initial weights": LSTM(1, hidden_size),
    }
    return {name: state_gradient_norms(layer, inputs, direction) for name, layer in layers.items()}


class ClippingRun(NamedTuple):
    """One value for each update."""

    losses: list[float]
    norms: list[float]  # of all parameters' gradients together, before clipping


def recall(clip_norm: float | None, updates: int = 300, steps: int = 60, seed: int = 0) -> ClippingRun:
    """Train an expanding RNN by plain gradient descent to give back, after the last step, its first input.

    Args:
        clip_norm: scale gradients to at most this norm (Pascanu et al. 2013, algorithm 1); None leaves them.
        updates: how many updates.
        steps: the length of a sequence.
        seed: fixes weights and data, so that runs differ in the clipping alone.
    """
    torch.manual_seed(seed)
    layer = scaled_rnn(64, 1.5)
    readout = nn.Linear(64, 1)
    parameters = [*layer.parameters(), *readout.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.01)
    losses, norms = [], []
    for _ in range(updates):
        inputs = torch.zeros(steps, 64, 1)
        inputs[0] = torch.rand(64, 1) * 2 - 1
        output, _ = layer(inputs)
        loss = nn.functional.mse_loss(readout(output[-1]), inputs[0])
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        norm = nn.utils.clip_grad_norm_(parameters, math.inf if clip_norm is None else clip_norm)
        optimizer.step()
        losses.append(loss.item())
        norms.append(norm.item())
    return ClippingRun(losses, norms)
