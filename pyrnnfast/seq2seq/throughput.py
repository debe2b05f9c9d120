"""Training throughput of one model on our layers and on torch's, turn by turn."""

import copy
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from ..replace import restore
from .data import Batch
from .model import Seq2Seq
from .objective import TrainingSettings, loss_of

# Rounding differs between two ways to compute one sum, and Adam's first steps carry it into the weights.
TOLERANCE = 1e-4


class Comparison(NamedTuple):
    """Both sides of a comparison, over the half of the batches in the middle when they are ranked by ratio of times.

    Where another program took the processor from one side for a moment, the batch is not among them.
    """

    words_per_second: float
    words_per_second_torch: float
    losses: list[tuple[float, float]]  # ours and torch's in the first steps
    difference: float  # the largest relative difference of these

    @property
    def speedup(self) -> float:
        """Ours over torch's."""
        return self.words_per_second / self.words_per_second_torch

    @property
    def agree(self) -> bool:
        """Whether the losses agree to rounding; a NaN does not."""
        return self.difference <= TOLERANCE


class _Side:
    def __init__(self, model: Seq2Seq, settings: TrainingSettings) -> None:
        self.model = model.train()
        self.settings = settings
        self.optimizer = settings.optimizer(model)

    def warm_up(self, batch: Batch) -> None:
        """Loss and gradients, without an update: first calls allocate, and load what they need."""
        torch.autograd.backward(loss_of(self.model, batch, self.settings))

    def step(self, batch: Batch, seed: int) -> tuple[float, float]:
        """One whole update: its loss and its seconds."""
        torch.manual_seed(seed)  # both sides draw the same dropout
        start = time.perf_counter()
        loss = loss_of(self.model, batch, self.settings)
        self.optimizer.zero_grad()
        torch.autograd.backward(loss)
        clip = nn.utils.clip_grad_norm_ if self.settings.clip_by == "norm" else nn.utils.clip_grad_value_
        clip(self.model.parameters(), self.settings.clip)
        self.optimizer.step()
        return loss.item(), time.perf_counter() - start


def compare(model: Seq2Seq, batches: Sequence[Batch], settings: TrainingSettings, checked: int = 5) -> Comparison:
    """Train two copies of ``model``, one on our layers and one on ``torch.nn``'s, on the same batches.

    The copies start from the same weights; who goes first changes with each batch.

    Args:
        model: the model; it is not changed.
        batches: at least one.
        settings: loss, optimizer and clipping; always in full precision.
        checked: in how many of the first steps the losses are compared.
    """
    sides = (
        _Side(copy.deepcopy(model), settings),
        _Side(restore(copy.deepcopy(model)), settings),
    )
    losses: list[tuple[float, float]] = []
    seconds: list[tuple[float, float]] = []
    for one in sides:
        one.warm_up(batches[0])
    for index, batch in enumerate(batches):
        taken: dict[int, tuple[float, float]] = {}
        for side in (0, 1) if index % 2 == 0 else (1, 0):
            taken[side] = sides[side].step(batch, index)
        losses.append((taken[0][0], taken[1][0]))
        seconds.append((taken[0][1], taken[1][1]))
    timed = sorted(zip(batches, seconds, strict=True), key=lambda pair: pair[1][1] / pair[1][0])
    middle = timed[len(timed) // 4 : -(len(timed) // 4) or None]
    words = sum(len(batch) for batch, _ in middle)
    return Comparison(
        words / sum(ours for _, (ours, _) in middle),
        words / sum(theirs for _, (_, theirs) in middle),
        losses[:checked],
        # A NaN must not hide behind max, which drops it in some places.
        float(torch.tensor([abs(a - b) / abs(b) for a, b in losses[:checked]], dtype=torch.float64).max()),
    )
