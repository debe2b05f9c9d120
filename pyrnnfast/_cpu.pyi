from collections.abc import Sequence
from typing import Any

from torch import Tensor

Tensors = tuple[Tensor | None, ...]

class Prepacked:
    @property
    def bytes(self) -> int: ...

def doubt_weights() -> None: ...
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
    batch_sizes: Tensor | None,
    threads: int,
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
    batch_sizes: Tensor | None,
    threads: int,
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
    prepacked: Prepacked | None,
    threads: int,
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
    threads: int,
) -> Tensors: ...
def weight_gradients(cell: str, x: Tensor, states: Tensor, dgates: Tensor, dweights: Tensors, threads: int) -> None: ...
def check_batch_sizes(batch_sizes: Tensor, rows: int) -> None: ...
def agree(types: tuple[type, ...], tensors: tuple[object, ...], shapes: tuple[tuple[int, ...], ...]) -> bool: ...
def instruction_sets() -> list[str]: ...
def instruction_set() -> str: ...
def select_instruction_set(name: str) -> None: ...
def activation(name: str, x: Tensor, out: Tensor) -> None: ...
def matmul(a: Tensor, b: Tensor, out: Tensor, threads: int) -> None: ...
def outer_products(a: Tensor, b: Tensor, out: Tensor, threads: int) -> None: ...
def processors() -> int: ...
def set_quota(processors: int) -> None: ...
def limits_beside_company(calls: Sequence[tuple[int, int, int, int, int]]) -> list[int]: ...
def set_threshold(name: str, value: int) -> None: ...
def seconds_to_meet(threads: int, times: int) -> float: ...
