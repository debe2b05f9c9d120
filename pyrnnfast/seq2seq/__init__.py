"""Sequence to sequence with attention, on pyrnnfast's layers.

The model needs torch alone. Training, storage, pictures and the demo are modules of their own, which need the packages
of the extra: ``pip install pyrnnfast[seq2seq]``.
"""

from .attention import AdditiveAttention, Attention, DotAttention, GeneralAttention, Memory, MultiplicativeAttention
from .decoder import Decoder, DecoderState
from .encoder import Encoder
from .model import Decoded, ModelSettings, Seq2Seq
from .search import Hypotheses, greedy
from .vocabulary import BOS, EOS, PAD, UnknownSymbolError, Vocabulary

__all__ = [
    "BOS",
    "EOS",
    "PAD",
    "AdditiveAttention",
    "Attention",
    "Decoded",
    "Decoder",
    "DecoderState",
    "DotAttention",
    "Encoder",
    "GeneralAttention",
    "Hypotheses",
    "Memory",
    "ModelSettings",
    "MultiplicativeAttention",
    "Seq2Seq",
    "UnknownSymbolError",
    "Vocabulary",
    "greedy",
]
