"""A model together with its vocabularies: symbols in, symbols out."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .data import pad
from .model import Seq2Seq
from .search import greedy
from .vocabulary import EOS, Vocabulary


class Translation(NamedTuple):
    """The output for one input."""

    symbols: list[str]
    attention: Tensor | None  # [output symbols and end-of-sequence, input symbols]


@dataclass
class Translator:
    """A model and what is needed to use it.

    Args:
        model: the model, whose sizes are the vocabularies'.
        source: what the model reads.
        target: what it writes.
        max_length: the most symbols of an output, its end-of-sequence among them.
    """

    model: Seq2Seq
    source: Vocabulary
    target: Vocabulary
    max_length: int

    def __post_init__(self) -> None:
        settings = self.model.settings
        if (settings.source_size, settings.target_size) != (len(self.source), len(self.target)):
            raise ValueError(
                f"a model for {settings.source_size} and {settings.target_size} symbols does not go with "
                f"vocabularies of {len(self.source)} and {len(self.target)}"
            )
        if type(self.max_length) is not int or self.max_length < 1:
            raise ValueError(f"max_length must be a whole number from 1 upward, not {self.max_length!r}")

    def translate(self, inputs: Iterable[Sequence[str]], batch_size: int = 256) -> list[Translation]:
        """Translate greedily, without dropout, inputs of like lengths together.

        Raises:
            UnknownSymbolError: an input holds a symbol that the source vocabulary does not.
            ValueError: an input is empty.
        """
        encoded = [self.source.encode(symbols) for symbols in inputs]
        if not all(encoded):
            raise ValueError("nothing to translate: an input is empty")
        device = self.model.softmax_weights.weight.device
        results: dict[int, Translation] = {}
        order = sorted(range(len(encoded)), key=lambda row: len(encoded[row]))
        training = self.model.training
        self.model.eval()
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            source, lengths = pad([encoded[row] for row in rows])
            symbols, attention = greedy(self.model, source.to(device), lengths, self.max_length)
            ended = (symbols == EOS).int()
            steps = torch.where(ended.any(1), ended.argmax(1) + 1, symbols.size(1)).tolist()
            for index, (row, output, length) in enumerate(zip(rows, symbols.tolist(), steps, strict=True)):
                seen = None if attention is None else attention[index, :length, : len(encoded[row])]
                results[row] = Translation(self.target.decode(output), seen)
        self.model.train(training)
        return [results[row] for row in range(len(encoded))]
