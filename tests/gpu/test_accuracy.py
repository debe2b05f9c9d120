"""Every cell, dtype and path against float64, outputs and all gradients, with cuDNN's own error as the measure.

The sizes are chosen by what the kernels do with them: a tile of the persistent form has 16 units and 8, 16 or 32 rows.
"""

from collections.abc import Iterator
from dataclasses import replace

import oracle
import pytest
from cases import CELLS, Case

# Equal; single steps; one sequence; unsorted; many that end at one step; and more of them than a tile has rows.
_LENGTHS = ((3, 3, 3), (1, 1, 1, 1), (4,), (2, 5, 1, 4, 3), (9, 9, 7, 7, 7, 7, 2, 1, 1, 1), tuple(range(1, 40)))


def _table() -> Iterator[Case]:
    for cell in CELLS:
        plain = Case(cell, steps=4, batch=5, inputs=24, hidden=48)
        for steps in (1, 2, 3, 257):
            yield replace(plain, steps=steps)
        yield replace(plain, steps=1, initial=False)
        # 1, primes, around a tile of units, and beyond what one multiprocessor can hold.
        for hidden in (1, 7, 15, 16, 17, 31, 64, 67, 127, 250, 256, 509):
            yield replace(plain, hidden=hidden)
        for hidden in (1024, 1536):
            yield replace(plain, hidden=hidden, batch=9, inputs=40)
        # Around the tiles of rows, and many of them.
        for batch in (1, 2, 7, 8, 9, 16, 17, 33, 64, 131):
            yield replace(plain, batch=batch, hidden=128)
        for batch, hidden in ((16, 256), (64, 512), (13, 768)):
            yield replace(plain, batch=batch, hidden=hidden, inputs=hidden, steps=20)
        for inputs in (1, 13):
            yield replace(plain, inputs=inputs, hidden=32)
        for hidden in (20, 64):
            yield replace(plain, hidden=hidden, bidirectional=True)
            yield replace(plain, hidden=hidden, layers=2, batch_first=True, bias=False)
            yield replace(plain, hidden=hidden, layers=3, bidirectional=True, initial=False)
            yield replace(plain, hidden=hidden, bias=False, initial=False)
            yield replace(plain, hidden=hidden, unbatched=True)
            yield replace(plain, hidden=hidden, batch_first=True, bidirectional=True, initial=False)
        for lengths in _LENGTHS:
            ragged = replace(plain, lengths=lengths, hidden=64)
            yield ragged
            yield replace(ragged, bidirectional=True, initial=False)
        yield replace(plain, lengths=(2, 5, 1, 4, 3), hidden=64, layers=2, bidirectional=True, batch_first=True)
        yield replace(plain, lengths=(2, 5, 1, 4, 3), hidden=21, layers=2, bias=False)
        for batch, hidden in ((1, 17), (5, 64), (33, 256)):
            yield replace(plain, single_step=True, batch=batch, hidden=hidden)
        yield replace(plain, single_step=True, unbatched=True, initial=False, bias=False)


TABLE = tuple(dict.fromkeys(_table()))

# The last factor, the path, follows the first ones, so that what both need is made once (oracle.prepared).
_ALL = [(case, kind, path) for case in TABLE for kind in oracle.KINDS for path in oracle.PATHS]


@pytest.mark.parametrize(("case", "kind", "path"), _ALL, ids=lambda value: str(value))
def test_against_float64(case: Case, kind: str, path: str) -> None:
    given, theirs, true = oracle.prepared(case, kind)
    with oracle.precision(kind):
        found = oracle.ours(case, given, path)
    oracle.check(case, found, theirs, true, kind)


LONG = [Case(cell, steps=2048, batch=3, inputs=16, hidden=64) for cell in CELLS]
LONG += [Case("lstm", lengths=(2048, 1500, 7), inputs=16, hidden=64, bidirectional=True)]


@pytest.mark.parametrize("path", oracle.PATHS)
@pytest.mark.parametrize("kind", ("fp32", "tf32", "bf16", "fp16"))
@pytest.mark.parametrize("case", LONG, ids=str)
def test_long_sequences(case: Case, kind: str, path: str) -> None:
    given, theirs, true = oracle.prepared(case, kind)
    with oracle.precision(kind):
        found = oracle.ours(case, given, path)
    oracle.check(case, found, theirs, true, kind)


@pytest.mark.parametrize("path", oracle.PATHS)
@pytest.mark.parametrize("cell", CELLS)
def test_tf32_follows_the_switches(cell: str, path: str) -> None:
    # With TF32 off the error is that of float32: ten bits of the mantissa make a difference that nobody can miss.
    case = Case(cell, steps=20, batch=16, inputs=64, hidden=256)
    given, _, true = oracle.prepared(case, "tf32")
    errors = {}
    for kind in ("fp32", "tf32"):
        with oracle.precision(kind):
            if path == "persistent" and not oracle.takes(case, given, path):
                if kind == "tf32":
                    pytest.skip("no plan for it")
                continue
            found = oracle.ours(case, given, path)
        errors[kind] = ((found["y"].double() - true["y"]).norm() / true["y"].norm()).item()
    assert errors["tf32"] < 2e-3
    if "fp32" in errors:
        assert errors["fp32"] < 2e-6
    if path == "persistent":  # to cuBLAS TF32 is a permission
        assert errors["tf32"] > 2e-6
