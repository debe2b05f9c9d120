"""``_cpu.matmul``: the register tile by itself, whose edges the layers reach only in part."""

import math
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from pyrnnfast import _cpu

DTYPES = (torch.float32, torch.float64)

# Tiles are up to 6 rows high, or 3 with 16 registers, and products of up to 3 rows, or 1, have tiles of their own.
ROWS = (1, 2, 3, 4, 5, 6, 7, 8, 11, 12, 13, 19, 37)
# Around one vector and four of them, of 2 to 16 lanes.
COLUMNS = (1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 47, 63, 64, 65, 97, 129)
# Pairs of k, for two chains of sums; and around 512, where a sum is cut.
DEPTHS = (1, 2, 3, 17, 64)
LONG_DEPTHS = (511, 512, 513, 1024, 1031)


def operands(rows: int, columns: int, depth: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """a, b, and memory for the product that shows what is not written."""
    generator = torch.Generator().manual_seed(rows + 1000 * columns + depth)
    a, b = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((rows, depth), (depth, columns)))
    return a, b, torch.full((rows, columns), float("nan"), dtype=dtype)


def assert_product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """A sum of K products, in whatever order, is off by less than K roundings of Σ|a||b|."""
    true = a.double() @ b.double()
    # torch's float64 product, which float64 is compared with, is off by as much.
    sums = 2 if out.dtype is torch.float64 else 1
    bound = sums * a.shape[1] * torch.finfo(out.dtype).eps / 2
    assert bool(((out.double() - true).abs() <= bound * (a.double().abs() @ b.double().abs())).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("depth", DEPTHS)
def test_every_edge_of_the_tile(depth: int, dtype: torch.dtype, instruction_set: str) -> None:
    for rows, columns in product(ROWS, COLUMNS):
        a, b, out = operands(rows, columns, depth, dtype)
        _cpu.matmul(a, b, out, 1)
        assert_product(a, b, out)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("depth", LONG_DEPTHS)
def test_sums_that_are_cut(depth: int, dtype: torch.dtype, instruction_set: str) -> None:
    for rows, columns in product((1, 3, 4, 7, 13), (1, 16, 65, 131)):
        a, b, out = operands(rows, columns, depth, dtype)
        _cpu.matmul(a, b, out, 1)
        assert_product(a, b, out)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("threads", [2, 3])
def test_threads_share_the_rows(threads: int, dtype: torch.dtype, instruction_set: str) -> None:
    """Fewer rows than threads too; and the bits of one thread."""
    for rows, columns, depth in product((1, 2, 3, 4, 7, 8, 13, 64), (7, 65), (33, 600)):
        a, b, out = operands(rows, columns, depth, dtype)
        alone = out.clone()
        _cpu.matmul(a, b, alone, 1)
        _cpu.matmul(a, b, out, threads)
        assert_product(a, b, out)
        assert torch.equal(out, alone), f"{rows}×{depth} by {depth}×{columns}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_a_wider_matrix(dtype: torch.dtype, instruction_set: str) -> None:
    """The columns beside them are neither read nor written."""
    for rows, columns, depth in product((1, 5, 9), (1, 15, 33, 70), (3, 40, 515)):
        a, b, out = operands(rows, columns, depth, dtype)
        wide = []
        for t in (a, b, out):
            whole = torch.full((t.shape[0] + 2, t.shape[1] + 5), float("nan"), dtype=dtype)
            whole[1:-1, 2:-3] = t
            wide.append(whole)
        wide[2].fill_(7.0)
        _cpu.matmul(*(w[1:-1, 2:-3] for w in wide), 1)
        _cpu.matmul(a, b, out, 1)
        assert torch.equal(wide[2][1:-1, 2:-3], out)
        wide[2][1:-1, 2:-3] = 7.0
        assert torch.equal(wide[2], torch.full_like(wide[2], 7.0))
        assert_product(a, b, out)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_not_a_number_stays_in_its_row_and_column(dtype: torch.dtype, instruction_set: str) -> None:
    """Lanes and rows of a tile that do not exist lend nothing to those that do."""
    for rows, columns in product((1, 2, 4, 7), (1, 9, 33)):
        a, b, out = operands(rows, columns, 21, dtype)
        a[rows // 2, 3] = float("nan")
        b[20, columns // 2] = float("inf")
        _cpu.matmul(a, b, out, 1)
        assert torch.equal(out.isnan(), (a @ b).isnan())
        assert torch.equal(out.isinf(), (a @ b).isinf())


def ones(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(shape, dtype=dtype)


BAD_CALLS: dict[str, tuple[Any, ...]] = {
    "depths_differ": (ones(3, 4), ones(5, 6), ones(3, 6), 1),
    "rows_of_out": (ones(3, 4), ones(4, 6), ones(4, 6), 1),
    "columns_of_out": (ones(3, 4), ones(4, 6), ones(3, 5), 1),
    "out_transposed": (ones(3, 4), ones(4, 6), ones(6, 3).t(), 1),
    "a_transposed": (ones(4, 3).t(), ones(4, 6), ones(3, 6), 1),
    "b_transposed": (ones(3, 4), ones(6, 4).t(), ones(3, 6), 1),
    "a_1D": (ones(4), ones(4, 6), ones(1, 6), 1),
    "b_1D": (ones(3, 4), ones(4), ones(3, 1), 1),
    "a_3D": (ones(3, 4, 2), ones(4, 6), ones(3, 6), 1),
    "b_3D": (ones(3, 4), ones(4, 6, 2), ones(3, 6), 1),
    "a_4D": (ones(1, 1, 3, 4), ones(4, 6), ones(3, 6), 1),
    "no_rows": (ones(0, 4), ones(4, 6), ones(0, 6), 1),
    "no_depth": (ones(3, 0), ones(0, 6), ones(3, 6), 1),
    "no_columns": (ones(3, 4), ones(4, 0), ones(3, 0), 1),
    "a_none": (None, ones(4, 6), ones(3, 6), 1),
    "b_none": (ones(3, 4), None, ones(3, 6), 1),
    "out_none": (ones(3, 4), ones(4, 6), None, 1),
    "dtypes_differ": (ones(3, 4), ones(4, 6, dtype=torch.float64), ones(3, 6), 1),
    "dtype_of_out": (ones(3, 4), ones(4, 6), ones(3, 6, dtype=torch.float64), 1),
    "bfloat16": (*(ones(*s, dtype=torch.bfloat16) for s in ((3, 4), (4, 6), (3, 6))), 1),
    "int64": (*(ones(*s, dtype=torch.int64) for s in ((3, 4), (4, 6), (3, 6))), 1),
    "expanded_out": (ones(3, 4), ones(4, 6), ones(1, 6).expand(3, 6), 1),
    "overlapping_out": (ones(3, 4), ones(4, 6), ones(18).as_strided((3, 6), (5, 1)), 1),
    "giant_columns": (ones(1, 1), ones(1, 1).expand(1, 2**40), ones(1, 1).expand(1, 2**40), 1),
    "meta": (ones(3, 4), ones(4, 6), torch.ones(3, 6, device="meta"), 1),
    "no_threads": (ones(3, 4), ones(4, 6), ones(3, 6), 0),
    "too_many_threads": (ones(3, 4), ones(4, 6), ones(3, 6), 10**6),
    "text_for_threads": (ones(3, 4), ones(4, 6), ones(3, 6), "1"),
    "list": ([[1.0]], ones(1, 6), ones(1, 6), 1),
    "three_arguments": (ones(3, 4), ones(4, 6), ones(3, 6)),
}


@pytest.mark.parametrize("bad", BAD_CALLS)
def test_bad_operands(bad: str) -> None:
    with pytest.raises((TypeError, ValueError), match=r"."):
        _cpu.matmul(*BAD_CALLS[bad])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(("samples", "rows", "m", "n"), [(1, 1, 1, 1), (3, 5, 7, 67), (4, 600, 33, 20), (2, 17, 70, 1)])
def test_outer_products(
    samples: int, rows: int, m: int, n: int, threads: int, dtype: torch.dtype, instruction_set: str
) -> None:
    """Also of samples that lie side by side, so that a row of one is far from the next."""
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randn(rows, samples, k, generator=generator, dtype=dtype).transpose(0, 1) for k in (m, n))
    true = a.double().mT @ b.double()
    for left, right in ((a, b), (a.contiguous(), b.contiguous())):
        out = torch.full((samples, m, n), math.nan, dtype=dtype)
        _cpu.outer_products(left, right, out, threads)
        torch.testing.assert_close(out.double(), true, rtol=1e-5, atol=1e-5 * rows**0.5)
