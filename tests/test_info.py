"""What ``pyrnnfast.info()`` and ``pyrnnfast info`` tell."""

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from stand_in import Fake, install
from test_choices import record, row, table

import pyrnnfast
from pyrnnfast import _cpu, cli, cuda
from pyrnnfast.choices import Table


def test_the_cpu() -> None:
    torch.set_num_threads(2)
    found = pyrnnfast.info()
    assert found.version == pyrnnfast.__version__
    assert found.torch_version == torch.__version__
    assert list(found.instruction_sets) == _cpu.instruction_sets()
    baseline = _cpu.instruction_sets()[-1]
    _cpu.select_instruction_set(baseline)
    assert pyrnnfast.info().instruction_set == baseline
    assert f"CPU: {baseline} in use, of " in str(pyrnnfast.info())
    assert "; 2 thread(s) on 16 processor(s)\n" in str(found)
    _cpu.set_threshold("processors", -1)
    assert 1 <= pyrnnfast.info().processors <= len(os.sched_getaffinity(0))
    assert str(found).startswith(f"pyrnnfast {pyrnnfast.__version__}, torch {torch.__version__}\n")


def test_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "load", lambda: cuda.Loaded(reason="this build has none"))
    monkeypatch.setattr(cuda, "table", lambda: Table([]))
    found = pyrnnfast.info()
    assert found.cuda_architectures is None
    assert found.cuda_toolkit is None
    assert found.cuda_devices == ()
    assert found.cuda_reason == "this build has none"
    assert "\nCUDA: this build has none\n" in str(found)
    assert "This version comes without one, and cuDNN serves CUDA tensors" in str(found)


def test_kernels_and_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "load", lambda: cuda.Loaded(Fake(), "80;90", (), "no CUDA device: no driver"))
    text = str(pyrnnfast.info())
    assert "\nCUDA: kernels for 80;90, built by CUDA 13.0\n" in text
    assert "\nCUDA: no CUDA device: no driver\n" in text


def test_a_card_and_its_record(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, Fake(), table(record(row(0.5)), record(tests_failed=7)))
    found = pyrnnfast.info()
    assert found.cuda_reason is None
    assert found.cuda_devices == ("Fake 90, compute capability 9.0",)
    assert found.cuda_records == ("Fake 90 (compute capability 9.0), commit abc1234: 100 tests passed",)
    assert found.cuda_refused == ("Fake 90 (compute capability 9.0), commit abc1234: 7 tests failed",)
    assert f"\nCUDA record: {found.cuda_records[0]}\n" in str(found)
    assert f"\nCUDA record, refused: {found.cuda_refused[0]}" in str(found)
    assert "comes without one" not in str(found)


def test_a_refused_record_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, Fake(), table(record(tests_failed=7)))
    assert "none that counts. None of them is green, and cuDNN serves CUDA tensors" in str(pyrnnfast.info())


def test_a_card_that_it_was_not_compiled_for(monkeypatch: pytest.MonkeyPatch) -> None:
    device = {"name": "Old", "major": 7, "minor": 5}
    monkeypatch.setattr(cuda, "load", lambda: cuda.Loaded(Fake(), "80;90", (device,)))
    assert "CUDA device: Old, compute capability 7.5, not compiled for" in str(pyrnnfast.info())


def test_the_path_that_is_asked_for() -> None:
    with cuda.use("step"):
        assert "\nCUDA: the path 'fused' is asked for\n" in str(pyrnnfast.info())
        assert pyrnnfast.info().cuda_path == "fused"


def test_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["pyrnnfast", "info"])
    cli.main()
    assert capsys.readouterr().out == f"{pyrnnfast.info()}\n"


@pytest.mark.parametrize("missing", ["typer", "lightning", "safetensors"])
def test_the_command_needs_no_extras(missing: str) -> None:
    code = f"import sys; sys.modules[{missing!r}] = None; sys.argv[1:] = ['info']; import pyrnnfast.cli as c; c.main()"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"pyrnnfast {pyrnnfast.__version__}, torch ")


def test_the_command_is_among_the_others() -> None:
    from pyrnnfast.seq2seq.commands import app

    names: list[Any] = [c.name or c.callback.__name__ for c in app.registered_commands if c.callback is not None]
    assert "info" in names
