"""Models on disk: one safetensors file, written whole or not at all, checked when read, without pickle.

The tensors and, in the file's header, the settings and vocabularies as JSON are one file, so no interrupted save can
mix two models. ``model.json`` beside it is the same JSON for people; nothing reads it.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import UserError
from .extras import extra
from .model import ModelSettings, Seq2Seq
from .translator import Translator
from .vocabulary import Vocabulary

with extra():
    import safetensors
    import safetensors.torch

MODEL_FILE = "model.safetensors"
DESCRIPTION_FILE = "model.json"
FORMAT = "pyrnnfast-seq2seq-1"
HEADER = "pyrnnfast"  # one entry only: safetensors writes several in any order, and equal models should be equal files


class ModelFolderError(UserError, ValueError):
    """A folder that holds no model, or a damaged one, or another program's."""


def write_whole(path: Path, content: bytes) -> None:
    """Write a file such that, whatever happens, either the old content or the new stands there, whole.

    Raises:
        OSError: the content could not be written; what stood there before is untouched.
    """
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)  # mkstemp's files are for their owner alone
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name itself
    finally:
        os.close(folder)


def write_json(path: Path, content: Any) -> None:
    """Write JSON for people, by :func:`write_whole`."""
    write_whole(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def _digest(description: object, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over the description and every tensor: safetensors itself notices a wrong length, not a wrong bit."""
    digest = hashlib.sha256(json.dumps(description).encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def save(translator: Translator, folder: Path) -> None:
    """Save a model with all that :func:`load` needs; makes the folder.

    Raises:
        OSError: it could not be written (a full disk, no permission); a model saved there before is still whole.
    """
    description = {
        "settings": asdict(translator.model.settings),
        "source": translator.source.symbols,
        "target": translator.target.symbols,
        "max_length": translator.max_length,
    }
    tensors = {name: tensor.detach().cpu() for name, tensor in translator.model.state_dict().items()}
    header = {"format": FORMAT, "description": description, "sha256": _digest(description, tensors)}
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / MODEL_FILE, safetensors.torch.save(tensors, {HEADER: json.dumps(header)}))
    write_json(folder / DESCRIPTION_FILE, description)


def load(folder: Path) -> Translator:
    """Load what :func:`save` wrote, onto the CPU, in evaluation mode.

    Raises:
        ModelFolderError: no model is there, or it is damaged, or another program's.
    """
    path = folder / MODEL_FILE
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(HEADER)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is no mapping)
    except OSError as error:
        raise ModelFolderError(f"{folder}: no model can be read there ({error.strerror or error})") from error
    except safetensors.SafetensorError as error:
        raise ModelFolderError(f"{path}: damaged, or not a safetensors file ({error})") from error
    if text is None:
        raise ModelFolderError(f"{path}: not a model of pyrnnfast.seq2seq")
    try:
        header = json.loads(text)
        if header["format"] != FORMAT:
            raise ModelFolderError(f"{path}: of another format, {header['format']!r} and not {FORMAT!r}")
        description = header["description"]
        if header["sha256"] != _digest(description, tensors):
            raise ModelFolderError(f"{path}: damaged, the checksum does not match the content")
        # Only a file that somebody made by hand can be wrong from here on.
        with torch.device("meta"):  # no memory for sizes that the tensors do not bear out
            model = Seq2Seq(ModelSettings(**description["settings"]))
        if any(tensor.dtype != torch.float32 for tensor in tensors.values()):
            raise ValueError("its tensors are not float32")
        model.load_state_dict(tensors, assign=True)
        source, target = Vocabulary(description["source"]), Vocabulary(description["target"])
        return Translator(model.eval(), source, target, description["max_length"])
    except ModelFolderError:
        raise
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ModelFolderError(f"{path}: settings and tensors do not make a model: {error}") from error
