"""What training minimises, and how: settings, loss, optimizer."""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from .data import Batch
from .errors import SettingsError
from .model import Seq2Seq
from .vocabulary import PAD

ClipBy = Literal["norm", "value"]
Precision = Literal["32-true", "bf16-mixed", "16-mixed"]  # Lightning's names


@dataclass(frozen=True)
class TrainingSettings:
    """How a model is trained.

    Raises:
        SettingsError: a value makes no sense.
    """

    epochs: int = 5
    batch_size: int = 64
    learning_rate: float = 3e-3
    warm_up: float = 0.1  # share of all steps over which the learning rate rises; then it falls to nothing by a cosine
    label_smoothing: float = 0.0
    teacher_forcing: float = 1.0
    clip: float = 1.0
    clip_by: ClipBy = "norm"
    precision: Precision = "32-true"
    seed: int = 0

    def __post_init__(self) -> None:
        positive = ("epochs", "batch_size", "learning_rate", "clip")
        wrong = [name for name in positive if not getattr(self, name) > 0]
        fractions = ("warm_up", "label_smoothing", "teacher_forcing")
        wrong += [name for name in fractions if not 0 <= getattr(self, name) <= 1]
        choices = (("clip_by", ClipBy), ("precision", Precision))
        wrong += [name for name, choice in choices if getattr(self, name) not in get_args(choice)]
        if wrong or self.seed < 0:
            raise SettingsError(f"settings that make no sense: {', '.join(wrong) or 'seed'}")

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """The optimizer at the highest learning rate."""
        # To clip, mixed precision must get at the gradients before the optimizer; a fused one does not let it.
        fused = "mixed" not in self.precision
        return torch.optim.Adam(model.parameters(), lr=self.learning_rate, betas=(0.9, 0.98), fused=fused)


def loss_of(model: Seq2Seq, batch: Batch, settings: TrainingSettings) -> Tensor:
    """Mean cross-entropy of a batch's target symbols; padding does not count."""
    logits = model(batch.source, batch.lengths, batch.target, settings.teacher_forcing).logits
    return nn.functional.cross_entropy(
        logits.flatten(0, 1), batch.target.flatten(), ignore_index=PAD, label_smoothing=settings.label_smoothing
    )
