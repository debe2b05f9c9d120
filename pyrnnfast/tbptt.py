"""Truncated back-propagation through time (Williams & Peng 1990): a long sequence in windows, the state carried on.

```python
hx = None
for x, target in windows:  # x: [T, B, I]; row b of each window goes on where row b of the last one ended
    y, hx = lstm(x, carry(hx))
    loss(y, target).backward()  # through T steps, and no further
    ...
```

`examples/language_model.py` trains a language model in this way.
"""

from typing import Any, TypeVar

import torch
from torch import Tensor

StateT = TypeVar("StateT", bound=Tensor | tuple[Any, ...] | list[Any] | None)


def carry(hx: StateT, reset: Tensor | None = None) -> StateT:
    """The state for the next window: the numbers of the last one's, but no gradient through them.

    Args:
        hx: what a layer or cell has returned as its state, or is to be given: [..., B, H], a pair (h, c) of them, or
            tuples and lists of such, as a stack of cells has; None, before the first window, stays None
        reset: [B], bool, on any device: the sequences that begin anew with the next window, as environments do that
            are done; their rows become zero, whatever they held. None: none of them. Where a sequence begins anew in
            the middle of a window, give the layer itself a ``reset`` [T, B]; its first row does what is done here

    Returns:
        The same structure, with dtypes and devices as they were. A state of which no row is reset shares its memory
        with the one given.

    Raises:
        TypeError: ``hx`` has something else than tensors in it, or ``reset`` is no tensor of bool.
        ValueError: ``reset`` is not [B].
    """
    if reset is not None and (not isinstance(reset, Tensor) or reset.dtype is not torch.bool):
        raise TypeError("reset must be a tensor of bool")
    if hx is None:
        return hx
    if isinstance(hx, (tuple, list)):
        states = [carry(state, reset) for state in hx]
        return type(hx)(*states) if hasattr(hx, "_fields") else type(hx)(states)
    if not isinstance(hx, Tensor):
        raise TypeError(f"a state is a tensor, or tuples or lists of them, not {type(hx).__name__}")
    if reset is None:
        return hx.detach()  # type: ignore[return-value]
    if hx.dim() < 2:
        raise ValueError(f"reset is for states [..., B, H], got {list(hx.shape)}")
    if reset.shape != hx.shape[-2:-1]:
        raise ValueError(f"reset: expected size {list(hx.shape[-2:-1])}, got {list(reset.shape)}")
    # Filled, not multiplied by zero: a row of NaN becomes zero too.
    return hx.detach().masked_fill(reset.to(hx.device).unsqueeze(-1), 0)  # type: ignore[return-value]
