"""The rows of the GPU benchmark, what matters most first, and how each side does one call of one.

Both sides, ours and torch.nn's, have the same weights and the same input, made from fixed seeds. ``mode`` is
``inference``, one call without gradients, or ``training``, one call and the gradients of its input and of every weight.
The product with the input is in both.
"""

import contextlib
import itertools
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import pyrnnfast
from pyrnnfast import cuda

Shape = tuple[int, int, int, int]
"""T, B, I, H."""

Step = Callable[[], list[Tensor]]
"""One call of one side: its outputs, and in training the gradients."""

CELLS = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU, "rnn": torch.nn.RNN}
MODES = ("training", "inference")
DTYPES = {
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float16": torch.float16,
    "float64": torch.float64,
}
# How each is named on the command line; float32 is two: torch's switches for TF32 off and on.
KINDS = {"bf16": ("bfloat16", False), "tf32": ("float32", True), "fp32": ("float32", False), "fp16": ("float16", False)}
KINDS |= {"fp64": ("float64", False)}

PATHS = {"step": "fused", "persistent": "persistent", "cudnn": "cudnn"}
"""The paths of ours that are timed: how each is asked for, and how it is called where it is taken."""


@dataclass(frozen=True)
class Row:
    cell: str
    mode: str
    shape: Shape
    dtype: str
    tf32: bool = False
    layers: int = 1
    bidirectional: bool = False
    packed: bool = False
    padded: bool = False
    """With lengths, which are on the device. torch's side has to fetch them, and to pack and unpack."""

    def __str__(self) -> str:
        parts = [self.cell, self.mode, ",".join(map(str, self.shape)), "tf32" if self.tf32 else self.dtype]
        parts += [f"{self.layers} layers"] if self.layers > 1 else []
        return " ".join(
            parts + ["bidirectional"] * self.bidirectional + ["packed"] * self.packed + ["padded"] * self.padded
        )

    def asdict(self) -> dict[str, Any]:
        return asdict(self) | {"shape": list(self.shape)}

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def lengths(self) -> list[int]:
        """Of the sequences, longest first: if packed or padded, every length from T down to about T/B."""
        steps, batch = self.shape[:2]
        ragged = self.packed or self.padded
        return [-(-steps * (batch - k) // batch) for k in range(batch)] if ragged else [steps] * batch

    @property
    def batch_sizes(self) -> list[int]:
        """The sequences active at each step, [T]."""
        ends = Counter(self.lengths)
        gone = itertools.accumulate(ends[t] for t in range(self.shape[0]))
        return [self.shape[1] - n for n in gone]


def _shapes(steps: Sequence[int], batches: Sequence[int], hidden: Sequence[int]) -> list[Shape]:
    return [(t, b, h, h) for t, h, b in itertools.product(steps, hidden, batches)]


_FIRST = _shapes([128], [16, 64], [512])
_SHORT = [s for s in _shapes([128], [1, 16, 64, 128], [256, 512, 1024]) if s not in _FIRST]
_BETWEEN = _shapes([128], [1, 16, 64, 128], [768])
_LONG = _shapes([1024], [16, 1, 64, 128], [256, 512, 1024])
_LARGE = _shapes([128], [16, 128], [2048])


def table(cells: Collection[str] = tuple(CELLS), kinds: Collection[str] = tuple(KINDS)) -> Iterator[Row]:
    """All rows of these cells and dtypes: first a little of everything, then more and more of it."""

    def rows(shapes: Sequence[Shape], of: Sequence[str] = ("bf16", "tf32", "fp32", "fp16"), **more: Any) -> list[Row]:
        chosen = [kind for kind in of if kind in kinds]
        return [
            Row(cell, mode, shape, *KINDS[kind], **more)
            for shape, kind, cell, mode in itertools.product(shapes, chosen, CELLS, MODES)
            if cell in cells
        ]

    yield from rows(_FIRST)
    yield from rows(_shapes([128], [16], [512]), layers=2, bidirectional=True)
    yield from rows(_shapes([128], [64], [512]), packed=True)
    yield from rows(_shapes([128], [64], [512]), padded=True)
    yield from rows(_SHORT)
    yield from rows(_shapes([128], [16], [512]), bidirectional=True)
    yield from rows(_shapes([128], [16], [256]), layers=2, bidirectional=True, packed=True)
    yield from rows(_LONG, ("bf16", "fp16", "tf32"))
    yield from rows(_LARGE)
    yield from rows(_BETWEEN)
    yield from rows(_shapes([128], [16], [256]), ["fp64"])
    yield from rows(_LONG, ["fp32"])


@contextlib.contextmanager
def precision(tf32: bool) -> Iterator[None]:
    """torch's switches for TF32, of products and of cuDNN, off or on."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32, cudnn.allow_tf32 = tf32, tf32
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def module(row: Row, ours: bool, device: str = "cuda") -> torch.nn.Module:
    """The module of one side; both sides have the same weights."""
    torch.manual_seed(0)
    stock: torch.nn.Module = CELLS[row.cell](
        *row.shape[2:],
        num_layers=row.layers,
        bidirectional=row.bidirectional,
        dtype=DTYPES[row.dtype],
        device=device,
    )
    return pyrnnfast.replace(stock) if ours else stock


def _random(*shape: int, seed: int, like: Tensor) -> Tensor:
    # On the card, where the largest take no time.
    generator = torch.Generator(like.device).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=like.device).to(like.dtype)


def input_of(row: Row, like: Tensor) -> Tensor | PackedSequence:
    x = _random(*row.shape[:3], seed=1, like=like)  # [T, B, I]
    return pack_padded_sequence(x, torch.tensor(row.lengths)) if row.packed else x


def extras_of(row: Row, like: Tensor) -> dict[str, Tensor]:
    """What ours are given besides the input."""
    return {"lengths": torch.tensor(row.lengths, device=like.device)} if row.padded else {}


def step(row: Row, module: torch.nn.Module, x: Tensor | PackedSequence) -> Step:
    """The row's call on ``module``, to be made without gradients in inference."""
    leaf = x.data if isinstance(x, PackedSequence) else x
    extras = extras_of(row, leaf)

    def output() -> Tensor:
        if row.padded and type(module) is CELLS[row.cell]:
            # These are sorted, but most lengths are not.
            packed = pack_padded_sequence(leaf, extras["lengths"].cpu(), enforce_sorted=False)
            return pad_packed_sequence(module(packed)[0], total_length=row.shape[0])[0]
        y = module(x, **extras)[0]
        return y.data if isinstance(y, PackedSequence) else y

    if row.mode == "inference":
        return lambda: [output()]
    leaves = [leaf.requires_grad_(), *module.parameters()]
    rows = (sum(row.batch_sizes),) if row.packed else row.shape[:2]
    gradient = _random(*rows, row.directions * row.shape[3], seed=2, like=leaf)

    def train() -> list[Tensor]:
        y = output()
        return [y.detach(), *torch.autograd.grad(y, leaves, gradient)]

    return train


def forced(path: str, call: Step) -> Step:
    """The call on one path, backward included."""

    def run() -> list[Tensor]:
        with cuda.use(path):
            return call()

    return run


def sides(row: Row, paths: Sequence[str], device: str = "cuda", every: bool = True) -> dict[str, Step]:
    """What to time turn by turn: ``torch``, and ours by the name of the path that it takes when each is asked for.

    A path that the row would not take, there being no plan for it, is left out.

    Args:
        every: all of these paths, else the first that the row takes
    """
    stock, ours = module(row, False, device), module(row, True, device)
    x = input_of(row, next(stock.parameters()))
    call, extras = step(row, ours, x), extras_of(row, x.data)
    result = {"torch": step(row, stock, x)}
    for path in paths:
        with cuda.use(path):
            taken = pyrnnfast.explain(ours, x, **extras).path
        if taken == PATHS[path]:
            result[taken] = forced(path, call)
            if not every:
                break
    return result
