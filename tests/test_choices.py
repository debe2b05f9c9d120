"""The table of choices: what a record says of a call, and which records say nothing."""

import json
from typing import Any

import pytest

from pyrnnfast import choices
from pyrnnfast.choices import Problem, Table

CALL = Problem("lstm", True, "float32", True, 100, 32, 256, 256, bidirectional=False, packed=False)


def row(ratio: float, **given: Any) -> dict[str, Any]:
    """A measurement of CALL, or of what is given instead, that took ``ratio`` of cuDNN's time."""
    return {
        "cell": "lstm",
        "mode": "training",
        "shape": list(CALL.shape),
        "dtype": "float32",
        "tf32": True,
        "layers": 1,
        "bidirectional": False,
        "packed": False,
        "padded": False,
        "path": "fused",
        "ours_ms": 10 * ratio,
        "torch_ms": 10.0,
        "limit_ms": 1.0,
    } | given


def record(*rows: dict[str, Any], **given: Any) -> dict[str, Any]:
    return {
        "device": "Fake 90",
        "capability": "9.0",
        "driver": "580.1",
        "versions": {"torch": "2.13.0"},
        "commit": "abc1234",
        "tests_passed": 100,
        "tests_failed": 0,
        "sanitizer_errors": 0,
        "rows": list(rows),
    } | given


def table(*records: dict[str, Any]) -> Table:
    return Table(choices.read(json.dumps(records)))


def of(*rows: dict[str, Any], **given: Any) -> Table:
    return table(record(*rows, **given))


def test_the_table_that_comes_along_can_be_read() -> None:
    found = choices.read(choices.FILE.read_text())
    assert all(r.refusal is None for r in found)


def test_the_measured_shape() -> None:
    faster, slower = of(row(0.5)).verdict("9.0", CALL), of(row(1.25)).verdict("9.0", CALL)
    assert faster is not None
    assert slower is not None
    assert faster.ours
    assert not slower.ours
    assert (faster.path, faster.ratio) == ("fused", 0.5)
    assert faster.evidence == "lstm training 100,32,256,256 float32 on Fake 90, commit abc1234"


def test_as_fast_is_not_faster() -> None:
    verdict = of(row(1.0)).verdict("9.0", CALL)
    assert verdict is not None
    assert not verdict.ours


@pytest.mark.parametrize(
    "other",
    [
        {"cell": "gru"},
        {"mode": "inference"},
        {"dtype": "float16"},
        {"tf32": False},
        {"packed": True},
        {"padded": True},
        {"bidirectional": True},
        {"layers": 2},
    ],
    ids=str,
)
def test_what_has_to_agree(other: dict[str, Any]) -> None:
    assert of(row(0.5)).verdict("9.0", CALL) is not None
    assert of(row(0.5, **other)).verdict("9.0", CALL) is None


def test_another_card_says_nothing() -> None:
    assert of(row(0.5)).verdict("8.0", CALL) is None
    assert of(row(0.5), capability="8.0").verdict("8.0", CALL) is not None


def test_tanh_and_relu_are_one() -> None:
    measured = of(row(0.5, cell="rnn"))
    assert measured.verdict("9.0", CALL._replace(cell="rnn_tanh")) is not None
    assert measured.verdict("9.0", CALL._replace(cell="rnn_relu")) is not None


def test_tf32_is_of_float32_alone() -> None:
    half = CALL._replace(dtype="float16", tf32=False)
    assert of(row(0.5, dtype="float16", tf32=True)).verdict("9.0", half) is not None


@pytest.mark.parametrize(("index", "factor"), list(enumerate(choices.NEAR)))
def test_how_near_is_near(index: int, factor: int) -> None:
    measured = of(row(0.5))
    for times, near in ((factor, True), (1 / factor, True), (factor + 0.5, False), (1 / (factor + 0.5), False)):
        sizes = list(CALL.shape)
        sizes[index] = round(sizes[index] * times)
        steps, batch, inputs, hidden = sizes
        call = CALL._replace(steps=steps, batch=batch, inputs=inputs, hidden=hidden)
        assert (measured.verdict("9.0", call) is not None) == near, sizes


def test_the_nearest_shape_decides() -> None:
    measured = of(row(0.5, shape=[100, 32, 256, 256]), row(1.5, shape=[100, 64, 256, 256]))
    ours = [measured.verdict("9.0", CALL._replace(batch=batch)) for batch in (32, 40, 50, 64)]
    assert [v is not None and v.ours for v in ours] == [True, True, False, False]


def test_the_faster_path_is_taken() -> None:
    verdict = of(row(0.8), row(0.6, path="persistent"), row(1.0, path="cudnn")).verdict("9.0", CALL)
    assert verdict is not None
    assert (verdict.path, verdict.ratio) == ("persistent", 0.6)
    assert of(row(0.8), row(0.9, path="persistent")).form("9.0", CALL) == "fused"


def test_of_several_runs_the_worst_counts() -> None:
    verdict = table(record(row(0.5)), record(row(1.1), commit="def5678")).verdict("9.0", CALL)
    assert verdict is not None
    assert not verdict.ours
    assert "def5678" in verdict.evidence


def test_rows_of_cudnn_say_nothing_of_ours() -> None:
    assert of(row(0.5, path="cudnn")).verdict("9.0", CALL) is None


def test_stacks_go_by_stacks_and_their_layers_by_any() -> None:
    stack = CALL._replace(layers=3)
    measured = of(row(0.5, layers=2, path="persistent"))
    assert measured.verdict("9.0", CALL) is None
    assert measured.verdict("9.0", stack) is not None
    assert measured.form("9.0", CALL) == "persistent"
    assert Table([]).form("9.0", CALL) is None


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"tests_passed": 0}, "no test ran"),
        ({"tests_failed": 1}, "1 tests failed"),
        ({"sanitizer_errors": 2}, "2 errors of compute-sanitizer"),
    ],
    ids=str,
)
def test_a_record_that_is_not_green_chooses_nothing(given: dict[str, Any], words: str) -> None:
    measured = of(row(0.5), **given)
    assert measured.verdict("9.0", CALL) is None
    assert measured.form("9.0", CALL) is None
    assert not measured.capabilities
    (refused,) = measured.records
    assert refused.refusal == words
    assert words in str(refused)


def test_a_red_record_beside_a_green_one() -> None:
    measured = table(record(row(0.5), tests_failed=3), record(row(2.0)))
    verdict = measured.verdict("9.0", CALL)
    assert verdict is not None
    assert not verdict.ours
    assert measured.capabilities == {"9.0"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "Expecting value"),
        ("{}", "a list of records is expected, got dict"),
        ("[1]", "not subscriptable"),
        (json.dumps([{}]), "there is no 'device'"),
        (json.dumps([record(row(1, path="fastest"))]), "path 'fastest'"),
        (json.dumps([record(row(1, mode="both"))]), "mode 'both'"),
        (json.dumps([record(row(1, shape=[1, 2, 3]))]), "four sizes and two times"),
        (json.dumps([record(row(1, shape=[1, 2, 3, 0]))]), "all positive"),
        (json.dumps([record(row(0))]), "all positive"),
        (json.dumps([record(tests_failed=None)]), "must be integers, got 100, None, 0"),
        (json.dumps([record(tests_passed="100")]), "must be integers"),
    ],
)
def test_a_table_that_is_none(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=r"cuda_choices\.json") as error:
        choices.read(text)
    assert words in str(error.value)
