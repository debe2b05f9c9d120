from typing import Any

from torch import Tensor

Tensors = tuple[Tensor | None, ...]

def forward(
    cell: str,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Tensors,
    y: Tensor,
    h_n: Tensor,
    c_n: Tensor | None,
    kept: Tensors,
    batch_sizes: Tensor | Tensors | None,
    form: str,
    tf32: bool,
) -> None: ...
def backward(
    cell: str,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Tensors,
    y: Tensor,
    kept: Tensors,
    grad_y: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    grad_cells: Tensor | None,
    dx: Tensor | None,
    dh0: Tensor | None,
    dc0: Tensor | None,
    dweights: Tensors,
    dgates: Tensor | None,
    batch_sizes: Tensor | Tensors | None,
    form: str,
    tf32: bool,
) -> None: ...
def forward_plain(
    types: tuple[type, ...],
    form: tuple[str, int, int, bool, bool],
    x: object,
    batch_sizes: object,
    weights: tuple[object, ...],
    inputs: int,
    hidden: int,
    outputs: int,
    hx: object,
    grad: bool,
    forms: tuple[str, ...],
    tf32: bool,
) -> tuple[Any, tuple[Tensor, ...] | None] | None: ...
def backward_plain(
    types: tuple[type, ...],
    form: tuple[str, int, int, bool, bool],
    x: object,
    batch_sizes: object,
    weights: tuple[object, ...],
    needs: tuple[bool, ...],
    h0: object,
    c0: object,
    y: object,
    kept: tuple[object, ...],
    upstream: tuple[object, ...],
    dgates: bool,
    forms: tuple[str, ...],
    tf32: bool,
) -> Tensors: ...
def plan(
    device: dict[str, Any],
    backward: bool,
    cell: str,
    dtype: str,
    steps: int,
    batch: int,
    inputs: int,
    hidden: int,
    directions: int,
    tf32: bool,
) -> dict[str, Any]: ...
def devices() -> tuple[dict[str, Any], ...]: ...
def architectures() -> str: ...
def toolkit() -> str: ...
