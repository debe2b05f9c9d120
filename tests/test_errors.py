"""Bad input: torch's error types and words, and clear ones of our own where torch would crash or go astray."""

import re
import subprocess
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from cases import CELLS, Case
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence

import pyrnnfast

NAMES = ("RNN", "GRU", "LSTM")

Outcome = tuple[type[BaseException], str] | None


def outcome(call: Callable[[], Any]) -> Outcome:
    """The type and text of what a call raises. None: it returns."""
    try:
        call()
    except Exception as error:
        # Python names the class that defines forward; it may be a base class.
        return type(error), re.sub(r"^\w+\.forward\(\)", "forward()", str(error))
    return None


def assert_same_error(call: Callable[[ModuleType], Any]) -> None:
    theirs = outcome(lambda: call(torch.nn))
    assert theirs is not None, "torch accepts this"
    assert outcome(lambda: call(pyrnnfast)) == theirs


# Constructors ------------------------------------------------------------------------------------------------------

BAD_LAYERS: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
    ("no_sizes", (), {}),
    ("one_size", (3,), {}),
    ("float_hidden", (3, 4.0), {}),
    ("zero_inputs", (0, 4), {}),
    ("zero_hidden", (3, 0), {}),
    ("negative_hidden", (3, -1), {}),
    ("zero_layers", (3, 4), {"num_layers": 0}),
    ("int_bias", (3, 4), {"bias": 1}),
    ("int_batch_first", (3, 4), {"batch_first": 1}),
    ("dropout_above_1", (3, 4), {"dropout": 1.5, "num_layers": 2}),
    ("dropout_negative", (3, 4), {"dropout": -0.1, "num_layers": 2}),
    ("dropout_bool", (3, 4), {"dropout": True, "num_layers": 2}),
    ("dropout_text", (3, 4), {"dropout": "x", "num_layers": 2}),
    ("unknown_option", (3, 4), {"peephole": True}),
    ("bad_device", (3, 4), {"device": "nowhere"}),
    ("bad_dtype", (3, 4), {"dtype": torch.int64}),
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("args", "options"), [c[1:] for c in BAD_LAYERS], ids=[c[0] for c in BAD_LAYERS])
def test_constructors_of_layers(name: str, args: tuple[Any, ...], options: dict[str, Any]) -> None:
    assert_same_error(lambda library: getattr(library, name)(*args, **options))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("RNN", {"nonlinearity": "sigmoid"}),
        ("RNN", {"proj_size": 2}),
        ("RNN", {"proj_size": 0}),
        ("GRU", {"proj_size": 2}),
        ("GRU", {"nonlinearity": "tanh"}),
        ("LSTM", {"proj_size": 4}),
        ("LSTM", {"proj_size": -1}),
        ("LSTM", {"nonlinearity": "tanh"}),
    ],
    ids=str,
)
def test_options_of_one_layer(name: str, options: dict[str, Any]) -> None:
    assert_same_error(lambda library: getattr(library, name)(3, 4, **options))


@pytest.mark.parametrize("name", NAMES)
def test_constructors_of_cells(name: str) -> None:
    assert_same_error(lambda library: getattr(library, name + "Cell")())
    assert_same_error(lambda library: getattr(library, name + "Cell")(3, 4.5))
    assert_same_error(lambda library: getattr(library, name + "Cell")(3, 4, num_layers=2))
    assert_same_error(lambda library: getattr(library, name + "Cell")(3, -4))


def test_dropout_of_a_single_layer_warns() -> None:
    with pytest.warns(UserWarning, match="dropout option adds dropout after all but last recurrent layer"):
        pyrnnfast.GRU(3, 4, dropout=0.5)


# Calls -------------------------------------------------------------------------------------------------------------


def ones(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(shape, dtype=dtype)


def pair(name: str, state: Any) -> Any:
    """A state for each module: the LSTM takes two of them."""
    return (state, state) if name.startswith("LSTM") else state


# Of layers with 3 inputs, 4 hidden units, one layer.
BAD_CALLS: dict[str, Callable[[str], tuple[Any, ...]]] = {
    "no_input": lambda n: (),
    "none": lambda n: (None,),
    "list": lambda n: ([[[1.0, 2.0, 3.0]]],),
    "text": lambda n: ("x",),
    "0D": lambda n: (ones(),),
    "1D": lambda n: (ones(3),),
    "4D": lambda n: (ones(2, 2, 2, 3),),
    "features": lambda n: (ones(2, 2, 5),),
    "features_unbatched": lambda n: (ones(2, 5),),
    "no_features": lambda n: (ones(2, 2, 0),),
    "float64": lambda n: (ones(2, 2, 3, dtype=torch.float64),),
    "float16": lambda n: (ones(2, 2, 3, dtype=torch.float16),),
    "int64": lambda n: (ones(2, 2, 3, dtype=torch.int64),),
    "bool": lambda n: (ones(2, 2, 3, dtype=torch.bool),),
    "no_steps": lambda n: (ones(0, 2, 3),),
    "no_steps_unbatched": lambda n: (ones(0, 3),),
    "meta": lambda n: (torch.ones(2, 2, 3, device="meta"),),
    "hx_other_batch": lambda n: (ones(2, 2, 3), pair(n, ones(1, 3, 4))),
    "hx_other_layers": lambda n: (ones(2, 2, 3), pair(n, ones(2, 2, 4))),
    "hx_other_hidden": lambda n: (ones(2, 2, 3), pair(n, ones(1, 2, 5))),
    "hx_unbatched_for_batched": lambda n: (ones(2, 2, 3), pair(n, ones(1, 4))),
    "hx_batched_for_unbatched": lambda n: (ones(2, 3), pair(n, ones(1, 2, 4))),
    "hx_unbatched_other_hidden": lambda n: (ones(2, 3), pair(n, ones(1, 5))),
    "hx_float64": lambda n: (ones(2, 2, 3), pair(n, ones(1, 2, 4, dtype=torch.float64))),
    "hx_number": lambda n: (ones(2, 2, 3), 1.0),
    "hx_empty_tuple": lambda n: (ones(2, 2, 3), ()),
    "hx_triple": lambda n: (ones(2, 2, 3), (ones(1, 2, 4),) * 3),
    "three_arguments": lambda n: (ones(2, 2, 3), None, None),
}
BAD_LSTM_CALLS: dict[str, tuple[Any, ...]] = {
    "cx_other_batch": (ones(2, 2, 3), (ones(1, 2, 4), ones(1, 3, 4))),
    "cx_other_hidden": (ones(2, 2, 3), (ones(1, 2, 4), ones(1, 2, 5))),
    "cx_unbatched": (ones(2, 2, 3), (ones(1, 2, 4), ones(1, 4))),
    "cx_none": (ones(2, 2, 3), (ones(1, 2, 4), None)),
    "hx_single": (ones(2, 2, 3), ones(1, 2, 4)),
    "hx_one": (ones(2, 2, 3), (ones(1, 2, 4),)),
}


def layer_call(name: str, args: tuple[Any, ...]) -> Callable[[ModuleType], Any]:
    return lambda library: getattr(library, name)(3, 4)(*args)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", BAD_CALLS)
def test_calls_of_layers(name: str, bad: str) -> None:
    args = BAD_CALLS[bad](name)
    if bad == "hx_empty_tuple" and name != "LSTM":
        args = (ones(2, 2, 3), "x")
    assert_same_error(layer_call(name, args))


@pytest.mark.parametrize("bad", BAD_LSTM_CALLS)
def test_calls_of_the_lstm(bad: str) -> None:
    assert_same_error(layer_call("LSTM", BAD_LSTM_CALLS[bad]))


BAD_CELL_CALLS: dict[str, Callable[[str], tuple[Any, ...]]] = {
    "no_input": lambda n: (),
    "none": lambda n: (None,),
    "0D": lambda n: (ones(),),
    "3D": lambda n: (ones(2, 2, 3),),
    "features": lambda n: (ones(2, 5),),
    "features_unbatched": lambda n: (ones(5),),
    "float64": lambda n: (ones(2, 3, dtype=torch.float64),),
    "int64": lambda n: (ones(2, 3, dtype=torch.int64),),
    "hx_other_batch": lambda n: (ones(2, 3), pair(n, ones(3, 4))),
    "hx_other_hidden": lambda n: (ones(2, 3), pair(n, ones(2, 5))),
    "hx_3D": lambda n: (ones(2, 3), pair(n, ones(1, 2, 4))),
    "hx_batched_for_unbatched": lambda n: (ones(3), pair(n, ones(2, 4))),
    "hx_float64": lambda n: (ones(2, 3), pair(n, ones(2, 4, dtype=torch.float64))),
    "packed": lambda n: (pack_sequence([ones(1, 3), ones(1, 3)]),),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", BAD_CELL_CALLS)
def test_calls_of_cells(name: str, bad: str) -> None:
    assert_same_error(layer_call(name + "Cell", BAD_CELL_CALLS[bad](name + "Cell")))


@pytest.mark.parametrize("name", NAMES)
def test_a_foreign_nonlinearity_of_a_cell(name: str) -> None:
    def call(library: ModuleType) -> Any:
        cell = getattr(library, name + "Cell")(3, 4)
        cell.nonlinearity = "sigmoid"
        return cell(ones(2, 3))

    if name == "RNN":
        assert_same_error(call)
    else:
        assert call(pyrnnfast) is not None


@pytest.mark.parametrize("hx", [ones(2, 4), ones(4), [ones(2, 4)], (), 1, "hx"], ids=lambda hx: type(hx).__name__)
def test_an_lstm_cell_state_that_is_no_pair(hx: Any) -> None:
    """torch crashes on some of these."""
    cell = pyrnnfast.LSTMCell(3, 4)
    with pytest.raises(TypeError, match=r"LSTMCell: Expected hx to be a pair \(h_0, c_0\) of tensors, got"):
        cell(ones(2, 3), hx)
    assert cell(ones(2, 3))[0].shape == (2, 4)


@pytest.mark.parametrize("name", ["RNN", "GRU", "LSTM"])
def test_a_cell_without_units(name: str) -> None:
    """torch's layers refuse it, its cells do not."""
    cells = [getattr(library, name + "Cell")(3, 0) for library in (torch.nn, pyrnnfast)]
    found = [cell(ones(2, 3)) for cell in cells]
    torch.testing.assert_close(*found)
    assert (found[1][0] if name == "LSTM" else found[1]).shape == (2, 0)


@pytest.mark.parametrize("case", [Case(c, single_step=s) for c in CELLS for s in (False, True)], ids=str)
def test_an_empty_batch_is_answered_as_torch_does(case: Case) -> None:
    x = ones(0, 3) if case.single_step else ones(2, 0, 3)
    results = []
    for library in (pyrnnfast, torch.nn):
        found = case.module(library)(x)
        flat, _ = torch.utils._pytree.tree_flatten(found)
        results.append([tuple(t.shape) for t in flat])
    assert results[0] == results[1]


@pytest.mark.parametrize("name", NAMES)
def test_weights_that_do_not_fit(name: str) -> None:
    """Put there by hand: of another shape, dtype, kind, or gone."""

    def call(change: Callable[[torch.nn.Module], Any]) -> Callable[[ModuleType], Any]:
        def run(library: ModuleType) -> Any:
            module = getattr(library, name)(3, 4)
            change(module)
            return module(ones(2, 2, 3))

        return run

    def set_parameter(key: str, value: Tensor) -> Callable[[torch.nn.Module], Any]:
        return lambda module: setattr(module, key, torch.nn.Parameter(value))

    # torch's LSTM reads beyond such a weight, without a word, so there are none to compare with.
    short = call(set_parameter("weight_ih_l0", ones(5, 3)))
    if name == "LSTM":
        with pytest.raises((RuntimeError, ValueError), match="weight"):
            short(pyrnnfast)
    else:
        assert_same_error(short)
    assert_same_error(call(set_parameter("weight_ih_l0", ones(4, 3, dtype=torch.float64))))
    module = getattr(pyrnnfast, name)(3, 4)
    del module.weight_hh_l0
    with pytest.raises(AttributeError, match="weight_hh_l0"):
        module(ones(2, 2, 3))


# Packed input ------------------------------------------------------------------------------------------------------

ROWS = 6
BAD_BATCH_SIZES: dict[str, tuple[Tensor, str]] = {
    "negative": (torch.tensor([4, -1, 3]), r"batch_sizes\[1\] must be positive, got -1"),
    "negative_first": (torch.tensor([-6]), r"batch_sizes\[0\] must be positive, got -6"),
    "zero": (torch.tensor([3, 3, 0]), r"batch_sizes\[2\] must be positive, got 0"),
    "increasing": (torch.tensor([1, 2, 3]), r"must not increase, but batch_sizes\[1\] is 2 after 1"),
    "rising_again": (torch.tensor([3, 1, 2]), r"must not increase, but batch_sizes\[2\] is 2 after 1"),
    "too_many": (torch.tensor([3, 3, 3]), "sum to more than the 6 rows"),
    "first_too_many": (torch.tensor([7]), r"batch_sizes\[0\] is 7, but the data have only 6 rows"),
    "too_few": (torch.tensor([3, 2]), "sum to 5, but the data have 6 rows"),
    "huge": (torch.tensor([2**62, 2**62]), "have only 6 rows"),
    "overflowing": (torch.tensor([6, 2**63 - 1]), "must not increase"),
    "int32": (torch.tensor([3, 3], dtype=torch.int32), "must be an int64 tensor"),
    "float": (torch.tensor([3.0, 3.0]), "must be an int64 tensor"),
    "matrix": (torch.tensor([[3, 3]]), "must have one dimension"),
    "scalar": (torch.tensor(6), "must have one dimension"),
    "empty": (torch.tensor([], dtype=torch.int64), "Expected sequence length to be larger than 0 in RNN"),
}


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("bad", BAD_BATCH_SIZES)
def test_bad_batch_sizes(cell: str, bad: str) -> None:
    """A PackedSequence made by hand is checked by nobody else; torch reads beyond its memory on some of these."""
    batch_sizes, text = BAD_BATCH_SIZES[bad]
    case = Case(cell, lengths=(3, 2, 1), bidirectional=True)
    module = case.module(pyrnnfast)
    good = case.run(module, *case.operands())
    packed = PackedSequence(ones(ROWS, 3), batch_sizes)
    for call in (module, lambda p: pyrnnfast.explain(module, p), module.double()):
        with pytest.raises(ValueError, match=text):
            call(packed)
    again = case.run(module.float(), *case.operands())
    assert all(torch.equal(t, good[name]) for name, t in again.items())


@pytest.mark.parametrize("cell", CELLS)
def test_good_batch_sizes_made_by_hand(cell: str) -> None:
    """Strided ones too."""
    module = Case(cell, inputs=3).module(pyrnnfast)
    data = torch.randn(6, 3)
    y, _ = module(PackedSequence(data, torch.tensor([3, 2, 1])))
    strided = torch.tensor([3, 0, 2, 0, 1, 0])[::2]
    again, _ = module(PackedSequence(data, strided))
    assert torch.equal(y.data, again.data)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "what", ["features", "dtype", "hx_batch", "hx_hidden", "hx_layers", "hx_dimensions", "data_3D"]
)
def test_packed_calls(name: str, what: str) -> None:
    """batch_sizes are good, something else is not: torch's words again."""
    packed = pack_padded_sequence(ones(3, 2, 3), torch.tensor([3, 2]))
    shapes = {"hx_batch": (1, 3, 4), "hx_hidden": (1, 2, 5), "hx_layers": (2, 2, 4), "hx_dimensions": (1, 1, 2, 4)}
    hx = pair(name, ones(*shapes[what])) if what in shapes else None
    if what == "features":
        packed = pack_padded_sequence(ones(3, 2, 5), torch.tensor([3, 2]))
    elif what == "dtype":
        packed = pack_padded_sequence(ones(3, 2, 3, dtype=torch.float64), torch.tensor([3, 2]))
    elif what == "data_3D":
        packed = pack_padded_sequence(ones(3, 2, 3, 3), torch.tensor([3, 2]))
    if name == "LSTM" and what == "hx_dimensions":
        # torch crashes, so only ours is called, and in a process of its own.
        code = """
import torch, pyrnnfast
from torch.nn.utils.rnn import pack_padded_sequence
packed = pack_padded_sequence(torch.ones(3, 2, 3), torch.tensor([3, 2]))
module, hx = pyrnnfast.LSTM(3, 4), torch.ones(1, 1, 2, 4)
try:
    module(packed, (hx, hx))
except (RuntimeError, ValueError) as error:
    print(error)
assert module(packed)[0].data.shape == (5, 4)
"""
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
        assert result.returncode == 0, result.stderr or f"signal {-result.returncode}"
        assert "1, 1, 2, 4" in result.stdout
        return
    assert_same_error(layer_call(name, (packed, hx)))


@pytest.mark.parametrize("name", NAMES)
def test_packed_data_without_rows(name: str) -> None:
    with pytest.raises(ValueError, match="the data have only 0 rows"):
        getattr(pyrnnfast, name)(3, 4)(PackedSequence(ones(0, 3), torch.tensor([1])))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("indices", [[0, 5], [0, -7], [0]], ids=str)
def test_packed_indices_that_do_not_fit(name: str, indices: list[int]) -> None:
    index = torch.tensor(indices)
    packed = PackedSequence(ones(3, 3), torch.tensor([2, 1]), index, index)
    hx = pair(name, ones(1, 2, 4))
    assert_same_error(layer_call(name, (packed, hx)))
    assert getattr(pyrnnfast, name)(3, 4)(ones(2, 2, 3))[0].shape == (2, 2, 4)


# Not a number ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_not_a_number_goes_where_torch_has_it(cell: str, value: float, instruction_set: str) -> None:
    generator = torch.Generator().manual_seed(0)
    cases = (
        Case(cell, steps=4, batch=3, hidden=18, bidirectional=True),
        Case(cell, lengths=(1, 4, 2, 3), hidden=9, layers=2),
        Case(cell, batch=4, single_step=True, hidden=9),
    )
    reached = False
    for case in cases:
        for place in range(12):
            results = []
            where = int(torch.randint(1 << 30, (), generator=generator))
            for library in (pyrnnfast, torch.nn):
                module = case.module(library)
                x, states = case.operands()
                targets = [x, *states, *module.parameters()]
                with torch.no_grad():
                    target = targets[place % len(targets)]
                    # Not at the padding, which no sequence reads.
                    at = where % (case.inputs * case.batch) if target is x else where % target.numel()
                    target.view(-1)[at] = value
                    results.append(case.run(module, x, states))
            for name, their in results[1].items():
                assert torch.equal(results[0][name].isnan(), their.isnan()), f"{name}, {place}"
                assert torch.equal(results[0][name].isinf(), their.isinf()), f"{name}, {place}"
                reached |= bool(their.isnan().any())
    assert reached or value == value


@pytest.mark.parametrize("cell", CELLS)
def test_not_a_number_in_one_sequence_stays_there(cell: str, instruction_set: str) -> None:
    """Neighbours in a tile, and the padding of a batch that was packed, do not mix."""
    case = Case(cell, lengths=(5, 4, 4, 2, 1), hidden=9, bidirectional=True, layers=2)
    module = case.module(pyrnnfast)
    x, states = case.operands()
    clean = case.run(module, x, states)
    with torch.no_grad():
        x[2:, 3] = float("nan")  # padding
        x[4:, 1] = float("nan")
    assert all(torch.equal(t, clean[name]) for name, t in case.run(module, x, states).items())
    with torch.no_grad():
        x[1, 3] = float("nan")
    dirty = case.run(module, x, states)
    others = [0, 1, 2, 4]
    for name, t in dirty.items():
        assert torch.equal(t[:, others], clean[name][:, others])
        assert t[:, 3].isnan().any()


@pytest.mark.parametrize("name", ["RNNCell", "GRUCell", "LSTMCell"])
def test_a_cell_half_on_meta(name: str) -> None:
    """torch's cells compute with weights that have no memory, and answer with what happens to stand somewhere."""
    x = torch.ones(2, 3)
    nowhere, partly = (getattr(pyrnnfast, name)(3, 5) for _ in range(2))
    nowhere.to("meta")
    partly.bias_hh = torch.nn.Parameter(partly.bias_hh.to("meta"))
    for cell, input in ((nowhere, x), (partly, x), (partly, x.to("meta"))):
        with pytest.raises(RuntimeError, match="Input and parameter tensors are not at the same device"):
            cell(input)
    h = torch.zeros(2, 5, device="meta")
    with pytest.raises(RuntimeError, match="Input and hidden tensors are not at the same device"):
        getattr(pyrnnfast, name)(3, 5)(x, (h, h) if name == "LSTMCell" else h)
    state = nowhere(x.to("meta"))
    assert (state[0] if name == "LSTMCell" else state).is_meta


@pytest.mark.parametrize("option", ["proj_size", "single_step", "input_size", "foo"])
def test_functions_take_their_own_options_only(option: str) -> None:
    weights = [torch.ones(20, 3), torch.ones(20, 5), torch.ones(20), torch.ones(20)]
    with pytest.raises(TypeError, match=rf"^lstm\(\) got an unexpected keyword argument '{option}'$"):
        pyrnnfast.functional.lstm(torch.ones(4, 2, 3), None, weights, **{option: 1})


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_more_layers_than_anybody_has(cell: str) -> None:
    """Refused by their number, before anything is made for each."""
    rows = 15 if cell == "gru" else 20
    weights = [torch.ones(rows, 3), torch.ones(rows, 5), torch.ones(rows), torch.ones(rows)]
    with pytest.raises((RuntimeError, ValueError), match=f"{2**42}.* weights"):
        getattr(pyrnnfast.functional, cell)(torch.ones(4, 2, 3), None, weights, num_layers=2**40)


def test_a_reset_whose_memory_was_freed() -> None:
    reset = torch.zeros(4, 2, dtype=torch.bool)
    reset.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="has no memory"):
        pyrnnfast.GRU(3, 5)(torch.ones(4, 2, 3), reset=reset)
