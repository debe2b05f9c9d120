"""Weights that stay packed from call to call, for models that serve."""

import functools
from typing import Any, TypeVar

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from . import _cpu, modules

ModelT = TypeVar("ModelT", bound=torch.nn.Module)


def prepack(model: ModelT, mode: bool = True) -> ModelT:
    """Keep the weights of every recurrent module of ours inside ``model`` (itself included) in the order in which the
    kernels read them, from one call to the next.

    Without, each call on the CPU packs them anew, or, for a few rows, reads them where they lie: as much time as
    several steps of few sequences take. So this is for models that are called with the same weights over and over: a
    step or a few at a time (streaming, decoders, rollouts), or with short sequences.

    It is at work in eager calls without gradients (``torch.inference_mode()``, ``torch.no_grad()``). Others are as
    before: with gradients; in graphs, transforms and, but for cells, autocast; with ``lengths``, ``reset``,
    ``cell_states``, nested tensors or dropout between layers; unbatched ones of cells; single steps without an initial
    state, or of one sequence with up to 2¹⁷ weights; with weights that are not contiguous.

    The second call with the same weights packs them, in memory of about their size (float16: up to four times); so
    weights that are others in every call cost next to nothing. When they have changed, that begins anew: by an
    optimizer, ``load_state_dict``, an operation in place, another tensor in their place. Changes that torch does not
    count (through ``.data``, NumPy, memory shared with another tensor or process) are looked for in sixteen elements of
    each weight, and missed if those are as they were; call this again then. Weights made in inference mode, of which
    torch counts no changes, are not kept.

    A call with packed weights may give other last bits than the first one, which had none. :func:`pyrnnfast.explain`
    tells how much memory is kept, which is until the next call that finds other weights.

    Args:
        mode: False: let go of what is kept, and keep nothing

    Returns:
        ``model`` itself. Deep copies of it, and what is loaded from a file of it, keep weights, too, but their own.

    Raises:
        ValueError: ``model`` has no recurrent module of ours, and ``mode`` is true.
    """
    ours = [module for module in model.modules() if isinstance(module, modules._Ours)]
    if mode and not ours:
        raise ValueError("the model has no recurrent module of pyrnnfast; pyrnnfast.replace(model) swaps torch's")
    for module in ours:
        if mode:
            module._prepacked = keeping()
        else:
            vars(module).pop("_prepacked", None)
    return model


def keeping() -> _cpu.Prepacked:
    """What a module keeps its weights in: nothing yet."""
    _watch_optimizers()
    return _cpu.Prepacked()


@functools.cache
def _watch_optimizers() -> None:
    """With ``fused=True`` they do not count as changes what they do."""

    def doubt(*_: Any) -> None:
        if not torch.compiler.is_compiling():  # what is compiled does count
            _cpu.doubt_weights()

    register_optimizer_step_post_hook(doubt)
