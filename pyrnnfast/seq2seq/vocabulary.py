"""Symbols and their indices."""

from collections.abc import Iterable, Sequence

from .errors import UserError

PAD, BOS, EOS = 0, 1, 2
SPECIALS = ("<pad>", "<s>", "</s>")


class UnknownSymbolError(UserError, ValueError):
    """A symbol that the vocabulary does not hold."""


class Vocabulary:
    """A fixed list of symbols, behind padding, begin-of-sequence and end-of-sequence.

    Args:
        symbols: the symbols without the special ones, each once; their order gives the indices.
    """

    def __init__(self, symbols: Iterable[str]) -> None:
        self.symbols = tuple(symbols)
        self._all = SPECIALS + self.symbols
        self._index = {symbol: index for index, symbol in enumerate(self._all)}
        if len(self._index) != len(self._all):
            raise ValueError("a vocabulary holds every symbol once, and none of " + ", ".join(SPECIALS))

    @classmethod
    def of(cls, sequences: Iterable[Iterable[str]]) -> "Vocabulary":
        """The vocabulary of all symbols that occur, sorted, so that equal data give equal indices."""
        return cls(sorted({symbol for sequence in sequences for symbol in sequence}))

    def __len__(self) -> int:
        return len(self._all)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vocabulary) and self.symbols == other.symbols

    def __hash__(self) -> int:
        return hash(self.symbols)

    def encode(self, sequence: Sequence[str]) -> list[int]:
        """The indices of ``sequence``, without special symbols.

        Raises:
            UnknownSymbolError: a symbol is not in the vocabulary. The special symbols are not input either.
        """
        unknown = sorted({symbol for symbol in sequence if self._index.get(symbol, PAD) < len(SPECIALS)})
        if unknown:
            raise UnknownSymbolError("not in the vocabulary: " + " ".join(repr(symbol) for symbol in unknown))
        return [self._index[symbol] for symbol in sequence]

    def decode(self, indices: Iterable[int]) -> list[str]:
        """The symbols up to the first end-of-sequence; padding and begin-of-sequence stand for nothing."""
        symbols = []
        for index in indices:
            if index == EOS:
                break
            if index not in (PAD, BOS):
                symbols.append(self._all[index])
        return symbols
