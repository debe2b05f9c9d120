"""``lengths``, ``reset`` and ``cell_states``, against every segment of every sequence by itself on the reference."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import CELLS, Case, gradients
from torch import Tensor

import pyrnnfast
from pyrnnfast import reference


def _cases() -> list[Case]:
    cases = []
    for cell in CELLS:
        plain = Case(cell, steps=7, batch=5, inputs=3, hidden=6)
        cases += [
            plain,
            replace(plain, layers=2, bidirectional=True),
            replace(plain, initial=False, bias=False, batch_first=True),
            replace(plain, bidirectional=True, batch_first=True, batch=4),
            replace(plain, steps=1),
            replace(plain, unbatched=True, bidirectional=True),
        ]
    return cases


every_case = pytest.mark.parametrize("case", _cases(), ids=str)
LENGTHS = {"ragged": (4, 7, 1, 0, 5), "none": (0,) * 5, "all": (7,) * 5, "absent": None}
every_lengths = pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())


def of(case: Case, lengths: tuple[int, ...] | None) -> list[int]:
    return [min(n, case.steps) for n in (lengths or (case.steps,) * 5)][: case.batch]


def resets(case: Case, seed: int = 3) -> Tensor:
    """[T, B]; at the first step and beyond the end among them."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(case.steps, case.batch, generator=generator) < 0.3


def truth(
    case: Case, module: torch.nn.Module, x: Tensor, states: tuple[Tensor, ...], lengths: list[int], reset: Tensor
) -> dict[str, Tensor]:
    """All in [T, B, ...]."""
    weights, directions = case.weights(module), case.directions
    x = x.unsqueeze(1) if case.unbatched else x.transpose(0, 1) if case.batch_first else x
    states = tuple(s.unsqueeze(1) for s in states) if case.unbatched else states
    zeros = x.new_zeros(case.layers * directions, case.batch, case.hidden)
    states = states or (zeros,) * (2 if case.cell == "lstm" else 1)
    columns, finals = [], []
    for b, length in enumerate(lengths):
        cuts = [t for t in range(1, length) if reset[t, b]]
        spans = list(zip([0, *cuts], [*cuts, length], strict=True)) if length else []
        rows, final = [], [s[:, b].clone() for s in states]
        for first, end in spans:
            own = [torch.zeros_like(s[:, b]) for s in states]
            for k, s in enumerate(states):
                for row in range(case.layers * directions):
                    backward = row % directions == 1
                    if (end == length) if backward else (first == 0 and not reset[0, b]):
                        own[k][row] = s[row, b]
            initial = tuple(s.unsqueeze(1) for s in own)
            y, after = reference.stack(case.cell, x[first:end, b], initial, weights, [1] * (end - first))
            rows.append(y)
            for k, s in enumerate(after):
                for row in range(case.layers * directions):
                    if (first == 0) if row % directions == 1 else (end == length):
                        final[k][row] = s[row, 0]
        rows.append(x.new_zeros(case.steps - length, directions * case.hidden))
        columns.append(torch.cat(rows))
        finals.append(final)
    y = torch.stack(columns, 1)
    y = y.squeeze(1) if case.unbatched else y.transpose(0, 1) if case.batch_first else y
    final = tuple(torch.stack(s, 1) for s in zip(*finals, strict=True))
    final = tuple(s.squeeze(1) for s in final) if case.unbatched else final
    return dict(zip(case.outputs, (y, *final), strict=True))


def run(case: Case, module: torch.nn.Module, x: Tensor, states: tuple[Tensor, ...], **extras: Any) -> dict[str, Tensor]:
    y, final = module(x, case.hx(states), **extras)
    return dict(zip(case.outputs, (y, *final) if case.cell == "lstm" else (y, final), strict=True))


def padding(case: Case, lengths: list[int]) -> Tensor:
    """Where x is padding, in its layout."""
    mask = torch.arange(case.steps)[:, None] >= torch.tensor(lengths)
    return mask[:, 0] if case.unbatched else mask.t() if case.batch_first else mask


def assert_equal(case: Case, reset: Tensor | None, lengths: tuple[int, ...] | None, padded_with: float) -> None:
    module = case.module(pyrnnfast, torch.float64)
    x, states = case.operands(torch.float64)
    real = of(case, lengths)
    with torch.no_grad():
        x[padding(case, real)] = padded_with
    extras: dict[str, Any] = {}
    if lengths is not None:
        extras["lengths"] = torch.tensor(real)[0 if case.unbatched else slice(None)]
    if reset is not None:
        given = reset[:, 0] if case.unbatched else reset.t() if case.batch_first else reset
        extras["reset"] = given
    found = run(case, module, x, states, **extras)
    clean = x.detach().nan_to_num(0.0).requires_grad_()
    none = torch.zeros(case.steps, case.batch, dtype=torch.bool)
    expected = truth(case, module, clean, states, real, none if reset is None else reset)
    for name, t in expected.items():
        torch.testing.assert_close(found[name], t, rtol=1e-10, atol=1e-12, msg=name)
    used = tuple(name for name, t in expected.items() if t.requires_grad)
    if not used:
        return
    ours, theirs = gradients(module, x, states, found, used), gradients(module, clean, states, expected, used)
    for name, t in theirs.items():
        torch.testing.assert_close(ours[name], t, rtol=1e-10, atol=1e-12, msg=name)


@every_case
@every_lengths
def test_lengths(case: Case, lengths: tuple[int, ...] | None) -> None:
    assert_equal(case, None, lengths, float("nan"))


@every_case
@every_lengths
def test_resets(case: Case, lengths: tuple[int, ...] | None) -> None:
    assert_equal(case, resets(case), lengths, float("inf"))


@every_case
def test_a_reset_at_every_step(case: Case) -> None:
    assert_equal(case, torch.ones(case.steps, case.batch, dtype=torch.bool), None, 0.0)
