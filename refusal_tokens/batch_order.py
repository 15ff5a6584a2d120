"""The order of an epoch's batches: of rows of like length each, and shuffled."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices


class ShuffledBatches(Sampler[int]):
    """Row indices of an epoch: the batches of transformers' length grouping in random order.

    Transformers sorts each 50 batches by length, so that steps go from the longest rows to the
    shortest, again and again. What a row teaches depends on its length (rows without reply are
    short), and a high learning rate follows what came last. Here every stretch of steps sees all
    lengths, and a batch still holds rows of one length.

    The first batch stays in front, with the longest row, so that memory runs out soon or never; the
    last stays last, as it may not be full. The order depends on seed and epoch alone: a resumed run
    goes on in the same.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self._lengths = lengths
        self._batch_size = batch_size
        self._seed = seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Draw another order in the next iteration; the Trainer calls this."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed + self._epoch)
        rows = get_length_grouped_indices(self._lengths, self._batch_size, generator=generator)
        size = self._batch_size
        batches = [rows[start : start + size] for start in range(0, len(rows), size)]
        between = batches[1:-1]
        order = torch.randperm(len(between), generator=generator).tolist()
        batches[1:-1] = [between[i] for i in order]
        for batch in batches:
            yield from batch
