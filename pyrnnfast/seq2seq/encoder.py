"""The encoder: embeddings and a stacked bidirectional recurrent network over sentences of different lengths."""

from typing import Literal

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from ..modules import GRU, LSTM

Cell = Literal["lstm", "gru"]


class Encoder(nn.Module):
    """Reads every sentence from both ends (Schuster & Paliwal 1997; Bahdanau et al. 2014, section 3.2).

    Indices are packed before they are embedded: padding is never looked up, so nothing that stands there, in the
    batch or in the embedding's row of padding, can reach a result.
    """

    def __init__(
        self, vocabulary_size: int, embedding_size: int, hidden_size: int, layers: int, cell: Cell, dropout: float
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary_size, embedding_size)
        self.dropout = nn.Dropout(dropout)
        layer = {"lstm": LSTM, "gru": GRU}[cell]
        self.recurrence = layer(
            embedding_size,
            hidden_size,
            num_layers=layers,
            bidirectional=True,
            batch_first=True,
            dropout=dropout if layers > 1 else 0.0,
        )

    @property
    def output_size(self) -> int:
        """The width of one annotation: both directions."""
        return 2 * int(self.recurrence.hidden_size)

    def forward(self, source: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Encode a batch.

        Args:
            source: indices [B, S]; what stands behind a sentence's length is ignored.
            lengths: the length of each sentence [B], from 1 to S.

        Returns:
            The annotations [B, S, 2H], zero behind each sentence's end, and the summary [B, 2H]: the last state of the
            top layer in each direction.

        Raises:
            RuntimeError: a length is less than 1.
        """
        packed = pack_padded_sequence(source, lengths.cpu(), batch_first=True, enforce_sorted=False)
        embedded = self.dropout(self.embedding(packed.data))  # [sum of lengths, E]
        output, state = self.recurrence(
            PackedSequence(embedded, packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices)
        )
        annotations, _ = pad_packed_sequence(output, batch_first=True, total_length=source.size(1))
        hidden: Tensor = state[0] if isinstance(state, tuple) else state  # [2 * layers, B, H]
        return annotations, hidden[-2:].transpose(0, 1).flatten(1)
