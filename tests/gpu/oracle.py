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
a gradient passes, and about the square root of as many parts of the norm as there are such arguments are lost."""

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


def exact(case: Case, given: Operands) -> dict[str, Tensor]:
    """By the reference in float64, of operands that are rounded to the dtype of the case."""
    leaves = [t.detach().double().requires_grad_() for t in (given.x, *given.states)]
    module = case.module(torch.nn, given.x.dtype).to(DEVICE).double()
    x, states = leaves[0], tuple(leaves[1:])
    return with_gradients(module, x, states, case.run_reference(module, x, states), given.x.dtype)


@functools.lru_cache(maxsize=1)  # for the paths of ours, which follow one another
def prepared(case: Case, kind: str) -> tuple[Operands, dict[str, Tensor], dict[str, Tensor]]:
    """The operands, what cuDNN makes of them, and what is true."""
    with precision(kind):
        given = operands(case, KINDS[kind][0])
        return given, all_results(case, given.stock, given.x, given.states), exact(case, given)


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


def check(case: Case, found: dict[str, Tensor], theirs: dict[str, Tensor], true: dict[str, Tensor], kind: str) -> None:
    """Raises AssertionError with every result that is too far from the truth."""
    wrong = []
    assert found.keys() == theirs.keys() == true.keys()
    usual = _usual_size(true)
    for name, expected in true.items():
        assert found[name].dtype is theirs[name].dtype
        assert found[name].shape == theirs[name].shape == expected.shape
        # Gradients of parameters are sums, which may cancel by chance: their errors do not.
        least = usual if _of_parameter(name) else 0.0
        floor = KINDS[kind][2] * (OF_FEW if expected.numel() < FEW else 1.0)
        if case.cell == "rnn_relu" and name.startswith("grad"):
            floor = max(floor, FLIPS.get(kind, 0.0))
        of_ours, of_theirs = (t[name].double() - expected for t in (found, theirs))
        for measure, size, nothing, scale in (
            ("norm", _norm, floor, max(_norm(expected), least * expected.numel() ** 0.5)),
            ("worst", _largest, WORST * floor, max(_largest(expected), least)),
        ):
            allowed = TIMES * size(of_theirs) + nothing * scale
            if not size(of_ours) <= allowed:  # nor NaN
                wrong.append(
                    f"{name}: {measure} of our error {size(of_ours) / scale:.2e} of what is usual, cuDNN's "
                    f"{size(of_theirs) / scale:.2e}, allowed {allowed / scale:.2e}"
                )
    assert not wrong, "\n".join(wrong)


def _norm(t: Tensor) -> float:
    return t.norm().item()


def _largest(t: Tensor) -> float:
    return t.abs().max().item()


def _of_parameter(name: str) -> bool:
    return name.startswith(("grad weight", "grad bias"))


def _usual_size(true: dict[str, Tensor]) -> float:
    """Root of the mean square of the gradients of parameters."""
    every = torch.cat([t.flatten() for name, t in true.items() if _of_parameter(name)])
    return every.square().mean().sqrt().item()
