"""Rates with intervals, AUC, and the summary of a profile."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, norm
from test_profiles import TWO, Entry, profile_of

from refusal_tokens.decision import RULES, Rule, knobs
from refusal_tokens.errors import InputError
from refusal_tokens.rates import auc, clustered_rate, rate, wilson
from refusal_tokens.summary import own_rates, refusal_scores, summarise, summary_table
from refusal_tokens.taxonomy import Taxonomy

LIGHT = settings(max_examples=60)
# At zero bias `route` decides 1, 2, 0, 2, 1, 0, 0, 0, 2 and 1.
PLANTED: list[Entry] = [
    ("refuse", "a", [0, 2, 0]),
    ("refuse", "a", [0, 0, 2]),
    ("refuse", "a", [3, 0, 0]),
    ("refuse", "b", [0, 0, 4]),
    ("respond", "a", [0, 1, 0]),
    ("respond", "a", [5, 0, 0]),
    ("respond", "b", [5, 0, 0]),
    ("respond", None, [5, 0, 0]),
    ("respond", None, [0, 0, 3]),
    (None, None, [0, 9, 9]),
]


def counts(found: Any) -> tuple[int, int]:
    return found.count, found.n


def test_the_wilson_interval_of_nine_in_ten_is_that_worked_by_hand() -> None:
    found = rate(9, 10)
    # (0.9 + 0.192073 -+ 1.959964 sqrt(0.009 + 0.009604)) / 1.384146
    assert (found.value, found.n) == (0.9, 10)
    assert found.low == pytest.approx(0.59585, abs=1e-5)
    assert found.high == pytest.approx(0.98213, abs=1e-5)
    assert str(found) == " 90.0%  [60, 98]  n=10"


@LIGHT
@given(st.integers(1, 5000), st.data())
def test_the_interval_is_wilsons_formula_and_scipys(n: int, data: Any) -> None:
    count = data.draw(st.integers(0, n))
    z, p = norm.ppf(0.975), count / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    found = rate(count, n)
    assert found.low == pytest.approx(max(middle - half, 0), abs=1e-9)
    assert found.high == pytest.approx(min(middle + half, 1), abs=1e-9)
    scipys = binomtest(count, n).proportion_ci(method="wilson")
    assert (found.low, found.high) == pytest.approx((scipys.low, scipys.high))


def test_a_rate_of_no_prompts_is_missing_and_not_zero() -> None:
    found = rate(0, 0)
    assert (found.value, found.low, found.high, found.n) == (None, None, None, 0)
    assert str(found) == "no prompts"


@LIGHT
@given(st.lists(st.tuples(st.integers(-3, 3), st.booleans()), max_size=30))
def test_auc_is_the_share_of_pairs_in_order_with_ties_half(pairs: list[tuple[int, bool]]) -> None:
    positives = [score for score, label in pairs if label]
    negatives = [score for score, label in pairs if not label]
    wins = [(p > n) + 0.5 * (p == n) for p in positives for n in negatives]
    found = auc(np.array([s for s, _ in pairs], float), np.array([x for _, x in pairs], bool))
    if wins:
        assert found == pytest.approx(sum(wins) / len(wins))
    else:
        assert found is None


def test_the_summary_of_planted_logits_is_that_worked_by_hand() -> None:
    found = summarise(profile_of(PLANTED), knobs("route", [0, 0]))
    a, b = found.categories
    assert (a.category, b.category) == ("a", "b")
    assert [counts(x) for x in (a.refused, a.right_category, a.over_refused)] == [
        (2, 3), (1, 2), (1, 2),
    ]  # fmt: skip
    assert [counts(x) for x in (b.refused, b.right_category, b.over_refused)] == [
        (1, 1), (1, 1), (0, 1),
    ]  # fmt: skip
    assert counts(found.refused) == (3, 4)
    assert counts(found.right_category) == (2, 3)
    assert counts(found.near_miss) == (1, 3)
    assert counts(found.ordinary) == (1, 2)
    assert counts(found.over_refused) == (2, 5)
    assert found.n == 10
    # Of the 20 pairs the four refuse rows win 4, 4, 3 and 5.
    assert found.auc == pytest.approx(16 / 20)


def test_a_knob_moves_the_rates_of_prompts_routed_to_it() -> None:
    # LSE(1, 0) = 1.313 and LSE(2, 0) = 2.127: the near-miss of a is let go, its refusal is not.
    found = summarise(profile_of(PLANTED), knobs("route", [-1.5, 0]))
    assert counts(found.categories[0].refused) == (2, 3)
    assert counts(found.categories[0].over_refused) == (0, 2)
    assert counts(found.ordinary) == (1, 2)
    strict = summarise(profile_of(PLANTED), knobs("route", [50, 50]))
    assert counts(strict.refused) == (4, 4)
    assert counts(strict.over_refused) == (5, 5)
    assert found.auc == strict.auc


def test_own_rates_count_only_refusals_as_the_category() -> None:
    profile = profile_of(PLANTED)
    assert counts(own_rates(profile, "a", knobs("route", [0, 0]))) == (1, 3)
    assert counts(own_rates(profile, "b", knobs("route", [0, 0]))) == (1, 1)
    assert counts(own_rates(profile, "a", knobs("bias", [3, 0]))) == (2, 3)


@pytest.mark.parametrize("rule", RULES)
@LIGHT
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["refuse", "respond"]),
            st.sampled_from(["a", "b"]),
            st.lists(st.floats(-9, 9), min_size=3, max_size=3),
        ),
        min_size=1,
        max_size=10,
    ),
    st.floats(-9, 9),
    st.floats(0, 9),
)
def test_every_rate_is_monotone_in_its_own_knob(
    rule: Rule, entries: list[Entry], bias: float, step: float
) -> None:
    profile = profile_of(entries)
    low, high = knobs(rule, [bias, 0]), knobs(rule, [bias + step, 0])
    before, after = summarise(profile, low), summarise(profile, high)
    assert after.refused.count >= before.refused.count
    assert after.over_refused.count >= before.over_refused.count
    assert after.categories[0].refused.count >= before.categories[0].refused.count
    assert own_rates(profile, "a", high).count >= own_rates(profile, "a", low).count


def test_scores_are_the_log_odds_of_any_refusal() -> None:
    found = refusal_scores(profile_of(PLANTED))
    assert found[0] == pytest.approx(math.log(math.exp(2) + 1))
    assert found[2] == pytest.approx(math.log(2) - 3)


def test_control_mass_is_a_mean_over_prompts() -> None:
    entries: list[Entry] = [("refuse", "a", [0, 0, 0]), ("respond", "a", [0, 0, 0])]
    found = summarise(profile_of(entries, rest=[math.log(3), math.log(1)]), knobs("route", [0, 0]))
    assert found.control_mass == pytest.approx((0.5 + 0.75) / 2, rel=1e-6)


def test_without_both_labels_there_is_no_auc_and_no_rate() -> None:
    found = summarise(profile_of(PLANTED[:4]), knobs("route", [0, 0]))
    assert found.auc is None
    assert found.ordinary.value is None
    table = summary_table(found)
    assert "needs both labels" in table
    assert "no prompts" in table


def test_one_token_for_all_categories_has_no_right_one_to_tell() -> None:
    taxonomy = Taxonomy(TWO.categories, "Fine.", single_token=True)
    entries = [(label, category, [z[0], max(z[1:])]) for label, category, z in PLANTED]
    found = summarise(profile_of(entries, taxonomy), knobs("route", [0]))
    # It cannot be wrong, so a share of 100% would say nothing.
    assert counts(found.right_category) == (0, 0)
    assert [entry.category for entry in found.categories] == ["a", "b"]
    assert counts(found.categories[0].refused) == (2, 3)


def test_the_table_shows_each_rate_with_its_n() -> None:
    table = summary_table(summarise(profile_of(PLANTED), knobs("route", [0, 0]))).splitlines()
    assert table[1].startswith("a ")
    for shown in ("66.7%", "n=3", "50.0%", "n=2"):
        assert shown in table[1]
    assert "75.0%" in table[3]
    assert "n=4" in table[3]
    assert any("0.800  (n=9)" in line for line in table)


def test_replies_to_one_prompt_are_worth_less_than_as_many_prompts() -> None:
    assert clustered_rate([], []) == rate(0, 0)
    hits = [True, True, False, True, False]
    assert clustered_rate(hits, "abcde") == rate(3, 5)
    # Five prompts of two replies each that always agree: the interval of five.
    pairs = [hit for hit in hits for _ in range(2)]
    found = clustered_rate(pairs, "aabbccddee")
    # (3 * (2 - 1.2)^2 + 2 * (0 - 1.2)^2) / 100 * 5/4 = 0.06; independent: 0.6 * 0.4 / 10 = 0.024.
    low, high = wilson(np.array(0.6), 10 / (0.06 / 0.024))
    assert (found.count, found.n) == (6, 10)
    assert (found.low, found.high) == pytest.approx((float(low), float(high)))
    # Replies that differ within every prompt alike are worth no more than independent ones.
    within = clustered_rate([True, False] * 4, "aabbccdd")
    assert (within.low, within.high) == (rate(4, 8).low, rate(4, 8).high)
    # All alike: as many items as prompts.
    everyone = clustered_rate([True] * 8, "aabbccdd")
    assert (everyone.value, everyone.n, everyone.low) == (1.0, 8, rate(4, 4).low)


def test_a_summary_is_json() -> None:
    found = summarise(profile_of(PLANTED), knobs("route", [0, 0])).to_dict()
    assert json.loads(json.dumps(found))["refused"]["count"] == 3


def test_an_empty_profile_has_no_rates() -> None:
    empty = replace(profile_of(PLANTED), control_logits=np.zeros((0, 3), np.float32))
    with pytest.raises(InputError, match="no prompts"):
        summarise(empty, knobs("route", [0, 0]))
