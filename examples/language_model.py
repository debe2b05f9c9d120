"""A language model of single characters, trained on one long text by truncated back-propagation through time.

    python examples/language_model.py

The text is what Python's ``help()`` knows about the language (`pydoc_data.topics`): 79 documents, one after the other.
It is cut into streams that are read side by side, window by window. An LSTM carries its state from each window of a
stream to the next one, and clears it where a document begins. Takes about half a minute on two cores.
"""

import argparse
import math
import pydoc_data.topics
import time
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

import pyrnnfast

State = tuple[Tensor, Tensor]


def read_documents(limit: int) -> list[str]:
    """Documents of `limit` characters in all, in an order that mixes their sizes and always the same."""
    topics = pydoc_data.topics.topics
    order = torch.randperm(len(topics), generator=torch.Generator().manual_seed(0)).tolist()
    documents, names = [], sorted(topics)
    for k in order:
        documents.append(topics[names[k]][:limit])
        limit -= len(documents[-1])
        if limit <= 0:
            break
    return documents


def streams(documents: Sequence[str], alphabet: dict[str, int], count: int) -> tuple[Tensor, Tensor]:
    """One long text as several beside one another.

    Returns:
        The characters [N, count], each stream a column, and where documents begin [N, count], bool.
    """
    text = torch.tensor([alphabet[character] for document in documents for character in document])
    starts = torch.zeros(len(text), dtype=torch.bool)
    starts[torch.tensor([0, *map(len, documents[:-1])]).cumsum(0)] = True
    rows = len(text) // count
    return tuple(t[: rows * count].view(count, rows).t().contiguous() for t in (text, starts))  # type: ignore[return-value]


def windows(text: Tensor, starts: Tensor, steps: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(characters, where documents begin, the characters that follow), [T, B] each, T = `steps` or less at the end."""
    for first in range(0, len(text) - 1, steps):
        last = min(first + steps, len(text) - 1)
        yield text[first:last], starts[first:last], text[first + 1 : last + 1]


class LanguageModel(nn.Module):
    """What follows each character, given all of its document before it."""

    def __init__(self, characters: int, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, 64)
        self.lstm = pyrnnfast.LSTM(64, hidden)
        self.output = nn.Linear(hidden, characters)

    def forward(
        self, text: Tensor, starts: Tensor, hx: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """text, starts: [T, B]; the logits [T, B, characters], and the state to go on from."""
        y, hx = self.lstm(self.embedding(text), hx, reset=starts)
        return self.output(y), hx


def bits(model: LanguageModel, text: Tensor, starts: Tensor, steps: int) -> float:
    """Bits per character, over a whole text."""
    hx, total = None, 0.0
    with torch.no_grad():
        for now, begin, following in windows(text, starts, steps):
            logits, hx = model(now, begin, hx)
            total += float(nn.functional.cross_entropy(logits.flatten(0, 1), following.flatten(), reduction="sum"))
    return total / math.log(2) / (len(text) - 1) / text.shape[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--characters", type=int, default=1_000_000, help="of the text, at most")
    parser.add_argument("--streams", type=int, default=32, help="read side by side")
    parser.add_argument("--window", type=int, default=64, help="steps that a gradient goes back")
    parser.add_argument("--hidden", type=int, default=256)
    options = parser.parse_args()

    torch.manual_seed(0)
    documents = read_documents(options.characters)
    alphabet = {character: k for k, character in enumerate(sorted(set("".join(documents))))}
    held_out = max(1, len(documents) // 20)
    text, starts = streams(documents[held_out:], alphabet, options.streams)
    unseen = streams(documents[:held_out], alphabet, 1)
    model = LanguageModel(len(alphabet), options.hidden)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    print(f"{text.numel():,} characters in {options.streams} streams, {unseen[0].numel():,} held out")
    print(f"before training   held out {bits(model, *unseen, options.window):.2f} bits per character")

    began, updates = time.perf_counter(), 0
    for number in range(1, options.passes + 1):
        hx, recent = None, []
        for now, begin, following in windows(text, starts, options.window):
            # The numbers go on from the last window, the gradient does not.
            logits, hx = model(now, begin, pyrnnfast.tbptt.carry(hx))
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), following.flatten())
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            recent.append(float(loss.detach()) / math.log(2))
            updates += 1
            if updates % 50 == 0:
                print(f"update {updates:5}      training {sum(recent) / len(recent):.2f}")
                recent.clear()
        seconds = time.perf_counter() - began
        print(f"after pass {number}      held out {bits(model, *unseen, options.window):.2f}      ({seconds:.0f} s)")


if __name__ == "__main__":
    main()
