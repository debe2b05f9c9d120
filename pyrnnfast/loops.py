"""Cells called step after step: the gradients of their weights are made once, of all steps together.

Left to autograd, every step makes gradients as large as the weights, which are then added up: with few sequences, that
is most of what training takes. Here a node of the graph, the loop's, stands between the steps and the weights. A step
goes back as far as dgates, and leaves them with it; the node, which autograd comes to after all steps, multiplies them
with the steps' inputs and states, many rows at a time, as the backward pass of a layer does.

A loop begins when so many calls of a cell have been made in a graph that is alive that the node pays for itself: single
steps have nothing to do with it.
"""

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _cpu
from .autograd import saved_weights
from .profiling import profiled

# A loop's node costs as much as to make, and add up, so many elements of gradients. Once so many rows of dgates wait,
# they are multiplied and freed. Measured, see docs/performance.md.
_ELEMENTS_OF_NODE = 1 << 19
_MOST_ROWS = 2048


class Gradients:
    """Those of the weights of a loop, in the making."""

    def __init__(self, cell: str, weights: tuple[Tensor, ...]) -> None:
        self._cell, self._weights = cell, weights
        # Of steps, x [B, I], h before it [B, H] and dgates [B, P·H], as in csrc/cells.h.
        self._waiting: list[tuple[Tensor, Tensor, Tensor]] = []
        self._count = 0  # rows of them
        self._sums: list[Tensor | None] = [None] * len(weights)

    def leave(self, x: Tensor, h0: Tensor | None, dgates: Tensor) -> None:
        """Takes what the gradients of a step are made of; no ``h0``: zeros."""
        # Copies: once the step is gone through, what it has saved may be overwritten, or its memory taken away.
        states = x.new_zeros(len(x), self._weights[1].shape[1]) if h0 is None else h0.clone()
        self._waiting.append((x.clone(), states, dgates))
        self._count += len(x)
        if self._count >= _MOST_ROWS:
            self._multiply()

    def add(self, gradients: Sequence[Tensor | None]) -> None:
        """Takes those of a step that went back by the reference."""
        pairs = zip(self._sums, gradients, strict=True)
        self._sums = [new if old is None else old if new is None else old + new for old, new in pairs]

    def found(self) -> list[Tensor | None]:
        """Of each weight."""
        if self._waiting:
            self._multiply()
        return self._sums

    def _multiply(self) -> None:
        x, states, dgates = (torch.cat(rows) for rows in zip(*self._waiting, strict=True))
        self._waiting, self._count = [], 0
        made = [w.new_empty(w.shape) for w in self._weights]
        absent = (None,) * (4 - len(made))
        operands = self._cell, x, states, dgates, (*made, *absent), torch.get_num_threads()
        profiled(self._cell, "weight_gradients", _cpu.weight_gradients, *operands)
        self.add(made)


class Loop:
    """The calls of a cell in a graph, whose nodes keep it alive."""

    __slots__ = (
        "__weakref__",
        "_apart",
        "_cell",
        "_of_pass",
        "_places",
        "gate",
        "nothing",
        "saved",
        "weights",
    )

    def __init__(self, cell: str, weights: tuple[Tensor, ...]) -> None:
        self.weights = weights
        """weight_ih, weight_hh and perhaps bias_ih, bias_hh"""
        self.saved, _ = saved_weights(weights)
        """What all steps save of them."""
        self._places: list[int] = []  # the addresses of those
        self.gate: Tensor | None = None
        """What steps have as an input instead of the weights: a tensor without elements, the result of the loop's node;
        None: there is no node, and they are by themselves."""
        self.nothing: Tensor | None = None
        """The gradient of the gate: hooks of nodes, and checks of anomaly mode, want one."""
        self._cell = cell
        # How many more steps go to the weights themselves.
        self._apart = _ELEMENTS_OF_NODE // (weights[0].numel() + weights[1].numel())
        # By the number of the backward pass. What a failed one has left goes with the loop.
        self._of_pass: dict[int, Gradients] = {}

    def goes_on(self) -> bool:
        """Whether one more step may take part."""
        # Other memory, by way of .data, may mean another node, too, that accumulates the weight's gradient. It is
        # elsewhere for certain, as the old one is kept.
        if not self._places:
            self._places = [0 if t is None else t.data_ptr() for t in self.saved]
        if [weight.data_ptr() for weight in self.weights] != self._places:
            return False
        if self._apart > 0:
            self._apart -= 1
            return True
        for weight in self.weights:
            # What those are made of that are no leaves may change while they are the same objects.
            if not (weight.requires_grad and weight.is_leaf):
                return False
        if self.gate is None:
            self.gate = _apply(self._of_pass, *self.weights)
            self.nothing = self.gate.new_empty(0)
        return True

    def is_wanted(self) -> bool:
        """Whether the backward pass that is going on comes to the loop's node."""
        assert self.gate is not None
        assert self.gate.grad_fn is not None
        return torch._C._will_engine_execute_node(self.gate.grad_fn)

    def gradients(self) -> Gradients:
        """Those that the steps make together in the backward pass that is going on."""
        number = torch._C._current_graph_task_id()
        found = self._of_pass.get(number)
        if found is None:
            found = self._of_pass[number] = Gradients(self._cell, self.weights)
        return found


# By the identities of the weights, which are not another's while a loop keeps them. Cleared when there are many: what
# calls follow are another loop then.
_loops: dict[tuple[int, ...], weakref.ref[Loop]] = {}
_MOST_LOOPS = 256


def join(cell: str, weights: tuple[Tensor, ...]) -> Loop | None:
    """The loop that a call with these weights takes part in, to be kept by its node of the graph."""
    key = tuple(map(id, weights))
    known = _loops.get(key)
    loop = None if known is None else known()
    if loop is not None:
        return loop if loop.goes_on() else None
    if len(_loops) >= _MOST_LOOPS:
        _loops.clear()
    loop = Loop(cell, weights)
    _loops[key] = weakref.ref(loop)
    return loop


class _Node(torch.autograd.Function):
    """gate = node(of_pass, *weights)"""

    @staticmethod
    def forward(ctx: Any, of_pass: dict[int, Gradients], *weights: Tensor) -> Tensor:
        # Not the loop, which has the gate, and so this.
        ctx.of_pass = of_pass
        ctx.set_materialize_grads(False)
        return weights[0].new_empty(0)

    @staticmethod
    def backward(ctx: Any, _: Tensor | None) -> tuple[Tensor | None, ...]:
        of_steps = ctx.of_pass.pop(torch._C._current_graph_task_id(), None)
        if of_steps is None:
            return (None,) * len(ctx.needs_input_grad)
        pairs = zip(of_steps.found(), ctx.needs_input_grad[1:], strict=True)
        return None, *(gradient if need else None for gradient, need in pairs)


_apply = super(torch.autograd.Function, _Node).apply  # as in stack.py
