"""``lengths``, ``reset`` and nested tensors, against every segment of every sequence by itself on the reference."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import CELLS, Case, gradients
from stand_in import install
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import pyrnnfast
from pyrnnfast import functional, reference


def _cases() -> list[Case]:
    cases = []
    for cell in CELLS:
        plain = Case(cell, steps=7, batch=5, inputs=3, hidden=6)
        cases += [
            plain,
            replace(plain, layers=2, bidirectional=True),
            replace(plain, initial=False, bias=False, batch_first=True),
            replace(plain, bidirectional=True, batch_first=True, batch=4),
            replace(plain, steps=1),
            replace(plain, unbatched=True, bidirectional=True),
        ]
    return cases


every_case = pytest.mark.parametrize("case", _cases(), ids=str)
LENGTHS = {"ragged": (4, 7, 1, 0, 5), "none": (0,) * 5, "all": (7,) * 5, "absent": None}
every_lengths = pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())


def of(case: Case, lengths: tuple[int, ...] | None) -> list[int]:
    return [min(n, case.steps) for n in (lengths or (case.steps,) * 5)][: case.batch]


def resets(case: Case, seed: int = 3) -> Tensor:
    """[T, B]; at the first step and beyond the end among them."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(case.steps, case.batch, generator=generator) < 0.3


def truth(
    case: Case, module: torch.nn.Module, x: Tensor, states: tuple[Tensor, ...], lengths: list[int], reset: Tensor
) -> dict[str, Tensor]:
    """All in [T, B, ...]."""
    weights, directions = case.weights(module), case.directions
    x = x.unsqueeze(1) if case.unbatched else x.transpose(0, 1) if case.batch_first else x
    states = tuple(s.unsqueeze(1) for s in states) if case.unbatched else states
    zeros = x.new_zeros(case.layers * directions, case.batch, case.hidden)
    states = states or (zeros,) * (2 if case.cell == "lstm" else 1)
    columns, finals = [], []
    for b, length in enumerate(lengths):
        cuts = [t for t in range(1, length) if reset[t, b]]
        spans = list(zip([0, *cuts], [*cuts, length], strict=True)) if length else []
        rows, final = [], [s[:, b].clone() for s in states]
        for first, end in spans:
            own = [torch.zeros_like(s[:, b]) for s in states]
            for k, s in enumerate(states):
                for row in range(case.layers * directions):
                    backward = row % directions == 1
                    if (end == length) if backward else (first == 0 and not reset[0, b]):
                        own[k][row] = s[row, b]
            initial = tuple(s.unsqueeze(1) for s in own)
            y, after = reference.stack(case.cell, x[first:end, b], initial, weights, [1] * (end - first))
            rows.append(y)
            for k, s in enumerate(after):
                for row in range(case.layers * directions):
                    if (first == 0) if row % directions == 1 else (end == length):
                        final[k][row] = s[row, 0]
        rows.append(x.new_zeros(case.steps - length, directions * (case.projected or case.hidden)))
        columns.append(torch.cat(rows))
        finals.append(final)
    y = torch.stack(columns, 1)
    y = y.squeeze(1) if case.unbatched else y.transpose(0, 1) if case.batch_first else y
    final = tuple(torch.stack(s, 1) for s in zip(*finals, strict=True))
    final = tuple(s.squeeze(1) for s in final) if case.unbatched else final
    return dict(zip(case.outputs, (y, *final), strict=True))


def run(case: Case, module: torch.nn.Module, x: Tensor, states: tuple[Tensor, ...], **extras: Any) -> dict[str, Tensor]:
    y, final = module(x, case.hx(states), **extras)
    return dict(zip(case.outputs, (y, *final) if case.cell == "lstm" else (y, final), strict=True))


def padding(case: Case, lengths: list[int]) -> Tensor:
    """Where x is padding, in its layout."""
    mask = torch.arange(case.steps)[:, None] >= torch.tensor(lengths)
    return mask[:, 0] if case.unbatched else mask.t() if case.batch_first else mask


def assert_equal(case: Case, reset: Tensor | None, lengths: tuple[int, ...] | None, padded_with: float) -> None:
    module = case.module(pyrnnfast, torch.float64)
    x, states = case.operands(torch.float64)
    real = of(case, lengths)
    with torch.no_grad():
        x[padding(case, real)] = padded_with
    extras: dict[str, Any] = {}
    if lengths is not None:
        extras["lengths"] = torch.tensor(real)[0 if case.unbatched else slice(None)]
    if reset is not None:
        given = reset[:, 0] if case.unbatched else reset.t() if case.batch_first else reset
        extras["reset"] = given
    found = run(case, module, x, states, **extras)
    clean = x.detach().nan_to_num(0.0).requires_grad_()
    none = torch.zeros(case.steps, case.batch, dtype=torch.bool)
    expected = truth(case, module, clean, states, real, none if reset is None else reset)
    for name, t in expected.items():
        torch.testing.assert_close(found[name], t, rtol=1e-10, atol=1e-12, msg=name)
    used = tuple(name for name, t in expected.items() if t.requires_grad)
    if not used:
        return
    ours, theirs = gradients(module, x, states, found, used), gradients(module, clean, states, expected, used)
    for name, t in theirs.items():
        torch.testing.assert_close(ours[name], t, rtol=1e-10, atol=1e-12, msg=name)


@pytest.fixture(params=["kernels", "packed for torch", "reference"])
def road(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The three that a call can take: the last ones as where CUDA has no kernels, and as forward mode has it."""
    if request.param == "packed for torch":
        install(monkeypatch, None, reason="there are none")
    if request.param == "reference":
        with torch.autograd.forward_ad.dual_level():
            yield
    else:
        yield


@every_lengths
@pytest.mark.parametrize("forward_mode", [False, True])
def test_projections(lengths: tuple[int, ...] | None, forward_mode: bool) -> None:
    case = Case("lstm", steps=7, batch=5, inputs=3, hidden=6, projected=4, layers=2, bidirectional=True)
    with torch.autograd.forward_ad.dual_level() if forward_mode else contextlib.nullcontext():
        assert_equal(case, resets(case), lengths, float("nan"))


@every_case
@every_lengths
def test_lengths(case: Case, lengths: tuple[int, ...] | None, road: None) -> None:
    assert_equal(case, None, lengths, float("nan"))


@every_case
@every_lengths
def test_resets(case: Case, lengths: tuple[int, ...] | None, road: None) -> None:
    assert_equal(case, resets(case), lengths, float("inf"))


@every_case
def test_a_reset_at_every_step(case: Case, road: None) -> None:
    assert_equal(case, torch.ones(case.steps, case.batch, dtype=torch.bool), None, 0.0)


# Lengths and resets together, in every form ------------------------------------------------------------------------

T, B, I, H = 6, 4, 3, 5
RAGGED = (4, 6, 0, 2)
RESET = torch.tensor(
    [[0, 1, 0, 0], [0, 0, 1, 1], [1, 0, 0, 0], [1, 1, 0, 1], [0, 0, 0, 0], [0, 1, 0, 1]], dtype=torch.bool
)

every_cell = pytest.mark.parametrize("cell", CELLS)


def of_all_options(cell: str, **changes: Any) -> Case:
    return replace(Case(cell, steps=T, batch=B, inputs=I, hidden=H, layers=2, bidirectional=True), **changes)


def ragged(case: Case) -> dict[str, Tensor]:
    return {"lengths": torch.tensor(RAGGED), "reset": RESET.t() if case.batch_first else RESET}


def flat(found: Any) -> list[Tensor]:
    y, final, *rest = found
    return [y, *(final if isinstance(final, tuple) else (final,)), *rest]


@every_cell
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32], ids=str)
def test_any_integers(cell: str, dtype: torch.dtype) -> None:
    case = of_all_options(cell)
    module = case.module(pyrnnfast)
    x, _ = case.operands()
    expected = run(case, module, x, (), lengths=torch.tensor(RAGGED))
    found = run(case, module, x, (), lengths=torch.tensor(RAGGED, dtype=dtype))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@every_cell
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2 * 2.0**-8)], ids=["float32", "bfloat16"]
)
def test_other_dtypes(cell: str, dtype: torch.dtype, tolerance: float) -> None:
    """Against float64 with the same rounded weights and data. In bfloat16 the two layers round twice."""
    case = of_all_options(cell)
    module = case.module(pyrnnfast, dtype)
    x, states = case.operands(dtype)
    found = run(case, module, x, states, **ragged(case))
    assert all(t.dtype is dtype for t in found.values())
    wide_x, wide_states = x.detach().double(), tuple(s.detach().double() for s in states)
    expected = run(case, module.double(), wide_x, wide_states, **ragged(case))
    for name, t in expected.items():
        torch.testing.assert_close(found[name].double(), t, rtol=tolerance, atol=tolerance, msg=name)


@every_cell
@pytest.mark.parametrize("batch_first", [False, True])
def test_functional_form(cell: str, batch_first: bool) -> None:
    case = of_all_options(cell, batch_first=batch_first)
    module = case.module(pyrnnfast)
    x, states = case.operands()
    form: Any = getattr(functional, cell[:3] if cell.startswith("rnn_") else cell)
    options: dict[str, Any] = {"num_layers": 2, "bidirectional": True, "batch_first": batch_first}
    if cell.startswith("rnn_"):
        options["nonlinearity"] = cell[4:]
    found = form(x, case.hx(states), list(module.parameters()), **options, **ragged(case))
    torch.testing.assert_close(flat(found), flat(module(x, case.hx(states), **ragged(case))), rtol=0, atol=0)


@every_cell
def test_gradgradcheck(cell: str) -> None:
    case = Case(cell, steps=3, batch=3, inputs=2, hidden=2, bidirectional=True)
    module = case.module(pyrnnfast, torch.float64)
    x, initial = case.operands(torch.float64)
    names = [name for name, _ in module.named_parameters()]
    extras = {"lengths": torch.tensor([3, 0, 2]), "reset": RESET[1:4, :3]}

    def function(x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        states, weights = rest[: len(initial)], rest[len(initial) :]
        parameters = dict(zip(names, weights, strict=True))
        return tuple(flat(torch.func.functional_call(module, parameters, (x, case.hx(states)), extras)))

    leaves = (x, *initial, *(p.detach().requires_grad_() for p in module.parameters()))
    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


@every_cell
@pytest.mark.parametrize(
    ("batch_first", "dtype"), [(False, torch.int64), (True, torch.int32)], ids=["int64", "batch first, int32"]
)
def test_torch_func(cell: str, batch_first: bool, dtype: torch.dtype) -> None:
    """Gradients of a function, of each sample, and with lengths and resets that come in as its arguments."""
    case = of_all_options(cell, batch_first=batch_first)
    module = case.module(pyrnnfast, torch.float64)
    x, states = case.operands(torch.float64)
    x, states = x.detach(), tuple(s.detach() for s in states)
    parameters = {name: p.detach() for name, p in module.named_parameters()}
    extras = ragged(case)
    extras["lengths"] = extras["lengths"].to(dtype)

    def loss(parameters: dict[str, Tensor], x: Tensor, extras: dict[str, Tensor]) -> Tensor:
        found = torch.func.functional_call(module, parameters, (x, case.hx(states)), extras)
        return torch.stack([t.sin().sum() for t in flat(found)]).sum()

    def by_autograd(x: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        leaves = {name: p.clone().requires_grad_() for name, p in parameters.items()}
        x = x.clone().requires_grad_()
        found = torch.autograd.grad(loss(leaves, x, extras), [*leaves.values(), x])
        return dict(zip(leaves, found[:-1], strict=True)), found[-1]

    expected = by_autograd(x)
    found = torch.func.grad(lambda p, x: loss(p, x, extras), argnums=(0, 1))(parameters, x)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(torch.func.grad(loss)(parameters, x, extras), expected[0], rtol=1e-9, atol=1e-11)
    xs = torch.stack([x, x.flip(0, 1)])
    each = torch.func.vmap(torch.func.grad(lambda x: loss(parameters, x, extras)))(xs)
    torch.testing.assert_close(each, torch.stack([by_autograd(one)[1] for one in xs]), rtol=1e-9, atol=1e-11)


@every_cell
@pytest.mark.parametrize("name", ["lengths", "reset"])
def test_vmap_maps_over(name: str, cell: str) -> None:
    case = of_all_options(cell, steps=T)
    module = case.module(pyrnnfast, torch.float64)
    x = case.operands(torch.float64)[0].detach()
    given = torch.tensor([RAGGED, RAGGED[::-1]]) if name == "lengths" else torch.stack([RESET, RESET.flip(0)])

    def loss(x: Tensor, one: Tensor) -> Tensor:
        result: Tensor = module(x, **{name: one.clone()})[0].sin().sum()  # a clone has a wrapper for the gradient too
        return result

    def gradient(one: Tensor) -> Tensor:
        leaf = x.clone().requires_grad_()
        return torch.autograd.grad(loss(leaf, one), leaf)[0]

    found = torch.func.vmap(loss, (None, 0))(x, given)
    torch.testing.assert_close(found, torch.stack([loss(x, one) for one in given]))
    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(x, given)
    torch.testing.assert_close(each, torch.stack([gradient(one) for one in given]))


def test_vmap_looks_at_lengths() -> None:
    module, given = pyrnnfast.GRU(I, H), torch.tensor([RAGGED, (0, 1, T + 1, 2)])
    with pytest.raises(ValueError, match=f"lengths must be from 0 to {T}"):
        torch.func.vmap(lambda one: module(torch.zeros(T, B, I), lengths=one)[0])(given)


@every_cell
@pytest.mark.parametrize("batch_first", [False, True])
def test_lengths_are_what_torch_packs(cell: str, batch_first: bool) -> None:
    """Values and gradients of torch.nn's module on the packed batch, which is then padded again."""
    case = of_all_options(cell, batch_first=batch_first)
    lengths = torch.tensor([4, 6, 1, 2])
    x, states = case.operands(torch.float64)
    module, stock = case.module(pyrnnfast, torch.float64), case.module(torch.nn, torch.float64)
    packed = pack_padded_sequence(x, lengths, batch_first, enforce_sorted=False)
    y, final = stock(packed, case.hx(states))
    expected = dict(zip(case.outputs, flat((pad_packed_sequence(y, batch_first)[0], final)), strict=True))
    found = run(case, module, x, states, lengths=lengths)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    ours, theirs = gradients(module, x, states, found), gradients(stock, x, states, expected)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@every_cell
def test_state_carried_over_windows(cell: str) -> None:
    """Two halves, the second from the final state of the first, are the whole, in values and gradients."""
    case = replace(of_all_options(cell), bidirectional=False, layers=2)
    module = case.module(pyrnnfast, torch.float64)
    x, states = case.operands(torch.float64)
    whole = run(case, module, x, states, reset=RESET)
    half = T // 2
    first = run(case, module, x[:half], states, reset=RESET[:half])
    carried = tuple(first[name] for name in case.outputs[1:])
    second = run(case, module, x[half:], carried, reset=RESET[half:])
    found = second | {"y": torch.cat([first["y"], second["y"]])}
    torch.testing.assert_close(found, whole, rtol=1e-10, atol=1e-12)
    theirs = gradients(module, x, states, whole)
    torch.testing.assert_close(gradients(module, x, states, found), theirs, rtol=1e-10, atol=1e-12)


def test_what_is_in_the_padding_has_no_gradient_and_no_effect() -> None:
    case = of_all_options("lstm")
    module = case.module(pyrnnfast)
    x, states = case.operands()
    mask = padding(case, list(RAGGED))
    clean = run(case, module, x, states, **ragged(case))
    with torch.no_grad():
        x[mask] = float("inf")
    found = run(case, module, x, states, **ragged(case))
    torch.testing.assert_close(found, clean, rtol=0, atol=0)
    assert not found["y"][mask].any()
    grads = gradients(module, x, states, found)
    assert not grads["grad x"][mask].any()
    assert all(g.isfinite().all() for g in grads.values())


@pytest.mark.parametrize("given", [[4, 6, 0, 2], (4, 6, 0, 2), list(torch.tensor([4, 6, 0, 2]))], ids=str)
def test_lengths_as_a_list(given: Any) -> None:
    module, x = pyrnnfast.GRU(I, H), torch.randn(T, B, I)
    expected = module(x, lengths=torch.tensor([4, 6, 0, 2]))
    weights = list(module.parameters())
    for found in (module(x, lengths=given), pyrnnfast.functional.gru(x, None, weights, lengths=given)):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert pyrnnfast.explain(module, x, lengths=given).path == "fused"
    assert module(x[:, :0], lengths=[])[0].shape == (T, 0, H)
    with torch.device("meta"):
        torch.testing.assert_close(module(x, lengths=given), expected, rtol=0, atol=0)


# What is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lengths", "error", "words"),
    [
        ([4, 6, 0], ValueError, r"lengths: expected size \[4\], got \[3\]"),
        ([4.0, 6.0, 0.0, 2.0], TypeError, "must be a tensor or list of integers"),
        (7, TypeError, "must be a tensor or list of integers"),
        (torch.tensor([4.0, 6.0, 0.0, 2.0]), TypeError, "must be a tensor or list of integers"),
        (torch.tensor([True, True, False, True]), TypeError, "must be a tensor or list of integers"),
        (torch.tensor([4, 6, 0]), ValueError, r"lengths: expected size \[4\], got \[3\]"),
        (torch.tensor([[4, 6, 0, 2]]), ValueError, r"lengths: expected size \[4\], got \[1, 4\]"),
        (torch.tensor([4, -1, 0, 2]), ValueError, "lengths must be from 0 to 6"),
        (torch.tensor([4, 7, 0, 2]), ValueError, "lengths must be from 0 to 6"),
        (torch.tensor(RAGGED, device="meta"), ValueError, "not served on the meta device"),
    ],
    ids=[
        "short list",
        "list of float",
        "number",
        "float",
        "bool",
        "too few",
        "too many dimensions",
        "negative",
        "beyond T",
        "meta",
    ],
)
@pytest.mark.parametrize("batch_first", [False, True])
def test_bad_lengths(lengths: Any, error: type[Exception], words: str, batch_first: bool) -> None:
    module = pyrnnfast.GRU(I, H, batch_first=batch_first)
    x = torch.zeros(B, T, I) if batch_first else torch.zeros(T, B, I)
    with pytest.raises(error, match=words):
        module(x, lengths=lengths)


@pytest.mark.parametrize("batch_first", [False, True])
def test_bad_reset(batch_first: bool) -> None:
    """The layout of reset is that of the input: the other one is refused."""
    module = pyrnnfast.LSTM(I, H, batch_first=batch_first)
    x = torch.zeros(B, T, I) if batch_first else torch.zeros(T, B, I)
    right, wrong = ([B, T], [T, B]) if batch_first else ([T, B], [B, T])
    module(x, reset=torch.zeros(right, dtype=torch.bool))
    for reset in (torch.zeros(right), torch.zeros(right, dtype=torch.uint8), [[False] * right[1]] * right[0]):
        with pytest.raises(TypeError, match="must be a tensor of bool"):
            module(x, reset=reset)
    for size in (wrong, right[:1], [*right, 1]):
        with pytest.raises(ValueError, match="reset: expected size"):
            module(x, reset=torch.zeros(size, dtype=torch.bool))
    with pytest.raises(ValueError, match="not served on the meta device"):
        module(x, reset=torch.zeros(right, dtype=torch.bool, device="meta"))


@pytest.mark.parametrize(
    ("extras", "error", "words"),
    [
        ({"lengths": [3]}, ValueError, r"lengths: expected size \[\], got \[1\]"),
        ({"lengths": torch.tensor([3])}, ValueError, r"lengths: expected size \[\], got \[1\]"),
        ({"lengths": torch.tensor(7)}, ValueError, "lengths must be from 0 to 6"),
        ({"reset": RESET}, ValueError, r"reset: expected size \[6\], got \[6, 4\]"),
    ],
    ids=["list", "one too many dimensions", "beyond T", "batched reset"],
)
def test_bad_extras_of_one_sequence(extras: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        pyrnnfast.RNN(I, H)(torch.zeros(T, I), **extras)


@pytest.mark.parametrize("name", ["lengths", "reset"])
def test_not_beside_packed_input(name: str) -> None:
    packed = pack_padded_sequence(torch.zeros(T, B, I), torch.tensor([6, 4, 2, 1]))
    with pytest.raises(ValueError, match="a PackedSequence has its own lengths"):
        pyrnnfast.GRU(I, H)(packed, **{name: torch.tensor(RAGGED) if name == "lengths" else RESET})


@pytest.mark.parametrize("name", ["lengths", "reset"])
def test_not_on_torchs_own_road(name: str) -> None:
    """The kernels do not serve complex numbers, and torch does not know of lengths: to ignore them would be wrong."""
    module = pyrnnfast.LSTM(I, H, dtype=torch.complex64)
    with pytest.raises(ValueError, match="or cell_states, and the kernels serve float32"):
        module(torch.zeros(T, B, I) + 0j, **{name: torch.tensor(RAGGED) if name == "lengths" else RESET})


def test_not_on_the_meta_device() -> None:
    with pytest.raises(ValueError, match="not served on the meta device"):
        pyrnnfast.GRU(I, H, device="meta")(torch.zeros(T, B, I, device="meta"), lengths=torch.tensor(RAGGED))


@pytest.mark.parametrize("name", ["RNNCell", "GRUCell", "LSTMCell"])
def test_cells_have_no_lengths(name: str) -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'lengths'"):
        getattr(pyrnnfast, name)(I, H)(torch.zeros(B, I), lengths=torch.tensor(RAGGED))


# Nested tensors ----------------------------------------------------------------------------------------------------


def nested_cases() -> list[Case]:
    return [
        case
        for cell in CELLS
        for case in (
            Case(cell, steps=T, batch=B, inputs=I, hidden=H),
            Case(cell, steps=T, batch=B, inputs=I, hidden=H, initial=False, bias=False),
            of_all_options(cell, batch_first=True),
        )
    ]


every_nested_case = pytest.mark.parametrize("case", nested_cases(), ids=str)


def sequences(x: Tensor, batch_first: bool, lengths: tuple[int, ...] = RAGGED) -> list[Tensor]:
    rows = x if batch_first else x.transpose(0, 1)
    return [row[:length] for row, length in zip(rows, lengths, strict=True)]


def gaps(x: Tensor, batch_first: bool) -> Tensor:
    """A nested tensor with gaps between its sequences: it looks at a padded batch."""
    rows = x if batch_first else x.transpose(0, 1).contiguous()
    start = torch.zeros(len(rows), dtype=torch.int64)
    return torch.nested.narrow(rows, 1, start, torch.tensor(RAGGED), layout=torch.jagged)


def contiguous(x: Tensor, batch_first: bool) -> Tensor:
    return torch.nested.as_nested_tensor(sequences(x, batch_first), layout=torch.jagged)


def padded(nested: Any, like: Tensor, batch_first: bool) -> Tensor:
    """Item by item, in the layout of a padded batch."""
    rows = torch.stack([torch.nn.functional.pad(row, (0, 0, 0, T - len(row))) for row in nested.unbind()])
    return rows if batch_first else rows.transpose(0, 1)


@every_nested_case
@pytest.mark.parametrize("make", [contiguous, gaps], ids=["contiguous", "with gaps"])
def test_nested(case: Case, make: Callable[[Tensor, bool], Tensor]) -> None:
    """Values, and gradients of the tensors that the nested one is made of, are those of lengths."""
    module = case.module(pyrnnfast, torch.float64)
    x, states = case.operands(torch.float64)
    nested = make(x, case.batch_first)
    assert pyrnnfast.explain(module, nested, case.hx(states)).path == "fused"
    found = run(case, module, nested, states)
    assert found["y"].layout is torch.jagged
    assert found["y"].shape[:2] == nested.shape[:2]
    found["y"] = padded(found["y"], x, case.batch_first)
    expected = run(case, module, x, states, lengths=torch.tensor(RAGGED))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    ours, theirs = gradients(module, x, states, found), gradients(module, x, states, expected)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_nested_output_goes_together_with_its_input() -> None:
    module = pyrnnfast.GRU(I, I)
    nested = contiguous(torch.randn(T, B, I), False)
    found = module(nested)[0] + nested
    torch.testing.assert_close(found.values(), module(nested)[0].values() + nested.values())


def test_nested_with_gradients_of_its_own() -> None:
    """A nested leaf has a nested gradient."""
    module = pyrnnfast.LSTM(I, H)
    x = torch.randn(T, B, I)
    nested = contiguous(x, False).detach().requires_grad_()
    module(nested)[0].sin().sum().backward()
    x.requires_grad_()
    module(x, lengths=torch.tensor(RAGGED))[0].sin().sum().backward()
    assert nested.grad is not None
    assert x.grad is not None
    torch.testing.assert_close(padded(nested.grad, x, False), x.grad)


def test_nested_cell_states() -> None:
    module = pyrnnfast.LSTM(I, H, 2, bidirectional=True, cell_states=True)
    x = torch.randn(T, B, I)
    nested = contiguous(x, False)
    y, final, cells = module(nested)
    expected = module(x, lengths=torch.tensor(RAGGED))
    assert cells.shape == y.shape
    torch.testing.assert_close((padded(y, x, False), final, padded(cells, x, False)), expected)


@every_cell
def test_nested_without_any_step(cell: str) -> None:
    """Final states are the initial ones, and zeros without; gradients are zeros."""
    case = of_all_options(cell)
    module = case.module(pyrnnfast)
    x, states = case.operands()
    rows = sequences(x, False, (0,) * B)
    nested = torch.nested.as_nested_tensor(rows, layout=torch.jagged)
    y, *final = flat(module(nested, case.hx(states)))
    assert y.shape == (B, nested.shape[1], 2 * H)
    assert y.values().shape == (0, 2 * H)
    for found, given in zip(final, states, strict=True):
        assert torch.equal(found, given)
    assert not any(t.any() for t in flat(module(nested))[1:])
    loss = y.values().sum() + torch.stack([t.sum() for t in final]).sum()
    for grad in torch.autograd.grad(loss, [x, *module.parameters()]):
        assert not grad.any()


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("kernels", [True, False])
def test_nested_with_projections(kernels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernels do not serve, torch's module computes from the same rows, packed."""
    if not kernels:
        install(monkeypatch, None, reason="there are none")
    module = pyrnnfast.LSTM(I, H, proj_size=2, bidirectional=True)
    x = torch.randn(T, B, I)
    nested = contiguous(x, False)
    assert pyrnnfast.explain(module, nested).path == ("fused" if kernels else "torch")
    y, (h_n, c_n) = module(nested)
    assert h_n.shape == (2, B, 2)
    assert c_n.shape == (2, B, H)
    for k, row in enumerate(sequences(x, False)):
        if len(row):
            own, (h, c) = module(row)
            torch.testing.assert_close((y[k], h_n[:, k], c_n[:, k]), (own, h, c))
        else:
            assert not (h_n[:, k].any() or c_n[:, k].any())


@every_cell
def test_nested_under_autocast(cell: str) -> None:
    """Dtypes are those of packed input; the initial state of an empty sequence comes back in the final one's."""
    case = of_all_options(cell)
    module = case.module(pyrnnfast)
    x, states = case.operands()
    # Where the result is float32, padded input has the state of an empty sequence rounded, and nested input has not.
    states = tuple(s.detach().bfloat16().float() for s in states)
    with torch.autocast("cpu", torch.bfloat16):
        found = run(case, module, contiguous(x, False), states)
        expected = run(case, module, x, states, lengths=torch.tensor(RAGGED))
    found["y"] = padded(found["y"], x, False)
    for name, t in expected.items():
        assert found[name].dtype is (torch.float32 if cell in ("gru", "lstm") else torch.bfloat16)
        assert torch.equal(found[name].to(t.dtype), t)


@every_cell
def test_nested_under_torch_func(cell: str) -> None:
    """By way of the final states: torch's transforms cannot take a nested output apart."""
    case = of_all_options(cell)
    module = case.module(pyrnnfast, torch.float64)
    x, states = case.operands(torch.float64)
    x = x.detach()
    nested = contiguous(x, False)
    parameters = {name: p.detach() for name, p in module.named_parameters()}

    def loss(parameters: dict[str, Tensor], input: Tensor, extras: dict[str, Tensor]) -> Tensor:
        _, *final = flat(torch.func.functional_call(module, parameters, (input, case.hx(states)), extras))
        return torch.stack([t.sin().sum() for t in final]).sum()

    found = torch.func.grad(lambda p: loss(p, nested, {}))(parameters)
    expected = torch.func.grad(lambda p: loss(p, x, {"lengths": torch.tensor(RAGGED)}))(parameters)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_nested_with_short_offsets() -> None:
    nested = torch.nested.nested_tensor_from_jagged(torch.randn(5, I), torch.tensor([0, 3, 3, 5], dtype=torch.int32))
    module = pyrnnfast.GRU(I, H)
    for found, rows in zip(module(nested)[0].unbind(), nested.unbind(), strict=True):
        assert len(found) == len(rows)
        if len(rows):
            torch.testing.assert_close(found, module(rows)[0])


@pytest.mark.parametrize("name", ["lengths", "reset"])
def test_nested_has_its_own_lengths(name: str) -> None:
    nested = contiguous(torch.zeros(T, B, I), False)
    with pytest.raises(ValueError, match="a nested tensor has its own lengths"):
        pyrnnfast.GRU(I, H)(nested, **{name: torch.tensor(RAGGED) if name == "lengths" else RESET})


def test_bad_nested() -> None:
    nested = contiguous(torch.zeros(T, B, I), False)
    layer = pyrnnfast.LSTM(I, H)
    for bad in (nested.transpose(1, 2), torch.nested.nested_tensor([torch.zeros(3)], layout=torch.jagged)):
        with pytest.raises(ValueError, match=r"has to be \[B, j, I\] with a ragged j"):
            layer(bad)
    with pytest.raises(ValueError, match="has to be on the CPU or a CUDA device, got meta"):
        layer(nested.to("meta"))
    for wrong in ((1, B - 1, H), (1, B + 1, H), (B, H)):
        state = torch.zeros(wrong)
        with pytest.raises(RuntimeError, match=r"Expected hidden size \(1, 4, 5\), got"):
            layer(nested, (state, state))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):  # torch's words, as of packed input
        pyrnnfast.LSTM(I + 1, H)(nested)


def test_nested_output_is_padded_to_its_longest() -> None:
    """torch would take all rows together for the length of one that does not say."""
    items = [torch.randn(n, 3) for n in (5, 2, 3)]
    y, _ = pyrnnfast.GRU(3, 4)(torch.nested.nested_tensor(items, layout=torch.jagged))
    assert y.to_padded_tensor(0.0).shape == (3, 5, 4)


@pytest.mark.parametrize("batch_first", [False, True])
def test_an_empty_batch_has_no_lengths(batch_first: bool) -> None:
    module = pyrnnfast.LSTM(3, 4, batch_first=batch_first)
    x = torch.randn(0, 5, 3) if batch_first else torch.randn(5, 0, 3)
    found = module(x, lengths=torch.zeros(0, dtype=torch.int64))
    torch.testing.assert_close(found, module(x))
