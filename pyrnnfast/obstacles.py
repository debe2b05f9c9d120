"""Which calls the kernels serve, and why not the others: asked before anything is done."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from . import _cpu, passes

Hidden = Tensor | tuple[Tensor, Tensor] | None
"""``h0``, or ``(h0, c0)`` for the LSTM, each [layers·D, B, H], or [layers·D, H] unbatched; None: zeros."""

PLAIN = (Tensor, torch.nn.Parameter)
"""The types of tensors that a kernel may read."""

_SERVED_DTYPES = (torch.float32, torch.float64, torch.bfloat16)


class Spec(NamedTuple):
    """What a recurrent module is, apart from its weights. ``cell`` as in :data:`pyrnnfast.reference.STEPS`."""

    cell: str
    input_size: int
    hidden_size: int
    num_layers: int = 1
    bias: bool = True
    batch_first: bool = False
    dropout: float = 0.0
    training: bool = False
    bidirectional: bool = False
    proj_size: int = 0
    single_step: bool = False  # a cell module, whose input has no time dimension

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1


def recording_obstacle() -> str | None:
    """Why not, from the state of torch: what must see torch's own operators, over tensors that may have no values."""
    if torch.compiler.is_compiling():
        return "torch.compile is tracing"
    if torch._C._get_tracing_state() is not None:
        return "torch.jit is tracing"
    if torch._C._are_functorch_transforms_active():
        return "a torch.func transform is active"
    if torch._C._len_torch_dispatch_stack() > 0:
        return "a torch dispatch mode is active"
    return None


def mode_obstacle() -> str | None:
    """Why not, from the state of torch: modes with other rules for dtypes and derivatives."""
    if torch.is_autocast_enabled("cpu"):
        return "autocast is on"
    if torch.autograd.forward_ad._current_level >= 0:
        return "forward-mode differentiation is active"
    return None


def _tensor_obstacle(name: str, tensor: Any, dtype: torch.dtype) -> str | None:
    """Why a kernel cannot read a tensor."""
    if type(tensor) not in PLAIN:
        return f"{name} is {'a' if isinstance(tensor, Tensor) else 'no tensor but a'} {type(tensor).__name__}"
    if not tensor.is_cpu:
        return f"{name} is on {tensor.device}"
    if tensor.dtype is not dtype:
        return f"{name} is {tensor.dtype}, where {dtype} is the dtype of the weights"
    if tensor.layout is not torch.strided:
        return f"{name} has the layout {tensor.layout}"
    return f"{name} is a lazily negated view" if tensor.is_neg() else None


def _shape_obstacle(name: str, tensor: Tensor, expected: tuple[int, ...]) -> str | None:
    if tensor.shape == expected:
        return None
    return f"{name} has the shape {list(tensor.shape)}, where {list(expected)} is expected"


def _weights_obstacle(spec: Spec, weights: Sequence[Any]) -> str | None:
    if not weights or not isinstance(weights[0], Tensor):
        return "there are no weights"
    dtype = weights[0].dtype
    if dtype not in _SERVED_DTYPES:
        return f"the kernels serve float32, float64 and bfloat16, not {dtype}"
    for weight in weights:
        reason = _tensor_obstacle("a weight", weight, dtype)
        if reason is not None:
            return reason
    return _weight_shapes_obstacle(spec, weights)


def _weight_shapes_obstacle(spec: Spec, weights: Sequence[Tensor]) -> str | None:
    shapes = _weight_shapes(*spec[:4], spec.bias, spec.directions)
    if len(weights) != len(shapes):
        return f"{len(shapes)} weights are expected, got {len(weights)}"
    reasons = (_shape_obstacle("a weight", w, expected) for w, expected in zip(weights, shapes, strict=True))
    return next((r for r in reasons if r is not None), None)


@functools.lru_cache(maxsize=64)
def _weight_shapes(
    cell: str, inputs: int, hidden: int, layers: int, bias: bool, directions: int
) -> tuple[tuple[int, ...], ...]:
    rows = passes.CELLS[cell].gates * hidden
    shapes: list[tuple[int, ...]] = []
    for _ in range(layers):
        shapes += ((rows, inputs), (rows, hidden), (rows,), (rows,))[: 4 if bias else 2] * directions
        inputs = hidden * directions
    return tuple(shapes)


def _input_obstacle(spec: Spec, input: Any, dtype: torch.dtype) -> str | None:
    packed = isinstance(input, PackedSequence) and not spec.single_step
    data = input.data if packed else input
    reason = _tensor_obstacle("the input", data, dtype)
    if reason is not None:
        return reason
    time_dimensions = 0 if spec.single_step else 1
    if packed:
        if data.dim() != 2:
            return f"packed data has {data.dim()} dimensions"
        order = input.sorted_indices
        if order is not None and order.shape != (int(input.batch_sizes[0]),):
            return "sorted_indices do not fit the batch"
    elif data.dim() not in (time_dimensions + 1, time_dimensions + 2):
        return f"the input has {data.dim()} dimensions"
    if data.shape[-1] != spec.input_size:
        return f"the input has {data.shape[-1]} features, where {spec.input_size} are expected"
    return "the input is empty" if data.numel() == 0 else None


def _states_of(spec: Spec, hx: Any) -> Sequence[Any] | None:
    """The states that were given, none or one or a pair; None: that is neither."""
    if hx is None:
        return ()
    if spec.cell != "lstm":
        return (hx,)
    return hx if isinstance(hx, (tuple, list)) and len(hx) == 2 else None


def _operands_obstacle(spec: Spec, input: Any, hx: Any, weights: Sequence[Any]) -> str | None:
    reason = _weights_obstacle(spec, weights)
    if reason is not None:
        return reason
    dtype = weights[0].dtype
    reason = _input_obstacle(spec, input, dtype)
    if reason is not None:
        return reason
    states = _states_of(spec, hx)
    if states is None:
        return "hx is no pair (h0, c0)"
    expected = state_shape(spec, input)
    for state in states:
        reason = _tensor_obstacle("hx", state, dtype) or _shape_obstacle("hx", state, expected)
        if reason is not None:
            return reason
    return None


def _agree(spec: Spec, input: Any, hx: Any, weights: Sequence[Any]) -> bool:
    """Whether nothing is wrong with the operands: :func:`_operands_obstacle` in a tenth of the time, and memory too."""
    packed = isinstance(input, PackedSequence) and not spec.single_step
    data = input.data if packed else input
    if type(data) not in PLAIN:
        return False
    shape = data.shape
    dimensions = len(shape) + (spec.single_step or packed)
    if not (3 if packed else 2) <= dimensions <= 3 or shape[-1] != spec.input_size or 0 in shape:
        return False
    if packed and input.sorted_indices is not None and input.sorted_indices.shape != (int(input.batch_sizes[0]),):
        return False
    states = _states_of(spec, hx)
    if states is None:
        return False
    shapes = _weight_shapes(*spec[:4], spec.bias, spec.directions)
    if states:
        expected = state_shape(spec, input)
        return _cpu.agree(PLAIN, (data, *states, *weights), (shape, *[expected] * len(states), *shapes))
    return _cpu.agree(PLAIN, (data, *weights), (shape, *shapes))


def obstacle(spec: Spec, input: Tensor | PackedSequence, hx: Hidden, weights: Sequence[Tensor]) -> str | None:
    """Why our kernels do not serve this call, or None when they do.

    Raises:
        ValueError: the ``batch_sizes`` of packed input do not describe its data. Not left to torch, which may crash.
    """
    reason = recording_obstacle()
    if reason is not None:
        return reason
    if isinstance(input, PackedSequence) and not spec.single_step:
        _cpu.check_batch_sizes(input.batch_sizes, input.data.shape[0])
    if spec.cell not in passes.CELLS:
        return f"there is no kernel for the cell {spec.cell!r}"
    reason = mode_obstacle()
    if reason is not None:
        return reason
    if spec.proj_size:
        return "a projection (proj_size) is left to torch"
    if _agree(spec, input, hx, weights):
        return None
    return _operands_obstacle(spec, input, hx, weights) or "an operand has no memory of its own"


def state_shape(spec: Spec, input: Tensor | PackedSequence) -> tuple[int, ...]:
    """The shape that h0 and c0 must have with this input."""
    lead = () if spec.single_step else (spec.num_layers * spec.directions,)
    if isinstance(input, PackedSequence):
        return (*lead, int(input.batch_sizes[0]), spec.hidden_size)
    if input.dim() == (1 if spec.single_step else 2):
        return (*lead, spec.hidden_size)
    batch = input.shape[0] if spec.single_step or spec.batch_first else input.shape[1]
    return (*lead, batch, spec.hidden_size)


def guard(spec: Spec, input: Any, hx: Any, weights: Sequence[Tensor]) -> None:
    """Raises for a call that torch's own operators would answer by a crash, or from memory that is not theirs.

    Raises:
        TypeError: an LSTM cell's ``hx`` is no pair.
        RuntimeError: a packed LSTM's ``hx`` is not three-dimensional; an LSTM's weights do not fit its sizes.
    """
    if spec.cell != "lstm" or recording_obstacle() is not None:
        return
    pair = isinstance(hx, (tuple, list)) and len(hx) == 2
    if spec.single_step:
        if hx is not None and not pair:
            raise TypeError(f"LSTMCell: Expected hx to be a pair (h_0, c_0) of tensors, got {type(hx).__name__}")
        return
    if isinstance(input, PackedSequence) and pair:
        for k, state in enumerate(hx):
            if isinstance(state, Tensor) and state.dim() != 3:
                expected = state_shape(spec, input)
                raise RuntimeError(f"Expected hidden[{k}] size {expected}, got {list(state.shape)}")
    if spec.proj_size or not isinstance(input, (Tensor, PackedSequence)):
        return
    # Other dtypes torch does notice.
    if all(isinstance(weight, Tensor) and weight.dtype is input.data.dtype for weight in weights):
        reason = _weight_shapes_obstacle(spec, weights)
        if reason is not None:
            raise RuntimeError(f"LSTM: {reason}")
