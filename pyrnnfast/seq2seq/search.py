"""Search: from a trained model to an output sequence."""

from typing import NamedTuple

import torch
from torch import Tensor

from .model import Seq2Seq
from .vocabulary import BOS, EOS, PAD


class Hypotheses(NamedTuple):
    """One output for each sentence."""

    symbols: Tensor  # [B, T], padded behind end-of-sequence
    attention: Tensor | None  # [B, T, S]


@torch.no_grad()
def greedy(model: Seq2Seq, source: Tensor, lengths: Tensor, max_length: int) -> Hypotheses:
    """The best symbol at every step, fed back, until end-of-sequence.

    The same in any batch: a row ends by itself, and the loop when all have ended or ``max_length`` is reached. The
    model's training flag is left as it is; call ``model.eval()`` first if it has dropout.

    Args:
        model: the model.
        source: indices [B, S].
        lengths: how many of each row count [B].
        max_length: the most symbols of an output, its end-of-sequence among them.

    Raises:
        ValueError: ``max_length`` is less than 1.
    """
    if max_length < 1:
        raise ValueError(f"max_length must be at least 1, not {max_length}")
    state, memory = model.decoder.start(*model.encode(source, lengths))
    last = torch.full_like(source[:, 0], BOS)
    ended = torch.zeros_like(last, dtype=torch.bool)
    symbols: list[Tensor] = []
    weights: list[Tensor] = []
    for _ in range(max_length):
        state, weight = model.decoder(model.decoder.embed(last), state, memory)
        last = model.best(state.output)
        symbols.append(last.masked_fill(ended, PAD))
        if weight is not None:
            weights.append(weight)
        ended = ended | (last == EOS)
        if bool(ended.all()):
            break
    return Hypotheses(torch.stack(symbols, 1), torch.stack(weights, 1) if weights else None)
