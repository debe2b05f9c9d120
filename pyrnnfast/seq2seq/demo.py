"""The main job: learn to pronounce English words, and show what came of it."""

import itertools
import platform
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from . import dictionary, gradients, plots, storage
from .data import PairDataset
from .dictionary import Lexicon
from .encoder import Cell
from .extras import extra
from .metrics import ErrorRates, error_rates, nearest
from .model import AttentionName, ModelSettings, Seq2Seq
from .objective import TrainingSettings
from .progress import ProgressDisplay, clock, say
from .throughput import TOLERANCE, Comparison, compare
from .training import LossHistory, TrainingError, batches, fit
from .translator import Translation, Translator
from .vocabulary import Vocabulary

with extra():
    from lightning.pytorch.callbacks import Callback
    from rich.console import Console


@dataclass(frozen=True)
class DemoSettings:
    """What the demo can be told."""

    out: Path = Path("runs/demo")
    dictionary: Path | None = None  # a file in the dictionary's format; without, the package's
    training: TrainingSettings = field(default_factory=TrainingSettings)
    embedding_size: int = 64
    hidden_size: int = 128
    encoder_hidden_size: int = 128
    encoder_layers: int = 1
    decoder_layers: int = 1
    cell: Cell = "lstm"
    attention: AttentionName = "general"
    dropout: float = 0.0
    threads: int | None = None
    resume: bool = False
    compared_batches: int = 200


class DevHistory(Callback):
    """The dev words' error rates after each epoch, kept in the checkpoints."""

    def __init__(self) -> None:
        self.passes: list[dict[str, float]] = []

    def state_dict(self) -> dict[str, Any]:
        return {"passes": self.passes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.passes = state["passes"]


def evenly(words: list[str], count: int, shortest: int = 1) -> list[str]:
    """``count`` words from all over a list, none of fewer than ``shortest`` letters unless all are."""
    fit_words = [word for word in words if len(word) >= shortest] or words
    return [fit_words[(2 * i + 1) * len(fit_words) // (2 * count)] for i in range(min(count, len(fit_words)))]


def score(translations: list[Translation], lexicon: Lexicon) -> ErrorRates:
    """Error rates of the translations of all words of a lexicon."""
    return error_rates([t.symbols for t in translations], list(lexicon.values()))


class Demo:
    """The demo's steps, in order; :meth:`run` does them all.

    Raises:
        DictionaryError, MissingExtraError: the dictionary is missing or too small.
        ValueError: settings that make no sense.
    """

    def __init__(self, settings: DemoSettings, console: Console) -> None:
        self.settings = settings
        self.console = console
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        self.split = dictionary.split(dictionary.load(settings.dictionary))
        train = self.split.train
        letters = Vocabulary.of(train)
        phones = Vocabulary.of(phones for alternatives in train.values() for phones in alternatives)
        for part in (self.split.dev, self.split.test):
            letters_unseen = {letter for word in part for letter in word} - set(letters.symbols)
            if letters_unseen:
                unseen = " ".join(sorted(letters_unseen))
                raise dictionary.DictionaryError(f"letters that no word to learn from has: {unseen}")
        self.data = PairDataset([(letters.encode(word), phones.encode(phone)) for word, phone in self._pairs(train)])
        torch.manual_seed(settings.training.seed)
        model = Seq2Seq(
            ModelSettings(
                len(letters),
                len(phones),
                settings.embedding_size,
                settings.hidden_size,
                settings.encoder_hidden_size,
                settings.encoder_layers,
                settings.decoder_layers,
                settings.cell,
                settings.attention,
                settings.dropout,
            )
        )
        # Half as long again as the longest pronunciation known: room for new words, an end for an untrained model.
        self.translator = Translator(model, letters, phones, int(self.data.target_lengths.max()) * 3 // 2)
        self.watched = evenly(list(self.split.test), 5, shortest=11)  # long words are learned last
        self.losses = LossHistory()
        self.dev = DevHistory()

    @staticmethod
    def _pairs(lexicon: Lexicon) -> list[tuple[str, tuple[str, ...]]]:
        return [(word, phones) for word, alternatives in lexicon.items() for phones in alternatives]

    def _say(self, line: str) -> None:
        say(self.console, line)

    def _table(self, words: list[str], translations: list[Translation]) -> list[str]:
        lines = []
        for word, translation in zip(words, translations, strict=True):
            references = self.split.test[word]
            reference = min(references, key=lambda r: nearest(translation.symbols, [r]))
            mark = "right" if tuple(translation.symbols) == reference else "wrong"
            lines.append(f"  {word:<18} {' '.join(translation.symbols):<42} {mark}   {' '.join(reference)}")
        return lines

    def _after_pass(self, updates: int) -> list[str]:
        rates = score(self.translator.translate(self.split.dev), self.split.dev)
        self.dev.passes.append({"updates": updates, "wer": rates.wer, "per": rates.per})
        first = (
            f"after pass {len(self.dev.passes)}: {100 * rates.wer:.1f} % of {len(self.split.dev):,} dev words wrong, "
            f"{100 * rates.per:.1f} % of their phones; five words it has never seen:"
        )
        return [first, *self._table(self.watched, self.translator.translate(self.watched))]

    def train(self) -> None:
        """Train, with a checkpoint after every pass, and save the model."""
        fit(
            self.translator.model,
            self.data,
            self.settings.training,
            self.settings.out / "checkpoints",
            # The report fills self.dev, so it stands before the checkpoint that keeps it.
            [self.losses, ProgressDisplay(self.console, self._after_pass), self.dev],
            self.settings.resume,
            accelerator="cpu",
            devices=1,
        )
        storage.save(self.translator, self.settings.out)

    def compare(self, initial: dict[str, torch.Tensor]) -> Comparison:
        """Our layers against torch's, from the weights that training started with."""
        model = Seq2Seq(self.translator.model.settings)
        model.load_state_dict(initial)
        loader = batches(self.data, self.settings.training)
        chosen = itertools.islice(itertools.cycle(loader), self.settings.compared_batches)
        return compare(model, list(chosen), self.settings.training)

    def draw(self, translations: list[Translation]) -> list[str]:
        """Write the pictures; returns their names."""
        out = self.settings.out
        passes = [(int(p["updates"]), p["wer"]) for p in self.dev.passes]
        test = score(translations, self.split.test).wer
        plots.learning_curve(self.losses.steps, self.losses.losses, passes, test, out / "learning_curve.png")
        plots.vanishing_gradients(gradients.vanishing(), out / "vanishing_gradients.png")
        runs = {"without clipping": gradients.recall(None), "clipped to norm 1": gradients.recall(1.0)}
        plots.clipping(runs, 1.0, out / "clipping.png")
        names = ["learning_curve.png", "vanishing_gradients.png", "clipping.png"]
        # The longest word that came out right, or if none did the longest.
        right = {
            word: tuple(translation.symbols) in references
            for (word, references), translation in zip(self.split.test.items(), translations, strict=True)
        }
        word = max(right, key=lambda word: (right[word], len(word)))
        translation = self.translator.translate([word])[0]
        if translation.attention is not None:
            phones = [*translation.symbols, "(end)"][: translation.attention.size(0)]
            plots.attention_map(translation.attention, list(word), phones, out / "attention.png")
            names.insert(0, "attention.png")
        return names

    def run(self) -> dict[str, Any]:
        """Everything; returns what ``metrics.json`` holds.

        Raises:
            TrainingError: training failed, or our layers and torch's do not give the same losses.
            OSError: a file could not be written.
        """
        settings, split, test = self.settings, self.split, self.split.test
        settings.out.mkdir(parents=True, exist_ok=True)
        model = self.translator.model
        self._say(
            f"{len(split.train):,} words to learn from ({len(self.data):,} pronunciations), {len(split.dev):,} dev and "
            f"{len(test):,} test words it will not see"
        )
        self._say(
            f"{sum(p.numel() for p in model.parameters()):,} weights, {settings.training.epochs} passes, "
            f"{torch.get_num_threads()} threads"
        )
        initial = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        before = score(self.translator.translate(test), test)
        self._say(f"before training {100 * before.wer:.1f} % of the test words are wrong")
        self.train()
        translations = self.translator.translate(test)
        rates = score(translations, test)
        self._say(
            f"\ntrained in {clock(self.losses.seconds)}; ten test words, what the model says, and the dictionary:"
        )
        by_word = dict(zip(test, translations, strict=True))
        sample = evenly(list(test), 10)
        for line in self._table(sample, [by_word[word] for word in sample]):
            self._say(line)
        self._say(
            f"\nof all {len(test):,} test words {100 * rates.wer:.2f} % have an error (before training "
            f"{100 * before.wer:.1f} %), of their phones {100 * rates.per:.2f} %"
        )
        comparison = self.compare(initial)
        self._report(comparison)
        pictures = self.draw(translations)
        result = {
            "wer": rates.wer,
            "per": rates.per,
            "wer_before": before.wer,
            "per_before": before.per,
            "words_per_second": comparison.words_per_second,
            "words_per_second_torch": comparison.words_per_second_torch,
            "speedup": comparison.speedup,
            "first_losses": [list(pair) for pair in comparison.losses],
            "training_seconds": self.losses.seconds,
            "passes": self.dev.passes,
            "words": {"train": len(split.train), "dev": len(split.dev), "test": len(test)},
            "model": asdict(model.settings),
            "training": asdict(settings.training),
            "threads": torch.get_num_threads(),
            "machine": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
            "versions": {name: metadata.version(name) for name in ("torch", "lightning")},
        }
        storage.write_json(settings.out / "metrics.json", result)
        self._say(f"\nin {settings.out}: {storage.MODEL_FILE}, metrics.json, {', '.join(pictures)}")
        self._say(f"try: pyrnnfast translate {settings.out} serendipity")
        if not comparison.agree:
            raise TrainingError(f"our losses differ from torch's by {comparison.difference:.1e}, more than rounding")
        return result

    def _report(self, comparison: Comparison) -> None:
        self._say("\ntraining throughput, the same batches from the same weights, turn by turn:")
        self._say(f"  our layers    {comparison.words_per_second:8,.0f} words/s")
        self._say(f"  torch.nn's    {comparison.words_per_second_torch:8,.0f} words/s")
        faster = "faster" if comparison.speedup >= 1 else "slower"
        self._say(f"  ratio {comparison.speedup:.2f} of torch's speed ({faster})")
        self._say(f"  losses of the first {len(comparison.losses)} updates, ours and torch's:")
        self._say("    " + "  ".join(f"{ours:.6f} {theirs:.6f}" for ours, theirs in comparison.losses))
        self._say(f"  largest relative difference {comparison.difference:.1e} (allowed {TOLERANCE:g})")
