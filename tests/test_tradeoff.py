"""The trade-off: planted areas, steps, weights and bootstrap intervals."""

from __future__ import annotations

import numpy as np
import pytest
from planted import normal_profile, regrouped
from scipy.stats import norm
from test_profiles import Entry, profile_of

from refusal_tokens.decision import RULES, Rule, knobs
from refusal_tokens.errors import InputError
from refusal_tokens.rates import auc
from refusal_tokens.resampling import group_counts, measure
from refusal_tokens.summary import refusal_scores, summarise
from refusal_tokens.taxonomy import Category, Taxonomy
from refusal_tokens.tradeoff import (
    curve_measures,
    scored,
    trade_off,
    trade_off_spread,
    weighted_curves,
)

ONE = Taxonomy((Category("a", "A."),), "Fine.")


def test_the_area_of_two_normals_is_known() -> None:
    # The margin is a difference of two logits with deviation 1: of refuse rows +2, others -2.
    profile = normal_profile(6000, taxonomy=ONE)
    found = trade_off(profile, knobs("route", [0.0]))
    assert found.auc == pytest.approx(norm.cdf(4 / 2), abs=0.005)
    cut = norm.isf(0.05, -2, np.sqrt(2))
    assert found.refusal_at[0.05].value == pytest.approx(norm.sf(cut, 2, np.sqrt(2)), abs=0.03)


def test_the_area_is_the_share_of_pairs_in_order() -> None:
    profile = normal_profile(80)
    for rule in RULES:
        scores, asked, _ = scored(profile, knobs(rule, [0.2, 0.0]))
        assert trade_off(profile, knobs(rule, [0.2, 0.0])).auc == pytest.approx(auc(scores, asked))
    assert trade_off(profile, knobs("route", [0, 0])).auc == pytest.approx(
        auc(refusal_scores(profile), profile.is_label("refuse"))
    )


def test_the_partial_area_follows_the_steps() -> None:
    # Over 40 respond rows: half of the refuse rows come before the first, all before the second.
    entries: list[Entry] = [("refuse", "a", [0, 9, 0]), ("respond", "a", [0, 8, 0])]
    entries += [("refuse", "a", [0, 7, 0])]
    entries += [("respond", "a", [0, -k, 0]) for k in range(39)]
    found = trade_off(profile_of(entries), knobs("bias", [0, 0]))
    # 0.5 up to an over-refusal of 1/40, then 1 up to 2/40 = 5%.
    assert found.partial_auc == pytest.approx(0.75)
    assert [found.refusal_at[c].value for c in (0.01, 0.02, 0.05)] == [0.5, 0.5, 1.0]


def test_tied_scores_are_one_step() -> None:
    entries: list[Entry] = [("refuse", "a", [0, 1, 0]), ("respond", "a", [0, 1, 0])]
    found = trade_off(profile_of(entries), knobs("bias", [0, 0]))
    assert found.auc == 0.5
    assert found.over_refusal.tolist() == [0, 1]
    assert found.refusal_at[0.05].value == 0.0


@pytest.mark.parametrize("rule", RULES)
def test_a_sampled_trade_off_passes_through_the_expected_rates(rule: Rule) -> None:
    profile = normal_profile(100)
    found = trade_off(profile, knobs(rule, [0.3, -0.1], 1.0))
    for by in (-1.0, 0.0, 2.0):
        at = summarise(profile, knobs(rule, [0.3 + by, -0.1 + by], 1.0))
        there = np.interp(at.over_refused.value, found.over_refusal, found.refusal)
        assert there == pytest.approx(at.refused.value, abs=1e-3)


def test_weights_are_repeated_prompts() -> None:
    profile = normal_profile(24)
    for temperature in (0.0, 0.5):
        scores, asked, benign = scored(profile, knobs("route", [0, 0], temperature))
        rows = np.random.default_rng(3).integers(24, size=24)
        weights = np.bincount(rows, minlength=24)[None, :].astype(float)
        by_weight = curve_measures(*weighted_curves(scores, asked, benign, weights, temperature))
        even = np.ones((1, 24))
        taken = (scores[rows], asked[rows], benign[rows], even, temperature)
        by_rows = curve_measures(*weighted_curves(*taken))
        near = 1e-9 if temperature == 0 else 0.02
        for name in ("auc", "partial_auc", "refusal_at_5"):
            assert by_weight[name] == pytest.approx(by_rows[name], abs=near)


def test_groups_are_drawn_whole_and_as_often_as_there_are() -> None:
    chunks = list(group_counts(7, 120, seed=1))
    counts = np.concatenate(chunks)
    assert counts.shape == (120, 7)
    assert (counts.sum(axis=1) == 7).all()
    assert counts.mean() == pytest.approx(1)
    again = np.concatenate(list(group_counts(7, 120, seed=1)))
    np.testing.assert_array_equal(counts, again)


def test_the_interval_of_a_mean_is_that_of_the_normal() -> None:
    values = np.random.default_rng(0).normal(size=400)
    draws = np.concatenate([c @ values / 400 for c in group_counts(400, 2000, seed=0)])
    found = measure(float(values.mean()), draws)
    half = 1.96 * values.std() / 20
    assert found.high - found.value == pytest.approx(half, rel=0.1)
    assert found.value - found.low == pytest.approx(half, rel=0.1)


def test_groups_that_agree_within_widen_the_interval() -> None:
    alone = normal_profile(200, group_size=1)
    copies = np.repeat(np.arange(50), 4)
    logits = normal_profile(50, group_size=1).control_logits[copies]
    entries: list[Entry] = [
        ("refuse" if i % 2 else "respond", "a", logits[k].tolist()) for k, i in enumerate(copies)
    ]
    together = regrouped(profile_of(entries), 4)

    def width(profile: object) -> float:
        found = trade_off_spread(profile, knobs("route", [0, 0]), draws=400).measures["auc"]  # type: ignore[arg-type]
        return found.high - found.low

    apart = regrouped(together, 1)
    assert width(together) > 1.5 * width(apart)
    spread = trade_off_spread(alone, knobs("route", [0, 0]), draws=200)
    assert (spread.low <= spread.high).all()
    assert spread.groups == 200


def test_both_labels_are_needed() -> None:
    with pytest.raises(InputError, match="needs refuse and respond rows"):
        trade_off(profile_of([("refuse", "a", [0.0, 1.0, 0.0])]), knobs("route", [0, 0]))
