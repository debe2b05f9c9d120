"""One case on the card three ways: ours, cuDNN's, and float64; and how far ours may be from the truth.

The measure is cuDNN's own error on the same operands: what it loses in a dtype nobody calls wrong. Ours may lose
``TIMES`` as much, in norm and at the worst element, plus a little where cuDNN happens to be exact.
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from cases import Case, gradients, result_weights
from torch import Tensor

import pyrnnfast
from pyrnnfast import cuda

DEVICE = "cuda"

# Of each kind: its dtype, whether torch's switches for TF32 are on, and what is nothing: of the norm, and, times
# WORST, of the largest element. In 16 bits half a unit in the last place, which is how results are rounded; where sums
# are in the dtype itself, some units; of TF32, which cuDNN may leave unused at small sizes, its own unit.
KINDS = {
    "fp64": (torch.float64, False, 2.0**-49),
    "fp32": (torch.float32, False, 2.0**-20),
    "tf32": (torch.float32, True, 2.0**-10),
    "fp16": (torch.float16, False, 2.0**-11),
    "bf16": (torch.bfloat16, False, 2.0**-8),
}
TIMES = 2.0
WORST = 4.0
FEW, OF_FEW = 64, 4.0
"""Results of so few elements may have so many times that: cuDNN's are right by luck more often."""

FLIPS = {"tf32": 0.05, "fp16": 0.05, "bf16": 0.15}
"""What is nothing, of the norm, in gradients of a rectifier: where its argument is near zero, rounding decides whether
a gradient passes, and about the square root of as many parts of the norm as there are such arguments are lost. A single
one can be most of a small gradient; so where ``y`` shows them all, the truth is that of the same decisions."""

PATHS = {"step": "fused", "persistent": "persistent"}


@contextlib.contextmanager
def precision(kind: str) -> Iterator[None]:
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = KINDS[kind][1]
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


class Operands(NamedTuple):
    ours: torch.nn.Module
    stock: torch.nn.Module
    x: Tensor
    states: tuple[Tensor, ...]


def operands(case: Case, dtype: torch.dtype) -> Operands:
    """On the card, with the same weights on both sides."""
    x, states = case.operands(dtype)
    on_card = [t.detach().to(DEVICE).requires_grad_() for t in (x, *states)]
    ours, stock = (case.module(library, dtype).to(DEVICE) for library in (pyrnnfast, torch.nn))
    return Operands(ours, stock, on_card[0], tuple(on_card[1:]))


def all_results(
    case: Case,
    module: torch.nn.Module,
    x: Tensor,
    states: tuple[Tensor, ...],
    rounded_to: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Outputs, and the gradients of the input, the initial states and every parameter.

    Args:
        rounded_to: the dtype of the side that this is to be compared with, if not that of the operands
    """
    return with_gradients(module, x, states, case.run(module, x, states), rounded_to)


def with_gradients(
    module: torch.nn.Module,
    x: Tensor,
    states: tuple[Tensor, ...],
    outputs: dict[str, Tensor],
    rounded_to: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """The gradients of outputs with all the outputs' gradients the same, to the bit, on all sides."""
    weights = {
        name: w.to(rounded_to or w.dtype).to(outputs[name])
        for name, w in result_weights({name: t.detach().double() for name, t in outputs.items()}).items()
    }
    found = outputs | gradients(module, x, states, outputs, weights=weights)
    return {name: t.detach() for name, t in found.items()}


def on_cpu(case: Case, given: Operands, dtype: torch.dtype) -> dict[str, Tensor]:
    """By our kernels of the CPU in a dtype, of the same operands; the results are on the card.

    In float64 that is the truth: tests/test_correctness.py holds them to the reference, and they do not keep the card,
    which several processes share, waiting.
    """
    leaves = [t.detach().cpu().to(dtype).requires_grad_() for t in (given.x, *given.states)]
    module = case.module(pyrnnfast, given.x.dtype).to(dtype)
    found = all_results(case, module, leaves[0], tuple(leaves[1:]), rounded_to=given.x.dtype)
    return {name: t.to(DEVICE) for name, t in found.items()}


@functools.lru_cache(maxsize=1)  # for the paths of ours, which follow one another
def prepared(case: Case, kind: str) -> tuple[Operands, dict[str, Tensor], dict[str, Tensor]]:
    """The operands, what cuDNN makes of them, and what is true."""
    with precision(kind):
        given = operands(case, KINDS[kind][0])
        return given, all_results(case, given.stock, given.x, given.states), on_cpu(case, given, torch.float64)


def takes(case: Case, given: Operands, path: str) -> bool:
    """Whether a call with gradients goes where it is asked to."""
    with cuda.use(path):
        return pyrnnfast.explain(given.ours, case.packed(given.x), case.hx(given.states)).path == PATHS[path]


def ours(case: Case, given: Operands, path: str) -> dict[str, Tensor]:
    """Skips where there is no plan for the path."""
    with cuda.use(path):
        found = pyrnnfast.explain(given.ours, case.packed(given.x), case.hx(given.states))
        if found.path != PATHS[path]:
            assert path == "persistent" and found.path == "fused", f"asked for {path}, got {found}"
            pytest.skip(f"no plan for it: {found.reason}")
        return all_results(case, given.ours, given.x, given.states)


def as_decided(case: Case, found: dict[str, Tensor]) -> dict[str, Tensor]:
    """The gradients of a rectifier in float64, where its arguments are above zero as the output says that they were.

    Empty where there are more rectifiers than the output shows.
    """
    if case != Case(case.cell, case.steps, case.batch, case.inputs, case.hidden, bias=case.bias, initial=case.initial):
        return {}
    dtype = found["y"].dtype
    x, states = case.operands(dtype)
    x, *states = (t.detach().double().requires_grad_() for t in (x, *states))
    module = case.module(torch.nn, dtype).double()
    weights = case.weights(module)[0][0]
    above = (found["y"] > 0).cpu()
    h = states[0][0] if states else x.new_zeros(case.batch, case.hidden)
    y = []
    for t in range(case.steps):
        linear = torch.nn.functional.linear
        h = (linear(x[t], weights[0], weights[2]) + linear(h, weights[1], weights[3])) * above[t]
        y.append(h)
    outputs = {"y": torch.stack(y), "h_n": h.unsqueeze(0)}
    results = with_gradients(module, x, tuple(states), outputs, dtype)
    return {name: t.to(DEVICE) for name, t in results.items() if name.startswith("grad")}


def check(case: Case, found: dict[str, Tensor], theirs: dict[str, Tensor], true: dict[str, Tensor], kind: str) -> None:
    """Raises AssertionError with every result that is too far from the truth."""
    assert found.keys() == theirs.keys() == true.keys()
    usual = _usual_size(true)
    sizes = []
    decided = true | as_decided(case, found) if case.cell == "rnn_relu" else true
    for name, expected in true.items():
        assert found[name].dtype is theirs[name].dtype
        assert found[name].shape == theirs[name].shape == expected.shape
        of_ours, of_theirs = found[name].double() - decided[name], theirs[name].double() - expected
        sizes += [size for t in (of_ours, of_theirs, expected) for size in (t.norm(), t.abs().max())]
    # All of them in one wait for the card.
    *figures, usual_size = torch.stack([*sizes, usual]).tolist()
    wrong = []
    for index, (name, expected) in enumerate(true.items()):
        of_result = figures[6 * index : 6 * index + 6]
        # Gradients of parameters are sums, which may cancel by chance: their errors do not.
        least = usual_size if _of_parameter(name) else 0.0
        floor = KINDS[kind][2] * (OF_FEW if expected.numel() < FEW else 1.0)
        if case.cell == "rnn_relu" and name.startswith("grad"):
            floor = max(floor, FLIPS.get(kind, 0.0))
        for measure, nothing, at_least, (ours_off, theirs_off, size) in (
            ("norm", floor, least * expected.numel() ** 0.5, of_result[::2]),
            ("worst", WORST * floor, least, of_result[1::2]),
        ):
            scale = max(size, at_least)
            allowed = TIMES * theirs_off + nothing * scale
            if not ours_off <= allowed:  # nor NaN
                wrong.append(
                    f"{name}: {measure} of our error {ours_off / scale:.2e} of what is usual, cuDNN's "
                    f"{theirs_off / scale:.2e}, allowed {allowed / scale:.2e}"
                )
    assert not wrong, "\n".join(wrong)


def _of_parameter(name: str) -> bool:
    return name.startswith(("grad weight", "grad bias"))


def _usual_size(true: dict[str, Tensor]) -> Tensor:
    """Root of the mean square of the gradients of parameters."""
    every = torch.cat([t.flatten() for name, t in true.items() if _of_parameter(name)])
    return every.square().mean().sqrt()
