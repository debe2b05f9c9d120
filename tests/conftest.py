"""Every test starts from, and leaves behind, the same state of torch and of the kernels."""

import os
from collections.abc import Iterator

import hypothesis
import pytest
import torch
from kernels import THRESHOLDS

from pyrnnfast import _cpu

hypothesis.settings.register_profile("default", deadline=None, derandomize=True, max_examples=200, database=None)
hypothesis.settings.register_profile("thorough", deadline=None, max_examples=5000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


@pytest.fixture(autouse=True)
def _same_state() -> Iterator[None]:
    threads, instruction_set = torch.get_num_threads(), _cpu.instruction_set()
    # The cases are small, and waking a team for each of torch's operators would take most of the time.
    torch.set_num_threads(1)
    torch.manual_seed(0)
    _cpu.set_threshold("processors", 16)  # more threads than there are cores are a test, too
    yield
    torch.set_num_threads(threads)
    _cpu.select_instruction_set(instruction_set)
    for name in THRESHOLDS:
        _cpu.set_threshold(name, -1)


@pytest.fixture(params=_cpu.instruction_sets())
def instruction_set(request: pytest.FixtureRequest) -> str:
    """Each instruction set that this machine has, in use."""
    name: str = request.param
    _cpu.select_instruction_set(name)
    return name
