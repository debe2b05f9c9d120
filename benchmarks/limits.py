"""How long a row must take at least on a machine: what no implementation could leave out, at the machine's own speed.

The sum of three parts:

- The matrix products, at the measured peak of products. A matrix has to be read at every use, so a product is no faster
  than reading its weights at the bandwidth measured for a buffer of their size: at every step for a recurrent product
  or a projection, once for those over all steps. A first step without a state has no recurrent product.
- One pointwise pass over the gates, the numbers of functions and products of which are in :data:`POINTWISE`.
- In training, writing and reading the saved activations, at the bandwidths measured for a buffer of their size. Its
  pages are warm: what the system takes to hand out fresh ones is not part of the limit.

A training step has three times the products of inference: forward, the gradients of states and input, those of weights.
"""

from typing import NamedTuple, Protocol

from .rows import DTYPES, Row

GATES = {"lstm": 4, "gru": 3, "rnn": 1}

# Numbers kept of each unit and step, beside the output: i, f, g, o, c; and r, z, n, W_hn h + b_hn.
SAVED = {"lstm": 5, "gru": 4, "rnn": 0}


class Pass(NamedTuple):
    """What is to be computed for one unit at one step."""

    sigmoids: int
    tanhs: int
    multiplications: int


# Backward multiplies each gate's gradient by a derivative, and the LSTM needs tanh(c) again. The multiplications of the
# forward pass hide behind its functions.
POINTWISE = {
    "lstm": (Pass(3, 2, 0), Pass(0, 1, 4)),
    "gru": (Pass(2, 1, 0), Pass(0, 0, 3)),
    "rnn": (Pass(0, 1, 0), Pass(0, 0, 1)),
}


class Speeds(Protocol):
    """See :class:`benchmarks.machine.Machine`."""

    def peak(self, threads: int, dtype: str) -> float: ...
    def read(self, threads: int, size: int) -> float: ...
    def write(self, threads: int, size: int) -> float: ...
    def activation(self, name: str) -> float: ...
    def multiplication(self) -> float: ...


def limit(row: Row, machine: Speeds) -> float:
    """Seconds of one call of the row."""
    hidden, outputs, gates = row.shape[3], row.outputs, GATES[row.cell] * row.shape[3]
    batch_sizes = row.batch_sizes
    carried = batch_sizes if row.has_state else batch_sizes[1:]  # of the steps with a recurrent product
    training = row.mode == "training"
    seconds = 0.0
    for layer in range(row.layers):
        inputs = row.shape[2] if layer == 0 else row.directions * outputs
        # Rows of each product, and the sizes of its weights.
        used = [([sum(batch_sizes)], gates, inputs), (carried, gates, outputs)]
        used += [(batch_sizes, outputs, hidden)] if row.kind == "projected" else []
        for rows, height, width in used:
            products = sum(_product(row, machine, n, height, width) for n in rows)
            if training:  # the same for the gradients of what was multiplied, and that of the weights
                products += products + _flops(sum(rows), height, width) / machine.peak(row.threads, row.dtype)
            seconds += row.directions * products
    units = row.layers * row.directions * sum(batch_sizes) * hidden
    for part in POINTWISE[row.cell][: 2 if training else 1]:
        seconds += units * _pointwise(part, machine) / row.threads
    saved = units * SAVED[row.cell] * DTYPES[row.dtype].itemsize if training else 0
    if saved:
        seconds += saved / machine.write(row.threads, saved) + saved / machine.read(row.threads, saved)
    return seconds


def _flops(rows: int, height: int, width: int) -> float:
    """Of a product of so many rows with weights [height, width]."""
    return 2.0 * rows * height * width


def _product(row: Row, machine: Speeds, rows: int, height: int, width: int) -> float:
    """Seconds of that product, at the lesser of the peak and the speed of reading the weights."""
    weights = height * width * DTYPES[row.dtype].itemsize
    return max(
        _flops(rows, height, width) / machine.peak(row.threads, row.dtype), weights / machine.read(row.threads, weights)
    )


def _pointwise(part: Pass, machine: Speeds) -> float:
    return (
        part.sigmoids * machine.activation("sigmoid")
        + part.tanhs * machine.activation("tanh")
        + part.multiplications * machine.multiplication()
    )
