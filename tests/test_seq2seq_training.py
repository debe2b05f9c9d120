"""Training: clipping, schedules, resuming, the same again, and that something is learned."""

import copy
import io
import random
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from torch import nn

from pyrnnfast.seq2seq import EOS, ModelSettings, Seq2Seq, Vocabulary, gradients, throughput
from pyrnnfast.seq2seq.data import BucketSampler, PairDataset, pad
from pyrnnfast.seq2seq.objective import TrainingSettings, loss_of
from pyrnnfast.seq2seq.progress import ProgressDisplay
from pyrnnfast.seq2seq.training import LossHistory, TrainingError, fit
from pyrnnfast.seq2seq.translator import Translator


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Two threads have nothing to share in models this small; they would wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


CPU: dict[str, Any] = {"accelerator": "cpu", "devices": 1}


def build(seed: int = 0, **settings: Any) -> Seq2Seq:
    torch.manual_seed(seed)
    return Seq2Seq(
        ModelSettings(**{"source_size": 8, "target_size": 8, "embedding_size": 6, "hidden_size": 8, **settings})
    )


def reversals(count: int, seed: int = 0) -> PairDataset:
    """Sequences of five symbols, to be written backwards."""
    draw = random.Random(seed)
    sources = [[draw.randint(3, 7) for _ in range(draw.randint(1, 6))] for _ in range(count)]
    return PairDataset([(source, source[::-1]) for source in sources])


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor, b[name]) for name, tensor in a.items())


# Clipping


class Recorder(Callback):
    """Gradients as the optimizer gets them, and as they came out of the backward pass."""

    def __init__(self) -> None:
        self.before: list[torch.Tensor] = []
        self.after: list[torch.Tensor] = []

    @staticmethod
    def _all(task: lightning.LightningModule) -> torch.Tensor:
        return torch.cat([p.grad.flatten() for p in task.parameters() if p.grad is not None])

    def on_after_backward(self, trainer: lightning.Trainer, task: lightning.LightningModule) -> None:
        self.before.append(self._all(task))

    def on_before_zero_grad(
        self, trainer: lightning.Trainer, task: lightning.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if self.before:  # the first call comes before the first gradient
            self.after.append(self._all(task))


@pytest.mark.parametrize("clip_by", ["norm", "value"])
def test_clipping(tmp_path: Path, clip_by: Any) -> None:
    recorder = Recorder()
    limit = 0.1 if clip_by == "norm" else 0.001
    settings = TrainingSettings(epochs=1, batch_size=20, clip=limit, clip_by=clip_by)
    fit(build(), reversals(60), settings, tmp_path, [recorder], **CPU)
    clipped = 0
    # Lightning clears the gradients at the start of a step: the n-th look after it belongs to the n-th gradient.
    for before, after in zip(recorder.before, recorder.after, strict=False):
        if clip_by == "norm":
            expected = before * min(1.0, limit / (float(before.norm()) + 1e-6))
        else:
            expected = torch.where(before.abs() > limit, limit * before.sign(), before)
        torch.testing.assert_close(after, expected)
        clipped += not torch.equal(before, expected)
    assert clipped >= 2


# Learning


def test_learns_to_write_backwards(tmp_path: Path) -> None:
    symbols = Vocabulary("abcde")
    model = build(hidden_size=32, encoder_hidden_size=32)
    settings = TrainingSettings(epochs=25, batch_size=16, learning_rate=0.02)
    history = LossHistory(every=10)
    fit(model, reversals(400), settings, tmp_path, [history], **CPU)
    assert history.losses[0] > 1.0
    assert history.losses[-1] < 0.1
    translator = Translator(model, symbols, symbols, 12)
    unseen = ["abcdea", "eedcb", "dabc", "c"]
    assert ["".join(t.symbols) for t in translator.translate(unseen)] == [word[::-1] for word in unseen]


def test_translations_keep_the_order_of_the_inputs() -> None:
    symbols = Vocabulary("abcde")
    translator = Translator(build().train(), symbols, symbols, 9)
    words = ["ab", "abcde", "e", "cd", "bb"]
    together = translator.translate(words, batch_size=2)
    for word, translation in zip(words, together, strict=True):
        assert translation.symbols == translator.translate([word])[0].symbols
        assert translation.attention is not None
        assert translation.attention.shape[1] == len(word)
        torch.testing.assert_close(translation.attention.sum(1), torch.ones(translation.attention.size(0)))
    assert translator.model.training
    with pytest.raises(ValueError, match="empty"):
        translator.translate(["a", ""])


def test_label_smoothing_and_padding_in_the_loss() -> None:
    model = build()
    data = PairDataset([([3, 4, 5], [3]), ([4], [5, 6, 7])])
    batch = data[[0, 1]]
    logits = model(batch.source, batch.lengths, batch.target).logits.log_softmax(2)
    for smoothing in (0.0, 0.2):
        terms = []
        for row, target in enumerate([[3, EOS], [5, 6, 7, EOS]]):
            for step, symbol in enumerate(target):
                log_probabilities = logits[row, step]
                terms.append(-(1 - smoothing) * log_probabilities[symbol] - smoothing * log_probabilities.mean())
        loss = loss_of(model, batch, TrainingSettings(label_smoothing=smoothing))
        torch.testing.assert_close(loss, torch.stack(terms).mean())


def test_the_learning_rate_rises_and_falls(tmp_path: Path) -> None:
    class Rates(Callback):
        seen: list[float] = []  # noqa: RUF012

        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            self.seen.append(trainer.optimizers[0].param_groups[0]["lr"])

    rates = Rates()
    settings = TrainingSettings(epochs=4, batch_size=10, learning_rate=0.01, warm_up=0.25)
    fit(build(), reversals(100), settings, tmp_path, [rates], **CPU)
    top = rates.seen.index(max(rates.seen))
    assert len(rates.seen) == 40
    assert max(rates.seen) == pytest.approx(0.01, rel=1e-2)
    assert 8 <= top <= 10
    assert rates.seen[: top + 1] == sorted(rates.seen[: top + 1])
    assert rates.seen[top:] == sorted(rates.seen[top:], reverse=True)
    assert rates.seen[-1] < 1e-4


# The same again

# Everything that draws random numbers takes part.
DRAWS = TrainingSettings(epochs=3, batch_size=8, teacher_forcing=0.7, seed=3)


def test_a_seed_fixes_everything(tmp_path: Path) -> None:
    data = reversals(50)
    runs = []
    for name in ("a", "b"):
        model = build(dropout=0.3)
        torch.manual_seed(random.Random(name).randint(0, 99))  # what was drawn before must not matter
        fit(model, data, DRAWS, tmp_path / name, **CPU)
        runs.append(weights(model))
    assert same(*runs)


class Power(Exception):
    pass


class PowerCut(Callback):
    def on_train_batch_start(self, trainer: lightning.Trainer, *_: Any) -> None:
        if trainer.global_step == 10:  # in the middle of the second of three epochs
            raise Power


def test_resume_gives_the_weights_of_an_uninterrupted_run(tmp_path: Path) -> None:
    data = reversals(50)
    whole, history = build(dropout=0.3), LossHistory(every=2)
    fit(whole, data, DRAWS, tmp_path / "whole", [history], **CPU)

    with pytest.raises(Power):
        fit(build(dropout=0.3), data, DRAWS, tmp_path / "cut", [LossHistory(every=2), PowerCut()], **CPU)
    resumed, resumed_history = build(seed=9, dropout=0.3), LossHistory(every=2)
    fit(resumed, data, DRAWS, tmp_path / "cut", [resumed_history], resume=True, **CPU)
    assert same(weights(whole), weights(resumed))
    assert (resumed_history.steps, resumed_history.losses) == (history.steps, history.losses)


def test_without_resume_it_starts_anew(tmp_path: Path) -> None:
    data = reversals(30)
    settings = TrainingSettings(epochs=1, batch_size=8)
    results = []
    for _ in range(2):
        model = build()
        fit(model, data, settings, tmp_path, **CPU)
        results.append(weights(model))
    assert same(*results)
    model = build()
    fit(model, data, settings, tmp_path / "nothing there", resume=True, **CPU)
    assert same(results[0], weights(model))


def test_resume_with_other_settings_is_refused(tmp_path: Path) -> None:
    data = reversals(30)
    fit(build(), data, TrainingSettings(epochs=1), tmp_path, **CPU)
    with pytest.raises(TrainingError, match="other settings"):
        fit(build(), data, TrainingSettings(epochs=2), tmp_path, resume=True, **CPU)
    with pytest.raises(TrainingError, match="other settings"):
        fit(build(cell="gru"), data, TrainingSettings(epochs=1), tmp_path, resume=True, **CPU)


def test_a_damaged_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "last.ckpt").write_bytes(b"no checkpoint")
    with pytest.raises(TrainingError, match=r"last\.ckpt"):
        fit(build(), reversals(30), TrainingSettings(epochs=1), tmp_path, resume=True, **CPU)


def test_a_loss_that_is_no_number(tmp_path: Path) -> None:
    model = build()
    with torch.no_grad():
        model.softmax_weights.bias.fill_(torch.nan)
    with pytest.raises(TrainingError, match="loss is nan"):
        fit(model, reversals(30), TrainingSettings(epochs=1), tmp_path, [LossHistory()], **CPU)


def test_training_says_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(build(), reversals(30), TrainingSettings(epochs=1), tmp_path, **CPU)
        fit(build(), reversals(30), TrainingSettings(epochs=1), tmp_path, **CPU)
    assert capfd.readouterr() == ("", "")


def test_mixed_precision(tmp_path: Path) -> None:
    history = LossHistory(every=10)
    fit(build(), reversals(200), TrainingSettings(epochs=4, precision="bf16-mixed"), tmp_path, [history], **CPU)
    assert history.losses[-1] < history.losses[0]


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_shown(tmp_path: Path, terminal: bool) -> None:
    output = io.StringIO()
    reports: list[int] = []

    def report(updates: int) -> list[str]:
        reports.append(updates)
        return [f"[report] {updates}"]

    display = ProgressDisplay(Console(file=output, force_terminal=terminal, width=100), report)
    settings = TrainingSettings(epochs=2, batch_size=10)
    fit(build(), reversals(100), settings, tmp_path, [display], **CPU)
    assert reports == [10, 20]
    for text in ("[report] 20", "pass 2/2", "100 %", "loss ", "words/s", "0:00 left"):
        assert text in output.getvalue()
    assert ("\x1b[?25h" in output.getvalue()) == terminal  # the cursor is shown again


@pytest.mark.parametrize(
    "wrong",
    [{"epochs": 0}, {"clip": 0.0}, {"warm_up": 1.5}, {"teacher_forcing": -0.1}, {"learning_rate": float("nan")}],
)
def test_training_settings_that_make_no_sense(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        TrainingSettings(**wrong)


# Ours against torch's


def test_comparison() -> None:
    data = reversals(120)
    batches = [data[rows] for rows in BucketSampler(data, 20, 0)]
    model = build(dropout=0.2)
    before = copy.deepcopy(model.state_dict())
    result = throughput.compare(model, batches, TrainingSettings(), checked=3)
    assert len(result.losses) == 3
    assert result.agree
    assert min(result.words_per_second, result.words_per_second_torch, result.speedup) > 0
    assert same(before, model.state_dict())


def test_comparison_notices_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    data = reversals(60)
    batches = [data[rows] for rows in BucketSampler(data, 20, 0)]
    restore = throughput.restore

    def spoil(model: Seq2Seq) -> Seq2Seq:
        with torch.no_grad():
            next(model.encoder.recurrence.parameters()).mul_(1.1)
        return restore(model)

    monkeypatch.setattr(throughput, "restore", spoil)
    assert not throughput.compare(build(), batches, TrainingSettings()).agree
    assert not throughput.Comparison(1, 1, [], float("nan")).agree


# Vanishing and exploding gradients


def test_state_gradients_are_the_products_of_jacobians() -> None:
    torch.manual_seed(0)
    layer = gradients.scaled_rnn(5, 1.2).double()
    inputs, direction = torch.randn(6, 1, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    norms = gradients.state_gradient_norms(layer, inputs, direction)
    w_ih, w_hh = (layer.get_parameter(f"weight_{name}_l0").detach() for name in ("ih", "hh"))
    h, states = torch.zeros(5, dtype=torch.float64), []
    for x in inputs:
        h = torch.tanh(w_ih @ x + w_hh @ h)
        states.append(h)
    gradient, expected = direction, [float(direction.norm())]
    for h in reversed(states[1:]):
        gradient = w_hh.t() @ ((1 - h**2) * gradient)  # tanh' = 1 - tanh^2
        expected.append(float(gradient.norm()))
    assert norms == pytest.approx(expected[::-1])


def test_gradients_vanish_explode_and_last() -> None:
    contracting, expanding, lstm, _ = gradients.vanishing(steps=100, hidden_size=64).values()
    assert contracting[-1] == pytest.approx(1.0)
    assert contracting[0] < 1e-6
    assert expanding[0] > 1e3
    assert 0.1 < lstm[0] / lstm[90] < 10


def test_clipping_saves_an_expanding_rnn() -> None:
    free, clipped = gradients.recall(None), gradients.recall(1.0)
    assert free.losses[0] == clipped.losses[0]
    assert max(clipped.norms) > 10
    assert sum(clipped.losses[-30:]) < 0.5 * sum(free.losses[-30:])


def test_padding_helper() -> None:
    padded, lengths = pad([[5], [3, 4]])
    assert padded.tolist() == [[5, 0], [3, 4]]
    assert lengths.tolist() == [1, 2]
