"""What each form of a call costs beside the plain one: ``python -m benchmarks.forms [--out NAME] …``

Forms are eager, compiled and transformed calls, and calls with lengths, resets or all cell states. Sides of one
comparison take turns in one process; the first side is the plain one, which the others are compared with.
"""

import argparse
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import pyrnnfast

from . import record
from .timing import Watch, thread_count, turn_by_turn, undisturbed

Sides = Mapping[str, Callable[[], object]]
SAMPLES = 16


def _step(module: Any, x: Tensor, **extras: Any) -> object:
    y = module(x, **extras)[0]
    return torch.autograd.grad(y, [x, *module.parameters()], torch.ones_like(y))


def _infer(module: Any, x: Tensor, **extras: Any) -> object:
    with torch.no_grad():
        return module(x, **extras)


def forms_of_a_call(steps: int, batch: int, size: int) -> dict[str, Sides]:
    """Eager, compiled, and the operators by themselves."""
    module = pyrnnfast.LSTM(size, size)
    compiled = torch.compile(module, fullgraph=True)
    x = torch.randn(steps, batch, size)
    leaf = x.clone().requires_grad_()
    weights = [p.detach() for p in module.parameters()]
    operator = partial(torch.ops.pyrnnfast.layer, "lstm", x, None, None, None, weights, 1, False, False)
    grad = torch.func.grad(lambda x: module(x)[0].sum())
    sizes = f"LSTM {steps},{batch},{size},{size}"
    return {
        f"{sizes} inference": {
            "eager": partial(_infer, module, x),
            "operator": operator,
            "compiled": partial(_infer, compiled, x),
        },
        f"{sizes} training": {
            "eager": partial(_step, module, leaf),
            "compiled": partial(_step, compiled, leaf),
        },
        f"{sizes} gradient of x": {
            "eager": lambda: torch.autograd.grad(module(leaf)[0].sum(), leaf),
            "torch.func.grad": lambda: grad(x),
        },
    }


def transforms(name: str, steps: int, size: int) -> dict[str, Sides]:
    """vmap against a loop."""
    module = getattr(pyrnnfast, name)(size, size)
    parameters = {key: p.detach() for key, p in module.named_parameters()}
    members = {key: torch.stack([p] * SAMPLES) for key, p in parameters.items()}
    xs = torch.randn(SAMPLES, steps, 1, size)

    def call(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        y: Tensor = torch.func.functional_call(module, parameters, (x,))[0]
        return y.sum()

    grad = torch.func.grad(call)
    mapped, each, ensemble = (
        torch.func.vmap(call, (None, 0)),
        torch.func.vmap(grad, (None, 0)),
        torch.func.vmap(call, (0, None)),
    )

    def ours(x: Tensor) -> object:
        return torch.autograd.grad(module(x)[0].sum(), list(module.parameters()))

    sizes = f"{name} {steps},1,{size},{size} × {SAMPLES}"
    return {
        f"{sizes} inputs": {
            "loop": lambda: [_infer(module, x) for x in xs],
            "vmap": lambda: mapped(parameters, xs),
        },
        f"{sizes} gradients of each sample": {
            "loop": lambda: [ours(x) for x in xs],
            "vmap(grad)": lambda: each(parameters, xs),
        },
        f"{sizes} members of an ensemble": {
            "loop": lambda: [call({k: p[i] for k, p in members.items()}, xs[0]) for i in range(SAMPLES)],
            "vmap": lambda: ensemble(members, xs[0]),
        },
    }


def extras(steps: int, batch: int, size: int) -> dict[str, Sides]:
    """lengths, reset and cell_states against the plain call, and against what torch.nn has for it."""
    module, stock = pyrnnfast.LSTM(size, size), torch.nn.LSTM(size, size)
    with_cells = pyrnnfast.LSTM(size, size, cell_states=True)
    cell = torch.nn.LSTMCell(size, size)
    x = torch.randn(steps, batch, size, requires_grad=True)
    full, ragged = torch.full((batch,), steps), torch.linspace(1, steps, batch).long()
    reset = torch.rand(steps, batch) < 0.02

    def packed(layer: Any) -> object:
        y, _ = layer(pack_padded_sequence(x, ragged, enforce_sorted=False))
        output = pad_packed_sequence(y, total_length=steps)[0]
        return torch.autograd.grad(output, [x, *layer.parameters()], torch.ones_like(output))

    def stepwise(with_reset: bool) -> object:
        h = c = torch.zeros(batch, size)
        outputs = []
        for t in range(steps):
            if with_reset:
                keep = ~reset[t, :, None]
                h, c = h * keep, c * keep
            h, c = cell(x[t], (h, c))
            outputs.append(h)
        y = torch.stack(outputs)
        return torch.autograd.grad(y, [x, *cell.parameters()], torch.ones_like(y))

    sizes = f"LSTM {steps},{batch},{size},{size} training"
    return {
        f"{sizes}, lengths": {
            "plain": partial(_step, module, x),
            "lengths, all full": partial(_step, module, x, lengths=full),
            "lengths, half of the steps": partial(_step, module, x, lengths=ragged),
            "packed and padded again": partial(packed, module),
            "torch.nn, packed and padded again": partial(packed, stock),
        },
        f"{sizes}, reset before 2 % of the steps": {
            "plain": partial(_step, module, x),
            "reset": partial(_step, module, x, reset=reset),
            "torch.nn.LSTMCell, step by step": partial(stepwise, True),
        },
        f"{sizes}, all cell states": {
            "plain": partial(_step, module, x),
            "cell_states": partial(_step, with_cells, x),
            "torch.nn.LSTMCell, step by step": partial(stepwise, False),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each comparison")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", help="write benchmarks/results/NAME.json")
    options = parser.parse_args()
    pyrnnfast.enable_compile()
    found = []
    watch = Watch(options.threads)
    with thread_count(options.threads):
        comparisons = forms_of_a_call(1, 1, 128) | forms_of_a_call(100, 32, 256)
        comparisons |= transforms("LSTM", 50, 128) | transforms("GRU", 50, 128)
        comparisons |= extras(200, 32, 64) | extras(128, 16, 256)
        for name, sides in comparisons.items():
            measure = partial(turn_by_turn, sides, options.seconds)
            times, disturbed = undisturbed(measure, options.threads, watch)
            plain = next(iter(times.medians.values()))
            for side, seconds in times.medians.items():
                print(f"{name:55} {side:36} {1e3 * seconds:10.4f} ms  × {seconds / plain:.2f}", flush=True)
                found.append({"name": name, "side": side, "ms": 1e3 * seconds, "disturbed": disturbed})
    if options.out:
        settings = {"seconds": options.seconds, "threads": options.threads}
        print(record.save(options.out, record.origin(settings) | {"forms": found}))


if __name__ == "__main__":
    main()
