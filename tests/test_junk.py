"""Junk given straight to the functions of ``_cpu``: an exception each time, and the next call is right.

A crash would take the test run with it, so all of it happens in child processes: this file, run as a program.
"""

import math
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import CELLS
from kernels import Layer, Operands, backward_operands, forward_operands, tensors
from torch import Tensor

from pyrnnfast import _cpu

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
H = 9
LAYERS = {
    "dense": Layer((5,) * 4, H, inputs=3),
    "packed": Layer((5, 4, 4, 1), H, inputs=3, directions=2, packed=True),
    "both_ways": Layer((5,) * 4, H, inputs=3, directions=2),
    "step": Layer((5,), H, inputs=3, single_step=True),
}
DATA = {"x", "y", "grad_y", "grad_cells", "dx", "dgates"}
# Operands that the kernels can do without; and elements of tuples likewise.
OPTIONAL = {"h0", "c0", "grad_y", "grad_h_n", "grad_c_n", "grad_cells", "dx", "dh0", "dc0", "dgates"}
# On CUDA there are none of these.
PROJECTED = {
    "projected": Layer((5,) * 4, H, inputs=3, projected=4),
    "projected_both_ways": Layer((5, 4, 4, 1), H, inputs=3, directions=2, packed=True, projected=4),
}
EVERY = [(f, c, kind) for f in ("forward", "backward") for c in CELLS for kind in LAYERS]
EVERY_PROJECTED = [(f, "lstm", kind) for f in ("forward", "backward") for kind in PROJECTED]


def valid(function: str, cell: str, kind: str, dtype: torch.dtype = torch.float32) -> Operands:
    """The arguments of a call that is in order, all optional operands given."""
    operands = forward_operands(cell, (LAYERS | PROJECTED)[kind], dtype)
    if function == "forward":
        return operands
    call("forward", operands)
    return backward_operands(operands)


def optional(function: str, name: str, index: int, count: int) -> bool:
    """Whether a call can do without element `index` of the tuple `name`, of so many."""
    if name == "weights":
        return index % (5 if count % 5 == 0 else 4) in (2, 3)  # the biases
    return name == "dweights" or function == "forward"


def call(function: str, arguments: Operands) -> None:
    getattr(_cpu, function)(**arguments)


def fingerprint(function: str, cell: str, kind: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    arguments = valid(function, cell, kind, dtype)
    call(function, arguments)
    return tensors(arguments, (name for name in arguments if name not in ("cell", "threads")))


def assert_unchanged(expected: dict[str, Tensor], *key: Any) -> None:
    found = fingerprint(*key)
    assert found.keys() == expected.keys()
    assert all(torch.equal(t, expected[name]) for name, t in found.items()), key


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
    # Where the others are narrow the cells are float32, and have to be.
    "float16": lambda t: t.half() if t.dtype != torch.float16 else t.float(),
    "complex": lambda t: t.to(torch.complex64),
    "bool": lambda t: t.bool(),
    "int32": lambda t: t.int(),
    "int64": lambda t: t.long(),
    "float64": lambda t: t.double() if t.dtype != torch.float64 else t.float(),
    "bfloat16": lambda t: t.bfloat16() if t.dtype != torch.bfloat16 else t.float(),
    "meta": lambda t: torch.empty_like(t, device="meta"),
    "sparse": lambda t: t.to_sparse(),
    "scalar": lambda t: t.flatten()[0],
    "4D": lambda t: t[(None,) * (4 - t.dim())],
    "6D": lambda t: t[(None,) * (6 - t.dim())],
    "empty": lambda t: t[:0],
    "no_columns": lambda t: t[..., :0],
    "more_rows": lambda t: torch.cat([t, t]),
    "fewer_rows": lambda t: t[:-1],
    "more_columns": lambda t: torch.cat([t, t[..., :1]], -1),
    "fewer_columns": lambda t: t[..., :-1].contiguous(),
    "giant_rows": lambda t: t.flatten()[:1].expand(2**40, *t.shape[1:]),
    "giant_columns": lambda t: t.flatten()[:1].expand(*t.shape[:-1], 2**62 // math.prod(t.shape[:-1])),
    "no_storage": resized_to_nothing,
    "named_function": lambda t: print,
    "column_stride": lambda t: torch.stack([t, t], -1).flatten(-2)[..., ::2],
    "expanded_columns": lambda t: t[..., :1].expand(t.shape),
}
# And those that only hold where there are several rows.
BAD_MATRICES: dict[str, Any] = {
    "1D": lambda t: t.flatten(),
    "transposed": lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2),
    "expanded_rows": lambda t: t[..., :1, :].expand(t.shape),
    "overlapping_rows": lambda t: t.as_strided(
        t.shape, ((t.shape[-1] - 1) * t.shape[-2], t.shape[-1] - 1, 1)[-t.dim() :]
    ),
}
# Of several steps of data, or directions of states.
BAD_LEADS: dict[str, Any] = {
    "expanded_lead": lambda t: t[:1].expand(t.shape),
    "overlapping_leads": lambda t: t.as_strided(t.shape, (t.shape[2], t.shape[2], 1)),
}
BAD_OTHERS: dict[str, list[Any]] = {
    "cell": ["", "LSTM", "lstm\0", "x" * 10_000, None, 3, b"\xff", ["lstm"]],
    "threads": [0, -1, 10**9, 2**31, 2**63, 2**100, 1.5, "2", None],
    "batch_sizes": [
        torch.tensor([9, 9, 9, 9, 9]), torch.tensor([-5, 5]), torch.tensor([0, 0]), torch.tensor([1, 2, 3]),
        torch.tensor([2**62, 2**62]), torch.tensor([2**63 - 1]), torch.tensor([-(2**63)]), torch.tensor([5, 5, 5]),
        torch.tensor([5.0, 4.0]), torch.tensor(5), torch.ones(0, dtype=torch.int64),
        torch.ones(2, 2, dtype=torch.int64),
        torch.ones(1, dtype=torch.int64).expand(2**40), torch.ones(3, dtype=torch.int64, device="meta"),
        torch.tensor([5, 4, 4, 1], dtype=torch.int32), [5, 4, 4, 1], (5,), 5, "5", np.array([5, 4, 4, 1]),
    ],
}  # fmt: skip


def refused(function: str, arguments: Operands, what: str) -> None:
    """Runs a call that must raise TypeError or ValueError, with a text."""
    try:
        call(function, arguments)
    except (TypeError, ValueError) as error:
        assert str(error), what
        return
    raise AssertionError(f"{what} was accepted")


def bad_tensors(name: str, value: Tensor) -> Operands:
    """What may not stand in the place of this operand, or of this element of one."""
    makers = dict(BAD_TENSORS)
    if value.dim() > 1 and value.shape[-2] > 1:
        makers |= BAD_MATRICES
    if value.dim() == 3 and value.shape[0] > 1:
        makers |= BAD_LEADS
        if name in DATA:  # steps further apart than the rows of a step; directions may be
            makers["gaps"] = lambda t: torch.cat([t, t[:, :1]], 1)[:, :-1]
    return {kind: make(value.clone()) for kind, make in makers.items()}


def bad_tuples(function: str, name: str, value: tuple[Tensor | None, ...]) -> Operands:
    """What may not stand in the place of this tuple, its elements apart."""
    faults = {
        "none": None,
        "list": list(value),
        "tensor": torch.ones(2, H),
        "iterator": iter(value),
        "text": "weights",
        "nested": (value,),
        "one_less": value[:-1],
        "one_more": (*value, None),
        "twice": value * 2,
        "thrice": value * 3,
        "half": value[: len(value) // 2],
        "empty": (),
    }
    if name == "kept" and function == "forward":
        del faults["empty"]
    return faults


def faults_of(function: str, cell: str, good: Operands, name: str) -> Operands:
    value = good[name]
    if isinstance(value, tuple):
        faults = bad_tuples(function, name, value)
        for i, element in enumerate(value):
            if element is None:
                bad: Operands = {"unasked": torch.randn(LAYERS["dense"].rows, H)}
            else:
                bad = bad_tensors(name, element)
                if not optional(function, name, i, len(value)):
                    bad["none"] = None
            faults |= {f"[{i}] {kind}": (*value[:i], b, *value[i + 1 :]) for kind, b in bad.items()}
        return faults
    if name in BAD_OTHERS:
        return {repr(bad)[:40]: bad for bad in BAD_OTHERS[name]}
    if value is None:
        return {"unasked": torch.randn(5, H)}
    return bad_tensors(name, value) | ({} if name in OPTIONAL else {"none": None})


def single_faults() -> int:
    """One bad argument at a time; after those of each call a valid one."""
    count = 0
    for function, cell, kind in (*EVERY, *EVERY_PROJECTED):
        for dtype in (torch.float32, torch.bfloat16):
            expected = fingerprint(function, cell, kind, dtype)
            good = valid(function, cell, kind, dtype)
            for name in good:
                for fault, bad in faults_of(function, cell, good, name).items():
                    refused(function, good | {name: bad}, f"{function} {cell} {kind} {dtype} {name} {fault}")
                    count += 1
            for missing in good:
                rest = {name: v for name, v in good.items() if name != missing}
                refused(function, rest, f"{function} {cell} without {missing}")
                count += 1
            refused(function, good | {"unknown": 1}, "an unknown argument")
            assert_unchanged(expected, function, cell, kind, dtype)
    return count


def mutated_tensor(rng: random.Random, value: Tensor, name: str) -> Any:
    """Something that may or may not be in order, but never lies about its memory."""
    if rng.random() < 0.8:
        shape = [rng.choice((0, 1, 2, 3, 5, H, 4 * H, *((n, n - 1, n + 1) if n < 1000 else ()))) for n in value.shape]
        rng.random() < 0.2 and shape.append(rng.choice((0, 1, 2)))
        rng.random() < 0.1 and shape and shape.pop()
        dtype = rng.choice((value.dtype,) * 8 + (*DTYPES, torch.int64, torch.int8))
        return torch.zeros([max(n, 0) for n in shape], dtype=dtype)
    if not 1 <= value.dim() <= 3 or value.dtype not in DTYPES or not 0 < value.numel() < 10_000:
        return value
    # It may be one without values by now.
    return rng.choice(list(bad_tensors(name, torch.ones(value.shape, dtype=value.dtype)).values()))


def mutate(rng: random.Random, arguments: Operands) -> None:
    """Changes one argument, or an element of one."""
    name = rng.choice(list(arguments))
    value = arguments[name]
    others = (None, 0, 1, -1, 2**64, "", object(), torch.ones(2), torch.ones(2, 2), (), (None,) * 4)
    choice = rng.randrange(10)
    if name in BAD_OTHERS and rng.random() < 0.5:
        arguments[name] = rng.choice(BAD_OTHERS[name])
    elif isinstance(value, tuple) and value and choice < 8:
        i = rng.randrange(len(value))
        element = rng.choice((*others, *value))
        if choice < 6 and isinstance(value[i], Tensor):
            element = mutated_tensor(rng, value[i], name)
        arguments[name] = (*value[:i], element, *value[i + 1 :])
    elif isinstance(value, Tensor) and choice < 7:
        arguments[name] = mutated_tensor(rng, value, name)
    elif choice == 7:
        arguments[name] = rng.choice(others)
    elif choice == 8:
        arguments[name] = arguments[rng.choice(list(arguments))]  # operands that are one and the same
    else:
        arguments.pop(name)


def mutations(seed: int, count: int) -> tuple[int, int]:
    """Random changes of valid calls; every so often a valid call in between."""
    rng = random.Random(seed)
    accepted = refused_count = 0
    every = [*EVERY, *EVERY_PROJECTED]
    expected = {key: fingerprint(*key) for key in every}
    for k in range(count):
        function, cell, kind = rng.choice(every)
        arguments = valid(function, cell, kind, rng.choice(DTYPES))
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
            key = rng.choice(every)
            assert_unchanged(expected[key], *key)
    return accepted, refused_count


def other_functions() -> int:
    """What else there is to call: check_batch_sizes, activation, matmul, set_threshold and so on."""
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
        (_cpu.set_threshold, "rows", 1),
        (_cpu.set_threshold, "", 1),
        (_cpu.set_threshold, None, 1),
        (_cpu.set_threshold, "chunk_rows", None),
        (_cpu.set_threshold, "chunk_rows", 1.5),
        (_cpu.set_threshold, "chunk_rows", 2**63),
        (_cpu.set_threshold, "chunk_rows"),
        *((_cpu.set_quota, number) for number in (0, -1, 2**63, None, 1.5, "2")),
        *((_cpu.seconds_to_meet, threads, 1) for threads in BAD_OTHERS["threads"]),
        *((_cpu.seconds_to_meet, 1, times) for times in (0, -1, 10**7, 2**63, None, 1.5)),
    ]
    good = {"a": torch.ones(3, 4), "b": torch.ones(4, 6), "out": torch.ones(3, 6)}
    for name, value in good.items():
        makers = BAD_TENSORS | BAD_MATRICES | {"none": lambda t: None}
        bad += [(_cpu.matmul, *(good | {name: make(value.clone())}).values(), 1) for make in makers.values()]
    bad += [(_cpu.matmul, *good.values(), threads) for threads in BAD_OTHERS["threads"]]
    good = {"a": torch.ones(2, 3, 4), "b": torch.ones(2, 3, 6), "out": torch.ones(2, 4, 6)}
    for name, value in good.items():
        makers = BAD_TENSORS | BAD_MATRICES | {"none": lambda t: None}
        makers |= {"overlapping": BAD_LEADS["overlapping_leads"]} if name == "out" else {}
        bad += [(_cpu.outer_products, *(good | {name: make(value.clone())}).values(), 1) for make in makers.values()]
    bad += [(_cpu.outer_products, *good.values(), threads) for threads in BAD_OTHERS["threads"]]
    for function, *args in bad:
        try:
            function(*args)
        except (TypeError, ValueError) as error:
            assert str(error)
            continue
        # Not the arguments: torch crashes when it prints a tensor without memory.
        raise AssertionError(f"{function.__name__} accepted {[type(a) for a in args]}")
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
    assert int(run_as_program("single_faults")) > 30_000


def test_thousands_of_mutations() -> None:
    accepted, refused_count = map(int, run_as_program("mutations", 1, 20_000).split())
    assert accepted > 200, "the changes are too coarse to pass the door at all"
    assert refused_count > 10_000


def wrong_type_beside_no_memory() -> int:
    """The text of a TypeError must not print the operands: torch crashes when it prints one without memory."""
    arguments = valid("forward", "lstm", "dense")
    without_memory = resized_to_nothing(arguments["y"])
    bad = arguments | {"y": without_memory, "kept": (without_memory, without_memory)}
    refused("forward", bad | {"cell": 3}, "a number for the cell")
    refused("forward", bad | {"threads": "2"}, "a text for the threads")
    refused("forward", bad | {"weights": [without_memory]}, "a list for the weights")
    refused("forward", {name: v for name, v in bad.items() if name != "h_n"}, "no h_n")
    return 4


def test_wrong_type_beside_a_tensor_without_memory() -> None:
    assert int(run_as_program("wrong_type_beside_no_memory")) == 4


def test_other_functions() -> None:
    assert int(run_as_program("other_functions")) > 100


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("function", "cell", "kind"), [*EVERY, *EVERY_PROJECTED], ids=str)
def test_the_valid_calls_are_valid(function: str, cell: str, kind: str, dtype: torch.dtype) -> None:
    """Else everything above would be refused for a reason of no interest."""
    assert all(t.isfinite().all() for t in fingerprint(function, cell, kind, dtype).values())
    arguments = valid(function, cell, kind, dtype)
    required: Operands = {}
    for name, value in arguments.items():
        if isinstance(value, tuple):
            required[name] = tuple(None if optional(function, name, i, len(value)) else t for i, t in enumerate(value))
        else:
            required[name] = None if name in OPTIONAL else value
    call(function, required)
    if function == "forward":
        call(function, required | {"kept": ()})


if __name__ == "__main__":
    counts = globals()[sys.argv[1]](*map(int, sys.argv[2:]))
    print(*(counts if isinstance(counts, tuple) else (counts,)))
