"""Padded batches, with sequences of any length and with resets in the middle, as packed rows for the kernels.

A reset clears the state before a step, so it begins a sequence of its own: a batch with ``lengths`` and ``reset`` is a
set of segments, which are sorted by length and packed. Padding is never read, and segments run side by side.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Segments(NamedTuple):
    """N rows in S segments of B sequences, the longest first; L is its length. int64, but for the masks."""

    places: Tensor  # [N]: where each packed row stands in the data
    batch_sizes: Tensor  # [L]
    sequence: Tensor  # [S]: whose segment it is
    from_start: Tensor  # [S], bool: whether it goes on from the state before the sequence
    from_end: Tensor  # [S], bool: the same backward in time
    first: Tensor  # [B]: the first segment of each sequence, 0 where it has none
    last: Tensor  # [B]


def segments(lengths: Tensor, reset: Tensor | None, begin: Tensor, stride: int) -> Segments:
    """Cuts sequences into segments.

    Args:
        lengths: [B], zeros allowed
        reset: [T, B], bool: whether a sequence's state is cleared before that step; None: never
        begin: [B]: the row in which each sequence begins
        stride: rows from one step of a sequence to the next
    """
    length, row = lengths.numpy(), begin.numpy()
    if reset is None:
        (owner,) = np.nonzero(length)
        start = np.zeros_like(owner)
        count = length[owner]
    else:
        starts = reset.numpy() & (np.arange(len(reset))[:, None] < length)
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
    places = row[owner[segment]] + (start[segment] + step) * stride
    is_first, is_last = start == 0, start + count == length[owner]
    from_start = is_first if reset is None else is_first & ~reset.numpy()[0][owner]
    first, last = np.zeros(len(length), np.int64), np.zeros(len(length), np.int64)
    first[owner[is_first]], last[owner[is_last]] = np.nonzero(is_first)[0], np.nonzero(is_last)[0]
    found = (places, batch_sizes, owner, from_start, is_last, first, last)
    return Segments(*(torch.from_numpy(np.ascontiguousarray(a)) for a in found))


def initial_states(found: Segments, directions: int, state: Tensor) -> Tensor:
    """The states before the first step of each segment [layers·D, S, H].

    Args:
        state: of the sequences, [layers·D, B, H]
    """
    own = state.index_select(1, found.sequence)
    mask = torch.stack([found.from_start, found.from_end][:directions]).repeat(len(state) // directions, 1)
    return own.where(mask.unsqueeze(-1), own.new_zeros(()))


def final_states(found: Segments, lengths: Tensor, state: Tensor, before: Tensor | None, directions: int) -> Tensor:
    """The states after the last step of each sequence [layers·D, B, H], from those of the segments; of a sequence
    without steps, the state that it had before."""
    ends = [found.last, found.first][:directions] * (len(state) // directions)
    own = torch.stack([s.index_select(0, end) for s, end in zip(state, ends, strict=True)])
    return own.where((lengths > 0)[:, None], own.new_zeros(()) if before is None else before)


def scatter(found: Segments, rows: Tensor, count: int) -> Tensor:
    """Packed rows back in their places among `count`, zeros where there is padding."""
    return rows.new_zeros(count, rows.shape[1]).index_copy(0, found.places, rows)
