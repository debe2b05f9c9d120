"""The documents that programs write: the API reference, and what works where."""

import importlib
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import pyrnnfast
from pyrnnfast import reference, seq2seq

DOCS = Path(__file__).parents[1] / "docs"


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, timeout=300)


# The API reference ---------------------------------------------------------------------------------------------------

NAMES = {
    "pyrnnfast": [name for name in pyrnnfast.__all__ if name not in ("cuda", "functional", "reference", "tbptt")],
    "pyrnnfast/cuda": ["use"],
    "pyrnnfast/functional": ["rnn", "gru", "lstm", "rnn_cell", "gru_cell", "lstm_cell", "Options", "Options.lengths"],
    "pyrnnfast/reference": [*reference.STEPS, "layer", "stack"],
    "pyrnnfast/tbptt": ["carry"],
    "pyrnnfast/ops": ["enable_compile"],
    "pyrnnfast/seq2seq": [*seq2seq.__all__, "Attention.forward"],
}


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("docs")
    result = run(DOCS / "api.py", folder)
    assert result.returncode == 0, result.stderr
    return {str(p.relative_to(folder).with_suffix("")): p.read_text() for p in folder.rglob("*.html")}


def described(page: str) -> set[str]:
    """What has a description of its own."""
    return set(re.findall(r'<(?:section|div) id="([^"]+)"', page))


def test_there_is_a_page_for_each_public_module(pages: dict[str, str]) -> None:
    assert set(pages) == {"index", *NAMES}
    assert "pyrnnfast.html" in pages["index"]
    for name in NAMES:
        assert name == "pyrnnfast" or f"{name}.html" in pages["pyrnnfast"]


@pytest.mark.parametrize("page", NAMES)
def test_every_public_name_is_on_its_page(page: str, pages: dict[str, str]) -> None:
    assert set(NAMES[page]) <= described(pages[page])


@pytest.mark.parametrize("name", ["RNN", "GRU", "LSTM", "RNNCell", "GRUCell", "LSTMCell"])
def test_modules_tell_what_they_take_and_give(name: str, pages: dict[str, str]) -> None:
    (forward,) = re.findall(rf'(?s)<div id="{name}\.forward".*?</div>\s*</div>', pages["pyrnnfast"])
    for word in ("input", "hx") if name.endswith("Cell") else ("input", "hx", "lengths", "reset"):
        assert f"<strong>{word}:</strong>" in forward


def test_nothing_private_and_nothing_of_torch(pages: dict[str, str]) -> None:
    for page in NAMES:
        text, names = pages[page], described(pages[page])
        private = {n for n in names if any(part.startswith("_") and part != "__init__" for part in n.split("."))}
        assert not private
        assert not {n for n in names if n.split(".")[-1] in ("extra_repr", "register_buffer", "state_dict", "train")}
        assert "Initialize internal Module state" not in text
        assert "&lt;class " not in re.sub(r'(?s)<div class="pdoc-code.*?</pre>', "", text)
    assert not described(pages["pyrnnfast/functional"]) & {"call", "plain", "NO_EXTRAS"}


# What works where ----------------------------------------------------------------------------------------------------


def test_the_tables_are_what_the_script_writes() -> None:
    before = (DOCS / "coming_from_torch.md").read_text()
    result = run(DOCS / "coming_from_torch.py", "--check")
    assert result.returncode == 0, f"run docs/coming_from_torch.py\n{result.stdout}{result.stderr}"
    assert (DOCS / "coming_from_torch.md").read_text() == before


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    sys.path.insert(0, str(DOCS))
    yield importlib.import_module("coming_from_torch")
    sys.path.remove(str(DOCS))


ANSWERS = {
    "nothing": (lambda s: None, "yes"),
    "a measurement": (lambda s: "bfloat16", "bfloat16"),
    "wrong numbers": (lambda s: same_as(s, 0.0, 1.0), "no: wrong numbers"),
    "other shapes": (lambda s: same_as(s, [0.0], 0.0), "no: wrong numbers"),
    "an error": (lambda s: int("seven | eight"), "no: `ValueError: invalid literal for int() with …`"),
    "few words": (lambda s: [].pop(), "no: `IndexError: pop from empty list`"),
    "a bar": (lambda s: {}["a|b"], "no: `KeyError: 'a/b'`"),
    "a slow way": (lambda s: warnings.warn("There is a performance drop", stacklevel=1), "yes, slowly"),
}


def same_as(subject: Any, found: object, expected: object) -> None:
    sys.modules["coming_from_torch"].same(torch.tensor(found), torch.tensor(expected))


@pytest.mark.parametrize(("code", "expected"), ANSWERS.values(), ids=ANSWERS.keys())
def test_answers(code: Callable[[Any], Any], expected: str, script: ModuleType) -> None:
    assert script.answer(script.Row("", "", ("GRU",), code), script.Subject(torch.nn, "GRU")) == expected


def test_answers_are_told_apart_by_class(script: ModuleType) -> None:
    assert script.summary({"RNN": "yes", "GRU": "yes", "LSTM": "yes"}) == "yes"
    assert script.summary({"RNN": "yes", "GRU": "no: x", "LSTM": "yes"}) == "RNN, LSTM: yes; GRU: no: x"


def test_the_examples_of_the_page_run() -> None:
    blocks = re.findall(r"(?s)```python\n(.*?)```", (DOCS / "coming_from_torch.md").read_text())
    assert len(blocks) > 5
    result = run("-c", "\n".join(blocks))
    assert result.returncode == 0, result.stderr
    assert result.stdout == "fused: served by pyrnnfast._cpu\n"
