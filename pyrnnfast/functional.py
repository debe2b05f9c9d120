"""Layers, directions and layouts around one recurrent layer, and the choice between our kernels and torch's operators.

``rnn``, ``gru``, ``lstm`` and the cells take the arguments that torch.nn's modules hold, weights in the modules' order.
What the kernels do not serve, bad input included, goes to torch, which computes it or raises with its own words:
:mod:`pyrnnfast.obstacles` says why, before anything is done.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypedDict, Unpack

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from . import _cpu, autograd, obstacles
from .obstacles import PLAIN, Hidden, Spec

Result = tuple[Tensor | PackedSequence, Tensor | tuple[Tensor, Tensor]]


def infer(cell: str, input_size: int, hidden_size: int, input: Any, hx: Any, weights: Sequence[Tensor]) -> Any:
    """The shortest road, for a dense, time-major layer of one direction, or a step, where gradients are off.

    Args:
        input: [T, B, I], or [B, I] for a step

    Returns:
        What :func:`call` would, or None where the call is not as plain as that: then :func:`call` knows what to do.
    """
    if torch.is_grad_enabled() or obstacles.recording_obstacle() is not None or obstacles.mode_obstacle() is not None:
        return None
    return _cpu.infer(PLAIN, cell, input_size, hidden_size, input, hx, tuple(weights), torch.get_num_threads())


def call(spec: Spec, input: Any, hx: Any, weights: Sequence[Tensor], otherwise: Callable[[Any, Any], Any]) -> Any:
    """The call on our kernels, or, where they do not serve it, ``otherwise(input, hx)``: torch's own way to do it."""
    if obstacles.obstacle(spec, input, hx, weights) is not None:
        obstacles.guard(spec, input, hx, weights)
        return otherwise(input, hx)
    return _run_step(spec, input, hx, weights) if spec.single_step else _run(spec, input, hx, weights)


def _run(spec: Spec, input: Tensor | PackedSequence, hx: Hidden, weights: Sequence[Tensor]) -> Result:
    """A call without an obstacle, on our kernels; packed input has been checked."""
    if isinstance(input, PackedSequence):
        x, batch_sizes = input.data, input.batch_sizes
        data, states = _run_layers(spec, x, batch_sizes, _permuted(hx, input.sorted_indices), weights)
        packed = PackedSequence(data, batch_sizes, input.sorted_indices, input.unsorted_indices)
        return packed, _permuted(states, input.unsorted_indices)
    batched = input.dim() == 3
    if not batched:
        output, states = _run(
            spec._replace(batch_first=False), input.unsqueeze(1), _map(hx, Tensor.unsqueeze, 1), weights
        )
        assert isinstance(output, Tensor)
        return output.squeeze(1), _map(states, Tensor.squeeze, 1)
    x = input.transpose(0, 1) if spec.batch_first else input
    output, states = _run_layers(spec, x, None, hx, weights)
    return output.transpose(0, 1) if spec.batch_first else output, states


def _map(states: Any, fn: Callable[..., Tensor], *args: int | Tensor) -> Any:
    """``fn`` of each state of ``h`` or ``(h, c)``; None stays None."""
    if states is None or isinstance(states, Tensor):
        return None if states is None else fn(states, *args)
    return tuple(fn(s, *args) for s in states)


def _permuted(states: Any, indices: Tensor | None) -> Any:
    """States [layers·D, B, H] with their sequences in another order."""
    return states if indices is None else _map(states, Tensor.index_select, 1, indices)


def _run_layers(
    spec: Spec, x: Tensor, batch_sizes: Tensor | None, hx: Hidden, weights: Sequence[Tensor]
) -> tuple[Tensor, Tensor | tuple[Tensor, Tensor]]:
    """Args: x: [T, B, I], or [N, I] when packed; hx: [layers·D, B, H] each."""
    h0, c0 = (hx, None) if hx is None or isinstance(hx, Tensor) else hx
    given: list[Tensor | None] = list(weights)
    if not spec.bias:
        given = [w for k in range(0, len(weights), 2) for w in (*weights[k : k + 2], None, None)]
    if spec.num_layers == 1:
        x, h, c = autograd.layer(spec.cell, x, batch_sizes, h0, c0, given)
        return x, h if c is None else (h, c)
    directions = spec.directions
    h_n, c_n = [], []
    for k in range(spec.num_layers):
        if k > 0 and spec.training and spec.dropout > 0:
            x = torch.dropout(x, spec.dropout, True)
        states = slice(k * directions, (k + 1) * directions)
        layer_h0, layer_c0 = (None if s is None else s[states] for s in (h0, c0))
        layer_weights = given[4 * k * directions : 4 * (k + 1) * directions]
        x, h, c = autograd.layer(spec.cell, x, batch_sizes, layer_h0, layer_c0, layer_weights)
        h_n.append(h)
        if c is not None:
            c_n.append(c)
    return x, (torch.cat(h_n), torch.cat(c_n)) if c_n else torch.cat(h_n)


def _run_step(spec: Spec, input: Tensor, hx: Hidden, weights: Sequence[Tensor]) -> Tensor | tuple[Tensor, Tensor]:
    """One step of a cell without an obstacle, on our kernels. input: [B, I] or [I]; hx: [B, H] or [H] each."""
    if input.dim() == 1:
        states = _run_step(spec, input.unsqueeze(0), _map(hx, Tensor.unsqueeze, 0), weights)
        return _map(states, Tensor.squeeze, 0)  # type: ignore[no-any-return]
    h0, c0 = hx if isinstance(hx, (tuple, list)) else (hx, None)
    return autograd.step(spec.cell, input, h0, c0, weights if spec.bias else (*weights, None, None))


_STOCK_LAYERS: dict[str, Callable[..., torch.nn.Module]] = {
    "rnn_tanh": torch.nn.RNN,
    "rnn_relu": torch.nn.RNN,
    "gru": torch.nn.GRU,
    "lstm": torch.nn.LSTM,
}
_STOCK_CELLS: dict[str, Callable[..., torch.nn.Module]] = {
    "rnn_tanh": torch.nn.RNNCell,
    "rnn_relu": torch.nn.RNNCell,
    "gru": torch.nn.GRUCell,
    "lstm": torch.nn.LSTMCell,
}


def _torch_call(spec: Spec, weights: Sequence[Tensor]) -> Callable[[Any, Any], Any]:
    """The forward of torch's own module with these weights."""

    def forward(input: Any, hx: Any) -> Any:
        options: dict[str, object] = {"nonlinearity": spec.cell[4:]} if spec.cell.startswith("rnn_") else {}
        if not spec.single_step:
            names = ("num_layers", "batch_first", "dropout", "bidirectional")
            options |= {name: getattr(spec, name) for name in names}
        stock = (_STOCK_CELLS if spec.single_step else _STOCK_LAYERS)[spec.cell]
        module = stock(spec.input_size, spec.hidden_size, bias=spec.bias, device="meta", **options)
        module.train(spec.training)
        parameters = [name for name, _ in module.named_parameters()]
        if len(parameters) != len(weights):
            raise ValueError(f"expected {len(parameters)} weights ({', '.join(parameters)}), got {len(weights)}")
        return torch.func.functional_call(module, dict(zip(parameters, weights, strict=True)), (input, hx))

    return forward


class Options(TypedDict, total=False):
    """Keyword arguments of :func:`rnn`, :func:`gru` and :func:`lstm`, with the meaning and defaults of torch.nn's."""

    num_layers: int
    bias: bool
    batch_first: bool
    dropout: float
    training: bool
    bidirectional: bool


def _call(cell: str, input: Any, hx: Any, weights: Sequence[Tensor], **options: Any) -> Any:
    if len(weights) < 2:
        raise ValueError(f"expected at least weight_ih and weight_hh, got {len(weights)} weights")
    spec = Spec(cell, weights[0].shape[-1], weights[1].shape[-1], **options)
    return call(spec, input, hx, weights, otherwise=_torch_call(spec, weights))


def _rnn_kind(nonlinearity: str) -> str:
    if nonlinearity not in ("tanh", "relu"):
        raise ValueError(f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'.")
    return f"rnn_{nonlinearity}"


def rnn(
    input: Tensor | PackedSequence,
    hx: Tensor | None,
    weights: Sequence[Tensor],
    nonlinearity: str = "tanh",
    **options: Unpack[Options],
) -> tuple[Tensor | PackedSequence, Tensor]:
    """A stack of vanilla recurrent layers, h_t = φ(W_ih x_t + b_ih + W_hh h_{t−1} + b_hh) (Elman 1990).

    Args:
        input: [T, B, I]; [B, T, I] with ``batch_first``; [T, I] unbatched; or a ``PackedSequence``
        hx: the initial states [num_layers·D, B, H], D = 2 if ``bidirectional`` else 1; None: zeros
        weights: for each layer and direction ``weight_ih`` [H, I or D·H], ``weight_hh`` [H, H] and, with ``bias``,
            ``bias_ih`` and ``bias_hh`` [H]: the order of ``torch.nn.RNN.parameters()``
        nonlinearity: φ, ``"tanh"`` or ``"relu"``
        **options: see :class:`Options`; ``dropout`` is a probability, and acts on the output of every layer but the
            last, in ``training`` only

    Returns:
        The output of the last layer at every step, [T, B, D·H] in the layout of ``input``, and the state after the last
        step of each layer and direction, [num_layers·D, B, H].

    Raises:
        ValueError, RuntimeError: what ``torch.nn.RNN`` raises on such input; ValueError for packed input whose
            ``batch_sizes`` are not positive, increase, or do not fit the data.
    """
    return _call(_rnn_kind(nonlinearity), input, hx, weights, **options)  # type: ignore[no-any-return]


def gru(
    input: Tensor | PackedSequence, hx: Tensor | None, weights: Sequence[Tensor], **options: Unpack[Options]
) -> tuple[Tensor | PackedSequence, Tensor]:
    """A stack of gated recurrent layers (Cho et al. 2014; equations in :func:`pyrnnfast.reference.gru`).

    Arguments, results and errors as of :func:`rnn`, with weights of 3·H rows in the order r, z, n.
    """
    return _call("gru", input, hx, weights, **options)  # type: ignore[no-any-return]


def lstm(
    input: Tensor | PackedSequence,
    hx: tuple[Tensor, Tensor] | None,
    weights: Sequence[Tensor],
    **options: Unpack[Options],
) -> tuple[Tensor | PackedSequence, tuple[Tensor, Tensor]]:
    """A stack of LSTM layers (Hochreiter & Schmidhuber 1997; equations in :func:`pyrnnfast.reference.lstm`).

    Arguments, results and errors as of :func:`rnn`, with weights of 4·H rows in the order i, f, g, o, and with pairs
    (h, c) for the initial and the final states.
    """
    return _call("lstm", input, hx, weights, **options)  # type: ignore[no-any-return]


def rnn_cell(input: Tensor, hx: Tensor | None, weights: Sequence[Tensor], nonlinearity: str = "tanh") -> Tensor:
    """One step of :func:`rnn`.

    Args:
        input: [B, I], or [I] unbatched
        hx: [B, H] or [H]; None: zeros
        weights: ``weight_ih`` [H, I], ``weight_hh`` [H, H] and perhaps ``bias_ih`` and ``bias_hh`` [H]

    Returns:
        The state after the step, [B, H] or [H].

    Raises:
        ValueError, RuntimeError: what ``torch.nn.RNNCell`` raises on such input.
    """
    return _call(_rnn_kind(nonlinearity), input, hx, weights, bias=len(weights) > 2, single_step=True)  # type: ignore[no-any-return]


def gru_cell(input: Tensor, hx: Tensor | None, weights: Sequence[Tensor]) -> Tensor:
    """One step of :func:`gru`; arguments, result and errors as of :func:`rnn_cell`."""
    return _call("gru", input, hx, weights, bias=len(weights) > 2, single_step=True)  # type: ignore[no-any-return]


def lstm_cell(input: Tensor, hx: tuple[Tensor, Tensor] | None, weights: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """One step of :func:`lstm`; arguments, results and errors as of :func:`rnn_cell`, with pairs (h, c) as states.

    Raises:
        TypeError: ``hx`` is no pair.
    """
    return _call("lstm", input, hx, weights, bias=len(weights) > 2, single_step=True)  # type: ignore[no-any-return]
