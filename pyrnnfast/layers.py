"""Layers, directions and layouts around one recurrent layer: batches padded, packed or of one sequence.

Nothing here asks whether the kernels serve a call (obstacles.py), and everything is made of torch's operators around
``layer`` in the form that the moment asks for.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from . import autograd, ops, segments, transforms
from .obstacles import Hidden, Spec

_LAYERS = {"eager": autograd.layer, "operators": ops.layer, "transforms": transforms.layer}


class Extras(NamedTuple):
    """What a call may have that torch.nn's has not; see :class:`pyrnnfast.functional.Options`."""

    lengths: Tensor | None = None
    reset: Tensor | None = None

    def __bool__(self) -> bool:
        return self.lengths is not None or self.reset is not None


class _Found(NamedTuple):
    """Of a stack of layers: the last one's output and cell states, and the final states of all."""

    output: Tensor
    states: Tensor | tuple[Tensor, Tensor]
    cells: Tensor | None


def run(spec: Spec, asked: str, input: Any, hx: Hidden, weights: Sequence[Tensor], extras: Extras) -> Any:
    """A call without an obstacle, on our kernels; packed input has been checked.

    Args:
        asked: the form of a layer, see :func:`pyrnnfast.obstacles.form`
    """
    if spec.single_step:
        return _run_step(spec, asked, input, hx, weights)
    if isinstance(input, PackedSequence):
        if extras:
            raise ValueError("lengths and reset are for padded input; a PackedSequence has its own lengths")
        x, batch_sizes = input.data, input.batch_sizes
        found = _run_layers(spec, asked, x, batch_sizes, _permuted(hx, input.sorted_indices), weights)
        output, cells = (
            None if t is None else PackedSequence(t, batch_sizes, input.sorted_indices, input.unsorted_indices)
            for t in (found.output, found.cells)
        )
        return _as_torch_has_it(output, _permuted(found.states, input.unsorted_indices), cells)
    if input.dim() == 2:
        batched = spec._replace(batch_first=False)
        own = Extras(*(None if t is None else t.unsqueeze(-1) for t in extras))
        output, states, *cells = run(batched, asked, input.unsqueeze(1), _map(hx, Tensor.unsqueeze, 1), weights, own)
        return output.squeeze(1), _map(states, Tensor.squeeze, 1), *(t.squeeze(1) for t in cells)
    if extras:
        return _run_segments(spec, asked, input, hx, weights, extras)
    dense = _run_layers(spec, asked, input.transpose(0, 1) if spec.batch_first else input, None, hx, weights)
    if not spec.batch_first:
        return _as_torch_has_it(*dense)
    return _as_torch_has_it(
        dense.output.transpose(0, 1), dense.states, None if dense.cells is None else dense.cells.transpose(0, 1)
    )


def _as_torch_has_it(output: Any, states: Any, cells: Any) -> tuple[Any, ...]:
    return (output, states) if cells is None else (output, states, cells)


def _run_segments(spec: Spec, asked: str, input: Tensor, hx: Hidden, weights: Sequence[Tensor], extras: Extras) -> Any:
    """Padded input with lengths or resets: packed, run, and put back."""
    steps, batch = (input.shape[1], input.shape[0]) if spec.batch_first else input.shape[:2]
    lengths, reset = _checked_extras(extras, steps, batch, spec.batch_first)
    begin = torch.arange(batch) * (steps if spec.batch_first else 1)
    found = segments.segments(lengths, reset, begin, 1 if spec.batch_first else batch)
    rows = input.reshape(-1, input.shape[-1]).index_select(0, found.places)
    first = _map(hx, functools.partial(segments.initial_states, found, spec.directions))
    run = (
        _run_layers(spec, asked, rows, found.batch_sizes, first, weights)
        if len(rows)
        else _no_rows(spec, rows, weights)
    )
    output, cells = (
        None if t is None else segments.scatter(found, t, steps * batch).view(*input.shape[:2], -1)
        for t in (run.output, run.cells)
    )
    given = (hx,) if hx is None or isinstance(hx, Tensor) else hx
    states = (run.states,) if isinstance(run.states, Tensor) else run.states
    final = tuple(
        segments.final_states(found, lengths, s, given[k] if hx is not None else None, spec.directions)
        for k, s in enumerate(states)
    )
    return _as_torch_has_it(output, final if len(final) == 2 else final[0], cells)


def _no_rows(spec: Spec, rows: Tensor, weights: Sequence[Tensor]) -> _Found:
    """What becomes of sequences that are all empty: nothing, but a function of the operands all the same."""
    output = torch.nn.functional.linear(rows, weights[0][:1]).expand(0, spec.directions * spec.hidden_size)
    state = rows.new_zeros(spec.num_layers * spec.directions, 1, spec.hidden_size)
    return _Found(output, (state, state) if spec.cell == "lstm" else state, output if spec.cell_states else None)


def _checked_extras(extras: Extras, steps: int, batch: int, batch_first: bool) -> tuple[Tensor, Tensor | None]:
    """lengths [B] and reset [T, B], on the CPU.

    Raises:
        TypeError, ValueError: they are not what they have to be.
    """
    lengths, reset = extras
    if lengths is None:
        lengths = torch.full((batch,), steps)
    elif not isinstance(lengths, Tensor) or lengths.is_floating_point() or lengths.is_complex():
        raise TypeError("lengths must be a tensor of integers")
    elif lengths.shape != (batch,):
        raise ValueError(f"lengths: expected size [{batch}], got {list(lengths.shape)}")
    lengths = lengths.detach().cpu().long()
    if bool(((lengths < 0) | (lengths > steps)).any()):
        raise ValueError(f"lengths must be from 0 to {steps}, the number of steps of the input")
    if reset is None:
        return lengths, None
    if not isinstance(reset, Tensor) or reset.dtype is not torch.bool:
        raise TypeError("reset must be a tensor of bool")
    expected = (batch, steps) if batch_first else (steps, batch)
    if reset.shape != expected:
        raise ValueError(f"reset: expected size {list(expected)}, got {list(reset.shape)}")
    return lengths, (reset.t() if batch_first else reset).detach().cpu()


def _map(states: Any, fn: Callable[..., Tensor], *args: int | Tensor) -> Any:
    """``fn`` of each state of ``h`` or ``(h, c)``; None stays None."""
    if states is None or isinstance(states, Tensor):
        return None if states is None else fn(states, *args)
    return tuple(fn(s, *args) for s in states)


def _permuted(states: Any, indices: Tensor | None) -> Any:
    """States [layers·D, B, H] with their sequences in another order."""
    return states if indices is None else _map(states, Tensor.index_select, 1, indices)


def _run_layers(
    spec: Spec, asked: str, x: Tensor, batch_sizes: Tensor | None, hx: Hidden, weights: Sequence[Tensor]
) -> _Found:
    """Args: x: [T, B, I], or [N, I] when packed; hx: [layers·D, B, H] each."""
    run_layer = _LAYERS[asked]
    h0, c0 = (hx, None) if hx is None or isinstance(hx, Tensor) else hx
    given: list[Tensor | None] = list(weights)
    if not spec.bias:
        given = [w for k in range(0, len(weights), 2) for w in (*weights[k : k + 2], None, None)]
    if spec.num_layers == 1:
        y, h, c, cells = run_layer(spec.cell, x, batch_sizes, h0, c0, given, spec.cell_states)
        return _Found(y, h if c is None else (h, c), cells)
    directions = spec.directions
    h_n, c_n = [], []
    cells = None
    for k in range(spec.num_layers):
        if k > 0 and spec.training and spec.dropout > 0:
            x = torch.dropout(x, spec.dropout, True)
        states = slice(k * directions, (k + 1) * directions)
        layer_h0, layer_c0 = (None if s is None else s[states] for s in (h0, c0))
        layer_weights = given[4 * k * directions : 4 * (k + 1) * directions]
        last = k + 1 == spec.num_layers
        x, h, c, cells = run_layer(
            spec.cell, x, batch_sizes, layer_h0, layer_c0, layer_weights, spec.cell_states and last
        )
        h_n.append(h)
        if c is not None:
            c_n.append(c)
    return _Found(x, (torch.cat(h_n), torch.cat(c_n)) if c_n else torch.cat(h_n), cells)


def _run_step(
    spec: Spec, asked: str, input: Tensor, hx: Hidden, weights: Sequence[Tensor]
) -> Tensor | tuple[Tensor, Tensor]:
    """One step of a cell without an obstacle, on our kernels. input: [B, I] or [I]; hx: [B, H] or [H] each."""
    if input.dim() == 1:
        states = _run_step(spec, asked, input.unsqueeze(0), _map(hx, Tensor.unsqueeze, 0), weights)
        return _map(states, Tensor.squeeze, 0)  # type: ignore[no-any-return]
    if asked != "eager":
        layer = spec._replace(single_step=False)
        found = _run_layers(layer, asked, input.unsqueeze(0), None, _map(hx, Tensor.unsqueeze, 0), weights)
        return _map(found.states, Tensor.squeeze, 0)  # type: ignore[no-any-return]
    h0, c0 = hx if isinstance(hx, (tuple, list)) else (hx, None)
    return autograd.step(spec.cell, input, h0, c0, weights if spec.bias else (*weights, None, None))
