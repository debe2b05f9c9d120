"""Where our CUDA kernels were measured to be faster than cuDNN: the table of choices, and what it says of a call.

The table is ``cuda_choices.json``: a list of records, each written by the GPU benchmark on a real card (``make
gpu-check``). A record is an object with

- ``device``, ``capability`` ("9.0"), ``driver``, ``commit``: the card, and what ran on it; versions may follow
- ``tests_passed``, ``tests_failed``, ``sanitizer_errors``: counts. A record is green where tests ran, none failed, and
  compute-sanitizer found nothing; no other chooses anything
- ``rows``: objects with ``cell`` ("rnn", "gru", "lstm"), ``mode`` ("inference", "training"), ``shape`` [T, B, I, H],
  ``dtype`` ("float32"), ``tf32``, ``layers``, ``bidirectional``, ``packed``, ``padded`` (with lengths, which torch's
  layers get packed), ``path`` ("fused", "persistent"; rows of "cudnn" say nothing of ours), ``ours_ms`` and
  ``torch_ms``; what else there is, is not read

Nothing here knows of torch: it is data and arithmetic.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

FILE = Path(__file__).with_name("cuda_choices.json")

FUSED = "fused"  # a matrix product and a fused kernel for each step
PERSISTENT = "persistent"  # one launch for the whole sequence

NEAR = (4, 2, 4, 2)
"""By which factor T, B, I and H of a measurement may differ from those of a call.

Which side wins turns on B and H: they decide whether the weights stay on the chip and what a step costs. With T and I
both sides' times grow alike, once they are not small.
"""

NOISE = 0.97
"""Ours have to be faster by more than two runs of one side differ."""


class Problem(NamedTuple):
    """What of a call its speed follows from. ``cell`` as in :data:`pyrnnfast.reference.STEPS`."""

    cell: str
    training: bool
    dtype: str
    tf32: bool
    steps: int
    batch: int
    inputs: int
    hidden: int
    bidirectional: bool
    packed: bool
    padded: bool = False
    """Dense, with lengths or resets: ours read them step by step, torch's layers get packed data."""
    layers: int = 1

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.steps, self.batch, self.inputs, self.hidden


class Row(NamedTuple):
    """One measurement: ``problem`` by ``path`` of ours, in ``ratio`` times cuDNN's time, on the card of ``source``."""

    problem: Problem
    path: str
    ratio: float
    source: str


class Record(NamedTuple):
    """One run of the GPU benchmark."""

    device: str
    capability: str
    driver: str
    commit: str
    tests_passed: int
    tests_failed: int
    sanitizer_errors: int
    rows: tuple[Row, ...]

    @property
    def refusal(self) -> str | None:
        """Why it chooses nothing; None: it is green."""
        if self.tests_passed <= 0:
            return "no test ran"
        if self.tests_failed:
            return f"{self.tests_failed} tests failed"
        return f"{self.sanitizer_errors} errors of compute-sanitizer" if self.sanitizer_errors else None

    def __str__(self) -> str:
        state = self.refusal or f"{self.tests_passed} tests passed"
        return f"{self.device} (compute capability {self.capability}), commit {self.commit}: {state}"


class Verdict(NamedTuple):
    """What is known of a problem: the faster ``path`` of ours, its ``ratio`` to cuDNN's time, and where it is from."""

    path: str
    ratio: float
    evidence: str

    @property
    def ours(self) -> bool:
        return self.ratio < NOISE


def read(text: str) -> tuple[Record, ...]:
    """The records of a table.

    Raises:
        ValueError: it is not what a table has to be.
    """
    try:
        found = json.loads(text)
        if not isinstance(found, list):
            raise TypeError(f"a list of records is expected, got {type(found).__name__}")
        return tuple(_record(r) for r in found)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        what = f"there is no {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{FILE.name}: {what}") from error


def _record(given: Mapping[str, Any]) -> Record:
    device, capability, commit = (str(given[name]) for name in ("device", "capability", "commit"))
    passed, failed, errors = (given[name] for name in ("tests_passed", "tests_failed", "sanitizer_errors"))
    if any(type(n) is not int for n in (passed, failed, errors)):
        raise TypeError(f"the counts of tests and errors must be integers, got {passed!r}, {failed!r}, {errors!r}")
    source = f"{device}, commit {commit}"
    rows = tuple(_row(r, source) for r in given["rows"] if r["path"] != "cudnn")
    return Record(device, capability, str(given["driver"]), commit, passed, failed, errors, rows)


def _row(given: Mapping[str, Any], source: str) -> Row:
    path, mode, dtype = given["path"], given["mode"], given["dtype"]
    ours, theirs = given["ours_ms"], given["torch_ms"]
    if path not in (FUSED, PERSISTENT):
        raise ValueError(f"path {path!r}: {FUSED}, {PERSISTENT} or cudnn is expected")
    if mode not in ("inference", "training"):
        raise ValueError(f"mode {mode!r}: inference or training is expected")
    if not (ours > 0 and theirs > 0 and len(given["shape"]) == 4 and min(given["shape"]) > 0):
        raise ValueError(f"four sizes and two times, all positive, are expected in {dict(given)}")
    steps, batch, inputs, hidden = given["shape"]
    problem = Problem(
        _kind(given["cell"]),
        mode == "training",
        dtype,
        bool(given["tf32"]) and dtype == "float32",
        steps,
        batch,
        inputs,
        hidden,
        bidirectional=bool(given["bidirectional"]),
        packed=bool(given["packed"]),
        padded=bool(given["padded"]),
        layers=int(given["layers"]),
    )
    return Row(problem, path, ours / theirs, source)


def _kind(cell: str) -> str:
    """tanh and relu are one to the clock."""
    return "rnn" if cell.startswith("rnn") else cell


def _distance(a: Problem, b: Problem) -> float | None:
    """How far apart two shapes are, in octaves; None: too far."""
    octaves = [abs(math.log2(m / n)) for m, n in zip(a.shape, b.shape, strict=True)]
    return None if any(o > math.log2(f) for o, f in zip(octaves, NEAR, strict=True)) else sum(octaves)


def _key(capability: str, p: Problem) -> tuple[object, ...]:
    return capability, _kind(p.cell), p.training, p.dtype, p.tf32, p.packed, p.padded, p.bidirectional


class Table:
    """Green records, by what has to agree."""

    def __init__(self, records: Iterable[Record]) -> None:
        self.records = tuple(records)
        self._rows: dict[tuple[object, ...], list[Row]] = {}
        for record in self.records:
            if record.refusal is None:
                for row in record.rows:
                    self._rows.setdefault(_key(record.capability, row.problem), []).append(row)
        self.capabilities = frozenset(r.capability for r in self.records if r.refusal is None)

    def verdict(self, capability: str, problem: Problem) -> Verdict | None:
        """Of a call: by the measurements of the nearest shape, of stacks for a stack. None: none is near.

        Layers of a stack may overlap, ours and cuDNN's in different measure, so one layer tells nothing of several.
        """
        return self._found(capability, problem, either=False)

    def form(self, capability: str, problem: Problem) -> str | None:
        """Which of our paths was faster near one layer, be it alone or in a stack; None: none was measured."""
        found = self._found(capability, problem, either=True)
        return None if found is None else found.path

    def _found(self, capability: str, problem: Problem, either: bool) -> Verdict | None:
        rows = self._rows.get(_key(capability, problem), ())
        return _of_nearest([r for r in rows if either or (r.problem.layers > 1) == (problem.layers > 1)], problem)


def _of_nearest(rows: Sequence[Row], problem: Problem) -> Verdict | None:
    measured = [(d, r) for r in rows if (d := _distance(problem, r.problem)) is not None]
    if not measured:
        return None
    least = min(d for d, _ in measured)
    nearest = [r for d, r in measured if d == least]
    # Where one shape was measured several times, a path is as slow as it was at its worst.
    worst = [max((r for r in nearest if r.path == path), key=lambda r: r.ratio) for path in {r.path for r in nearest}]
    best = min(worst, key=lambda r: (r.ratio, r.path))
    p = best.problem
    sizes = ",".join(map(str, p.shape))
    mode = "training" if p.training else "inference"
    return Verdict(best.path, best.ratio, f"{p.cell} {mode} {sizes} {p.dtype} on {best.source}")
