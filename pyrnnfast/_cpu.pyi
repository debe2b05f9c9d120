from torch import Tensor

def forward(
    cell: str,
    xgates: Tensor | None,
    x: Tensor | None,
    weight_ih: Tensor | None,
    bias: Tensor | None,
    weight_hh: Tensor | None,
    bias_hn: Tensor | None,
    hgates: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    y: Tensor,
    h_n: Tensor,
    c_n: Tensor | None,
    saved: Tensor | None,
    cells: Tensor | None,
    batch_sizes: Tensor | None,
    reverse: bool,
    threads: int,
) -> None: ...
def backward(
    cell: str,
    batch: int,
    y: Tensor,
    saved: Tensor | None,
    cells: Tensor | None,
    weight_hh: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    grad_y: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    dgates: Tensor,
    carry: Tensor | None,
    batch_sizes: Tensor | None,
    reverse: bool,
    threads: int,
) -> None: ...
def check_batch_sizes(batch_sizes: Tensor, rows: int) -> None: ...
def instruction_sets() -> list[str]: ...
def instruction_set() -> str: ...
def select_instruction_set(name: str) -> None: ...
def activation(name: str, x: Tensor, out: Tensor) -> None: ...
