"""Which road a call takes: our kernels, the reference, or torch's own layers.

On the CPU that is whatever the kernels serve (obstacles.py); on CUDA it is a choice by what was measured (cuda.py).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from . import amp, cuda, obstacles, passes, transforms
from .choices import FUSED, Problem
from .layers import Extras
from .obstacles import Spec


def device_type(weights: Sequence[Any]) -> str:
    """Whose autocast and whose kernels a call is for: "cuda" or "cpu"."""
    first = weights[0] if weights else None
    return "cuda" if isinstance(first, Tensor) and cuda.takes(first) else "cpu"


def road(
    device: str, spec: Spec, form: str, input: Any, hx: Any, weights: Sequence[Tensor], extras: Extras
) -> cuda.Choice:
    """Of a call that may be wrong in any way yet: ours, the reference, or torch's.

    Raises:
        ValueError: as :func:`pyrnnfast.obstacles.check_packed`, on CUDA, where packed input may go to torch unseen
    """
    if form == "transforms":
        if not transforms.on_kernels():
            return cuda.Choice("reference", "derivatives that the kernels do not have")
        if extras.given or isinstance(input, PackedSequence):
            return cuda.Choice("reference", "no kernel transforms sequences of different lengths")
        if spec.proj_size:
            return cuda.Choice("reference", "no kernel transforms layers with projections")
    if device == "cpu":
        return cuda.Choice(FUSED, "served by pyrnnfast._cpu")
    obstacles.check_packed(spec, form, input)
    if spec.single_step and _are_steps_torchs():
        return cuda.Choice("torch", "a step by ours was not measured against torch's own")
    # Where operators are recorded, the values of lengths and resets are not known, and sizes perhaps neither.
    unknown = form == "operators" and (extras.given or _is_symbolic(input))
    in_graph = form == "transforms" or torch.compiler.is_compiling() or unknown
    ours_alone = "cell_states" if spec.cell_states else None
    if extras.given and in_graph and ours_alone is None:
        ours_alone = "lengths or reset in a graph"
    if in_graph:
        choice = cuda.choose_for_graph(weights[0])
    else:
        settled = cuda.choose_for_all(weights[0])
        choice = settled or cuda.choose(weights[0], problem(spec, input, hx, weights, extras.given), ours_alone)
    if choice.ours or ours_alone is None:
        return choice
    return cuda.Choice("reference", f"torch's layers have no {ours_alone}, and {choice.reason}")


# In a compiled graph our step is an operator that Python runs, one for each step with gradients of all weights. torch's
# are code of the compiler's, and products; only from so many weights on are they slower, without gradients: measured,
# see docs/performance.md.
_WEIGHTS_OF_A_SLOW_STEP = 3 << 18


def is_step_for_a_compiler(spec: Spec, input: Any, hx: Any, weights: Sequence[Tensor]) -> bool:
    """Whether torch.compile is at work on a cell on the CPU, of which it makes faster code by torch's operators.

    For modules, which have torch's way at hand: a graph cannot make a module for a call of the functional form.
    """
    # Not is_exporting(): in torch 2.11 that is always so while the compiler is at work.
    if not spec.single_step or not torch.compiler.is_compiling() or torch.compiler._is_exporting_flag:
        return False
    if device_type(weights) != "cpu" or obstacles.form(input) != "operators":
        return False
    cell = passes.CELLS.get(spec.cell)
    if cell is None or (cell.has_cell and hx is not None and not (isinstance(hx, tuple) and len(hx) == 2)):
        return False  # torch or obstacles.guard raise
    if torch.is_grad_enabled() and _asks_for_gradients(input, hx, weights):
        return True
    count = cell.gates * spec.hidden_size * (spec.input_size + spec.hidden_size)
    return count < _WEIGHTS_OF_A_SLOW_STEP


def _are_steps_torchs() -> bool:
    """Whether cells on CUDA are torch's: a graph has them operator by operator, and fuses them; elsewhere torch has
    kernels of its own."""
    return cuda.asked() is None


def are_all_torchs(x: Tensor, single_step: bool) -> bool:
    """Whether every eager call of layers, or of cells, is torch's on the CUDA device of x."""
    return _are_steps_torchs() if single_step else cuda.choose_for_all(x) is not None


def _is_symbolic(input: Any) -> bool:
    data = input.data if isinstance(input, PackedSequence) else input
    return isinstance(data, Tensor) and any(isinstance(size, torch.SymInt) for size in data.shape)


def problem(spec: Spec, input: Any, hx: Any, weights: Sequence[Tensor], padded: bool = False) -> Problem | None:
    """What of a call its speed follows from; None where it is not even a call."""
    packed = isinstance(input, PackedSequence) and not spec.single_step
    data = input.data if packed else input
    if not isinstance(data, Tensor) or data.dim() > 3 or data.numel() == 0:
        return None
    if packed:
        steps, batch = len(input.batch_sizes), int(input.batch_sizes[0])
    else:
        unbatched = data.dim() == (1 if spec.single_step else 2)
        sizes = [1] * spec.single_step + list(data.shape[:-1]) + [1] * unbatched
        if len(sizes) != 2:
            return None
        batch, steps = sizes if spec.batch_first and not unbatched else reversed(sizes)
    dtype = amp.dtype_for("cuda", spec) if torch.is_autocast_enabled("cuda") else data.dtype
    return Problem(
        spec.cell,
        torch.is_grad_enabled() and _asks_for_gradients(data, hx, weights),
        cuda.dtype_name(dtype),
        dtype is torch.float32 and cuda.tf32(),
        steps,
        batch,
        data.shape[-1],
        spec.hidden_size,
        spec.bidirectional,
        packed,
        padded,
        spec.num_layers,
    )


def _asks_for_gradients(data: Any, hx: Any, weights: Sequence[Any]) -> bool:
    # Not any() of a generator, which takes three times as long; and mostly the first one does.
    for t in (*weights, data, *(hx if isinstance(hx, (tuple, list)) else (hx,))):
        if isinstance(t, Tensor) and t.requires_grad:
            return True
    return False
