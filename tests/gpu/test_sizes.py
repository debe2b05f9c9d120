"""Sizes beyond the usual limits: more than 65,535 steps and sequences, and tensors of more than 2³¹ elements.

The largest are held against the same call on a few of the sequences: they do not depend on each other, so an index that
overflows shows there.
"""

import functools
from dataclasses import replace

import oracle
import pytest
import torch
from cases import CELLS, Case
from torch import Tensor

import pyrnnfast
from pyrnnfast import cuda

BEYOND = 65_535 + 100


@functools.lru_cache(maxsize=1)
def prepared(case: Case, dtype: torch.dtype) -> tuple[oracle.Operands, dict[str, Tensor], dict[str, Tensor]]:
    """As of ``oracle``, but by our kernels of the CPU: cuDNN may refuse such sizes, and the reference takes minutes."""
    given = oracle.operands(case, dtype)
    return given, oracle.on_cpu(case, given, dtype), oracle.on_cpu(case, given, torch.float64)


@pytest.mark.parametrize("path", oracle.PATHS)
@pytest.mark.parametrize("cell", ("lstm", "gru"))
def test_many_steps(cell: str, path: str) -> None:
    kind = "fp32" if path == "step" else "tf32"  # for which alone of the two there is a persistent form
    case = Case(cell, steps=BEYOND, batch=2, inputs=8, hidden=32)
    given, theirs, true = prepared(case, torch.float32)
    with oracle.precision(kind):
        found = oracle.ours(case, given, path)
    oracle.check(case, found, theirs, true, kind)


@pytest.mark.parametrize("path", oracle.PATHS)
@pytest.mark.parametrize("cell", CELLS)
def test_many_sequences(cell: str, path: str) -> None:
    case = Case(cell, steps=3, batch=BEYOND, inputs=4, hidden=16)
    given, theirs, true = prepared(case, torch.bfloat16)
    oracle.check(case, oracle.ours(case, given, path), theirs, true, "bf16")


# More than 2³¹ elements: of the output; of the gates, which the output has a quarter of.
LARGE = [
    Case("rnn_tanh", steps=2100, batch=1024, inputs=16, hidden=1024, initial=False),
    Case("lstm", steps=600, batch=1024, inputs=16, hidden=1024, initial=False),
]
FEW = 8


@pytest.mark.parametrize("case", LARGE, ids=str)
def test_large_tensors(case: Case) -> None:
    dtype = torch.bfloat16
    module = case.module(pyrnnfast, dtype).to(oracle.DEVICE)
    shape = (case.steps, case.batch)
    x = torch.randn(*shape, case.inputs, device=oracle.DEVICE, dtype=dtype).requires_grad_()
    upstream = torch.randn(*shape, case.hidden, device=oracle.DEVICE, dtype=dtype)
    with cuda.use("step"):
        y, _ = module(x)
        (dx,) = torch.autograd.grad(y, x, upstream, retain_graph=True)
        for columns in (slice(0, FEW), slice(case.batch - FEW, case.batch)):
            few = x[:, columns].detach().clone().requires_grad_()
            y_few, _ = module(few)
            (dx_few,) = torch.autograd.grad(y_few, few, upstream[:, columns].contiguous())
            # Of another batch size the products are tiled otherwise, so not to the bit.
            for found, expected in ((y[:, columns], y_few), (dx[:, columns], dx_few)):
                error = (found.detach().float() - expected.float()).norm() / expected.float().norm()
                assert error.item() < 0.01
        dweights = torch.autograd.grad(y, list(module.parameters()), upstream)
    # Gradients of weights are sums over all sequences: over those in two halves, added up, they are the same.
    halves = []
    with cuda.use("step"):
        for columns in (slice(0, case.batch // 2), slice(case.batch // 2, case.batch)):
            y_half, _ = module(x[:, columns].detach().contiguous())
            halves.append(torch.autograd.grad(y_half, list(module.parameters()), upstream[:, columns].contiguous()))
    for whole, *parts in zip(dweights, *halves, strict=True):
        together = sum(part.float() for part in parts)
        assert ((whole.float() - together).norm() / together.norm()).item() < 0.02


def test_the_large_ones_are_large() -> None:
    rnn, lstm = LARGE
    assert rnn.steps * rnn.batch * rnn.hidden > 2**31
    assert lstm.steps * lstm.batch * lstm.hidden < 2**31 < lstm.steps * lstm.batch * 4 * lstm.hidden


@pytest.mark.parametrize("path", oracle.PATHS)
def test_an_offset_beyond_2_to_the_31(path: str) -> None:
    # Small operands, far behind in a large buffer: only addresses are large.
    case = replace(Case("lstm", steps=3, batch=8, inputs=16, hidden=64), initial=False)
    given = oracle.operands(case, torch.bfloat16)
    buffer = torch.zeros(2**31 + given.x.numel(), device=oracle.DEVICE, dtype=torch.bfloat16)
    buffer[2**31 :] = given.x.detach().flatten()
    far = buffer[2**31 :].view_as(given.x).requires_grad_()
    near = oracle.ours(case, given, path)
    moved = oracle.ours(case, given._replace(x=far), path)
    assert all(torch.equal(near[name], moved[name]) for name in near)
