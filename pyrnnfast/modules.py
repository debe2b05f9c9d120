"""Drop-in recurrent modules: torch.nn's own classes with another ``forward``.

Constructor, initialisation, parameter names, ``state_dict``, representation and pickling are torch's, by inheritance.
``forward`` runs on our kernels whatever they serve; the rest, bad input included, is left to the inherited ``forward``,
so that torch's answers and error texts stay torch's. :func:`explain` tells which it would be.
"""

import copy
import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple, ParamSpec, TypedDict, Unpack

import torch
from torch import Tensor

from . import _cpu, functional, layers, plain, roads
from .layers import NO_EXTRAS, Extras
from .obstacles import Spec

_CELL_WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


def _by_name(module: torch.nn.Module, names: Sequence[str]) -> list[Any]:
    """By name at every call: parametrizations, pruning and functional_call put other tensors there.

    A parameter is only ever there under its own name; asking for it directly is five times as fast as ``getattr``.
    """
    parameters = module._parameters
    return [parameters[name] if name in parameters else getattr(module, name) for name in names]


class _Ours(torch.nn.Module):
    """What all of ours have besides ``forward``."""

    _prepacked: _cpu.Prepacked | None = None
    """Of a module itself where :func:`pyrnnfast.prepack` asked for it."""

    def to_torch(self) -> torch.nn.Module:
        """The module of ``torch.nn`` that this one stands for, for tools that know torch's own classes only.

        It holds the same parameters, buffers and hooks, not copies. For a whole model see :func:`pyrnnfast.restore`.

        Raises:
            TypeError: this module is of a class derived from ours, which torch has no counterpart of.
            ValueError: this is an LSTM with ``cell_states``, a result that torch's does not have.
        """
        from .replace import restore  # which imports these classes

        # Not copy.copy, which parametrized modules refuse, and which would share the dictionary of parameters.
        stock = object.__new__(type(self))
        for name, value in vars(self).items():
            vars(stock)[name] = copy.copy(value) if isinstance(value, (dict, list)) else value
        if isinstance(restore(stock), _Ours):
            raise TypeError(f"torch.nn has no counterpart of {type(self).__name__}, a class derived from pyrnnfast's")
        return stock

    def _recorded(self, input: torch.fx.Proxy, *others: Any, **options: Any) -> torch.fx.Proxy:
        """One operation in the graph of ``torch.fx``, as which it takes torch.nn's own modules by itself."""
        tracer: Any = input.tracer
        found: torch.fx.Proxy = tracer.create_proxy(
            "call_module", tracer.path_of_module(self), (input, *others), options
        )
        return found

    def __prepare_scriptable__(self) -> torch.nn.Module:
        """Called by ``torch.jit.script``, which would put what this returns into the model that it is given, too: so
        nobody's layers are swapped without being asked for, and what it would say itself is no help.

        Raises:
            RuntimeError: ``forward`` is ours.
        """
        if getattr(type(self).forward, "__module__", None) == __name__:
            raise RuntimeError(
                f"torch.jit.script cannot compile pyrnnfast's {type(self).__name__}; give it module.to_torch(), or "
                "the model after pyrnnfast.restore(model)"
            )
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        # torch.ao hands every module of a model its qconfig before it swaps those whose exact class it knows. Ours get
        # None where a class of torch's is named, so None does not mean that nobody wants this module quantized.
        if name == "qconfig":
            warnings.warn(
                f"torch.ao.quantization does not know pyrnnfast's {type(self).__name__} and leaves it in floating "
                "point; give it module.to_torch() or pyrnnfast.restore(model)",
                stacklevel=2,
            )
        super().__setattr__(name, value)


_P = ParamSpec("_P")


def _passed_on(explicit: Callable[_P, None]) -> Callable[_P, None]:
    """A constructor with the signature of ``explicit``, which hands its arguments to torch's as they came.

    torch's own takes ``*args``, which ``torch.nn.utils.skip_init`` refuses; but the checks and their words are torch's.
    """

    @functools.wraps(explicit)
    def init(self: "_Layers", *args: Any, **kwargs: Any) -> None:
        ours = {name: kwargs.pop(name) for name in self._own_options if name in kwargs}
        super(_Layers, self).__init__(*args, **kwargs)
        # What is not asked for is not set: then the module's attributes are those of torch.nn's.
        vars(self).update((name, value) for name, value in ours.items() if value)

    return init  # type: ignore[return-value]


class ExtraInputs(TypedDict, total=False):
    """What a layer may be given besides ``input`` and ``hx``: see its ``forward``."""

    lengths: Tensor | Sequence[int] | None
    reset: Tensor | None


def _extras(given: ExtraInputs) -> Extras:
    for name in given:
        if name not in Extras._fields:
            raise TypeError(f"forward() got an unexpected keyword argument '{name}'")
    return layers.extras(**given)


class _Layers(_Ours, torch.nn.RNNBase):
    """The ``forward`` of RNN, GRU and LSTM."""

    _own_options: ClassVar[tuple[str, ...]] = ()
    cell_states = False

    # Not `*, lengths=None, reset=None`: torch's older ONNX exporter passes such by position.
    def forward(self, input: Any, hx: Any = None, **given: Unpack[ExtraInputs]) -> Any:
        """The output of the last layer at every step and the final state(s) of all layers, as of ``torch.nn``.

        Args:
            input: [T, B, I], [B, T, I] with ``batch_first``, [T, I] unbatched, a ``PackedSequence``, or a nested tensor
                [B, j, I] of the layout ``torch.jagged``, which the output then is, too
            hx: [num_layers·D, B, H] (without B when unbatched), a pair of them for the LSTM; None: zeros
            lengths: [B]: how many steps of each padded sequence are real, and
            reset: [T, B], or [B, T] with ``batch_first``: where the state is cleared before the step; see
                :class:`pyrnnfast.functional.Options`

        An output of which the gradient is wanted must not be changed in place, as with most of torch's operators: the
        gradient of ``weight_hh`` is made of it. (torch's GRU and RNN allow it, its LSTM does not.)

        Raises:
            ValueError, RuntimeError: with torch's words; ours where torch would crash or read beyond its memory: for a
                ``PackedSequence`` whose ``batch_sizes`` do not describe its data, and for an LSTM whose packed ``hx``
                or whose weights have wrong shapes.
            TypeError, ValueError: ``lengths`` or ``reset`` are not as above, or not served with this input.
        """
        if self.proj_size and type(input) is Tensor and input.is_cuda and not given and not self.cell_states:
            return super().forward(input, hx)  # of dense input there is nothing else to ask
        weights = self._weights()
        extras = _extras(given) if given else NO_EXTRAS
        if type(input) in plain.INPUTS:
            suits = plain.suits(self.num_layers, self.dropout, self.training, self.cell_states)
            if suits and not extras.given:
                form = self.mode.lower(), self.num_layers, 2 if self.bidirectional else 1, False, self.batch_first
                hidden, outputs = self.hidden_size, self.proj_size or self.hidden_size
                found = plain.call(form, self.input_size, hidden, outputs, input, hx, weights, super().forward, self)
                if found is not None:
                    return found
        elif isinstance(input, torch.fx.Proxy):
            return self._recorded(input, hx, **given)
        return functional.call(self._spec(), input, hx, weights, otherwise=super().forward, extras=extras)

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
            cell_states=self.cell_states,
        )

    def _weights(self) -> list[Tensor]:
        return _by_name(self, self._flat_weights_names)


class RNN(_Layers, torch.nn.RNN):
    """``torch.nn.RNN`` on fused kernels."""

    @_passed_on
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None: ...


class GRU(_Layers, torch.nn.GRU):
    """``torch.nn.GRU`` on fused kernels."""

    @_passed_on
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None: ...


class LSTM(_Layers, torch.nn.LSTM):
    """``torch.nn.LSTM`` on fused kernels.

    Args:
        cell_states: a third result, the cell states of the last layer at every step, [T, B, D·H] in the layout of the
            output
    """

    _own_options = ("cell_states",)

    @_passed_on
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Any = None,
        dtype: Any = None,
        *,
        cell_states: bool = False,
    ) -> None: ...

    def extra_repr(self) -> str:
        return super().extra_repr() + (", cell_states=True" if self.cell_states else "")


class _Cells(_Ours, torch.nn.RNNCellBase):
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
        if torch.compiler.is_compiling() and roads.is_step_for_a_compiler(self._spec(), input, hx, weights):
            return super().forward(input, hx)  # the less is asked, the less the graph has to look at each time
        if type(input) is Tensor:
            form = self._kind(), 1, 1, True, False
            hidden = self.hidden_size
            found = plain.call(form, self.input_size, hidden, hidden, input, hx, weights, super().forward, self)
            if found is not None:
                return found
        elif isinstance(input, torch.fx.Proxy):
            return self._recorded(input, hx)
        return functional.call(self._spec(), input, hx, weights, otherwise=super().forward)

    def _kind(self) -> str:
        raise NotImplementedError

    def _spec(self) -> Spec:
        bias = len(self._weights()) == len(_CELL_WEIGHTS)
        return Spec(self._kind(), self.input_size, self.hidden_size, bias=bias, single_step=True)

    def _weights(self) -> list[Tensor]:
        # As torch's, by the biases themselves: what `bias` says after the constructor changes nothing.
        found = _by_name(self, _CELL_WEIGHTS)
        return found[:2] if found[2] is None and found[3] is None else found


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
    """Which road a call takes, and why.

    ``path`` is one of

    - ``"fused"``: our kernels, on the CPU, or on CUDA with a matrix product and a fused kernel for each step
    - ``"persistent"``: our kernels on CUDA, the whole sequence in one launch
    - ``"cudnn"``: the module of torch.nn, by choice: our kernels might serve the call, but were not measured to be
      faster there, or are not built
    - ``"reference"``: torch's operators, step by step, for derivatives that the kernels do not have; on CUDA, where no
      kernel is chosen, for what torch's layers do not have either
    - ``"torch"``: the module of torch.nn
    """

    path: str
    reason: str

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


def explain(module: torch.nn.Module, input: Any, hx: Any = None, **given: Unpack[ExtraInputs]) -> Explanation:
    """Tells, without running it, how ``module(input, hx, **given)`` would be run, and why.

    Args:
        module: a recurrent module, ours or torch's; parametrized weights are computed, as a call would

    Raises:
        TypeError: ``module`` is no recurrent module.
        ValueError: the ``batch_sizes`` of packed input do not describe its data.
    """
    if isinstance(module, (_Layers, _Cells)):
        path, reason = functional.explain(module._spec(), input, hx, module._weights(), _extras(given))
        if module._prepacked is not None:
            reason += f" (prepack keeps {module._prepacked.bytes / 2**20:.1f} MiB)"
        return Explanation(path, reason)
    if isinstance(module, (torch.nn.RNNBase, torch.nn.RNNCellBase)):
        return Explanation("torch", f"{type(module).__name__} is torch's own; pyrnnfast.replace(model) swaps it")
    raise TypeError(f"explain takes a recurrent module, got {type(module).__name__}")
