"""Layers and cells as functions, on our kernels or torch's operators.

``rnn``, ``gru``, ``lstm`` and the cells take the arguments that torch.nn's modules hold, weights in the modules' order.
What the kernels do not serve, bad input included, goes to torch, which computes it or raises with its own words:
:mod:`pyrnnfast.obstacles` says why, before anything is done.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypedDict, Unpack

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from . import amp, layers, obstacles, plain, roads, segments
from .layers import NO_EXTRAS, Extras
from .obstacles import Spec

__all__ = ["Options", "gru", "gru_cell", "lstm", "lstm_cell", "rnn", "rnn_cell"]


def call(
    spec: Spec,
    input: Any,
    hx: Any,
    weights: Sequence[Tensor],
    otherwise: Callable[[Any, Any], Any],
    extras: Extras = NO_EXTRAS,
) -> Any:
    """The call on our kernels, or, where they do not serve it, ``otherwise(input, hx)``: torch's own way to do it.

    Raises:
        ValueError: something of ours is asked for, ``extras`` or ``cell_states``, and the kernels do not serve the call
    """
    if not spec.single_step and layers.is_jagged(input):
        return layers.run_jagged(spec, input, hx, extras, lambda x, first: call(spec, x, first, weights, otherwise))
    if extras.given and layers.is_empty_batch(spec, input):
        extras = NO_EXTRAS  # no sequence has a length
    device = roads.device_type(weights)
    autocast = torch.is_autocast_enabled(device)
    form = obstacles.form(input)
    input = _readable(form, input)
    operands, road = (input, hx, weights), None
    reason = obstacles.recording_obstacle()
    if reason is None:
        road = roads.road(device, spec, form, input, hx, weights, extras)
        if road.by_torch and not extras.given:
            reason = road.reason  # without asking what it would not need
        else:
            operands, reason = _served(device, spec, form, input, hx, weights)
    if road is None or reason is not None:
        if extras.given or spec.cell_states:
            raise ValueError(f"torch has no lengths, reset or cell_states, and {reason}")
        obstacles.guard(spec, input, hx, weights)
        return otherwise(input, hx)
    if road.by_torch:
        return layers.run_packed(spec, input, hx, extras, otherwise)
    asked = "reference" if road.path == "reference" else form
    if not autocast:
        return layers.run(spec, asked, *operands, extras)
    with torch.autocast(device, enabled=False):
        found = layers.run(spec, asked, *operands, extras)
    return amp.results(device, spec, input, hx, found)


def explain(spec: Spec, input: Any, hx: Any, weights: Sequence[Tensor], extras: Extras = NO_EXTRAS) -> tuple[str, str]:
    """Which road :func:`call` would take, as in :class:`pyrnnfast.Explanation`, and why."""
    if not spec.single_step and layers.is_jagged(input):
        input, hx, *_ = layers.pack_jagged(spec, input, hx)
    device = roads.device_type(weights)
    form = obstacles.form(input)
    input = _readable(form, input)
    _, reason = _served(device, spec, form, input, hx, weights)
    if reason is not None:
        return "torch", reason
    road = roads.road(device, spec, form, input, hx, weights, extras)
    return road.path, road.reason


def _served(
    device: str, spec: Spec, form: str, input: Any, hx: Any, weights: Sequence[Tensor]
) -> tuple[tuple[Any, Any, Sequence[Tensor]], str | None]:
    """The operands as autocast has them, and why the kernels do not serve the call, if they do not."""
    if not torch.is_autocast_enabled(device):
        return (input, hx, weights), obstacles.obstacle(spec, form, input, hx, weights)
    operands = amp.narrowed(device, spec, input, hx, weights)
    return operands, obstacles.obstacle(spec, form, *operands) or amp.obstacle(device, spec, input, hx, weights)


def _readable(asked: str, input: Any) -> Any:
    """The same with batch sizes that no transform wraps."""
    if asked == "transforms" and isinstance(input, PackedSequence):
        return PackedSequence(input.data, segments.unwrapped(input.batch_sizes), *input[2:])
    return input


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
        if len(weights) != spec.weights:
            raise ValueError(f"expected {spec.weights} weights, got {len(weights)}")
        options: dict[str, object] = {"nonlinearity": spec.cell[4:]} if spec.cell.startswith("rnn_") else {}
        if not spec.single_step:
            names = ("num_layers", "batch_first", "dropout", "bidirectional")
            options |= {name: getattr(spec, name) for name in names}
            options |= {"proj_size": spec.proj_size} if spec.proj_size else {}
        stock = (_STOCK_CELLS if spec.single_step else _STOCK_LAYERS)[spec.cell]
        module = stock(spec.input_size, spec.hidden_size, bias=spec.bias, device="meta", **options)
        module.train(spec.training)
        parameters = [name for name, _ in module.named_parameters()]
        for name, weight in zip(parameters, weights, strict=True):
            del module._parameters[name]
            setattr(module, name, weight)
        # Not the module itself, which torch.jit, tracing, would want to know of beforehand.
        return module.forward(input, hx)

    return forward


class Options(TypedDict, total=False):
    """Keyword arguments of :func:`rnn`, :func:`gru` and :func:`lstm`, with the meaning and defaults of torch.nn's."""

    num_layers: int
    bias: bool
    """If not given, the weights tell."""
    batch_first: bool
    dropout: float
    training: bool
    """Whether ``dropout`` acts; by default it does, as in ``torch.nn.functional.dropout``."""
    bidirectional: bool
    lengths: Tensor | Sequence[int] | None
    """[B], integers from 0 to T in any order, on any device: how many steps of each padded sequence are real. Padding
    is never read; outputs there are zero, and the final states are those after the last real step. On CUDA, our kernels
    and the reference do not wait for their values, and take those of a CUDA tensor beyond 0 … T for the nearest; for
    torch's layers (:func:`pyrnnfast.explain` tells who takes a call) the sequences are packed, which waits, and raises.
    """
    reset: Tensor | None
    """[T, B], or [B, T] with ``batch_first``, bool: where the state is cleared before the step, as at the start of an
    episode or of a document. Backward in time, it is cleared between the same two steps."""
    cell_states: bool
    """LSTM: a third result, the cell states of the last layer at every step, [T, B, D·H] in the layout of the output
    and the dtype of c_n."""


_OPTIONS = frozenset(Options.__annotations__)


def _call(
    cell: str,
    input: Any,
    hx: Any,
    weights: Sequence[Tensor],
    given: Options,
    single_step: bool = False,
) -> Any:
    options: dict[str, Any] = {**given}
    lengths, reset = options.pop("lengths", None), options.pop("reset", None)
    unknown = next((name for name in options if name not in _OPTIONS), None)
    if unknown is not None:
        raise TypeError(f"{cell.partition('_')[0]}() got an unexpected keyword argument '{unknown}'")
    weights = tuple(weights)
    if len(weights) < 2:
        raise ValueError(f"expected at least weight_ih and weight_hh, got {len(weights)} weights")
    if "bias" not in options:
        options["bias"] = len(weights) > 2 and getattr(weights[2], "ndim", 1) == 1
    # Integers, which they are not while torch.jit is tracing.
    inputs, hidden = int(weights[0].shape[-1]), int(weights[1].shape[-1])
    spec = Spec(cell, inputs, hidden, single_step=single_step, **options)
    if cell == "lstm" and not single_step and len(weights) == spec._replace(proj_size=hidden).weights:
        spec = spec._replace(proj_size=hidden, hidden_size=int(weights[0].shape[0]) // 4)
    if spec.cell_states and cell != "lstm":
        raise ValueError("cell_states is for the LSTM alone")
    otherwise = _torch_call(spec, weights)
    suits = plain.suits(spec.num_layers, spec.dropout, spec.training, spec.cell_states)
    if suits and lengths is None and reset is None and type(input) in plain.INPUTS and len(weights) == spec.weights:
        form = cell, spec.num_layers, spec.directions, spec.single_step, spec.batch_first
        found = plain.call(form, spec.input_size, spec.hidden_size, spec.outputs, input, hx, weights, otherwise)
        if found is not None:
            return found
    return call(spec, input, hx, weights, otherwise, layers.extras(lengths, reset))


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
        input: [T, B, I]; [B, T, I] with ``batch_first``; [T, I] unbatched; a ``PackedSequence``; or a nested tensor
            [B, j, I] of the layout ``torch.jagged``, which the output then is, too
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
    return _call(_rnn_kind(nonlinearity), input, hx, weights, options)  # type: ignore[no-any-return]


def gru(
    input: Tensor | PackedSequence, hx: Tensor | None, weights: Sequence[Tensor], **options: Unpack[Options]
) -> tuple[Tensor | PackedSequence, Tensor]:
    """A stack of gated recurrent layers (Cho et al. 2014; equations in :func:`pyrnnfast.reference.gru`).

    Arguments, results and errors as of :func:`rnn`, with weights of 3·H rows in the order r, z, n.
    """
    return _call("gru", input, hx, weights, options)  # type: ignore[no-any-return]


def lstm(
    input: Tensor | PackedSequence,
    hx: tuple[Tensor, Tensor] | None,
    weights: Sequence[Tensor],
    **options: Unpack[Options],
) -> tuple[Tensor | PackedSequence, tuple[Tensor, Tensor]]:
    """A stack of LSTM layers (Hochreiter & Schmidhuber 1997; equations in :func:`pyrnnfast.reference.lstm`).

    Arguments, results and errors as of :func:`rnn`, with weights of 4·H rows in the order i, f, g, o, and with pairs
    (h, c) for the initial and the final states. Projections (Sak, Senior & Beaufays 2014) are there if each layer and
    direction has one more weight, ``weight_hr`` [P, H] with P < H, behind the others; h has P columns then, and so does
    ``weight_hh``.
    """
    return _call("lstm", input, hx, weights, options)  # type: ignore[no-any-return]


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
    return _call(_rnn_kind(nonlinearity), input, hx, weights, {"bias": len(weights) > 2}, single_step=True)  # type: ignore[no-any-return]


def gru_cell(input: Tensor, hx: Tensor | None, weights: Sequence[Tensor]) -> Tensor:
    """One step of :func:`gru`; arguments, result and errors as of :func:`rnn_cell`."""
    return _call("gru", input, hx, weights, {"bias": len(weights) > 2}, single_step=True)  # type: ignore[no-any-return]


def lstm_cell(input: Tensor, hx: tuple[Tensor, Tensor] | None, weights: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """One step of :func:`lstm`; arguments, results and errors as of :func:`rnn_cell`, with pairs (h, c) as states.

    Raises:
        TypeError: ``hx`` is no pair.
    """
    return _call("lstm", input, hx, weights, {"bias": len(weights) > 2}, single_step=True)  # type: ignore[no-any-return]
