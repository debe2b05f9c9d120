"""The benchmark itself: which rows it has, how it computes limits, what it records. No times are asserted."""

import functools
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import pyrnnfast
from benchmarks import __main__ as benchmark
from benchmarks import anywhere, crowd, files, loops, memory, plot, prepacked, record, rows, served, table, targets
from benchmarks.limits import limit
from benchmarks.machine import Machine
from benchmarks.rows import Row
from benchmarks.timing import Watch, turn_by_turn, undisturbed


class Fake:
    """A machine with round figures."""

    def peak(self, threads: int, dtype: str) -> float:
        return 1000.0 * threads

    def read(self, threads: int, size: int) -> float:
        return 100.0 * threads

    def write(self, threads: int, size: int) -> float:
        return 50.0 * threads

    def activation(self, name: str) -> float:
        return {"sigmoid": 0.25, "tanh": 0.5}[name]

    def multiplication(self) -> float:
        return 0.125


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty directory, with a machine known beforehand."""
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    for name in ("peak", "read", "write", "activation", "multiplication"):
        monkeypatch.setattr(Machine, name, getattr(Fake, name))
    return tmp_path


TINY = ["--shape", "2,1,8,8", "--seconds", "0.01"]


def run(*arguments: str) -> dict[str, Any]:
    assert benchmark.main([*TINY, *arguments, "--out", "tiny"]) == 0
    return record.load("tiny")


def full_table() -> list[Row]:
    return list(rows.table(rows.KINDS, list(rows.CELLS), rows.MODES, None, [1, 2], list(rows.DTYPES)))


def test_the_table_has_every_row() -> None:
    table = full_table()
    assert len(set(table)) == len(table)
    assert len(rows.SHAPES["layer"]) == 10
    for cell in ("lstm", "gru", "rnn"):
        for mode in ("inference", "training"):
            for threads in (1, 2):
                mine = [r for r in table if (r.cell, r.mode, r.threads, r.dtype) == (cell, mode, threads, "float32")]
                shapes = {kind: {r.shape for r in mine if r.kind == kind} for kind in rows.KINDS}
                assert len(shapes["layer"]) == 10
                assert shapes["stacked"] == {(100, 16, 256, 256)}
                assert shapes["packed"] == {(200, b, h, h) for b in (8, 64) for h in (64, 256)}
                assert {s[:2] for s in shapes["cell"]} == {(1, 1), (1, 32)}
                assert {s[0] for s in shapes["streaming"]} == ({1} if mode == "inference" else set())
                assert len(shapes["projected"]) == (4 if cell == "lstm" else 0)


def test_packed_rows_are_ragged() -> None:
    for row in (r for r in full_table() if r.kind == "packed"):
        assert row.lengths == sorted(row.lengths, reverse=True)
        assert row.lengths[0] == row.shape[0]
        assert len(set(row.lengths)) == row.shape[1]
        assert sum(row.batch_sizes) == sum(row.lengths)
        assert set(row.batch_sizes) == set(range(1, row.shape[1] + 1))


@pytest.mark.parametrize(("kind", "cell", "mode"), sorted({(row.kind, row.cell, row.mode) for row in full_table()}))
def test_both_sides_agree(kind: str, cell: str, mode: str) -> None:
    row = Row(kind, cell, mode, (1 if kind in ("cell", "streaming") else 5, 3, 4, 6), 1)
    with torch.set_grad_enabled(mode == "training"):
        sides = rows.sides(row)
        for _ in range(3):  # streaming carries its state on
            assert benchmark.verify(row, sides) < 1e-5


def test_a_difference_ends_the_run() -> None:
    row = Row("layer", "gru", "inference", (2, 1, 3, 3), 1)
    one = torch.ones(3)
    with pytest.raises(SystemExit, match="differ"):
        benchmark.verify(row, {"torch": lambda: [one], "ours": lambda: [one * 1.01]})
    with pytest.raises(SystemExit, match="differ"):
        benchmark.verify(row, {"torch": lambda: [one], "ours": lambda: [one * torch.nan]})


def test_limit_of_inference() -> None:
    # 10 rows, 4 gates, I = 3, H = 5; 8 of the rows follow on a state.
    row = Row("layer", "lstm", "inference", (5, 2, 3, 5), 1)
    to_gates = max(2 * 10 * 20 * 3 / 1000, 20 * 3 * 4 / 100)
    step = max(2 * 2 * 20 * 5 / 1000, 20 * 5 * 4 / 100)  # reading the weights takes longer than the product
    pointwise = 10 * 5 * (3 * 0.25 + 2 * 0.5)
    assert limit(row, Fake()) == pytest.approx(to_gates + 4 * step + pointwise)
    # Twice the threads, half of everything.
    assert limit(Row("layer", "lstm", "inference", (5, 2, 3, 5), 2), Fake()) == pytest.approx(limit(row, Fake()) / 2)


def test_limit_of_training() -> None:
    row = Row("layer", "gru", "training", (5, 200, 3, 5), 1)  # so large a batch that no product waits for the weights
    products = 2 * 15 * (1000 * 3 + 800 * 5) / 1000
    pointwise = 1000 * 5 * (2 * 0.25 + 0.5 + 3 * 0.125)
    saved = 1000 * 4 * 5 * 4
    assert limit(row, Fake()) == pytest.approx(3 * products + pointwise + saved / 50 + saved / 100)


def test_limit_of_packed_stacked_and_single_steps() -> None:
    # Ragged: lengths 4 and 2, so batches of 2, 2, 1, 1.
    packed = Row("packed", "rnn", "inference", (4, 2, 3, 5), 1)
    assert packed.batch_sizes == [2, 2, 1, 1]
    weights = 5 * 5 * 4 / 100
    assert limit(packed, Fake()) == pytest.approx(5 * 3 * 4 / 100 + 3 * weights + 6 * 5 * 0.5)
    # A first step has a recurrent product only where it is given a state.
    fresh, fed = (limit(Row(kind, "rnn", "inference", (1, 2, 3, 5), 1), Fake()) for kind in ("layer", "streaming"))
    assert fed - fresh == pytest.approx(weights)
    # Two directions of the layer below feed each direction of the layer above.
    one, two = (limit(Row(kind, "rnn", "inference", (2, 1, 10, 5), 1), Fake()) for kind in ("layer", "stacked"))
    assert two == pytest.approx(4 * one)
    # h of 3 columns instead of 6, and a product more at each step.
    row = Row("projected", "lstm", "inference", (2, 1, 5, 6), 1)
    products = (max(2 * 2 * 24 * 5 / 1000, 24 * 5 * 4 / 100), 24 * 3 * 4 / 100, 3 * 6 * 4 / 100, 3 * 6 * 4 / 100)
    assert limit(row, Fake()) == pytest.approx(sum(products) + 2 * 6 * (3 * 0.25 + 2 * 0.5))


def test_record_of_a_tiny_run(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recorded = run("--runs", "2")
    text = (results / "tiny.json").read_text()
    assert json.loads(text) == recorded
    assert {"machine", "versions", "commit", "date", "settings", "allocator", "measured", "rows"} <= set(recorded)
    assert {"processor", "cores", "instruction_set"} == set(recorded["machine"])
    assert recorded["versions"]["torch"] == torch.__version__
    assert set(recorded["allocator"]) == {"libc", "environment"}
    assert recorded["settings"]["seconds"] == 0.01
    assert len(recorded["rows"]) == 2 * 3 * 2  # runs, cells, modes; one number of threads under test
    for row in recorded["rows"]:
        assert (row["kind"], row["shape"], row["threads"], row["dtype"]) == ("layer", [2, 1, 8, 8], 1, "float32")
        assert row["cell"] in rows.CELLS and row["mode"] in rows.MODES and row["path"] == "fused"
        assert row["ours_ms"] > 0 and row["torch_ms"] > 0 and row["limit_ms"] > 0
        assert (
            row["rounds"] >= 5 and row["run"] in (1, 2) and row["error"] < 1e-5 and isinstance(row["disturbed"], bool)
        )
    printed = capsys.readouterr().out
    assert "run 2 of 2" in printed and "LSTM inference" in printed and "6 rows" in printed


def test_comparisons_of_special_rows(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    single = run("--cell", "lstm", "--shape", "1,1,8,8", "--runs", "1", "--mode", "inference")["rows"]
    assert ["torch_cell_ms" in row for row in single] == [False, True]
    assert "× nn.LSTMCell" in capsys.readouterr().out
    (ragged,) = run("--kind", "packed", "--cell", "lstm", "--mode", "training", "--runs", "1")["rows"]
    assert ragged["dense_ms"] > 0
    assert "× dense steps" in capsys.readouterr().out


def test_a_row_that_is_not_fused_ends_the_run(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pyrnnfast, "explain", lambda *_: pyrnnfast.Explanation("torch", "for a test"))
    with pytest.raises(SystemExit, match="not fused but torch: for a test"):
        run()
    assert not list(results.iterdir())


def test_held_to_an_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[tuple[list[str], dict[str, str]]] = []

    def execve(path: str, command: list[str], environment: dict[str, str]) -> None:
        started.append((command, environment))
        raise SystemExit

    monkeypatch.setattr(os, "execve", execve)
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    with pytest.raises(SystemExit):
        benchmark.main(["--isa", "avx2", *TINY])
    ((command, environment),) = started
    assert command[1:] == ["-m", "benchmarks", "--isa", "avx2", *TINY]
    assert environment.items() >= benchmark.HELD_TO["avx2"].items()


def test_bad_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--shape", "1,2,3"], ["--shape", "1,0,3,4"], ["--shape", "a,b,c,d"], ["--cell", "elman"]):
        with pytest.raises(SystemExit, match="2"):
            benchmark.main(arguments)
    assert "expected T,B,I,H" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="T = 1"):
        benchmark.main(["--kind", "cell", "--shape", "2,1,8,8"])


def entry(**changes: Any) -> record.Entry:
    values: dict[str, Any] = {
        "kind": "layer",
        "cell": "lstm",
        "mode": "inference",
        "shape": [100, 16, 128, 128],
        "threads": 1,
        "dtype": "float32",
        "run": 1,
        "path": "fused",
        "ours_ms": 1.0,
        "torch_ms": 2.0,
        "limit_ms": 0.9,
        "ours_first_ms": 1.0,
        "torch_first_ms": 1.5,
        "error": 0.0,
        "rounds": 5,
        "disturbed": False,
    }
    return values | changes  # type: ignore[return-value]


def test_a_row_counts_in_the_better_of_its_runs() -> None:
    slow, fast = entry(torch_ms=0.8, limit_ms=0.5), entry(torch_ms=1.25, limit_ms=0.5, run=2)
    (judged,) = targets.judge([slow, fast])
    assert judged.ratio == pytest.approx(1.0)
    assert judged.first_ratio == pytest.approx(1.5)
    speed, distance = judged.aims
    assert speed.met and speed.value == 1.25
    assert not distance.met and distance.value == 2.0
    assert not judged.met


def test_what_a_row_would_win_at_its_limit() -> None:
    runs = [entry(ours_ms=ours, torch_ms=2.0, limit_ms=0.5) for ours in (0.8, 1.25)]
    (judged,) = targets.judge(runs)
    assert judged.ratio == pytest.approx(2.0) and judged.ratio_at_limit == pytest.approx(4.0)
    (step,) = targets.judge([run | {"shape": [1, 1, 128, 128]} for run in runs])
    assert step.ratio_at_limit == step.ratio == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("shape", "threads", "target"),
    [
        ([100, 16, 128, 128], 1, 1.25),
        ([100, 1, 128, 128], 1, 1.3),
        ([100, 1, 128, 128], 2, 1.5),
        ([500, 128, 64, 64], 2, 1.4),
        ([1, 1, 128, 128], 1, None),
        ([200, 8, 256, 256], 1, None),
    ],
)
def test_targets_of_distances(shape: list[int], threads: int, target: float | None) -> None:
    assert targets.distance_target(entry(shape=shape, threads=threads)) == target


def test_targets_of_special_rows() -> None:
    step = entry(shape=[1, 1, 128, 128], torch_cell_ms=3.0)
    assert [(aim.target, aim.met) for aim in targets.aims(step)] == [(5.0, False), (1.0, True)]
    for cell in rows.CELLS:
        (aim,) = targets.aims(entry(cell=cell, mode="training", shape=[1, 1, 128, 128]))
        assert aim.target == 1.0
    ragged = entry(
        kind="packed", mode="training", shape=[200, 8, 64, 64], torch_ms=9.0, dense_ms=0.8, ours_beside_dense_ms=1.0
    )
    assert [(aim.target, aim.met) for aim in targets.aims(ragged)] == [(8.0, True), (1.15, False), (1.4, True)]


def test_table_and_picture(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entries = [
        entry(cell=cell, mode=mode, shape=list(shape), threads=threads, torch_ms=torch_ms)
        for cell in rows.CELLS
        for mode in rows.MODES
        for shape in rows.SHAPES["layer"]
        for threads, torch_ms in ((1, 0.5), (2, 6.0))
    ]
    entries.append(entry(kind="packed", shape=[200, 8, 64, 64]))
    record.save("made_up", record.origin({"threads": [1, 2]}) | {"rows": entries})
    assert table.main(["made_up"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("|") for line in lines) == 2 + 10 + 1
    assert any(line.startswith("| 100,16,128,128 | 0.50 (1.11) ° / 6.00 (1.11) |") for line in lines)
    assert any(line.startswith("| 200,8,64,64 packed | 2.00 (1.11) | – |") for line in lines)
    assert plot.main(["made_up"]) == 0
    picture = results / "made_up.png"
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size < 200_000


def test_sides_take_turns_in_going_first() -> None:
    called: list[str] = []
    sides = {name: lambda name=name: called.append(name) for name in "ab"}  # type: ignore[misc]
    times = turn_by_turn(sides, seconds=0, least=3)
    assert "".join(called) == "ab" + "aabb" + "bbaa" + "aabb"
    assert times.rounds == 3 and set(times.medians) == set(times.first) == {"a", "b"}


def test_the_second_call_of_a_turn_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([1.0, 2.0] * 10)
    monkeypatch.setattr("benchmarks.timing.seconds_of", lambda fn: next(seconds))
    times = turn_by_turn({"a": list, "b": list}, seconds=0, least=5)
    assert times.medians == {"a": 2.0, "b": 2.0} and times.first == {"a": 1.0, "b": 1.0}


def test_a_disturbed_measurement_is_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Watch(1)
    assert watch.seconds_to_meet() > 0
    answers = iter([True, False, True, True])
    monkeypatch.setattr(watch, "steady", lambda: next(answers))
    monkeypatch.setattr("benchmarks.timing._cpu_seconds_of_others", lambda: 0.0)
    attempts = iter("abc")
    assert undisturbed(lambda: next(attempts), 1, watch) == ("b", False)
    monkeypatch.setattr(watch, "steady", lambda: True)
    monkeypatch.setattr("benchmarks.timing._cpu_seconds_of_others", iter(range(0, 10**6, 1000)).__next__)
    attempts = iter("abc")
    assert undisturbed(lambda: next(attempts), 1, watch) == ("c", True)


def test_cores_that_stand_elsewhere_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    near, far = 5e-8, 3e-7

    def watch(meetings: list[float], **options: Any) -> Watch:
        answers = iter(meetings)
        monkeypatch.setattr(Watch, "seconds_to_meet", lambda _: next(answers))
        monkeypatch.setattr(Watch, "steady", lambda _: True)
        return Watch(2, **options)

    assert watch([near, far, far, near]).wait()
    # Cores that have always stood apart know no better.
    begins_apart = watch([far, far, near, far, near])
    assert begins_apart.wait() and begins_apart.wait() and begins_apart.wait()
    assert watch([near, near, near, far], apart=True).wait()
    patience = watch([near, *[far] * 9], patience=0.15)
    assert not patience.wait()
    assert patience.patience <= 0
    # What has no patience left is not tried again.
    attempts = iter("ab")
    assert undisturbed(lambda: next(attempts), 1, patience) == ("a", True)
    assert not watch([near, far]).all_is_well()


def test_rows_timed_before_near_cores_were_seen_are_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([3e-7, 3e-7, 5e-8])
    monkeypatch.setattr(Watch, "seconds_to_meet", lambda _: next(answers))
    watches = {2: Watch(2)}
    assert watches[2].stands_right() and watches[2].stands_right()
    entries: Any = [{"threads": 2, "meeting_us": us, "disturbed": False} for us in (0.3, 0.05)]
    entries.append({"threads": 1, "disturbed": False})
    benchmark.mark(entries, watches)
    assert [e["disturbed"] for e in entries] == [True, False, False]


@pytest.mark.parametrize(
    "value", [{}, {"rows": []}, {"a": {"b": [1, {}]}, "rows": [{"x": 1, "y": [2, 3]}, {}], "n": None}]
)
def test_each_row_of_a_record_has_a_line(value: dict[str, Any]) -> None:
    text = files.text(value)
    assert json.loads(text) == value and list(json.loads(text)) == list(value)
    lines = text.splitlines()
    assert all(f"  {json.dumps(row)}" in [line.rstrip(",") for line in lines] for row in value.get("rows", ()))


def test_a_single_core_stands_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Watch(1)
    monkeypatch.setattr(Watch, "seconds_to_meet", lambda _: 1.0)
    assert watch.stands_right()


def test_the_machine_is_measured_once() -> None:
    machine = Machine()
    first = machine.read(1, 1 << 16)
    assert first > 0 and machine.read(1, 1 << 16) == first
    assert machine.write(1, 1 << 16) > 0
    assert machine.activation("tanh") > 0 and machine.multiplication() > 0
    assert len(machine.measured) == 4


def test_memory_of_a_training_step() -> None:
    # In processes of their own. The gradients alone are 2·4·200·200 numbers of 4 bytes.
    row = Row("layer", "lstm", "training", (10, 4, 200, 200), 1)
    for side in ("ours", "torch"):
        assert memory._peak_elsewhere(row, side) > 1_280_000


def test_random_calls(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert anywhere.main(["--calls", "8", "--seed", "3", "--seconds", "0", "--out", "few"]) == 0
    calls = record.load("few")["calls"]
    assert len(calls) == 8
    assert all(c["ours_ms"] > 0 and c["torch_ms"] > 0 for c in calls)
    assert capsys.readouterr().out.startswith("8 calls, ")


def test_the_same_seed_draws_the_same_calls() -> None:
    first, again, other = (list(zip(range(50), anywhere.draw(seed, 2), strict=False)) for seed in (3, 3, 4))
    assert first == again != other


def test_a_random_call_that_is_wrong_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    both = anywhere.sides

    def wrong(call: anywhere.Call) -> Any:
        found = both(call)
        return found | {"ours": lambda: [2 * t + 1 for t in found["ours"]()]}

    monkeypatch.setattr(anywhere, "sides", wrong)
    with pytest.raises(SystemExit, match=r"ours and torch differ by .*; nothing timed"):
        anywhere.measure(next(anywhere.draw(3, 2)), Watch(1), 0)


def test_a_random_call_of_a_narrow_dtype_is_compared_with_float32() -> None:
    """torch.nn's own sums of so many rounded gradients are far off."""
    options: dict[str, Any] = {"num_layers": 3, "bidirectional": False, "batch_first": False, "bias": True}
    call = anywhere.Call("rnn", "training", "batch", (469, 3, 16, 96), "bfloat16", 1, False, options)
    both = anywhere.sides(call)
    theirs, true = both["torch"](), both["true"]()
    assert max(map(benchmark.difference, theirs, true)) > benchmark.TOLERANCE["bfloat16"]
    anywhere.verify(call, both)
    assert list(both) == ["ours", "torch"]


def test_loops(results: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(loops, "SIZES", ((2, 8),))
    monkeypatch.setattr(sys, "argv", ["loops", "--steps", "3", "--seconds", "0", "--threads", "1", "--out", "few"])
    loops.main()
    rows = record.load("few")["rows"]
    assert len(rows) == 3 * 2 * 2 == len(capsys.readouterr().out.splitlines()) - 1
    assert all(r["ours_ms"] > 0 and r["torch_ms"] > 0 and r["path"] == "fused" for r in rows)
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--compiled"])
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    loops.main()
    rows = record.load("few")["rows"]
    assert len(rows) == 3 * 2
    assert all(r["ours_ms"] > 0 and r["eager_ms"] > 0 and r["path"] == "compiled" for r in rows)
    with pytest.raises(SystemExit, match="differs"):
        loops.check([torch.ones(2)], [torch.zeros(2)], "float32", "this")


def test_crowd(results: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(crowd, "CROWDS", (crowd.Crowd(1, 1, 1), crowd.Crowd(2, 2), crowd.Crowd(1, 1, callers=3)))
    few = ["--seconds", "0", "--rounds", "1", "--cell", "gru", "--shape", "3,2,8,8", "--out", "few"]
    assert crowd.main(few) == 0
    rows = record.load("few")["rows"]
    assert [(r["processes"], r["threads"], r["busy"], r["mode"]) for r in rows] == [
        (1, 1, 1, "inference"), (1, 1, 1, "training"),
        (2, 2, 0, "inference"), (2, 2, 0, "training"),
        (1, 1, 0, "inference"), (1, 1, 0, "training"),
    ]  # fmt: skip
    assert [r["callers"] for r in rows] == [1, 1, 1, 1, 3, 3]
    assert all(r["ours_calls"] > 0 and r["torch_calls"] > 0 for r in rows)
    printed = capsys.readouterr().out
    assert "1 process(es) of 1 threads, 1 busy programs" in printed
    assert "1 process(es) of 3 callers of 1 threads\n" in printed


def test_crowd_ends_with_a_process_that_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "true")
    with pytest.raises(SystemExit, match="ended before its time"):
        crowd.measure(Row("layer", "gru", "inference", (3, 2, 8, 8), 1), crowd.Crowd(1, 1), 0, 1)


def test_served(results: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    few = ["--seconds", "0", "--rounds", "1", "--threads", "1", "--shape", "3,2,5,8", "--out", "few"]
    assert served.main(few) == 0
    rows = record.load("few")["rows"]
    assert [r["cell"] for r in rows] == ["lstm", "gru", "rnn"]
    assert all(r[f"{side}_ms"] > 0 for r in rows for side in served.SIDES)
    assert "gru: ONNX Runtime takes" in capsys.readouterr().out
    monkeypatch.setitem(served.GATES, "lstm", [0, 1, 2, 3])
    with pytest.raises(SystemExit, match="nothing timed"):
        served.main([*few, "--cell", "lstm"])


def test_prepacked(results: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepacked, "SIZES", (8,))
    few = ["--seconds", "0", "--threads", "1", "--cell", "gru", "--dtype", "bfloat16", "--out", "few"]
    prepacked.main(few)
    rows = record.load("few")["rows"]
    assert [(r["kind"], *r["shape"][:2]) for r in rows] == list(prepacked.CALLS)
    assert all(r["ours_ms"] > 0 and r["prepacked_ms"] > 0 and r["torch_ms"] > 0 for r in rows)
    assert "gru: geometric means, else" in capsys.readouterr().out
    monkeypatch.setattr(prepacked, "difference", lambda a, b: float("nan"))
    with pytest.raises(SystemExit, match="nothing timed"):
        prepacked.main(few)
