"""Writes the tables of coming_from_torch.md: every line is run, on torch.nn and on pyrnnfast.

    python docs/coming_from_torch.py           # rewrites the tables of the page
    python docs/coming_from_torch.py --check   # fails if the page is not what it would write

A row is a function below. It does something with a module and compares what comes out with a plain way to the same
numbers, by torch.nn: "yes" means that the numbers are right. Sizes are small; nothing here says how fast anything is.
"""

import copy
import difflib
import logging
import pickle
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch._dynamo
from torch import Tensor, nn
from torch.export import Dim
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

import pyrnnfast
from pyrnnfast import _cpu

PAGE = Path(__file__).with_suffix(".md")
BEGIN, END = "<!-- Written by coming_from_torch.py: do not edit. -->", "<!-- End of what it writes. -->"
STEPS, BATCH, INPUTS, HIDDEN = 5, 3, 4, 6
LENGTHS = (5, 3, 2)
LAYERS = ("RNN", "GRU", "LSTM")
CELLS = ("RNNCell", "GRUCell", "LSTMCell")


class No(Exception):
    """It runs, but does not do what the row says; the message says what it does instead."""


@dataclass(frozen=True)
class Subject:
    """A class of torch.nn or of pyrnnfast, with what the rows need around it."""

    library: ModuleType
    name: str

    @property
    def batch_dim(self) -> int:
        return 0 if self.name in CELLS else 1

    def input(self, *lead: int, steps: int = STEPS, batch: int = BATCH) -> Tensor:
        """[..., T, B, I], or [..., B, I] for a cell."""
        sizes = (batch, INPUTS) if self.name in CELLS else (steps, batch, INPUTS)
        return torch.randn(*lead, *sizes, generator=torch.Generator().manual_seed(0))

    def module(self, seed: int = 0, **options: Any) -> nn.Module:
        return self._module(self.library, seed, options)

    def plain(self, seed: int = 0, **options: Any) -> nn.Module:
        """torch.nn's, with the same weights: the plain way to the numbers."""
        return self._module(nn, seed, options)

    def _module(self, library: ModuleType, seed: int, options: dict[str, Any]) -> nn.Module:
        torch.manual_seed(seed)
        module: nn.Module = getattr(library, self.name)(INPUTS, HIDDEN, **options)
        return module


Code = Callable[[Subject], str | None]


@dataclass(frozen=True)
class Row:
    section: str
    text: str
    names: tuple[str, ...]
    run: Code


ROWS: list[Row] = []


def row(section: str, text: str, names: tuple[str, ...] = LAYERS) -> Callable[[Code], Code]:
    """The function answers by what it returns, None for "yes", or by what it raises."""

    def add(run: Code) -> Code:
        ROWS.append(Row(section, text, names, run))
        return run

    return add


def output(result: Any) -> Tensor:
    """y of a layer, the new h of a cell."""
    found = result if isinstance(result, Tensor) else result[0]
    assert isinstance(found, Tensor)
    return found


def same(found: Any, expected: Any, tolerance: float = 1e-5) -> None:
    try:
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance, check_dtype=False)
    except AssertionError as error:
        raise No("wrong numbers") from error


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in module.named_parameters()}


def loss_of(module: nn.Module) -> Callable[[dict[str, Tensor], Tensor], Tensor]:
    """A loss as a function of the weights and the input."""
    return lambda own, x: output(torch.func.functional_call(module, own, (x,))).sin().sum()


LENGTH = "Sequences"


@row(LENGTH, "`PackedSequence`, in any order")
def _(s: Subject) -> None:
    x, lengths = s.input(), torch.tensor([3, 5, 2])
    y, _ = pad_packed_sequence(s.module()(pack_padded_sequence(x, lengths, enforce_sorted=False))[0])
    same(y, _one_by_one(s, x, lengths)[0])


def _one_by_one(s: Subject, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """y, and h after the last step of each sequence, each of them run by itself."""
    y, h = x.new_zeros(STEPS, BATCH, HIDDEN), x.new_zeros(1, BATCH, HIDDEN)
    for b, length in enumerate(lengths.tolist()):
        if length:
            y[:length, b], state = s.plain()(x[:length, b])
            h[:, b] = output(state)
    return y, h


@row(LENGTH, "padded input with `lengths=`")
def _(s: Subject) -> None:
    x = s.input()
    y, state = s.module()(x, lengths=torch.tensor([3, 5, 2]))
    same((y, output(state)), _one_by_one(s, x, torch.tensor([3, 5, 2])))


@row(LENGTH, "a sequence of length 0 among them")
def _(s: Subject) -> None:
    x, lengths = s.input(), torch.tensor([3, 5, 0])
    module = s.module()
    if s.library is nn:
        y, _ = pad_packed_sequence(module(pack_padded_sequence(x, lengths, enforce_sorted=False))[0])
    else:
        y, _ = module(x, lengths=lengths)
    same(y, _one_by_one(s, x, lengths)[0])


@row(LENGTH, "a nested tensor, `layout=torch.jagged`")
def _(s: Subject) -> None:
    x = s.input()
    nested = torch.nested.nested_tensor([x[:n, b] for b, n in enumerate(LENGTHS)], layout=torch.jagged)
    y, _ = s.module(batch_first=True)(nested)
    expected, _ = _one_by_one(s, x, torch.tensor(LENGTHS))
    same(y.values(), torch.cat([expected[:n, b] for b, n in enumerate(LENGTHS)]))


@row(LENGTH, "`reset=`: the state cleared in the middle of a sequence")
def _(s: Subject) -> None:
    x, reset = s.input(), torch.zeros(STEPS, BATCH, dtype=torch.bool)
    reset[2] = True
    plain = s.plain()
    same(s.module()(x, reset=reset)[0], torch.cat([plain(x[:2])[0], plain(x[2:])[0]]))


@row(LENGTH, "the cell states of all steps", ("LSTM",))
def _(s: Subject) -> None:
    x, plain = s.input(), s.plain()
    _, _, cells = s.module(cell_states=True)(x)
    same(cells, torch.cat([plain(x[: t + 1])[1][1] for t in range(STEPS)]))


@row(LENGTH, "unbatched input", LAYERS + CELLS)
def _(s: Subject) -> None:
    x = s.input()
    same(output(s.module()(x.select(s.batch_dim, 1))), output(s.plain()(x)).select(s.batch_dim, 1))


@row(LENGTH, "an empty batch, with `backward`", LAYERS + CELLS)
def _(s: Subject) -> None:
    module = s.module()
    y = output(module(s.input(batch=0)))
    y.sum().backward()
    same(
        [y.shape[s.batch_dim], *(p.grad for p in module.parameters())],
        [0, *map(torch.zeros_like, weights(module).values())],
    )


@row(LENGTH, "input of no steps")
def _(s: Subject) -> None:
    s.module()(s.input(steps=0))


GRAPHS = "Compiling and exporting"


Call = Callable[[Any, Any], Tensor]


def _compiled(s: Subject, allow: bool, call: Call, *inputs: Any, plain: Call | None = None) -> int:
    """Compiles `call(module, input)` and runs it, forward and backward; the number of graphs that it took.

    Args:
        plain: how torch.nn's module comes to the same without being compiled, if it is another way
    """
    module = s.module()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    # torch reads these at every compilation; they are put back afterwards.
    with torch._dynamo.config.patch(allow_rnn=False):
        if allow:
            pyrnnfast.enable_compile()
        # Everything that decides whether it compiles, but no C++ compiler at the end of it.
        compiled = torch.compile(lambda x: call(module, x), fullgraph=True, backend="aot_eager")
        for x in inputs:
            y = compiled(x)
            same(y, (plain or call)(s.plain(), x))
            y.sum().backward()
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


@row(GRAPHS, "`torch.compile(fullgraph=True)`, torch's settings", LAYERS + CELLS)
def _(s: Subject) -> None:
    _compiled(s, False, lambda m, x: output(m(x)), s.input())


@row(GRAPHS, "the same after `pyrnnfast.enable_compile()`")
def _(s: Subject) -> None:
    _compiled(s, True, lambda m, x: output(m(x)), s.input())


@row(GRAPHS, "and one graph for many T and B")
def _(s: Subject) -> None:
    shapes = ((5, 3), (7, 2), (4, 6), (9, 5), (6, 7))
    inputs = [s.input(steps=steps, batch=batch) for steps, batch in shapes]
    graphs = _compiled(s, True, lambda m, x: output(m(x)), *inputs)
    if graphs == len(shapes):
        raise No("one for each T, unrolled")


@row(GRAPHS, "and a `PackedSequence`")
def _(s: Subject) -> None:
    packed = pack_padded_sequence(s.input(), torch.tensor(LENGTHS))
    _compiled(s, True, lambda m, p: m(p)[0].data, packed)


@row(GRAPHS, "and `lengths=`")
def _(s: Subject) -> None:
    lengths = torch.tensor(LENGTHS)
    _compiled(
        s,
        True,
        lambda m, given: output(m(given[0], lengths=given[1])),
        (s.input(), lengths),
        plain=lambda _, given: _one_by_one(s, *given)[0],
    )


def _exported(s: Subject, strict: bool, *dims: int) -> None:
    module, names = s.module(), ("batch", "inputs") if s.name in CELLS else ("time", "batch", "inputs")
    dynamic = {"input": {d: Dim(names[d], min=1, max=100) for d in dims}}
    # Strict export asks as torch.compile does.
    with torch._dynamo.config.patch(allow_rnn=False):
        pyrnnfast.enable_compile()
        program = torch.export.export(module, (s.input(),), dynamic_shapes=dynamic, strict=strict)
    time_changes, batch_changes = s.batch_dim == 1 and 0 in dims, s.batch_dim in dims
    x = s.input(steps=9 if time_changes else STEPS, batch=8 if batch_changes else BATCH)
    same(output(program.module()(x)), output(s.plain()(x)))


@row(GRAPHS, "`torch.export`, dynamic batch", LAYERS + CELLS)
def _(s: Subject) -> None:
    _exported(s, False, s.batch_dim)


@row(GRAPHS, "`torch.export`, dynamic batch, `strict=True`", LAYERS + CELLS)
def _(s: Subject) -> None:
    _exported(s, True, s.batch_dim)


@row(GRAPHS, "`torch.export`, dynamic time")
def _(s: Subject) -> None:
    _exported(s, False, 0, 1)


@row(GRAPHS, "`torch.export`, dynamic time, `strict=True`")
def _(s: Subject) -> None:
    _exported(s, True, 0, 1)


@row(GRAPHS, "`torch.jit.trace`, then other T and B", LAYERS + CELLS)
def _(s: Subject) -> None:
    traced, x = torch.jit.trace(s.module(), (s.input(),)), s.input(steps=8, batch=2)
    same(output(traced(x)), output(s.plain()(x)))


@row(GRAPHS, "`torch.jit.script`, as a part of a model", LAYERS + CELLS)
def _(s: Subject) -> None:
    same(output(torch.jit.script(nn.Sequential(s.module()))(s.input())), output(s.plain()(s.input())))


@row(GRAPHS, "`torch.onnx.export`, run by onnxruntime", LAYERS + CELLS)
def _(s: Subject) -> None:
    program = torch.onnx.export(s.module(), (s.input(),), dynamo=True, verbose=False)
    assert program is not None
    same(program(s.input())[0], output(s.plain()(s.input())))


@row(GRAPHS, "`torch.ao.quantization.quantize_dynamic`", LAYERS + CELLS)
def _(s: Subject) -> None:
    kinds = {getattr(nn, name) for name in LAYERS + CELLS}
    model = torch.ao.quantization.quantize_dynamic(nn.Sequential(s.module()), kinds, dtype=torch.qint8)
    if not type(model[0]).__module__.startswith("torch.ao"):
        raise No("left as it is")


DERIVATIVES = "Derivatives and transforms"


@row(DERIVATIVES, "double backward", LAYERS + CELLS)
def _(s: Subject) -> None:
    found = []
    for module in (s.module(), s.plain()):
        x = s.input().requires_grad_()
        (slope,) = torch.autograd.grad(output(module(x)).sum(), x, create_graph=True)
        found.append(torch.autograd.grad(slope.square().sum(), [x, *list(module.parameters())[:2]]))
    same(found[0], found[1], 1e-4)


@row(DERIVATIVES, "`torch.func.grad`", LAYERS + CELLS)
def _(s: Subject) -> None:
    module, plain = s.module(), s.plain()
    own = {name: p.requires_grad_() for name, p in weights(plain).items()}
    expected = torch.autograd.grad(loss_of(plain)(own, s.input()), list(own.values()))
    found = torch.func.grad(loss_of(module))(weights(module), s.input())
    same(list(found.values()), list(expected))


@row(DERIVATIVES, "`torch.func.grad` through a `PackedSequence`")
def _(s: Subject) -> None:
    module, plain, x = s.module(), s.plain(), s.input()

    def loss(module: nn.Module, x: Tensor) -> Tensor:
        y: Tensor = module(pack_padded_sequence(x, torch.tensor(LENGTHS)))[0].data.sum()
        return y

    own = s.input().requires_grad_()
    (expected,) = torch.autograd.grad(loss(plain, own), own)
    same(torch.func.grad(lambda x: loss(module, x))(x), expected)


@row(DERIVATIVES, "`torch.vmap` over inputs", LAYERS + CELLS)
def _(s: Subject) -> None:
    module, plain, x = s.module(), s.plain(), s.input(2)
    same(torch.vmap(lambda x: output(module(x)))(x), torch.stack([output(plain(own)) for own in x]))


@row(DERIVATIVES, "`torch.vmap` over stacked weights (an ensemble)", LAYERS + CELLS)
def _(s: Subject) -> None:
    members, x = [s.module(seed) for seed in range(2)], s.input()
    stacked, _ = torch.func.stack_module_state(members)
    run = torch.vmap(lambda own: output(torch.func.functional_call(members[0], own, (x,))))
    same(run(stacked), torch.stack([output(s.plain(seed)(x)) for seed in range(2)]))


@row(DERIVATIVES, "gradients of each sample, `vmap(grad)`", LAYERS + CELLS)
def _(s: Subject) -> None:
    module, plain, x = s.module(), s.plain(), s.input()
    found = torch.vmap(torch.func.grad(loss_of(module)), (None, s.batch_dim))(weights(module), x)
    for b in range(BATCH):
        own = {name: p.requires_grad_() for name, p in weights(plain).items()}
        expected = torch.autograd.grad(loss_of(plain)(own, x.select(s.batch_dim, b)), list(own.values()))
        same([g[b] for g in found.values()], list(expected))


@row(DERIVATIVES, "forward mode: `torch.func.jvp`", LAYERS + CELLS)
def _(s: Subject) -> None:
    module, x = s.module(), s.input()
    found = torch.func.jvp(lambda x: output(module(x)), (x,), (torch.ones_like(x),))
    same(found[1], _slope(s), 1e-4)


def _slope(s: Subject) -> Tensor:
    """The derivative along a vector of ones, by differences in float64."""
    plain, x = s.plain().double(), s.input().double()
    with torch.no_grad():
        return (output(plain(x + 1e-6)) - output(plain(x - 1e-6))) / 2e-6


@row(DERIVATIVES, "forward mode: dual numbers", LAYERS + CELLS)
def _(s: Subject) -> None:
    module, x = s.module(), s.input()
    with torch.autograd.forward_ad.dual_level():
        y = output(module(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))))
        tangent = torch.autograd.forward_ad.unpack_dual(y).tangent
    if tangent is None:
        raise No("no tangent, and no error")
    same(tangent, _slope(s), 1e-4)


@row(DERIVATIVES, "`torch.func.jacrev`", LAYERS + CELLS)
def _(s: Subject) -> None:
    _jacobian(s, BATCH, lambda f, x: torch.func.jacrev(f)(x))


@row(DERIVATIVES, "`torch.func.jacrev`, a batch of one", LAYERS + CELLS)
def _(s: Subject) -> None:
    _jacobian(s, 1, lambda f, x: torch.func.jacrev(f)(x))


@row(DERIVATIVES, "`torch.func.hessian`", LAYERS + CELLS)
def _(s: Subject) -> None:
    module, plain = s.module(), s.plain().double()
    expected = torch.autograd.functional.hessian(lambda x: output(plain(x)).sum(), s.input().double())
    same(torch.func.hessian(lambda x: output(module(x)).sum())(s.input()), expected.float(), 1e-4)


@row(DERIVATIVES, "`torch.autograd.functional.jacobian(vectorize=True)`", LAYERS + CELLS)
def _(s: Subject) -> None:
    _jacobian(s, BATCH, lambda f, x: torch.autograd.functional.jacobian(f, x, vectorize=True))


def _jacobian(s: Subject, batch: int, jacobian: Callable[[Callable[[Tensor], Tensor], Tensor], Any]) -> None:
    module, plain, x = s.module(), s.plain(), s.input(batch=batch)
    expected = torch.autograd.functional.jacobian(lambda x: output(plain(x)), x)
    same(jacobian(lambda x: output(module(x)), x), expected)


@row(DERIVATIVES, "`torch.utils.checkpoint`", LAYERS + CELLS)
def _(s: Subject) -> None:
    found = []
    for module in (s.module(), s.plain()):
        x = s.input().requires_grad_()
        y = checkpoint(lambda x, module=module: output(module(x)), x, use_reentrant=False)
        found.append(torch.autograd.grad(y.sum(), [x, *module.parameters()]))
    same(found[0], found[1])


@row(DERIVATIVES, "the output changed in place before `backward`", LAYERS + CELLS)
def _(s: Subject) -> None:
    grads = []
    for module, in_place in ((s.module(), True), (s.plain(), False)):
        y = output(module(s.input()))
        (y.mul_(2) if in_place else y * 2).sum().backward()
        grads.append([p.grad for p in module.parameters()])
    same(grads[0], grads[1])


DTYPES = "Dtypes and devices"


def _in(dtype: torch.dtype) -> Code:
    def run(s: Subject) -> None:
        module = s.module(dtype=dtype)
        y = output(module(s.input().to(dtype)))
        torch.view_as_real(y).sum().backward() if dtype.is_complex else y.sum().backward()
        if y.dtype is not dtype:
            raise No(f"gives {y.dtype}")
        plain = s.plain(dtype=dtype)
        same(y, output(plain(s.input().to(dtype))), 1e-5 if torch.finfo(dtype).bits > 16 else 2e-2)

    return run


for _dtype in (torch.float64, torch.bfloat16, torch.float16, torch.complex64):
    row(DTYPES, f"`{_dtype}`, with `backward`", LAYERS + CELLS)(_in(_dtype))


def _autocast(dtype: torch.dtype) -> Code:
    def run(s: Subject) -> str:
        with torch.autocast("cpu", dtype=dtype):
            y = output(s.module()(s.input()))
        y.sum().backward()
        same(y.float(), output(s.plain()(s.input())), 2e-2)
        return str(y.dtype).removeprefix("torch.")

    return run


TO_NARROW = "`torch.autocast` to {}: the output's dtype"
for _name in ("bfloat16", "float16"):
    row(DTYPES, TO_NARROW.format(_name), LAYERS + CELLS)(_autocast(getattr(torch, _name)))


@row(DTYPES, "the device `meta`", LAYERS + CELLS)
def _(s: Subject) -> None:
    y = output(s.module(device="meta")(s.input().to("meta")))
    if not y.is_meta or y.shape != (*s.input().shape[:-1], HIDDEN):
        raise No(f"gives {list(y.shape)} on {y.device}")


MODULES = "Modules"


@row(MODULES, "`proj_size`", ("LSTM",))
def _(s: Subject) -> None:
    same(output(s.module(proj_size=3)(s.input())), output(s.plain(proj_size=3)(s.input())))


def _parametrized(s: Subject, change: Callable[[nn.Module, str], Any]) -> None:
    name = "weight_hh" if s.name in CELLS else "weight_hh_l0"
    results = []
    for module in (s.module(), s.plain()):
        change(module, name)
        y = output(module(s.input()))
        results.append((y, torch.autograd.grad(y.sum(), list(module.parameters()))))
    same(results[0], results[1])


class _Twice(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 2


@row(MODULES, "`parametrize.register_parametrization`", LAYERS + CELLS)
def _(s: Subject) -> None:
    _parametrized(s, lambda m, name: nn.utils.parametrize.register_parametrization(m, name, _Twice()))


@row(MODULES, "`parametrizations.weight_norm`", LAYERS + CELLS)
def _(s: Subject) -> None:
    _parametrized(s, nn.utils.parametrizations.weight_norm)


@row(MODULES, "`nn.utils.skip_init`", LAYERS + CELLS)
def _(s: Subject) -> None:
    nn.utils.skip_init(getattr(s.library, s.name), INPUTS, HIDDEN)


@row(MODULES, "`copy.deepcopy` and `pickle`", LAYERS + CELLS)
def _(s: Subject) -> None:
    for twin in (copy.deepcopy(s.module()), pickle.loads(pickle.dumps(s.module()))):
        same(output(twin(s.input())), output(s.plain()(s.input())))


@row(MODULES, "the other's `state_dict`", LAYERS + CELLS)
def _(s: Subject) -> None:
    module, other = s.module(), getattr(pyrnnfast if s.library is nn else nn, s.name)(INPUTS, HIDDEN)
    module.load_state_dict(other.state_dict())
    same(output(module(s.input())), output(other(s.input())))


def answer(test: Row, subject: Subject) -> str:
    """One cell of a table: "yes", "yes, slowly", "no: ..." or what the row measures."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            found = test.run(subject)
        except No as no:
            return f"no: {no}"
        except Exception as error:
            return f"no: `{type(error).__name__}: {_first_words(str(error), subject)}`"
    # vmap says so itself where it has to go one by one.
    slow = any("performance drop" in str(warning.message) for warning in caught)
    return found or ("yes, slowly" if slow else "yes")


def _first_words(text: str, subject: Subject, count: int = 5) -> str:
    words = text.replace(f"{subject.name}.", "").split()
    return " ".join(words[:count]).replace("|", "/") + (" …" if len(words) > count else "")


def summary(answers: dict[str, str]) -> str:
    """One answer where all classes agree, else each with its classes."""
    if len(set(answers.values())) == 1:
        return next(iter(answers.values()))
    groups: dict[str, list[str]] = {}
    for name, text in answers.items():
        groups.setdefault(text, []).append(name)
    return "; ".join(f"{', '.join(names)}: {text}" for text, names in groups.items())


def tables(rows: list[Row]) -> Iterator[str]:
    section = ""
    for title, names in (("Layers", LAYERS), ("Cells", CELLS)):
        yield f"## {title}: {', '.join(names)}"
        for test in rows:
            own = [name for name in test.names if name in names]
            if not own:
                continue
            if test.section != section:
                section = test.section
                yield f"\n| {section} | torch.nn | pyrnnfast |\n|---|---|---|"
            stock, ours = (
                summary({name: answer(test, Subject(library, name)) for name in own}) for library in (nn, pyrnnfast)
            )
            yield f"| {test.text} | {stock} | {ours} |"
        section = ""
        yield ""


@contextmanager
def plain_torch() -> Iterator[None]:
    """One thread, warnings every time and nothing on stderr; all put back afterwards."""
    threads, always, disabled = torch.get_num_threads(), torch.is_warn_always_enabled(), logging.root.manager.disable
    torch.set_num_threads(1)
    torch.set_warn_always(True)
    logging.disable(logging.CRITICAL)  # torch.export logs what it raises
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_warn_always(always)
        logging.disable(disabled)


def page(text: str) -> str:
    """The page with its tables as they are now."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    with plain_torch():
        return f"{before}{BEGIN}\n\n" + "\n".join(tables(ROWS)) + f"\n{END}{after}"


def comparable(text: str) -> list[str]:
    """The page's lines that are the same on every processor.

    oneDNN, behind torch's LSTM under autocast, has no bfloat16 without AVX-512, and float16 on few processors; the page
    is written on one that has the first and not the second.
    """
    as_here = {
        "bfloat16": "avx512" in _cpu.instruction_set(),
        "float16": not torch.ops.mkldnn._is_mkldnn_fp16_supported(),
    }
    others = tuple(f"| {TO_NARROW.format(name)} |" for name, same_here in as_here.items() if not same_here)
    return [line for line in text.splitlines(True) if not line.startswith(others)]


def main(arguments: list[str]) -> int:
    old = PAGE.read_text()
    new = page(old)
    if arguments == ["--check"]:
        before, after = comparable(old), comparable(new)
        sys.stdout.writelines(difflib.unified_diff(before, after, "page", "as it is"))
        return int(before != after)
    PAGE.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
