"""torch.compile, torch.export, and the operators underneath."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch._dynamo
import torch.fx.experimental.proxy_tensor
from cases import CELLS, Case, gradients
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils.flop_counter import FlopCounterMode

import pyrnnfast
from pyrnnfast import functional, ops, roads

SHAPES = ((3, 2), (5, 4), (7, 3), (9, 6))


def _cases() -> list[Case]:
    cases = []
    for cell in CELLS:
        plain = Case(cell, inputs=3, hidden=5)
        cases += [
            plain,
            replace(plain, layers=2, bidirectional=True, initial=False),
            replace(plain, bias=False, batch_first=True),
            replace(plain, single_step=True),
        ]
    projected = Case("lstm", inputs=3, hidden=5, projected=2)
    return [*cases, projected, replace(projected, layers=2, bidirectional=True, bias=False, initial=False)]


every_case = pytest.mark.parametrize("case", _cases(), ids=str)


@pytest.fixture(autouse=True)
def compiler() -> Iterator[None]:
    torch._dynamo.reset()
    with torch._dynamo.config.patch(allow_rnn=False):
        pyrnnfast.enable_compile()
        yield
    torch._dynamo.reset()


def assert_same(case: Case, ours: Callable[..., Any], eager: torch.nn.Module, train: bool) -> None:
    x, states = case.operands()
    if not train:
        x, states = x.detach(), tuple(s.detach() for s in states)
    found, expected = case.run(ours, x, states), case.run(eager, x, states)  # type: ignore[arg-type]
    torch.testing.assert_close(found, expected)
    if train:
        torch.testing.assert_close(gradients(eager, x, states, found), gradients(eager, x, states, expected))


@every_case
@pytest.mark.parametrize("train", [True, False], ids=["training", "inference"])
def test_one_graph_for_every_shape(case: Case, train: bool) -> None:
    """The first shape has a graph of its own, and the second one another, which serves all others."""
    module = case.module(pyrnnfast)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, backend=counter, fullgraph=True)
    with torch.set_grad_enabled(train):
        for steps, batch in SHAPES:
            assert_same(replace(case, steps=steps, batch=batch), compiled, module, train)
    assert counter.frame_count == 2


@pytest.mark.parametrize("case", [c for c in _cases() if c.single_step], ids=str)
@pytest.mark.parametrize("train", [True, False], ids=["training", "inference"])
def test_steps_of_ours_in_a_graph(case: Case, train: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that above are torch's, as they are small or have gradients."""
    monkeypatch.setattr(roads, "is_step_for_a_compiler", lambda *call: False)
    test_one_graph_for_every_shape(case, train)


def test_steps_are_the_compilers_where_it_is_faster() -> None:
    def operators(cell: torch.nn.Module, size: int) -> set[str]:
        graphs: list[torch.fx.GraphModule] = []

        def record(graph: torch.fx.GraphModule, _: Any) -> Any:
            graphs.append(graph)
            return graph.forward

        torch._dynamo.reset()
        torch.compile(cell, backend=record, fullgraph=True)(torch.randn(2, size))
        return {str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function"}

    for make, least in ((pyrnnfast.RNNCell, 628), (pyrnnfast.GRUCell, 363), (pyrnnfast.LSTMCell, 314)):
        for size, training, ours in ((least, False, True), (least - 1, False, False), (least, True, False)):
            with torch.set_grad_enabled(training):
                found = operators(make(size, size), size)
            assert any("pyrnnfast" in name for name in found) is ours, (make, size, training, found)


@pytest.mark.parametrize("name", ["rnn_cell", "gru_cell", "lstm_cell"])
@pytest.mark.parametrize("train", [True, False], ids=["training", "inference"])
def test_functional_steps(name: str, train: bool) -> None:
    """They stay ours: there is no module of torch's to leave them to."""
    kind = {"rnn_cell": "rnn_tanh"}.get(name, name.removesuffix("_cell"))
    case = Case(kind, single_step=True)
    module = case.module(pyrnnfast)
    weights = list(module.parameters())

    def call(x: Tensor, hx: Any) -> Any:
        return getattr(functional, name)(x, hx, weights)

    with torch.set_grad_enabled(train):
        assert_same(case, torch.compile(call, backend="aot_eager", fullgraph=True), module, train=train)


def test_exported_steps_are_ours() -> None:
    program = torch.export.export(pyrnnfast.GRUCell(3, 4), (torch.randn(2, 3),))
    assert "pyrnnfast.layer" in str(program.graph)


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_inductor(cell: str) -> None:
    case = Case(cell, layers=2)
    module = case.module(pyrnnfast)
    compiled = torch.compile(module, fullgraph=True, dynamic=True)
    for steps, batch in SHAPES[:2]:
        assert_same(replace(case, steps=steps, batch=batch), compiled, module, train=True)


def test_a_long_sequence_is_not_unrolled() -> None:
    module = pyrnnfast.LSTM(3, 4)
    graphs: list[torch.fx.GraphModule] = []

    def record(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch.compile(module, backend=record, fullgraph=True)(torch.randn(500, 2, 3))
    assert len(graphs[0].graph.nodes) < 20


@pytest.mark.parametrize("cell", CELLS)
def test_functional_form(cell: str) -> None:
    case = Case(cell)
    module = case.module(pyrnnfast)
    weights = list(module.parameters())
    name, options = (cell, {}) if cell in ("gru", "lstm") else ("rnn", {"nonlinearity": cell[4:]})

    def call(x: Tensor, hx: Any) -> Any:
        return getattr(functional, name)(x, hx, weights, **options)

    assert_same(case, torch.compile(call, backend="aot_eager", fullgraph=True), module, train=True)


@pytest.mark.parametrize("cell", CELLS)
def test_packed_input(cell: str) -> None:
    case = Case(cell, lengths=(4, 3, 1), bidirectional=True)
    module = case.module(pyrnnfast)
    x, states = case.operands()
    packed = case.packed(x)
    assert isinstance(packed, PackedSequence)

    def call(data: Tensor, batch_sizes: Tensor, hx: Any) -> Any:
        output, final = module(PackedSequence(data, batch_sizes), hx)
        return output.data, final

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    args = packed.data.detach(), packed.batch_sizes, case.hx(states)
    torch.testing.assert_close(compiled(*args), call(*args))


EXTRAS: dict[str, Any] = {
    "lengths": {"lengths": torch.tensor([2, 0, 5])},
    "reset": {"reset": torch.tensor([[0, 1, 0], [0, 0, 0], [1, 0, 0], [1, 0, 1], [0, 0, 0]]).bool()},
}
EXTRAS["both"] = EXTRAS["lengths"] | EXTRAS["reset"]


@pytest.mark.parametrize("extras", EXTRAS.values(), ids=EXTRAS.keys())
@pytest.mark.parametrize("cell", CELLS)
def test_lengths_and_resets(cell: str, extras: dict[str, Tensor]) -> None:
    """How many rows there are is known to no graph; padding is NaN."""
    case = Case(cell, steps=5, batch=3, bidirectional=True, layers=2)
    module = case.module(pyrnnfast)
    compiled = torch.compile(functools.partial(module, **extras), backend="aot_eager", fullgraph=True)
    x, states = case.operands()
    with torch.no_grad():
        x[2:, 0] = x[2:, 0] if "lengths" not in extras else torch.nan
    eager = functools.partial(module, **extras)
    found, expected = case.run(compiled, x, states), case.run(eager, x, states)  # type: ignore[arg-type]
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients(module, x, states, found), gradients(module, x, states, expected))


@pytest.mark.parametrize("extras", EXTRAS.values(), ids=EXTRAS.keys())
@pytest.mark.parametrize("batch_first", [False, True])
def test_opcheck_of_segments(extras: dict[str, Tensor], batch_first: bool) -> None:
    lengths, reset = extras.get("lengths"), extras.get("reset")
    given = reset.t().contiguous() if reset is not None and batch_first else reset
    torch.library.opcheck(torch.ops.pyrnnfast.segments, (lengths, given, 5, 3, batch_first))


@pytest.mark.parametrize("form", ["batch_first", "unbatched"])
@pytest.mark.parametrize(
    ("name", "options"),
    [(name, options) for name in ("RNN", "GRU", "LSTM") for options in ({}, {"num_layers": 2, "bidirectional": True})]
    + [("LSTM", {"cell_states": True})],
    ids=str,
)
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_results_that_are_changed_in_place(name: str, options: dict[str, Any], form: str, backend: str) -> None:
    """Such a graph returned views of what it kept for backward; autograd did not notice, and gradients were wrong."""
    module = getattr(pyrnnfast, name)(3, 5, batch_first=form == "batch_first", **options)
    x = torch.randn(4, 2, 3) if form == "batch_first" else torch.randn(4, 3)
    compiled = torch.compile(module, backend=backend, fullgraph=True)
    found = []
    for run, double in ((module, lambda t: t * 2), (compiled, lambda t: t.mul_(2))):
        y, _, *cells = run(x)
        assert y.stride() == module(x)[0].stride()
        loss = torch.stack([double(t).sin().sum() for t in (y, *cells)]).sum()
        found.append(torch.autograd.grad(loss, list(module.parameters())))
    torch.testing.assert_close(*found)


def test_opcheck_of_copy() -> None:
    torch.library.opcheck(torch.ops.pyrnnfast.copy, (torch.ones(3, 2, 4).transpose(0, 1).requires_grad_(),))


@pytest.mark.parametrize("cell", CELLS)
def test_autocast_inside_and_outside(cell: str) -> None:
    case = Case(cell)
    module = case.module(pyrnnfast)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    x, states = case.operands()
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = case.run(compiled, x, states), case.run(module, x, states)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients(module, x, states, found), gradients(module, x, states, expected))


@pytest.mark.parametrize("name", ["RNN", "GRU", "LSTM"])
def test_what_is_not_served_is_traced_as_torch_has_it(name: str) -> None:
    module = getattr(pyrnnfast, name)(3, 4).half()
    x = torch.randn(3, 2, 3).half()
    compiled = torch.compile(module, backend="aot_eager")
    torch.testing.assert_close(compiled(x)[0], module(x)[0])


def test_without_being_enabled_layers_raise_and_cells_do_not() -> None:
    cell = pyrnnfast.LSTMCell(3, 4)
    # In a model: of a layer compiled by itself torch 2.15 raises, too, but tells of a fault of Dynamo's.
    model = torch.nn.Sequential(pyrnnfast.LSTM(3, 4))
    with torch._dynamo.config.patch(allow_rnn=False):
        torch.compile(cell, backend="aot_eager", fullgraph=True)(torch.randn(2, 3))
        with pytest.raises(torch._dynamo.exc.Unsupported, match="allow_rnn"):
            torch.compile(model, backend="aot_eager", fullgraph=True)(torch.randn(2, 2, 3))


# Export -----------------------------------------------------------------------------------------------------------


@every_case
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non_strict"])
def test_export_with_any_batch_and_time(case: Case, strict: bool) -> None:
    module = case.module(pyrnnfast).eval()
    batch = torch.export.Dim("batch", max=1000)
    lead = {0: batch} if case.single_step else {0: torch.export.Dim("time", max=1000), 1: batch}
    if case.batch_first:
        lead = {0: lead[1], 1: lead[0]}
    state = {0: batch} if case.single_step else {1: batch}
    x, states = (t.detach() for t in case.operands()[:1]), tuple(s.detach() for s in case.operands()[1])
    hx = case.hx(states)
    dynamic = (lead, None if hx is None else (state, state) if case.cell == "lstm" else state)
    program = torch.export.export(module, (*x, hx), dynamic_shapes=dynamic, strict=strict)
    exported = program.module()
    for steps, size in SHAPES:
        assert_same(replace(case, steps=steps, batch=size), exported, module, train=False)


def test_an_exported_program_is_saved_and_loaded(tmp_path: Any) -> None:
    module, x = pyrnnfast.GRU(3, 4), torch.randn(5, 2, 3)
    torch.export.save(torch.export.export(module, (x,)), tmp_path / "gru.pt2")
    found = torch.export.load(tmp_path / "gru.pt2").module()(x)
    torch.testing.assert_close(found, module(x))


# The operators ----------------------------------------------------------------------------------------------------


def layer_operands(cell: str, packed: bool, directions: int, grad: bool, projected: int = 0) -> tuple[Any, ...]:
    case = Case(cell, steps=4, batch=3, bidirectional=directions == 2, projected=projected)
    module = case.module(pyrnnfast, torch.float64)
    x, states = case.operands(torch.float64)
    batch_sizes = torch.tensor([3, 3, 1]) if packed else None
    data = x.detach().flatten(0, 1)[:7] if packed else x.detach()
    operands = (cell, data, batch_sizes, *(s.detach() for s in states), *(None,) * (2 - len(states)))
    weights = [w.detach() for w in module.parameters()]
    if grad:
        operands = tuple(t.requires_grad_() if isinstance(t, Tensor) and t.is_floating_point() else t for t in operands)
        weights = [w.requires_grad_() for w in weights]
    return *operands, weights, directions, True, cell == "lstm"


every_layer = pytest.mark.parametrize(
    ("packed", "directions"), [(False, 1), (False, 2), (True, 1), (True, 2)], ids=["dense", "bi", "packed", "packed_bi"]
)


@every_layer
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("cell", CELLS)
def test_opcheck_of_layer(cell: str, grad: bool, packed: bool, directions: int) -> None:
    torch.library.opcheck(torch.ops.pyrnnfast.layer, layer_operands(cell, packed, directions, grad))


@every_layer
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_opcheck_of_projections(grad: bool, packed: bool, directions: int) -> None:
    torch.library.opcheck(torch.ops.pyrnnfast.layer, layer_operands("lstm", packed, directions, grad, projected=2))
    # As one that is differentiated itself, dense: the reference asks for the values of batch sizes.
    operands = backward_operands("lstm", packed, directions, grad and not packed, projected=2)
    torch.library.opcheck(torch.ops.pyrnnfast.layer_backward, operands)


def backward_operands(cell: str, packed: bool, directions: int, grad: bool, projected: int = 0) -> tuple[Any, ...]:
    _, *operands = layer_operands(cell, packed, directions, False, projected)
    x, batch_sizes, h0, c0, weights, _, _, _ = operands
    y, h_n, c_n, gates, cells = torch.ops.pyrnnfast.layer(cell, *operands)
    lstm = cell == "lstm"
    grads = [torch.randn_like(t) if used else None for t, used in ((y, 1), (h_n, 1), (c_n, lstm), (cells, lstm))]
    needs = [True, True, lstm, *[True] * len(weights)]
    found = (x, h0, c0, *weights, *grads)
    if grad:
        for t in found:
            if t is not None:
                t.requires_grad_()
    return cell, needs, x, batch_sizes, h0, c0, weights, directions, y, gates, cells, *grads


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("of_states", [False, True])
def test_flops_of_projections(bias: bool, of_states: bool) -> None:
    """Each product forward, that of the gradient of what was multiplied, and of the weights."""
    module = pyrnnfast.LSTM(5, 8, proj_size=3, bias=bias, bidirectional=True)
    x, h = torch.ones(6, 4, 5), torch.ones(2, 4, 3, requires_grad=of_states)
    with FlopCounterMode(display=False) as forward:
        y, _ = module(x.requires_grad_(), (h, torch.ones(2, 4, 8)))
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    first = 0 if of_states else 4  # rows of the first step, before which nobody wants a gradient
    assert forward.get_total_flops() == 2 * 2 * 24 * (32 * 5 + 32 * 3 + 3 * 8)
    assert backward.get_total_flops() == 2 * forward.get_total_flops() - 2 * 2 * first * 32 * 3


@pytest.mark.parametrize("of_states", [False, True])
@pytest.mark.parametrize("options", [{}, {"bias": False, "num_layers": 2, "bidirectional": True}], ids=str)
@pytest.mark.parametrize("name", ["GRU", "LSTM", "GRUCell", "LSTMCell"])
def test_flops_are_counted(name: str, options: dict[str, Any], of_states: bool) -> None:
    """As torch counts its own GRU and cells; its LSTM it does not, which has 4/3 as many."""
    if name.endswith("Cell"):
        options = {"bias": options.get("bias", True)}
    counts = []
    for library, kind in ((pyrnnfast, name), (torch.nn, name.replace("LSTM", "GRU"))):
        module = getattr(library, kind)(5, 8, **options)
        x = torch.ones(3, 5) if name.endswith("Cell") else torch.ones(6, 3, 5)
        h = torch.ones(3, 8) if name.endswith("Cell") else torch.ones(4 if options else 1, 3, 8)
        for wanted in (False, True):
            state: Any = h.clone().requires_grad_(wanted) if of_states else None
            if state is not None and kind.startswith("LSTM"):
                state = (state, h)
            with FlopCounterMode(display=False) as forward:
                found = module(x.clone().requires_grad_(wanted), state)
            with FlopCounterMode(display=False) as backward:
                (found[0] if isinstance(found, tuple) else found).sum().backward()
            counts.append((forward.get_total_flops(), backward.get_total_flops()))
    assert counts[2][0] > 0
    ratio = 4 if name.startswith("LSTM") else 3
    assert [(3 * f, 3 * b) for f, b in counts[:2]] == [(ratio * f, ratio * b) for f, b in counts[2:]]


@every_layer
@pytest.mark.parametrize("cell", CELLS)
def test_opcheck_of_layer_backward(cell: str, packed: bool, directions: int) -> None:
    torch.library.opcheck(torch.ops.pyrnnfast.layer_backward, backward_operands(cell, packed, directions, grad=False))


@pytest.mark.parametrize("cell", CELLS)
def test_opcheck_of_layer_backward_that_is_differentiated(cell: str) -> None:
    torch.library.opcheck(torch.ops.pyrnnfast.layer_backward, backward_operands(cell, False, 1, grad=True))


@every_layer
@pytest.mark.parametrize("cell", CELLS)
def test_gradcheck_of_the_operators(cell: str, packed: bool, directions: int) -> None:
    name, x, batch_sizes, h0, c0, weights, *rest = layer_operands(cell, packed, directions, grad=True)
    leaves = [t for t in (x, h0, c0, *weights) if t is not None]

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        given = iter(tensors)
        own = [None if t is None else next(given) for t in (x, h0, c0, *weights)]
        y, h_n, c_n, _, cells = torch.ops.pyrnnfast.layer(name, own[0], batch_sizes, own[1], own[2], own[3:], *rest)
        return (y, h_n, c_n, cells) if cell == "lstm" else (y, h_n)

    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, leaves, fast_mode=True)


@pytest.mark.parametrize("cell", CELLS)
def test_gradient_penalty_through_the_operators(cell: str) -> None:
    """Of a loss that is not linear, with an input that has a history, and operands that share theirs."""
    case = Case(cell, steps=4, batch=3, bidirectional=True)
    module = case.module(pyrnnfast, torch.float64)
    weights = [w for name, w in module.named_parameters() if not name.endswith("_reverse")]
    leaf, _ = case.operands(torch.float64)
    h0 = torch.zeros(2, 3, 5, dtype=torch.float64)

    def penalty(run: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        x = leaf.sin()
        own = h0 + x[:1].sum()
        y = run(x, own)
        (g,) = torch.autograd.grad(y.pow(3).sum(), leaf, create_graph=True)
        total = g.square().sum() + y.square().sum()
        first = torch.autograd.grad(total, [leaf, *weights], create_graph=True)
        third = torch.autograd.grad(sum(t.square().sum() for t in first), [leaf, *weights])
        return (total, *first, *third)

    def operator(x: Tensor, h: Tensor) -> Tensor:
        c = h if cell == "lstm" else None
        y: Tensor = torch.ops.pyrnnfast.layer(cell, x, None, h, c, weights * 2, 2, True, False)[0]
        return y

    def eager(x: Tensor, h: Tensor) -> Tensor:
        form = functional.lstm if cell == "lstm" else functional.gru if cell == "gru" else functional.rnn
        options = {"nonlinearity": cell[4:]} if cell.startswith("rnn") else {}
        y = form(x, (h, h) if cell == "lstm" else h, weights * 2, bidirectional=True, **options)[0]
        assert isinstance(y, Tensor)
        return y

    torch.testing.assert_close(penalty(operator), penalty(eager), rtol=1e-9, atol=1e-10)
    compiled = torch.compile(eager, backend="eager", fullgraph=True)
    torch.testing.assert_close(penalty(compiled), penalty(eager), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("cell", CELLS)
def test_empty_batches_in_a_graph(cell: str) -> None:
    module = Case(cell, bidirectional=True).module(pyrnnfast)
    compiled = torch.compile(module, backend="aot_eager", dynamic=True)
    x = torch.randn(5, 0, 3, requires_grad=True)
    found, expected = compiled(x), module(x)
    torch.testing.assert_close(found, expected)
    weights = list(module.parameters())
    torch.testing.assert_close(
        torch.autograd.grad(found[0].sum(), [x, *weights]), torch.autograd.grad(expected[0].sum(), [x, *weights])
    )
    with pytest.raises(RuntimeError, match="sequence length to be larger than 0"):
        compiled(torch.randn(0, 2, 3))


@pytest.mark.parametrize("initial", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_sequences_that_are_all_empty_in_a_graph(cell: str, initial: bool) -> None:
    """Even their first row, which is NaN, is not looked at."""
    case = Case(cell, steps=5, batch=3, layers=2, bidirectional=True, initial=initial)
    module = case.module(pyrnnfast)

    def call(x: Tensor, hx: Any, lengths: Tensor) -> Any:
        return module(x, hx, lengths=lengths)

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    for lengths in ((2, 0, 5), (0, 0, 0), (1, 1, 0)):
        x, states = case.operands()
        with torch.no_grad():
            x[torch.arange(5)[:, None] >= torch.tensor(lengths)] = torch.nan
        given = case.hx(states), torch.tensor(lengths)
        found, expected = (
            case.run(lambda x, _, fn=fn, given=given: fn(x, *given), x, states) for fn in (compiled, call)
        )  # type: ignore[arg-type]
        torch.testing.assert_close(found, expected)
        wanted = [x, *module.parameters()]
        ours, eager = (
            torch.autograd.grad(sum(t.sum() for t in out.values()), wanted, allow_unused=True)
            for out in (found, expected)
        )
        for our, their in zip(ours, eager, strict=True):
            torch.testing.assert_close(our, torch.zeros_like(our) if their is None else their)


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non_strict"])
@pytest.mark.parametrize("extras", EXTRAS.values(), ids=EXTRAS.keys())
def test_export_with_lengths_and_resets(extras: dict[str, Tensor], strict: bool) -> None:
    module, x = pyrnnfast.GRU(3, 4, bidirectional=True), torch.randn(5, 3, 3)
    program = torch.export.export(module, (x,), extras, strict=strict)
    torch.testing.assert_close(program.module()(x, **extras), module(x, **extras))


def test_a_layer_without_what_backward_needs_says_so() -> None:
    *operands, _, cell_states = layer_operands("gru", False, 1, grad=True)
    y = torch.ops.pyrnnfast.layer(*operands, False, cell_states)[0]
    with pytest.raises(RuntimeError, match="keep=False"):
        y.sum().backward()


def test_the_operators_refuse_forward_mode() -> None:
    """torch would give a tangent of zero, or none, without an error."""
    name, x, *rest = layer_operands("gru", False, 1, grad=False)

    def run(x: Tensor) -> Tensor:
        y: Tensor = torch.ops.pyrnnfast.layer(name, x, *rest)[0]
        return y

    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(run, (x,), (x,))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        run(torch.autograd.forward_ad.make_dual(x, x))
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(NotImplementedError):
        torch.func.jvp(run, (x,), (x,))


TRANSFORMS: dict[str, Callable[..., Any]] = {
    "grad": lambda fn, x: torch.func.grad(lambda x: fn(x).sum())(x),
    "jvp": lambda fn, x: torch.func.jvp(fn, (x,), (x.cos(),)),
    "vmap": lambda fn, x: torch.func.vmap(fn)(torch.stack([x, 2 * x])),
    "vmap_grad": lambda fn, x: torch.func.vmap(torch.func.grad(lambda x: fn(x).sum()))(torch.stack([x, 2 * x])),
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS.keys())
@pytest.mark.parametrize(
    "case",
    [*(Case(c, single_step=s) for c in ("gru", "lstm") for s in (False, True)), Case("lstm", projected=2)],
    ids=str,
)
def test_transforms_inside_a_graph(case: Case, transform: Callable[..., Any]) -> None:
    module = case.module(pyrnnfast, torch.float64)
    x = case.operands(torch.float64)[0].detach()

    def run(x: Tensor) -> Tensor:
        found = module(x)
        return found if isinstance(found, Tensor) else found[0]

    def whole(x: Tensor) -> Any:
        return transform(run, x)

    found = torch.compile(whole, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(found, whole(x), rtol=1e-10, atol=1e-12)
    recorded = torch.fx.experimental.proxy_tensor.make_fx(whole)(x)
    torch.testing.assert_close(recorded(x), whole(x), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("cell", CELLS)
def test_dispatch_modes_see_the_operators(cell: str) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Spy(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    case = Case(cell)
    module = case.module(pyrnnfast)
    x, states = case.operands()
    expected = case.run(module, x, states)
    expected_gradients = gradients(module, x, states, expected)
    with Spy():
        found = case.run(module, x, states)
        found_gradients = gradients(module, x, states, found)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found_gradients, expected_gradients)
    assert torch.ops.pyrnnfast.layer.default in seen
    assert torch.ops.pyrnnfast.layer_backward.default in seen


@every_case
def test_meta_and_fake_tensors(case: Case) -> None:
    real = case.run(case.module(pyrnnfast), *case.operands())
    with torch.device("meta"):
        on_meta = case.module(pyrnnfast)
    x, states = (t.to("meta") if isinstance(t, Tensor) else tuple(s.to("meta") for s in t) for t in case.operands())
    found = case.run(on_meta, x, states)
    assert pyrnnfast.explain(on_meta, x, case.hx(states)).path == "fused"
    module, operands = case.module(pyrnnfast), case.operands()
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        fake = case.run(module, *operands)
    for name, t in real.items():
        assert found[name].is_meta
        for other in (found[name], fake[name]):
            assert (other.shape, other.dtype, other.stride()) == (t.shape, t.dtype, t.stride())


def test_enable_compile_is_all_that_layers_need() -> None:
    assert torch._dynamo.config.allow_rnn
    assert ops.enable_compile is pyrnnfast.enable_compile


def test_pack_and_unpack_around_a_compiled_layer() -> None:
    module = pyrnnfast.LSTM(3, 4)
    compiled = torch.compile(module, backend="aot_eager")
    packed = pack_padded_sequence(torch.randn(5, 3, 3), torch.tensor([5, 3, 2]))
    torch.testing.assert_close(compiled(packed)[0].data, module(packed)[0].data)
