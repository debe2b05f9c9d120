"""sigmoid and tanh of the kernels: the error that csrc/activations.h promises.

A sample; ``python -m benchmarks.activations`` tries every float32.
"""

import math
from collections.abc import Callable

import mpmath
import pytest
import torch
from torch import Tensor

from pyrnnfast import _cpu

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {"sigmoid": torch.sigmoid, "tanh": torch.tanh}


def activation(name: str, x: Tensor) -> Tensor:
    out = torch.full_like(x, -7)
    _cpu.activation(name, x, out)
    return out


def sample() -> Tensor:
    """Bit patterns of float32: a stride through all of them, and all near those where something changes."""
    patterns = [torch.arange(0, 2**32, 10007)]
    tiny = (0.0, 1e-38, 1.1754944e-38, 1e-20, 1e-4)
    middle = (0.1, 0.3465735, 0.5, 0.6931472, 1.0, 8.0, 9.0, 10.0, 16.6, 20.0, 44.0)
    large = (86.9, 87.0, 87.33654, 88.0, 88.72284, 89.0, 100.0, 103.97, 104.0, 3.4e38, math.inf)
    for value in (*tiny, *middle, *large):
        bits = int(torch.tensor(value).view(torch.int32))
        near = torch.arange(max(bits - 3000, 0), bits + 3000)
        patterns += [near, near + 2**31]
    bits = torch.cat(patterns)
    return torch.where(bits >= 2**31, bits - 2**32, bits).to(torch.int32).view(torch.float32)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_float32(name: str, instruction_set: str) -> None:
    x = sample()
    out, true = activation(name, x), FUNCTIONS[name](x.double())
    nan = x.isnan()
    assert nan.any()
    assert torch.equal(out.isnan(), nan)
    finite = ~nan
    error = (out.double() - true).abs()[finite]
    true = true[finite]
    # A unit in the last place of the true value: 2⁻²³ of its power of two.
    unit = torch.exp2(torch.frexp(true).exponent.double() - 24)
    normal = true.abs() >= 2.0**-126
    assert float((error / unit)[normal].max()) <= 4
    assert float(error[~normal].max()) <= 2.0**-126


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_special_values(name: str, dtype: torch.dtype, instruction_set: str) -> None:
    """In every lane, and in the part of a vector at the end."""
    for count in (1, 2, 3, 7, 8, 16, 19):
        for value, sigmoid, tanh in (
            (math.inf, 1.0, 1.0),
            (-math.inf, 0.0, -1.0),
            (0.0, 0.5, 0.0),
            (-0.0, 0.5, 0.0),
            (1e30, 1.0, 1.0),
            (-1e30, 0.0, -1.0),
        ):
            out = activation(name, torch.full((count,), value, dtype=dtype))
            assert out.tolist() == [sigmoid if name == "sigmoid" else tanh] * count
        for k in range(count):
            x = torch.zeros(count, dtype=dtype)
            x[k] = math.nan
            assert activation(name, x).isnan().tolist() == [i == k for i in range(count)]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_float64(name: str, instruction_set: str) -> None:
    generator = torch.Generator().manual_seed(0)
    uniform = 2 * torch.rand(4000, generator=generator, dtype=torch.float64) - 1
    x = torch.cat([
        *(uniform[:600] * scale for scale in (1.0, 0.35, 3.0, 20.0, 40.0, 700.0)),
        # Every power of two.
        uniform[:1000] * torch.exp2(-torch.arange(1000.0, dtype=torch.float64)),
        torch.tensor([0.0, -0.0, 1e-300, 5e-324, 19.06, 20.0, 36.7, 40.0], dtype=torch.float64),
        torch.tensor([-708.0, -709.0, -709.9, -744.0, -745.2, -746.0], dtype=torch.float64),
    ])  # fmt: skip
    out = activation(name, x).tolist()
    with mpmath.workdps(60):
        for value, found in zip(x.tolist(), out, strict=True):
            exact = mpmath.mpf(value)
            true = mpmath.tanh(exact) if name == "tanh" else 1 / (1 + mpmath.exp(-exact))
            error = abs(mpmath.mpf(found) - true)
            if abs(true) < 2.0**-1022:
                assert error <= 2.0**-1022, value
            else:
                assert error <= 4 * math.ulp(float(true)), value


@pytest.mark.parametrize("name", FUNCTIONS)
def test_instruction_sets_agree(name: str) -> None:
    x = sample()
    results = []
    for isa in _cpu.instruction_sets():
        _cpu.select_instruction_set(isa)
        results.append(activation(name, x))
    for other in results[1:]:
        assert torch.allclose(results[0], other, rtol=5e-7, atol=2.0**-126, equal_nan=True)


@pytest.mark.parametrize(
    ("name", "x", "out"),
    [
        ("relu", torch.ones(3), torch.ones(3)),
        ("tanh", torch.ones(3), torch.ones(4)),
        ("tanh", torch.ones(3), torch.ones(3, dtype=torch.float64)),
        ("tanh", torch.ones(3, dtype=torch.float16), torch.ones(3, dtype=torch.float16)),
        ("tanh", torch.ones(2, 3), torch.ones(2, 3)),
        ("tanh", torch.ones(6)[::2], torch.ones(3)),
        ("tanh", torch.ones(3), torch.ones(1).expand(3)),
        ("tanh", torch.ones(3), None),
        ("tanh", torch.ones(3), torch.ones(3, device="meta")),
    ],
    ids=lambda p: "",
)
def test_bad_operands(name: str, x: Tensor, out: Tensor) -> None:
    with pytest.raises((TypeError, ValueError)):
        _cpu.activation(name, x, out)
