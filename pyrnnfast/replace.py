"""Swap the recurrent modules of an existing model in place, and back again.

Only the class of each module changes (``module.__class__``): parameters keep their identity, so optimizers go on
working, and hooks, buffers, parametrizations and the training flag stay where they are.
"""

from typing import TypeVar

import torch
from torch.nn.utils import parametrize

from . import modules

ModelT = TypeVar("ModelT", bound=torch.nn.Module)

_FUSED: dict[type[torch.nn.Module], type[torch.nn.Module]] = {
    torch.nn.RNN: modules.RNN,
    torch.nn.GRU: modules.GRU,
    torch.nn.LSTM: modules.LSTM,
    torch.nn.RNNCell: modules.RNNCell,
    torch.nn.GRUCell: modules.GRUCell,
    torch.nn.LSTMCell: modules.LSTMCell,
}
_STOCK = {fused: stock for stock, fused in _FUSED.items()}


def _swap(model: ModelT, classes: dict[type[torch.nn.Module], type[torch.nn.Module]]) -> ModelT:
    for module in model.modules():
        old = type(module)
        if old in classes:
            module.__class__ = classes[old]
            vars(module).pop("_prepacked", None)  # if there is any, it is of ours
        elif parametrize.is_parametrized(module) and old.__bases__[0] in classes:
            # torch derives a class for each parametrized module, with a property for each parametrized tensor.
            base = classes[old.__bases__[0]]
            own = {
                name: value for name, value in vars(old).items() if name not in ("__dict__", "__weakref__", "__doc__")
            }
            module.__class__ = type(f"Parametrized{base.__name__}", (base,), own)
    return model


def replace(model: ModelT) -> ModelT:
    """Turn every ``torch.nn`` recurrent module inside ``model`` (itself included) into ours, in place.

    Exactly torch's classes are swapped; a subclass with a behaviour of its own is left alone.

    Returns:
        ``model`` itself.
    """
    return _swap(model, _FUSED)


def restore(model: ModelT) -> ModelT:
    """Undo :func:`replace`: turn every recurrent module of ours inside ``model`` into torch's, in place.

    Returns:
        ``model`` itself.

    Raises:
        ValueError: ``model`` has an LSTM with ``cell_states``, which torch has not; nothing is swapped then.
    """
    for name, module in model.named_modules():
        if isinstance(module, modules.LSTM) and module.cell_states:
            raise ValueError(f"torch.nn.LSTM has no cell_states, as asked of {name or 'the module'}")
    return _swap(model, _STOCK)
