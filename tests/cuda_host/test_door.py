"""What the CUDA path's ``forward`` and ``backward`` refuse; nothing crashes.

The faults and their random mixtures are those of tests/test_junk.py, put to this module instead of ``_cpu``. They run
in a child process, this file as a program, because a crash would take the test run with it.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # as pytest does it for the program too

import _emulation
import numpy as np
import pytest
import test_junk as junk
import torch
from emulated import NUMBERS, dense, run_forward
from kernels import Layer, Operands, backward_operands, forward_operands, tensors
from torch import Tensor

BAD_FORMS: list[Any] = ["", "Step", "step ", "persistent\0", "fused", "x" * 10_000, None, 3, b"step", ["step"]]
BAD_SWITCHES: list[Any] = [0, 1, None, "", "True", np.True_, torch.tensor(True)]


def call(function: str, arguments: Operands) -> None:
    getattr(_emulation, function)(**arguments)


def valid(function: str, cell: str, kind: str, dtype: torch.dtype = torch.float32) -> Operands:
    """By the step form where there is no other, else by the persistent form."""
    form = "step" if dtype is torch.float64 or kind == "step" else "persistent"
    how = {"form": form, "tf32": dtype is torch.float32}
    forward = forward_operands(cell, junk.LAYERS[kind], dtype)
    if function == "forward":
        del forward["threads"]
        return forward | how
    call("forward", {name: value for name, value in forward.items() if name != "threads"} | how)
    backward = backward_operands(forward)
    del backward["threads"]
    return backward | how


def fingerprint(function: str, cell: str, kind: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    arguments = valid(function, cell, kind, dtype)
    call(function, arguments)
    return tensors(arguments, (name for name in arguments if name not in ("cell", "form", "tf32")))


def as_program(what: str, *numbers: int) -> str:
    result = subprocess.run(
        [sys.executable, "-X", "faulthandler", __file__, what, *map(str, numbers)],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, f"exit status {result.returncode}\n{result.stderr[-3000:]}"
    return result.stdout


def test_one_fault_at_a_time() -> None:
    assert int(as_program("single_faults")) > 30_000


def test_thousands_of_mutations() -> None:
    accepted, refused = map(int, as_program("mutations", 1, 3_000).split())
    assert accepted > 30, "the changes are too coarse to pass the door at all"
    assert refused > 1_500


@pytest.mark.parametrize("dtype", [n.dtype for n in NUMBERS.values()], ids=str)
@pytest.mark.parametrize(("function", "cell", "kind"), junk.EVERY, ids=str)
def test_the_valid_calls_are_valid(function: str, cell: str, kind: str, dtype: torch.dtype) -> None:
    """Else everything above would be refused for a reason of no interest."""
    assert all(t.isfinite().all() for t in fingerprint(function, cell, kind, dtype).values())


NO_PLAN: dict[str, tuple[str, Layer, str]] = {
    "float64": ("float64", dense(3, 2, 5), "does not serve float64"),
    "float32": ("float32", dense(3, 2, 5), "TF32 alone"),
    "single step": ("tf32", dense(1, 2, 5), "a single step"),
    "many blocks": ("bfloat16", dense(2, 133 * 32, 5, inputs=1), "more blocks than multiprocessors"),
    "many units": ("bfloat16", dense(2, 1, 133 * 16, inputs=1), "more blocks than multiprocessors"),
}


@pytest.mark.parametrize("why", NO_PLAN)
def test_persistent_where_there_is_no_plan(why: str) -> None:
    numbers, layer, reason = NO_PLAN[why]
    with pytest.raises(ValueError, match=f"there is no persistent form of this: .*{reason}"):
        run_forward("rnn_tanh", layer, NUMBERS[numbers], "persistent")


@pytest.mark.parametrize("function", ["forward", "backward"])
@pytest.mark.parametrize("form", ["step", "persistent"])
def test_a_refused_call_writes_nothing(function: str, form: str) -> None:
    arguments = valid(function, "lstm", "packed") | {"form": form}
    names = [name for name in arguments if name not in ("cell", "form", "tf32")]
    before = {name: t.clone() for name, t in tensors(arguments, names).items()}
    with pytest.raises(ValueError, match="batch_sizes"):
        call(function, arguments | {"batch_sizes": torch.tensor([5, 4, 4, 2])})
    for name, t in tensors(arguments, names).items():
        # Results hold NaN until they are written.
        assert torch.equal(t.nan_to_num(9e9), before[name].nan_to_num(9e9)), name


@pytest.mark.parametrize("kind", junk.PROJECTED)
def test_projections_are_refused(kind: str) -> None:
    forward = forward_operands("lstm", junk.PROJECTED[kind], torch.float32)
    del forward["threads"]
    with pytest.raises(
        ValueError, match="five weights for each direction are for an LSTM with a projection on the CPU"
    ):
        call("forward", forward | {"form": "step", "tf32": False})


if __name__ == "__main__":
    junk.call, junk.valid, junk.fingerprint = call, valid, fingerprint
    junk.BAD_OTHERS |= {"form": BAD_FORMS, "tf32": BAD_SWITCHES}
    junk.EVERY_PROJECTED = []
    counts = getattr(junk, sys.argv[1])(*map(int, sys.argv[2:]))
    print(*(counts if isinstance(counts, tuple) else (counts,)))
