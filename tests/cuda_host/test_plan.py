"""The planner on devices that are not there: a plan for every problem, within the device's limits, all of it covered.

The arithmetic of who owns what is that of csrc/cuda/persistent.h, done again here.
"""

from itertools import pairwise, product
from typing import Any

import _emulation
import pytest
import torch
from emulated import CELLS
from hypothesis import given, settings
from hypothesis import strategies as st

UNITS, TILE_ROWS, WARPS, LANES = 16, 8, 8, 32
THREADS = WARPS * LANES
GATES = {"rnn_tanh": 1, "rnn_relu": 1, "gru": 3, "lstm": 4}
BYTES = {"float32": 4, "float64": 8, "bfloat16": 2, "float16": 2}
# Fragments that a warp holds in registers of weights in 1, 3 or 4 tiles, by row tiles; and registers for those of the
# other pass, 4 for each product of a tile.
HELD = {1: {1: 12, 3: 4, 4: 4}, 2: {1: 12, 3: 4, 4: 2}, 4: {1: 6, 3: 2, 4: 0}}
HELD_BACK = {1: 128, 2: 96, 4: 64}
LIMIT = 2**26
ROWS_LIMIT = 2**30  # of a chunk: cuBLAS counts in 32 bits


def device(name: str, capability: str, multiprocessors: int, shared_bytes: int, cooperative: bool = True) -> Any:
    major, minor = map(int, capability.split("."))
    return {
        "name": name, "major": major, "minor": minor, "multiprocessors": multiprocessors,
        "shared_bytes": shared_bytes, "cooperative": cooperative,
    }  # fmt: skip


# Shared memory: what one block may have, of NVIDIA's table of compute capabilities.
DEVICES = {
    d["name"]: d
    for d in (
        device("T4", "7.5", 40, 65_536),
        device("A100", "8.0", 108, 166_912),
        device("A40", "8.6", 84, 101_376),
        device("Orin", "8.7", 16, 166_912),
        device("L4", "8.9", 58, 101_376),
        device("RTX 4090", "8.9", 128, 101_376),
        device("H100", "9.0", 132, 232_448),
        device("slice of an H100", "9.0", 16, 232_448),
        device("B200", "10.0", 148, 232_448),
        device("B300", "10.3", 148, 232_448),
        device("Thor", "11.0", 20, 232_448),
        device("RTX 5090", "12.0", 170, 101_376),
        device("GB10", "12.1", 48, 101_376),
        device("without cooperative launch", "9.0", 132, 232_448, cooperative=False),
        device("of one multiprocessor", "8.6", 1, 101_376),
    )
}
SERVED = [name for name, d in DEVICES.items() if d["major"] >= 8 and d["cooperative"]]

# Small ones, where the persistent form fits, and all that the door lets in.
sizes = st.one_of(st.integers(1, 40), st.integers(1, 2_100), st.integers(1, LIMIT - 1), st.just(LIMIT - 1))
problems = st.fixed_dictionaries(
    {
        "backward": st.booleans(),
        "cell": st.sampled_from(CELLS),
        "dtype": st.sampled_from(list(BYTES)),
        "steps": sizes,
        "batch": sizes,
        "inputs": sizes,
        "hidden": sizes,
        "directions": st.sampled_from((1, 2)),
        "tf32": st.booleans(),
    }
)


def plan(on: str, problem: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = _emulation.plan(DEVICES[on], **problem)
    return found


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def products_of_tile(p: dict[str, Any]) -> int:
    """Back through time: for each gate the units of a block, in products of 32 bytes."""
    return GATES[p["cell"]] * UNITS * BYTES[p["dtype"]] // 32


def shared_bytes(p: dict[str, Any], found: dict[str, Any]) -> int:
    """What persistent.h and scatter.h lay out there: the weights that no register holds, partial sums of each warp,
    and back through time the gate gradients."""
    rows = found["row_tiles"] * TILE_ROWS
    carried = rows * UNITS * 8 if rows * UNITS * 2 <= THREADS else 0
    if p["backward"]:
        products = products_of_tile(p)
        gradients = rows * (products // 2 * 64 + 32)
        return int(
            WARPS * found["spare"] * products * LANES * 16 + WARPS * rows * (UNITS + 4) * 4 + carried + gradients
        )
    tiles = GATES[p["cell"]]
    sums = WARPS * rows * (UNITS + 4 if tiles == 1 else 4 * (UNITS + 1)) * 4
    return int(WARPS * found["spare"] * tiles * LANES * 32 + sums + carried)


@settings(max_examples=1000)
@given(on=st.sampled_from(list(DEVICES)), problem=problems)
def test_every_problem_has_a_plan(on: str, problem: dict[str, Any]) -> None:
    found = plan(on, problem)
    assert found["reason"]
    assert 1 <= found["chunk_steps"] <= problem["steps"]
    assert found["chunk_steps"] == 1 or found["chunk_steps"] * problem["batch"] <= ROWS_LIMIT
    assert found["form"] in ("step", "persistent")
    narrow = problem["dtype"] in ("bfloat16", "float16") or (problem["dtype"] == "float32" and problem["tf32"])
    if on not in SERVED or not narrow or problem["steps"] == 1:
        assert found["form"] == "step"
    if found["form"] == "step":
        assert set(found) == {"form", "reason", "chunk_steps"}
    else:
        assert_within_limits(DEVICES[on], problem, found)


def assert_within_limits(on: dict[str, Any], problem: dict[str, Any], found: dict[str, Any]) -> None:
    assert found["row_tiles"] in HELD
    own_blocks = found["unit_blocks"] * found["row_groups"]
    # All blocks of a launch wait for each other, so all have to be on the chip.
    assert 1 <= found["blocks"] <= on["multiprocessors"]
    assert found["blocks"] == own_blocks * (2 if found["together"] else 1)
    # Both directions in one launch when they fit, and only then.
    assert found["together"] == (problem["directions"] == 2 and 2 * own_blocks <= on["multiprocessors"])
    assert found["shared_bytes"] == shared_bytes(problem, found) <= on["shared_bytes"]


def row_of(index: int) -> int:
    """Of two rows of a warp, four apart."""
    return (index & ~7) | (index & 1) << 2 | (index >> 1 & 3)


def owners_of(length: int, blocks: int, of_each: int) -> list[int]:
    """How many of `blocks` blocks own each of `length` elements."""
    count = [0] * length
    for block in range(blocks):
        for i in range(block * of_each, min((block + 1) * of_each, length)):
            count[i] += 1
    return count


persistent_problems = st.fixed_dictionaries(
    {
        "backward": st.booleans(),
        "cell": st.sampled_from(CELLS),
        "dtype": st.sampled_from(("float32", "bfloat16", "float16")),
        "steps": st.integers(2, 100),
        "batch": st.one_of(st.integers(1, 40), st.integers(1, 600)),
        "inputs": st.just(3),
        "hidden": st.one_of(st.integers(1, 140), st.integers(1, 2_600)),
        "directions": st.sampled_from((1, 2)),
        "tf32": st.just(True),
    }
)


@settings(max_examples=1000)
@given(on=st.sampled_from(SERVED), problem=persistent_problems)
def test_all_is_covered_once(on: str, problem: dict[str, Any]) -> None:
    found = plan(on, problem)
    if found["form"] == "step":
        return
    rows = found["row_tiles"] * TILE_ROWS
    assert set(owners_of(problem["hidden"], found["unit_blocks"], UNITS)) == {1}
    assert set(owners_of(problem["batch"], found["row_groups"], rows)) == {1}
    # No block without work: it would be waited for in vain.
    assert (found["unit_blocks"] - 1) * UNITS < problem["hidden"]
    assert (found["row_groups"] - 1) * rows < problem["batch"]
    # Inside a block, the threads of a group, with rows in another order.
    threads = min(rows * UNITS, THREADS)
    places = [i * threads + thread for i in range(ceil_div(rows * UNITS, threads)) for thread in range(threads)]
    elements = [(row_of(place // UNITS), place % UNITS) for place in places]
    assert sorted(elements) == list(product(range(rows), range(UNITS)))
    # The product, and the warps.
    if problem["backward"]:
        blocks, products = found["unit_blocks"], products_of_tile(problem)
        assert found["depth"] == GATES[problem["cell"]] * UNITS
        assert sorted(i * WARPS + warp for warp in range(WARPS) for i in range(ceil_div(blocks - warp, WARPS))) == list(
            range(blocks)
        )
        held = min(HELD_BACK[found["row_tiles"]] // (4 * products) // 2 * 2, 12)
        assert ceil_div(blocks, WARPS) <= held + found["spare"]
        assert found["exchange_words"] == found["row_groups"] * blocks**2 * rows * UNITS
        return
    fragment = 64 // BYTES[problem["dtype"]]
    assert found["depth"] % fragment == 0
    assert found["depth"] >= found["unit_blocks"] * UNITS
    fragments = found["depth"] // fragment
    begin = [fragments * warp // WARPS for warp in range(WARPS + 1)]
    assert begin[0] == 0 and begin[-1] == fragments
    assert all(a <= b for a, b in pairwise(begin))
    most = max(b - a for a, b in pairwise(begin))
    assert most <= HELD[found["row_tiles"]][GATES[problem["cell"]]] + found["spare"]
    assert found["exchange_words"] == found["row_groups"] * rows * found["depth"]


def test_the_kinds_of_plan_all_occur() -> None:
    """Else the properties above would hold for want of examples."""
    seen: set[tuple[str, Any]] = set()
    hidden, batch, flags = (1, 17, 256, 700, 1024, 2048, 4096), (1, 8, 33, 64, 128, 512), (False, True)
    for on, h, b, cell, backward, tf32 in product(DEVICES, hidden, batch, CELLS, flags, flags):
        found = _emulation.plan(DEVICES[on], backward, cell, "float32", 50, b, 64, h, 2, tf32)
        seen.add(("reason", found["reason"]))
        if found["form"] == "persistent":
            seen |= {(k, found[k]) for k in ("row_tiles", "together")}
            seen.add(("spare", found["spare"] > 0))
    assert {("row_tiles", n) for n in HELD} <= seen
    assert {(k, v) for k in ("together", "spare") for v in (False, True)} <= seen
    reasons = {reason for kind, reason in seen if kind == "reason"}
    assert reasons == {
        "the persistent form wants compute capability 8.0 or later",
        "the device has no cooperative launch",
        "the persistent form serves float32 by way of TF32 alone",
        "more blocks than multiprocessors",
        "the recurrent weights do not fit the chip",
        "the recurrent weights fit the chip",
    }


@pytest.mark.parametrize("dtype", BYTES)
def test_the_largest_sizes_do_not_overflow(dtype: str) -> None:
    largest = LIMIT - 1
    for on in DEVICES:
        for backward in (False, True):
            found = _emulation.plan(DEVICES[on], backward, "lstm", dtype, *(largest,) * 4, 2, True)
            assert (found["form"], found["chunk_steps"]) == ("step", 1)


def test_chunks_keep_to_their_bytes() -> None:
    _emulation.set_threshold("chunk_bytes", 10**6)
    for cell, gates in GATES.items():
        found = _emulation.plan(DEVICES["A100"], False, cell, "bfloat16", 10**6, 4, 8, 32, 1, False)
        # The products of the input stand in float32.
        assert found["chunk_steps"] == 10**6 // (gates * 32 * 4) // 4


GOOD = (DEVICES["H100"], False, "lstm", "float32", 9, 8, 7, 6, 1, True)
BAD = (
    (0, None), (0, "H100"), (0, {}), (0, {k: v for k, v in DEVICES["H100"].items() if k != "minor"}),
    (0, DEVICES["H100"] | {"major": "9"}), (0, DEVICES["H100"] | {"multiprocessors": 2**40}),
    (0, DEVICES["H100"] | {"shared_bytes": None}), (0, [1]),
    (1, 0), (1, None), (2, "LSTM"), (2, None), (2, 3), (3, "float8"), (3, torch.float32), (3, "torch.float32"),
    *((i, bad) for i in range(4, 9) for bad in (0, -1, LIMIT, 2**70, 1.5, None, "3")),
    (8, 3), (9, 1), (9, None),
)  # fmt: skip


@pytest.mark.parametrize(("index", "bad"), BAD, ids=lambda v: str(v)[:40])
def test_bad_arguments(index: int, bad: Any) -> None:
    assert _emulation.plan(*GOOD)["form"] == "persistent"
    with pytest.raises((TypeError, ValueError, KeyError, RuntimeError)) as raised:
        _emulation.plan(*GOOD[:index], bad, *GOOD[index + 1 :])
    assert str(raised.value)


def test_the_number_of_arguments() -> None:
    with pytest.raises(TypeError):
        _emulation.plan(*GOOD[:-1])
    with pytest.raises(TypeError):
        _emulation.plan(*GOOD, 1)


@pytest.mark.parametrize(
    "arguments", [("chunk_bytes",), ("chunk_bytes", -1), ("chunk_bytes", 1.5), ("rows", 1), (3, 1)]
)
def test_bad_thresholds(arguments: tuple[Any, ...]) -> None:
    with pytest.raises((TypeError, ValueError)):
        _emulation.set_threshold(*arguments)
