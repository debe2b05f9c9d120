"""Training: Lightning around the objective, with checkpoints from which a run goes on as if nothing had been."""

import logging
import pickle
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from .data import Batch, BucketSampler, PairDataset
from .errors import UserError
from .extras import extra
from .model import Seq2Seq
from .objective import TrainingSettings, loss_of

with extra():
    import lightning.pytorch as lightning
    from lightning.pytorch.callbacks import Callback, ModelCheckpoint
    from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig


class TrainingError(UserError, RuntimeError):
    """Training cannot go on: the loss is no number, or a checkpoint belongs to other settings."""


class Seq2SeqTask(lightning.LightningModule):
    """What Lightning trains. All settings go into its checkpoints, so that none is resumed with others."""

    def __init__(self, model: Seq2Seq, settings: TrainingSettings) -> None:
        super().__init__()
        self.model = model
        self.settings = settings

    @property
    def identity(self) -> dict[str, Any]:
        """What must be equal for one run to go on with another's checkpoint."""
        return {"model": asdict(self.model.settings), "training": asdict(self.settings)}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["identity"] = self.identity

    def on_train_batch_start(self, batch: Batch, index: int) -> None:
        # Random draws depend on the epoch alone, so a resumed run makes those of an uninterrupted one. Here, not at the
        # epoch's start: the loader draws too, before that or after it.
        if index == 0:
            torch.manual_seed((self.settings.seed * 1_000_003 + self.current_epoch) * 1009 + self.global_rank)

    def training_step(self, batch: Batch, index: int) -> Tensor:
        return loss_of(self.model, batch, self.settings)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        optimizer = self.settings.optimizer(self)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer,
            self.settings.learning_rate,
            total_steps=int(self.trainer.estimated_stepping_batches),
            pct_start=self.settings.warm_up,
            cycle_momentum=False,
            div_factor=10.0,
            final_div_factor=1000.0,
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class LossHistory(Callback):
    """Mean losses of every few steps, kept in the checkpoints too.

    Args:
        every: how many steps make one mean.
    """

    def __init__(self, every: int = 50) -> None:
        self.every = every
        self.steps: list[int] = []
        self.losses: list[float] = []
        self.seconds = 0.0  # of training, without what other callbacks do between the epochs
        self._pending: list[Tensor] = []
        self._epoch_start = 0.0

    def on_train_epoch_start(self, trainer: lightning.Trainer, task: lightning.LightningModule) -> None:
        self._epoch_start = time.perf_counter()

    def on_train_batch_end(
        self, trainer: lightning.Trainer, task: lightning.LightningModule, outputs: Any, batch: Batch, index: int
    ) -> None:
        self._pending.append(outputs["loss"])
        if len(self._pending) == self.every or trainer.is_last_batch:
            mean = torch.stack(self._pending).mean().item()
            self._pending.clear()
            if not mean < float("inf"):
                raise TrainingError(f"the loss is {mean} after {trainer.global_step} steps: lower the learning rate")
            self.steps.append(trainer.global_step)
            self.losses.append(mean)

    def on_train_epoch_end(self, trainer: lightning.Trainer, task: lightning.LightningModule) -> None:
        self.seconds += time.perf_counter() - self._epoch_start

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "losses": self.losses, "seconds": self.seconds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps, self.losses, self.seconds = state["steps"], state["losses"], state["seconds"]


def batches(data: PairDataset, settings: TrainingSettings) -> DataLoader[Batch]:
    """The batches of an epoch, as the sampler draws them."""
    sampler = BucketSampler(data, settings.batch_size, settings.seed)
    return DataLoader(data, sampler=sampler, batch_size=None)


def _check(path: Path, task: Seq2SeqTask) -> None:
    """Look at a checkpoint before Lightning does, for Lightning would say anything but what is wrong."""
    try:
        checkpoint = torch.load(path, weights_only=True, map_location="cpu")
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise TrainingError(f"{path}: a damaged checkpoint; start anew without it") from error
    if not isinstance(checkpoint, dict) or checkpoint.get("identity") != task.identity:
        raise TrainingError(f"{path}: made with other settings; resume with the same, or start anew without it")


def fit(
    model: Seq2Seq,
    data: PairDataset,
    settings: TrainingSettings,
    folder: Path,
    callbacks: Sequence[Callback] = (),
    resume: bool = False,
    **trainer_options: Any,
) -> None:
    """Train ``model`` in place, with a checkpoint in ``folder`` after every epoch.

    Args:
        model: the model.
        data: the training pairs.
        settings: how to train.
        folder: where the checkpoint ``last.ckpt`` goes.
        callbacks: Lightning's, run in this order, before the checkpoint is written.
        resume: go on from ``folder``'s checkpoint; with none there, start from the beginning.
        trainer_options: to ``lightning.Trainer``: ``accelerator``, ``devices``, …

    Raises:
        TrainingError: the loss is no number; the checkpoint is damaged or belongs to other settings.
    """
    task = Seq2SeqTask(model, settings)
    last = folder / "last.ckpt"
    resume = resume and last.exists()
    if resume:
        _check(last, task)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # tips, and which accelerators there are
    checkpoint = ModelCheckpoint(
        folder, filename="last", enable_version_counter=False, save_on_train_epoch_end=True, save_top_k=1
    )
    trainer = lightning.Trainer(
        max_epochs=settings.epochs,
        gradient_clip_val=settings.clip,
        gradient_clip_algorithm=settings.clip_by,
        callbacks=[*callbacks, checkpoint],
        default_root_dir=folder,
        logger=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        precision=settings.precision,
        **trainer_options,
    )
    with warnings.catch_warnings():
        # Batches are slices of tensors in memory: workers would only copy them. The folder holds the last run's
        # checkpoint on purpose.
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        warnings.filterwarnings("ignore", message=".*exists and is not empty.*")
        warnings.filterwarnings("ignore", message=".*LeafSpec.*")  # between Lightning and torch
        trainer.fit(task, batches(data, settings), ckpt_path=last if resume else None, weights_only=True)
