"""The rows of the benchmark: which there are, and how each side, ours and torch.nn's, does one call of them.

Both sides have the same weights and the same input, made from fixed seeds. ``mode`` is ``inference``, one call without
gradients, or ``training``, one call and the gradients of its input and of every weight.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import pyrnnfast

Shape = tuple[int, int, int, int]
"""T, B, I, H."""

Step = Callable[[], list[Tensor]]
"""One call of one side: its outputs, and in training the gradients."""

CELLS = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU, "rnn": torch.nn.RNN}
_SINGLE_STEPS = {"lstm": torch.nn.LSTMCell, "gru": torch.nn.GRUCell, "rnn": torch.nn.RNNCell}
MODES = ("inference", "training")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

SHAPES: dict[str, tuple[Shape, ...]] = {
    # One layer, dense: the ten shapes over which the geometric means are taken.
    "layer": (
        (1, 1, 128, 128),
        (100, 1, 128, 128),
        (100, 1, 512, 512),
        (100, 16, 128, 128),
        (100, 32, 256, 256),
        (100, 64, 512, 512),
        (50, 64, 1024, 1024),
        (1000, 1, 256, 256),
        (1000, 8, 64, 64),
        (500, 128, 64, 64),
    ),
    # Two layers, bidirectional.
    "stacked": ((100, 16, 256, 256),),
    # Packed sequences of every length from T down to about T/B.
    "packed": ((200, 8, 64, 64), (200, 8, 256, 256), (200, 64, 64, 64), (200, 64, 256, 256)),
    # LSTMCell, GRUCell, RNNCell, with a state.
    "cell": ((1, 1, 128, 128), (1, 32, 128, 128)),
    # A layer that is fed one step at a time, with the state that it gave last.
    "streaming": ((1, 1, 128, 128), (1, 1, 512, 512)),
    # An LSTM whose h is projected to half of its units.
    "projected": ((1, 1, 256, 512), (100, 1, 256, 512), (100, 16, 256, 512), (50, 64, 512, 1024)),
}
KINDS = tuple(SHAPES)


@dataclass(frozen=True)
class Row:
    kind: str
    cell: str
    mode: str
    shape: Shape
    threads: int
    dtype: str = "float32"

    def __str__(self) -> str:
        sizes = ",".join(map(str, self.shape))
        return f"{self.kind} {self.cell} {self.mode} {sizes} {self.dtype}, {self.threads} thread(s)"

    @property
    def layers(self) -> int:
        return 2 if self.kind == "stacked" else 1

    @property
    def directions(self) -> int:
        return 2 if self.kind == "stacked" else 1

    @property
    def outputs(self) -> int:
        """Columns of h of each direction."""
        return self.shape[3] // 2 if self.kind == "projected" else self.shape[3]

    @property
    def lengths(self) -> list[int]:
        """Of the sequences, longest first."""
        steps, batch = self.shape[:2]
        return [-(-steps * (batch - k) // batch) for k in range(batch)] if self.kind == "packed" else [steps] * batch

    @property
    def batch_sizes(self) -> list[int]:
        """The sequences active at each step, [T]."""
        ends = Counter(self.lengths)
        gone = itertools.accumulate(ends[t] for t in range(self.shape[0]))
        return [self.shape[1] - n for n in gone]

    @property
    def has_state(self) -> bool:
        """Whether the call is given a state; otherwise its first step needs no recurrent product."""
        return self.kind in ("cell", "streaming")


def table(
    kinds: Sequence[str],
    cells: Sequence[str],
    modes: Sequence[str],
    shapes: Sequence[Shape] | None,
    threads: Sequence[int],
    dtypes: Sequence[str],
) -> Iterator[Row]:
    """The rows of these kinds and so on; shapes: instead of those of each kind."""
    for dtype, kind, cell, mode in itertools.product(dtypes, kinds, cells, modes):
        if (kind == "streaming" and mode == "training") or (kind == "projected" and cell != "lstm"):
            continue
        for shape, n in itertools.product(shapes or SHAPES[kind], threads):
            if kind in ("cell", "streaming") and shape[0] != 1:
                raise ValueError(f"a row of kind {kind} has T = 1, not {shape[0]}")
            yield Row(kind, cell, mode, shape, n, dtype)


class NotFused(RuntimeError):
    """A row of ours would run on torch's operators."""


def module(row: Row, ours: bool) -> torch.nn.Module:
    """The module of one side; both sides have the same weights."""
    inputs, hidden = row.shape[2:]
    torch.manual_seed(0)
    stock: torch.nn.Module
    if row.kind == "cell":
        stock = _SINGLE_STEPS[row.cell](inputs, hidden)
    else:
        options = {"proj_size": row.outputs} if row.kind == "projected" else {}
        stock = CELLS[row.cell](inputs, hidden, num_layers=row.layers, bidirectional=row.directions == 2, **options)
    stock.to(DTYPES[row.dtype])
    return pyrnnfast.replace(stock) if ours else stock


def _random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def input_of(row: Row) -> Tensor | PackedSequence:
    steps, batch, inputs, _ = row.shape
    x = _random(steps, batch, inputs, seed=1).to(DTYPES[row.dtype])  # [T, B, I]
    if row.kind == "packed":
        return pack_padded_sequence(x, torch.tensor(row.lengths))
    return x[0] if row.kind == "cell" else x


def _state(row: Row) -> Any:
    if not row.has_state:
        return None
    lead = () if row.kind == "cell" else (1,)
    states = [_random(*lead, row.shape[1], row.shape[3], seed=s).tanh().to(DTYPES[row.dtype]) for s in (2, 3)]
    return (states[0], states[1]) if row.cell == "lstm" else states[0]


def _flat(result: Any) -> list[Tensor]:
    """The tensors of a result or a state in their order: y, h_n, c_n of a layer; h, c of a cell."""
    if isinstance(result, PackedSequence):
        return [result.data]
    if result is None or isinstance(result, Tensor):
        return [] if result is None else [result]
    return [tensor for part in result for tensor in _flat(part)]


def step(row: Row, module: torch.nn.Module) -> Step:
    """The row's call on ``module``, to be made without gradients in inference."""
    x, state = input_of(row), _state(row)

    if row.kind == "streaming":

        def stream() -> list[Tensor]:
            nonlocal state
            y, state = module(x, state)
            return [y]

        return stream
    if row.mode == "inference":
        return lambda: _flat(module(x, state))

    leaves = [t.requires_grad_() for t in (*_flat(x), *_flat(state))] + list(module.parameters())
    output_rows = sum(row.batch_sizes)
    gradient = _random(output_rows, row.directions * row.outputs, seed=4).to(DTYPES[row.dtype])

    def train() -> list[Tensor]:
        y = _flat(module(x, state))[0]
        return [y.detach(), *torch.autograd.grad(y, leaves, gradient.view_as(y))]

    return train


def _one_step_cell(row: Row) -> Step:
    """nn.LSTMCell with the weights of the row's layer, on its single step: torch's lightest way to do the same."""
    inputs, hidden = row.shape[2:]
    cell = torch.nn.LSTMCell(inputs, hidden).to(DTYPES[row.dtype])
    weights = module(row, ours=False).state_dict()
    cell.load_state_dict({name.removesuffix("_l0"): weight for name, weight in weights.items()})
    x = input_of(row)
    assert isinstance(x, Tensor)
    x = x[0]
    return lambda: [cell(x)[0]]


def dense_batches(row: Row) -> Counter[int]:
    """Of a small ragged training row, the batch sizes of its steps, each to be timed dense; of others none."""
    ragged = row.kind == "packed" and row.mode == "training" and row.shape[1] <= 8
    return Counter(row.batch_sizes) if ragged else Counter()


def our_step(row: Row, prepacked: bool = False) -> Step:
    """The row's call on ours.

    Raises:
        NotFused: it would not run on our kernels.
    """
    ours = module(row, ours=True)
    found = pyrnnfast.explain(ours, input_of(row), _state(row))
    if found.path != "fused":
        raise NotFused(f"not fused but {found}")
    return step(row, pyrnnfast.prepack(ours) if prepacked else ours)


def sides(row: Row) -> dict[str, Step]:
    """What to time turn by turn: ``torch``, ``ours``, and what else the row is to be compared with.

    ``torch_cell``: nn.LSTMCell, beside a single step of nn.LSTM; ``ours_float32``: beside other dtypes; ``dense_N``:
    our dense training step over T steps of batch N, beside a ragged one, which is then timed among them once more
    (``ours_beside_dense``): behind torch's it finds the caches empty, and they do not.

    Raises:
        NotFused: what is called ours would not run on our kernels.
    """

    result = {"torch": step(row, module(row, ours=False)), "ours": our_step(row)}
    if row.kind == "layer" and row.cell == "lstm" and row.mode == "inference" and row.shape[:2] == (1, 1):
        result["torch_cell"] = _one_step_cell(row)
    if row.dtype != "float32":
        result["ours_float32"] = our_step(replace(row, dtype="float32"))
    for batch in dense_batches(row):
        shape = (row.shape[0], batch, *row.shape[2:])
        result[f"dense_{batch}"] = our_step(replace(row, kind="layer", shape=shape))
    if dense_batches(row):
        result["ours_beside_dense"] = result["ours"]
    return result
