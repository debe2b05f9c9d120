"""Automatic mixed precision: operands in the dtype of autocast, results in the dtypes that torch.nn's have there."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from .obstacles import Spec


def narrowed(input: Any, hx: Any, weights: Sequence[Tensor]) -> tuple[Any, Any, list[Tensor]]:
    """The operands of a call, those in float32 in the dtype of autocast."""
    dtype = torch.get_autocast_dtype("cpu")

    def cast(t: Any) -> Any:
        return t.to(dtype) if isinstance(t, Tensor) and t.dtype is torch.float32 else t

    return (
        PackedSequence(cast(input.data), *input[1:]) if isinstance(input, PackedSequence) else cast(input),
        tuple(cast(s) for s in hx) if isinstance(hx, (tuple, list)) else cast(hx),
        [cast(w) for w in weights],
    )


def results(spec: Spec, input: Any, hx: Any, found: Any) -> Any:
    """What the narrow call has ``found``, in the dtypes that torch has for the call with ``input`` and ``hx``.

    torch's GRU, packed LSTM and LSTM and GRU cells are made of operators of which only the products take part in
    autocast: what they add to the state has its dtype, or a wider one. The others are computed, and come out, narrow.
    """
    packed = isinstance(input, PackedSequence)
    if not (spec.cell == "gru" or (spec.cell == "lstm" and (packed or spec.single_step))):
        return found
    given = (input.data if packed else input) if hx is None else hx[-1] if isinstance(hx, (tuple, list)) else hx
    return _converted(found, torch.promote_types(torch.get_autocast_dtype("cpu"), given.dtype))


def _converted(found: Any, dtype: torch.dtype) -> Any:
    if isinstance(found, PackedSequence):
        return PackedSequence(found.data.to(dtype), *found[1:])
    return found.to(dtype) if isinstance(found, Tensor) else tuple(_converted(t, dtype) for t in found)
