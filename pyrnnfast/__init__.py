"""Recurrent networks for PyTorch that run as fast as the machine allows: fused kernels behind drop-in modules."""

import os

# First, so that the kernels find the OpenMP runtime that torch has loaded.
import torch

from . import cuda, functional, quota, reference, tbptt
from .about import Info, info
from .modules import GRU, LSTM, RNN, Explanation, GRUCell, LSTMCell, RNNCell, explain
from .ops import enable_compile
from .prepack import prepack
from .replace import replace, restore

__version__ = "0.1.0"
__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "Explanation",
    "GRUCell",
    "Info",
    "LSTMCell",
    "RNNCell",
    "cuda",
    "enable_compile",
    "explain",
    "functional",
    "info",
    "prepack",
    "reference",
    "replace",
    "restore",
    "tbptt",
]

# GNU OpenMP's team does not survive a fork: in the child torch's own products would wait for it for ever.
os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))
quota.obey()
