"""What a person sees while a model trains: a bar, the loss, the time left, and a few words pronounced anew."""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .data import Batch
from .extras import extra

with extra():
    import lightning.pytorch as lightning
    from lightning.pytorch.callbacks import Callback
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn


def clock(seconds: float) -> str:
    """Seconds as minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"


def say(console: Console, line: str = "") -> None:
    """Print a line as it is: not wrapped, no markup, no colours guessed."""
    console.print(line, soft_wrap=True, markup=False, highlight=False)


class ProgressDisplay(Callback):
    """A bar over all epochs; where the output is no terminal, a line for each tenth of an epoch.

    Args:
        console: where to print.
        report: called after every epoch with the number of updates so far; returns the lines to print.
    """

    def __init__(self, console: Console, report: Callable[[int], list[str]]) -> None:
        self.console = console
        self.report = report
        self.bar = Progress(
            TextColumn("pass {task.fields[epoch]}"),
            BarColumn(bar_width=None),
            TextColumn("{task.percentage:3.0f} %  {task.fields[text]}"),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self._losses: list[Tensor] = []
        self._words = self._steps = self._epoch_words = 0
        self._seconds = self._since = 0.0

    def on_train_start(self, trainer: lightning.Trainer, task: lightning.LightningModule) -> None:
        total = int(trainer.estimated_stepping_batches)
        self._bar_task = self.bar.add_task("", total=total, completed=trainer.global_step, epoch="", text="")
        self.bar.start()

    def on_train_epoch_start(self, trainer: lightning.Trainer, task: lightning.LightningModule) -> None:
        self._since = time.perf_counter()
        self._epoch_words = 0

    def on_train_batch_end(
        self, trainer: lightning.Trainer, task: lightning.LightningModule, outputs: Any, batch: Batch, index: int
    ) -> None:
        self._losses.append(outputs["loss"])
        self._epoch_words += len(batch)
        self._steps += 1
        # A step takes milliseconds: show a hundredth of an epoch at a time, or where it becomes a log a tenth.
        batches = int(trainer.num_training_batches)
        if (index + 1) % max(1, batches // (10 if self.bar.disable else 100)):
            return
        seconds = time.perf_counter() - self._since
        total = int(trainer.estimated_stepping_batches)
        left = (self._seconds + seconds) / self._steps * (total - trainer.global_step)
        loss = torch.stack(self._losses).mean().item()
        self._losses.clear()
        epoch = f"{trainer.current_epoch + 1}/{trainer.max_epochs}"
        text = f"loss {loss:.3f}  {self._epoch_words / seconds:,.0f} words/s  {clock(left)} left"
        if self.bar.disable:
            say(self.console, f"pass {epoch}  {100 * (index + 1) / batches:3.0f} %  {text}")
        else:
            self.bar.update(self._bar_task, completed=trainer.global_step, epoch=epoch, text=text)

    def on_train_epoch_end(self, trainer: lightning.Trainer, task: lightning.LightningModule) -> None:
        self._seconds += time.perf_counter() - self._since
        if trainer.is_global_zero:
            for line in self.report(trainer.global_step):
                say(self.console, line)

    def teardown(self, trainer: lightning.Trainer, task: lightning.LightningModule, stage: str) -> None:
        self.bar.stop()

    def on_exception(
        self, trainer: lightning.Trainer, task: lightning.LightningModule, exception: BaseException
    ) -> None:
        self.bar.stop()  # or the terminal's cursor stays hidden
