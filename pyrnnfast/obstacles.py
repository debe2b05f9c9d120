"""Which calls the kernels serve, and why not the others: asked before anything is done."""

import functools
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.utils.rnn import PackedSequence

from . import _cpu, cuda, passes

Hidden = Tensor | tuple[Tensor, Tensor] | None
"""``h0``, or ``(h0, c0)`` for the LSTM, each [layers·D, B, H], or [layers·D, H] unbatched; None: zeros."""

PLAIN = (Tensor, torch.nn.Parameter)
"""The types of tensors that a kernel may read."""

_EXPORTER = "torch.onnx._internal.exporter._flags"


class Spec(NamedTuple):
    """What a recurrent module is, apart from its weights. ``cell`` as in :data:`pyrnnfast.reference.STEPS`."""

    cell: str
    input_size: int
    hidden_size: int
    num_layers: int = 1
    bias: bool = True
    batch_first: bool = False
    dropout: float = 0.0
    training: bool = True
    bidirectional: bool = False
    proj_size: int = 0
    single_step: bool = False  # a cell module, whose input has no time dimension
    cell_states: bool = False  # all cell states are a result (LSTM)

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def sizes(self) -> tuple[str, int, int, int, bool, int, int]:
        """What the shapes of the weights follow from."""
        return self.cell, self.input_size, self.hidden_size, self.num_layers, self.bias, self.directions, self.proj_size

    @property
    def weights(self) -> int:
        """How many there are."""
        return ((4 if self.bias else 2) + (self.proj_size > 0)) * self.num_layers * self.directions

    @property
    def outputs(self) -> int:
        """Columns of h of each direction."""
        return self.proj_size or self.hidden_size


def form(input: Any) -> str:
    """What the state of torch asks for: operators that a trace can record, functions that transforms can take apart, or
    neither."""
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return "transforms"
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        return "operators"
    data = input.data if isinstance(input, PackedSequence) else input
    return "operators" if isinstance(data, Tensor) and data.is_meta else "eager"


def recording_obstacle() -> str | None:
    """Why not, from the state of torch: somebody records a graph for those who know torch's operators only."""
    if torch.compiler.is_dynamo_compiling():
        return None
    if torch._C._get_tracing_state() is not None:
        return "torch.jit is tracing"
    return "torch.onnx is exporting" if _is_exporting() else None


def _is_exporting() -> bool:
    # torch.onnx.is_in_onnx_export would import what few have.
    exporter = sys.modules.get(_EXPORTER)
    return exporter is not None and exporter._is_onnx_exporting


def is_busy() -> bool:
    """Whether torch's state asks for more than plain calls on plain tensors: another :func:`form`, or a
    :func:`recording_obstacle`. In half the time, of which a single step has little."""
    return (
        torch.compiler.is_compiling()  # first: Dynamo, which knows the answer, then traces nothing of the rest
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
        or (_EXPORTER in sys.modules and _is_exporting())  # mostly without a call
    )


def _tensor_obstacle(name: str, tensor: Any, like: Tensor) -> str | None:
    """Why a kernel cannot read a tensor beside another one."""
    if type(tensor) not in PLAIN and not torch.compiler.is_compiling():  # which has types of its own
        return f"{name} is {'a' if isinstance(tensor, Tensor) else 'no tensor but a'} {type(tensor).__name__}"
    if not (tensor.is_cpu or tensor.is_meta or cuda.takes(tensor)) or tensor.device != like.device:
        return f"{name} is on {tensor.device}"
    if tensor.dtype is not like.dtype:
        return f"{name} is {tensor.dtype}, where {like.dtype} is the dtype of the weights"
    if tensor.layout is not torch.strided:
        return f"{name} has the layout {tensor.layout}"
    if torch.compiler.is_compiling():
        return None
    if tensor.is_nested:
        return f"{name} is a nested tensor of another layout than torch.jagged"
    if tensor._is_zerotensor():
        return f"{name} is zeros without memory"
    return f"{name} is a lazily negated view" if tensor.is_neg() else None


def _shape_obstacle(name: str, tensor: Tensor, expected: tuple[int, ...]) -> str | None:
    if tensor.shape == expected:
        return None
    return f"{name} has the shape {list(tensor.shape)}, where {list(expected)} is expected"


def _weights_obstacle(spec: Spec, weights: Sequence[Any]) -> str | None:
    if not weights or not isinstance(weights[0], Tensor):
        return "there are no weights"
    if weights[0].dtype not in passes.DTYPES:
        return f"the kernels serve {', '.join(map(cuda.dtype_name, passes.DTYPES))}, not {weights[0].dtype}"
    for weight in weights:
        reason = _tensor_obstacle("a weight", weight, weights[0])
        if reason is not None:
            return reason
    return _weight_shapes_obstacle(spec, weights)


def _weight_shapes_obstacle(spec: Spec, weights: Sequence[Tensor]) -> str | None:
    if len(weights) != spec.weights:  # before a list is made for very many layers
        return f"{spec.weights} weights are expected, got {len(weights)}"
    shapes = _weight_shapes(*spec.sizes)
    reasons = (_shape_obstacle("a weight", w, expected) for w, expected in zip(weights, shapes, strict=True))
    return next((r for r in reasons if r is not None), None)


def _weight_shapes(
    cell: str, inputs: int, hidden: int, layers: int, bias: bool, directions: int, projected: int
) -> tuple[tuple[int, ...], ...]:
    rows, outputs = passes.CELLS[cell].gates * hidden, projected or hidden
    shapes: tuple[tuple[int, ...], ...] = ()
    for _ in range(layers):
        of_layer: tuple[tuple[int, ...], ...] = ((rows, inputs), (rows, outputs), (rows,), (rows,))[: 4 if bias else 2]
        shapes += (of_layer + ((projected, hidden),) * (projected > 0)) * directions
        inputs = outputs * directions
    return shapes


_known_weight_shapes = functools.lru_cache(maxsize=64)(_weight_shapes)


def _input_obstacle(spec: Spec, input: Any, like: Tensor) -> str | None:
    packed = isinstance(input, PackedSequence) and not spec.single_step
    data = input.data if packed else input
    reason = _tensor_obstacle("the input", data, like)
    if reason is not None:
        return reason
    time_dimensions = 0 if spec.single_step else 1
    if packed:
        if data.dim() != 2:
            return f"packed data has {data.dim()} dimensions"
        order = None if torch.compiler.is_compiling() else input.sorted_indices
        if order is not None and order.shape != (int(input.batch_sizes[0]),):
            return "sorted_indices do not fit the batch"
    elif data.dim() not in (time_dimensions + 1, time_dimensions + 2):
        return f"the input has {data.dim()} dimensions"
    if data.shape[-1] != spec.input_size:
        return f"the input has {data.shape[-1]} features, where {spec.input_size} are expected"
    # While a graph is recorded, a question about sizes that may change would settle them.
    return "the input is empty" if not torch.compiler.is_compiling() and data.numel() == 0 else None


def _states_of(spec: Spec, hx: Any) -> Sequence[Any] | None:
    """The states that were given, none or one or a pair; None: that is neither."""
    if hx is None:
        return ()
    if not passes.CELLS[spec.cell].has_cell:
        return (hx,)
    return hx if isinstance(hx, (tuple, list)) and len(hx) == 2 else None


def _operands_obstacle(spec: Spec, input: Any, hx: Any, weights: Sequence[Any]) -> str | None:
    reason = _weights_obstacle(spec, weights)
    if reason is not None:
        return reason
    reason = _input_obstacle(spec, input, weights[0])
    if reason is not None:
        return reason
    states = _states_of(spec, hx)
    if states is None:
        return "hx is no pair (h0, c0)"
    if not states:
        return None
    # The batch size of packed input is a value, which nobody knows while a graph is recorded: the kernels will see.
    unknown = isinstance(input, PackedSequence) and torch.compiler.is_compiling()
    for k, state in enumerate(states):
        reason = _tensor_obstacle("hx", state, weights[0])
        if reason is None and not unknown:
            reason = _shape_obstacle("hx", state, state_shape(spec, input, k))
        if reason is not None:
            return reason
    return None


def _agree(spec: Spec, input: Any, hx: Any, weights: Sequence[Any]) -> bool:
    """Whether nothing is wrong with the operands: :func:`_operands_obstacle` in a tenth of the time, and memory too."""
    packed = isinstance(input, PackedSequence) and not spec.single_step
    data = input.data if packed else input
    if type(data) not in PLAIN or data.is_nested:
        return False
    shape = data.shape
    dimensions = len(shape) + (spec.single_step or packed)
    if not (3 if packed else 2) <= dimensions <= 3 or shape[-1] != spec.input_size or 0 in shape:
        return False
    if packed and input.sorted_indices is not None and input.sorted_indices.shape != (int(input.batch_sizes[0]),):
        return False
    states = _states_of(spec, hx)
    if states is None or len(weights) != spec.weights:
        return False
    shapes = _known_weight_shapes(*spec.sizes)
    if states:
        expected = [state_shape(spec, input, k) for k in range(len(states))]
        return _cpu.agree(PLAIN, (data, *states, *weights), (shape, *expected, *shapes))
    return _cpu.agree(PLAIN, (data, *weights), (shape, *shapes))


def obstacle(
    spec: Spec, asked: str, input: Tensor | PackedSequence, hx: Hidden, weights: Sequence[Tensor]
) -> str | None:
    """Why our kernels do not serve this call, or None when they do.

    Args:
        asked: the :func:`form` that is asked for

    Raises:
        ValueError: the ``batch_sizes`` of packed input do not describe its data. Not left to torch, which may crash.
    """
    reason = recording_obstacle()
    if reason is not None:
        return reason
    if isinstance(input, PackedSequence):
        check_packed(spec, asked, input)
    if spec.cell not in passes.CELLS:
        return f"there is no kernel for the cell {spec.cell!r}"
    if spec.hidden_size == 0:
        return "there are no hidden units"
    if spec.proj_size and weights and isinstance(weights[0], Tensor) and cuda.takes(weights[0]):
        return "a projection (proj_size) on CUDA is left to torch"
    if asked != "eager":
        return _operands_obstacle(spec, input, hx, weights)
    if _agree(spec, input, hx, weights):
        return None
    return _operands_obstacle(spec, input, hx, weights) or "an operand has no memory of its own"


def check_packed(spec: Spec, asked: str, input: Any) -> None:
    """Raises ValueError where the ``batch_sizes`` of packed input do not describe its data."""
    if isinstance(input, PackedSequence) and not spec.single_step and asked != "operators":
        _cpu.check_batch_sizes(input.batch_sizes, input.data.shape[0])


def state_shape(spec: Spec, input: Tensor | PackedSequence, which: int = 0) -> tuple[int, ...]:
    """The shape that h0 (0) or c0 (1) must have with this input."""
    hidden = spec.hidden_size if which else spec.outputs
    lead = () if spec.single_step else (spec.num_layers * spec.directions,)
    if isinstance(input, PackedSequence):
        return (*lead, int(input.batch_sizes[0]), hidden)
    if input.dim() == (1 if spec.single_step else 2):
        return (*lead, hidden)
    batch = input.shape[0] if spec.single_step or spec.batch_first else input.shape[1]
    return (*lead, batch, hidden)


def is_harmless(spec: Spec, hx: Any, weights: tuple[Any, ...]) -> bool:
    """Whether :func:`guard` finds nothing, of a call with dense input that is not on ``meta``: in a fraction of the
    time, which a call that torch takes has to wait."""
    lstm = spec.cell == "lstm"
    if spec.single_step:
        states = () if hx is None else hx if lstm else (hx,)
        if not isinstance(states, tuple) or len(states) != (0 if hx is None else 2 if lstm else 1):
            return False
        return all([isinstance(t, Tensor) and not t.is_meta for t in (*weights, *states)])
    if not lstm:
        return True
    shapes = tuple([w.shape for w in weights if isinstance(w, Tensor)])
    return len(weights) == spec.weights and shapes == _known_weight_shapes(*spec.sizes)


def guard(spec: Spec, input: Any, hx: Any, weights: Sequence[Tensor]) -> None:
    """Raises for a call that torch's own operators would answer by a crash, or from memory that is not theirs.

    Raises:
        TypeError: an LSTM cell's ``hx`` is no pair.
        RuntimeError: some of a cell's input and weights are on ``meta``, and some are not; a packed LSTM's ``hx`` is
            not three-dimensional; an LSTM's weights do not fit its sizes.
    """
    if recording_obstacle() is not None:
        return
    if spec.single_step and isinstance(input, Tensor):
        # torch computes with weights that have no memory, and gives what happens to be somewhere.
        states = hx if isinstance(hx, (tuple, list)) else (hx,)
        for kind, tensors in (("parameter", weights), ("hidden", states)):
            for t in tensors:
                if isinstance(t, Tensor) and t.is_meta is not input.is_meta:
                    raise RuntimeError(
                        f"Input and {kind} tensors are not at the same device, found input tensor at {input.device} "
                        f"and {kind} tensor at {t.device}"
                    )
    if spec.cell != "lstm":
        return
    pair = isinstance(hx, (tuple, list)) and len(hx) == 2
    if spec.single_step:
        if hx is not None and not pair:
            raise TypeError(f"LSTMCell: Expected hx to be a pair (h_0, c_0) of tensors, got {type(hx).__name__}")
        return
    if isinstance(input, PackedSequence) and pair:
        for k, state in enumerate(hx):
            if isinstance(state, Tensor) and state.dim() != 3:
                expected = state_shape(spec, input, k)
                raise RuntimeError(f"Expected hidden[{k}] size {expected}, got {list(state.shape)}")
    if not isinstance(input, (Tensor, PackedSequence)):
        return
    # Other dtypes torch does notice.
    if all(isinstance(weight, Tensor) and weight.dtype is input.data.dtype for weight in weights):
        reason = _weight_shapes_obstacle(spec, weights)
        if reason is not None:
            raise RuntimeError(f"LSTM: {reason}")
