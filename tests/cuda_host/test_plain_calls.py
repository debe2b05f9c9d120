"""Plain calls, whose layers run in one call of ``_cuda`` forward and one back, against the general way: layer by layer,
with torch's operators around. The same kernels, so the same bits."""

from collections.abc import Callable, Iterator
from typing import Any

import _emulation
import pytest
import stand_in
import torch
from cases import Case
from test_correctness import run
from test_python import CASES

import pyrnnfast
from pyrnnfast import cuda

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
TYPES = (torch.Tensor, torch.nn.Parameter)
LAYERS = [c for c in CASES if not c.single_step]


class Watched:
    """The emulation, which notes what it was called for, and whether that led anywhere."""

    def __init__(self, plain: bool = True) -> None:
        self.plain, self.calls = plain, []  # type: bool, list[tuple[str, Any]]

    def __getattr__(self, name: str) -> Any:
        real = getattr(_emulation, name)

        def call(*operands: Any) -> Any:
            found = None if name == "forward_plain" and not self.plain else real(*operands)
            if not (name == "forward_plain" and found is None):
                self.calls.append((name, operands[-2]))
            return found

        return call if name.startswith(("forward", "backward")) else real


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Watched]]:
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = True

    def install(plain: bool = True) -> Watched:
        module = Watched(plain)
        stand_in.install(monkeypatch, module)
        return module

    yield install
    torch.backends.cudnn.allow_tf32 = before


@pytest.mark.parametrize("case", LAYERS, ids=str)
@pytest.mark.parametrize("path", ["step", "persistent"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_bits(case: Case, path: str, dtype: torch.dtype, installed: Callable[..., Watched]) -> None:
    with cuda.use(path):
        module = installed(plain=False)
        general = run(case, pyrnnfast, dtype)
        forms = [form for _, form in module.calls]
        assert {name for name, _ in module.calls} == {"forward", "backward"}
        module = installed()
        found = run(case, pyrnnfast, dtype)
        assert module.calls == [
            ("forward_plain", tuple(forms[: case.layers])),
            ("backward_plain", tuple(forms[case.layers :])),
        ]
        layer = case.module(pyrnnfast, dtype)
        x, states = case.operands(dtype)
        with torch.no_grad():
            alone = case.run(layer, x, states)
    assert found.keys() == general.keys()
    for name, t in found.items():
        assert t.dtype is dtype
        assert torch.equal(t, general[name]), name
    assert all(torch.equal(t, general[name]) for name, t in alone.items())


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_each_layer_has_its_own_form(
    frozen: int, installed: Callable[..., Watched], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Back through time in the other order; and of layers that have no pass back, the forms are of no use."""
    case = Case("gru", layers=3, bidirectional=True, inputs=7, hidden=5)

    def form(loaded: Any, measured: Any, asked: Any, index: int, layer: Any, back: bool) -> tuple[str, str]:
        return "persistent" if layer.inputs == 7 else "step", ""

    monkeypatch.setattr(cuda, "_form", form)
    cuda._forms_of_layers.cache_clear()

    def once() -> list[torch.Tensor]:
        layers = case.module(pyrnnfast)
        for name, weight in layers.named_parameters():
            weight.requires_grad_(all(f"_l{k}" not in name for k in range(frozen)))
        y = layers(case.operands()[0].detach())[0]
        return [y, *torch.autograd.grad(y.square().sum(), [w for w in layers.parameters() if w.requires_grad])]

    with cuda.use("persistent"):
        general_module = installed(plain=False)
        general = once()
        module = installed()
        found = once()
    cuda._forms_of_layers.cache_clear()
    assert [form for _, form in general_module.calls] == ["persistent", "step", "step", "step", "step", "persistent"][
        : 6 - frozen
    ]
    assert module.calls == [
        ("forward_plain", ("persistent", "step", "step")),
        ("backward_plain", ("step", "step", "persistent")),
    ]
    assert all(torch.equal(a, b) for a, b in zip(found, general, strict=True))


@pytest.mark.parametrize("path", ["step", "persistent"])
def test_only_what_is_wanted(path: str, installed: Callable[..., Watched]) -> None:
    """Of a stack whose lower layer is frozen: that one has no pass back."""
    case = Case("gru", layers=2, bidirectional=True, hidden=18)

    def once() -> dict[str, torch.Tensor]:
        layers = case.module(pyrnnfast)
        for name, weight in layers.named_parameters():
            weight.requires_grad_("l1" in name)
        x = case.operands()[0].detach()
        y = layers(x)[0]
        wanted = {name: w for name, w in layers.named_parameters() if w.requires_grad}
        return dict(zip(wanted, torch.autograd.grad(y.square().sum(), list(wanted.values())), strict=True))

    with cuda.use(path):
        installed(plain=False)
        general = once()
        module = installed()
        found = once()
    assert [name for name, _ in module.calls] == ["forward_plain", "backward_plain"]
    assert found.keys() == general.keys() and all(torch.equal(found[name], general[name]) for name in found)


def test_the_pass_back_is_as_the_moment_asks(installed: Callable[..., Watched]) -> None:
    """By the form that is asked for when it runs, or by the reference where it is to be differentiated itself."""
    case = Case("lstm", layers=2)
    module = installed()
    layers = case.module(pyrnnfast)
    x, states = case.operands()
    with cuda.use("persistent"):
        y = case.run(layers, x, states)["y"]
    with cuda.use("step"):
        (once,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
        (again,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    assert module.calls == [("forward_plain", ("persistent",) * 2), ("backward_plain", ("step",) * 2)]
    assert again.requires_grad
    torch.testing.assert_close(again.detach(), once, rtol=1e-2, atol=1e-3)  # TF32 and float32


GRU = tuple(torch.ones(shape) for shape in ((9, 4), (9, 3), (9,), (9,)))


def test_what_is_not_plain() -> None:
    def call(**changes: Any) -> Any:
        good: dict[str, Any] = {
            "types": TYPES,
            "form": ("gru", 1, 1, False, False),
            "x": torch.ones(5, 2, 4),
            "batch_sizes": None,
            "weights": GRU,
            "inputs": 4,
            "hidden": 3,
            "outputs": 3,
            "hx": None,
            "grad": True,
            "forms": ("step",),
            "tf32": False,
        }
        return _emulation.forward_plain(**(good | changes))

    assert call() is not None
    for junk in (None, 3, torch.ones(5, 2, 4, dtype=torch.int64), torch.ones(5, 2, 4, device="meta")):
        assert call(x=junk) is None
    assert call(forms=("step", "step")) is not None  # of layers that do not run
    with pytest.raises(ValueError, match="as many as there are layers"):
        call(forms=())
    with pytest.raises(ValueError, match="'step' or 'persistent', got 'fast'"):
        call(forms=("fast",))
    with pytest.raises(TypeError, match="forms must be a tuple of str"):
        call(forms=(1,))
    with pytest.raises(TypeError, match="forms must be a tuple, got list"):
        call(forms=["step"])
    with pytest.raises(TypeError, match="tf32 must be a bool, got int"):
        call(tf32=1)
