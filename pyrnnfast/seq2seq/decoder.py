"""The decoder: recurrent cells that see the last symbol and, by input feeding, what attention found for it."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..modules import GRUCell, LSTMCell
from .attention import ATTENTIONS, Memory
from .encoder import Cell


class DecoderState(NamedTuple):
    """What one step hands to the next."""

    layers: tuple[tuple[Tensor, ...], ...]  # of each layer (h,) or (h, c), [B, H]
    output: Tensor  # [B, H], what the softmax reads; fed to the next step


class Decoder(nn.Module):
    """Luong's decoder with input feeding (Luong et al. 2015, sections 3 and 3.3).

    h_t = cells([e(y_{t-1}); o_{t-1}]), c_t = attention(h_t), o_t = tanh(W_c [c_t; h_t]). With attention "none"
    (Sutskever et al. 2014) o_t = h_t, nothing is fed, and all the decoder knows of the source is its first state.
    """

    def __init__(
        self,
        vocabulary_size: int,
        embedding_size: int,
        hidden_size: int,
        layers: int,
        cell: Cell,
        attention: str,
        memory_size: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary_size, embedding_size)
        self.dropout = nn.Dropout(dropout)
        self.gated_memory = cell == "lstm"
        attended = attention != "none"
        self.attention = ATTENTIONS[attention](hidden_size, memory_size) if attended else None
        # W_c is kept as its two halves. The context is a weighted sum, so W_c's half may go over the annotations before
        # the loop instead of over every context within it: the same numbers, narrower sums, and no concatenation.
        self.context = nn.Linear(memory_size, hidden_size, bias=False) if attended else None
        self.state = nn.Linear(hidden_size, hidden_size) if attended else None
        cells = LSTMCell if cell == "lstm" else GRUCell
        sizes = [embedding_size + hidden_size if attended else embedding_size] + [hidden_size] * (layers - 1)
        self.cells = nn.ModuleList(cells(size, hidden_size) for size in sizes)
        # One linear map gives the first h (and c) of all layers, so the encoder's depth does not bind the decoder's.
        self.bridge = nn.Linear(memory_size, layers * hidden_size * (2 if self.gated_memory else 1))

    def start(self, annotations: Tensor, lengths: Tensor, summary: Tensor) -> tuple[DecoderState, Memory | None]:
        """The first state, and the memory that all steps share, from what the encoder returns.

        The first h is tanh(W_s summary) (Bahdanau et al. 2014, appendix A.2.2), for each layer and for c alike.
        """
        parts = torch.tanh(self.bridge(summary)).chunk(len(self.cells) * (2 if self.gated_memory else 1), 1)
        layers = tuple(zip(parts[::2], parts[1::2], strict=True)) if self.gated_memory else tuple((h,) for h in parts)
        if self.attention is None or self.context is None:
            return DecoderState(layers, layers[-1][0]), None
        memory = self.attention.prepare(annotations, lengths)
        state = DecoderState(layers, torch.zeros_like(layers[-1][0]))
        return state, memory._replace(values=self.context(memory.values))

    def embed(self, symbols: Tensor) -> Tensor:
        """Embeddings of symbols of any shape [...] to [..., E]."""
        embedded: Tensor = self.dropout(self.embedding(symbols))
        return embedded

    def forward(
        self, embedded: Tensor, state: DecoderState, memory: Memory | None
    ) -> tuple[DecoderState, Tensor | None]:
        """One step.

        Args:
            embedded: the last symbol [B, E].
            state: the last state.
            memory: from :meth:`start`.

        Returns:
            The next state, and the attention's weights [B, S], None without attention.
        """
        x = embedded if memory is None else torch.cat((embedded, state.output), 1)
        layers = []
        for depth, (cell, last) in enumerate(zip(self.cells, state.layers, strict=True)):
            new = cell(x if depth == 0 else self.dropout(x), last if self.gated_memory else last[0])
            layers.append(new if self.gated_memory else (new,))
            x = layers[-1][0]
        if memory is None or self.attention is None or self.state is None:
            return DecoderState(tuple(layers), x), None
        context, weights = self.attention(x, memory)
        return DecoderState(tuple(layers), torch.tanh(context + self.state(x))), weights
