"""A stand-in for a CUDA device: CPU tensors go the way of CUDA tensors, to a module with the functions of ``_cuda``.

`install` is the one place that knows where that way begins and ends: ``pyrnnfast.cuda.takes`` and ``.load``. The module
may be ``_emulation``, which has the real kernels with blocks as threads, or `Fake` below, which has those of the CPU.
"""

from typing import Any

import pytest

from pyrnnfast import _cpu, cuda
from pyrnnfast.choices import Table
from pyrnnfast.passes import Mask

DEVICE = {
    "name": "Fake 90",
    "major": 9,
    "minor": 0,
    "multiprocessors": 132,
    "shared_bytes": 232448,
    "cooperative": True,
}


# As they are before `install` closes them.
_PLAIN = _cpu.forward_plain, _cpu.backward_plain


class Fake:
    """``_cuda`` by the kernels of the CPU; it notes the form of every pass, and whether it was to use TF32."""

    def __init__(self, persistent: bool = True) -> None:
        self.persistent = persistent
        """Whether there is a plan for the persistent form."""
        self.passes: list[tuple[str, str, bool]] = []
        self.planned: list[tuple[Any, ...]] = []
        self.masks: list[Mask] = []
        """Those of padded data, which it then computes like any other: the CPU's kernels know no masks."""

    def forward(self, *operands: Any) -> None:
        *own, form, tf32 = operands
        self._note("forward", form, tf32)
        _cpu.forward(*self._without_mask(own), 1)

    def backward(self, *operands: Any) -> None:
        *own, form, tf32 = operands
        self._note("backward", form, tf32)
        _cpu.backward(*self._without_mask(own), 1)

    def forward_plain(self, *operands: Any) -> Any:
        *own, forms, tf32 = operands
        found = _PLAIN[0](*own, None, 1)
        if found is not None:
            self._note_each("forward", forms, tf32)
        return found

    def backward_plain(self, *operands: Any) -> Any:
        *own, forms, tf32 = operands
        self._note_each("backward", forms, tf32)
        return _PLAIN[1](*own, 1)

    def plan(self, device: dict[str, Any], backward: bool, *problem: Any) -> dict[str, Any]:
        assert device == DEVICE
        self.planned.append((backward, *problem))
        if self.persistent:
            return {"form": "persistent", "reason": "it fits"}
        return {"form": "step", "reason": "the weights do not fit"}

    def toolkit(self) -> str:
        return "13.0"

    def _note_each(self, name: str, forms: tuple[str, ...], tf32: bool) -> None:
        for form in forms:
            self._note(name, form, tf32)

    def _note(self, name: str, form: str, tf32: bool) -> None:
        assert form in ("step", "persistent")
        assert isinstance(tf32, bool)
        self.passes.append((name, form, tf32))

    def _without_mask(self, operands: list[Any]) -> list[Any]:
        *others, steps = operands
        if not isinstance(steps, Mask):
            return operands
        self.masks.append(steps)
        return [*others, None]


def install(
    monkeypatch: pytest.MonkeyPatch, module: Any, table: Table | None = None, reason: str | None = None
) -> None:
    """Until the end of the test. The CPU's own shortest road is closed, and nothing is measured but ``table``."""
    loaded = cuda.Loaded(module, "80;90;120+PTX", (DEVICE,), reason)
    measured = Table([]) if table is None else table
    monkeypatch.setattr(cuda, "takes", lambda t: t.is_cpu)
    monkeypatch.setattr(cuda, "load", lambda: loaded)
    monkeypatch.setattr(cuda, "table", lambda: measured)
    for name in ("forward_plain", "backward_plain"):
        monkeypatch.setattr(_cpu, name, lambda *operands: pytest.fail("a call on CUDA went to the CPU's kernels"))
