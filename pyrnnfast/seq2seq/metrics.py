"""Error rates of pronunciations."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from .extras import extra

with extra():
    from rapidfuzz.distance import Levenshtein


class ErrorRates(NamedTuple):
    """Fractions, not per cent."""

    wer: float  # words with any error / words
    per: float  # wrong, missing and surplus phones / phones of the chosen references


def nearest(hypothesis: Sequence[str], references: Iterable[Sequence[str]]) -> tuple[int, int]:
    """Edit distance to the nearest reference and that reference's length; among equally near ones, the shortest."""
    return min((Levenshtein.distance(hypothesis, reference), len(reference)) for reference in references)


def error_rates(hypotheses: Sequence[Sequence[str]], references: Sequence[Iterable[Sequence[str]]]) -> ErrorRates:
    """Score one hypothesis a word against its alternatives, by the rule of Toshniwal & Livescu (2016).

    Raises:
        ValueError: the numbers of hypotheses and references differ, or there are none.
    """
    scores = [nearest(h, r) for h, r in zip(hypotheses, references, strict=True)]
    if not scores:
        raise ValueError("nothing to score")
    distances = [distance for distance, _ in scores]
    return ErrorRates(
        sum(distance > 0 for distance in distances) / len(scores), sum(distances) / sum(length for _, length in scores)
    )
