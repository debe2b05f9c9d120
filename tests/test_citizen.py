"""Ours among torch's tools: construction, conversion, weights made anew, several processes, mixed precision."""

import copy
import functools
import gc
import inspect
import io
import typing
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import CELLS, SMALL, Case, Functional, gradients, result_weights
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import checkpoint

import pyrnnfast
from pyrnnfast import amp, loops

NAMES = ("RNN", "GRU", "LSTM", "RNNCell", "GRUCell", "LSTMCell")
# A layer and a cell of each kind, the cell with and without an initial state.
FEW = tuple(
    case
    for cell in CELLS
    for case in (
        Case(cell, layers=2, bidirectional=True),
        Case(cell, single_step=True),
        Case(cell, single_step=True, initial=False),
    )
)


def ours_of(case: Case, form: str, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    return case.module(pyrnnfast, dtype) if form == "module" else Functional(case, case.module(torch.nn, dtype))


forms = pytest.mark.parametrize("form", ["module", "functional"])
cases = pytest.mark.parametrize("case", SMALL, ids=str)
few = pytest.mark.parametrize("case", FEW, ids=str)


def results(case: Case, module: torch.nn.Module, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Outputs and all gradients, named as those of the bare module."""
    x, states = case.operands(dtype)
    outputs = case.run(module, x, states)
    found = outputs | gradients(module, x, states, outputs)
    return {name.replace("inner.", ""): t for name, t in found.items()}


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """In float64, to its rounding."""
    assert ours.keys() == theirs.keys()
    for name, their in theirs.items():
        torch.testing.assert_close(ours[name], their, rtol=1e-10, atol=1e-12, msg=name)


def weight_name(case: Case) -> str:
    return "weight_hh" if case.single_step else "weight_hh_l0"


# Construction ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES[:3])
def test_signatures(name: str) -> None:
    """Explicit ones: torch's, as its overload for type checkers has it, and what is ours after it, by keyword."""
    theirs = inspect.signature(typing.get_overloads(getattr(torch.nn, name).__init__)[0])
    expected = [(p.name, p.default, p.kind) for p in theirs.parameters.values()][1:]
    if name == "LSTM":
        expected.append(("cell_states", False, inspect.Parameter.KEYWORD_ONLY))
    ours = inspect.signature(getattr(pyrnnfast, name))
    assert [(p.name, p.default, p.kind) for p in ours.parameters.values()] == expected


@pytest.mark.parametrize(
    ("name", "args", "options"),
    [
        ("RNN", (3, 4, 2, "relu", False, True, 0.5, True), {}),
        ("GRU", (3, 4, 2, False, True, 0.5, True), {}),
        ("LSTM", (3, 4, 2, False, True, 0.5, True, 2), {}),
        ("RNN", (3, 4), {"nonlinearity": "relu", "dtype": torch.float64}),
        ("LSTM", (3,), {"hidden_size": 4, "proj_size": 2, "dtype": torch.float64}),
    ],
    ids=str,
)
def test_positions_and_skip_init(name: str, args: tuple[Any, ...], options: dict[str, Any]) -> None:
    theirs = getattr(torch.nn, name)(*args, **options)
    skipped = torch.nn.utils.skip_init(getattr(pyrnnfast, name), *args, **options)
    for ours in (getattr(pyrnnfast, name)(*args, **options), skipped):
        assert repr(ours) == repr(theirs)
        described = {n: (p.shape, p.dtype, p.device) for n, p in theirs.named_parameters()}
        assert {n: (p.shape, p.dtype, p.device) for n, p in ours.named_parameters()} == described


def test_skip_init_with_an_option_of_ours() -> None:
    assert torch.nn.utils.skip_init(pyrnnfast.LSTM, 3, 4, cell_states=True).cell_states


@cases
@pytest.mark.parametrize("how", ["to_empty", "assign"])
def test_from_the_meta_device(case: Case, how: str) -> None:
    """The weights come from a file, as those of large models do."""
    theirs, file = case.module(torch.nn), io.BytesIO()
    torch.save(theirs.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    with torch.device("meta"):
        ours = case.module(pyrnnfast)
    if how == "to_empty":
        ours.to_empty(device="cpu").load_state_dict(saved)
    else:
        ours.load_state_dict(saved, assign=True)
    assert_same(results(case, ours.double()), results(case, theirs.double()))


# to_torch ----------------------------------------------------------------------------------------------------------


@cases
def test_to_torch(case: Case) -> None:
    ours = case.module(pyrnnfast, torch.float64).eval()
    stock = ours.to_torch()
    assert type(stock) is getattr(torch.nn, type(ours).__name__)
    assert type(ours) is getattr(pyrnnfast, type(stock).__name__)
    assert not stock.training
    assert vars(stock).keys() == vars(ours).keys()
    pairs = list(zip(stock.named_parameters(), ours.named_parameters(), strict=True))
    assert pairs and all(a == b and p is q for (a, p), (b, q) in pairs)
    assert_same(results(case, ours), results(case, stock))
    ours.float()
    stock.double()  # the same parameters, so ours again as well
    assert_same(results(case, ours), results(case, stock))
    # But what is put in the place of a parameter is one module's own.
    setattr(stock, weight_name(case), torch.nn.Parameter(torch.zeros_like(getattr(ours, weight_name(case)))))
    stock.train().register_forward_hook(lambda *args: pytest.fail("not ours"))
    assert not ours.training and getattr(ours, weight_name(case)).abs().sum() > 0
    assert_same(results(case, ours), results(case, case.module(torch.nn, torch.float64)))


def test_to_torch_of_what_torch_does_not_have() -> None:
    module = pyrnnfast.LSTM(3, 4, cell_states=True)
    model = torch.nn.Sequential(pyrnnfast.GRU(3, 3), module)
    for convert in (module.to_torch, lambda: pyrnnfast.restore(model)):
        with pytest.raises(ValueError, match="cell_states"):
            convert()
    assert [type(m) for m in model] == [pyrnnfast.GRU, pyrnnfast.LSTM], "restored by half"

    class Special(pyrnnfast.GRUCell):
        pass

    with pytest.raises(TypeError, match="Special"):
        Special(3, 4).to_torch()


# Weights that are made anew in every call --------------------------------------------------------------------------

CHANGES: dict[str, Callable[[torch.nn.Module, str], Any]] = {
    "weight_norm": lambda m, n: parametrizations.weight_norm(m, n),
    "old_weight_norm": lambda m, n: torch.nn.utils.weight_norm(m, n),
    "spectral_norm": lambda m, n: parametrizations.spectral_norm(m, n),
    "prune": lambda m, n: prune.l1_unstructured(m, n, amount=0.3),
}


@few
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_training_with_weights_made_otherwise(case: Case, change: str) -> None:
    """Some steps of an optimizer; then as a copy, a module of torch's, and by functional_call."""
    trained = []
    for library in (pyrnnfast, torch.nn):
        module = case.module(library, torch.float64)
        torch.manual_seed(6)
        CHANGES[change](module, weight_name(case))
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            # In training each look at a spectral norm changes it, and torch's modules look more than once.
            with parametrize.cached():
                sum(t.pow(2).sum() for t in case.run(module, *case.operands(torch.float64)).values()).backward()
            optimizer.step()
        trained.append(module.eval())
    ours, theirs = trained
    assert_same(dict(ours.named_parameters()), dict(theirs.named_parameters()))
    expected = results(case, theirs)
    assert_same(results(case, ours), expected)
    assert_same(results(case, ours.to_torch()), expected)
    if change in ("weight_norm", "spectral_norm"):
        assert_same(results(case, copy.deepcopy(ours)), expected)
    x, states = case.operands(torch.float64)
    halves = {name: p.detach() / 2 for name, p in ours.named_parameters()}
    found, wanted = (
        torch.func.functional_call(module, halves, (case.packed(x), case.hx(states))) for module in trained
    )
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


# Modes of torch ----------------------------------------------------------------------------------------------------


@cases
@forms
def test_checkpoint_reentrant(case: Case, form: str) -> None:
    module = ours_of(case, form, torch.float64)
    x, states = case.operands(torch.float64)
    found = []
    for checkpointed in (False, True):
        run = lambda x, *s: tuple(case.run(module, x, s).values())  # noqa: E731
        values = checkpoint(run, x, *states, use_reentrant=True) if checkpointed else run(x, *states)
        weights = result_weights(dict(zip(case.outputs, values, strict=True)))
        torch.autograd.backward(values, list(weights.values()))
        leaves = [x, *states, *module.parameters()]
        found.append([leaf.grad for leaf in leaves])
        for leaf in leaves:
            leaf.grad = None
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@cases
@forms
def test_deterministic_algorithms(case: Case, form: str) -> None:
    """Nothing refuses, and new memory, which torch fills with NaN then, is not read."""
    module = ours_of(case, form, torch.float64)
    expected = results(case, module)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        found = results(case, module)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(found[name], t) for name, t in expected.items())


@few
def test_data_parallel_without_devices(case: Case) -> None:
    module = case.module(pyrnnfast, torch.float64)
    found = results(case, torch.nn.DataParallel(module))
    assert_same({name.replace("module.", ""): t for name, t in found.items()}, results(case, module))


# Several processes -------------------------------------------------------------------------------------------------


def loss(case: Case, module: torch.nn.Module, part: slice) -> Tensor:
    """Of a part of the batch; the parts' add up."""
    x, states = case.operands(torch.float64)
    x, *states = (t.movedim(-2, 0)[part].movedim(0, -2) for t in (x, *states))
    total: Tensor = sum(t.pow(2).sum() for t in torch.utils._pytree.tree_leaves(module(x, case.hx(tuple(states)))))
    return total


def share_a_batch(rank: int) -> None:
    """The gradients of half a batch on each of two processes, averaged, are half those of the whole."""
    mesh = torch.distributed.init_device_mesh("cpu", (2,))
    for case in (replace(case, batch=4) for case in FEW if case.initial):
        alone = case.module(torch.nn, torch.float64)
        (loss(case, alone, slice(None)) / 2).backward()
        expected = {name: p.grad for name, p in alone.named_parameters()}
        for sharded in (False, True):
            module = case.module(pyrnnfast, torch.float64)
            paths: list[str] = []
            module.register_forward_hook(lambda m, args, _, seen=paths: seen.append(pyrnnfast.explain(m, *args).path))
            # Parameters stay whole until backward, so that the hook sees what forward saw.
            wrapped = (
                fully_shard(module, mesh=mesh, reshard_after_forward=False)
                if sharded
                else DistributedDataParallel(module)
            )
            assert all(isinstance(p, DTensor) == sharded for p in wrapped.parameters())
            loss(case, wrapped, slice(2 * rank, 2 * rank + 2)).backward()
            assert paths == ["fused"], case
            grads = {name: p.grad.full_tensor() if sharded else p.grad for name, p in module.named_parameters()}
            assert_same(grads, expected)


def one_of_two(rank: int, meeting: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    share_a_batch(rank)
    gc.collect()  # What is wrapped holds the group, and torch may abort where that outlives its destruction.
    torch.distributed.destroy_process_group()


def test_two_processes(tmp_path: Path) -> None:
    """DistributedDataParallel and FSDP2 over gloo."""
    running = torch.multiprocessing.spawn(one_of_two, (str(tmp_path / "meeting"),), nprocs=2, join=False)
    try:
        assert any(running.join(timeout=60) for _ in range(2)), "the processes do not end"
    finally:
        for process in running.processes:
            process.kill()


# Mixed precision ---------------------------------------------------------------------------------------------------


@cases
@forms
def test_grad_scaler(case: Case, form: str) -> None:
    """A power of two scales exactly; gradients that overflow are noticed, and the step left out."""
    stepped = []
    for scaled in (False, True):
        module = ours_of(case, form)
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=scaled)
        outputs = case.run(module, *case.operands())
        scaler.scale(sum(t.pow(2).sum() for t in outputs.values())).backward()
        scaler.step(optimizer)
        scaler.update()
        stepped.append([p.detach().clone() for p in module.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*stepped, strict=True))
    optimizer.zero_grad()
    x, states = case.operands()
    scaler.scale(sum(t.sum() for t in case.run(module, x * torch.inf, states).values())).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**9
    assert all(torch.equal(p, before) for p, before in zip(module.parameters(), stepped[1], strict=True))


@pytest.mark.parametrize("cell", ["RNN", "GRU", "LSTM"])
def test_float16_with_a_grad_scaler(cell: str) -> None:
    """Gradients too small for float16 come through scaled; too large ones are infinite, and the step is left out."""
    torch.manual_seed(0)
    module, x = getattr(pyrnnfast, cell)(3, 4), torch.randn(5, 2, 3)
    exact = torch.autograd.grad(module(x)[0].sum() * 1e-8, list(module.parameters()))
    before = [p.detach().clone() for p in module.parameters()]
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    for scale in (2.0**24, 2.0**60):
        optimizer.zero_grad()
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        with torch.autocast("cpu", torch.float16):
            assert pyrnnfast.explain(module, x).path == "fused"
            loss = module(x)[0].float().sum() * 1e-8
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        if scale == 2.0**24:
            for parameter, expected in zip(module.parameters(), exact, strict=True):
                torch.testing.assert_close(parameter.grad, expected, rtol=0, atol=0.005 * expected.abs().max().item())
        else:
            scaler.step(optimizer)
            scaler.update()
            assert scaler.get_scale() == scale / 2
    assert all(torch.equal(p, b) for p, b in zip(module.parameters(), before, strict=True))


narrow = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
# Of the largest element, after several steps.
ERROR = {torch.bfloat16: 0.03, torch.float16: 0.03 / 8}


@functools.cache
def torch_has_narrow_lstm(dtype: torch.dtype) -> bool:
    """Whether oneDNN, behind torch's dense LSTM under autocast, serves it on this processor; else it raises."""
    try:
        with torch.autocast("cpu", dtype):
            torch.nn.LSTM(3, 4)(torch.ones(2, 2, 3))
    except RuntimeError as error:
        assert "could not create a primitive" in str(error)
        return False
    return True


@cases
@forms
@narrow
def test_autocast(case: Case, form: str, dtype: torch.dtype) -> None:
    """The dtypes are torch's, the gradients float32, and the values as good as 8 or 11 bits allow."""
    ours, theirs = ours_of(case, form), case.module(torch.nn)
    exact = results(case, theirs, torch.float32)
    found: list[dict[str, Tensor]] = []
    for module in (ours, theirs):
        x, states = case.operands()
        with torch.autocast("cpu", dtype):
            dense_lstm = case.cell == "lstm" and not (case.single_step or case.lengths or case.projected)
            if module is theirs and dense_lstm and not torch_has_narrow_lstm(dtype):
                dtypes = {n: dtype if n in case.outputs else torch.float32 for n in found[0]}
                found.append({n: t.to(dtypes[n]) for n, t in found[0].items()})
                continue
            outputs = case.run(module, x, states)
            if module is ours and form == "module":
                assert pyrnnfast.explain(ours, case.packed(x), case.hx(states)).path == "fused"
        # Those of the exact results, which the dtype of these would round otherwise.
        weights = {n: w.to(outputs[n].dtype) for n, w in result_weights({n: exact[n] for n in outputs}).items()}
        grads = gradients(module, x, states, outputs, weights=weights)
        found.append(outputs | {name.replace("inner.", ""): g for name, g in grads.items()})
    assert {n: t.dtype for n, t in found[0].items()} == {n: t.dtype for n, t in found[1].items()}
    for name, t in found[0].items():
        torch.testing.assert_close(
            t.float(), exact[name], rtol=0, atol=ERROR[dtype] * exact[name].detach().abs().max().clamp(min=1)
        )
    with torch.autocast("cpu", dtype), torch.autocast("cpu", enabled=False):
        inner = results(case, ours, torch.float32)
    outside = results(case, ours, torch.float32)
    assert all(torch.equal(inner[name], t) for name, t in outside.items())


@pytest.mark.parametrize("hidden", [4, 200])
@narrow
def test_a_cells_state_is_not_narrowed_by_autocast(hidden: int, dtype: torch.dtype) -> None:
    """It grows by 0.002 at each step, which bfloat16 would no longer notice from 0.5 on, and float16 round by as much
    as a tenth."""
    with torch.no_grad():
        lstm, gru = pyrnnfast.LSTMCell(1, hidden), pyrnnfast.GRUCell(1, hidden)
        for parameter in (*lstm.parameters(), *gru.parameters()):
            parameter.zero_()
        lstm.bias_ih[hidden : 2 * hidden] = lstm.bias_ih[3 * hidden :] = 20  # f and o are 1, i is 1/2
        lstm.bias_ih[2 * hidden : 3 * hidden] = 0.004
        gru.bias_ih[hidden : 2 * hidden] = 5.5  # z, of which h keeps so much
        gru.bias_ih[2 * hidden :] = 20  # n is 1
        x, h, c = torch.zeros(1, 1), torch.zeros(1, hidden), torch.zeros(1, hidden)
        with torch.autocast("cpu", dtype):
            for _ in range(600):
                _, c = lstm(x, (h, c))
                h = gru(x, h)
    assert c.dtype is h.dtype is torch.float32
    torch.testing.assert_close(c, torch.full_like(c, 1.2), rtol=0.01, atol=0)
    keeps = torch.tensor(5.5).sigmoid()
    torch.testing.assert_close(h, (1 - keeps**600).expand_as(h), rtol=0.01, atol=0)


@pytest.mark.parametrize("cell", ["LSTMCell", "GRUCell", "RNNCell"])
@pytest.mark.parametrize("torch_is_fast", [True, False])
@narrow
def test_cells_under_autocast_take_the_faster_road(
    cell: str, torch_is_fast: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(amp._TORCH_IS_FAST, dtype, torch_is_fast)
    calls = 0

    def counted(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        return forward(*args)

    forward = getattr(torch.nn, cell).forward
    monkeypatch.setattr(getattr(torch.nn, cell), "forward", counted)
    ours, x = getattr(pyrnnfast, cell), torch.ones(32, 128)
    with torch.autocast("cpu", dtype):
        for module, given in ((ours(128, 128), x), (ours(128, 512), x[:8]), (ours(128, 512).to(dtype), x.to(dtype))):
            assert pyrnnfast.explain(module, given).path == "fused"
            module(given)
        assert calls == 0
        large = ours(128, 512)
        found = pyrnnfast.explain(large, x)
        large(x)
    assert calls == torch_is_fast
    assert found.path == ("torch" if torch_is_fast else "fused")
    assert not torch_is_fast or "autocast" in found.reason


def test_errors_of_a_cell_that_autocast_leaves_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(amp._TORCH_IS_FAST, torch.bfloat16, True)
    stock = torch.nn.LSTMCell(128, 512)
    ours, x, h = pyrnnfast.replace(copy.deepcopy(stock)), torch.ones(32, 128), torch.ones(32, 512)
    with torch.autocast("cpu", torch.bfloat16):
        for given in ((x[:, 1:], None), (x, (h[1:], h[1:])), (x, (h, h[:, 1:])), (x.long(), None)):
            messages = []
            for module in (stock, ours):
                with pytest.raises((RuntimeError, ValueError)) as caught:
                    module(*given)
                messages.append(str(caught.value))
            assert messages[0] == messages[1]
        with pytest.raises(TypeError, match="pair"):
            ours(x, h)
        ours.bias_hh = torch.nn.Parameter(ours.bias_hh.to("meta"))
        with pytest.raises(RuntimeError, match="not at the same device"):
            ours(x)


@pytest.mark.parametrize("cell", ["LSTMCell", "GRUCell", "RNNCell"])
@pytest.mark.parametrize("given", ["wide", "narrow", "wide state", "narrow state"])
@pytest.mark.parametrize("rows", [1, 9])
@pytest.mark.parametrize("form", ["fused", "by torch"])
@narrow
def test_loops_of_cells_under_autocast(
    cell: str, given: str, rows: int, form: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dtypes as torch has them; gradients as good as float32 where LSTM and GRU keep a float32 state, else as 8 or 11
    bits allow."""
    if form == "by torch":
        monkeypatch.setitem(amp._TORCH_IS_FAST, dtype, True)
        monkeypatch.setattr(amp, "_FEW_ROWS", 0)
        monkeypatch.setattr(amp, "_FEW_WEIGHTS", dict.fromkeys(amp._FEW_WEIGHTS, 0))
    stock = getattr(torch.nn, cell)(5, 7)
    ours = pyrnnfast.replace(copy.deepcopy(stock))
    kinds, grads = [], []
    for module, autocast in ((ours, True), (stock, True), (stock, False)):
        module.zero_grad()
        kind = dtype if given.startswith("narrow") else torch.float32
        x = torch.arange(4.0 * rows * 5).sin().view(4, rows, 5)
        x = (x if given.endswith("state") else x.to(kind)).requires_grad_()
        state: Any = None
        if given.endswith("state"):
            h = torch.arange(7.0 * rows).cos().view(rows, 7).to(kind)
            state = (h, h) if cell == "LSTMCell" else h
        outputs = []
        with torch.autocast("cpu", dtype, enabled=autocast):
            for step in x:
                if not autocast:
                    step, state = step.float(), _widened(state)
                state = module(step, state)
                outputs += list(state) if cell == "LSTMCell" else [state]
        kinds.append([t.dtype for t in outputs])
        torch.cat(outputs).float().square().sum().backward()
        grads.append([x.grad, *(p.grad for p in module.parameters())])
    assert kinds[0] == kinds[1]
    assert [g.dtype for g in grads[0]] == [g.dtype for g in grads[1]]
    for found, exact in zip(grads[0], grads[2], strict=True):
        wide = form == "fused" and cell != "RNNCell" and given.startswith("wide")
        tolerance = 1e-5 if wide else ERROR[dtype]
        torch.testing.assert_close(found.float(), exact.float(), rtol=0, atol=tolerance * exact.abs().max().item())


def _widened(state: Any) -> Any:
    return tuple(t.float() for t in state) if isinstance(state, tuple) else None if state is None else state.float()


@few
@forms
@pytest.mark.parametrize("to", [torch.bfloat16, torch.float16], ids=lambda to: f"to_{to}")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_autocast_of_other_dtypes(case: Case, form: str, dtype: torch.dtype, to: torch.dtype) -> None:
    """Input from another operator under autocast is narrow already; float64 is left alone."""
    weights = torch.float64 if dtype is torch.float64 else torch.float32
    found: list[dict[str, Tensor]] = []
    for module in (ours_of(case, form, weights), case.module(torch.nn, weights)):
        x, states = case.operands(dtype)
        with torch.autocast("cpu", to):
            layer = case.cell == "lstm" and not (case.single_step or case.lengths or case.projected)
            if layer and (dtype, to) == (torch.bfloat16, torch.float16) and not torch_has_narrow_lstm(to):
                with pytest.raises(RuntimeError, match="could not create a primitive"):
                    case.run(module, x, states)
                continue
            found.append(case.run(module, x, states))
    if not found:
        return
    assert {n: t.dtype for n, t in found[0].items()} == {n: t.dtype for n, t in found[1].items()}
    tolerance = 1e-12 if dtype is torch.float64 else max(ERROR[dtype], ERROR[to])
    for name, t in found[1].items():
        torch.testing.assert_close(found[0][name], t, rtol=tolerance, atol=tolerance)


def test_profilers_see_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loops, "_ELEMENTS_OF_NODE", 0)
    cell, x = pyrnnfast.GRUCell(3, 4), torch.ones(2, 3)
    layers = pyrnnfast.RNN(3, 4), pyrnnfast.LSTM(3, 4, cell_states=True)  # in one call, and layer by layer
    with torch.profiler.profile() as profile:
        for layer in layers:
            layer(x)[0].sum().backward()
        cell(x, cell(x)).sum().backward()
    names = {event.key for event in profile.key_averages()}
    of_layers = {f"pyrnnfast::{cell}_{what}" for cell in ("rnn_tanh", "lstm") for what in ("forward", "backward")}
    assert names >= of_layers | {f"pyrnnfast::gru_{what}" for what in ("forward", "backward", "weight_gradients")}
