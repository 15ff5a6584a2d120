"""Targets to biases: planted optima, brute force, unreachable requests, bad input."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_profiles import TWO, profile_of

from refusal_tokens.arrays import Mask
from refusal_tokens.decision import RULES, Rule, decide, gaps, knobs
from refusal_tokens.errors import InputError
from refusal_tokens.profiles import Profile
from refusal_tokens.recentring import recentre
from refusal_tokens.targeting import Solution, frontier, over_refusal, reached, solve
from refusal_tokens.targets import Targets, preset
from refusal_tokens.taxonomy import Taxonomy

LIGHT = settings(max_examples=40, deadline=None)
EACH_RULE = pytest.mark.parametrize("rule", RULES)


def synthetic(
    taxonomy: Taxonomy = TWO, n: int = 60, seed: int = 0, confusion: float = 1.0
) -> Profile:
    """Prompts of each kind with normal logits; ``confusion`` is the noise, in nats."""
    random = np.random.default_rng(seed)
    entries: list[Any] = []
    kinds = [("refuse", c) for c in taxonomy.category_ids]
    kinds += [("respond", c) for c in (*taxonomy.category_ids, None)]
    for label, category in kinds:
        for _ in range(n):
            logits = random.normal(0, confusion, len(taxonomy.tokens))
            logits[taxonomy.token_index(label, category)] += 2
            entries.append((label, category, list(logits)))
    return profile_of(entries, taxonomy)


@LIGHT
@given(
    st.sampled_from(RULES),
    st.integers(1, 4),
    st.integers(0, 2**32 - 1),
    st.lists(st.sampled_from([-3.0, -0.5, 0.0, 1.0, 4.0]), min_size=4, max_size=4),
)
def test_a_prompt_is_refused_if_and_only_if_a_bias_exceeds_its_gap(
    rule: Rule, categories: int, seed: int, bias: list[float]
) -> None:
    logits = np.random.default_rng(seed).normal(0, 3, (20, categories + 1))
    setting = knobs(rule, bias[:categories])
    refused = decide(logits, setting) > 0
    assert (refused == (setting.bias > gaps(logits, rule)).any(axis=1)).all()


@EACH_RULE
@pytest.mark.parametrize("asked", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_a_single_rate_is_reached_within_one_prompt(rule: Rule, asked: float) -> None:
    # Without confusion between the two categories every rate of one of them is reachable.
    entries: list[Any] = [("refuse", "a", [0, x, -9]) for x in np.linspace(-3, 3, 37)]
    entries += [("refuse", "b", [0, -9, x]) for x in np.linspace(-3, 3, 20)]
    entries += [("respond", None, [3, 0, 0])] * 10
    found = solve(profile_of(entries), Targets(rates={"a": asked}), rule=rule)
    assert found.feasible
    assert abs(found.reached[0].rate.count - asked * 37) <= 0.5 + 1e-9
    assert set(found.bias) <= {"a"}


@EACH_RULE
def test_sampled_rates_are_met_to_a_hundredth_of_a_percent(rule: Rule) -> None:
    profile = synthetic()
    targets = Targets(rates={"a": 0.7, "b": 0.4})
    found = solve(profile, targets, rule=rule, decision="sampled")
    assert found.feasible
    for entry in found.reached:
        assert entry.rate.value == pytest.approx(entry.asked, abs=1e-4)


@EACH_RULE
def test_sampled_floors_are_kept_at_no_more_over_refusal_than_they_need(rule: Rule) -> None:
    # At bias 0 the floor holds already, with 95% refused; respond rows ask for less.
    entries: list[Any] = [("refuse", "a", [0, 3, -9])] * 10 + [("respond", None, [0, 1, -9])] * 10
    profile = profile_of(entries)
    found = solve(profile, Targets(min_rates={"a": 0.7}), rule=rule, decision="sampled")
    assert found.feasible
    assert found.reached[0].rate.value == pytest.approx(0.7, abs=1e-3)
    # One logit decides: sigmoid(3 + bias) is 0.7, and sigmoid(1 + bias) is what that costs.
    bias = np.log(0.7 / 0.3) - 3
    assert found.bias == pytest.approx({"a": bias}, abs=0.01)
    assert found.over_refusal.value == pytest.approx(1 / (1 + np.exp(-1 - bias)), abs=1e-3)


def brute_force(profile: Profile, rule: Rule, targets: Targets) -> float | None:
    """Least over-refusal, over every pair of thresholds, among settings that meet the floors."""
    points = []
    for gap in gaps(profile.control_logits, rule).T:
        finite = np.unique(gap[np.isfinite(gap)])
        points.append([finite[0] - 1, *((finite[1:] + finite[:-1]) / 2), finite[-1] + 1])
    best = None
    for bias in itertools.product(*points):
        setting = knobs(rule, bias)
        if all(entry.met for entry in reached(profile, targets, setting)):
            value = over_refusal(profile, setting).value
            best = value if best is None or (value or 0) < best else best
    return best


@pytest.mark.parametrize("seed", range(4))
@EACH_RULE
def test_floors_are_kept_at_the_least_over_refusal_there_is(rule: Rule, seed: int) -> None:
    profile = synthetic(n=8, seed=seed)
    targets = Targets(min_rates={"a": 0.85, "b": 0.7})
    found = solve(profile, targets, rule=rule)
    assert found.feasible
    assert found.over_refusal.value == pytest.approx(brute_force(profile, rule, targets))


def most_refused(
    profile: Profile, ceilings: Sequence[tuple[Mask, float]], free: Sequence[str]
) -> int:
    """Most refuse rows refused, over every setting of the free knobs that keeps the ceilings."""
    points: list[list[float]] = []
    for knob, gap in zip(TWO.knobs, gaps(profile.control_logits, "route").T, strict=True):
        finite = np.sort(gap[np.isfinite(gap)])
        points.append([finite[0] - 1, *(finite + 1e-9)] if knob in free else [0.0])
    asked = profile.is_label("refuse")
    best = 0
    for bias in itertools.product(*points):
        refused = decide(profile.control_logits, knobs("route", bias)) > 0
        if all(refused[rows].mean() <= ceiling for rows, ceiling in ceilings):
            best = max(best, int(refused[asked].sum()))
    return best


def refused_by(found: Solution, profile: Profile) -> Mask:
    """Which prompts a greedy solution refuses."""
    setting = knobs(found.rule, [found.bias.get(name, 0.0) for name in TWO.knobs])
    return decide(profile.control_logits, setting) > 0


@pytest.mark.parametrize("seed", range(4))
def test_the_fewest_misses_under_a_ceiling_are_those_of_brute_force(seed: int) -> None:
    profile = synthetic(n=7, seed=seed)
    found = solve(profile, preset("balanced", TWO.category_ids))
    asked, benign = profile.is_label("refuse"), profile.is_label("respond")
    assert found.feasible
    best = most_refused(profile, [(benign, 0.05)], TWO.knobs)
    assert int(refused_by(found, profile)[asked].sum()) == best


@pytest.mark.parametrize("ceilings", [{"a": 0.25}, {"b": 0.4}, {"a": 0.25, "b": 0.4}])
def test_a_ceiling_of_a_category_counts_its_near_misses_alone(ceilings: dict[str, float]) -> None:
    # (prompts, their logit for the category) differ in each kind that could be counted.
    kinds: dict[tuple[str, str | None], tuple[int, float]] = {
        ("respond", "a"): (8, 0.5), ("respond", "b"): (10, -1.0), ("respond", None): (7, 2.0),
        ("refuse", "a"): (11, 1.0), ("refuse", "b"): (9, 1.5),
    }  # fmt: skip
    random = np.random.default_rng(0)
    entries: list[Any] = []
    for (label, category), (n, lean) in kinds.items():
        for _ in range(n):
            logits = random.normal([0, -3, -3], 1)
            logits[TWO.token_index("refuse", category or "a")] += 3 + lean
            entries.append((label, category, list(logits)))
    profile = profile_of(entries)
    targets = Targets(max_category_over_refusal=ceilings, fewest_misses=True)
    found = solve(profile, targets)
    refused = refused_by(found, profile)
    near = {c: profile.is_label("respond") & profile.is_category(c) for c in ceilings}
    assert found.feasible
    best = most_refused(profile, [(near[c], ceilings[c]) for c in ceilings], [*ceilings])
    assert int(refused[profile.is_label("refuse")].sum()) == best
    for entry, (category, ceiling) in zip(found.reached, ceilings.items(), strict=True):
        assert (entry.name, entry.asked) == (f"max-over-refusal {category}", ceiling)
        assert entry.rate.n == kinds["respond", category][0]
        assert entry.rate.count == refused[near[category]].sum()


def test_unnamed_knobs_stay_at_zero() -> None:
    found = solve(synthetic(), Targets(min_rates={"a": 0.9}))
    assert set(found.bias) == {"a"}


def test_out_of_reach_names_the_knob_that_stays_and_the_rows() -> None:
    # Two of four prompts of a lean to b, whose knob is not named: 50% is all there is.
    entries: list[Any] = [("refuse", "a", [3, 1, 0])] * 2 + [("refuse", "a", [3, 0, 1])] * 2
    entries += [("refuse", "b", [3, 0, 1])] * 2 + [("respond", None, [9, 0, 0])] * 4
    profile = profile_of(entries)
    found = solve(profile, Targets(min_rates={"a": 0.99}))
    assert not found.feasible
    assert found.reached[0].rate.value == 0.5
    assert "2 of 4 rows are not refused" in found.reasons[0]
    assert "2 lean to b (not named, so it stays at 0)" in found.reasons[0]
    assert str(profile.columns["id"][2]) in found.reasons[0]


def test_the_frontier_never_refuses_less_under_a_higher_ceiling() -> None:
    profile = synthetic(confusion=2.0)
    points = frontier(profile, Targets(min_rates={"a": 0.99, "b": 0.99}))
    missed = [
        sum(max(e.asked - (e.rate.value or 0), 0) for e in s.reached if e.kind == "at_least")
        + max((s.over_refusal.value or 0) - ceiling, 0)
        for ceiling, s in points
    ]
    assert all(later <= earlier + 1e-9 for earlier, later in itertools.pairwise(missed))


def test_a_point_of_the_frontier_keeps_its_ceiling_wherever_the_floors_allow() -> None:
    profile, targets = synthetic(), Targets(min_rates={"a": 0.9, "b": 0.9})
    least = solve(profile, targets).over_refusal.value or 0
    points = frontier(profile, targets)
    assert min(ceiling for ceiling, _ in points) < least < max(ceiling for ceiling, _ in points)
    for ceiling, solution in points:
        over = solution.reached[-1]
        assert (over.name, over.asked) == ("max-over-refusal", ceiling)
        assert over.rate == solution.over_refusal
        assert solution.feasible == (least <= ceiling)
        assert not solution.feasible or (over.rate.value or 0) <= ceiling
    assert len({solution.over_refusal.value for _, solution in points}) > 2


@LIGHT
@given(st.integers(0, 1000), st.sampled_from(RULES))
def test_the_order_of_prompts_changes_no_solution(seed: int, rule: Rule) -> None:
    profile = synthetic(n=9, seed=seed)
    shuffled = np.random.default_rng(seed).permutation(len(profile))
    targets = Targets(min_rates={"a": 0.8, "b": 0.8})
    here = solve(profile, targets, rule=rule)
    there = solve(profile.select(shuffled), targets, rule=rule)
    assert here.over_refusal == there.over_refusal


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("strict", Targets(min_rates={"safety": 0.99, "b": 0.9})),
        ("balanced", Targets(max_over_refusal=0.05, fewest_misses=True)),
        ("permissive", Targets(max_over_refusal=0.01, fewest_misses=True)),
    ],
)
def test_presets_ask_for_what_the_documentation_says(name: str, targets: Targets) -> None:
    assert preset(name, ("safety", "b")) == targets


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (Targets(rates={"a": 1.5}), "rate a: found 1.5; allowed: 0 to 1"),
        (Targets(rates={"a": float("nan")}), "rate a: found nan; allowed: 0 to 1"),
        (Targets(min_rates={"c": 0.5}), "unknown category 'c'"),
        (Targets(rates={"a": 0.2}, min_rates={"a": 0.5}), "rate a=0.2 contradicts min-rate a=0.5"),
        (Targets(), "nothing is asked for"),
    ],
)
def test_wrong_targets_are_refused(targets: Targets, message: str) -> None:
    with pytest.raises(InputError, match=message):
        solve(synthetic(n=3), targets)


def test_a_category_without_rows_is_named() -> None:
    profile = profile_of([("refuse", "a", [0, 1, 0]), ("respond", None, [1, 0, 0])])
    with pytest.raises(InputError, match="min-rate b: the profile has no refuse rows of it"):
        solve(profile, Targets(min_rates={"b": 0.5}))


def test_an_unknown_preset_is_named_with_the_nearest() -> None:
    with pytest.raises(InputError, match="did you mean 'strict'"):
        preset("strikt", ("a",))


def planted_mixture(shares: list[float], n: int, seed: int) -> Profile:
    """Prompts whose control probabilities are calibrated to equal shares of three labels."""
    random = np.random.default_rng(seed)
    labels = random.choice(3, size=n, p=shares)
    # Normal classes with means 2 e_k and unit variance: log-likelihood ratios are 2 x_k.
    logits = 2 * (random.normal(0, 1, (n, 3)) + 2 * np.eye(3)[labels])
    names = [("respond", None), ("refuse", "a"), ("refuse", "b")]
    return profile_of(
        [(*names[label], list(row)) for label, row in zip(labels, logits, strict=True)]
    )


def test_recentring_finds_a_planted_mix_and_its_bias() -> None:
    calibration = planted_mixture([1 / 3, 1 / 3, 1 / 3], 6000, 0)
    traffic = planted_mixture([0.8, 0.15, 0.05], 6000, 1)
    before, after, bias = recentre(calibration, traffic)
    assert after == pytest.approx([0.8, 0.15, 0.05], abs=0.02)
    assert before == pytest.approx([1 / 3] * 3, abs=0.02)
    assert bias == pytest.approx(np.log([0.15 / 0.8, 0.05 / 0.8]), abs=0.35)


def test_the_one_knob_is_free_with_a_single_category_too() -> None:
    taxonomy = Taxonomy(TWO.categories[:1], "Fine.", single_token=True)
    found = solve(synthetic(taxonomy), Targets(rates={"a": 0.9}))
    assert found.feasible
    assert found.reached[0].rate.count == 54
