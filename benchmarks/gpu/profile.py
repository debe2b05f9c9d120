"""Where the time of our calls goes on the card: ``python -m benchmarks.gpu.profile [--cell lstm] [--dtype bf16] …``

For every shape and mode, a line of JSON: the host's time to issue a call, the card's time from end to end, and of each
kernel (cuBLAS's together) how often it ran and for how long; of the persistent ones also for each step. Beside the
host's time that of torch.nn's layer (cuDNN), and that of a differentiable function with the same operands which does
nothing: what is torch's own in it, and cannot be saved. No comparison; that is `bench`.
"""

import argparse
import itertools
import json
import re
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyrnnfast import cuda

from .rows import CELLS, KINDS, MODES, Row, Shape, Step, input_of, module, precision, step
from .timing import milliseconds

_CALLS = 5


def _name(kernel: str) -> str:
    """Short enough to read."""
    if match := re.search(r"sweep_kernel<.*?(Forward|Backward)Tail.*>, (?:\(int\))?(\d)>|(sweep_kernel)", kernel):
        return f"sweep {match[1]}, {match[2]} tiles" if match[1] else "sweep"
    if match := re.search(r"each_element<.*?(\w+)<", kernel.replace("pyrnnfast::", "").replace("<unnamed>::", "")):
        return f"each {match[1]}"
    return kernel.split("<")[0][:40] if kernel.startswith(("Mem", "void at::")) else "product"


class _Nothing(torch.autograd.Function):
    """y = nothing(y, x, *weights), and the gradients of x and the weights are x and the weights."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, *leaves: Tensor) -> Tensor:
        ctx.save_for_backward(*leaves)
        return y.detach()

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.saved_tensors


class DoesNothing(torch.nn.Module):
    """In the place of a layer, with its parameters."""

    def __init__(self, layer: torch.nn.Module, x: Any) -> None:
        super().__init__()
        self.weights, self.y = torch.nn.ParameterList(layer.parameters()), layer(x)[0].detach()

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (_Nothing.apply(self.y, x, *self.weights),)


def host_us(call: Step) -> float:
    """From an idle card."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    issued = []
    for _ in range(7):
        begin = time.perf_counter()
        call()
        issued.append(time.perf_counter() - begin)
        torch.cuda.synchronize()
    return round(sorted(issued)[3] * 1e6, 1)


def profile(row: Row, call: Step) -> dict[str, Any]:
    result: dict[str, Any] = {"host_us": host_us(call)}
    result["call_us"] = round(1e3 * milliseconds(call, 20), 1)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        for _ in range(_CALLS):
            call()
        torch.cuda.synchronize()
    kernels: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
    for event in found.events() or ():
        if str(event.device_type).endswith("CUDA"):
            kernels[_name(event.name)][0] += 1
            kernels[_name(event.name)][1] += event.device_time_total
    result["kernels_us"] = round(sum(us for _, us in kernels.values()) / _CALLS, 1)
    result["kernels"] = {
        name: [round(count / _CALLS, 1), round(us / _CALLS, 1)]
        for name, (count, us) in sorted(kernels.items(), key=lambda item: -item[1][1])
    }
    result["us_per_step"] = {
        name: round(us / _CALLS / row.shape[0], 3) for name, (_, us) in kernels.items() if name.startswith("sweep")
    }
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.profile", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--cell", choices=CELLS, action="append", help="default: all")
    parser.add_argument("--dtype", choices=KINDS, action="append", help="default: bf16")
    parser.add_argument("--mode", choices=MODES, action="append", help="default: both")
    parser.add_argument("--steps", type=int, default=128)
    parser.add_argument("--batch", type=int, action="append", help="default: 16")
    parser.add_argument("--hidden", type=int, action="append", help="default: 512")
    parser.add_argument("--path", default="persistent")
    options = parser.parse_args(arguments)
    for hidden, batch, kind, cell, mode in itertools.product(
        options.hidden or [512], options.batch or [16], options.dtype or ["bf16"], options.cell or CELLS, MODES
    ):
        if options.mode and mode not in options.mode:
            continue
        shape: Shape = (options.steps, batch, hidden, hidden)
        row = Row(cell, mode, shape, *KINDS[kind])
        with precision(row.tf32), torch.set_grad_enabled(mode == "training"), cuda.use(options.path):
            ours = module(row, True)
            x = input_of(row, next(ours.parameters()))
            found = profile(row, step(row, ours, x))
            stock = module(row, False)
            found["torch_host_us"] = host_us(step(row, stock, x))
            found["nothing_host_us"] = host_us(step(row, DoesNothing(stock, x), x))
            print(json.dumps({"row": str(row)} | found), flush=True)


if __name__ == "__main__":
    main()
