"""Automatic mixed precision: operands in the dtype of autocast, results in the dtypes that torch.nn's have there."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from . import passes
from .obstacles import PLAIN, Spec

# A cell's step with so many weights (an LSTM of H = I = 256, an RNN of H = I = 362), or of so few rows, float32 kernels
# do in less time than torch's operators in a narrow dtype: measured in bfloat16, see docs/performance.md.
_FEW_WEIGHTS = {"lstm": 1 << 19, "gru": 1 << 19, "rnn_tanh": 1 << 18, "rnn_relu": 1 << 18}
_FEW_ROWS = 8
# Where oneDNN has no products of a dtype, of bfloat16 on x86 without AVX-512 and of float16 on most processors, torch's
# take ten times as long.
_TORCH_IS_FAST = {
    torch.bfloat16: torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported(),
    torch.float16: torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_fp16_supported(),
}


def obstacle(device: str, spec: Spec, input: Any, hx: Any, weights: Sequence[Any]) -> str | None:
    """Why a call under autocast is torch's: a cell's step that is no faster on our kernels."""
    if device == "cuda" or not spec.single_step or torch.get_autocast_dtype(device) not in passes.NARROW:
        return None
    if weights[0].dtype is not torch.float32 or (
        spec.cell in ("gru", "lstm") and _state_dtype(input, hx) is not torch.float32
    ):
        return None
    # A graph is for any number of rows: to ask would settle it.
    rows = _FEW_ROWS + 1 if torch.compiler.is_compiling() else 1 if input.dim() == 1 else len(input)
    if _suits_float32(spec.cell, rows, spec.input_size, spec.hidden_size):
        return None
    return "torch's operators know the weights that autocast has narrowed before, and no kernel narrows products alone"


def _suits_float32(cell: str, rows: int, inputs: int, hidden: int) -> bool:
    return (
        not _TORCH_IS_FAST[torch.get_autocast_dtype("cpu")]
        or rows <= _FEW_ROWS
        or passes.CELLS[cell].gates * hidden * (inputs + hidden) <= _FEW_WEIGHTS[cell]
    )


def _keeps_state(device: str, spec: Spec, input: Any, hx: Any) -> bool:
    """Whether a cell adds to a state that autocast leaves wider than its products.

    A cell hands its state from call to call, and torch's LSTM and GRU cells on the CPU add to it in its own dtype:
    narrowed at each step, it would not grow by what is less than its last bit.
    """
    if device == "cuda" or not spec.single_step or spec.cell not in ("gru", "lstm"):
        return False
    return torch.get_autocast_dtype(device) in passes.NARROW and _state_dtype(input, hx) is torch.float32


class PlainStep(NamedTuple):
    """How a cell's step under autocast on the CPU is run: by torch, or on our kernels in float32 with ``input`` and
    ``hx``, and a result that is rounded to a dtype."""

    by_torch: bool
    input: Tensor
    hx: Any
    rounded_to: torch.dtype | None


def plain_step(cell: str, input: Any, hx: Any, weights: Sequence[Any]) -> PlainStep | None:
    """Whichever takes it or is the fastest; None: neither, or something is not as it should be.

    The weights stay as they are: what is narrowed anew at each step, as autocast's own memory is closed to us, takes
    longer than many a step.
    """
    narrow = torch.get_autocast_dtype("cpu")
    if narrow not in passes.NARROW or not weights:
        return None
    first = weights[0]
    if type(first) not in PLAIN or first.dtype is not torch.float32:
        return None
    shape = first.shape
    if len(shape) != 2 or input.dim() != 2:
        return None
    has_cell = passes.CELLS[cell].has_cell
    if has_cell and hx is not None and not (isinstance(hx, tuple) and len(hx) == 2):
        return None
    states: tuple[Any, ...] = () if hx is None else hx if has_cell else (hx,)
    data, wide = (input, *states), True
    for t in data:
        if type(t) not in PLAIN or not t.is_cpu:
            return None
        if t.dtype is not torch.float32:
            if t.dtype is not narrow:
                return None
            wide = False
    rounded_to = narrow if cell in ("rnn_tanh", "rnn_relu") else None
    if rounded_to is None and data[-1].dtype is not torch.float32:
        return None
    if not _suits_float32(cell, len(input), shape[1], shape[0] // passes.CELLS[cell].gates):
        fits = all(type(w) in PLAIN and w.is_cpu and w.dtype is torch.float32 for w in weights)
        return PlainStep(True, input, hx, None) if fits else None
    if not wide:
        input, *states = (t.float() for t in data)  # type: ignore[assignment]
        hx = None if hx is None else tuple(states) if has_cell else states[0]
    return PlainStep(False, input, hx, rounded_to)


def narrowed(device: str, spec: Spec, input: Any, hx: Any, weights: Sequence[Tensor]) -> tuple[Any, Any, list[Tensor]]:
    """The operands of a call, those that autocast takes for ``device``, "cpu" or "cuda", in its dtype; where a cell's
    state is kept, in the state's."""
    dtype = torch.float32 if _keeps_state(device, spec, input, hx) else dtype_for(device, spec)
    # Of float64 nothing. On the CPU, who adds to what is narrow in another way does so in float32: it is left to torch.
    taken = {torch.float32, torch.get_autocast_dtype(device)} if device == "cpu" else {torch.float32, *passes.NARROW}

    def cast(t: Any) -> Any:
        return t.to(dtype) if isinstance(t, Tensor) and t.dtype in taken else t

    return (
        PackedSequence(cast(input.data), *input[1:]) if isinstance(input, PackedSequence) else cast(input),
        tuple(cast(s) for s in hx) if isinstance(hx, (tuple, list)) else cast(hx),
        [cast(w) for w in weights],
    )


def _state_dtype(input: Any, hx: Any) -> torch.dtype:
    """That of the state a call begins with, which is the input's where none is given; of anything else, narrow."""
    given = input if hx is None else hx[-1] if isinstance(hx, (tuple, list)) and hx else hx
    if isinstance(given, PackedSequence):
        given = given.data
    return given.dtype if isinstance(given, Tensor) else torch.bfloat16


def dtype_for(device: str, spec: Spec) -> torch.dtype:
    """That of autocast; but torch's wrapper of cuDNN's layers knows float16 alone (``aten/src/ATen/cudnn/
    AutocastRNN.cpp``), whatever dtype autocast is asked for, and a layer of ours gives what that gives."""
    if device == "cuda" and not spec.single_step and torch.backends.cudnn.enabled:
        return torch.float16
    return torch.get_autocast_dtype(device)


def results(device: str, spec: Spec, input: Any, hx: Any, found: Any) -> Any:
    """What the call has ``found``, in the dtypes that torch has for the call with ``input`` and ``hx``.

    On the CPU, torch's GRU and its LSTM, packed or with projections, are made of operators of which only the products
    take part in autocast: what they add to the state has its dtype, or a wider one, but a projected h is a product
    itself. The others are computed, and come out, narrow. So do all on CUDA: there layers and cells are on autocast's
    list as wholes.
    """
    packed_lstm = spec.cell == "lstm" and isinstance(input, PackedSequence)
    if device == "cuda" or spec.single_step or not (spec.cell == "gru" or packed_lstm or spec.proj_size):
        return found
    dtype = torch.promote_types(torch.get_autocast_dtype(device), _state_dtype(input, hx))
    if not spec.proj_size:
        return _converted(found, dtype)
    output, (h_n, c_n), *cells = found
    return output, (h_n, c_n.to(dtype)), *(_converted(t, dtype) for t in cells)


def _converted(found: Any, dtype: torch.dtype) -> Any:
    if isinstance(found, PackedSequence):
        return PackedSequence(found.data.to(dtype), *found[1:])
    return found.to(dtype) if isinstance(found, Tensor) else tuple(_converted(t, dtype) for t in found)
