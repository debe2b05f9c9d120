"""Ours on the way to what is not torch's eager mode: torch.onnx, TorchScript, torch.fx, quantization.

An ONNX graph is that of torch.nn's module, and onnxruntime computes our numbers from it.
"""

import io
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from cases import CELLS, Case
from test_citizen import NAMES, Functional, few
from torch import Tensor

import pyrnnfast

# Few, since torch's newer exporter takes most of a second for each.
CASES = (
    *(
        case
        for cell in ("rnn_tanh", "gru", "lstm")
        for case in (
            Case(cell),
            Case(cell, layers=2, bidirectional=True, batch_first=True, initial=False),
            Case(cell, single_step=True),
        )
    ),
    Case("rnn_relu", bias=False),
    Case("lstm", single_step=True, bias=False, initial=False),
)
exporters = pytest.mark.parametrize("dynamo", [False, True], ids=["torchscript", "dynamo"])
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning",
    "ignore::FutureWarning",
    "ignore::torch.jit.TracerWarning",
    "ignore:Exporting a model to ONNX with a batch_size other than 1",
)


def export(
    module: torch.nn.Module, operands: tuple[Any, ...], dynamo: bool, names: Sequence[str] = (), **options: Any
) -> onnx.ModelProto:
    if dynamo:
        program = torch.onnx.export(module, operands, input_names=list(names), dynamo=True, verbose=False, **options)
        assert program is not None
        return program.model_proto
    file = io.BytesIO()
    torch.onnx.export(module, operands, file, input_names=list(names), dynamo=False, **options)
    return onnx.load_from_string(file.getvalue())


def operators(graph: onnx.GraphProto) -> Iterator[str]:
    """Of all nodes in their order, those of inner graphs included."""
    for node in graph.node:
        yield node.op_type
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from operators(attribute.g)


def assert_computes(model: onnx.ModelProto, tensors: Sequence[Tensor], expected: Any) -> None:
    session = onnxruntime.InferenceSession(model.SerializeToString())
    names = [found.name for found in session.get_inputs()]
    feed = {name: t.detach().numpy() for name, t in zip(names, tensors, strict=True)}
    for found, t in zip(session.run(None, feed), torch.utils._pytree.tree_leaves(expected), strict=True):
        torch.testing.assert_close(torch.from_numpy(found), t, rtol=1e-5, atol=1e-5)


def model_of(case: Case, library: ModuleType) -> torch.nn.Module:
    return case.module(library).requires_grad_(False).eval()


@exporters
@pytest.mark.parametrize("case", CASES, ids=str)
def test_export(case: Case, dynamo: bool) -> None:
    x, states = case.operands()
    operands = (x.detach(), case.hx(tuple(s.detach() for s in states)))[: 2 if case.initial else 1]
    ours = model_of(case, pyrnnfast)
    exported, expected = (export(module, operands, dynamo) for module in (ours, model_of(case, torch.nn)))
    found = list(operators(exported.graph))
    assert found == list(operators(expected.graph))
    if not case.single_step and not (dynamo and case.cell.startswith("rnn")):
        # torch's newer exporter writes RNN layers out, step by step.
        assert case.cell.split("_")[0].upper() in found
    assert_computes(exported, [x, *states], ours(*operands))


@pytest.mark.parametrize("case", [c for c in CASES if not c.single_step and c.initial], ids=str)
def test_export_for_all_lengths_and_batches(case: Case) -> None:
    names = ("x", "h", "c")[: 1 + len(case.operands()[1])]
    axes = {name: {0: "steps", 1: "batch"} if name == "x" else {1: "batch"} for name in names}
    x, states = case.operands()
    ours = model_of(case, pyrnnfast)
    exported = export(ours, (x.detach(), case.hx(states)), False, names, dynamic_axes=axes)
    longer = Case(case.cell, steps=7, batch=3)
    x, states = longer.operands()
    assert_computes(exported, [x, *states], ours(x.detach(), case.hx(states)))


def test_steps_that_may_change_in_number() -> None:
    """Whatever becomes of torch's own module in torch's newer exporter becomes of ours."""
    case = Case("lstm", initial=False)
    shapes = {"input": {0: torch.export.Dim("steps", min=2, max=64)}, "hx": None}
    outcomes: list[Any] = []
    for library in (pyrnnfast, torch.nn):
        try:
            exported = export(model_of(case, library), (case.operands()[0].detach(), None), True, dynamic_shapes=shapes)
            outcomes.append(list(operators(exported.graph)))
        except Exception as error:
            outcomes.append(type(error))
    assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize(
    ("case", "dynamo"),
    [(Case(cell, single_step=step, initial=False), False) for cell in CELLS for step in (False, True)]
    + [(Case("lstm", initial=False), True), (Case("gru", single_step=True, initial=False), True)],
    ids=str,
)
def test_the_functional_form_within_a_model(case: Case, dynamo: bool) -> None:
    """With ``explain`` asked on the way."""
    ours = model_of(case, pyrnnfast)
    explained: list[str] = []

    class Model(torch.nn.Module):
        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Any:
            explained.append(str(pyrnnfast.explain(ours, x)))
            return self.inner(x)

    x = case.operands()[0].detach()
    model = Model(Functional(case, model_of(case, torch.nn))).eval()
    exported = export(model, (x,), dynamo)
    reasons = ("torch: torch.jit is tracing", "torch: torch.onnx is exporting")
    assert explained and set(explained) <= set(reasons)
    assert sorted(operators(exported.graph)) == sorted(operators(export(model_of(case, torch.nn), (x,), dynamo).graph))
    assert_computes(exported, [x], ours(x))


@pytest.mark.parametrize("name", NAMES)
def test_to_torch_for_script(name: str) -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = getattr(pyrnnfast, name)(3, 4).to_torch()

        def forward(self, x: Tensor):  # TorchScript infers what is returned
            return self.layer(x)

    model = Model()
    x = torch.randn(2, 3) if name.endswith("Cell") else torch.randn(5, 2, 3)
    torch.testing.assert_close(torch.jit.script(model)(x), pyrnnfast.replace(model)(x))


@pytest.mark.parametrize("name", NAMES)
def test_what_script_is_told(name: str) -> None:
    """And the model that it was given keeps its layers."""
    layer = getattr(pyrnnfast, name)(3, 4)
    for model in (layer, torch.nn.Sequential(layer)):
        with pytest.raises(RuntimeError, match=f"^torch.jit.script cannot compile pyrnnfast's {name}; give it module"):
            torch.jit.script(model)
    assert model[0] is layer


def test_a_forward_that_script_can_compile() -> None:
    class Double(pyrnnfast.GRU):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            return 2 * x

    assert torch.jit.script(Double(3, 4))(torch.ones(2)).tolist() == [2, 2]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_symbolic_trace(case: Case) -> None:
    """torch.fx takes ours for one operation, as it does with torch's own, and so do the tools that are built on it."""

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = case.module(pyrnnfast)

        def forward(self, x: Any, hx: Any = None) -> Any:
            return self.layer(x, hx)

    model = Model()
    traced = torch.fx.symbolic_trace(model)
    assert [n.target for n in traced.graph.nodes if n.op == "call_module"] == ["layer"]
    assert type(traced.layer) is type(model.layer)
    x, states = case.operands()
    for name, t in case.run(traced, x, states).items():
        assert torch.equal(t, case.run(model, x, states)[name])


# Quantization ------------------------------------------------------------------------------------------------------


def quantize(module: torch.nn.Module, spec: Any = None) -> torch.nn.Module:
    found: torch.nn.Module = torch.ao.quantization.quantize_dynamic(torch.nn.Sequential(module), spec)[0]
    return found


@few
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "error:torch.ao.quantization does not know")
def test_to_torch_for_quantization(case: Case) -> None:
    ours, theirs = case.module(pyrnnfast), case.module(torch.nn)
    quantized, expected = quantize(ours.to_torch()), quantize(theirs)
    assert type(quantized) is type(expected)
    # torch has no quantized RNN layer.
    swapped = type(quantized).__module__.startswith("torch.ao.nn.quantized.dynamic")
    assert swapped == (case.single_step or not case.cell.startswith("rnn"))
    x, states = case.operands()
    for name, found in case.run(quantized, x, states).items():
        torch.testing.assert_close(found, case.run(expected, x, states)[name], rtol=0, atol=0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_quantization_of_ours_is_not_silent(name: str) -> None:
    """Whether or not the configuration reaches the module: under torch's class or its name, by default, by model."""
    ours, stock = getattr(pyrnnfast, name), getattr(torch.nn, name)
    config = torch.ao.quantization.default_dynamic_qconfig
    said = f"does not know pyrnnfast's {name} .*to_torch"
    for spec in (None, {stock}, {ours}, {"0"}, {"0": config}, {"": config}):
        with pytest.warns(UserWarning, match=said):
            assert type(quantize(ours(3, 4), spec)) is ours
    model = torch.nn.Sequential(ours(3, 4)).eval()
    model.qconfig = torch.ao.quantization.default_qconfig
    with pytest.warns(UserWarning, match=said):
        torch.ao.quantization.prepare(model)
