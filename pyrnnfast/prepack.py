"""Weights that stay packed from call to call, for models that serve."""

from typing import TypeVar

import torch

from . import _cpu, modules

ModelT = TypeVar("ModelT", bound=torch.nn.Module)


def prepack(model: ModelT, mode: bool = True) -> ModelT:
    """Keep the weights of every recurrent module of ours inside ``model`` (itself included) in the order in which the
    kernels read them, from one call to the next.

    Without, each call on the CPU packs them anew, or, for a few rows, reads them where they lie: as much time as
    several steps of few sequences take. So this is for models that are called with the same weights over and over: a
    step or a few at a time (streaming, decoders, rollouts), or with short sequences. It is at work in eager calls
    without gradients (``torch.inference_mode()``, ``torch.no_grad()``) with plain input, packed or not, but without
    ``lengths``, ``reset`` and ``cell_states``; other calls, and training, are as before.

    The first such call packs, in memory of about the size of the weights. When they have changed the next one does so
    again: by an optimizer, ``load_state_dict``, any operation in place, other tensors in their place. What torch itself
    does not count as a change (writing through ``.data``, NumPy or memory shared with another process) is noticed if
    it changes a weight as a whole; when it changes a few of its elements only, call this again. Weights that were made
    in inference mode, of which torch counts no changes, are packed at each call as before.

    Packed weights may give other last bits than those read where they lie; calls among themselves give the same.

    Args:
        mode: False: let go of what is kept, and keep nothing

    Returns:
        ``model`` itself. Copies of it, and what is loaded from a file of it, pack for themselves.

    Raises:
        ValueError: ``model`` has no recurrent module of ours.
    """
    ours = [module for module in model.modules() if isinstance(module, modules._Ours)]
    if mode and not ours:
        raise ValueError("the model has no recurrent module of pyrnnfast; pyrnnfast.replace(model) swaps torch's")
    for module in ours:
        if mode:
            module._prepacked = _cpu.Prepacked()
        else:
            vars(module).pop("_prepacked", None)
    return model
