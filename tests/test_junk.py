"""Junk given straight to the functions of ``_cpu``: an exception each time, and the next call is right.

A crash would take the test run with it, so all of it happens in child processes: this file, run as a program.
"""

import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pyrnnfast import _cpu

CELLS = {"rnn_tanh": (1, 0, 1), "rnn_relu": (1, 0, 1), "gru": (3, 4, 4), "lstm": (4, 4, 4)}
DTYPES = (torch.float32, torch.float64)
T, B, H = 4, 5, 9

Arguments = dict[str, Any]


def valid(function: str, cell: str, packed: bool, dtype: torch.dtype = torch.float32) -> Arguments:
    """The arguments of a call that is in order, all optional operands given."""
    gates, saved, dgates = CELLS[cell]
    generator = torch.Generator().manual_seed(0)
    sizes = (5, 4, 4, 1) if packed else (B,) * T
    rows = sum(sizes)

    def tensor(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    lstm, gru = cell == "lstm", cell == "gru"
    common: Arguments = {"cell": cell}
    tail: Arguments = {"batch_sizes": torch.tensor(sizes) if packed else None, "reverse": packed, "threads": 1}
    if function == "forward":
        # Dense input comes as gates, packed input as it is.
        return common | {
            "xgates": None if packed else tensor(rows, gates * H),
            "x": tensor(rows, 3) if packed else None,
            "weight_ih": tensor(gates * H, 3) if packed else None,
            "bias": tensor(1, gates * H) if packed else None,
            "weight_hh": tensor(gates * H, H),
            "bias_hn": tensor(1, H) if gru else None,
            "hgates": tensor(B, gates * H),
            "h0": tensor(B, H),
            "c0": tensor(B, H) if lstm else None,
            "y": tensor(rows, H),
            "h_n": tensor(B, H),
            "c_n": tensor(B, H) if lstm else None,
            "saved": tensor(rows, saved * H) if saved else None,
            "cells": tensor(rows, H) if lstm else None,
        } | tail  # fmt: skip
    return common | {
        "batch": B,
        "y": tensor(rows, H),
        "saved": tensor(rows, saved * H) if saved else None,
        "cells": tensor(rows, H) if lstm else None,
        "weight_hh": tensor(gates * H, H),
        "h0": tensor(B, H),
        "c0": tensor(B, H) if lstm else None,
        "grad_y": tensor(rows, H),
        "grad_h_n": tensor(B, H),
        "grad_c_n": tensor(B, H) if lstm else None,
        "dgates": tensor(rows, dgates * H),
        "carry": tensor(B, H) if lstm or gru else None,
    } | tail  # fmt: skip


# Operands that the kernels can do without.
OPTIONAL = {"bias", "bias_hn", "hgates", "h0", "c0", "saved", "cells", "grad_y", "grad_h_n", "grad_c_n", "batch_sizes"}
EVERY = [(f, c, p) for f in ("forward", "backward") for c in CELLS for p in (False, True)]


def call(function: str, arguments: Arguments) -> None:
    getattr(_cpu, function)(**arguments)


def fingerprint(function: str, cell: str, packed: bool) -> list[Tensor]:
    arguments = valid(function, cell, packed)
    call(function, arguments)
    return [t for t in arguments.values() if isinstance(t, Tensor)]


class Duck:
    """Looks like a tensor to those who ask its attributes."""

    shape, dtype, device, is_contiguous = (20, 36), torch.float32, torch.device("cpu"), True

    def data_ptr(self) -> int:
        return 8


class FalseCapsule:
    __dlpack_c_exchange_api__ = 42


def resized_to_nothing(t: Tensor) -> Tensor:
    t = t.clone()
    t.untyped_storage().resize_(0)
    return t


# Replacements of a tensor operand that no call may accept.
BAD_TENSORS: dict[str, Any] = {
    "int": lambda t: 3,
    "float": lambda t: 1.5,
    "text": lambda t: "x",
    "bytes": lambda t: b"x" * 1000,
    "list": lambda t: t.tolist(),
    "tuple": lambda t: (t,),
    "array": lambda t: np.ones(tuple(t.shape), dtype=np.float32),
    "type": lambda t: Tensor,
    "duck": lambda t: Duck(),
    "false_capsule": lambda t: FalseCapsule(),
    "object": lambda t: object(),
    "float16": lambda t: t.half(),
    "bfloat16": lambda t: t.bfloat16(),
    "complex": lambda t: t.to(torch.complex64),
    "bool": lambda t: t.bool(),
    "int32": lambda t: t.int(),
    "meta": lambda t: torch.empty_like(t, device="meta"),
    "sparse": lambda t: t.to_sparse(),
    "scalar": lambda t: t.flatten()[0],
    "3D": lambda t: t.unsqueeze(0),
    "6D": lambda t: t[None, None, None, None],
    "empty": lambda t: t[:0],
    "no_columns": lambda t: t[..., :0],
    "more_rows": lambda t: torch.cat([t, t]),
    "fewer_rows": lambda t: t[:-1],
    "fewer_columns": lambda t: t[..., :-1].contiguous(),
    "giant_rows": lambda t: t.flatten()[:1].expand(2**40, *t.shape[1:]),
    "giant_columns": lambda t: t.flatten()[:1].expand(*t.shape[:-1], 2**62 // max(len(t), 1)),
    "no_storage": resized_to_nothing,
    "named_function": lambda t: print,
}
# And those that only hold for matrices of floating-point numbers.
BAD_MATRICES: dict[str, Any] = {
    "other_dtype": lambda t: t.double() if t.dtype == torch.float32 else t.float(),
    "int64": lambda t: t.long(),
    "1D": lambda t: t.flatten() if len(t) > 1 else t[0, 1:],
    "transposed": lambda t: t.t().contiguous().t() if len(t) > 1 else t.repeat(1, 2)[:, ::2],
    "column_stride": lambda t: torch.stack([t, t], -1).flatten(1)[:, ::2],
    "expanded_columns": lambda t: t[:, :1].expand(t.shape),
    "expanded_rows": lambda t: t[:1].expand(t.shape) if len(t) > 1 else None,
    "overlapping_rows": lambda t: t.as_strided(t.shape, (t.shape[1] - 1, 1)) if len(t) > 1 else None,
}
BAD_OTHERS: dict[str, list[Any]] = {
    "cell": ["", "LSTM", "lstm\0", "x" * 10_000, None, 3, b"\xff", ["lstm"]],
    "batch": [0, -1, B + 1, 2**62, 2**63, -(2**63), 1.5, "5", None, [5]],
    "threads": [0, -1, 10**9, 2**31, 2**63, 2**100, 1.5, "2", None],
    "reverse": ["yes", [1], torch.ones(3)],
    "batch_sizes": [
        torch.tensor([9, 9, 9, 9, 9]), torch.tensor([-5, 5]), torch.tensor([0, 0]), torch.tensor([1, 2, 3]),
        torch.tensor([2**62, 2**62]), torch.tensor([2**63 - 1]), torch.tensor([-(2**63)]), torch.tensor([5, 5, 5]),
        torch.tensor([5.0, 4.0]), torch.tensor(5), torch.ones(0, dtype=torch.int64),
        torch.ones(2, 2, dtype=torch.int64),
        torch.ones(1, dtype=torch.int64).expand(2**40), torch.ones(3, dtype=torch.int64, device="meta"),
        torch.tensor([5, 4, 4, 1], dtype=torch.int32), [5, 4, 4, 1], (5,), 5, "5", np.array([5, 4, 4, 1]),
    ],
}  # fmt: skip


def refused(function: str, arguments: Arguments, what: str) -> None:
    """Runs a call that must raise TypeError or ValueError, with a text."""
    try:
        call(function, arguments)
    except (TypeError, ValueError) as error:
        assert str(error), what
        return
    raise AssertionError(f"{what} was accepted")


def single_faults() -> int:
    """One bad argument at a time; each time a valid call follows."""
    count = 0
    for function, cell, packed in EVERY:
        expected = fingerprint(function, cell, packed)
        good = valid(function, cell, packed)
        for name, value in good.items():
            label = f"{function} {cell} {'packed' if packed else 'dense'} {name}"
            faults: dict[str, Any] = {}
            if isinstance(value, Tensor) and name != "batch_sizes":
                makers = BAD_TENSORS | BAD_MATRICES
                made = {kind: make(value.clone()) for kind, make in makers.items()}
                faults = {kind: v for kind, v in made.items() if v is not None}
                if len(value) == 1:  # a bias may have one dimension
                    faults = {k: v for k, v in faults.items() if k not in ("overlapping_rows", "expanded_rows")}
                if name not in OPTIONAL:
                    faults["none"] = None
            elif value is None and name != "batch_sizes":
                faults["unasked"] = torch.randn(B, H)
            else:
                faults = {repr(bad)[:40]: bad for bad in BAD_OTHERS[name]}
            for kind, bad in faults.items():
                refused(function, good | {name: bad}, f"{label} {kind}")
                count += 1
        for missing in good:
            rest = {name: v for name, v in good.items() if name != missing}
            refused(function, rest, f"{function} {cell} without {missing}")
            count += 1
        refused(function, good | {"unknown": 1}, "an unknown argument")
        assert all(torch.equal(a, b) for a, b in zip(fingerprint(function, cell, packed), expected, strict=True))
    return count


def mutate(rng: random.Random, arguments: Arguments) -> None:
    """Changes one argument for something that may or may not be in order, but never lies about its memory."""
    name = rng.choice(list(arguments))
    value = arguments[name]
    choice = rng.randrange(10)
    if name in BAD_OTHERS and rng.random() < 0.5:
        arguments[name] = rng.choice(BAD_OTHERS[name])
    elif isinstance(value, Tensor) and choice < 6:
        shape = [rng.choice((0, 1, 2, 3, B, H, 4 * H, *((n, n - 1, n + 1) if n < 1000 else ()))) for n in value.shape]
        rng.random() < 0.2 and shape.append(rng.choice((0, 1, 2)))
        rng.random() < 0.1 and shape.pop()
        dtype = rng.choice((value.dtype,) * 8 + (torch.float32, torch.float64, torch.int64, torch.int8))
        arguments[name] = torch.zeros([max(n, 0) for n in shape], dtype=dtype)
    elif isinstance(value, Tensor) and choice == 6:
        # Without memory it is only ever the single fault: the text of a TypeError prints all arguments, and torch
        # crashes when such a tensor is printed.
        kinds = {k: make for k, make in (BAD_TENSORS | BAD_MATRICES).items() if k != "no_storage"}
        made = rng.choice(list(kinds.values()))
        if value.dim() == 2 and value.dtype in DTYPES and 0 < value.numel() < 10_000:
            arguments[name] = made(value)
    elif choice == 7:
        arguments[name] = rng.choice((None, 0, 1, -1, 2**64, "", object(), torch.ones(2), torch.ones(2, 2)))
    elif choice == 8:
        arguments[name] = arguments[rng.choice(list(arguments))]  # operands that are one and the same
    else:
        arguments.pop(name)


def mutations(seed: int, count: int) -> tuple[int, int]:
    """Random changes of valid calls; every so often a valid call in between."""
    rng = random.Random(seed)
    accepted = refused_count = 0
    expected = {key: fingerprint(*key) for key in EVERY}
    for k in range(count):
        function, cell, packed = rng.choice(EVERY)
        arguments = valid(function, cell, packed, rng.choice(DTYPES))
        for _ in range(rng.choice((1, 1, 2, 5))):
            if arguments:
                mutate(rng, arguments)
        if rng.random() < 0.1:
            arguments["cell"] = rng.choice(list(CELLS))
        try:
            call(function, arguments)
            accepted += 1
        except (TypeError, ValueError) as error:
            assert str(error)
            refused_count += 1
        if k % 50 == 0:
            key = rng.choice(EVERY)
            found = fingerprint(*key)
            assert all(torch.equal(a, b) for a, b in zip(found, expected[key], strict=True)), key
    return accepted, refused_count


def other_functions() -> int:
    """check_batch_sizes, select_instruction_set, activation."""
    bad: list[tuple[Any, ...]] = [
        (_cpu.check_batch_sizes, None, 3),
        (_cpu.check_batch_sizes, [1], 1),
        (_cpu.check_batch_sizes, torch.tensor([1]), -1),
        (_cpu.check_batch_sizes, torch.tensor([1]), 2**63),
        (_cpu.check_batch_sizes, torch.tensor([1]), "1"),
        (_cpu.check_batch_sizes, torch.tensor([2]), 1),
        (_cpu.select_instruction_set, "none"),
        (_cpu.select_instruction_set, None),
        (_cpu.select_instruction_set, 3),
        (_cpu.activation, "tanh", None, None),
        (_cpu.activation, "tanh", np.ones(3), np.ones(3)),
        (_cpu.activation, "tanh", torch.ones(3), resized_to_nothing(torch.ones(3))),
        (_cpu.activation, None, torch.ones(3), torch.ones(3)),
    ]
    for function, *args in bad:
        try:
            function(*args)
        except (TypeError, ValueError) as error:
            assert str(error)
            continue
        raise AssertionError(f"{function.__name__}{args} was accepted")
    return len(bad)


def run_as_program(what: str, *args: int) -> str:
    result = subprocess.run(
        [sys.executable, "-X", "faulthandler", str(Path(__file__)), what, *map(str, args)],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, f"exit status {result.returncode}\n{result.stderr[-3000:]}"
    return result.stdout


def test_one_fault_at_a_time() -> None:
    assert int(run_as_program("single_faults")) > 3000


def test_thousands_of_mutations() -> None:
    accepted, refused_count = map(int, run_as_program("mutations", 1, 6000).split())
    assert accepted > 50, "the changes are too coarse to pass the door at all"
    assert refused_count > 3000


def wrong_type_beside_no_memory() -> int:
    """The text of a TypeError must not print the operands: torch crashes when it prints one without memory."""
    arguments = valid("forward", "lstm", False)
    bad = arguments | {"y": resized_to_nothing(arguments["y"])}
    refused("forward", bad | {"cell": 3}, "a number for the cell")
    refused("forward", bad | {"threads": "2"}, "a text for the threads")
    refused("forward", {name: v for name, v in bad.items() if name != "h_n"}, "no h_n")
    return 3


def test_wrong_type_beside_a_tensor_without_memory() -> None:
    assert int(run_as_program("wrong_type_beside_no_memory")) == 3


def test_other_functions() -> None:
    assert int(run_as_program("other_functions")) > 10


@pytest.mark.parametrize(("function", "cell", "packed"), EVERY, ids=str)
def test_the_valid_calls_are_valid(function: str, cell: str, packed: bool) -> None:
    """Else everything above would be refused for a reason of no interest."""
    assert all(t.isfinite().all() for t in fingerprint(function, cell, packed))
    arguments = valid(function, cell, packed)
    required = {name: None if name in OPTIONAL - {"saved", "cells"} else v for name, v in arguments.items()}
    if not packed:
        call(function, required)


if __name__ == "__main__":
    counts = globals()[sys.argv[1]](*map(int, sys.argv[2:]))
    print(*(counts if isinstance(counts, tuple) else (counts,)))
