"""What users do with a layer on the card: explain, derivatives, AMP, lengths and resets, torch.compile, errors."""

import copy
from typing import Any

import oracle
import pytest
import torch
from cases import CELLS, SMALL, Case, gradients
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import pyrnnfast
from pyrnnfast import cuda

both = pytest.mark.parametrize("path", oracle.PATHS)
every_cell = pytest.mark.parametrize("cell", CELLS)

# For which both paths have plans.
SIZES = {"steps": 12, "batch": 9, "inputs": 24, "hidden": 64}
BF16 = torch.bfloat16


def layer(cell: str, dtype: torch.dtype = BF16, **options: Any) -> torch.nn.Module:
    return Case(cell, **(SIZES | options)).module(pyrnnfast, dtype).to(oracle.DEVICE)


# In parts of the norm, in 16 bits; where a rectifier's argument is near zero, rounding decides over a gradient.
NEAR = dict.fromkeys(CELLS, 0.03) | {"rnn_relu": 0.2}


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


# explain ------------------------------------------------------------------------------------------------------------


@every_cell
@pytest.mark.parametrize("batch", (1, 16, 64))
@pytest.mark.parametrize("hidden", (256, 512))
@pytest.mark.parametrize("kind", ("bf16", "fp16", "tf32"))
def test_the_planner_serves_common_sizes(cell: str, kind: str, hidden: int, batch: int) -> None:
    properties = torch.cuda.get_device_properties(0)
    if properties.major < 8 or properties.multi_processor_count < 100:
        pytest.skip("a small card")
    dtype = oracle.KINDS[kind][0]
    module = layer(cell, dtype, hidden=hidden, inputs=hidden)
    x = torch.randn(128, batch, hidden, device=oracle.DEVICE, dtype=dtype)
    with oracle.precision(kind), cuda.use("persistent"), torch.no_grad():
        found = pyrnnfast.explain(module, x)
    assert found.path == "persistent", found


@every_cell
def test_what_is_asked_for_is_what_is_told(cell: str) -> None:
    module = layer(cell)
    x = torch.randn(12, 9, 24, device=oracle.DEVICE, dtype=BF16)
    for asked, told in (("step", "fused"), ("fused", "fused"), ("persistent", "persistent"), ("cudnn", "cudnn")):
        with cuda.use(asked):
            assert pyrnnfast.explain(module, x).path == told
    assert pyrnnfast.explain(module, x).path in ("fused", "persistent", "cudnn")


@every_cell
def test_by_default_the_table_decides(cell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "table", lambda: cuda.Table(()))
    module = layer(cell)
    x = torch.randn(12, 9, 24, device=oracle.DEVICE, dtype=BF16)
    assert pyrnnfast.explain(module, x).path == "cudnn"
    stock = pyrnnfast.restore(copy.deepcopy(module))
    stock.flatten_parameters()
    with torch.no_grad():
        assert torch.equal(module(x)[0], stock(x)[0])


@every_cell
@pytest.mark.parametrize("kind", ("bf16", "fp16", "tf32"))
def test_by_default_it_computes_what_it_tells(cell: str, kind: str) -> None:
    """Of a size that was measured on some card."""
    dtype = oracle.KINDS[kind][0]
    module = layer(cell, dtype, hidden=512, inputs=512)
    x = torch.randn(128, 64, 512, device=oracle.DEVICE, dtype=dtype, requires_grad=True)
    upstream = torch.randn(128, 64, 512, device=oracle.DEVICE, dtype=dtype)

    def results() -> list[Tensor]:
        y = module(x)[0]
        return [y, *torch.autograd.grad(y, [x, *module.parameters()], upstream)]

    with oracle.precision(kind):
        told, found = pyrnnfast.explain(module, x).path, results()
        with cuda.use(told):
            expected = results()
    for f, e in zip(found, expected, strict=True):
        assert torch.equal(f, e) if told != "cudnn" else relative(f, e) < 0.01


# Derivatives --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [case for case in SMALL if not (case.single_step or case.projected)], ids=str)
def test_gradcheck(case: Case) -> None:
    given = oracle.operands(case, torch.float64)
    parameters = dict(given.ours.named_parameters())

    def call(x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        states, weights = rest[: len(given.states)], rest[len(given.states) :]
        replaced = dict(zip(parameters, weights, strict=True))
        y, final = torch.func.functional_call(given.ours, replaced, (case.packed(x), case.hx(states)))
        y = y if case.lengths is None else pad_packed_sequence(y, case.batch_first)[0]
        return (y, *(final if case.cell == "lstm" else (final,)))

    with cuda.use("step"):  # there is no persistent form in float64
        assert torch.autograd.gradcheck(call, (given.x, *given.states, *parameters.values()))


@every_cell
def test_double_backward(cell: str) -> None:
    given = oracle.operands(Case(cell, hidden=4, steps=2), torch.float64)
    with cuda.use("step"):
        y = given.ours(given.x)[0]
        (first,) = torch.autograd.grad(y.square().sum(), given.x, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), given.x)
    stock = copy.deepcopy(given.stock).cpu()
    x = given.x.detach().cpu().requires_grad_()
    (first,) = torch.autograd.grad(stock(x)[0].square().sum(), x, create_graph=True)
    (expected,) = torch.autograd.grad(first.square().sum(), x)
    torch.testing.assert_close(second.cpu(), expected)


@both
@every_cell
@pytest.mark.parametrize("name", ("y", "h_n", "c_n"))
def test_the_gradient_of_one_output(name: str, cell: str, path: str) -> None:
    if name == "c_n" and cell != "lstm":
        pytest.skip("no such output")
    case = Case(cell, **SIZES)
    given = oracle.operands(case, BF16)
    found = []
    for module in (given.ours, given.stock):
        with cuda.use(path):
            outputs = case.run(module, given.x, given.states)
            weights = {key: torch.ones_like(t) for key, t in outputs.items()}
            found.append(gradients(module, given.x, given.states, outputs, (name,), weights))
    assert found[0].keys() == found[1].keys()
    assert all(relative(found[0][key], found[1][key]) < NEAR[cell] for key in found[0])


# AMP ----------------------------------------------------------------------------------------------------------------


@both
@every_cell
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_autocast(cell: str, dtype: torch.dtype, path: str) -> None:
    case = Case(cell, **SIZES)
    given = oracle.operands(case, torch.float32)
    found = []
    for module in (given.ours, given.stock):
        with cuda.use(path):
            with torch.autocast("cuda", dtype=dtype):
                if module is given.ours:
                    assert pyrnnfast.explain(module, given.x, case.hx(given.states)).path == oracle.PATHS[path]
                outputs = case.run(module, given.x, given.states)
            found.append(oracle.with_gradients(module, given.x, given.states, outputs))
    ours, theirs = found
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        assert ours[name].dtype is expected.dtype, name
        assert relative(ours[name], expected) < NEAR[cell], name


def test_grad_scaler() -> None:
    module = layer("lstm", torch.float32)
    optimizer, scaler = torch.optim.SGD(module.parameters(), 0.1), torch.amp.GradScaler("cuda", init_scale=128.0)
    x = torch.randn(12, 9, 24, device=oracle.DEVICE)
    losses = []
    with cuda.use("persistent"):
        for _ in range(10):
            with torch.autocast("cuda", dtype=torch.float16):
                loss = (module(x)[0].float() - 0.5).square().mean()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert losses[-1] < losses[0]


# What is ours alone -------------------------------------------------------------------------------------------------

LENGTHS = (12, 1, 7, 0, 12, 3, 5, 5, 2)
by_torch_too = pytest.mark.parametrize("path", [*oracle.PATHS, "cudnn"])


@by_torch_too
@every_cell
@pytest.mark.parametrize("bidirectional", (False, True))
@pytest.mark.parametrize("where", ("cpu", "cuda"))
def test_lengths(where: str, bidirectional: bool, cell: str, path: str) -> None:
    # The same call in float64 on the CPU is the truth; NaN in the padding must show nowhere.
    module = layer(cell, bidirectional=bidirectional)
    exact = copy.deepcopy(module).cpu().double()
    x = torch.randn(12, 9, 24, dtype=BF16)
    padding = torch.arange(12)[:, None] >= torch.tensor(LENGTHS)
    x[padding] = torch.nan
    ours, true = x.to(oracle.DEVICE).requires_grad_(), x.double().requires_grad_()
    lengths = torch.tensor(LENGTHS)
    with cuda.use(path):
        y, _ = module(ours, lengths=lengths.to(where))
        upstream = torch.randn(y.shape).to(BF16)
        found = torch.autograd.grad(y, [ours, *module.parameters()], upstream.to(y))
    y_true, _ = exact(true, lengths=lengths)
    expected = torch.autograd.grad(y_true, [true, *exact.parameters()], upstream.double())
    assert not y.cpu()[padding].any()
    assert not found[0].cpu()[padding].any()
    for a, b in zip((y, *found), (y_true, *expected), strict=True):
        assert relative(a.detach().cpu(), b.detach()) < NEAR[cell]


@pytest.mark.parametrize("path", [*oracle.PATHS, None])
@every_cell
@pytest.mark.parametrize("how", ("autocast", "compiled"))
def test_lengths_in_other_forms(how: str, cell: str, path: str | None) -> None:
    module = layer(cell, torch.float32)
    x, lengths = torch.randn(12, 9, 24, device=oracle.DEVICE), torch.tensor(LENGTHS, device=oracle.DEVICE)
    expected = copy.deepcopy(module).cpu().double()(x.cpu().double(), lengths=lengths.cpu())[0]
    if how == "compiled":
        pyrnnfast.enable_compile()
        torch.compiler.reset()
        module = torch.compile(module, fullgraph=True)
    with cuda.use(path), torch.autocast("cuda", enabled=how == "autocast"):
        y, _ = module(x, lengths=lengths)
    assert y.dtype is (torch.float16 if how == "autocast" else torch.float32)
    assert relative(y.detach().cpu(), expected.detach()) < NEAR[cell]


@by_torch_too
@every_cell
def test_a_nested_input(cell: str, path: str) -> None:
    module = layer(cell, bidirectional=True)
    sequences = [torch.randn(n, 24, device=oracle.DEVICE, dtype=BF16) for n in (7, 1, 12, 3)]
    with cuda.use(path), torch.no_grad():
        y, _ = module(torch.nested.nested_tensor(sequences, layout=torch.jagged))
        alone = [module(s.unsqueeze(1))[0].squeeze(1) for s in sequences]
    for found, expected in zip(y.unbind(), alone, strict=True):
        assert relative(found, expected) < NEAR[cell]


@by_torch_too
@every_cell
def test_reset(cell: str, path: str) -> None:
    module = layer(cell)
    exact = copy.deepcopy(module).cpu().double()
    x = torch.randn(12, 9, 24, dtype=BF16)
    reset = torch.rand(12, 9) < 0.3
    ours, true = x.to(oracle.DEVICE).requires_grad_(), x.double().requires_grad_()
    with cuda.use(path):
        y, _ = module(ours, reset=reset.to(oracle.DEVICE))
        found = torch.autograd.grad(y.float().square().sum(), [ours, *module.parameters()])
    y_true, _ = exact(true, reset=reset)
    expected = torch.autograd.grad(y_true.square().sum(), [true, *exact.parameters()])
    for a, b in zip((y, *found), (y_true, *expected), strict=True):
        assert relative(a.detach().cpu(), b.detach()) < NEAR[cell]


@by_torch_too
def test_cell_states(path: str) -> None:
    module = pyrnnfast.LSTM(24, 64, cell_states=True, device=oracle.DEVICE, dtype=BF16)
    exact = copy.deepcopy(module).cpu().double()
    x = torch.randn(12, 9, 24).to(BF16)
    with cuda.use(path):
        ours = x.to(oracle.DEVICE).requires_grad_()
        _, (_, c_n), cells = module(ours)
        found = torch.autograd.grad(cells.float().square().sum(), [ours, *module.parameters()])
    true = x.double().requires_grad_()
    _, _, cells_true = exact(true)
    expected = torch.autograd.grad(cells_true.square().sum(), [true, *exact.parameters()])
    assert torch.equal(cells[-1], c_n[0])
    for a, b in zip((cells, *found), (cells_true, *expected), strict=True):
        assert relative(a.detach().cpu(), b.detach()) < NEAR["lstm"]


@both
@every_cell
def test_an_exploded_sequence_harms_no_other(cell: str, path: str) -> None:
    module = layer(cell)
    x = torch.randn(12, 9, 24, device=oracle.DEVICE, dtype=BF16)
    with cuda.use(path), torch.no_grad():
        expected = module(x)[0]
        x[3, 4] = torch.nan
        found = module(x)[0]
    others = [b for b in range(9) if b != 4]
    assert torch.equal(found[:, others], expected[:, others])
    assert found[3:, 4].isnan().all()
    assert torch.equal(found[:3, 4], expected[:3, 4])


# compile ------------------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("cell", ("lstm", "rnn_relu"))
def test_compile(cell: str, path: str) -> None:
    pyrnnfast.enable_compile()
    torch.compiler.reset()
    module = layer(cell)
    compiled = torch.compile(module, fullgraph=True)
    for steps, batch in ((12, 9), (20, 5)):
        x = torch.randn(steps, batch, 24, device=oracle.DEVICE, dtype=BF16)
        results = []
        for fn in (module, compiled):
            leaf = x.clone().requires_grad_()
            with cuda.use(path):
                y = fn(leaf)[0]
                results.append((y, *torch.autograd.grad(y.float().square().sum(), [leaf, *module.parameters()])))
        for found, expected in zip(results[1], results[0], strict=True):
            assert relative(found.detach(), expected.detach()) < 0.01


# Errors and other calls ---------------------------------------------------------------------------------------------


@every_cell
def test_operands_on_two_devices_raise_torchs_words(cell: str) -> None:
    case = Case(cell, **SIZES)
    ours, stock = (case.module(library).to(oracle.DEVICE) for library in (pyrnnfast, torch.nn))
    messages = []
    for module in (ours, stock):
        with cuda.use("step"), pytest.raises(RuntimeError) as raised:
            module(torch.randn(12, 9, 24))
        messages.append(str(raised.value).splitlines()[0])
    assert messages[0] == messages[1]


@every_cell
def test_a_model_moves_to_the_card_and_back(cell: str) -> None:
    case = Case(cell, **SIZES)
    module = case.module(pyrnnfast)
    x = torch.randn(12, 9, 24)
    with torch.no_grad(), cuda.use("step"):
        before = module(x)[0]
        on_card = module.to(oracle.DEVICE)(x.to(oracle.DEVICE))[0]
        after = module.cpu()(x)[0]
    assert torch.equal(before, after)
    torch.testing.assert_close(on_card.cpu(), before)


@both
@every_cell
def test_packed_input_like_torchs(cell: str, path: str) -> None:
    case = Case(cell, lengths=(3, 12, 1, 7), inputs=24, hidden=64, bidirectional=True)
    given = oracle.operands(case, BF16)
    lengths = torch.tensor(case.lengths)
    packed = pack_padded_sequence(given.x, lengths, enforce_sorted=False)
    with cuda.use(path), torch.no_grad():
        y, final = given.ours(packed)
        y_stock, final_stock = given.stock(packed)
    assert torch.equal(y.batch_sizes, y_stock.batch_sizes)
    assert torch.equal(y.unsorted_indices, y_stock.unsorted_indices)
    assert relative(y.data, y_stock.data) < 0.02
    pairs = zip(final, final_stock, strict=True) if cell == "lstm" else [(final, final_stock)]
    assert all(relative(a, b) < 0.02 for a, b in pairs)
