"""Our layers against torch.nn's, from the same weights: ``python -m benchmarks [--cell lstm] [--out NAME] …``

Each row is verified before it is timed (same outputs, same gradients, `fused` by ``explain``), and rows that lose are
printed like the rest. With ``--out`` the rows also go to ``benchmarks/results/NAME.json``.
"""

import argparse
import copy
import datetime
import json
import math
import platform
import sys
from collections.abc import Callable
from pathlib import Path

import torch

import pyrnnfast
from pyrnnfast import _cpu

from .timing import compare

SHAPES = [
    # T, B, I, H
    (1, 1, 128, 128),
    (100, 1, 128, 128),
    (100, 1, 512, 512),
    (100, 16, 128, 128),
    (100, 32, 256, 256),
    (100, 64, 512, 512),
    (50, 64, 1024, 1024),
    (1000, 1, 256, 256),
    (1000, 8, 64, 64),
    (500, 128, 64, 64),
]
CELLS = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU, "rnn": torch.nn.RNN}
MODES = ("inference", "training")
RESULTS = Path(__file__).parent / "results"


def _steps(module: torch.nn.Module, x: torch.Tensor, mode: str) -> Callable[[], list[torch.Tensor]]:
    """One call of ``module``: outputs, or a training step's outputs and gradients (of parameters and input)."""

    def inference() -> list[torch.Tensor]:
        with torch.no_grad():
            return [module(x)[0]]

    leaf = x.clone().requires_grad_()

    def training() -> list[torch.Tensor]:
        y = module(leaf)[0]
        return [y.detach(), *torch.autograd.grad(y, [leaf, *module.parameters()], torch.ones_like(y))]

    return inference if mode == "inference" else training


def _verify(row: str, ours: list[torch.Tensor], stock: list[torch.Tensor]) -> None:
    for a, b in zip(ours, stock, strict=True):
        error = (a - b).abs().max().item() / max(1.0, b.abs().max().item())
        if not error < 1e-3:
            raise SystemExit(f"{row}: ours and torch differ by {error:.1e}; nothing timed")


def run_row(cell: str, mode: str, shape: tuple[int, int, int, int], threads: int, seconds: float) -> dict[str, object]:
    T, B, I, H = shape
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    stock = CELLS[cell](I, H)
    ours = pyrnnfast.replace(copy.deepcopy(stock))
    x = torch.randn(T, B, I)
    path = pyrnnfast.explain(ours, x)
    if path.path != "fused":
        raise SystemExit(f"{cell} {shape}: not fused but {path}")
    ours_step, stock_step = _steps(ours, x, mode), _steps(stock, x, mode)
    _verify(f"{cell} {mode} {shape}", ours_step(), stock_step())
    pair = compare(ours_step, stock_step, seconds)
    return {
        "cell": cell,
        "mode": mode,
        "shape": list(shape),
        "threads": threads,
        "dtype": "float32",
        "path": path.path,
        "ours_ms": round(pair.ours_ms, 4),
        "torch_ms": round(pair.torch_ms, 4),
        "rounds": pair.rounds,
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.processor()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument("--cell", choices=CELLS, action="append", help="default: all")
    parser.add_argument("--mode", choices=MODES, action="append", help="default: both")
    parser.add_argument("--threads", type=int, action="append", help="default: 1 and all")
    parser.add_argument("--shape", action="append", help="T,B,I,H; default: the ten of the table")
    parser.add_argument("--seconds", type=float, default=1.5, help="of each row")
    parser.add_argument("--out", help="write benchmarks/results/NAME.json")
    options = parser.parse_args(arguments)
    shapes = [tuple(map(int, s.split(","))) for s in options.shape] if options.shape else SHAPES
    threads = options.threads or sorted({1, torch.get_num_threads()})

    print(f"{_processor()}, torch {torch.__version__}, instruction set {_cpu.instruction_set()}")
    print(f"{'cell':5}{'mode':11}{'T,B,I,H':>20}{'threads':>9}{'torch ms':>11}{'ours ms':>11}{'torch/ours':>12}")
    rows: list[dict[str, object]] = []
    logs: dict[tuple[str, str], list[float]] = {}
    for cell in options.cell or CELLS:
        for mode in options.mode or MODES:
            for shape in shapes:
                for n in threads:
                    row = run_row(cell, mode, shape, n, options.seconds)  # type: ignore[arg-type]
                    rows.append(row)
                    ratio = row["torch_ms"] / row["ours_ms"]  # type: ignore[operator]
                    logs.setdefault((cell, mode), []).append(math.log(ratio))
                    text = ",".join(map(str, shape))
                    print(
                        f"{cell:5}{mode:11}{text:>20}{n:9}{row['torch_ms']:11.3f}{row['ours_ms']:11.3f}{ratio:12.2f}"
                        f"{'   behind torch' if ratio < 1 else ''}",
                        flush=True,
                    )
    for (cell, mode), values in logs.items():
        print(f"geometric mean, {cell} {mode}: {math.exp(sum(values) / len(values)):.2f}")
    if options.out:
        RESULTS.mkdir(exist_ok=True)
        record = {
            "machine": _processor(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "pyrnnfast": pyrnnfast.__version__,
            "instruction_set": _cpu.instruction_set(),
            "date": datetime.date.today().isoformat(),
            "rows": rows,
        }
        (RESULTS / f"{options.out}.json").write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
