"""Sequence to sequence: an encoder, a decoder, and a softmax over the target vocabulary."""

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from .decoder import Decoder
from .encoder import Cell, Encoder
from .errors import SettingsError
from .vocabulary import BOS, EOS, PAD

AttentionName = Literal["additive", "dot", "general", "none"]


@dataclass(frozen=True)
class ModelSettings:
    """All that says what a :class:`Seq2Seq` is, apart from its weights.

    Raises:
        SettingsError: a size is less than 1 or not a whole number, a name is unknown, dropout is no probability.
    """

    source_size: int
    target_size: int
    embedding_size: int = 128
    hidden_size: int = 128  # of the decoder
    encoder_hidden_size: int = 128  # of each of the encoder's two directions
    encoder_layers: int = 1
    decoder_layers: int = 1
    cell: Cell = "lstm"
    attention: AttentionName = "general"
    dropout: float = 0.0

    def __post_init__(self) -> None:
        sizes = (
            "source_size",
            "target_size",
            "embedding_size",
            "hidden_size",
            "encoder_hidden_size",
            "encoder_layers",
            "decoder_layers",
        )
        for name in sizes:
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise SettingsError(f"{name} must be a whole number from 1 upward, not {value!r}")
        if self.cell not in get_args(Cell):
            raise SettingsError(f"cell must be one of {', '.join(get_args(Cell))}, not {self.cell!r}")
        if self.attention not in get_args(AttentionName):
            raise SettingsError(
                f"attention must be one of {', '.join(get_args(AttentionName))}, not {self.attention!r}"
            )
        if isinstance(self.dropout, bool) or not isinstance(self.dropout, int | float) or not 0 <= self.dropout < 1:
            raise SettingsError(f"dropout must be a number from 0 up to 1, not {self.dropout!r}")


class Decoded(NamedTuple):
    """What :meth:`Seq2Seq.forward` returns."""

    logits: Tensor  # [B, T, V]
    attention: Tensor | None  # [B, T, S]


class Seq2Seq(nn.Module):
    """Sequence to sequence with attention (Sutskever et al. 2014; Bahdanau et al. 2014; Luong et al. 2015)."""

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        self.settings = settings
        s = settings
        self.encoder = Encoder(
            s.source_size, s.embedding_size, s.encoder_hidden_size, s.encoder_layers, s.cell, s.dropout
        )
        self.decoder = Decoder(
            s.target_size,
            s.embedding_size,
            s.hidden_size,
            s.decoder_layers,
            s.cell,
            s.attention,
            self.encoder.output_size,
            s.dropout,
        )
        self.dropout = nn.Dropout(s.dropout)
        self.softmax_weights = nn.Linear(s.hidden_size, s.target_size)

    def logits(self, output: Tensor) -> Tensor:
        """What the decoder gives [..., H] to scores of the target's symbols, before the softmax [..., V]."""
        logits: Tensor = self.softmax_weights(self.dropout(output))
        return logits

    @torch.no_grad()
    def best(self, output: Tensor) -> Tensor:
        """The likeliest next symbol [B] for what the decoder gives [B, H]: never padding, never begin-of-sequence."""
        logits = self.logits(output)
        logits[:, (PAD, BOS)] = -torch.inf
        return logits.argmax(1)

    def forward(
        self,
        source: Tensor,
        lengths: Tensor,
        target: Tensor,
        teacher_forcing: float = 1.0,
        need_attention: bool = False,
    ) -> Decoded:
        """Score a batch of targets.

        Args:
            source: indices [B, S].
            lengths: how many of each row of ``source`` count [B].
            target: indices [B, T] that end with end-of-sequence, padded behind it.
            teacher_forcing: the probability, drawn for each symbol by itself (Bengio et al. 2015), that a step sees the
                target's last symbol, not the model's own best.
            need_attention: return the weights as well.

        Raises:
            ValueError: ``teacher_forcing`` is no probability.
        """
        if not 0.0 <= teacher_forcing <= 1.0:
            raise ValueError(f"teacher_forcing must lie between 0 and 1, not {teacher_forcing}")
        # Padding is fed as end-of-sequence, so that its embedding is never read.
        symbols = torch.cat((torch.full_like(target[:, :1], BOS), target[:, :-1]), 1).t()  # [T, B]
        symbols = symbols.masked_fill(symbols == PAD, EOS)
        # Where all inputs are known they are embedded at once; unbind, for indexing would make every step's gradient as
        # large as all steps' together.
        embedded = self.decoder.embed(symbols).unbind(0) if teacher_forcing == 1.0 else None
        taught = torch.rand(symbols.shape, device=symbols.device) < teacher_forcing

        state, memory = self.decoder.start(*self.encode(source, lengths))
        outputs: list[Tensor] = []
        weights: list[Tensor] = []
        for t in range(symbols.size(0)):
            if embedded is not None:
                x = embedded[t]
            else:
                last = torch.where(taught[t], symbols[t], self.best(state.output)) if t > 0 else symbols[t]
                x = self.decoder.embed(last)
            state, weight = self.decoder(x, state, memory)
            outputs.append(state.output)
            if need_attention and weight is not None:
                weights.append(weight)
        return Decoded(self.logits(torch.stack(outputs, 1)), torch.stack(weights, 1) if weights else None)

    def encode(self, source: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What :meth:`Decoder.start` takes: annotations [B, S, 2H], lengths [B], summary [B, 2H]."""
        annotations, summary = self.encoder(source, lengths)
        return annotations, lengths, summary
