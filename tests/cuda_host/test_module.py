"""The module ``_cuda``, built for all architectures: what it says without a driver, and what ptxas made of it."""

import json
import re
import subprocess
import sys
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import _emulation
import pytest
from emulated import CELLS, device
from ptxas import Kernel, kernels

BUILD = Path(_emulation.__file__).parent
PASSES = ("Forward", "Backward")
DTYPES = ("Float32", "Float64", "Bfloat16", "Float16")
REGISTERS = 255  # that a thread may have
ROW_TILES = 3  # forms of the persistent kernel: 1, 2 and 4

PRELUDE = """
import importlib.util, json, sys, torch
spec = importlib.util.spec_from_file_location("pyrnnfast._cuda", sys.argv[1])
cuda = importlib.util.module_from_spec(spec)
spec.loader.exec_module(cuda)
def outcome(call, *arguments):
    try:
        return [None, call(*arguments)]
    except Exception as error:
        return [type(error).__name__, str(error)]
"""


def module() -> Path:
    found = list(BUILD.glob("_cuda*.so"))
    assert len(found) == 1, f"`make cuda-check` puts _cuda*.so beside _emulation; {BUILD} has {len(found)}"
    return found[0]


def in_child(code: str) -> Any:
    """What ``print(json.dumps(...))`` prints in a process that has loaded the module as ``cuda``."""
    command = [sys.executable, "-c", PRELUDE + code, str(module())]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout)


@cache
def facts() -> dict[str, Any]:
    found: dict[str, Any] = in_child(
        "shape = ['lstm', 'bfloat16', 9, 8, 7, 64, 2, False]\n"
        f"device = {device()!r}\n"
        "x, w = torch.ones(2, 3, 4), (torch.ones(5, 4), torch.ones(5, 5), None, None)\n"
        "y, h = torch.zeros(2, 3, 5), torch.zeros(1, 3, 5)\n"
        "print(json.dumps({\n"
        "  'cuda': torch.cuda.is_available(), 'devices': outcome(cuda.devices),\n"
        "  'architectures': cuda.architectures(), 'toolkit': cuda.toolkit(), 'name': cuda.__name__,\n"
        "  'plan': cuda.plan(device, True, *shape), 'delays': outcome(cuda.set_threshold, 'delays', 1),\n"
        "  'forward': outcome(cuda.forward, 'rnn_tanh', x, None, None, w, y, h, None, (), None, 'step', False),\n"
        "  'nothing': outcome(cuda.forward),\n"
        "}))"
    )
    return found


@pytest.fixture
def without_device() -> dict[str, Any]:
    if facts()["cuda"]:
        pytest.skip("this machine has a GPU; make gpu-check tests the module there")
    return facts()


def test_devices_fails_with_the_words_of_the_driver(without_device: dict[str, Any]) -> None:
    kind, text = without_device["devices"]
    assert kind == "RuntimeError"
    assert re.search(r"driver|no CUDA-capable device", text), text


def test_cpu_tensors_are_refused(without_device: dict[str, Any]) -> None:
    assert without_device["forward"] == ["ValueError", "x must be on a CUDA device"]
    assert without_device["nothing"][0] == "TypeError"


def test_plans_are_those_of_the_host() -> None:
    expected = _emulation.plan(device(), True, "lstm", "bfloat16", 9, 8, 7, 64, 2, False)
    assert facts()["plan"] == expected
    assert expected["form"] == "persistent"


def test_a_device_has_no_delays() -> None:
    kind, text = facts()["delays"]
    assert kind == "ValueError"
    assert "delays" in text


def test_the_toolkit_is_told() -> None:
    assert re.fullmatch(r"\d+\.\d+(\.\d+)?", facts()["toolkit"])


def architectures() -> list[str]:
    found = re.findall(r"(\d+[a-z]?)(?:\+PTX)?", facts()["architectures"])
    assert ";".join(found) in facts()["architectures"].replace("+PTX", "")
    return found


def test_all_architectures_that_the_compiler_knows() -> None:
    """From 80 on, and PTX of the newest for those to come."""
    known = subprocess.run([nvcc(), "--list-gpu-arch"], check=True, capture_output=True, text=True).stdout
    expected = sorted({int(n) for n in re.findall(r"compute_(\d+)\n", known)} - set(range(80)))
    assert len(expected) >= 5
    assert facts()["architectures"] == ";".join(map(str, expected)) + "+PTX"


def nvcc() -> str:
    cache_of_cmake = (BUILD / "CMakeCache.txt").read_text()
    found = re.search(r"^CMAKE_CUDA_COMPILER:\w+=(.+)$", cache_of_cmake, re.MULTILINE)
    assert found is not None
    return found[1]


# ptxas's account of every kernel -----------------------------------------------------------------------------------


@cache
def report(name: str) -> list[Kernel]:
    files = list(BUILD.glob(f"**/served_{name}*.ptxas"))
    assert len(files) == 1, f"{len(files)} reports of served_{name} in {BUILD}"
    return kernels(files[0].read_text())


SERVED = [f"{a}_{b}" for a, b in product(PASSES, DTYPES)]


@pytest.mark.parametrize("served", SERVED)
def test_every_kernel_is_there_for_every_architecture(served: str) -> None:
    """Else nothing would be wrong with those that are not."""
    of_each = len(CELLS) * ROW_TILES if not served.endswith("Float64") else 0
    for architecture in architectures():
        own = [k for k in report(served) if k.architecture == architecture]
        persistent = {k.name for k in own if k.persistent}
        assert len(persistent) == of_each, (architecture, persistent)
        # A step of each cell, copies and the like.
        assert len({k.name for k in own} - persistent) > len(CELLS)
    assert {k.architecture for k in report(served)} == set(architectures())


@pytest.mark.parametrize("served", SERVED)
def test_no_kernel_spills(served: str) -> None:
    """Nor keeps arrays in memory that were meant for registers, which shows as a stack."""
    bad = [str(k) for k in report(served) if k.stack or k.spill_stores or k.spill_loads or k.registers > REGISTERS]
    assert not bad, "\n".join(bad)


REPORT = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z5sweepPfi' for 'sm_80'
ptxas info    : Function properties for _Z5sweepPfi
    1216 bytes stack frame, 32 bytes spill stores, 16 bytes spill loads
ptxas info    : Used 255 registers, used 0 barriers, 1216 bytes cumulative stack size, 364 bytes cmem[0]
ptxas info    : Compile time = 73.022 ms
ptxas info    : Compiling entry function '_Z3oneIL3EEvPfi' for 'sm_120'
ptxas info    : Function properties for _Z3oneIL3EEvPfi
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 30 registers, used 0 barriers
ptxas info    : Compile time = 3.285 ms
"""


def test_the_report_is_read() -> None:
    """As nvcc 13.0 writes it."""
    assert kernels(REPORT) == [
        Kernel("_Z5sweepPfi", "80", registers=255, stack=1216, spill_stores=32, spill_loads=16),
        Kernel("_Z3oneIL3EEvPfi", "120", registers=30, stack=0, spill_stores=0, spill_loads=0),
    ]
    assert [k.persistent for k in kernels(REPORT)] == [True, False]
    with pytest.raises(ValueError, match="2 kernels in the report, but only 1"):
        kernels(REPORT.replace("spill stores", "spilt", 1))
