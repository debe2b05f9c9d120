"""Peak memory of a training step, ours and torch.nn's: ``python -m benchmarks.memory [--cell lstm] [--out NAME] …``

Each side runs in a process of its own, which makes a small step first, so that libraries and threads have set
themselves up; then the kernel's mark of the highest resident memory is reset, and what a step adds to it is the peak.
That counts everything: torch's tensors, oneDNN's and MKL's buffers and the kernels' own, which torch's profiler does
not see. The last part tells whether a cache grows with the shapes: it runs our step on more and more shapes, none of
them larger than the first.
"""

import argparse
import ctypes
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from . import record, rows
from .__main__ import add_filters
from .rows import Row

_SIDES = ("ours", "torch")

# A smaller difference says nothing: the heap grows by 128 KB at a time, and code is read in as it is first used.
_GRANULARITY = 256 << 10


def _resident(what: str) -> int:
    """``VmRSS``, the bytes in memory now, or ``VmHWM``, the most since the mark was reset."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(what):
            return int(line.split()[1]) << 10
    raise OSError(f"no {what} in /proc/self/status")


def _settle() -> int:
    """Gives free memory back and resets the mark; returns the bytes in memory."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _resident("VmRSS")


def _step(row: Row, side: str) -> rows.Step:
    return rows.step(row, rows.module(row, ours=side == "ours"))


def peak_here(row: Row, side: str) -> int:
    """Bytes that one training step adds, in this process, which should be a fresh one."""
    _step(replace(row, shape=(4, 4, 64, 64)), side)()
    step = _step(row, side)
    before = _settle()
    gradients = step()  # kept, as for an optimizer
    after = _resident("VmHWM")
    del gradients
    return after - before


def growth_here(cell: str) -> int:
    """Bytes by which this process grows while our step sees 300 new shapes, after a few."""

    def see(shapes: Sequence[rows.Shape]) -> None:
        for shape in shapes:
            _step(Row("layer", cell, "training", shape, 1), "ours")()

    shapes = [
        (steps, batch, 64, hidden) for hidden in (128, 100, 72) for batch in range(1, 11) for steps in range(1, 12)
    ]
    see([(12, 12, 64, 128), *shapes[::11]])
    before = _settle()
    see(shapes)
    ctypes.CDLL(None).malloc_trim(0)
    return _resident("VmRSS") - before


def _elsewhere(*arguments: str) -> int:
    """The number that this module prints with these arguments, in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.memory", *arguments]
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def _peak_elsewhere(row: Row, side: str) -> int:
    shape = ",".join(map(str, row.shape))
    return _elsewhere("--side", side, "--cell", row.cell, "--shape", shape, "--dtype", row.dtype)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=(__doc__ or "").splitlines()[0])
    add_filters(parser)
    parser.add_argument("--out", help="write benchmarks/results/NAME.json")
    parser.add_argument("--side", choices=(*_SIDES, "growth"), help=argparse.SUPPRESS)  # what a process of a side runs
    options = parser.parse_args(arguments)
    cells, dtypes = options.cell or list(rows.CELLS), options.dtype or ["float32"]
    chosen = list(rows.table(["layer"], cells, ["training"], options.shape, [torch.get_num_threads()], dtypes))
    if options.side:
        print(growth_here(cells[0]) if options.side == "growth" else peak_here(chosen[0], options.side))
        return 0
    print(f"{'cell':5}{'T,B,I,H':>17}{'dtype':>10}{'torch MB':>10}{'ours MB':>10}{'ours/torch':>12}")
    entries = []
    for row in chosen:
        ours, stock = (_peak_elsewhere(row, side) for side in _SIDES)
        sizes = ",".join(map(str, row.shape))
        note = "  more than torch" if ours > stock + _GRANULARITY else ""
        megabytes = f"{stock / 1e6:10.2f}{ours / 1e6:10.2f}{ours / max(stock, 1):12.2f}"
        print(f"{row.cell:5}{sizes:>17}{row.dtype:>10}{megabytes}{note}", flush=True)
        entries.append(
            {"cell": row.cell, "shape": list(row.shape), "dtype": row.dtype, "ours_bytes": ours, "torch_bytes": stock}
        )
    growth = {cell: _elsewhere("--side", "growth", "--cell", cell) for cell in cells}
    for cell, grown in growth.items():
        print(f"{cell}: {grown / 1e6:.2f} MB more after 330 shapes")
    if options.out:
        record.save(
            options.out, record.origin({"threads": torch.get_num_threads()}) | {"rows": entries, "growth_bytes": growth}
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
