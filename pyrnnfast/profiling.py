"""What torch's profilers see of the kernels, which are no operators of torch."""

from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

_P = ParamSpec("_P")
_Result = TypeVar("_Result")


def profiled(cell: str, what: str, kernel: Callable[_P, _Result], /, *args: _P.args, **kwargs: _P.kwargs) -> _Result:
    """``kernel(…)``, as a range with a name like ``pyrnnfast::lstm_forward`` where a profiler is at work."""
    if not torch._C._autograd._profiler_enabled():
        return kernel(*args, **kwargs)
    with torch.profiler.record_function(f"pyrnnfast::{cell}_{what}"):
        return kernel(*args, **kwargs)
