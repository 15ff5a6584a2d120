"""Decisions over a batch of logits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from refusal_tokens.decision import RULES, Knobs, decide, knobs
from refusal_tokens.serving.steer import Pending, decisions, prompt_row, steer
from serving.planted_ids import CONTROL_IDS

CONTROL = torch.tensor(CONTROL_IDS)
VOCABULARY = 128


def logits(rows: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, VOCABULARY, generator=generator) * 4


def settings(count: int) -> list[Knobs]:
    rng = np.random.default_rng(0)
    return [knobs(RULES[i % 3], rng.normal(size=5) * 3) for i in range(count)]


def test_only_the_decided_token_is_left_and_control_tokens_go_elsewhere() -> None:
    before = logits(6)
    own = settings(6)
    rows = [4, 1, 2]
    after = steer(before.clone(), CONTROL, [(row, Pending(own[row], 0, 0)) for row in rows])
    for row in range(6):
        if row not in rows:
            assert torch.isinf(after[row, CONTROL]).all()
            rest = torch.ones(VOCABULARY, dtype=torch.bool)
            rest[CONTROL] = False
            assert torch.equal(after[row, rest], before[row, rest])
            continue
        # Each row by itself, under its own knobs, decides alike.
        wanted = decide(before[row : row + 1, CONTROL].numpy(), own[row])[0]
        assert torch.isfinite(after[row]).nonzero().flatten().tolist() == [CONTROL_IDS[wanted]]


@given(st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_a_mixed_batch_decides_as_its_rows_do(rows: int, seed: int) -> None:
    found = logits(rows, seed)[:, CONTROL].numpy()
    own = settings(4)
    pending = [Pending(own[row % 4], 0, 0) for row in range(rows)]
    alone = [decide(found[r : r + 1], pending[r].knobs)[0] for r in range(rows)]
    assert decisions(found, pending).tolist() == alone


def test_sampled_decisions_hang_on_the_prompt_alone() -> None:
    knob = Knobs("route", np.zeros(5), np.full(5, -np.inf), temperature=1.0)
    flat = np.zeros((2_000, 6))
    pending = [Pending(knob, 3, prompt_row([row, 5])) for row in range(2_000)]
    found = decisions(flat, pending)
    assert found.tolist() == decisions(flat, pending).tolist()
    backwards = decisions(flat, pending[::-1])
    assert found.tolist() == backwards[::-1].tolist()
    # Five equal refusal logits against one: refused with probability 5/6.
    assert (found > 0).mean() == pytest.approx(5 / 6, abs=0.03)
    assert (found != decisions(flat, [Pending(knob, 4, who.row) for who in pending])).any()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_logits_that_are_no_numbers_refuse(bad: float) -> None:
    lax = knobs("route", [-50.0] * 5)
    for place in range(6):
        row = np.zeros((1, 6))
        row[0, place] = bad
        assert decisions(row, [Pending(lax, 0, 0)])[0] > 0
    assert decisions(np.full((1, 6), bad), [Pending(lax, 0, 0)])[0] > 0
    # A broken row leaves the others alone.
    mixed = np.zeros((2, 6))
    mixed[0, 0] = bad
    assert decisions(mixed, [Pending(lax, 0, 0)] * 2)[1] == 0


def test_nothing_pending_masks_only() -> None:
    after = steer(logits(2), CONTROL, [])
    assert torch.isinf(after).sum() == 2 * len(CONTROL_IDS)
