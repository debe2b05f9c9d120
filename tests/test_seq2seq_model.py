"""The model: attention against the formulas of the papers, padding, teacher forcing, greedy search."""

import copy
import itertools
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from pyrnnfast.seq2seq import (
    BOS,
    EOS,
    PAD,
    AdditiveAttention,
    Attention,
    DotAttention,
    GeneralAttention,
    ModelSettings,
    Seq2Seq,
    greedy,
)
from pyrnnfast.seq2seq.data import pad
from pyrnnfast.seq2seq.errors import SettingsError


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Two threads have nothing to share in models this small; they would wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


SOURCES = [[3, 4, 5, 6, 7], [8, 9], [5], [4, 4, 3, 9]]
TARGETS = [[3, 4, EOS], [5, 6, 7, 8, 3, EOS], [EOS], [8, EOS]]
VARIANTS = [
    (cell, attention, layers)
    for cell, attention, layers in itertools.product(("lstm", "gru"), ("additive", "dot", "general", "none"), (1, 2))
]


def build(cell: str = "lstm", attention: str = "general", layers: int = 1, dropout: float = 0.0) -> Seq2Seq:
    torch.manual_seed(1)
    settings = ModelSettings(
        source_size=10,
        target_size=9,
        embedding_size=5,
        hidden_size=8,
        encoder_hidden_size=4,
        encoder_layers=layers,
        decoder_layers=3 - layers,  # one of each other: neither binds the other
        cell=cell,  # type: ignore[arg-type]
        attention=attention,  # type: ignore[arg-type]
        dropout=dropout,
    )
    model = Seq2Seq(settings).double()
    with torch.no_grad():  # far from the small initial weights, so that a wrong step would be seen
        for parameter in model.parameters():
            parameter.mul_(3.0)
    return model


def loss_sum(model: Seq2Seq, source: Tensor, lengths: Tensor, target: Tensor) -> Tensor:
    logits = model(source, lengths, target).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=PAD, reduction="sum")


# Attention


@torch.no_grad()
def naive(attention: Attention, query: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
    """One sentence without padding, a query [Q] and annotations [S, M], position by position."""
    scores = []
    for annotation in memory:
        if isinstance(attention, DotAttention):
            score = sum(float(a) * float(b) for a, b in zip(query, annotation, strict=True))
        elif isinstance(attention, GeneralAttention):
            score = float(query @ (attention.key.weight @ annotation))
        elif isinstance(attention, AdditiveAttention):
            inner = attention.query.weight @ query + attention.key.weight @ annotation
            score = sum(float(v) * math.tanh(float(x)) for v, x in zip(attention.energy.weight[0], inner, strict=True))
        scores.append(score)
    total = sum(math.exp(score) for score in scores)
    weights = torch.tensor([math.exp(score) / total for score in scores], dtype=torch.float64)
    return (weights.unsqueeze(1) * memory).sum(0), weights


@pytest.mark.parametrize("kind", [DotAttention, GeneralAttention, AdditiveAttention])
def test_attention_is_the_formula(kind: type[Attention]) -> None:
    torch.manual_seed(0)
    attention = kind(6, 6).double()  # type: ignore[call-arg]
    lengths = torch.tensor([4, 1, 3])
    annotations, query = torch.randn(3, 4, 6, dtype=torch.float64), torch.randn(3, 6, dtype=torch.float64)
    context, weights = attention(query, attention.prepare(annotations, lengths))
    for row, length in enumerate(lengths.tolist()):
        expected_context, expected_weights = naive(attention, query[row], annotations[row, :length])
        torch.testing.assert_close(context[row], expected_context)
        torch.testing.assert_close(weights[row, :length], expected_weights)
        assert (weights[row, length:] == 0).all()


@pytest.mark.parametrize("kind", [DotAttention, GeneralAttention, AdditiveAttention])
def test_attention_gradients(kind: type[Attention]) -> None:
    torch.manual_seed(0)
    attention = kind(3, 3).double()  # type: ignore[call-arg]
    lengths = torch.tensor([3, 2])
    annotations = torch.randn(2, 3, 3, dtype=torch.float64, requires_grad=True)
    query = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, q: attention(q, attention.prepare(a, lengths)), (annotations, query))


@pytest.mark.parametrize("kind", [DotAttention, GeneralAttention, AdditiveAttention])
def test_attention_never_touches_padding(kind: type[Attention]) -> None:
    attention = kind(4, 4)  # type: ignore[call-arg]
    annotations = torch.randn(2, 3, 4)
    annotations[1, 1:] = torch.nan
    annotations.requires_grad_()
    context, _ = attention(torch.randn(2, 4), attention.prepare(annotations, torch.tensor([3, 1])))
    context.sum().backward()
    assert annotations.grad is not None
    assert annotations.grad.isfinite().all()
    assert (annotations.grad[1, 1:] == 0).all()
    assert all(parameter.grad.isfinite().all() for parameter in attention.parameters() if parameter.grad is not None)


def test_dot_attention_needs_equal_sizes() -> None:
    with pytest.raises(ValueError, match="128 is not 256"):
        DotAttention(128, 256)
    with pytest.raises(ValueError, match="dot attention needs"):
        Seq2Seq(ModelSettings(10, 10, attention="dot"))


# Padding


@pytest.mark.parametrize(("cell", "attention", "layers"), VARIANTS)
def test_padding_changes_nothing(cell: str, attention: str, layers: int) -> None:
    """A batch with more padding than it needs, and poison where padding is looked up: values and gradients."""
    model = build(cell, attention, layers)
    loss = torch.zeros((), dtype=torch.float64)
    rows = []
    for source, target in zip(SOURCES, TARGETS, strict=True):  # each sentence alone needs no padding
        batch = (torch.tensor([source]), torch.tensor([len(source)]), torch.tensor([target]))
        rows.append(model(*batch).logits[0])
        loss = loss + loss_sum(model, *batch)
    expected = torch.autograd.grad(loss, list(model.parameters()))

    source, lengths = pad(SOURCES)
    target, target_lengths = pad(TARGETS)
    source, target = nn.functional.pad(source, (0, 3)), nn.functional.pad(target, (0, 2))
    with torch.no_grad():
        model.encoder.embedding.weight[PAD] = torch.nan
        model.decoder.embedding.weight[PAD] = torch.nan
    logits = model(source, lengths, target).logits
    for row, length in enumerate(target_lengths.tolist()):
        torch.testing.assert_close(logits[row, :length], rows[row][:length], rtol=1e-10, atol=1e-10)
    padded_loss = loss_sum(model, source, lengths, target)
    torch.testing.assert_close(padded_loss, loss, rtol=1e-10, atol=1e-10)
    actual = torch.autograd.grad(padded_loss, list(model.parameters()))
    for (name, _), a, e in zip(model.named_parameters(), actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-8, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")


def test_what_stands_behind_a_sentence_is_not_read() -> None:
    model = build()
    source, lengths = pad(SOURCES)
    target, _ = pad(TARGETS)
    other = source.clone()
    other[1, 2:] = 7
    assert torch.equal(model(source, lengths, target).logits, model(other, lengths, target).logits)


def test_annotations_are_zero_behind_the_end_and_the_summary_is_both_last_states() -> None:
    model = build(layers=2)
    source, lengths = pad(SOURCES)
    annotations, summary = model.encoder(source, lengths)
    for row, length in enumerate(lengths.tolist()):
        assert (annotations[row, length:] == 0).all()
        forward, backward = annotations[row, length - 1, :4], annotations[row, 0, 4:]
        torch.testing.assert_close(summary[row], torch.cat((forward, backward)))


def test_an_empty_sentence_is_refused() -> None:
    with pytest.raises(RuntimeError, match="greater than 0"):
        build()(torch.zeros(2, 3, dtype=torch.long), torch.tensor([3, 0]), torch.tensor([[EOS], [EOS]]))


# Gradients


@pytest.mark.parametrize(("cell", "attention", "layers"), VARIANTS)
def test_every_parameter_learns(cell: str, attention: str, layers: int) -> None:
    model = build(cell, attention, layers)
    source, lengths = pad(SOURCES)
    target, _ = pad(TARGETS)
    loss_sum(model, source, lengths, target).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


def test_gradient_is_the_slope() -> None:
    model = build("gru", "additive")
    source, lengths = pad(SOURCES)
    target, _ = pad(TARGETS)
    loss = loss_sum(model, source, lengths, target)
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(loss, parameters)
    torch.manual_seed(5)
    directions = [torch.randn_like(parameter) for parameter in parameters]
    slope = sum(float((g * d).sum()) for g, d in zip(gradients, directions, strict=True))
    losses = []
    for sign in (1, -2):  # from + epsilon to - epsilon
        with torch.no_grad():
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter.add_(direction, alpha=sign * 1e-6)
        losses.append(loss_sum(model, source, lengths, target).item())
    assert (losses[0] - losses[1]) / 2e-6 == pytest.approx(slope, rel=1e-5)


def test_every_recurrence_is_ours() -> None:
    import pyrnnfast

    for cell in ("lstm", "gru"):
        recurrences = [m for m in build(cell).modules() if isinstance(m, nn.RNNBase | nn.RNNCellBase)]
        assert len(recurrences) == 3  # the encoder's layers are one module, the decoder's two cells each one
        ours = (pyrnnfast.LSTM, pyrnnfast.GRU, pyrnnfast.LSTMCell, pyrnnfast.GRUCell)
        assert all(type(m) in ours for m in recurrences)


# Teacher forcing


def fed(model: Seq2Seq, monkeypatch: pytest.MonkeyPatch, target: Tensor, ratio: float, own: int) -> Tensor:
    """What the decoder was fed [B, T], where the model's own output is always ``own``."""
    seen: list[Tensor] = []
    embed = model.decoder.embed
    monkeypatch.setattr(model.decoder, "embed", lambda symbols: (seen.append(symbols), embed(symbols))[1])
    monkeypatch.setattr(model, "best", lambda output: torch.full((output.size(0),), own))
    rows = target.size(0)
    model(torch.full((rows, 2), 3), torch.full((rows,), 2), target, ratio)
    return seen[0].t() if ratio == 1.0 else torch.stack(seen, 1)


def test_total_teacher_forcing_feeds_the_target(monkeypatch: pytest.MonkeyPatch) -> None:
    target, _ = pad(TARGETS)
    shown = fed(build(), monkeypatch, target, 1.0, own=8)
    assert (shown[:, 0] == BOS).all()
    expected = target[:, :-1].masked_fill(target[:, :-1] == PAD, EOS)
    assert torch.equal(shown[:, 1:], expected)


def test_no_teacher_forcing_feeds_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    target, _ = pad(TARGETS)
    shown = fed(build(), monkeypatch, target, 0.0, own=8)
    assert (shown[:, 0] == BOS).all()
    assert (shown[:, 1:] == 8).all()


def test_teacher_forcing_is_drawn_for_each_token(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    rows, steps, ratio = 60, 61, 0.7
    target = torch.full((rows, steps), 3)
    taught = (fed(build(), monkeypatch, target, ratio, own=8)[:, 1:] == 3).double()  # [60, 60]
    assert taught.mean() == pytest.approx(ratio, abs=0.04)  # five standard deviations of 3600 draws
    # Were a whole row or a whole step drawn at once, its count would be 0 or 60.
    deviation = math.sqrt(60 * ratio * (1 - ratio))
    for counts in (taught.sum(0), taught.sum(1)):
        assert counts.std() == pytest.approx(deviation, rel=0.4)


@pytest.mark.parametrize("attention", ["general", "none"])
def test_free_running_is_greedy(attention: str) -> None:
    model = build(attention=attention)
    source, lengths = pad(SOURCES)
    found = greedy(model, source, lengths, 7)
    logits = model(source, lengths, torch.full((4, found.symbols.size(1)), 3), teacher_forcing=0.0).logits
    logits[..., (PAD, BOS)] = -torch.inf
    best = logits.argmax(2)
    alive = found.symbols != PAD
    assert torch.equal(best[alive], found.symbols[alive])


def test_teacher_forcing_must_be_a_probability() -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        build()(torch.tensor([[3]]), torch.tensor([1]), torch.tensor([[EOS]]), 1.5)


# Greedy search


def scripted(monkeypatch: pytest.MonkeyPatch, script: list[list[int]]) -> Seq2Seq:
    model = build()
    steps = iter(torch.tensor(script).t())
    monkeypatch.setattr(model, "best", lambda output: next(steps))
    return model


def test_greedy_ends_each_row_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    model = scripted(monkeypatch, [[3, EOS, 4, 5, 5], [4, 5, 6, EOS, 5]])
    found = greedy(model, torch.tensor([[3, 4], [5, 6]]), torch.tensor([2, 2]), 10)
    # The script has five steps and the limit is ten: it stopped after four because both rows had ended.
    assert found.symbols.tolist() == [[3, EOS, PAD, PAD], [4, 5, 6, EOS]]


def test_greedy_stops_at_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    model = scripted(monkeypatch, [[3] * 9])
    assert greedy(model, torch.tensor([[3]]), torch.tensor([1]), 6).symbols.tolist() == [[3] * 6]
    with pytest.raises(ValueError, match="at least 1"):
        greedy(model, torch.tensor([[3]]), torch.tensor([1]), 0)


@pytest.mark.parametrize(("cell", "attention"), [("lstm", "additive"), ("gru", "dot"), ("lstm", "none")])
def test_greedy_does_not_depend_on_the_batch(cell: str, attention: str) -> None:
    model = build(cell, attention)
    source, lengths = pad(SOURCES)
    together = greedy(model, source, lengths, 8)
    for row, sentence in enumerate(SOURCES):
        alone = greedy(model, torch.tensor([sentence]), torch.tensor([len(sentence)]), 8)
        steps = alone.symbols.size(1)
        assert together.symbols[row, :steps].tolist() == alone.symbols[0].tolist()
        assert (together.symbols[row, steps:] == PAD).all()
        if together.attention is not None and alone.attention is not None:
            torch.testing.assert_close(together.attention[row, :steps, : len(sentence)], alone.attention[0])


def test_the_decoder_is_luongs_with_input_feeding() -> None:
    """From torch's cell and the formulas of sections 3 and 3.3, with W_c applied to [c_t; h_t] as it stands there."""
    model = build("lstm", "general", layers=2)  # the decoder has one layer then
    decoder = model.decoder
    cell = copy.deepcopy(decoder.cells[0])
    cell.__class__ = nn.LSTMCell
    assert decoder.context is not None
    assert decoder.state is not None
    assert isinstance(decoder.attention, GeneralAttention)
    w_c = torch.cat((decoder.context.weight, decoder.state.weight), 1)
    for source, target in zip(SOURCES, TARGETS, strict=True):
        batch = (torch.tensor([source]), torch.tensor([len(source)]), torch.tensor([target]))
        annotations, summary = model.encoder(*batch[:2])
        h, c = torch.tanh(decoder.bridge(summary[0])).chunk(2)
        output = torch.zeros(8, dtype=torch.float64)
        expected = []
        for last in [BOS, *target[:-1]]:
            h, c = cell(torch.cat((decoder.embedding.weight[last], output)), (h, c))
            context, _ = naive(decoder.attention, h, annotations[0])
            output = torch.tanh(w_c @ torch.cat((context, h)) + decoder.state.bias)
            expected.append(model.softmax_weights(output))
        torch.testing.assert_close(model(*batch).logits[0], torch.stack(expected))


def test_the_best_symbol_is_one_to_write() -> None:
    model = build()
    with torch.no_grad():
        model.softmax_weights.bias[[PAD, BOS]] = 1e6
    assert not set(model.best(torch.randn(20, 8, dtype=torch.float64)).tolist()) & {PAD, BOS}


# Settings


@pytest.mark.parametrize(
    "wrong",
    [
        {"hidden_size": 0},
        {"embedding_size": 2.5},
        {"encoder_layers": True},
        {"cell": "rnn"},
        {"attention": "multihead"},
        {"dropout": 1.0},
        {"dropout": "0.1"},
    ],
)
def test_settings_that_make_no_sense(wrong: dict[str, object]) -> None:
    with pytest.raises(SettingsError, match=next(iter(wrong))):
        ModelSettings(**{"source_size": 10, "target_size": 10, **wrong})  # type: ignore[arg-type]


def test_dropout_draws_in_training_alone() -> None:
    model = build(dropout=0.5)
    batch = (torch.tensor([[3, 4]]), torch.tensor([2]), torch.tensor([[3, 4, EOS]]))
    assert not torch.equal(model(*batch).logits, model(*batch).logits)
    model.eval()
    assert torch.equal(model(*batch).logits, model(*batch).logits)
