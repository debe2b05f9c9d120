"""Our layers against torch.nn's, from the same weights: ``python -m benchmarks [--cell lstm] [--out NAME] …``

Each row is verified before it is timed (same outputs, same gradients, `fused` by ``explain``, or the run fails). It is
shown beside torch's time, and beside the least that the machine could take (`limits`); what it misses is printed behind
it. With ``--out`` all of it goes to ``benchmarks/results/NAME.json``, for `benchmarks.table` and `benchmarks.plot`.
"""

import argparse
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict

import torch
from torch import Tensor

from pyrnnfast import _cpu

from . import record, rows, targets
from .limits import limit
from .machine import Machine
from .record import Entry
from .rows import Row, Step
from .timing import Times, Watch, thread_count, turn_by_turn, undisturbed

# What holds both sides to an older instruction set: the kernels, and torch's own, oneDNN's and MKL's.
HELD_TO = {
    "avx2": {
        "PYRNNFAST_ISA": "avx2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    }
}

# Units in the last place, of the largest value. In float32 they add up over steps and sums, which the two sides do in
# different orders; in narrow dtypes torch rounds every intermediate result of every step, and we do not.
TOLERANCE = {
    "float32": 2**10 * torch.finfo(torch.float32).eps,
    "bfloat16": 2**4 * torch.finfo(torch.bfloat16).eps,
    "float16": 2**4 * torch.finfo(torch.float16).eps,
}


def verify(row: Row, sides: Mapping[str, Step]) -> float:
    """The largest difference between ours and torch's, relative to the largest value; exits if it is no rounding."""
    worst = 0.0
    true = sides["torch"]()
    for name in ("ours", "torch_cell", "ours_float32"):
        for found, expected in zip(sides[name]() if name in sides else (), true, strict=name == "ours"):
            off = difference(found, expected)
            if not off <= TOLERANCE[row.dtype]:  # nor NaN
                raise SystemExit(f"{row}: {name} and torch differ by {off:.1e}; nothing timed")
            worst = max(worst, off)
    return worst


def difference(found: Tensor, expected: Tensor) -> float:
    """The largest one, relative to the largest value."""
    expected = expected.double()
    error = (found.double().view_as(expected) - expected).abs().max().item()
    # Not NaN where both are 0 everywhere, as a gradient of W_hh after a single step.
    return error / max(expected.abs().max().item(), 1e-30)


def run_row(row: Row, run: int, machine: Machine, watch: Watch, seconds: float, least: int) -> Entry:
    limit_ms = limit(row, machine) * 1e3
    with thread_count(row.threads), torch.set_grad_enabled(row.mode == "training"):
        try:
            sides = rows.sides(row)
        except rows.NotFused as reason:
            raise SystemExit(f"{row}: {reason}") from reason
        error = verify(row, sides)
        times, disturbed = undisturbed(lambda: turn_by_turn(sides, seconds, least), row.threads, watch)
    entry = _entry(row, run, times, limit_ms, error, disturbed)
    if row.threads > 1:
        entry["meeting_us"] = round(watch.met_in * 1e6, 3)
    return entry


def mark(entries: list[Entry], watches: Mapping[int, Watch]) -> None:
    """Those as disturbed that were timed before it was known how near cores may stand to each other."""
    for entry in entries:
        if "meeting_us" in entry and not watches[entry["threads"]].right(entry["meeting_us"] * 1e-6):
            entry["disturbed"] = True


def _entry(row: Row, run: int, times: Times, limit_ms: float, error: float, disturbed: bool) -> Entry:
    ms, first_ms = ({name: round(1e3 * value, 5) for name, value in t.items()} for t in (times.medians, times.first))
    entry: Entry = Entry(
        **(asdict(row) | {"shape": list(row.shape)}),  # type: ignore[typeddict-item]
        run=run,
        path="fused",
        ours_ms=ms["ours"],
        torch_ms=ms["torch"],
        limit_ms=round(limit_ms, 5),
        ours_first_ms=first_ms["ours"],
        torch_first_ms=first_ms["torch"],
        error=error,
        rounds=times.rounds,
        disturbed=disturbed,
    )
    if "torch_cell" in ms:
        entry["torch_cell_ms"] = ms["torch_cell"]
    if "ours_float32" in ms:
        entry["ours_float32_ms"] = ms["ours_float32"]
    batches = rows.dense_batches(row)
    if batches:
        # Each is the time of T steps of that batch.
        total = sum(steps * ms[f"dense_{batch}"] for batch, steps in batches.items())
        entry["dense_ms"] = round(total / row.shape[0], 5)
        entry["ours_beside_dense_ms"] = ms["ours_beside_dense"]
    return entry


_HEAD = (
    f"{'kind':10}{'cell':5}{'mode':10}{'T,B,I,H':>17}{'threads':>8}"
    f"{'torch ms':>11}{'ours ms':>11}{'limit ms':>11}{'× torch':>9}{'× limit':>9}"
)


def _line(e: Entry) -> str:
    sizes = ",".join(map(str, e["shape"]))
    text = (
        f"{e['kind']:10}{e['cell']:5}{e['mode']:10}{sizes:>17}{e['threads']:8}"
        f"{e['torch_ms']:11.4g}{e['ours_ms']:11.4g}{e['limit_ms']:11.4g}"
        f"{targets.ratio(e):9.2f}{targets.distance(e):9.2f}"
    )
    notes = [] if e["dtype"] == "float32" else [f"{e['dtype']}, our float32 {e['ours_float32_ms']:.4g} ms"]
    notes += [str(aim) for aim in targets.aims(e) if not aim.met]
    notes += ["disturbed"] if e["disturbed"] else []
    return text + "  " * bool(notes) + "; ".join(notes)


def _shape(text: str) -> rows.Shape:
    try:
        steps, batch, inputs, hidden = map(int, text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected T,B,I,H, got {text!r}") from None
    if min(steps, batch, inputs, hidden) < 1:
        raise argparse.ArgumentTypeError(f"expected four positive sizes, got {text!r}")
    return steps, batch, inputs, hidden


def add_filters(parser: argparse.ArgumentParser) -> None:
    """Options that choose rows, each of which may be given several times."""
    parser.add_argument("--cell", choices=rows.CELLS, action="append", help="default: all")
    parser.add_argument("--shape", type=_shape, action="append", help="T,B,I,H instead of the table's")
    parser.add_argument("--dtype", choices=rows.DTYPES, action="append", help="default: float32")


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=(__doc__ or "").splitlines()[0])
    add_filters(parser)
    parser.add_argument("--kind", choices=rows.KINDS, action="append", help="default: all; with --shape: layer")
    parser.add_argument("--mode", choices=rows.MODES, action="append", help="default: both")
    parser.add_argument("--threads", type=int, action="append", help="default: 1 and all")
    parser.add_argument("--seconds", type=float, help="of each row in each run; default: 0.75")
    parser.add_argument("--runs", type=int, help="times over all rows, of which the better one counts; default: 2")
    parser.add_argument("--quick", action="store_true", help="one short run, for a first look")
    parser.add_argument(
        "--apart",
        action="store_true",
        help="time rows of several threads while their cores stand apart, instead of near to each other",
    )
    parser.add_argument("--isa", choices=HELD_TO, help="hold both sides to this instruction set")
    parser.add_argument("--out", help="write benchmarks/results/NAME.json")
    options = parser.parse_args(arguments)
    options.seconds = options.seconds or (0.15 if options.quick else 0.75)
    options.runs = options.runs or (1 if options.quick else 2)
    options.least = 3 if options.quick else 5
    options.threads = options.threads or sorted({1, torch.get_num_threads()})
    options.cell, options.mode = options.cell or list(rows.CELLS), options.mode or rows.MODES
    options.dtype = options.dtype or ["float32"]
    options.kind = options.kind or (["layer"] if options.shape else rows.KINDS)
    return options


def _hold_to(isa: str, arguments: list[str]) -> None:
    """Starts again with the environment that holds both sides to it, as they read it when they are imported."""
    wanted = HELD_TO[isa]
    if any(os.environ.get(name) != value for name, value in wanted.items()):
        command = [sys.executable, "-m", "benchmarks", *arguments]
        os.execve(sys.executable, command, os.environ | wanted)


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    options = _options(arguments)
    if options.isa:
        _hold_to(options.isa, arguments)
    try:
        chosen = list(
            rows.table(options.kind, options.cell, options.mode, options.shape, options.threads, options.dtype)
        )
    except ValueError as error:
        raise SystemExit(str(error)) from error
    print(f"{record.processor()}, torch {torch.__version__}, instruction set {_cpu.instruction_set()}")
    machine, watches = Machine(), {n: Watch(n, options.apart) for n in options.threads}
    for n, dtype in sorted({(row.threads, row.dtype) for row in chosen}):
        print(f"peak of matrix products, {dtype}, {n} thread(s): {machine.peak(n, dtype) / 1e9:.0f} GFLOP/s")
    entries: list[Entry] = []
    for run in range(1, options.runs + 1):
        print(f"run {run} of {options.runs}\n{_HEAD}", flush=True)
        for row in chosen:
            entries.append(run_row(row, run, machine, watches[row.threads], options.seconds, options.least))
            print(_line(entries[-1]), flush=True)
    mark(entries, watches)
    print(*targets.summary(entries), sep="\n")
    for name in machine.disturbed:
        print(f"disturbed by other programs, so that limits may be too high: {name}")
    if options.out:
        settings = {
            "seconds": options.seconds,
            "runs": options.runs,
            "least_rounds": options.least,
            "threads": options.threads,
            "apart": options.apart,
            "environment": {name: os.environ[name] for name in HELD_TO["avx2"] if name in os.environ},
        }
        figures = {name: round(value, 4) for name, value in machine.measured.items()}
        found = {"measured": figures, "measured_disturbed": machine.disturbed, "rows": entries}
        record.save(options.out, record.origin(settings) | found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
