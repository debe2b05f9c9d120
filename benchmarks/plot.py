"""Draws recorded results: ``python -m benchmarks.plot NAME`` makes ``benchmarks/results/NAME.png`` of ``NAME.json``.

Above, torch's time over ours; below, ours over the limit: for each shape of one layer a bar for each number of threads.
"""

import sys
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from . import record, targets
from .rows import CELLS, MODES
from .targets import Judged

_COLOURS = ("#4c78a8", "#f58518", "#54a24b")
# Of our time over the limit: a single step is so far from it that its bars would take the room of all others.
_WIDEST = 5
_COLUMNS = [(cell, mode) for cell in CELLS for mode in MODES]


def _bars(axes: Axes, rows: list[Judged], shapes: list[tuple[int, ...]], threads: list[int], distance: bool) -> None:
    """One panel: bars from 1, as on a logarithmic scale a bar that points to the left of it is a loss."""
    height = 0.8 / len(threads)
    for k, n in enumerate(threads):
        mine = [j for j in rows if j.entry["threads"] == n]
        values = [j.distance if distance else j.ratio for j in mine]
        places = [shapes.index(tuple(j.entry["shape"])) + (k - (len(threads) - 1) / 2) * height for j in mine]
        axes.barh(
            places,
            [value - 1 for value in values],
            height,
            left=1,
            color=_COLOURS[k % len(_COLOURS)],
            label=f"{n} thread{'s' * (n > 1)}",
        )
        for place, value in zip(places, values, strict=True):
            axes.annotate(
                f"{value:.1f}" if value >= 10 else f"{value:.2f}",
                (min(max(value, 1), _WIDEST) if distance else max(value, 1), place),
                xytext=(-2 if distance and value > _WIDEST else 2, 0),
                textcoords="offset points",
                ha="right" if distance and value > _WIDEST else "left",
                va="center",
                fontsize=5.5,
            )
    axes.axvline(1, color="black", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)


def draw(rows: list[Judged], title: str, path: Path) -> None:
    """Args: rows: those of one layer in float32 are drawn."""
    rows = [j for j in rows if j.entry["kind"] == "layer" and j.entry["dtype"] == "float32"]
    shapes = list(dict.fromkeys(tuple(j.entry["shape"]) for j in rows))
    threads = sorted({j.entry["threads"] for j in rows})
    figure = Figure(figsize=(14, 9), layout="constrained")
    grid = figure.subplots(2, len(_COLUMNS), sharey=True, sharex="row", squeeze=False)
    for line, what in enumerate(("torch's time over ours", "our time over the limit")):
        for axes, (cell, mode) in zip(grid[line], _COLUMNS, strict=True):
            mine = [j for j in rows if (j.entry["cell"], j.entry["mode"]) == (cell, mode)]
            _bars(axes, mine, shapes, threads, distance=line == 1)
            axes.set_xscale("log")
            axes.set_xlabel(what, fontsize=8)
            axes.set_title(f"{cell.upper()} {mode}", fontsize=10)
            axes.tick_params(labelsize=7)
        for axes in grid[line]:
            axes.set_xticks([0.5, 1, 2, 5, 10, 20] if line == 0 else [1, 1.5, 2, 3, 4])
            axes.margins(x=0.15)  # for the numbers
            axes.xaxis.set_major_formatter(matplotlib.ticker.StrMethodFormatter("{x:g}"))
            axes.xaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
            if line == 1:
                axes.set_xlim(0.7, _WIDEST)
    grid[0, 0].set_yticks(range(len(shapes)), [",".join(map(str, shape)) for shape in shapes])
    grid[0, 0].invert_yaxis()
    for line in range(2):
        grid[line, 0].set_ylabel("T,B,I,H", fontsize=8)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=len(labels), fontsize=8)
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=100)


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print("usage: python -m benchmarks.plot NAME", file=sys.stderr)
        return 2
    name = arguments[0]
    recorded = record.load(name)
    machine, versions = recorded["machine"], recorded["versions"]
    title = f"{machine['processor']}, {machine['instruction_set']}, torch {versions['torch']}, {recorded['date']}"
    draw(targets.judge(recorded["rows"]), title, record.RESULTS / f"{name}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
