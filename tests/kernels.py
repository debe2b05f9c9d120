"""Calls straight to ``_cpu``, below modules and autograd: operands of one layer, and every result of both passes."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyrnnfast import _cpu
from pyrnnfast.passes import CELLS as WIDTHS

Operands = dict[str, Any]
"""The arguments of ``_cpu.forward`` or ``_cpu.backward`` by name, in order."""

THRESHOLDS = ("chunk_rows", "unpacked_rows", "serial_operations", "rows_per_thread", "processors")

_PACKED = {"unpacked_rows": 0}
# What the kernels decide by size, forced, so that small sizes take every road.
SCHEDULES: dict[str, dict[str, int]] = {
    # Each step by itself, its input's product included, which only weights that are packed have.
    "chunks_of_one_step": {"chunk_rows": 1} | _PACKED,
    "chunks_of_7_rows": {"chunk_rows": 7},
    "unpacked": {"unpacked_rows": 10**6},
    "packed": _PACKED,
    # Rows cut into as many groups as there are threads, where threads would rather share the units.
    "groups_of_rows": {"rows_per_thread": 1, "chunk_rows": 64} | _PACKED,
}


def use(schedule: str) -> None:
    """Until the end of the test (conftest.py)."""
    for name, value in SCHEDULES[schedule].items():
        _cpu.set_threshold(name, value)


@dataclass(frozen=True)
class Layer:
    batch_sizes: tuple[int, ...]
    hidden: int
    inputs: int = 37
    directions: int = 1
    packed: bool = False
    """Rows as [N, features] with ``batch_sizes``, else [T, B, features]."""
    single_step: bool = False
    """[B, features], with states [B, H]."""
    projected: int = 0
    """Columns of h of an LSTM with a projection."""

    def __str__(self) -> str:
        kind = "packed" if self.packed else "step" if self.single_step else "dense"
        sizes = f"T{len(self.batch_sizes)}-B{self.batch_sizes[0]}-I{self.inputs}-H{self.hidden}"
        return f"{kind}-{sizes}" + (f"-P{self.projected}" if self.projected else "") + "-bi" * (self.directions == 2)

    @property
    def rows(self) -> int:
        return sum(self.batch_sizes)

    def data(self, features: int) -> tuple[int, ...]:
        if self.packed or self.single_step:
            return self.rows, features
        return len(self.batch_sizes), self.batch_sizes[0], features

    def states(self, features: int) -> tuple[int, ...]:
        return (() if self.single_step else (self.directions,)) + (self.batch_sizes[0], features)


def forward_operands(cell: str, layer: Layer, dtype: torch.dtype, threads: int = 1, seed: int = 7) -> Operands:
    """All that a call may have. Outputs are filled with NaN, so that whatever is not written shows."""
    widths = WIDTHS[cell]
    generator = torch.Generator().manual_seed(seed)
    H, I, P, gates = layer.hidden, layer.inputs, layer.projected or layer.hidden, widths.gates * layer.hidden

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*shape, generator=generator)).to(dtype)

    def out(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.full(shape, float("nan"), dtype=dtype)

    cells_dtype = torch.float32 if dtype.itemsize == 2 else dtype
    weights: tuple[Tensor, ...] = ()
    kept: tuple[Tensor | None, ...] = ()
    for _ in range(layer.directions):
        weights += (random(gates, I, scale=I**-0.5), random(gates, P, scale=P**-0.5), random(gates), random(gates))
        weights += (random(P, H, scale=H**-0.5),) if layer.projected else ()
        kept += (
            out(layer.rows, widths.saved * H) if widths.saved else None,
            out(layer.rows, H, dtype=cells_dtype) if widths.has_cell else None,
        )
    return {
        "cell": cell,
        "x": random(*layer.data(I)),
        "h0": random(*layer.states(P)),
        "c0": random(*layer.states(H)) if widths.has_cell else None,
        "weights": weights,
        "y": out(*layer.data(layer.directions * P)),
        "h_n": out(*layer.states(P)),
        "c_n": out(*layer.states(H)) if widths.has_cell else None,
        "kept": kept,
        "batch_sizes": torch.tensor(layer.batch_sizes) if layer.packed else None,
        "threads": threads,
    }


def backward_operands(forward: Operands, seed: int = 8) -> Operands:
    """For the call after that with the operands `forward`."""
    generator = torch.Generator().manual_seed(seed)

    def random_like(t: Tensor | None) -> Tensor | None:
        return None if t is None else torch.randn(t.shape, generator=generator).to(t.dtype)

    def out_like(t: Tensor | None) -> Tensor | None:
        return None if t is None else torch.full_like(t, float("nan"))

    def same(*names: str) -> Operands:
        return {name: forward[name] for name in names}

    widths, y = WIDTHS[forward["cell"]], forward["y"]
    directions, of_units = len(forward["kept"]) // 2, forward["weights"][0].shape[0] // widths.gates
    units = y.new_empty(*y.shape[:-1], directions * of_units)  # y, were nothing projected
    cells = units.to(forward["kept"][1].dtype) if widths.has_cell else None
    return (
        same("cell", "x", "h0", "c0", "weights", "y", "kept")
        | {f"grad_{name}": random_like(forward[name]) for name in ("y", "h_n", "c_n")}
        | {"grad_cells": random_like(cells)}
        | {f"d{name}": out_like(forward[name]) for name in ("x", "h0", "c0")}
        | {"dweights": tuple(out_like(w) for w in forward["weights"])}
        | {"dgates": out_like(torch.cat([units] * widths.dgates, -1))}
        | same("batch_sizes", "threads")
    )


def tensors(operands: Operands, names: Iterable[str]) -> dict[str, Tensor]:
    """Those present of the operands `names`, elements of tuples by number."""
    found = {}
    for name in names:
        value = operands[name]
        parts = {f"{name}[{i}]": t for i, t in enumerate(value)} if isinstance(value, tuple) else {name: value}
        found |= {label: t for label, t in parts.items() if t is not None}
    return found


def run(cell: str, layer: Layer, dtype: torch.dtype, threads: int = 1) -> dict[str, Tensor]:
    """Forward and backward; every output of both."""
    forward = forward_operands(cell, layer, dtype, threads)
    _cpu.forward(*forward.values())
    backward = backward_operands(forward)
    _cpu.backward(*backward.values())
    return tensors(forward, ("y", "h_n", "c_n", "kept")) | tensors(backward, ("dx", "dh0", "dc0", "dweights", "dgates"))
