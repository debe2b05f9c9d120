"""Packages that only some parts need: say what to install instead of showing a traceback."""

from collections.abc import Iterator
from contextlib import contextmanager

from .errors import UserError


class MissingExtraError(UserError, ImportError):
    """A package of the extra ``seq2seq`` is not installed."""


@contextmanager
def extra() -> Iterator[None]:
    """Wrap the imports of optional packages: a missing one raises :class:`MissingExtraError`."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise MissingExtraError(f"{error.name} is not installed: pip install pyrnnfast[seq2seq]") from error
