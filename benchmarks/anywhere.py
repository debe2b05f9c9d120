"""Random calls, so that nobody has picked the shapes: ``python -m benchmarks.anywhere [--calls 1000] [--out NAME] …``

Cells, sizes, layers, directions, projections, layouts, packed and unbatched input, states, dtypes and threads are drawn
from a seed. Each call is verified against torch.nn's and then timed turn by turn with it, as the rows of ``python -m
benchmarks`` are; one that loses is timed once more, for longer, and the better time counts.
"""

import argparse
import copy
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import pyrnnfast

from . import __main__, record
from .__main__ import difference
from .rows import CELLS, MODES
from .rows import DTYPES as TABLE_DTYPES
from .targets import LEAST, mean
from .timing import Watch, thread_count, turn_by_turn, undisturbed

DTYPES = TABLE_DTYPES | {"float64": torch.float64}

# As of one layer, but for narrow dtypes, which torch rounds at every step of up to three.
TOLERANCE = {name: (1 if name == "float32" else 2) * value for name, value in __main__.TOLERANCE.items()}
TOLERANCE["float64"] = 2**10 * torch.finfo(torch.float64).eps

MOST_OPERATIONS = 5e9  # of a call's products: longer ones are bound by what `python -m benchmarks` measures


@dataclass(frozen=True)
class Call:
    cell: str
    mode: str
    form: str  # "batch", "packed" or "unbatched"
    shape: tuple[int, int, int, int]  # T, B, I, H
    dtype: str
    threads: int
    state: bool
    options: dict[str, Any] = field(default_factory=dict)  # of the module

    @property
    def operations(self) -> float:
        steps, batch, inputs, hidden = self.shape
        runs = self.options["num_layers"] * (2 if self.options["bidirectional"] else 1)
        return float(8 * steps * batch * hidden * (hidden + inputs) * runs)


def draw(seed: int, threads: int) -> Iterator[Call]:
    """Calls without end."""
    rng = random.Random(seed)

    def size(low: int, high: int) -> int:
        return round(math.exp(rng.uniform(math.log(low), math.log(high))))

    while True:
        form = rng.choice(["batch", "batch", "batch", "packed", "unbatched"])
        hidden = size(1, 1100)
        batch = 1 if form == "unbatched" else size(1, 200)
        call = Call(
            rng.choice(list(CELLS)),
            rng.choice(MODES),
            form,
            (size(1, 500), batch, rng.choice([hidden, size(1, 1100)]), hidden),
            rng.choice(["float32"] * 5 + ["float64", "bfloat16", "float16"]),
            rng.choice([1, threads]),
            rng.random() < 0.3,
            {
                "num_layers": rng.choice([1, 1, 2, 3]),
                "bidirectional": rng.random() < 0.3,
                "batch_first": rng.random() < 0.5,
                "bias": rng.random() < 0.9,
            },
        )
        if call.cell == "lstm" and hidden > 1 and rng.random() < 0.2:
            call.options["proj_size"] = min(size(1, hidden), hidden - 1)
        if call.operations <= MOST_OPERATIONS:
            yield call


def sides(call: Call) -> dict[str, Callable[[], list[Tensor]]]:
    """The call on both modules: outputs, and in training the gradients of weights and input.

    ``true``, of narrow dtypes: torch.nn's in float32, with the same weights and data. In its own it adds up gradients
    of biases step by step, rounded each time: over 469 steps of bfloat16 it was off by a third.
    """
    torch.manual_seed(0)
    steps, batch, inputs, hidden = call.shape
    dtype, packed = DTYPES[call.dtype], call.form == "packed"
    stock = CELLS[call.cell](inputs, hidden, **call.options).to(dtype)
    ours = pyrnnfast.replace(copy.deepcopy(stock))
    lead = (steps,) if call.form == "unbatched" else (batch, steps) if call.options["batch_first"] else (steps, batch)
    x: Any = torch.randn(*lead, inputs).to(dtype)
    if packed:
        lengths = torch.randint(1, steps + 1, (batch,))
        lengths[0] = steps
        x = pack_padded_sequence(x, lengths, batch_first=call.options["batch_first"], enforce_sorted=False)
    runs = call.options["num_layers"] * (2 if call.options["bidirectional"] else 1)
    of_state = (runs,) if call.form == "unbatched" else (runs, batch)
    widths = call.options.get("proj_size", hidden), hidden
    states = [torch.randn(*of_state, width).tanh().to(dtype) for width in widths]

    def given(states: list[Tensor]) -> Any:
        return None if not call.state else tuple(states) if call.cell == "lstm" else states[0]

    state = given(states)
    data = x.data if packed else x
    found = pyrnnfast.explain(ours, x, state)
    if found.path != "fused":
        raise SystemExit(f"{call}: not fused but {found}")
    if call.mode == "training":
        data.requires_grad_()

    def run(module: torch.nn.Module, x: Any, state: Any) -> list[Tensor]:
        y = module(x, state)[0]
        rows = y.data if isinstance(y, PackedSequence) else y
        if call.mode == "inference":
            return [rows]
        leaves = [x.data if packed else x, *module.parameters()]
        gradients = torch.autograd.grad(rows, leaves, torch.ones_like(rows))
        return [rows.detach(), *gradients]

    result: dict[str, Callable[[], list[Tensor]]] = {
        "ours": partial(run, ours, x, state),
        "torch": partial(run, stock, x, state),
    }
    if dtype.itemsize < 4:
        wide = given([s.float() for s in states])
        result["true"] = partial(run, copy.deepcopy(stock).float(), x.to(torch.float32), wide)
    return result


def verify(call: Call, both: dict[str, Callable[[], list[Tensor]]]) -> None:
    """Exits where the two sides differ by more than rounding; ``true`` is gone then."""
    for found, expected in zip(both["ours"](), both.pop("true", both["torch"])(), strict=True):
        error = difference(found, expected)
        if not error <= TOLERANCE[call.dtype]:  # nor NaN
            raise SystemExit(f"{call}: ours and torch differ by {error:.1e}; nothing timed")


def measure(call: Call, watch: Watch, seconds: float) -> dict[str, Any]:
    """One entry of the record."""
    with thread_count(call.threads), torch.set_grad_enabled(call.mode == "training"):
        both = sides(call)
        verify(call, both)
        best: dict[str, float] = {}
        disturbed = False
        for factor in (1, 3):
            times, disturbed = undisturbed(partial(turn_by_turn, both, factor * seconds), call.threads, watch)
            now = times.medians
            if not best or now["torch"] / now["ours"] > best["torch"] / best["ours"]:
                best = now
            if best["torch"] >= best["ours"]:
                break
    ms = {f"{name}_ms": round(1e3 * value, 5) for name, value in best.items()}
    return asdict(call) | ms | {"disturbed": disturbed}


def ratio(entry: dict[str, Any]) -> float:
    found: float = entry["torch_ms"] / entry["ours_ms"]
    return found


def summary(entries: list[dict[str, Any]]) -> Iterator[str]:
    """How many lose, by how much the others win, and the lowest ones."""
    slower = [e for e in entries if ratio(e) < 1]
    low = [e for e in entries if ratio(e) < LEAST]
    yield f"{len(entries)} calls, {len(slower)} slower than torch.nn, {len(low)} of them below {LEAST} of its speed"
    for cell in CELLS:
        for mode in MODES:
            some = [ratio(e) for e in entries if (e["cell"], e["mode"]) == (cell, mode)]
            if some:
                yield f"{cell:5}{mode:10}{len(some):5} calls, geometric mean of × torch {mean(some):.2f}"
    for e in sorted(entries, key=ratio)[:10]:
        options = ", ".join(f"{name}={value}" for name, value in e["options"].items())
        yield (
            f"× {ratio(e):.2f}  {e['ours_ms']:.4g} ms  {e['cell']} {e['mode']} {e['form']} {tuple(e['shape'])} "
            f"{e['dtype']}, {e['threads']} thread(s), {options}{', state' if e['state'] else ''}"
        )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.anywhere", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--calls", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=0.2, help="of each call")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="or one, by chance")
    parser.add_argument("--out", help="write benchmarks/results/NAME.json")
    options = parser.parse_args(arguments)
    calls = draw(options.seed, options.threads)
    watches = {n: Watch(n) for n in {1, options.threads}}
    entries = [measure(call, watches[call.threads], options.seconds) for call in islice(calls, options.calls)]
    print(*summary(entries), sep="\n")
    if options.out:
        settings = {name: getattr(options, name) for name in ("calls", "seed", "seconds", "threads")}
        print(record.save(options.out, record.origin(settings) | {"calls": entries}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
