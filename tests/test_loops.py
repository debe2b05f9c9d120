"""Cells called step after step: gradients of weights that are made of all steps together (loops.py)."""

import copy
import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import pyrnnfast
from pyrnnfast import _cpu, autograd, loops, passes

CELLS: dict[str, Callable[..., torch.nn.Module]] = {
    "lstm": torch.nn.LSTMCell,
    "gru": torch.nn.GRUCell,
    "rnn_tanh": torch.nn.RNNCell,
    "rnn_relu": lambda *sizes, **options: torch.nn.RNNCell(*sizes, nonlinearity="relu", **options),
}
DTYPES = passes.DTYPES
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-12, torch.bfloat16: 2e-2, torch.float16: 3e-3}


@pytest.fixture(autouse=True)
def _from_the_second_step_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loops, "_ELEMENTS_OF_NODE", 0)
    monkeypatch.setattr(autograd, "_PRODUCTS_WORTH_ASKING", 0)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of each call of the kernel that multiplies dgates of a loop, the number of rows."""
    rows: list[int] = []
    real = _cpu.weight_gradients

    def watched(*arguments: Any) -> None:
        rows.append(len(arguments[1]))
        real(*arguments)

    monkeypatch.setattr(_cpu, "weight_gradients", watched)
    return rows


def pair(cell: str, dtype: torch.dtype = torch.float64, bias: bool = True) -> tuple[torch.nn.Module, torch.nn.Module]:
    """torch's cell and ours, 5 inputs and 7 units."""
    stock = CELLS[cell](5, 7, bias=bias).to(dtype)
    return stock, pyrnnfast.replace(copy.deepcopy(stock))


def unroll(cell: torch.nn.Module, x: Tensor, state: Any = None) -> Tensor:
    """The outputs of all steps, one behind the other."""
    outputs = []
    for step in x:
        state = cell(step, state)
        outputs.append(state[0] if isinstance(state, tuple) else state)
    return torch.cat(outputs)


def weight_gradients(cell: torch.nn.Module, loss: Tensor, **options: Any) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, list(cell.parameters()), **options)


def assert_same(found: Any, expected: Any, dtype: torch.dtype = torch.float64) -> None:
    for a, b in zip(found, expected, strict=True):
        assert a.dtype is b.dtype
        scale = max(b.abs().max().item(), 1.0)
        torch.testing.assert_close(a, b, rtol=0, atol=TOLERANCE[dtype] * scale)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_gradients_are_those_of_torch(cell: str, dtype: torch.dtype, bias: bool, calls: list[int]) -> None:
    for steps, batch in ((1, 3), (2, 1), (3, 2), (9, 4)):
        calls.clear()
        stock, ours = pair(cell, torch.float64 if dtype in passes.NARROW else dtype, bias)
        ours.to(dtype)
        x = torch.randn(steps, batch, 5).to(dtype)
        given = x.clone().requires_grad_(), x.to(next(stock.parameters()).dtype).requires_grad_()
        found, expected = (
            torch.autograd.grad(unroll(m, v).square().sum(), [v, *m.parameters()])
            for m, v in zip((ours, stock), given, strict=True)
        )
        assert_same([g.double() for g in found], [g.double() for g in expected], dtype)
        assert calls == ([] if steps == 1 else [(steps - 1) * batch])  # the first step is by itself


@pytest.mark.parametrize("cell", CELLS)
def test_initial_states(cell: str) -> None:
    stock, ours = pair(cell)
    x = torch.randn(4, 3, 5, dtype=torch.float64)
    h = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)

    def loss(module: torch.nn.Module) -> Tensor:
        return unroll(module, x, (h, h * 2) if cell == "lstm" else h).sin().sum()

    assert_same(*(torch.autograd.grad(loss(m), [h, *m.parameters()]) for m in (ours, stock)))


@pytest.mark.parametrize("cell", CELLS)
def test_a_batch_that_changes_and_states_that_are_left_out(cell: str) -> None:
    stock, ours = pair(cell)
    x = torch.randn(9, 5, dtype=torch.float64)

    def loss(module: torch.nn.Module) -> Tensor:
        parts = [module(rows) for rows in x.split([2, 4, 1, 2])]
        return torch.cat([p[0] if isinstance(p, tuple) else p for p in parts]).square().sum()

    assert_same(weight_gradients(ours, loss(ours)), weight_gradients(stock, loss(stock)))


def test_small_weights_are_by_themselves_for_longer(monkeypatch: pytest.MonkeyPatch, calls: list[int]) -> None:
    ours = pyrnnfast.LSTMCell(5, 7)
    monkeypatch.setattr(loops, "_ELEMENTS_OF_NODE", 3 * 28 * (5 + 7))
    for steps, rows in ((4, []), (5, [1]), (9, [5])):
        calls.clear()
        unroll(ours, torch.randn(steps, 1, 5)).sum().backward()
        assert calls == rows


@pytest.mark.parametrize("cell", CELLS)
def test_many_rows_are_multiplied_in_parts(cell: str, monkeypatch: pytest.MonkeyPatch, calls: list[int]) -> None:
    monkeypatch.setattr(loops, "_MOST_ROWS", 10)
    stock, ours = pair(cell)
    x = torch.randn(9, 4, 5, dtype=torch.float64)
    found, expected = (weight_gradients(m, unroll(m, x).square().sum()) for m in (ours, stock))
    assert_same(found, expected)
    assert calls == [12, 12, 8]


def test_only_what_is_asked_for(calls: list[int]) -> None:
    stock, ours = pair("gru")
    x = torch.randn(5, 2, 5, dtype=torch.float64, requires_grad=True)
    found, expected = (torch.autograd.grad(unroll(m, x).sum(), [m.weight_ih]) for m in (ours, stock))
    assert_same(found, expected)
    calls.clear()
    found, expected = (torch.autograd.grad(unroll(m, x).sum(), [x]) for m in (ours, stock))
    assert_same(found, expected)
    assert calls == []


@pytest.mark.parametrize("create_graph", [False, True])
def test_passes_that_do_not_come_to_the_weights_leave_nothing(
    create_graph: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as a gradient penalty's, whose graph leads back to the loop: it would never die."""
    alive: list[weakref.ref[loops.Loop]] = []
    join = loops.join

    def watched(*arguments: Any) -> loops.Loop | None:
        loop = join(*arguments)
        assert loop is not None
        alive.append(weakref.ref(loop))
        return loop

    monkeypatch.setattr(loops, "join", watched)
    stock, ours = pair("gru")
    x = torch.randn(5, 2, 5, dtype=torch.float64, requires_grad=True)
    for m in (ours, stock):
        loss = unroll(m, x).sum()
        for _ in range(3):
            (g,) = torch.autograd.grad(loss, x, create_graph=create_graph, retain_graph=True)
        assert m is stock or all(loop._of_pass == {} for loop in (reference() for reference in alive) if loop)
        (g.square().sum() if create_graph else loss).backward()
        del loss, g
    assert_same([p.grad for p in ours.parameters()], [p.grad for p in stock.parameters()])
    gc.collect()
    assert alive
    assert all(reference() is None for reference in alive)


def test_a_graph_that_is_gone_through_twice(calls: list[int]) -> None:
    stock, ours = pair("lstm")
    x = torch.randn(6, 2, 5, dtype=torch.float64)
    for m in (ours, stock):
        outputs = unroll(m, x).view(6, 2, 7)
        outputs[:3].square().sum().backward(retain_graph=True)
        outputs[2:].sin().sum().backward()
    assert_same([p.grad for p in ours.parameters()], [p.grad for p in stock.parameters()])
    assert calls == [10, 10]
    with pytest.raises(RuntimeError, match="second time"):
        outputs.sum().backward()


def test_windows_of_a_long_sequence() -> None:
    stock, ours = pair("gru")
    x = torch.randn(9, 2, 5, dtype=torch.float64)
    for m in (ours, stock):
        state = None
        for window in x.split(3):
            outputs = unroll(m, window, state)
            outputs.square().sum().backward()
            state = outputs[-2:].detach()
    assert_same([p.grad for p in ours.parameters()], [p.grad for p in stock.parameters()])


@pytest.mark.parametrize("cell", CELLS)
def test_second_derivatives(cell: str) -> None:
    stock, ours = pair(cell)
    x = torch.randn(4, 2, 5, dtype=torch.float64, requires_grad=True)
    found, expected = ([], [])
    for m, into in ((ours, found), (stock, expected)):
        first = torch.autograd.grad(unroll(m, x).square().sum(), [x, *m.parameters()], create_graph=True)
        into += first
        into += torch.autograd.grad(sum(g.sin().sum() for g in first), [x, *m.parameters()])
    assert_same(found, expected)


def test_many_gradients_at_once() -> None:
    stock, ours = pair("lstm")
    x = torch.randn(3, 2, 5, dtype=torch.float64)
    rows = torch.randn(4, 6, 7, dtype=torch.float64)
    found, expected = (
        torch.autograd.grad(unroll(m, x), list(m.parameters()), rows, is_grads_batched=True) for m in (ours, stock)
    )
    assert_same(found, expected)


def test_hooks_see_what_they_see_of_torch() -> None:
    stock, ours = pair("gru")
    x = torch.randn(5, 2, 5, dtype=torch.float64)
    seen: dict[str, list[Tensor]] = {"ours": [], "stock": []}
    for name, m in (("ours", ours), ("stock", stock)):
        for p in m.parameters():
            p.register_hook(lambda g, name=name: seen[name].append(g.clone()))
            p.register_post_accumulate_grad_hook(lambda p, name=name: seen[name].append(p.grad.clone()))
        unroll(m, x).sum().backward()
    assert len(seen["ours"]) == 8
    assert_same(
        sorted(seen["ours"], key=lambda g: (g.shape, g.sum().item())),
        sorted(seen["stock"], key=lambda g: (g.shape, g.sum().item())),
    )


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints(reentrant: bool) -> None:
    stock, ours = pair("lstm")
    x = torch.randn(6, 2, 5, dtype=torch.float64, requires_grad=True)
    for m in (ours, stock):
        outputs = [unroll(m, x[:2]), checkpoint(unroll, m, x[2:4], use_reentrant=reentrant), unroll(m, x[4:])]
        torch.cat(outputs).square().sum().backward()
    assert_same([p.grad for p in ours.parameters()], [p.grad for p in stock.parameters()])


def test_weights_that_are_made_of_others(calls: list[int]) -> None:
    stock, ours = pair("gru")
    x = torch.randn(5, 2, 5, dtype=torch.float64)
    found, expected = [], []
    for m, into in ((ours, found), (stock, expected)):
        torch.nn.utils.parametrizations.weight_norm(m, "weight_hh")
        with torch.nn.utils.parametrize.cached():  # one object for all steps
            into += weight_gradients(m, unroll(m, x).square().sum())
    assert_same(found, expected)
    assert calls == []


def test_weights_that_are_frozen_between_steps() -> None:
    stock, ours = pair("lstm")
    x = torch.randn(6, 2, 5, dtype=torch.float64)
    for m in (ours, stock):
        first = unroll(m, x[:3])
        m.requires_grad_(False)
        second = unroll(m, x[3:], (first[-2:], first[-2:]))
        m.weight_hh.requires_grad_(True)
        third = unroll(m, x[3:], (second[-2:], second[-2:]))
        m.requires_grad_(True)
        (third.square().sum() + first.sum()).backward()
    assert_same([p.grad for p in ours.parameters()], [p.grad for p in stock.parameters()])


def test_weights_that_change_between_steps() -> None:
    """By way of torch, backward notices; by way of .data, nobody does, and the next graph has the new ones."""
    ours = pyrnnfast.GRUCell(5, 7)
    outputs = unroll(ours, torch.randn(4, 2, 5))
    with torch.no_grad():
        ours.weight_hh.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        outputs.sum().backward()
    ours.double()  # while the old graph is alive
    stock = CELLS["gru"](5, 7).double()
    stock.load_state_dict(ours.state_dict())
    x = torch.randn(4, 2, 5, dtype=torch.float64)
    assert_same(*(weight_gradients(m, unroll(m, x).sum()) for m in (ours, stock)))
    ours.weight_hh.data = ours.weight_hh.data * 3
    stock.weight_hh.data = stock.weight_hh.data * 3
    assert_same(*(weight_gradients(m, unroll(m, x).sum()) for m in (ours, stock)))


@pytest.mark.parametrize("twice", [False, True])
def test_a_graph_keeps_the_memory_its_weights_had(twice: bool) -> None:
    found = []
    for factor in (1, 1e8):
        torch.manual_seed(0)
        _, ours = pair("lstm")
        weights = list(ours.parameters())
        loss = unroll(ours, torch.ones(5, 2, 5, dtype=torch.float64)).square().sum()
        for w in weights:
            w.data = w.data * factor
        if twice:
            loss = torch.stack([g.square().sum() for g in torch.autograd.grad(loss, weights, create_graph=True)]).sum()
        found.append(torch.autograd.grad(loss, weights))
    assert_same(*found)


def test_a_backward_pass_that_fails_leaves_nothing_behind() -> None:
    stock, ours = pair("lstm")
    x = torch.randn(5, 2, 5, dtype=torch.float64)
    outputs = unroll(ours, x).view(5, 2, 7)

    def fail(_: Tensor) -> None:
        raise ArithmeticError("on purpose")

    early = outputs[1].square()
    handle = early.register_hook(fail)
    loss = early.sum() + outputs[2:].square().sum()
    with pytest.raises(ArithmeticError, match="on purpose"):
        loss.backward(retain_graph=True)
    handle.remove()
    ours.zero_grad()
    loss.backward()
    expected = weight_gradients(stock, unroll(stock, x).view(5, 2, 7)[1:].square().sum())
    assert_same([p.grad for p in ours.parameters()], expected)


def test_threads_that_share_weights() -> None:
    stock, ours = pair("gru")
    x = torch.randn(8, 30, 2, 5, dtype=torch.float64)
    found: list[Any] = [None] * len(x)

    def work(k: int) -> None:
        for _ in range(5):
            found[k] = weight_gradients(ours, unroll(ours, x[k]).square().sum())

    workers = [threading.Thread(target=work, args=(k,)) for k in range(len(x))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for k, gradients in enumerate(found):
        assert_same(gradients, weight_gradients(stock, unroll(stock, x[k]).square().sum()))


def test_nothing_outlives_the_graph() -> None:
    ours = pyrnnfast.LSTMCell(5, 7)
    gc.disable()
    try:
        outputs = unroll(ours, torch.randn(4, 2, 5))
        outputs.sum().backward()
        weight, loop = weakref.ref(ours.weight_hh), outputs.grad_fn.next_functions[0][0].loop
        assert loop.gate is not None
        loop = weakref.ref(loop)
        del outputs, ours
        assert weight() is None
        assert loop() is None
    finally:
        gc.enable()


def test_loops_are_forgotten() -> None:
    cells = [pyrnnfast.RNNCell(2, 2) for _ in range(3 * loops._MOST_LOOPS)]
    for cell in cells:
        unroll(cell, torch.randn(3, 1, 2)).sum().backward()
    assert len(loops._loops) <= loops._MOST_LOOPS
    # One that is cleared away in the middle of its steps is two.
    stock, ours = pair("gru")
    x = torch.randn(6, 2, 5, dtype=torch.float64)
    first = unroll(ours, x[:3])
    loops._loops.clear()
    whole = torch.cat([first, unroll(ours, x[3:], first[-2:])])
    assert_same(weight_gradients(ours, whole.sum()), weight_gradients(stock, unroll(stock, x).sum()))


class InPlace(torch.autograd.Function):
    """Twice its input, whose backward takes its output apart again, in place, as those of invertible networks do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = 2 * x
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        with torch.no_grad():
            ctx.saved_tensors[0].mul_(0.5)
        return 2 * grad


@pytest.mark.parametrize("cell", ["gru", "rnn_relu"])
def test_what_a_step_has_saved_may_be_overwritten_after_it(cell: str) -> None:
    stock, ours = pair(cell)
    x = torch.randn(5, 2, 5, dtype=torch.float64, requires_grad=True)

    def loss(module: torch.nn.Module) -> Tensor:
        state = None
        for step in x:
            state = module(InPlace.apply(step), state)
            if cell == "gru":  # whose backward does not look at its own output
                state = InPlace.apply(state)
        return state.square().sum()

    assert_same(weight_gradients(ours, loss(ours)), weight_gradients(stock, loss(stock)))


def test_memory_that_is_taken_away_after_a_step() -> None:
    stock, ours = pair("gru")
    found = []
    for m in (ours, stock):
        state = None
        for _ in range(5):
            x = (torch.ones(2, 5, dtype=torch.float64, requires_grad=True) * 0.5).clone()
            x.register_hook(lambda _, x=x: x.untyped_storage().resize_(0) and None)
            state = m(x, state)
        found.append(weight_gradients(m, state.square().sum()))
    assert_same(*found)


def test_a_leaf_that_is_made_of_others_later() -> None:
    stock, ours = pair("gru")
    x = torch.randn(4, 2, 5, dtype=torch.float64)
    found = []
    for m in (ours, stock):
        before = unroll(m, x)
        source = torch.full((21, 7), 0.1, dtype=torch.float64, requires_grad=True)
        m.weight_hh.requires_grad_(False)
        m.weight_hh.copy_(source)
        found.append(torch.autograd.grad(unroll(m, x).square().sum(), [source, m.weight_ih]))
        del before
    assert_same(*found)


def test_weights_that_go_to_another_dtype_and_back() -> None:
    stock, ours = pair("lstm")
    x = torch.randn(4, 2, 5, dtype=torch.float64)
    found = []
    for m in (ours, stock):
        before = unroll(m, x)
        m.float()
        m.double()
        found.append(weight_gradients(m, unroll(m, x).square().sum() + sum(p.sum() for p in m.parameters())))
        del before
    assert_same(*found)


def test_compiled_autograd() -> None:
    stock, ours = pair("gru")
    x = torch.randn(4, 2, 5, dtype=torch.float64)
    with torch._dynamo.compiled_autograd._enable(lambda graph: graph):
        unroll(ours, x).square().sum().backward()
    assert_same([p.grad for p in ours.parameters()], weight_gradients(stock, unroll(stock, x).square().sum()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_the_kernel(cell: str, dtype: torch.dtype, instruction_set: str) -> None:
    widths = passes.CELLS[cell]
    for rows, inputs, hidden, threads in (
        (1, 1, 1, 1), (2, 3, 5, 1), (7, 17, 16, 2), (64, 4, 33, 1), (65, 31, 8, 3), (130, 70, 64, 2), (700, 9, 19, 2),
        (1100, 129, 3, 1), (513, 16, 65, 4),
    ):  # fmt: skip
        torch.set_num_threads(4)
        x, h = torch.randn(rows, inputs).to(dtype), torch.randn(rows, hidden).to(dtype)
        dgates = torch.randn(rows, widths.dgates * hidden).to(dtype)
        made = [
            torch.full(s, float("nan"), dtype=dtype)
            for s in (
                (widths.gates * hidden, inputs),
                (widths.gates * hidden, hidden),
                *((widths.gates * hidden,),) * 2,
            )
        ]
        _cpu.weight_gradients(cell, x, h, dgates, tuple(made), threads)
        left = dgates.double()
        for_x = left[:, : widths.gates * hidden]
        for_h = torch.cat([left[:, : 2 * hidden], left[:, 3 * hidden :]], 1) if cell == "gru" else for_x
        exact = for_x.t() @ x.double(), for_h.t() @ h.double(), for_x.sum(0), for_h.sum(0)
        for found, expected in zip(made, exact, strict=True):
            eps = torch.finfo(dtype).eps
            bound = eps * (rows if dtype not in passes.NARROW else 2) * max(expected.abs().max().item(), rows**0.5)
            assert (found.double() - expected).abs().max().item() <= bound, (rows, inputs, hidden)
        # Each by itself.
        for k in range(4):
            alone = [None] * 4
            alone[k] = torch.empty_like(made[k])  # type: ignore[call-overload]
            _cpu.weight_gradients(cell, x, h, dgates, tuple(alone), threads)
            assert torch.equal(alone[k], made[k])  # type: ignore[arg-type]


def test_the_kernel_checks_what_it_gets() -> None:
    good: dict[str, Any] = {
        "cell": "gru", "x": torch.randn(3, 5), "states": torch.randn(3, 7), "dgates": torch.randn(3, 28),
        "dweights": (torch.empty(21, 5), torch.empty(21, 7), None, torch.empty(21)), "threads": 1,
    }  # fmt: skip
    _cpu.weight_gradients(**good)
    for name, value, message in (
        ("cell", "mgu", "cell must be"),
        ("x", torch.randn(5), "x: expected two"),
        ("x", torch.randn(1, 3, 5), "x: expected two"),
        ("x", torch.randn(4, 5), r"states: expected size \[4, 7\]"),
        ("x", torch.randn(0, 5), "x has no rows"),
        ("x", torch.ones(3, 5).int(), "x must be a float32"),
        ("states", None, "states is missing"),
        ("states", torch.randn(3, 8), r"dgates: expected size \[3, 32\]"),
        ("dgates", torch.randn(3, 28).double(), "dgates must have the dtype"),
        ("dgates", torch.randn(28, 3).t(), "dgates must be contiguous"),
        ("dweights", (None,) * 3, "dweights must be four"),
        ("dweights", (torch.empty(21, 4), None, None, None), r"dweight_ih: expected size \[21, 5\]"),
        ("threads", 0, "threads must be"),
    ):
        with pytest.raises(ValueError, match=message):
            _cpu.weight_gradients(**(good | {name: value}))
    for name in good:
        with pytest.raises(TypeError):
            _cpu.weight_gradients(**(good | {name: 1.5}))
