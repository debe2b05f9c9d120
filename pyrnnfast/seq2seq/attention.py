"""Attention: which annotations of the source a decoder's state looks at.

What depends on the source alone is computed once a sentence by :meth:`Attention.prepare`; :meth:`Attention.forward`
then does the little that is left for each step of the decoder.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from .errors import SettingsError


class Memory(NamedTuple):
    """What a decoder looks at, B sentences of at most S positions."""

    keys: Tensor  # [B, S, K], compared with the query
    values: Tensor  # [B, S, V], averaged; zero at padding
    bias: Tensor  # [B, 1, S], added to the scores: 0, and minus infinity at padding


class Attention(nn.Module):
    """Weights a_s = softmax_s(score(h_t, m_s)), context c_t = sum_s a_s m_s (Luong et al. 2015, equations 7 and 8).

    A subclass says what a score is. Annotations m_s are [B, S, M], a query h_t is [B, Q].
    """

    def project(self, annotations: Tensor) -> Tensor:
        """The part of the scores that needs no query: annotations [B, S, M] to keys [B, S, K]."""
        raise NotImplementedError

    def score(self, query: Tensor, memory: Memory) -> Tensor:
        """Scores [B, 1, S] of a query [B, Q], the memory's bias among them."""
        raise NotImplementedError

    def prepare(self, annotations: Tensor, lengths: Tensor) -> Memory:
        """Mask the padding and compute what every step shares.

        Padding is cleared before the products, not after: 0 * NaN is NaN, in the gradients too.

        Args:
            annotations: [B, S, M].
            lengths: [B], at least 1 each, or a row of weights is NaN.
        """
        positions = torch.arange(annotations.size(1), device=annotations.device)
        padding = positions >= lengths.to(annotations.device).unsqueeze(1)  # [B, S]
        values = annotations.masked_fill(padding.unsqueeze(2), 0.0)
        bias = torch.zeros_like(padding, dtype=annotations.dtype).masked_fill(padding, -torch.inf)
        return Memory(self.project(values), values, bias.unsqueeze(1))

    def forward(self, query: Tensor, memory: Memory) -> tuple[Tensor, Tensor]:
        """One step: a query [B, Q] to the context [B, V] and the weights [B, S], zero at padding."""
        weights = self.score(query, memory).softmax(2)
        return torch.bmm(weights, memory.values).squeeze(1), weights.squeeze(1)


class MultiplicativeAttention(Attention):
    """score = h_t · k_s, a product with the key."""

    def score(self, query: Tensor, memory: Memory) -> Tensor:
        # A row times a matrix: as a matrix times a column the CPU's batched product takes longer.
        return torch.baddbmm(memory.bias, query.unsqueeze(1), memory.keys.transpose(1, 2))


class DotAttention(MultiplicativeAttention):
    """score = h_t · m_s (Luong et al. 2015, equation 8, "dot").

    Raises:
        SettingsError: the sizes differ, so there is no product.
    """

    def __init__(self, query_size: int, memory_size: int) -> None:
        super().__init__()
        if query_size != memory_size:
            raise SettingsError(
                f"dot attention needs a decoder as wide as the annotations: {query_size} is not {memory_size}; "
                "general attention takes any sizes"
            )

    def project(self, annotations: Tensor) -> Tensor:
        return annotations


class GeneralAttention(MultiplicativeAttention):
    """score = h_t · W_a m_s (Luong et al. 2015, equation 8, "general")."""

    def __init__(self, query_size: int, memory_size: int) -> None:
        super().__init__()
        self.key = nn.Linear(memory_size, query_size, bias=False)

    def project(self, annotations: Tensor) -> Tensor:
        keys: Tensor = self.key(annotations)
        return keys


class AdditiveAttention(Attention):
    """score = v · tanh(W_a h_t + U_a m_s) (Bahdanau et al. 2014, appendix A.1.2)."""

    def __init__(self, query_size: int, memory_size: int) -> None:
        super().__init__()
        self.query = nn.Linear(query_size, query_size, bias=False)
        self.key = nn.Linear(memory_size, query_size, bias=False)
        self.energy = nn.Linear(query_size, 1, bias=False)

    def project(self, annotations: Tensor) -> Tensor:
        keys: Tensor = self.key(annotations)
        return keys

    def score(self, query: Tensor, memory: Memory) -> Tensor:
        energy: Tensor = self.energy(torch.tanh(memory.keys + self.query(query).unsqueeze(1)))  # [B, S, 1]
        return energy.transpose(1, 2) + memory.bias


ATTENTIONS = {"additive": AdditiveAttention, "dot": DotAttention, "general": GeneralAttention}
