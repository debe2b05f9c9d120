"""Layers, directions and layouts around one recurrent layer: batches padded, packed, nested or of one sequence.

Nothing here asks whether the kernels serve a call (obstacles.py), and everything is made of torch's operators around
``layer`` in the form that the moment asks for.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from . import autograd, cuda, ops, segments, stack, transforms
from .autograd import savable
from .obstacles import Hidden, Spec, state_shape
from .passes import Mask, Steps

_LAYERS: dict[str, Callable[..., autograd.Outputs]] = {
    "eager": stack.layer,
    "operators": ops.layer,
    "transforms": transforms.layer,
    "reference": autograd.reference_layer,
}

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


class Extras(NamedTuple):
    """What a call may have that torch.nn's has not; see :class:`pyrnnfast.functional.Options`."""

    lengths: Tensor | None = None
    reset: Tensor | None = None

    # Not __bool__: torch 2.11's compiler cannot ask a tuple for that.
    @property
    def given(self) -> bool:
        return self.lengths is not None or self.reset is not None


NO_EXTRAS = Extras()


def extras(lengths: Any = None, reset: Any = None) -> Extras:
    """Of what a caller has given: ``lengths`` may be a list, as for torch's ``pack_padded_sequence``."""
    if isinstance(lengths, (list, tuple)):
        lengths = torch.tensor(lengths, dtype=None if lengths else torch.int64, device="cpu")
    return Extras(lengths, reset)


class _Found(NamedTuple):
    """Of a stack of layers: the last one's output and cell states, and the final states of all."""

    output: Tensor
    states: Tensor | tuple[Tensor, Tensor]
    cells: Tensor | None


def run(spec: Spec, asked: str, input: Any, hx: Hidden, weights: Sequence[Tensor], extras: Extras) -> Any:
    """A call without an obstacle, on our kernels or the reference; packed input has been checked.

    Args:
        asked: the form of a layer, see :func:`pyrnnfast.obstacles.form`, or ``"reference"``
    """
    if extras.given:
        _check(extras, input, spec.batch_first)
    if torch.is_grad_enabled():
        input = _savable_input(input)
    if spec.single_step:
        return _run_step(spec, asked, input, hx, weights)
    if isinstance(input, PackedSequence):
        x, batch_sizes = input.data, input.batch_sizes
        found = _run_layers(spec, asked, x, savable(batch_sizes), permuted(hx, input.sorted_indices), weights)
        output, cells = (
            None if t is None else PackedSequence(t, batch_sizes, input.sorted_indices, input.unsorted_indices)
            for t in (found.output, found.cells)
        )
        return _as_torch_has_it(output, permuted(found.states, input.unsorted_indices), cells)
    if input.dim() == 2:
        batched = spec._replace(batch_first=False)
        found = _as_a_batch(lambda x, h, own: run(batched, asked, x, h, weights, own), input, hx, extras)
        return _apart(asked, found)
    if extras.given and (asked == "reference" or cuda.takes(input)):
        return _run_masked(spec, asked, input, hx, weights, extras)
    if extras.given and not (asked == "eager" and _is_plain(extras, input.shape[1 if spec.batch_first else 0])):
        return _run_segments(spec, asked, input, hx, extras, lambda x, h: run(spec, asked, x, h, weights, NO_EXTRAS))
    dense = _run_layers(spec, asked, input.transpose(0, 1) if spec.batch_first else input, None, hx, weights)
    if not spec.batch_first:
        return _as_torch_has_it(*dense)
    return _by_batch(asked, dense)


def run_packed(spec: Spec, input: Any, hx: Hidden, extras: Extras, call: Callable[[Any, Any], Any]) -> Any:
    """An eager call with padded input and lengths or resets, for layers that have packed input alone.

    Args:
        call: the layers on packed input, or on this where it is all there, and initial states
    """
    _check(extras, input, spec.batch_first)
    unbatched = input.dim() == 2
    if _is_plain(extras, input.shape[1 if spec.batch_first and not unbatched else 0]):
        return call(input, hx)
    if not unbatched:
        return _run_segments(spec, "eager", input, hx, extras, call)
    own = spec._replace(batch_first=False)
    return _as_a_batch(lambda x, h, e: _run_segments(own, "eager", x, h, e, call), input, hx, extras)


def _as_a_batch(run: Callable[..., Any], input: Tensor, hx: Hidden, extras: Extras) -> Any:
    """``run(input, hx, extras)`` of one sequence without a batch dimension, made [T, 1, I] for it."""
    own = Extras(*(None if t is None else t.unsqueeze(-1) for t in extras))
    output, states, *cells = run(input.unsqueeze(1), _map(hx, Tensor.unsqueeze, 1), own)
    return output.squeeze(1), _map(states, Tensor.squeeze, 1), *(t.squeeze(1) for t in cells)


def _apart(asked: str, found: tuple[Any, ...]) -> tuple[Any, ...]:
    """The results of a call, of which the output and all cell states are views of what the layer has given."""
    if asked != "operators":
        return found
    output, states, *cells = found
    return ops.apart(output), states, *(ops.apart(t) for t in cells)


def _by_batch(asked: str, found: _Found) -> tuple[Any, ...]:
    """What ``batch_first`` is to give."""
    views = (None if t is None else t.transpose(0, 1) for t in (found.output, found.cells))
    return _apart(asked, _as_torch_has_it(next(views), found.states, *views))


def _as_torch_has_it(output: Any, states: Any, cells: Any) -> tuple[Any, ...]:
    return (output, states) if cells is None else (output, states, cells)


def _check(extras: Extras, input: Any, batch_first: bool) -> None:
    """Raises TypeError or ValueError where lengths or reset are not what they have to be, their values apart."""
    if isinstance(input, PackedSequence):
        raise ValueError("lengths and reset are for padded input; a PackedSequence has its own lengths")
    lengths, reset = extras
    time = 1 if batch_first and input.dim() == 3 else 0
    if lengths is not None:
        if not isinstance(lengths, Tensor) or lengths.dtype not in _INTEGERS:
            raise TypeError("lengths must be a tensor or list of integers")
        _check_size("lengths", lengths, (*input.shape[:time], *input.shape[time + 1 : -1]))
    if reset is not None:
        if not isinstance(reset, Tensor) or reset.dtype is not torch.bool:
            raise TypeError("reset must be a tensor of bool")
        _check_size("reset", reset, input.shape[:-1])
    if any(t is not None and t.is_meta for t in (input, lengths, reset)):
        raise ValueError("lengths and reset are not served on the meta device: what is computed follows their values")


def _check_size(name: str, given: Tensor, expected: Sequence[int]) -> None:
    if given.shape != tuple(expected):
        raise ValueError(f"{name}: expected size {list(expected)}, got {list(given.shape)}")


def _is_plain(extras: Extras, steps: int) -> bool:
    """Whether all sequences have all steps, and the state is never cleared."""
    lengths, reset = extras
    return reset is None and (lengths is None or bool((segments.integers(lengths) == steps).all()))


def _run_segments(
    spec: Spec, asked: str, input: Tensor, hx: Hidden, extras: Extras, call: Callable[[PackedSequence, Any], Any]
) -> Any:
    """Padded input with lengths or resets: packed, run, and put back.

    The segments are cut on the CPU. What stands in a CUDA tensor of lengths or resets has to come there first, which
    waits for all that the stream still has to do.

    Args:
        call: the layers on packed input and initial states
    """
    steps, batch = (input.shape[1], input.shape[0]) if spec.batch_first else input.shape[:2]
    cut = ops.segments if asked == "operators" else segments.of_padded
    found = segments.on(input.device, cut(extras.lengths, extras.reset, steps, batch, spec.batch_first))
    packed, first = _packed(found, input.reshape(-1, input.shape[-1]), hx, spec.directions)
    output, states, *cells = call(packed, first)
    output, *cells = (
        segments.scatter(found, t.data, steps * batch).view(*input.shape[:2], t.data.shape[1]) for t in (output, *cells)
    )
    return output, _final_states(found, states, hx, spec.directions), *cells


def _run_masked(spec: Spec, asked: str, input: Tensor, hx: Hidden, weights: Sequence[Tensor], extras: Extras) -> Any:
    """The same where lengths and resets are looked at step by step, and nobody waits for their values."""
    x = input.transpose(0, 1) if spec.batch_first else input
    lengths, reset = extras
    if lengths is not None and lengths.is_cpu:
        _check_values(lengths, x.shape[0])
    own = Mask(
        None if lengths is None else savable(lengths.to(x.device, torch.int64, non_blocking=True).contiguous()),
        None if reset is None else savable((reset.t() if spec.batch_first else reset).to(x.device, non_blocking=True)),
    )
    found = _run_layers(spec, asked, x, own, hx, weights)
    return _by_batch(asked, found) if spec.batch_first else _as_torch_has_it(*found)


def _check_values(lengths: Tensor, steps: int) -> None:
    """Raises where a length is not from 0 to T; a graph does so when it runs, unless transforms are recorded in it."""
    if not torch.compiler.is_compiling() and torch._C._len_torch_dispatch_stack() == 0:
        segments.check_lengths(segments.integers(lengths), steps)
    elif not torch._C._are_functorch_transforms_active():
        torch._assert_async(
            ((lengths >= 0) & (lengths <= steps)).all(), "lengths must be from 0 to T, the number of steps of the input"
        )


def _savable_input(input: Any) -> Any:
    return PackedSequence(savable(input.data), *input[1:]) if isinstance(input, PackedSequence) else savable(input)


def is_empty_batch(spec: Spec, input: Any) -> bool:
    """Whether padded input has steps and no sequence, which torch computes."""
    if torch.compiler.is_compiling() or not isinstance(input, Tensor) or input.dim() != 3:
        return False
    steps, batch = (input.shape[1], input.shape[0]) if spec.batch_first else input.shape[:2]
    return batch == 0 and steps > 0


def is_jagged(input: Any) -> bool:
    """Whether it is a nested tensor with the layout ``torch.jagged``."""
    return isinstance(input, Tensor) and input.layout is torch.jagged


def run_jagged(spec: Spec, input: Any, hx: Any, extras: Extras, call: Callable[[PackedSequence, Any], Any]) -> Any:
    """A nested tensor [B, j, I] by way of the same sequences packed, without padding.

    Args:
        call: the layers on packed input and initial states

    Returns:
        What ``call`` does, with the output, and all cell states, as nested tensors that share the ragged dimension of
        the input.
    """
    if extras.given:
        raise ValueError("lengths and reset are for padded input; a nested tensor has its own lengths")
    packed, first, found = pack_jagged(spec, input, hx)
    output, states, *cells = call(packed, first)
    count = len(input.values())
    # Else torch takes all rows together for the length of the longest.
    longest = len(found.batch_sizes) if bool(found.any_steps.any()) else 0
    output, *cells = (
        torch.nested.nested_tensor_from_jagged(
            segments.scatter(found, t.data, count),
            input.offsets(),
            input.lengths(),
            max_seqlen=longest,
        )
        for t in (output, *cells)
    )
    return output, _final_states(found, states, hx, spec.directions), *cells


def pack_jagged(spec: Spec, input: Any, hx: Any) -> tuple[PackedSequence, Any, segments.Segments]:
    """The sequences with steps of a nested tensor, packed, and their initial states.

    Raises:
        RuntimeError: ``hx`` is not of the size that it has to be.
        ValueError: the ragged dimension is not that of time, or it has no values.
    """
    if input.dim() != 3 or isinstance(input.shape[1], int):
        raise ValueError(f"a nested input has to be [B, j, I] with a ragged j, got {tuple(input.shape)}")
    if not (input.is_cpu or input.is_cuda):
        raise ValueError(f"a nested input has to be on the CPU or a CUDA device, got {input.device}")
    for k, state in enumerate(hx if isinstance(hx, (tuple, list)) else () if hx is None else (hx,)):
        if not isinstance(state, Tensor) or state.dim() != 3 or state.shape[1] != input.shape[0]:
            expected = state_shape(spec._replace(batch_first=True), input, k)
            got = list(state.shape) if isinstance(state, Tensor) else type(state).__name__
            raise RuntimeError(f"Expected hidden size {expected}, got {got}")
    offsets = segments.integers(input.offsets())
    length = np.diff(offsets) if input.lengths() is None else segments.integers(input.lengths())
    # On CUDA this has waited for the offsets: packed data has its batch sizes on the CPU.
    found = segments.on(input.device, segments.segments(length, None, offsets[:-1], 1))
    return *_packed(found, input.values(), hx, spec.directions), found


def _packed(found: segments.Segments, data: Tensor, hx: Any, directions: int) -> tuple[PackedSequence, Any]:
    """Segments of ``data`` [rows, I] and their initial states, for sequences with ``hx``."""
    first = _map(hx, functools.partial(segments.initial_states, found, directions))
    return PackedSequence(segments.gather(found, data), found.batch_sizes), first


def _final_states(found: segments.Segments, states: Any, hx: Any, directions: int) -> Any:
    """The final states of sequences with ``hx`` from those of their segments."""
    if isinstance(states, Tensor):
        return segments.final_states(found, states, hx, directions)
    before = (None, None) if hx is None else hx
    return tuple(segments.final_states(found, s, b, directions) for s, b in zip(states, before, strict=True))


def _map(states: Any, fn: Callable[..., Tensor], *args: int | Tensor) -> Any:
    """``fn`` of each state of ``h`` or ``(h, c)``; None stays None."""
    if states is None or isinstance(states, Tensor):
        return None if states is None else fn(states, *args)
    return tuple(fn(s, *args) for s in states)


def permuted(states: Any, indices: Tensor | None) -> Any:
    """States [layers·D, B, H] with their sequences in another order."""
    return states if indices is None else _map(states, Tensor.index_select, 1, indices)


def _run_layers(spec: Spec, asked: str, x: Tensor, batch_sizes: Steps, hx: Hidden, weights: Sequence[Tensor]) -> _Found:
    """Args: x: [T, B, I], or [N, I] when packed; hx: [layers·D, B, H] each."""
    run_layer: Callable[..., autograd.Outputs] = _LAYERS[asked]
    h0, c0 = (hx, None) if hx is None or isinstance(hx, Tensor) else hx
    given: list[Tensor | None] = list(weights)
    each = 5 if spec.proj_size else 4
    if not spec.bias:
        given = []
        for k in range(0, len(weights), each - 2):
            given += [*weights[k : k + 2], None, None, *weights[k + 2 : k + each - 2]]
    if spec.num_layers == 1:
        y, h, c, cells = run_layer(spec.cell, x, batch_sizes, h0, c0, given, spec.cell_states)
        return _Found(y, h if c is None else (h, c), _like(y, cells))
    directions = spec.directions
    h_n, c_n = [], []
    cells = None
    for k in range(spec.num_layers):
        if k > 0 and spec.training and spec.dropout > 0:
            x = torch.dropout(x, spec.dropout, True)
        states = slice(k * directions, (k + 1) * directions)
        layer_h0, layer_c0 = (None if s is None else s[states] for s in (h0, c0))
        layer_weights = given[each * k * directions : each * (k + 1) * directions]
        last = k + 1 == spec.num_layers
        x, h, c, cells = run_layer(
            spec.cell, x, batch_sizes, layer_h0, layer_c0, layer_weights, spec.cell_states and last
        )
        h_n.append(h)
        if c is not None:
            c_n.append(c)
    return _Found(x, (torch.cat(h_n), torch.cat(c_n)) if c_n else torch.cat(h_n), _like(x, cells))


def _like(output: Tensor, cells: Tensor | None) -> Tensor | None:
    """All cell states in the dtype of the output, as c_n is; the kernels keep them wider."""
    return None if cells is None else cells.to(output.dtype)


def _run_step(
    spec: Spec, asked: str, input: Tensor, hx: Hidden, weights: Sequence[Tensor]
) -> Tensor | tuple[Tensor, Tensor]:
    """One step of a cell without an obstacle. input: [B, I] or [I]; hx: [B, H] or [H] each."""
    if input.dim() == 1:
        states = _run_step(spec, asked, input.unsqueeze(0), _map(hx, Tensor.unsqueeze, 0), weights)
        return _map(states, Tensor.squeeze, 0)  # type: ignore[no-any-return]
    layer = spec._replace(single_step=False)
    found = _run_layers(layer, asked, input.unsqueeze(0), None, _map(hx, Tensor.unsqueeze, 0), weights)
    return _map(found.states, Tensor.squeeze, 0)  # type: ignore[no-any-return]
