"""Paired tests against hand-worked numbers, and what other prompts are told."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planted import normal_profile, regrouped, with_logits
from scipy.stats import binomtest
from test_profiles import TWO, Entry, profile_of

from refusal_tokens.comparison import (
    align,
    bootstrap_p,
    holm,
    mcnemar,
    paired_tests,
    profile_entrant,
    prompt_keys,
    prompts_hash,
    text_entrant,
)
from refusal_tokens.decision import knobs
from refusal_tokens.errors import InputError
from refusal_tokens.outcomes import Outcome
from refusal_tokens.profiles import Profile
from refusal_tokens.taxonomy import Category, Taxonomy

LIGHT = settings(max_examples=60)
ROUTE = knobs("route", [0, 0])


def test_mcnemar_worked_by_hand() -> None:
    # 1 against 9: twice (1 + 10) / 2^10.
    assert mcnemar(1, 9) == pytest.approx(22 / 1024)
    assert mcnemar(9, 1) == mcnemar(1, 9)
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(4, 4) == 1.0


@LIGHT
@given(st.integers(0, 300), st.integers(0, 300))
def test_mcnemar_is_the_binomial_test(only_a: int, only_b: int) -> None:
    if only_a + only_b:
        expected = binomtest(only_a, only_a + only_b, 0.5).pvalue
        assert mcnemar(only_a, only_b) == pytest.approx(expected, rel=1e-9)


def test_holm_worked_by_hand() -> None:
    # Sorted: 0.005 x 4, 0.01 x 3, 0.03 x 2, 0.04 x 1, each at least the one before.
    found = holm([0.01, 0.04, 0.03, 0.005])
    np.testing.assert_allclose(found, [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(holm([0.6, 0.7]), [1.0, 1.0])


def test_a_bootstrap_p_is_never_zero() -> None:
    assert bootstrap_p(np.ones(99)) == pytest.approx(0.02)
    assert bootstrap_p(np.array([-1.0, 1.0, 0.0])) == 1.0


def two_models() -> tuple[Profile, Profile]:
    """Ten refuse rows and ten respond rows; the second model refuses others."""
    yes, no = [0.0, 2.0, -9.0], [0.0, -2.0, -9.0]
    first: list[Entry] = [("refuse", "a", yes if i < 9 else no) for i in range(10)]
    first += [("respond", "a", yes if i < 1 else no) for i in range(10)]
    second = [yes if i in (0, 9) else no for i in range(10)]
    second += [yes if i < 4 else no for i in range(10)]
    one = regrouped(profile_of(first), 1)
    return one, with_logits(one, second)


def test_planted_decisions_give_the_counts_and_p_values() -> None:
    one, two = two_models()
    entrants = [profile_entrant(name, p, ROUTE) for name, p in (("x", one), ("y", two))]
    tests = {test.measure: test for test in paired_tests(entrants, draws=300)}
    refusal, over = tests["refusal of refuse rows"], tests["over-refusal"]
    assert (refusal.only_a, refusal.only_b, refusal.n) == (8, 1, 10)
    assert (refusal.value_a, refusal.value_b) == (0.9, 0.2)
    assert refusal.difference.value == pytest.approx(-0.7)
    assert refusal.difference.high < 0
    assert refusal.p == pytest.approx(binomtest(1, 9).pvalue)
    assert (over.only_a, over.only_b) == (0, 3)
    assert over.p == pytest.approx(0.25)
    assert [t.p_holm for t in tests.values()] == list(holm([t.p for t in tests.values()]))
    # 90 of 100 pairs are won or tied by half: planted by two levels of score.
    assert tests["AUC"].value_a == pytest.approx((9 * 9 + 0.5 * (9 * 1 + 1 * 9)) / 100)


def test_a_model_does_not_differ_from_itself() -> None:
    profile = normal_profile(60)
    entrants = [profile_entrant(name, profile, ROUTE) for name in ("x", "y")]
    for test in paired_tests(entrants, draws=200):
        assert (test.p, test.p_holm) == (1.0, 1.0)
        assert test.difference.low == test.difference.high == 0.0


def test_two_models_of_equal_skill_differ_by_chance_alone() -> None:
    # Of 40 pairs the smallest corrected p stays above 5% in nearly all.
    found = 0
    for seed in range(40):
        one = normal_profile(120, seed=seed)
        two = with_logits(one, normal_profile(120, seed=1000 + seed).control_logits)
        entrants = [profile_entrant(n, p, ROUTE) for n, p in (("x", one), ("y", two))]
        found += min(test.p_holm for test in paired_tests(entrants, draws=200)) < 0.05
    assert found <= 6


def test_a_better_model_is_found() -> None:
    one = normal_profile(300, shift=1.0)
    two = with_logits(one, normal_profile(300, shift=3.0, seed=9).control_logits)
    entrants = [profile_entrant(n, p, ROUTE) for n, p in (("x", one), ("y", two))]
    tests = {test.measure: test for test in paired_tests(entrants, draws=1000)}
    assert tests["AUC"].difference.low > 0
    assert tests["AUC"].p_holm < 0.05
    assert tests["refusal at 5% over-refusal"].difference.value > 0.2


def test_prompts_in_another_order_are_brought_in_line() -> None:
    one = normal_profile(30)
    order = np.random.default_rng(1).permutation(30)
    aligned = align({"x": one, "y": one.select(order)})
    np.testing.assert_array_equal(aligned["y"].control_logits, one.control_logits)
    assert aligned["y"].columns["id"].tolist() == one.columns["id"].tolist()


def test_other_prompts_are_counted_and_both_hashes_named() -> None:
    one = normal_profile(30)
    fewer = one.select(np.arange(30) >= 3)
    with pytest.raises(
        InputError, match="different prompts: 3 only in the first, 0 only"
    ) as caught:
        align({"x": one, "y": fewer})
    for profile in (one, fewer):
        assert prompts_hash(prompt_keys(profile)) in str(caught.value)
    relabelled = dict(one.columns)
    relabelled["label"] = one.columns["label"].copy()
    relabelled["label"][0] = "refuse"
    with pytest.raises(InputError, match="1 only in the first, 1 only in the second"):
        align({"x": one, "y": replace(one, columns=relabelled)})


def test_a_prompt_twice_needs_its_twin() -> None:
    one = normal_profile(4)
    columns = dict(one.columns)
    columns["prompt_sha256"] = np.array(["s"] * 4, dtype=object)
    columns["category"] = np.array(["a"] * 4, dtype=object)
    twice = replace(one, columns=columns)
    assert len(align({"x": twice, "y": twice})["y"]) == 4
    with pytest.raises(InputError, match="1 only in the first"):
        align({"x": twice, "y": twice.select(np.arange(4) < 3)})


def test_other_taxonomies_are_named() -> None:
    other = Taxonomy((*TWO.categories, Category("c", "Third.")), "Fine.")
    with pytest.raises(InputError, match="differ in taxonomy") as caught:
        align({"x": normal_profile(6), "y": normal_profile(6, taxonomy=other)})
    assert TWO.hash in str(caught.value)
    assert other.hash in str(caught.value)


def outcome(number: int, label: str, verdict: str) -> Outcome:
    return Outcome(f"r{number}", label, "a", f"g{number}", None, None, "text", verdict, "planted")


def test_text_is_compared_on_the_prompts_both_have() -> None:
    one, _ = two_models()
    # Rows 5 to 11 of twenty, one of them undecided.
    verdicts = {i: "refused" if i % 2 else "answered" for i in range(5, 12)} | {6: "undecided"}
    outcomes = [outcome(i, "refuse" if i < 10 else "respond", v) for i, v in verdicts.items()]
    entrants = [profile_entrant("x", one, ROUTE), text_entrant("t", outcomes)]
    tests = {test.measure: test for test in paired_tests(entrants, draws=100)}
    assert set(tests) == {"refusal of refuse rows", "over-refusal"}
    # The model refuses rows 5, 7 and 8; the text 5, 7 and 9.
    refusal = tests["refusal of refuse rows"]
    assert (refusal.n, refusal.only_a, refusal.only_b) == (4, 1, 1)
    # Of rows 10 and 11 the model refuses the first, the text the second.
    over = tests["over-refusal"]
    assert (over.n, over.only_a, over.only_b) == (2, 1, 1)


def test_models_that_share_no_prompts_cannot_be_compared() -> None:
    one, _ = two_models()
    others = [outcome(i, "refuse", "refused") for i in range(100, 103)]
    with pytest.raises(InputError, match="x and t share no labelled prompts"):
        paired_tests([profile_entrant("x", one, ROUTE), text_entrant("t", others)])
