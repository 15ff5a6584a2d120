"""The order of an epoch's batches."""

from __future__ import annotations

import random
from statistics import correlation, mean

import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.trainer_pt_utils import get_length_grouped_indices

from refusal_tokens.batch_order import ShuffledBatches

lengths_lists = st.lists(st.integers(1, 500), min_size=1, max_size=200)


def in_batches(rows: list[int], size: int) -> list[list[int]]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


@given(lengths=lengths_lists, size=st.integers(1, 20), seed=st.integers(0, 1000))
def test_the_batches_are_those_of_length_grouping(lengths: list[int], size: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    grouped = in_batches(get_length_grouped_indices(lengths, size, generator=generator), size)
    shuffled = in_batches(list(ShuffledBatches(lengths, size, seed)), size)
    assert sorted(shuffled) == sorted(grouped)
    assert shuffled[0] == grouped[0]
    assert shuffled[-1] == grouped[-1]
    assert lengths[shuffled[0][0]] == max(lengths)


def test_a_batch_tells_nothing_of_the_length_of_the_next() -> None:
    draw = random.Random(0)
    lengths = [draw.randint(10, 100) for _ in range(16 * 200)]
    generator = torch.Generator().manual_seed(0)
    grouped = get_length_grouped_indices(lengths, 16, generator=generator)

    def persistence(rows: list[int]) -> float:
        means = [mean(lengths[row] for row in batch) for batch in in_batches(rows, 16)]
        return correlation(means[:-1], means[1:])

    assert persistence(grouped) > 0.8
    # Three standard errors of a correlation over 200 batches.
    assert abs(persistence(list(ShuffledBatches(lengths, 16, 0)))) < 0.21


def test_an_order_depends_on_seed_and_epoch_alone() -> None:
    lengths = list(range(1, 200))
    order = ShuffledBatches(lengths, 4, seed=5)
    first = list(order)
    torch.rand(3)
    assert list(order) == first
    order.set_epoch(1)
    second = list(order)
    assert second != first
    again = ShuffledBatches(lengths, 4, seed=5)
    again.set_epoch(1)
    assert list(again) == second
    assert list(ShuffledBatches(lengths, 4, seed=6)) != first
