"""The order of a length-grouped epoch's batches: random, where transformers sorts them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import LengthGroupedSampler


class ShuffledBatches(Sampler[int]):
    """The batches of a ``LengthGroupedSampler``, in random order.

    Transformers sorts the rows of every 50 batches by length, longest first, so fifty steps go from
    the longest rows to the shortest, again and again. What a row asks for depends on its length (a
    row without reply is a short one), and a high learning rate follows what it saw last. Here every
    stretch of steps sees all lengths; a batch is still of one length.

    The first batch stays, the longest row in it, so that memory runs out soon or not at all, and so
    does the last, which may not be full.
    """

    def __init__(self, grouped: LengthGroupedSampler) -> None:
        self._grouped = grouped

    def __len__(self) -> int:
        return len(self._grouped)

    def __iter__(self) -> Iterator[int]:
        rows = list(self._grouped)
        size = self._grouped.batch_size
        first, *between, last = [rows[i : i + size] for i in range(0, len(rows), size)] 
        order = torch.randperm(len(between), generator=self._grouped.generator).tolist()
        for batch in [first, *(between[i] for i in order), last]:
            yield from batch
