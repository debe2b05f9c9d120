"""What a record of `check` says, for people: ``python -m benchmarks.gpu.report NAME``

Draws ``benchmarks/results/NAME.png`` of ``NAME.json``, every row of one dense layer, and prints a table in Markdown of
all rows: means are geometric, and count every row, those on which cuDNN is faster too. "By default" is what a user
gets, once the record is in the table of choices: the rows that it then leaves to cuDNN count as 1.
"""

import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from pyrnnfast.choices import NOISE

from . import record
from .record import Record
from .rows import CELLS, MODES

KINDS = ("bfloat16", "TF32", "float16", "float32", "float64")
_COLOURS = dict(zip(KINDS, ("#4c78a8", "#54a24b", "#f58518", "#b279a2", "#9d755d"), strict=True))


def kind(row: Record) -> str:
    return "TF32" if row["tf32"] else str(row["dtype"])


def ratio(row: Record) -> float:
    return float(row["torch_ms"] / row["ours_ms"])


def by_default(row: Record) -> float:
    return ratio(row) if 1 / ratio(row) < NOISE else 1.0


def _mean(ratios: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, ratios)) / len(ratios))


def fastest(rows: Sequence[Record]) -> list[Record]:
    """Of every row that of our faster path."""
    best: dict[str, Record] = {}
    for row in rows:
        key = record.row_key(row)
        if key not in best or row["ours_ms"] < best[key]["ours_ms"]:
            best[key] = row
    return list(best.values())


def _in_one_launch_of_cudnn(row: Record) -> bool:
    """cuDNN's own persistent kernels: torch asks it for them in nothing but such LSTMs."""
    batch, inputs, hidden = row["shape"][1:]
    alone = row["layers"] == 1 and not (row["bidirectional"] or row["packed"] or row["padded"])
    whole = batch % 8 == 0 and inputs % 128 == 0 and hidden % 128 == 0 and hidden <= 1024
    return bool(row["cell"] == "lstm" and row["dtype"] == "float16" and alone and whole)


_GROUPS: tuple[tuple[str, Callable[[Record], bool]], ...] = (
    *((f"{name}, one launch", lambda r, n=name: kind(r) == n and r["path"] == "persistent") for name in KINDS),
    *((f"{name}, by steps", lambda r, n=name: kind(r) == n and r["path"] == "fused") for name in KINDS),
    ("bfloat16, TF32, GRU, packed", lambda r: kind(r) in KINDS[:2] or r["cell"] == "gru" or bool(r["packed"])),
    ("LSTMs that cuDNN has in one launch", _in_one_launch_of_cudnn),
    ("GRU", lambda r: r["cell"] == "gru"),
    ("packed", lambda r: bool(r["packed"])),
    ("padded, with lengths", lambda r: bool(r["padded"])),
    ("bidirectional", lambda r: bool(r["bidirectional"])),
)


def table(found: Record) -> str:
    lines = ["| rows | | geometric mean | by default | from | to | slower than cuDNN |", "|" + "---|" * 7]
    rows = fastest(found["rows"])
    for name, belongs in _GROUPS:
        mine = [row for row in rows if belongs(row)]
        if mine:
            ratios = [ratio(row) for row in mine]
            means = f"{_mean(ratios):.2f} | {_mean([by_default(row) for row in mine]):.2f}"
            slower = sum(r < 1 for r in ratios)
            lines.append(
                f"| {name} | {len(mine)} | {means} | {min(ratios):.2f} | {max(ratios):.2f} | {slower or 'none'} |"
            )
    return "\n".join(lines)


def draw(found: Record, path: Path) -> None:
    rows = [r for r in fastest(found["rows"]) if r["layers"] == 1 and not r["bidirectional"]]
    rows = [r for r in rows if not r["packed"] and not r["padded"]]
    shapes = sorted({(r["shape"][0], r["shape"][3], r["shape"][1]) for r in rows})
    kinds = [name for name in KINDS if any(kind(r) == name for r in rows)]
    height = 0.85 / len(kinds)
    figure = Figure(figsize=(14, 0.42 * len(shapes) + 1.5), layout="constrained")
    panels = figure.subplots(1, len(CELLS) * len(MODES), sharey=True)
    for axes, (cell, mode) in zip(panels, [(c, m) for c in CELLS for m in MODES], strict=True):
        for index, name in enumerate(kinds):
            mine = [r for r in rows if (r["cell"], r["mode"], kind(r)) == (cell, mode, name)]
            places = [
                shapes.index((r["shape"][0], r["shape"][3], r["shape"][1])) + (index - (len(kinds) - 1) / 2) * height
                for r in mine
            ]
            # From 1, as on a logarithmic scale a bar that points to the left of it is a loss.
            axes.barh(places, [ratio(r) - 1 for r in mine], height, left=1, color=_COLOURS[name], label=name)
        axes.axvline(1, color="black", linewidth=0.8)
        axes.set_xscale("log")
        axes.set_xticks([0.1, 0.5, 1, 2, 5, 10, 20])
        axes.xaxis.set_major_formatter(matplotlib.ticker.StrMethodFormatter("{x:g}"))
        axes.xaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
        axes.tick_params(labelsize=7)
        axes.set_title(f"{cell.upper()} {mode}", fontsize=10)
        axes.set_xlabel("cuDNN's time over ours", fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(shapes)), [f"{t},{b},{h},{h}" for t, h, b in shapes])
    panels[0].set_ylabel("T,B,I,H", fontsize=8)
    panels[0].set_ylim(len(shapes) - 0.4, -0.6)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=len(labels), fontsize=8)
    versions = found["versions"]
    figure.suptitle(
        f"{found['device']}, cuDNN {versions['cudnn']}, torch {versions['torch']}, {found['date']}", fontsize=9
    )
    figure.savefig(path, dpi=80)


def main(arguments: Sequence[str]) -> int:
    if len(arguments) != 1:
        print("usage: python -m benchmarks.gpu.report NAME", file=sys.stderr)
        return 2
    found = record.load(record.location(arguments[0]))
    draw(found, record.location(arguments[0]).with_suffix(".png"))
    print(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
