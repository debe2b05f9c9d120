"""What the rows are to reach, and whether they do.

Differences below 10 % are noise on a shared machine: a row counts as met in the better of its runs. Ratios that are
shown or averaged are geometric means over all its runs.
"""

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from .record import Entry
from .rows import SHAPES

# torch's time over ours: geometric means over the ten shapes of one layer, 1 thread and all threads together.
MEANS = {
    ("lstm", "inference"): 1.6,
    ("lstm", "training"): 1.75,
    ("gru", "inference"): 3.0,
    ("gru", "training"): 4.3,
    ("rnn", "inference"): 3.1,
    ("rnn", "training"): 3.6,
}
LEAST = 0.95  # of every row

STEP_OVER_LSTM = 5.0
"""torch's time over ours for a single step of nn.LSTM without gradients; nn.LSTMCell's must be above 1."""

RAGGED_OVER_TORCH = 8.0
RAGGED_OVER_DENSE = 1.15
RAGGED_SHAPE = [200, 8, 64, 64]


def distance_target(entry: Entry) -> float | None:
    """How many times the limit a row may take; None for one without such a target.

    A single step is bound by the cost of a call, which the limit does not know; it has targets of its own.
    """
    steps, batch, _, hidden = entry["shape"]
    if steps == 1 or entry["dtype"] != "float32":
        return None
    if hidden == 64:
        return 1.4
    if batch == 1:
        return 1.3 if entry["threads"] == 1 else 1.5
    return 1.25 if batch >= 16 and hidden >= 128 else None


def ratio(entry: Entry) -> float:
    return entry["torch_ms"] / entry["ours_ms"]


def first_ratio(entry: Entry) -> float:
    """The same of calls behind the other side's."""
    return entry["torch_first_ms"] / entry["ours_first_ms"] if "torch_first_ms" in entry else ratio(entry)


def distance(entry: Entry) -> float:
    return entry["ours_ms"] / entry["limit_ms"]


def mean(values: Iterable[float]) -> float:
    """The geometric mean."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs))


class Aim(NamedTuple):
    """One thing that a row is to reach: ``value`` is to be at least, or at most, ``target``."""

    what: str
    value: float
    sign: str  # "≥" or "≤"
    target: float

    @property
    def met(self) -> bool:
        return self.value >= self.target if self.sign == "≥" else self.value <= self.target

    def __str__(self) -> str:
        return f"{self.what} {self.value:.2f} ({self.sign} {self.target:g}{'' if self.met else ', missed'})"


def aims(entry: Entry) -> list[Aim]:
    """All that one run of a row is to reach."""
    single = entry["shape"][:2] == [1, 1] and entry["dtype"] == "float32" and entry["kind"] in ("layer", "cell")
    result = []
    if single and entry["mode"] == "training":
        result.append(Aim("× torch", ratio(entry), "≥", 1.0))
    elif single and entry["kind"] == "layer" and entry["cell"] == "lstm":
        result.append(Aim("× torch", ratio(entry), "≥", STEP_OVER_LSTM))
    elif entry["kind"] == "packed" and entry["shape"] == RAGGED_SHAPE and _lstm_training(entry):
        result.append(Aim("× torch", ratio(entry), "≥", RAGGED_OVER_TORCH))
    else:
        result.append(Aim("× torch", ratio(entry), "≥", LEAST))
    if "torch_cell_ms" in entry:
        result.append(Aim("× nn.LSTMCell", entry["torch_cell_ms"] / entry["ours_ms"], "≥", 1.0))
    if "dense_ms" in entry and _lstm_training(entry):
        beside = entry["ours_beside_dense_ms"]
        result.append(Aim("× dense steps", beside / entry["dense_ms"], "≤", RAGGED_OVER_DENSE))
    allowed = distance_target(entry)
    if allowed is not None:
        result.append(Aim("× limit", distance(entry), "≤", allowed))
    return result


def _lstm_training(entry: Entry) -> bool:
    return entry["cell"] == "lstm" and entry["mode"] == "training" and entry["dtype"] == "float32"


class Judged(NamedTuple):
    """All runs of one row."""

    entry: Entry  # of the first run
    ratio: float
    first_ratio: float
    distance: float
    aims: list[Aim]  # each in the better of the runs

    @property
    def met(self) -> bool:
        return all(aim.met for aim in self.aims)

    @property
    def ratio_at_limit(self) -> float:
        """What ``ratio`` would be if the row took just its limit; of a single step, bound by what the limit does not
        know, ``ratio`` itself."""
        return self.ratio if self.entry["shape"][0] == 1 else self.ratio * self.distance


def judge(entries: Iterable[Entry]) -> list[Judged]:
    """The rows, in the order in which they first came."""
    runs: dict[tuple[object, ...], list[Entry]] = {}
    for e in entries:
        key = (e["kind"], e["cell"], e["mode"], *e["shape"], e["threads"], e["dtype"])
        runs.setdefault(key, []).append(e)
    result = []
    for same in runs.values():
        best = [
            (max if group[0].sign == "≥" else min)(group, key=lambda aim: aim.value)
            for group in zip(*map(aims, same), strict=True)
        ]
        ratios, firsts, distances = (map(measure, same) for measure in (ratio, first_ratio, distance))
        result.append(Judged(same[0], mean(ratios), mean(firsts), mean(distances), best))
    return result


def summary(entries: list[Entry]) -> Iterator[str]:
    """The lines under the table: means, the single step, ragged input, and how many rows miss what."""
    judged = judge(entries)
    if any(j.entry["kind"] == "layer" for j in judged):
        yield f"{'geometric mean of × torch':32}{'reached':>9}{'target':>8}{'at the limit':>14}{'first calls':>13}"
    for (cell, mode), target in MEANS.items():
        rows = [j for j in judged if j.entry["kind"] == "layer" and j.entry["dtype"] == "float32"]
        rows = [j for j in rows if (j.entry["cell"], j.entry["mode"]) == (cell, mode)]
        if not rows:
            continue
        reached, shapes = mean(j.ratio for j in rows), {tuple(j.entry["shape"]) for j in rows}
        whole = shapes == set(SHAPES["layer"])
        note = "" if reached >= target else "  missed"
        title = f"{cell.upper()} {mode}, {len(rows)} rows"
        others = f"{mean(j.ratio_at_limit for j in rows):14.2f}{mean(j.first_ratio for j in rows):13.2f}"
        figures = f"{reached:9.2f}{target:8.2f}{others}"
        yield f"{title:32}{figures}{note if whole else '  (not of the ten shapes)'}"
    for title, rows in (
        ("a single step, T = B = 1", [j for j in judged if j.entry["shape"][:2] == [1, 1]]),
        ("ragged packed input against dense steps", [j for j in judged if "dense_ms" in j.entry]),
    ):
        if rows:
            yield title
        for j in rows:
            yield f"  {_name(j.entry):56}  " + "; ".join(map(str, j.aims))
    missed = [j for j in judged if not j.met]
    yield f"{len(judged)} rows, {len(judged) - len(missed)} reach all that they are to reach"
    for what in dict.fromkeys(aim.what for j in judged for aim in j.aims):
        some = [aim for j in judged for aim in j.aims if aim.what == what]
        yield f"  {what}: {sum(aim.met for aim in some)} of {len(some)}"
    disturbed = sum(e["disturbed"] for e in entries)
    if disturbed:
        yield f"{disturbed} of {len(entries)} measurements were disturbed, by others or by other places of the cores"


def _name(entry: Entry) -> str:
    sizes = ",".join(map(str, entry["shape"]))
    return f"{entry['kind']} {entry['cell']} {entry['mode']} {sizes} {entry['dtype']}, {entry['threads']} thread(s)"
