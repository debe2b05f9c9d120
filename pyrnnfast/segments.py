"""Padded and nested batches, with sequences of any length and resets in the middle, as packed rows.

A reset clears the state before a step, so it begins a sequence of its own: a batch with ``lengths`` and ``reset`` is a
set of segments, which are sorted by length and packed. Padding is never read, and segments run side by side.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Integers = NDArray[np.int64]


class Segments(NamedTuple):
    """N rows in S segments of B sequences, the longest first; L is its length. int64, but for the masks."""

    places: Tensor  # [N]: where each packed row stands in the data
    batch_sizes: Tensor  # [L]; [1] where there is no segment, of one step that nobody looks at: the kernels want one
    sequence: Tensor  # [S]: whose segment it is
    from_start: Tensor  # [S], bool: whether it goes on from the state before the sequence
    from_end: Tensor  # [S], bool: the same backward in time
    first: Tensor  # [B]: the first segment of each sequence, 0 where it has none
    last: Tensor  # [B]
    any_steps: Tensor  # [B], bool: whether a sequence has any


def on(device: torch.device, found: Segments) -> Segments:
    """The same where the data are, but for the batch sizes: those stay on the CPU, as in a ``PackedSequence``."""
    if device.type == "cpu":
        return found
    moved = {name: t.to(device, non_blocking=True) for name, t in found._asdict().items() if name != "batch_sizes"}
    return found._replace(**moved)


def inside(t: Tensor) -> Tensor:
    """The tensor that the transforms of torch.func have wrapped."""
    while torch._C._functorch.is_functorch_wrapped_tensor(t):
        t = torch._C._functorch.get_unwrapped(t)
    return t


def values(t: Tensor) -> NDArray[Any]:
    """What is in a tensor.

    Inside torch.func's transforms too: they wrap whatever goes through one of torch's operators, and the memory of a
    wrapped tensor cannot be read. What vmap maps over comes with that dimension.
    """
    t = inside(t)
    with torch._C._DisableFuncTorch():
        t = t.cpu()
        if t.numel() > 0 and t.data_ptr() == 0:
            raise ValueError("a tensor has no memory")
        return t.numpy()


def unwrapped(t: Tensor) -> Tensor:
    """The same values in a tensor that no transform wraps."""
    with torch._C._DisableFuncTorch():
        return torch.from_numpy(values(t))


def integers(t: Tensor) -> Integers:
    return values(t).astype(np.int64)


def check_lengths(length: Integers, steps: int) -> None:
    """Raises ValueError where a length is not from 0 to T."""
    if ((length < 0) | (length > steps)).any():
        raise ValueError(f"lengths must be from 0 to {steps}, the number of steps of the input")


def of_padded(lengths: Tensor | None, reset: Tensor | None, steps: int, batch: int, batch_first: bool) -> Segments:
    """The segments of a padded batch.

    Args:
        lengths: [B]; None: all sequences have all steps
        reset: [T, B], or [B, T] with ``batch_first``; None: never

    Raises:
        ValueError: a length is not from 0 to T.
    """
    length = np.full(batch, steps) if lengths is None else integers(lengths)
    check_lengths(length, steps)
    begin = np.arange(batch) * (steps if batch_first else 1)
    time_major = None if reset is None else values(reset.t() if batch_first else reset)
    return segments(length, time_major, begin, 1 if batch_first else batch)


def segments(length: Integers, reset: NDArray[np.bool_] | None, begin: Integers, stride: int) -> Segments:
    """Cuts sequences into segments.

    Args:
        length: [B], zeros allowed
        reset: [T, B], bool: whether a sequence's state is cleared before that step; None: never
        begin: [B]: the row in which each sequence begins
        stride: rows from one step of a sequence to the next
    """
    if reset is None:
        (owner,) = np.nonzero(length)
        start = np.zeros_like(owner)
        count = length[owner]
    else:
        starts = reset & (np.arange(len(reset))[:, None] < length)
        starts[0] = length > 0
        owner, start = np.nonzero(starts.T)
        ends_at_reset = np.append(owner[1:] == owner[:-1], False)
        count = np.where(ends_at_reset, np.append(start[1:], 0), length[owner]) - start
    order = np.argsort(-count, kind="stable")
    owner, start, count = owner[order], start[order], count[order]
    steps = np.arange(count[0] if len(count) else 0)
    batch_sizes = len(count) - np.searchsorted(count[::-1], steps, side="right")
    step = np.repeat(steps, batch_sizes)
    segment = np.arange(len(step)) - np.repeat(np.cumsum(batch_sizes) - batch_sizes, batch_sizes)
    places = begin[owner[segment]] + (start[segment] + step) * stride
    is_first, is_last = start == 0, start + count == length[owner]
    from_start = is_first if reset is None else is_first & ~reset[0][owner]
    first, last = np.zeros(len(length), np.int64), np.zeros(len(length), np.int64)
    first[owner[is_first]], last[owner[is_last]] = np.nonzero(is_first)[0], np.nonzero(is_last)[0]
    found = (
        places,
        batch_sizes if len(count) else np.ones(1, np.int64),
        owner,
        from_start,
        is_last,
        first,
        last,
        length > 0,
    )
    with torch._C._DisableFuncTorch():
        return Segments(*(torch.from_numpy(np.ascontiguousarray(a)) for a in found))


def gather(found: Segments, data: Tensor) -> Tensor:
    """The packed rows of ``data`` [rows, features]; one of zeros where there is none, as the kernels want one, and
    results are functions of the operands all the same."""
    rows = data.index_select(0, found.places)
    if torch.compiler.is_compiling():
        return rows.where(found.any_steps.any(), rows.new_zeros(()))
    return rows if len(rows) else torch.nn.functional.pad(rows, (0, 0, 0, 1))


def initial_states(found: Segments, directions: int, state: Tensor) -> Tensor:
    """The states before the first step of each segment [layers·D, S, H]; zeros of a row as in :func:`gather`.

    Args:
        state: of the sequences, [layers·D, B, H]
    """
    if not torch.compiler.is_compiling() and len(found.sequence) == 0:
        return state.new_zeros(len(state), 1, state.shape[2])
    own = state.index_select(1, found.sequence)
    mask = torch.stack([found.from_start, found.from_end][:directions]).repeat(len(state) // directions, 1)
    return own.where(mask.unsqueeze(-1), own.new_zeros(()))


def final_states(found: Segments, state: Tensor, before: Tensor | None, directions: int) -> Tensor:
    """The states after the last step of each sequence [layers·D, B, H], from those of the segments; of a sequence
    without steps, the state that it had before."""
    ends = [found.last, found.first][:directions] * (len(state) // directions)
    own = torch.stack([s.index_select(0, end) for s, end in zip(state, ends, strict=True)])
    return own.where(found.any_steps[:, None], own.new_zeros(()) if before is None else before.to(own.dtype))


def scatter(found: Segments, rows: Tensor, count: int) -> Tensor:
    """Packed rows back in their places among `count`, zeros where there is padding; rows beyond the segments' are none
    of theirs."""
    zeros, own = rows.new_zeros(count, rows.shape[1]), rows[: found.places.shape[0]]
    if torch.compiler.is_compiling():
        own = own.where(found.any_steps.any(), own.new_zeros(()))
    elif torch._C._are_functorch_transforms_active():
        return zeros.index_copy(0, found.places, own)  # vmap cannot write rows that it maps into what it does not
    return zeros.index_copy_(0, found.places, own)
