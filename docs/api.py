"""Builds the API reference from the docstrings: python docs/api.py FOLDER

By pdoc, because the docstrings are Google's style and Markdown as they stand, and need no other files beside them.
"""

import re
import sys
import warnings
from pathlib import Path
from typing import Any

import pdoc
import torch
from markupsafe import Markup

import pyrnnfast
from pyrnnfast import functional, ops, seq2seq

# Modules that have the name of their function, which is on the first page, have none of their own.
PAGES = ("pyrnnfast", r"!pyrnnfast\.(replace|prepack)$")

# What is for callers, where a module does not say so itself.
OFFERED = {
    functional: ["Options", "rnn", "gru", "lstm", "rnn_cell", "gru_cell", "lstm_cell"],
    ops: ["enable_compile"],
}


def prepare() -> None:
    """What pdoc reads off the imported package, made what a reader is to see; for this process alone."""
    pyrnnfast.__all__ += [name for name in ("ops", "seq2seq") if name not in pyrnnfast.__all__]
    for module, names in OFFERED.items():
        if not hasattr(module, "__all__"):
            vars(module)["__all__"] = names
    for package in (pyrnnfast, seq2seq):
        for cls in (vars(package)[name] for name in package.__all__):
            if isinstance(cls, type) and issubclass(cls, torch.nn.Module):
                _take_up_inherited(cls)


def _take_up_inherited(cls: type) -> None:
    """Gives a class the methods that it has from private classes of ours, which have no place on a page."""
    for base in cls.__mro__[1:]:
        if base.__module__.startswith("pyrnnfast.") and base.__name__.startswith("_"):
            for name, member in vars(base).items():
                if callable(member) and not name.startswith("_") and name not in vars(cls):
                    setattr(cls, name, member)


_plain_signature = pdoc.render.env.filters["format_signature"]


def _signature(signature: Any, colon: bool) -> Markup:
    """Python 3.11 writes ``Unpack[Options]`` as ``*<class 'Options'>``."""
    text = str(_plain_signature(signature, colon))
    return Markup(re.sub(r"\*&lt;class &#(?:x27|39);(?:\w+\.)*(\w+)&#(?:x27|39);&gt;", r"Unpack[\1]", text))


def main(folder: Path) -> None:
    prepare()
    pdoc.render.configure(docformat="google", template_directory=Path(__file__).parent / "templates")
    pdoc.render.env.filters["format_signature"] = _signature
    warnings.filterwarnings("error", category=UserWarning)  # pdoc warns of what it cannot read, and goes on
    pdoc.pdoc(*PAGES, output_directory=folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
