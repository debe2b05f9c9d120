"""Vocabularies, the dictionary and its split, batches, and the scorer."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pyrnnfast.seq2seq import BOS, EOS, PAD, UnknownSymbolError, Vocabulary, dictionary
from pyrnnfast.seq2seq.data import BucketSampler, PairDataset
from pyrnnfast.seq2seq.dictionary import DictionaryError
from pyrnnfast.seq2seq.metrics import error_rates, nearest

# Vocabulary


def test_vocabulary_goes_there_and_back() -> None:
    vocabulary = Vocabulary.of(["cab", "bad"])
    assert vocabulary.symbols == ("a", "b", "c", "d")
    assert len(vocabulary) == 7
    assert vocabulary.encode("dab") == [6, 3, 4]
    assert vocabulary.decode([BOS, 6, 3, PAD, 4, EOS, 5]) == ["d", "a", "b"]
    assert vocabulary == Vocabulary("abcd") != Vocabulary("abdc")


@pytest.mark.parametrize("symbols", [["a", "é"], ["<pad>"], ["</s>", "a"]])
def test_unknown_symbols_are_named(symbols: list[str]) -> None:
    with pytest.raises(UnknownSymbolError, match=r"é|<pad>|</s>"):
        Vocabulary("abc").encode(symbols)


@pytest.mark.parametrize("symbols", [["a", "a"], ["<s>"]])
def test_a_vocabulary_holds_every_symbol_once(symbols: list[str]) -> None:
    with pytest.raises(ValueError, match="every symbol once"):
        Vocabulary(symbols)


# Dictionary


def test_parse() -> None:
    lines = ["a AH0", "a(2) EY1", "", "tomato T AH0 M EY1 T OW2 # a fruit", "tomato(2) T AH0 M AA1 T OW2", "a(3) AH1"]
    assert dictionary.parse(lines) == {
        "a": (("AH",), ("EY",)),  # AH0 and AH1 are the same without stress
        "tomato": (("T", "AH", "M", "EY", "T", "OW"), ("T", "AH", "M", "AA", "T", "OW")),
    }


@pytest.mark.parametrize("line", ["lonely", "(2) AH0"])
def test_a_line_without_word_or_phones(line: str) -> None:
    with pytest.raises(DictionaryError, match="line 2"):
        dictionary.parse(["a AH0", line])


def test_split_of_forty_words() -> None:
    split = dictionary.split(dictionary.parse(f"w{i} P{i}" for i in range(40)))
    assert list(split.dev) == ["w19", "w39"]
    assert list(split.test) == ["w17", "w18", "w37", "w38"]
    assert len(split.train) == 34
    assert not set(split.train) & (set(split.dev) | set(split.test))


def test_too_few_words_to_split() -> None:
    with pytest.raises(DictionaryError, match="too small"):
        dictionary.split(dictionary.parse(f"w{i} P" for i in range(19)))


def test_the_real_dictionary() -> None:
    split = dictionary.split(dictionary.load())
    assert [len(part) for part in (split.train, split.dev, split.test)] == [107_146, 6_302, 12_604]
    pairs = [sum(map(len, part.values())) for part in (split.train, split.dev, split.test)]
    assert pairs == [114_626, 6_755, 13_479]
    assert len({phone for ps in split.train.values() for phones in ps for phone in phones}) == 39


def test_dictionaries_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(DictionaryError, match="No such file"):
        dictionary.load(tmp_path / "none")
    with pytest.raises(DictionaryError, match="Is a directory"):
        dictionary.load(tmp_path)
    (tmp_path / "latin").write_bytes("é EY".encode("latin-1"))
    with pytest.raises(DictionaryError, match="UTF-8"):
        dictionary.load(tmp_path / "latin")


# Batches


def dataset(rows: int) -> PairDataset:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 12, (rows, 2), generator=generator).tolist()
    return PairDataset([([3 + row] * source, [3 + row] * target) for row, (source, target) in enumerate(lengths)])


@given(st.integers(1, 70), st.integers(1, 9), st.integers(1, 4), st.integers(0, 3))
def test_an_epoch_visits_every_row_once(rows: int, batch_size: int, pool: int, epoch: int) -> None:
    sampler = BucketSampler(dataset(rows), batch_size, seed=1, pool=pool)
    sampler.set_epoch(epoch)
    batches = list(sampler)
    assert sorted(row for batch in batches for row in batch) == list(range(rows))
    assert len(batches) == len(sampler)
    assert max(map(len, batches)) <= batch_size


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    data = dataset(50)

    def order(seed: int, epoch: int) -> list[list[int]]:
        sampler = BucketSampler(data, 4, seed, pool=2)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(0, 1) == order(0, 1)
    assert order(0, 1) != order(0, 2)
    assert order(0, 1) != order(1, 1)


def test_buckets_hold_like_lengths() -> None:
    data = dataset(2000)
    waste = []
    for pool in (1, 100):
        batches = [data[rows] for rows in BucketSampler(data, 20, 0, pool)]
        cells = sum(batch.target.numel() for batch in batches)
        waste.append(1 - int(data.target_lengths.sum()) / cells)
    assert waste[0] > 0.3
    assert waste[1] < 0.05


def test_a_batch_is_as_wide_as_its_longest() -> None:
    data = PairDataset([([3, 4], [5]), ([6], [7, 8, 9]), ([3] * 9, [4] * 9)])
    batch = data[[0, 1]]
    assert batch.source.tolist() == [[3, 4], [6, PAD]]
    assert batch.lengths.tolist() == [2, 1]
    assert batch.target.tolist() == [[5, EOS, PAD, PAD], [7, 8, 9, EOS]]
    assert len(batch) == 2


# Scorer


def test_nearest_alternative_then_the_shortest() -> None:
    assert nearest("abc", ["abcd", "abc"]) == (0, 3)
    assert nearest("abc", ["abcdx", "ab", "abcd"]) == (1, 2)  # as near as "abcd", and shorter
    assert nearest("", ["ab"]) == (2, 2)


def test_error_rates_by_hand() -> None:
    hypotheses = [["AH", "B"], ["K", "AE", "T"], ["D"], []]
    references = [
        [["AH", "B"]],  # right
        [["K", "AH", "T"], ["K", "AE", "T", "S", "S"]],  # one wrong of three
        [["D", "AO", "G"], ["D", "IY"]],  # one missing of two
        [["AY"]],  # one missing of one
    ]
    rates = error_rates(hypotheses, references)
    assert rates.wer == 3 / 4
    assert rates.per == (0 + 1 + 1 + 1) / (2 + 3 + 2 + 1)


def test_phones_are_compared_whole() -> None:
    assert error_rates([["AA"]], [[["AE"]]]).per == 1.0
    assert error_rates([["A", "H"]], [[["AH"]]]).per == 2.0  # more errors than phones


def test_nothing_to_score() -> None:
    with pytest.raises(ValueError, match="nothing"):
        error_rates([], [])
    with pytest.raises(ValueError, match="argument 2"):
        error_rates([["A"]], [])
