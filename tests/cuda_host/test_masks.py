"""Padded data with lengths and resets, which the CUDA kernels read as they go, against the same calls on the CPU.

There they are cut into segments and packed: another way altogether.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import _emulation
import pytest
import stand_in
import torch
from emulated import NUMBERS
from torch import Tensor

import pyrnnfast
from pyrnnfast import cuda

T, B, I = 7, 5, 6


@dataclass(frozen=True)
class Padded:
    cell: str
    layers: int = 1
    bidirectional: bool = False
    batch_first: bool = False
    lengths: bool = True
    reset: bool = False
    initial: bool = True
    cell_states: bool = False
    hidden: int = 20

    def __str__(self) -> str:
        names = [name for name, value in vars(self).items() if value is True]
        return "-".join([self.cell, f"{self.layers}layers", *names])

    def module(self, dtype: torch.dtype) -> torch.nn.Module:
        torch.manual_seed(0)
        options = {"cell_states": True} if self.cell_states else {}
        kind = getattr(pyrnnfast, self.cell)
        module: torch.nn.Module = kind(
            I, self.hidden, self.layers, bidirectional=self.bidirectional, batch_first=self.batch_first, **options
        )
        return module.to(dtype)

    def operands(self, dtype: torch.dtype) -> tuple[Tensor, Any, dict[str, Tensor]]:
        """Padding is NaN; one sequence is whole, and one has no step."""
        g = torch.Generator().manual_seed(1)
        lengths, reset = torch.tensor([3, T, 0, 1, 5]), torch.rand(T, B, generator=g) < 0.3
        x = torch.randn(T, B, I, generator=g).to(dtype)
        if self.lengths:
            x[torch.arange(T)[:, None] >= lengths] = float("nan")
        if self.batch_first:
            x, reset = x.transpose(0, 1), reset.t()
        size = self.layers * (2 if self.bidirectional else 1), B, self.hidden
        states = [torch.randn(size, generator=g).to(dtype).requires_grad_() for _ in range(2)]
        hx = None if not self.initial else tuple(states) if self.cell == "LSTM" else states[0]
        extras = {name: t for name, t in (("lengths", lengths), ("reset", reset)) if getattr(self, name)}
        return x.detach().requires_grad_(), hx, extras


def results(case: Padded, dtype: torch.dtype, given: torch.nn.Module | None = None) -> list[Tensor]:
    """All outputs, and the gradients of all operands; of the case's own module, or of one like it."""
    module, (x, hx, extras) = case.module(dtype) if given is None else given, case.operands(dtype)
    outputs, leaves = flat(module(x, hx, **extras)), [x, *flat(hx), *module.parameters()]
    g = torch.Generator().manual_seed(2)
    weights = [torch.randn(o.shape, generator=g).to(dtype) for o in outputs]
    return [o.detach() for o in outputs] + list(torch.autograd.grad(outputs, leaves, weights))


def flat(tensors: Any) -> list[Tensor]:
    if isinstance(tensors, Tensor):
        return [tensors]
    return [] if tensors is None else [t for part in tensors for t in flat(part)]


def _cases() -> Iterator[Padded]:
    for cell in ("RNN", "GRU", "LSTM"):
        yield Padded(cell)
        yield Padded(cell, lengths=False, reset=True)
        yield Padded(cell, reset=True, bidirectional=True)
        yield Padded(cell, reset=True, bidirectional=True, initial=False, layers=2, batch_first=True)
    yield Padded("LSTM", reset=True, bidirectional=True, cell_states=True)


CASES = tuple(_cases())
# Of the norm of a result: what steps, layers and the products after them make of one rounding each.
ROUNDINGS = 4


@pytest.fixture
def emulation(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = torch.backends.cudnn.allow_tf32
    with pytest.MonkeyPatch.context() as patch:
        stand_in.install(patch, _emulation)
        yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.fixture(params=[None, 3000], ids=["one_chunk", "chunks"])
def chunks(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.param is not None:
        _emulation.set_threshold("chunk_bytes", request.param)
    yield
    _emulation.set_threshold("chunk_bytes", _emulation.CHUNK_BYTES)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_step_form(case: Padded, chunks: None, request: pytest.FixtureRequest) -> None:
    expected = results(case, torch.float64)
    request.getfixturevalue("emulation")
    with cuda.use("step"):
        for found, wanted in zip(results(case, torch.float64), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("numbers", ["tf32", "bfloat16", "float16"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_persistent_form(case: Padded, numbers: str, chunks: None, request: pytest.FixtureRequest) -> None:
    """In norm, against float64 on the operands as they are rounded."""
    n = NUMBERS[numbers]

    class Rounded(Padded):
        def module(self, dtype: torch.dtype) -> torch.nn.Module:
            return super().module(n.dtype).to(dtype)

        def operands(self, dtype: torch.dtype) -> tuple[Tensor, Any, dict[str, Tensor]]:
            x, hx, extras = super().operands(n.dtype)
            wide = [t.detach().to(dtype).requires_grad_() for t in (x, *flat(hx))]
            return wide[0], None if hx is None else tuple(wide[1:]) if isinstance(hx, tuple) else wide[1], extras

    expected = results(Rounded(**vars(case)), torch.float64)
    request.getfixturevalue("emulation")
    torch.backends.cudnn.allow_tf32 = True
    with cuda.use("persistent"):
        for k, (found, wanted) in enumerate(zip(results(case, n.dtype), expected, strict=True)):
            distance = float((found.double() - wanted).norm() / wanted.norm())
            assert distance <= ROUNDINGS * n.coarsest, f"result {k}: {distance / n.coarsest:.1f} roundings"


@pytest.mark.parametrize("form", ["step", "persistent"])
def test_lengths_out_of_range_are_the_nearest(form: str) -> None:
    """On a device nobody looks at their values before the kernels do."""
    case = Padded("LSTM", hidden=16)
    module = case.module(torch.bfloat16)
    weights = tuple(p.detach() for p in module.parameters())
    x = torch.randn(T, B, I).bfloat16()

    def run(lengths: list[int]) -> list[Tensor]:
        y, h_n, c_n = (torch.full(size, float("nan")).bfloat16() for size in ((T, B, 16), (1, B, 16), (1, B, 16)))
        mask = (torch.tensor(lengths), None)
        _emulation.forward("lstm", x, None, None, weights, y, h_n, c_n, (), mask, form, False)
        return [y, h_n, c_n]

    # What a tensor may have in it that nobody has written to: no 32 bits have it all.
    wild = [-(2**31) - 1, 2, 2**32 + 1, T, -(2**32) + 3]
    for found, wanted in zip(run([-3, 2, 99, T, 0]) + run(wild), run([0, 2, T, T, 0]) * 2, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("case", [Padded("GRU", reset=True, bidirectional=True), Padded("LSTM")], ids=str)
def test_second_derivative(case: Padded, request: pytest.FixtureRequest) -> None:
    def penalty() -> list[Tensor]:
        module, (x, hx, extras) = case.module(torch.float64), case.operands(torch.float64)
        leaves = [x, *flat(hx), *module.parameters()]
        y, _ = module(x, hx, **extras)
        (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return list(torch.autograd.grad(first.nan_to_num().square().sum(), leaves, allow_unused=True))

    expected = penalty()
    request.getfixturevalue("emulation")
    with cuda.use("step"):
        for found, wanted in zip(penalty(), expected, strict=True):
            torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("case", [Padded("GRU", reset=True, bidirectional=True), Padded("LSTM", layers=2)], ids=str)
def test_compiled(case: Padded, request: pytest.FixtureRequest) -> None:
    """One graph, for other lengths too; forward and back."""
    expected = results(case, torch.float64)
    request.getfixturevalue("emulation")
    allowed = torch._dynamo.config.allow_rnn
    torch._dynamo.reset()
    pyrnnfast.enable_compile()
    try:
        with cuda.use("step"):
            module = case.module(torch.float64)
            compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
            for found, wanted in zip(results(case, torch.float64, compiled), expected, strict=True):
                torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-13)
            x, hx, extras = case.operands(torch.float64)
            extras["lengths"] = torch.tensor([T, 1, 2, 0, 6])
            x = x.detach().nan_to_num()
            torch.testing.assert_close(compiled(x, hx, **extras), module(x, hx, **extras))
    finally:
        torch._dynamo.config.allow_rnn = allowed
        torch._dynamo.reset()


def test_all_sequences_empty(request: pytest.FixtureRequest) -> None:
    def run() -> list[Tensor]:
        module, (x, hx, _) = Padded("GRU").module(torch.float64), Padded("GRU").operands(torch.float64)
        y, h = module(x, hx, lengths=torch.zeros(B, dtype=torch.int64))
        leaves = [x, hx, *module.parameters()]
        return [y.detach(), h.detach(), *torch.autograd.grad(y.sum() + h.square().sum(), leaves)]

    expected = run()
    request.getfixturevalue("emulation")
    with cuda.use("step"):
        for found, wanted in zip(run(), expected, strict=True):
            torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        ((torch.zeros(B), None), "lengths must be an int64 tensor"),
        ((torch.zeros(B + 1, dtype=torch.int64), None), r"lengths: expected contiguous \[5\], got \[6\]"),
        ((None, torch.zeros(T, B)), "reset must be a bool tensor"),
        ((None, torch.zeros(B, T, dtype=torch.bool)), r"reset: expected size \[7, 5\], got \[5, 7\]"),
        ((None,), r"\(lengths, reset\) is expected"),
        ((None, None, None), r"\(lengths, reset\) is expected"),
    ],
)
def test_refused(mask: tuple[Tensor | None, ...], words: str) -> None:
    weights = (torch.zeros(16, I), torch.zeros(16, 16), None, None)
    x, y, h_n = torch.zeros(T, B, I), torch.zeros(T, B, 16), torch.zeros(1, B, 16)
    with pytest.raises(ValueError, match=words):
        _emulation.forward("rnn_tanh", x, None, None, weights, y, h_n, None, (), mask, "step", False)


def test_no_mask_for_packed_data_or_a_step() -> None:
    weights, mask = (torch.zeros(16, I), torch.zeros(16, 16), None, None), (torch.ones(B, dtype=torch.int64), None)
    x, y, h_n = torch.zeros(B, I), torch.zeros(B, 16), torch.zeros(B, 16)
    with pytest.raises(ValueError, match="lengths does not apply to this call"):
        _emulation.forward("rnn_tanh", x, None, None, weights, y, h_n, None, (), mask, "step", False)
