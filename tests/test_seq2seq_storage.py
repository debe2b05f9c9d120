"""Models on disk: there and back, every kind of damage, and saves that fail."""

import errno
import json
import os
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import safetensors.torch
import torch

from pyrnnfast.seq2seq import ModelSettings, Seq2Seq, Vocabulary, storage
from pyrnnfast.seq2seq.storage import DESCRIPTION_FILE, MODEL_FILE, ModelFolderError
from pyrnnfast.seq2seq.translator import Translator


def build(seed: int = 0) -> Translator:
    torch.manual_seed(seed)
    source, target = Vocabulary("abcé"), Vocabulary(["AH", "B"])
    settings = ModelSettings(len(source), len(target), embedding_size=3, hidden_size=4, encoder_hidden_size=2)
    return Translator(Seq2Seq(settings), source, target, 12)


def same(a: Translator, b: Translator) -> bool:
    weights = zip(a.model.state_dict().items(), b.model.state_dict().items(), strict=True)
    return (
        (a.source, a.target, a.max_length, a.model.settings) == (b.source, b.target, b.max_length, b.model.settings)
    ) and all(name == other and torch.equal(tensor, twin) for (name, tensor), (other, twin) in weights)


def test_there_and_back(tmp_path: Path) -> None:
    saved = build()
    storage.save(saved, tmp_path / "new" / "folder")
    loaded = storage.load(tmp_path / "new" / "folder")
    assert same(saved, loaded)
    assert not loaded.model.training
    assert loaded.translate(["cab", "é"])[0].symbols == saved.translate(["cab"])[0].symbols


def test_a_loaded_model_can_learn(tmp_path: Path) -> None:
    storage.save(build(), tmp_path)
    model = storage.load(tmp_path).model.train()
    model(torch.tensor([[3, 4]]), torch.tensor([2]), torch.tensor([[3, 2]])).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_equal_models_are_equal_files(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        storage.save(build(), tmp_path / folder)
    assert (tmp_path / "a" / MODEL_FILE).read_bytes() == (tmp_path / "b" / MODEL_FILE).read_bytes()


def test_what_is_written(tmp_path: Path) -> None:
    storage.save(build(), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [DESCRIPTION_FILE, MODEL_FILE]
    description = json.loads((tmp_path / DESCRIPTION_FILE).read_text())
    assert description["source"] == ["a", "b", "c", "é"]
    assert description["settings"]["hidden_size"] == 4
    assert (tmp_path / MODEL_FILE).stat().st_mode & 0o777 == 0o644


# Damage


def test_no_model_there(tmp_path: Path) -> None:
    with pytest.raises(ModelFolderError, match="no model can be read there"):
        storage.load(tmp_path / "nowhere")
    with pytest.raises(ModelFolderError, match="no model can be read there"):
        storage.load(tmp_path)
    (tmp_path / MODEL_FILE).mkdir()
    with pytest.raises(ModelFolderError):
        storage.load(tmp_path)


def test_truncation_at_any_length(tmp_path: Path) -> None:
    storage.save(build(), tmp_path)
    content = (tmp_path / MODEL_FILE).read_bytes()
    for length in [*range(0, len(content), len(content) // 40), len(content) - 1]:
        (tmp_path / MODEL_FILE).write_bytes(content[:length])
        with pytest.raises(ModelFolderError):
            storage.load(tmp_path)
    (tmp_path / MODEL_FILE).write_bytes(content + b"\0")
    with pytest.raises(ModelFolderError):
        storage.load(tmp_path)


def test_a_flipped_bit_anywhere(tmp_path: Path) -> None:
    saved = build()
    storage.save(saved, tmp_path)
    content = (tmp_path / MODEL_FILE).read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    refused = 0
    places = [*range(0, header, 3), *range(header, len(content), 61)]
    for place in places:
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        (tmp_path / MODEL_FILE).write_bytes(damaged)
        try:
            loaded = storage.load(tmp_path)
        except ModelFolderError:
            refused += 1
        else:  # some bits say nothing, such as those of the spaces that fill up the header
            assert place < header
            assert same(saved, loaded)
    assert refused > 0.98 * len(places)


@pytest.mark.parametrize(
    "content",
    [b"", b"{}", b"PK\x03\x04" + b"\0" * 100, b"\xff" * 64, safetensors.torch.save({"a": torch.zeros(2)})]
    + [safetensors.torch.save({"a": torch.zeros(2)}, {storage.HEADER: text}) for text in ("{", "[]", '{"format": 2}')],
    ids=["empty", "json", "zip", "ones", "another program", "no json", "a list", "another format"],
)
def test_foreign_files(tmp_path: Path, content: bytes) -> None:
    (tmp_path / MODEL_FILE).write_bytes(content)
    with pytest.raises(ModelFolderError):
        storage.load(tmp_path)


def remade(translator: Translator, change: Callable[[dict[str, object], dict[str, torch.Tensor]], None]) -> bytes:
    """A file by another hand: consistent in itself, with a right checksum, but changed."""
    description: dict[str, object] = {
        "settings": {**vars(translator.model.settings)},
        "source": list(translator.source.symbols),
        "target": list(translator.target.symbols),
        "max_length": translator.max_length,
    }
    tensors = dict(translator.model.state_dict())
    change(description, tensors)
    header = {"format": storage.FORMAT, "description": description, "sha256": storage._digest(description, tensors)}
    return safetensors.torch.save(tensors, {storage.HEADER: json.dumps(header)})


CHANGES: dict[str, Callable[[dict, dict], object]] = {  # type: ignore[type-arg]
    "another size": lambda d, t: d["settings"].update(hidden_size=5),
    "an absurd size": lambda d, t: d["settings"].update(hidden_size=10**9),
    "a size that is no number": lambda d, t: d["settings"].update(hidden_size="4"),
    "a setting too many": lambda d, t: d["settings"].update(depth=3),
    "settings that are a list": lambda d, t: d.update(settings=[1, 2]),
    "no settings": lambda d, t: d.pop("settings"),
    "another vocabulary": lambda d, t: d.update(source=["a"]),
    "a symbol twice": lambda d, t: d.update(source=["a", "a", "b", "c"]),
    "symbols that are numbers": lambda d, t: d.update(source=[[1], [2], [3], [4]]),
    "no limit": lambda d, t: d.update(max_length=0),
    "a tensor too few": lambda d, t: t.pop("decoder.bridge.weight"),
    "a tensor too many": lambda d, t: t.update(extra=torch.zeros(1)),
    "another type": lambda d, t: t.update({"decoder.bridge.bias": t["decoder.bridge.bias"].half()}),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_settings_and_tensors_that_do_not_fit(tmp_path: Path, change: Callable[..., None]) -> None:
    (tmp_path / MODEL_FILE).write_bytes(remade(build(), lambda d, t: None))
    assert same(storage.load(tmp_path), build())
    (tmp_path / MODEL_FILE).write_bytes(remade(build(), change))
    with pytest.raises(ModelFolderError, match="do not make a model"):
        storage.load(tmp_path)


# Saves that fail


def full(*arguments: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@contextmanager
def full_disk_by_fsync(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        yield


@contextmanager
def full_disk_by_rename(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        yield


@contextmanager
def full_disk_by_limit(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The kernel itself refuses to write more: as far into the file as on a disk that fills up."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("full_disk", [full_disk_by_fsync, full_disk_by_rename, full_disk_by_limit])
def test_a_full_disk_leaves_the_last_model_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full_disk: Callable[..., Iterator[None]]
) -> None:
    storage.save(build(0), tmp_path)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with full_disk(monkeypatch), pytest.raises(OSError, match=r"No space left|File too large"):  # type: ignore[attr-defined]
        storage.save(build(1), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files
    assert same(storage.load(tmp_path), build(0))
    storage.save(build(1), tmp_path)  # and there is room again
    assert same(storage.load(tmp_path), build(1))


def test_a_save_that_dies_between_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.save(build(0), tmp_path)

    def die(path: Path, content: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(storage, "write_json", die)
    with pytest.raises(KeyboardInterrupt):
        storage.save(build(1), tmp_path)
    assert same(storage.load(tmp_path), build(1))  # one file is the model


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"Not a directory|File exists"):
        storage.save(build(), tmp_path / "file")
