"""The one table of cases: what the layers are asked to do in the tests, and how to do it three ways.

A case is run on a module of ours, on torch.nn's, and on ``pyrnnfast.reference``. The reference runs every sequence of a
ragged batch by itself, so it knows nothing of packing, sorting or batches.

The sizes are chosen by what the kernels do with them. A vector has 16, 8 or 4 lanes in float32 (AVX-512, AVX2, generic)
and 8, 4 or 2 in float64. A register tile is up to 6 rows high (3 with 16 registers), and a batch of at most 3 (1) rows
has products of its own. A block of units is one vector wide going forward with several gates, else up to four.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from pyrnnfast import functional, reference

CELLS = ("rnn_tanh", "rnn_relu", "gru", "lstm")
_LAYERS = {"rnn_tanh": "RNN", "rnn_relu": "RNN", "gru": "GRU", "lstm": "LSTM"}
OUTPUTS = ("y", "h_n", "c_n")

Outputs = dict[str, Tensor]
"""``y``, ``h_n`` and, of the LSTM, ``c_n``; packed output is padded with zeros."""


@dataclass(frozen=True)
class Case:
    cell: str
    steps: int = 3
    batch: int = 2
    inputs: int = 3
    hidden: int = 5
    layers: int = 1
    bidirectional: bool = False
    bias: bool = True
    batch_first: bool = False
    unbatched: bool = False
    dropout: float = 0.0
    initial: bool = True
    """Whether initial states are given."""
    lengths: tuple[int, ...] | None = None
    """Of packed input; `steps` and `batch` follow from them."""
    single_step: bool = False
    """RNNCell, GRUCell, LSTMCell."""
    projected: int = 0
    """proj_size of the LSTM."""

    def __post_init__(self) -> None:
        if self.lengths is not None:
            object.__setattr__(self, "steps", max(self.lengths))
            object.__setattr__(self, "batch", len(self.lengths))
        if self.unbatched:
            object.__setattr__(self, "batch", 1)

    def __str__(self) -> str:
        parts = [self.cell + ("cell" if self.single_step else "")]
        if self.lengths is not None:
            parts.append("packed" + "".join(f"_{n}" for n in self.lengths))
        else:
            if not self.single_step:
                parts.append(f"T{self.steps}")
            parts.append("unbatched" if self.unbatched else f"B{self.batch}")
        parts += [f"I{self.inputs}", f"H{self.hidden}"]
        parts += [f"P{self.projected}"] if self.projected else []
        if self.layers > 1:
            parts.append(f"{self.layers}layers")
        for name, present in (
            ("bi", self.bidirectional),
            ("nobias", not self.bias),
            ("batchfirst", self.batch_first),
            (f"dropout{self.dropout}", self.dropout > 0),
            ("zeros", not self.initial),
        ):
            if present:
                parts.append(name)
        return "-".join(parts)

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def outputs(self) -> tuple[str, ...]:
        names = OUTPUTS if self.cell == "lstm" else OUTPUTS[:2]
        return names[1:] if self.single_step else names

    @property
    def sorted(self) -> bool:
        return self.lengths is None or all(a >= b for a, b in pairwise(self.lengths))

    # The operands ------------------------------------------------------------------------------------------------

    def module(self, library: ModuleType, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.nn.Module:
        """The module of ``torch.nn`` or ``pyrnnfast``; one seed, one set of weights, the same for every dtype."""
        torch.manual_seed(seed)
        name = _LAYERS[self.cell] + ("Cell" if self.single_step else "")
        options: dict[str, Any] = {"bias": self.bias}
        if self.cell.startswith("rnn_"):
            options["nonlinearity"] = self.cell[4:]
        if not self.single_step:
            options |= {
                "num_layers": self.layers,
                "batch_first": self.batch_first,
                "bidirectional": self.bidirectional,
                "dropout": self.dropout,
            }
            options |= {"proj_size": self.projected} if self.projected else {}
        module: torch.nn.Module = getattr(library, name)(self.inputs, self.hidden, **options)
        return module.to(dtype)

    def operands(self, dtype: torch.dtype = torch.float32, seed: int = 1) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The input (padded, if it is to be packed) and the initial states, as leaves; the same for every dtype."""
        generator = torch.Generator().manual_seed(seed)

        def leaf(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(dtype).requires_grad_()

        batch = () if self.unbatched else (self.batch,)
        sizes = (*batch, self.steps) if self.batch_first else (self.steps, *batch)
        x = leaf(*(batch if self.single_step else sizes), self.inputs)
        lead = batch if self.single_step else (self.layers * self.directions, *batch)
        columns = (self.projected or self.hidden, self.hidden)
        count = 0 if not self.initial else 2 if self.cell == "lstm" else 1
        return x, tuple(leaf(*lead, n) for n in columns[:count])

    def packed(self, x: Tensor) -> Tensor | PackedSequence:
        """What the module is given for the padded ``x``."""
        if self.lengths is None:
            return x
        return pack_padded_sequence(x, torch.tensor(self.lengths), self.batch_first, enforce_sorted=self.sorted)

    def hx(self, states: tuple[Tensor, ...]) -> Any:
        return None if not states else states if self.cell == "lstm" else states[0]

    # The three ways ----------------------------------------------------------------------------------------------

    def run(self, module: torch.nn.Module, x: Tensor, states: tuple[Tensor, ...]) -> Outputs:
        """On a module, ours or torch's."""
        if self.single_step:
            final = module(x, self.hx(states))
            return dict(zip(self.outputs, final if self.cell == "lstm" else (final,), strict=True))
        y, final = module(self.packed(x), self.hx(states))
        if isinstance(y, PackedSequence):
            y, _ = pad_packed_sequence(y, self.batch_first)
        return dict(zip(self.outputs, (y, *final) if self.cell == "lstm" else (y, final), strict=True))

    def run_reference(self, module: torch.nn.Module, x: Tensor, states: tuple[Tensor, ...]) -> Outputs:
        """On ``pyrnnfast.reference`` with the parameters of ``module``, sequence by sequence if packed."""
        weights = self.weights(module)
        if self.single_step:
            rows = x.reshape(self.batch, self.inputs)
            first = tuple(s.reshape(1, self.batch, self.hidden) for s in states)
            _, final = reference.stack(self.cell, rows, first or None, weights, [self.batch])
            return dict(zip(self.outputs, (s.reshape(*x.shape[:-1], self.hidden) for s in final), strict=True))
        time_major = x.unsqueeze(1) if self.unbatched else x.transpose(0, 1) if self.batch_first else x
        first = tuple(s.unsqueeze(1) for s in states) if self.unbatched else states
        if self.lengths is None:
            sizes = [self.batch] * self.steps
            rows = time_major.reshape(-1, self.inputs)
            y, final = reference.stack(self.cell, rows, first or None, weights, sizes, self.dropout)
            y = y.view(self.steps, self.batch, -1)
        else:
            assert self.dropout == 0, "each sequence by itself would draw its own dropout"
            columns, finals = [], []
            for b, length in enumerate(self.lengths):
                own = tuple(s[:, b : b + 1] for s in first)
                row, state = reference.stack(self.cell, time_major[:length, b], own or None, weights, [1] * length)
                columns.append(torch.nn.functional.pad(row, (0, 0, 0, self.steps - length)))
                finals.append(state)
            y = torch.stack(columns, 1)
            final = tuple(torch.cat(s, 1) for s in zip(*finals, strict=True))
        y = y.squeeze(1) if self.unbatched else y.transpose(0, 1) if self.batch_first else y
        final = tuple(s.squeeze(1) for s in final) if self.unbatched else final
        return dict(zip(self.outputs, (y, *final), strict=True))

    def weights(self, module: torch.nn.Module) -> list[list[list[Tensor | None]]]:
        """The parameters by layer and direction, as ``reference.stack`` takes them."""
        flat: list[Tensor | None] = []
        kinds = ("weight_ih", "weight_hh", "bias_ih", "bias_hh") + ("weight_hr",) * (self.projected > 0)
        for layer in range(self.layers):
            for suffix in ("", "_reverse")[: self.directions]:
                names = kinds if self.single_step else [f"{kind}_l{layer}{suffix}" for kind in kinds]
                flat += [
                    None if i in (2, 3) and not self.bias else getattr(module, name) for i, name in enumerate(names)
                ]
        directions = [flat[i : i + len(kinds)] for i in range(0, len(flat), len(kinds))]
        return [directions[i : i + self.directions] for i in range(0, len(directions), self.directions)]


class Functional(torch.nn.Module):
    """The functional form, with the parameters and the options of a module of torch.nn."""

    def __init__(self, case: Case, module: torch.nn.Module) -> None:
        super().__init__()
        self.case, self.inner = case, module

    def forward(self, x: Any, hx: Any = None) -> Any:
        case, options = self.case, {}
        name = case.cell.split("_")[0] + ("_cell" if case.single_step else "")
        if case.cell.startswith("rnn_"):
            options["nonlinearity"] = case.cell[4:]
        if not case.single_step:
            for option in ("bias", "batch_first", "bidirectional", "dropout"):
                options[option] = getattr(case, option)
            options |= {"num_layers": case.layers, "training": self.training}
        return getattr(functional, name)(x, hx, list(self.inner.parameters()), **options)


def result_weights(outputs: Outputs, seed: int = 2) -> Outputs:
    """Random ∂L/∂output of each output."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(t.shape, generator=generator).to(t.dtype) for name, t in outputs.items()}


def gradients(
    module: torch.nn.Module,
    x: Tensor,
    states: tuple[Tensor, ...],
    outputs: Outputs,
    used: tuple[str, ...] = OUTPUTS,
    weights: Outputs | None = None,
) -> dict[str, Tensor]:
    """The gradients of the input, the initial states and every parameter; only the outputs in ``used`` are used.

    Gradients that no path leads to are absent. ``weights``: ∂L/∂output, if not those of ``result_weights``.
    """
    chosen = {name: t for name, t in outputs.items() if name in used}
    weights = result_weights(outputs) if weights is None else weights
    leaves = {"x": x} | {f"state{i}": s for i, s in enumerate(states)} | dict(module.named_parameters())
    found = torch.autograd.grad(
        list(chosen.values()), list(leaves.values()), [weights[name] for name in chosen], allow_unused=True
    )
    return {f"grad {name}": g for name, g in zip(leaves, found, strict=True) if g is not None}


# The table -------------------------------------------------------------------------------------------------------

# Around the lanes of every vector and around four vectors, for which the last block is narrower; and 1.
_HIDDEN = (1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 31, 33, 48, 63, 64, 65, 67, 130)
# Each height of a tile, the last batch of the small family and the first of the large one, and unequal tiles.
_BATCH = (1, 3, 4, 5, 6, 7, 8, 13, 17)
# Equal; single steps; one sequence; sorted with ties; unsorted, so that states are permuted; many ends at one step;
# fewer active rows than a tile; and more than a tile.
_LENGTHS = (
    (3, 3, 3),
    (1, 1, 1, 1),
    (4,),
    (5, 3, 3, 1),
    (2, 5, 1, 4, 3),
    (6, 6, 2, 2, 2, 1, 1),
    (1, 9, 2, 8, 3, 7, 4, 6, 5),
    (5, 5, 5, 5, 5, 5, 5, 4, 4, 3, 2, 2, 1),
)


def _table() -> Iterator[Case]:
    for cell in CELLS:
        plain = Case(cell)
        for hidden in _HIDDEN:
            # Three steps: one with the initial states, one that follows, and one that ends.
            yield replace(plain, hidden=hidden, batch=2)
        for hidden in (17, 65, 130):
            yield replace(plain, hidden=hidden, batch=7)
        for batch in _BATCH:
            yield replace(plain, batch=batch, hidden=19)
        for steps in (1, 2, 5, 33):
            # At T = 1 without initial states there is no recurrent product at all.
            yield replace(plain, steps=steps, batch=5)
            yield replace(plain, steps=steps, batch=1, initial=False)
            yield replace(plain, steps=steps, bidirectional=True)
        for inputs in (1, 20):
            yield replace(plain, inputs=inputs)
        # Options two by two.
        for layers in (1, 2, 3):
            for bidirectional in (False, True):
                yield replace(
                    plain,
                    layers=layers,
                    bidirectional=bidirectional,
                    bias=bidirectional != (layers == 2),
                    batch_first=layers == 2,
                    initial=layers != 3,
                )
        yield replace(plain, bias=False, initial=False)
        yield replace(plain, bias=False, bidirectional=True, batch_first=True, initial=False)
        yield replace(plain, unbatched=True)
        yield replace(plain, unbatched=True, initial=False, bias=False)
        yield replace(plain, unbatched=True, batch_first=True, layers=2, bidirectional=True)
        yield replace(plain, dropout=0.4, layers=2)
        yield replace(plain, dropout=0.4, layers=3, bidirectional=True, batch_first=True, initial=False)
        # No hidden output survives: 1/(1 − p) would be infinite.
        yield replace(plain, dropout=1.0, layers=2)
        for lengths in _LENGTHS:
            yield replace(plain, lengths=lengths)
            yield replace(plain, lengths=lengths, bidirectional=True, hidden=9)
        ragged = replace(plain, lengths=(2, 5, 1, 4, 3), hidden=18)
        yield replace(ragged, initial=False)
        yield replace(ragged, initial=False, bidirectional=True)
        yield replace(ragged, layers=2, bidirectional=True, batch_first=True)
        yield replace(ragged, bias=False, layers=2)
        yield replace(ragged, lengths=(5, 3, 3, 1), layers=2, bidirectional=True, dropout=0.4)
        step = replace(plain, single_step=True)
        for hidden in (1, 7, 8, 16, 17, 33, 65):
            yield replace(step, hidden=hidden)
        for batch in (1, 5, 13):
            yield replace(step, batch=batch)
            yield replace(step, batch=batch, initial=False, bias=False)
        yield replace(step, unbatched=True)
        yield replace(step, unbatched=True, initial=False)


def _projected() -> Iterator[Case]:
    plain = Case("lstm", projected=3)
    # Around the lanes of vectors, and of four, in either direction.
    for hidden, projected in ((2, 1), (9, 4), (17, 16), (33, 7), (66, 65), (67, 17), (130, 64), (130, 129)):
        yield replace(plain, hidden=hidden, projected=projected)
        yield replace(plain, hidden=hidden, projected=projected, batch=7, steps=2)
    for batch in (1, 3, 4, 8, 13):
        yield replace(plain, batch=batch, hidden=19, projected=18)
    for steps in (1, 33):
        yield replace(plain, steps=steps, batch=5)
        yield replace(plain, steps=steps, batch=1, initial=False, bidirectional=True)
    yield replace(plain, layers=2, bidirectional=True, batch_first=True)
    yield replace(plain, layers=3, bias=False, initial=False)
    yield replace(plain, unbatched=True)
    yield replace(plain, unbatched=True, layers=2, bidirectional=True, bias=False)
    yield replace(plain, dropout=0.4, layers=2)
    for lengths in _LENGTHS[3:]:
        yield replace(plain, lengths=lengths, hidden=18, projected=17)
        yield replace(plain, lengths=lengths, bidirectional=True, layers=2, initial=False)


TABLE = tuple(dict.fromkeys((*_table(), *_projected())))
"""Every case once."""


# A few that differ in what they ask of autograd, for tests that are slow or that go by kind.
SMALL = (
    *(
        case
        for cell in CELLS
        for case in (
            Case(cell, hidden=3),
            Case(cell, hidden=2, layers=2, bidirectional=True, batch_first=True),
            Case(cell, hidden=2, bias=False, initial=False),
            Case(cell, hidden=2, unbatched=True),
            Case(cell, hidden=2, inputs=2, lengths=(1, 3, 2), bidirectional=True),
            Case(cell, hidden=2, inputs=2, lengths=(3, 2, 2), layers=2, initial=False),
            Case(cell, hidden=3, single_step=True),
            Case(cell, hidden=3, single_step=True, initial=False, bias=False),
        )
    ),
    Case("lstm", hidden=3, projected=2),
    Case("lstm", hidden=3, projected=2, layers=2, bidirectional=True, bias=False, batch_first=True, initial=False),
    Case("lstm", hidden=3, projected=1, inputs=2, lengths=(1, 3, 2), bidirectional=True),
)
