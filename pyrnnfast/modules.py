"""Drop-in recurrent modules: torch.nn's own classes with another ``forward``.

Constructor, initialisation, parameter names, ``state_dict``, representation and pickling are torch's, by inheritance.
``forward`` runs on our kernels whatever they serve; the rest, bad input included, is left to the inherited ``forward``,
so that torch's answers and error texts stay torch's. :func:`explain` tells which it would be.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import functional, obstacles
from .obstacles import Spec

_CELL_WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


def _weight(module: torch.nn.Module, name: str) -> Any:
    """By name at every call: parametrizations, pruning and functional_call put other tensors there.

    A parameter is only ever there under its own name; asking for it directly is five times as fast as ``getattr``.
    """
    weight = module._parameters.get(name)
    return getattr(module, name) if weight is None else weight


class _Layers(torch.nn.RNNBase):
    """The ``forward`` of RNN, GRU and LSTM."""

    def forward(self, input: Any, hx: Any = None) -> Any:
        """The output of the last layer at every step and the final state(s) of all layers, as of ``torch.nn``.

        Args:
            input: [T, B, I], [B, T, I] with ``batch_first``, [T, I] unbatched, or a ``PackedSequence``
            hx: [num_layers·D, B, H] (without B when unbatched), a pair of them for the LSTM; None: zeros

        An output of which the gradient is wanted must not be changed in place, as with most of torch's operators: the
        gradient of ``weight_hh`` is made of it. (torch's GRU and RNN allow it, its LSTM does not.)

        Raises:
            ValueError, RuntimeError: with torch's words; ours where torch would crash or read beyond its memory: for a
                ``PackedSequence`` whose ``batch_sizes`` do not describe its data, and for an LSTM whose packed ``hx``
                or whose weights have wrong shapes.
        """
        weights = self._weights()
        if self._is_plain() and type(input) is Tensor and input.dim() == 3:
            found = functional.infer(self.mode.lower(), self.input_size, self.hidden_size, input, hx, weights)
            if found is not None:
                return found
        return functional.call(self._spec(), input, hx, weights, otherwise=super().forward)

    def _is_plain(self) -> bool:
        return self.num_layers == 1 and not (self.bidirectional or self.batch_first or self.proj_size)

    def _spec(self) -> Spec:
        return Spec(
            self.mode.lower(),
            self.input_size,
            self.hidden_size,
            self.num_layers,
            self.bias,
            self.batch_first,
            self.dropout,
            self.training,
            bool(self.bidirectional),
            self.proj_size,
        )

    def _weights(self) -> list[Tensor]:
        return [_weight(self, name) for name in self._flat_weights_names]


class RNN(_Layers, torch.nn.RNN):
    """``torch.nn.RNN`` on fused kernels."""


class GRU(_Layers, torch.nn.GRU):
    """``torch.nn.GRU`` on fused kernels."""


class LSTM(_Layers, torch.nn.LSTM):
    """``torch.nn.LSTM`` on fused kernels."""


class _Cells(torch.nn.RNNCellBase):
    """The ``forward`` of RNNCell, GRUCell and LSTMCell."""

    def forward(self, input: Any, hx: Any = None) -> Any:
        """The state(s) after one step, as of ``torch.nn``.

        Args:
            input: [B, I], or [I] unbatched
            hx: [B, H] or [H], a pair of them for the LSTM; None: zeros

        Raises:
            ValueError, RuntimeError: with torch's words; TypeError when the LSTM's ``hx`` is no pair.
        """
        weights = self._weights()
        if type(input) is Tensor and input.dim() == 2:
            found = functional.infer(self._kind(), self.input_size, self.hidden_size, input, hx, weights)
            if found is not None:
                return found
        return functional.call(self._spec(), input, hx, weights, otherwise=super().forward)

    def _kind(self) -> str:
        raise NotImplementedError

    def _spec(self) -> Spec:
        return Spec(self._kind(), self.input_size, self.hidden_size, bias=self.bias, single_step=True)

    def _weights(self) -> list[Tensor]:
        return [_weight(self, name) for name in _CELL_WEIGHTS[: 4 if self.bias else 2]]


class RNNCell(_Cells, torch.nn.RNNCell):
    """``torch.nn.RNNCell`` on fused kernels."""

    def _kind(self) -> str:
        return f"rnn_{self.nonlinearity}"


class GRUCell(_Cells, torch.nn.GRUCell):
    """``torch.nn.GRUCell`` on fused kernels."""

    def _kind(self) -> str:
        return "gru"


class LSTMCell(_Cells, torch.nn.LSTMCell):
    """``torch.nn.LSTMCell`` on fused kernels."""

    def _kind(self) -> str:
        return "lstm"


class Explanation(NamedTuple):
    """Which road a call takes: ``path`` is ``"fused"`` (our kernels) or ``"torch"``, and why."""

    path: str
    reason: str

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


def explain(module: torch.nn.Module, input: Any, hx: Any = None) -> Explanation:
    """Tells, without running it, whether ``module(input, hx)`` runs on our kernels or on torch's operators, and why.

    Args:
        module: a recurrent module, ours or torch's; parametrized weights are computed, as a call would

    Raises:
        TypeError: ``module`` is no recurrent module.
        ValueError: the ``batch_sizes`` of packed input do not describe its data.
    """
    if isinstance(module, (_Layers, _Cells)):
        reason = obstacles.obstacle(module._spec(), input, hx, module._weights())
        return Explanation("fused", "served by pyrnnfast._cpu") if reason is None else Explanation("torch", reason)
    if isinstance(module, (torch.nn.RNNBase, torch.nn.RNNCellBase)):
        return Explanation("torch", f"{type(module).__name__} is torch's own; pyrnnfast.replace(model) swaps it")
    raise TypeError(f"explain takes a recurrent module, got {type(module).__name__}")
