"""CUDA tensors: whether our kernels or torch's own layers take a call, and the way to the kernels in ``_cuda``.

The choice is automatic. Ours run where a record from a real card says that they are faster than cuDNN near the shape of
the call (the table and its format: :mod:`pyrnnfast.choices`); everywhere else torch's layers do, as without us: padded
data with ``lengths`` or ``reset`` are packed for them. What they cannot do at all runs on ours where there is a record
from a card of this kind, and else by torch's operators, step by step. :func:`use`, or the environment variable
``PYRNNFAST_CUDA_PATH``, decides otherwise, and :func:`pyrnnfast.explain` tells what was decided. Whoever calls the
operators of ops.py himself, or runs a graph in which they are recorded, has asked for ours.

``_cuda`` is imported when a CUDA tensor comes for the first time. It may be missing from a build, and loads where there
is no driver.

Two functions are where the tests put a stand-in for a card: :func:`takes` says which tensors go this way, and
:func:`load` what they find at its end.
"""

import functools
import importlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from . import choices
from .choices import FUSED, PERSISTENT, Problem, Table

__all__ = ["use"]

CUDNN = "cudnn"
_PATHS = {"cudnn": CUDNN, "fused": FUSED, "step": FUSED, "persistent": PERSISTENT}
_STEP_FORM = "step"  # what `_cuda` calls the path "fused"

Tensors = tuple[Tensor | None, ...]


class Choice(NamedTuple):
    """The road of a call, one of those of :class:`pyrnnfast.Explanation`, and why."""

    path: str
    reason: str

    @property
    def ours(self) -> bool:
        return self.path in (FUSED, PERSISTENT)

    @property
    def by_torch(self) -> bool:
        """By torch's own layers."""
        return self.path in (CUDNN, "torch")


# The path that is asked for ---------------------------------------------------------------------------------------


def _path(name: str, asked: str) -> str:
    if asked not in _PATHS:
        raise ValueError(f"{name} {asked!r}: one of {', '.join(sorted(_PATHS))} is expected")
    return _PATHS[asked]


_environment = os.environ.get("PYRNNFAST_CUDA_PATH", "")
_from_environment: str | None = _path("PYRNNFAST_CUDA_PATH", _environment) if _environment else None
_asked = _from_environment
# Of those who are inside of `use`, the last one is heard. Threads may leave in another order than they came.
_requests: list[list[str | None]] = []


@contextmanager
def use(path: str | None) -> Iterator[None]:
    """Has CUDA tensors take one path, instead of the one that is measured to be the fastest.

    For the whole process, like the flags in ``torch.backends``: torch goes back through time on threads of its own. A
    backward pass takes the path that is asked for when it runs.

    Args:
        path: ``"step"``, which may be called ``"fused"`` too: a matrix product and a fused kernel for each step, for
            everything that has a kernel; ``"persistent"``: the whole sequence in one launch, where there is a plan for
            that, and ``"step"`` elsewhere; ``"cudnn"``: torch's own layers; None: no path, not even the environment's

    Raises:
        ValueError: there is no such path.
    """
    global _asked
    own = [None if path is None else _path("path", path)]
    _requests.append(own)
    _asked = own[0]
    try:
        yield
    finally:
        _requests[:] = [request for request in _requests if request is not own]
        _asked = _requests[-1][0] if _requests else _from_environment


# What there is ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Loaded:
    """The kernels, and the devices that they could run on. One is known by its identity, as what follows from it is."""

    module: Any = None
    """With the functions of ``_cuda``; None: it is not there."""
    architectures: str = ""
    devices: tuple[dict[str, Any], ...] = ()
    reason: str | None = None
    """Why no device is served."""


@functools.cache
def load() -> Loaded:
    """Imports ``_cuda``, the first time that it is asked."""
    name = f"{__package__}._cuda"
    try:
        module: Any = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        return Loaded(reason="this build of pyrnnfast has no CUDA kernels (built with PYRNNFAST_CUDA=on, it has)")
    except ImportError as error:
        return Loaded(reason=f"{name} cannot be loaded: {error}")
    architectures = module.architectures()
    try:
        return Loaded(module, architectures, tuple(module.devices()))
    except RuntimeError as error:
        return Loaded(module, architectures, reason=f"no CUDA device: {error}")


@functools.cache
def table() -> Table:
    """The measurements that this package brings along."""
    return Table(choices.read(choices.FILE.read_text()))


def capability(device: dict[str, Any]) -> str:
    return f"{device['major']}.{device['minor']}"


def runs_on(architectures: str, major: int, minor: int) -> bool:
    """Whether code compiled for ``architectures``, such as "80;90a;120+PTX", runs on a card.

    Machine code runs on its own major version from its own minor one on, that of "90a" on nothing but 9.0, and PTX is
    compiled for whatever is newer.
    """
    for digits, special, ptx in re.findall(r"(\d+)(a?)(\+PTX)?", architectures):
        own, card = (int(digits[:-1]), int(digits[-1])), (major, minor)
        if own == card or (not special and own < card and (own[0] == major or ptx)):
            return True
    return False


def takes(tensor: Tensor) -> bool:
    """Whether a tensor is one of those that this module is for."""
    return tensor.is_cuda


@functools.lru_cache(maxsize=64)
def _missing(loaded: Loaded, index: int) -> str | None:
    """Why our kernels cannot serve a device."""
    if loaded.reason is not None:
        return loaded.reason
    if index >= len(loaded.devices):
        return f"the CUDA kernels see {len(loaded.devices)} devices, and cuda:{index} is not among them"
    device = loaded.devices[index]
    if not runs_on(loaded.architectures, device["major"], device["minor"]):
        return (
            f"the CUDA kernels are compiled for {loaded.architectures}, and {device['name']} has compute capability "
            f"{capability(device)}"
        )
    return None


def _index(tensor: Tensor) -> int:
    return tensor.device.index or 0


# The choice -------------------------------------------------------------------------------------------------------


def asked() -> str | None:
    """The path that :func:`use` or the environment asks for."""
    return _asked


def choose_for_all(tensor: Tensor) -> Choice | None:
    """The road of every eager call on a device, so that a call which torch takes anyway is not kept waiting; None: that
    follows from what the call is."""
    choice = _for_all(load(), table(), _asked, _index(tensor))
    return None if choice is None else _without_cudnn(choice)


def choose(tensor: Tensor, call: Problem | None, ours_alone: str | None) -> Choice:
    """The road of an eager call where it is not that of all.

    Args:
        tensor: one of its tensors, all of which are on one device
        call: what it is, or None where torch is to say what is wrong with it
        ours_alone: what is asked for that torch's layers do not have, so that any record will do
    """
    if call is None:
        return Choice("torch", "the operands do not fit together")
    return _without_cudnn(_for_call(load(), table(), _asked, _index(tensor), call, ours_alone))


def _without_cudnn(choice: Choice) -> Choice:
    """The same where cuDNN is switched off, and torch does without it."""
    return choice._replace(path="torch") if choice.path == CUDNN and not torch.backends.cudnn.enabled else choice


# To decide takes longer than a launch, and a network makes the same call again and again; but shapes have no end.
_remembered = functools.lru_cache(maxsize=4096)


@_remembered
def _for_all(loaded: Loaded, measured: Table, asked: str | None, index: int) -> Choice | None:
    """The choice where it is the same for all calls on a device."""
    missing = _missing(loaded, index)
    if missing is not None:
        return Choice(CUDNN, missing)
    if asked == CUDNN:
        return Choice(CUDNN, _ASKED)
    if asked is None and capability(loaded.devices[index]) not in measured.capabilities:
        return Choice(CUDNN, _unrecorded(loaded, index))
    return None


@_remembered
def _for_call(
    loaded: Loaded, measured: Table, asked: str | None, index: int, call: Problem, ours_alone: str | None
) -> Choice:
    """The choice elsewhere."""
    forms = _forms(loaded, measured, asked, index, call)
    if asked is not None:
        return _planned(forms, _ASKED)
    if ours_alone is not None:
        return _planned(forms, f"torch's layers have no {ours_alone}")
    verdict = measured.verdict(capability(loaded.devices[index]), call)
    if verdict is None:
        return Choice(CUDNN, "no shape near this one was measured")
    if not verdict.ours:
        return Choice(CUDNN, f"it took {1 / verdict.ratio:.2f} of our time for {verdict.evidence}")
    if verdict.path == PERSISTENT and any(form != PERSISTENT for form, _ in forms):
        why = f"the persistent form, measured for {verdict.evidence}, has no plan for every pass of this"
        return Choice(CUDNN, why)
    return _planned(forms, f"cuDNN took {1 / verdict.ratio:.2f} times as long for {verdict.evidence}")


_ASKED = "it is asked for"


def _unrecorded(loaded: Loaded, index: int) -> str:
    return f"our kernels have no record from a card of compute capability {capability(loaded.devices[index])}"


def _planned(forms: Sequence[tuple[str, str]], reason: str) -> Choice:
    """Ours, in these forms of :func:`_forms`."""
    by_steps = next((why for form, why in forms if form != PERSISTENT and why), None)
    if all(form != PERSISTENT for form, _ in forms):
        return _of_ours(FUSED, f"{reason}; a kernel for each step: {by_steps}" if by_steps else reason)
    return _of_ours(
        PERSISTENT, f"{reason}; some passes with a kernel for each step: {by_steps}" if by_steps else reason
    )


def _of_ours(path: str, reason: str) -> Choice:
    return Choice(path, f"served by pyrnnfast._cuda: {reason}")


def _forms(loaded: Loaded, measured: Table, asked: str | None, index: int, call: Problem) -> list[tuple[str, str]]:
    """As :func:`_form`, layer by layer and pass by pass."""
    directions = 2 if call.bidirectional else 1
    inputs = [call.inputs] if call.layers == 1 else [call.inputs, directions * call.hidden]
    layers = [call._replace(inputs=i, layers=1) for i in inputs]
    passes = (False, True) if call.training else (False,)
    return [_form(loaded, measured, asked, index, layer, back) for layer in layers for back in passes]


@_remembered
def _forms_of_layers(
    loaded: Loaded, measured: Table, asked: str | None, index: int, call: Problem, back: bool
) -> tuple[str, ...]:
    """Of each layer, as :func:`_form`, in the order in which a pass has them."""
    above = (2 if call.bidirectional else 1) * call.hidden
    inputs = [call.inputs, *[above] * (call.layers - 1)]
    layers = [call._replace(inputs=i, layers=1) for i in inputs]
    forms = [_form(loaded, measured, asked, index, layer, back)[0] for layer in layers]
    return tuple(reversed(forms) if back else forms)


@_remembered
def _form(
    loaded: Loaded, measured: Table, asked: str | None, index: int, layer: Problem, back: bool
) -> tuple[str, str]:
    """``"step"`` or ``"persistent"`` for a pass of one layer; and, where that is not what is wanted, why."""
    device = loaded.devices[index]
    wanted = asked
    if wanted is None or wanted == CUDNN:
        wanted = measured.form(capability(device), layer) if measured.capabilities else None
    if wanted != PERSISTENT:
        return _STEP_FORM, ""
    directions = 2 if layer.bidirectional else 1
    found = loaded.module.plan(device, back, layer.cell, layer.dtype, *layer.shape, directions, layer.tf32)
    return found["form"], "" if found["form"] == PERSISTENT else found["reason"]


_Function = TypeVar("_Function", bound=Callable[..., object])


def _constant(function: _Function) -> _Function:
    """Has Dynamo call a function while it traces, and keep the answer.

    What ``torch.compiler.assume_constant_result`` does, without the import of the compiler.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def choose_for_graph(tensor: Tensor) -> Choice:
    """The road of a call that torch.compile or torch.export records, or that torch.func transforms.

    Its sizes are not known, and what torch would do instead is not cuDNN: a graph gets its layers step by step, one
    graph for each T. So ours take it on every card that they have a record from, whatever the shape.
    """
    path, _, reason = _for_graph(_index(tensor), _asked).partition(": ")
    return Choice(path, reason)


@_constant
def _for_graph(index: int, path: str | None) -> str:
    """Path and reason in one text, as Dynamo takes no tuple for a constant (torch 2.11)."""
    loaded = load()
    missing = _missing(loaded, index)
    if missing is not None:
        choice = Choice("torch", missing)
    elif path is not None:
        choice = Choice("torch", _ASKED) if path == CUDNN else _of_ours(path, _ASKED)
    elif capability(loaded.devices[index]) in table().capabilities:
        choice = _of_ours(FUSED, "torch would record its own layers step by step")
    else:
        choice = Choice("torch", _unrecorded(loaded, index))
    return f"{choice.path}: {choice.reason}"


def tf32() -> bool:
    """Whether torch's switches let cuDNN's recurrent layers multiply float32 as TF32.

    ``torch.backends.cudnn.allow_tf32``, ``.rnn.fp32_precision``, ``.fp32_precision`` and
    ``torch.backends.fp32_precision`` all end in this one value, which torch's own layers ask for (in C++,
    ``allowTF32CuDNN(Float32Op::RNN)``); on unless somebody has switched it off.
    """
    # What `torch.backends.cudnn.rnn.fp32_precision` asks, in a tenth of the time.
    precision: str = torch._C._get_fp32_precision_getter("cuda", "rnn")
    return precision == "tf32" and not _tf32_is_forbidden()


@functools.cache
def _tf32_is_forbidden() -> bool:
    """NVIDIA's libraries obey it above all switches; they read it once, too."""
    return os.environ.get("NVIDIA_TF32_OVERRIDE") == "0"


@functools.cache
def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# The passes -------------------------------------------------------------------------------------------------------


def forward(
    cell: str,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor | None],
    y: Tensor,
    h_n: Tensor,
    c_n: Tensor | None,
    kept: Tensors,
    batch_sizes: Tensor | Tensors | None,
    threads: int,
) -> None:
    """``_cpu.forward`` for tensors on a CUDA device; ``threads`` is only there to make it so."""
    module, form, narrow = _pass(cell, x, weights, batch_sizes, training=bool(kept), back=False)
    with _on_device_of(x):
        module.forward(cell, x, h0, c0, weights, y, h_n, c_n, kept, batch_sizes, form, narrow)


def backward(
    cell: str,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor | None],
    y: Tensor,
    kept: Tensors,
    grad_y: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    grad_cells: Tensor | None,
    dx: Tensor | None,
    dh0: Tensor | None,
    dc0: Tensor | None,
    dweights: Tensors,
    dgates: Tensor | None,
    batch_sizes: Tensor | Tensors | None,
    threads: int,
) -> None:
    """``_cpu.backward`` likewise."""
    module, form, narrow = _pass(cell, x, weights, batch_sizes, training=True, back=True)
    upstream = grad_y, grad_h_n, grad_c_n, grad_cells
    with _on_device_of(x):
        module.backward(
            cell, x, h0, c0, weights, y, kept, *upstream, dx, dh0, dc0, dweights, dgates, batch_sizes, form, narrow
        )


def plain_pass(x: Tensor, call: Problem, back: bool) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """``_cuda``'s way of a plain call (stack.py) on the device of its input, and what it is given behind the operands.

    A backward pass has the path, and the TF32, that is asked for when it runs.
    """
    loaded = load()
    narrow = x.dtype is torch.float32 and tf32()
    if narrow is not call.tf32:
        call = call._replace(tf32=narrow)
    forms = _forms_of_layers(loaded, table(), _asked, _index(x), call, back)
    run = loaded.module.backward_plain if back else loaded.module.forward_plain
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        run = functools.partial(_on_device, x.device, run)
    return run, (forms, narrow)


def _on_device(device: torch.device, run: Callable[..., Any], *operands: Any) -> Any:
    with torch.cuda.device(device):
        return run(*operands)


def _pass(
    cell: str,
    x: Tensor,
    weights: Sequence[Tensor | None],
    batch_sizes: Tensor | Tensors | None,
    training: bool,
    back: bool,
) -> tuple[Any, str, bool]:
    """The module for a pass, its form, and whether it may use TF32.

    Raises:
        RuntimeError: there are no kernels for this device. Nobody comes here then but by calling the operators.
    """
    loaded, index = load(), _index(x)
    missing = _missing(loaded, index)
    if missing is not None:
        raise RuntimeError(f"pyrnnfast's kernels do not serve {x.device}: {missing}")
    weight_hh = weights[1]
    assert weight_hh is not None
    layer = problem_of_layer(cell, x, batch_sizes, weight_hh.shape[1], len(weights) > 4, training)
    return loaded.module, _form(loaded, table(), _asked, index, layer, back)[0], layer.tf32


def problem_of_layer(
    cell: str, x: Tensor, batch_sizes: Tensor | Tensors | None, hidden: int, bidirectional: bool, training: bool
) -> Problem:
    """What one layer is: of x [T, B, I], or [N, I] with batch sizes, or [B, I] of a step."""
    packed = isinstance(batch_sizes, Tensor)
    steps = len(batch_sizes) if isinstance(batch_sizes, Tensor) else 1 if x.dim() == 2 else x.shape[0]
    batch = int(batch_sizes[0]) if isinstance(batch_sizes, Tensor) else x.shape[-2]
    return Problem(
        cell,
        training,
        dtype_name(x.dtype),
        x.dtype is torch.float32 and tf32(),
        steps,
        batch,
        x.shape[-1],
        hidden,
        bidirectional,
        packed,
        batch_sizes is not None and not packed,
    )


def _on_device_of(x: Tensor) -> AbstractContextManager[object]:
    """The kernels run on the current stream of the current device."""
    if not x.is_cuda or x.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(x.device)
