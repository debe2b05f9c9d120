"""Pairs of sequences as tensors, and batches of like lengths."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset, Sampler

from .vocabulary import EOS, PAD

Pair = tuple[Sequence[int], Sequence[int]]


@dataclass
class Batch:
    """A batch, as wide as its longest sequences."""

    source: Tensor  # [B, S]
    lengths: Tensor  # [B]
    target: Tensor  # [B, T], each row ends with end-of-sequence

    def __len__(self) -> int:
        return self.source.size(0)


def pad(sequences: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Sequences of indices as a tensor [N, longest] and their lengths [N]."""
    padded = pad_sequence([torch.tensor(s, dtype=torch.long) for s in sequences], batch_first=True, padding_value=PAD)
    return padded, torch.tensor([len(s) for s in sequences])


class PairDataset(Dataset[Batch]):
    """Encoded pairs. An index is a list of rows, an item a whole batch: slicing tensors once beats collating rows.

    Args:
        pairs: source and target indices, without end-of-sequence.
    """

    def __init__(self, pairs: Sequence[Pair]) -> None:
        self.source, self.source_lengths = pad([source for source, _ in pairs])
        self.target, self.target_lengths = pad([[*target, EOS] for _, target in pairs])

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, rows: list[int] | Tensor) -> Batch:
        lengths, target_lengths = self.source_lengths[rows], self.target_lengths[rows]
        return Batch(self.source[rows, : int(lengths.max())], lengths, self.target[rows, : int(target_lengths.max())])


class BucketSampler(Sampler[list[int]]):
    """Batches of rows with like lengths, in an order that depends on the seed and the epoch alone.

    The decoder runs for as many steps as the longest target has, so batches of one length waste nothing. Rows are
    shuffled, sorted by length within pools of some batches, cut into batches, and these shuffled again: an epoch still
    visits every row once, and rows meet other rows each time.

    Args:
        data: the pairs.
        batch_size: rows of a batch; the last of a pool may hold fewer.
        seed: with the epoch it fixes the order.
        pool: batches that are sorted together; more waste less and mix less.
    """

    def __init__(self, data: PairDataset, batch_size: int, seed: int, pool: int = 100) -> None:
        if batch_size < 1 or pool < 1:
            raise ValueError(f"batch_size and pool must be at least 1, not {batch_size} and {pool}")
        # Target first: it costs the most steps.
        self.keys = data.target_lengths * (int(data.source_lengths.max()) + 1) + data.source_lengths
        self.batch_size = batch_size
        self.pool = pool * batch_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order follows; the trainer calls this."""
        self.epoch = epoch

    def __len__(self) -> int:
        whole, rest = divmod(len(self.keys), self.pool)
        return whole * (self.pool // self.batch_size) + math.ceil(rest / self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(len(self.keys), generator=generator)
        batches: list[list[int]] = []
        for pool in torch.split(order, self.pool):
            by_length = pool[self.keys[pool].argsort(stable=True)]
            batches += [batch.tolist() for batch in torch.split(by_length, self.batch_size)]
        for index in torch.randperm(len(batches), generator=generator).tolist():
            yield batches[index]
