"""Inference, ours against ONNX Runtime, with which many serve: ``python -m benchmarks.served [--out NAME] …``

The ten shapes of the main table, float32. ONNX Runtime has packed the weights when it loaded them; ours are torch's
parameters, packed anew in each call, or, with ``prepack``, once. Its threads go on looking for work for a while when
they have done theirs, as torch's do, so each side has a process of its own, and they take turns of some tenths of a
second.
"""

import argparse
import statistics
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor

from . import record, rows, targets
from .__main__ import TOLERANCE, add_filters, difference
from .processes import Workers, by_turns, setting, work
from .rows import Row, Step
from .timing import Watch

SIDES = ("ours", "prepacked", "onnxruntime")

# Where torch's gates stand in ONNX's order: i o f c, and z r n.
GATES = {"lstm": [0, 3, 1, 2], "gru": [1, 0, 2], "rnn": [0]}


def graph(row: Row, module: torch.nn.Module) -> onnx.ModelProto:
    """One node, the row's layer; from x to y and the final states."""
    hidden = row.shape[3]

    def in_order(weight: Tensor) -> Any:
        gates = weight.detach().numpy().reshape(len(GATES[row.cell]), hidden, -1)
        return np.ascontiguousarray(gates[GATES[row.cell]].reshape(weight.shape))

    weights = {name: in_order(weight) for name, weight in module.named_parameters()}
    constants = {
        "W": weights["weight_ih_l0"][None],
        "R": weights["weight_hh_l0"][None],
        "B": np.concatenate([weights["bias_ih_l0"], weights["bias_hh_l0"]])[None],
    }
    outputs = ["Y", "Y_h", "Y_c"] if row.cell == "lstm" else ["Y", "Y_h"]
    options: dict[str, Any] = {"linear_before_reset": 1} if row.cell == "gru" else {}
    node = onnx.helper.make_node(row.cell.upper(), ["X", "W", "R", "B"], outputs, hidden_size=hidden, **options)
    value = onnx.helper.make_tensor_value_info
    whole = onnx.helper.make_graph(
        [node],
        str(row),
        [value("X", onnx.TensorProto.FLOAT, row.shape[:3])],
        [value(name, onnx.TensorProto.FLOAT, None) for name in outputs],
        [onnx.numpy_helper.from_array(constant, name) for name, constant in constants.items()],
    )
    return onnx.helper.make_model(whole, opset_imports=[onnx.helper.make_opsetid("", 22)], ir_version=10)


def step(row: Row, side: str) -> Step:
    """The row's call, on the threads that it says."""
    if side != "onnxruntime":
        return rows.our_step(row, prepacked=side == "prepacked")
    module = rows.module(row, ours=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = row.threads
    session = onnxruntime.InferenceSession(
        graph(row, module).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    x = rows.input_of(row)
    assert isinstance(x, Tensor)
    operands = {"X": x.numpy()}

    def run() -> list[Tensor]:
        y, *states = session.run(None, operands)
        return [torch.from_numpy(y[:, 0]), *map(torch.from_numpy, states)]

    return run


def measure(row: Row, seconds: float, rounds: int, watch: Watch) -> dict[str, Any]:
    """Milliseconds of a call of each side, and whether it was disturbed to the last."""
    with setting(row):
        true = step(row, "onnxruntime")()
        for side in SIDES[:2]:
            call = step(row, side)
            results = [call() for _ in range(3)]  # of which the second packs
            for found, expected in zip(results[-1], true, strict=True):
                if not difference(found, expected) <= TOLERANCE["float32"]:
                    raise SystemExit(f"{row}: {side} differs from ONNX Runtime's; nothing timed")
    with ExitStack() as until:
        sides = {side: Workers("benchmarks.served", row, side, 1, until) for side in SIDES}
        for _ in range(3):
            ready = watch.wait()
            calls = by_turns(sides, seconds, rounds)
            disturbed = not (ready and watch.all_is_well())
            if not disturbed or watch.patience <= 0:
                break
    return {f"{side}_ms": 1e3 / statistics.median(calls[side]) for side in SIDES} | {"disturbed": disturbed}


def table(chosen: list[Row], seconds: float, rounds: int) -> Iterator[dict[str, Any]]:
    watches = {threads: Watch(threads) for threads in {row.threads for row in chosen}}
    for row in chosen:
        found = measure(row, seconds, rounds, watches[row.threads])
        sizes = ",".join(map(str, row.shape))
        name = f"{row.cell:5}{sizes:>17}, {row.threads} thread(s)"
        ratios = [found["onnxruntime_ms"] / found[f"{side}_ms"] for side in SIDES[:2]]
        print(
            f"{name} {found['ours_ms']:9.3f} ms  ONNX Runtime {ratios[0]:5.2f} times as long"
            f"; prepacked {found['prepacked_ms']:9.3f} ms, {ratios[1]:5.2f}",
            flush=True,
        )
        yield {"cell": row.cell, "shape": list(row.shape), "threads": row.threads, **found}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.served", description=(__doc__ or "").splitlines()[0])
    add_filters(parser)
    parser.add_argument("--mode", choices=("inference",), default="inference", help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, action="append", help="default: 1 and all")
    parser.add_argument("--seconds", type=float, default=0.2, help="of a turn of each side")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each side")
    parser.add_argument("--out", help="write benchmarks/results/NAME.json")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)  # what a process of a side runs
    options = parser.parse_args(arguments)
    if options.dtype not in (None, ["float32"]):
        parser.error("ONNX Runtime has no other dtype than float32 here")
    threads = options.threads or sorted({1, torch.get_num_threads()})
    cells = options.cell or list(rows.CELLS)
    chosen = list(rows.table(["layer"], cells, ["inference"], options.shape, threads, ["float32"]))
    if options.side:
        work(chosen[0], step(chosen[0], options.side))
        return 0
    found = list(table(chosen, options.seconds, options.rounds))
    for cell in cells:
        own = [e for e in found if e["cell"] == cell]
        ours, prepacked = (targets.mean(e["onnxruntime_ms"] / e[f"{side}_ms"] for e in own) for side in SIDES[:2])
        print(f"{cell}: ONNX Runtime takes {ours:.2f} times as long, prepacked {prepacked:.2f}, geometric means")
    if options.out:
        settings = {"seconds": options.seconds, "rounds": options.rounds, "threads": threads}
        versions = {"onnxruntime": onnxruntime.__version__}
        print(record.save(options.out, record.origin(settings) | versions | {"rows": found}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
