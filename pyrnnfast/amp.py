"""Automatic mixed precision: operands in the dtype of autocast, results in the dtypes that torch.nn's have there."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from .obstacles import Spec


def narrowed(device: str, spec: Spec, input: Any, hx: Any, weights: Sequence[Tensor]) -> tuple[Any, Any, list[Tensor]]:
    """The operands of a call, those that autocast takes for ``device``, "cpu" or "cuda", in its dtype."""
    dtype = dtype_for(device, spec)

    def cast(t: Any) -> Any:
        if not isinstance(t, Tensor):
            return t
        # On CUDA float64 alone is left as it is.
        takes = t.dtype is torch.float32 or (device == "cuda" and t.dtype in (torch.float16, torch.bfloat16))
        return t.to(dtype) if takes else t

    return (
        PackedSequence(cast(input.data), *input[1:]) if isinstance(input, PackedSequence) else cast(input),
        tuple(cast(s) for s in hx) if isinstance(hx, (tuple, list)) else cast(hx),
        [cast(w) for w in weights],
    )


def dtype_for(device: str, spec: Spec) -> torch.dtype:
    """That of autocast; but torch's wrapper of cuDNN's layers knows float16 alone (``aten/src/ATen/cudnn/
    AutocastRNN.cpp``), whatever dtype autocast is asked for, and a layer of ours gives what that gives."""
    if device == "cuda" and not spec.single_step and torch.backends.cudnn.enabled:
        return torch.float16
    return torch.get_autocast_dtype(device)


def results(device: str, spec: Spec, input: Any, hx: Any, found: Any) -> Any:
    """What the narrow call has ``found``, in the dtypes that torch has for the call with ``input`` and ``hx``.

    On the CPU, torch's GRU, packed LSTM and LSTM and GRU cells are made of operators of which only the products take
    part in autocast: what they add to the state has its dtype, or a wider one. The others are computed, and come out,
    narrow. So do all on CUDA: there layers and cells are on autocast's list as wholes.
    """
    packed = isinstance(input, PackedSequence)
    if device == "cuda" or not (spec.cell == "gru" or (spec.cell == "lstm" and (packed or spec.single_step))):
        return found
    given = (input.data if packed else input) if hx is None else hx[-1] if isinstance(hx, (tuple, list)) else hx
    return _converted(found, torch.promote_types(torch.get_autocast_dtype(device), given.dtype))


def _converted(found: Any, dtype: torch.dtype) -> Any:
    if isinstance(found, PackedSequence):
        return PackedSequence(found.data.to(dtype), *found[1:])
    return found.to(dtype) if isinstance(found, Tensor) else tuple(_converted(t, dtype) for t in found)
