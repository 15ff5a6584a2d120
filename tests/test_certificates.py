"""Certificates: hand-worked counts, planted profiles, and how often a promise is broken."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy.stats import binom, binomtest
from test_profiles import profile_of
from test_targeting import synthetic

from refusal_tokens.certificates import PATH, Certificate, certify, errors_allowed, rows_needed
from refusal_tokens.decision import RULES, Rule, decide, draws, knobs
from refusal_tokens.errors import InputError
from refusal_tokens.profiles import Profile
from refusal_tokens.solvers import Decision
from refusal_tokens.targeting import over_refusal, solve
from refusal_tokens.targets import Targets, free_knobs


@pytest.mark.parametrize(("bound", "rows"), [(0.01, 299), (0.02, 149), (0.05, 59)])
def test_without_an_error_the_rows_needed_are_those_of_the_closed_form(
    bound: float, rows: int
) -> None:
    # (1 - bound)^n <= 0.05
    assert errors_allowed(rows, bound, 0.05) == 0
    assert errors_allowed(rows - 1, bound, 0.05) == -1


@pytest.mark.parametrize(("bound", "rows"), [(0.01, 2665), (0.02, 1390), (0.05, 530)])
def test_rows_for_nine_tenths_power_are_the_published_ones(bound: float, rows: int) -> None:
    assert rows_needed(bound, 0.05) == pytest.approx(rows, rel=0.05)


@pytest.mark.parametrize("n", [59, 200, 1001])
def test_errors_allowed_agree_with_scipys_exact_test(n: int) -> None:
    allowed = errors_allowed(n, 0.05, 0.05)
    assert binomtest(allowed, n, 0.05, alternative="less").pvalue <= 0.05
    assert binomtest(allowed + 1, n, 0.05, alternative="less").pvalue > 0.05


def certified(profile: Profile, targets: Targets, confidence: float = 0.95) -> Certificate:
    solution = solve(profile, targets)
    return certify(profile, targets, solution, free_knobs(profile, targets), confidence)


def test_a_clean_profile_is_certified_at_the_solvers_own_setting() -> None:
    entries: list[Any] = [("respond", None, [4, 0, 0])] * 400
    entries += [("refuse", "a", [0, 4, 0])] * 300 + [("refuse", "b", [0, 0, 4])] * 300
    found = certified(profile_of(entries), Targets(min_rates={"a": 0.9}, max_over_refusal=0.05))
    assert found.certified
    assert found.shift == 0
    assert "With 95% confidence" in found.statement
    assert "says nothing about prompts made to break it" in found.statement
    for promise in found.promises:
        assert promise.errors == 0
        # Two promises share the 5%.
        bound = 0.05 if promise.at_most else 0.1
        assert binom.cdf(promise.errors_allowed, promise.n, bound) <= 0.025


def test_too_few_rows_say_how_many_are_needed() -> None:
    entries: list[Any] = [("respond", None, [4, 0, 0])] * 20 + [("refuse", "a", [0, 4, 0])] * 5
    found = certified(profile_of(entries), Targets(max_over_refusal=0.01))
    assert not found.certified
    assert found.bias is None
    assert "20 rows are too few even without an error; about 26" in found.statement


def test_promises_that_exclude_each_other_are_not_certified() -> None:
    # Refuse and respond rows with the same logits: no setting tells them apart.
    entries: list[Any] = [("respond", None, [0, x, -9]) for x in np.linspace(-3, 3, 400)]
    entries += [("refuse", "a", [0, x, -9]) for x in np.linspace(-3, 3, 400)]
    found = certified(profile_of(entries), Targets(min_rates={"a": 0.9}, max_over_refusal=0.05))
    assert not found.certified
    assert "no setting on the declared path" in found.statement
    assert all(promise.holds is not None for promise in found.promises)


def test_the_certified_setting_is_on_the_path_and_held_by_its_counts() -> None:
    profile = synthetic(n=150, seed=3)
    targets = Targets(max_over_refusal=0.1, fewest_misses=True)
    found = certified(profile, targets)
    assert found.certified
    assert found.shift in PATH
    setting = knobs("route", [(found.bias or {}).get(k, 0.0) for k in profile.taxonomy.knobs])
    benign = profile.is_label("respond")
    errors = int((decide(profile.control_logits, setting) > 0)[benign].sum())
    assert errors == found.promises[0].errors <= found.promises[0].errors_allowed


@pytest.mark.parametrize("decision", ["greedy", "sampled"])
@pytest.mark.parametrize("rule", RULES)
def test_a_move_leaves_the_knobs_that_no_target_names_where_they_are(
    rule: Rule, decision: Decision
) -> None:
    profile = synthetic(n=150, seed=3)
    near = profile.is_label("respond") & profile.is_category("a")
    targets = Targets(max_category_over_refusal={"a": 0.3})
    # So far up that the ceiling fails; what b refuses, at any setting, counts too.
    bias = {"a": 3.1, "b": 0.5}
    start = replace(solve(profile, targets, rule=rule), bias=bias, decision=decision)
    found = certify(profile, targets, start, free_knobs(profile, targets), 0.9)
    assert found.shift is not None
    assert found.shift < 0
    assert found.bias == {"a": 3.1 + found.shift, "b": 0.5}
    setting = knobs(rule, [found.bias["a"], found.bias["b"]], float(decision == "sampled"))
    refused = decide(profile.control_logits, setting, draws(0, range(len(profile)))) > 0
    (promise,) = found.promises
    assert promise.errors == refused[near].sum() <= promise.errors_allowed


@pytest.mark.parametrize("n", [0, 1, 7, 298, 299, 2000])
@pytest.mark.parametrize("bound", [0.0, 0.01, 0.5, 0.999])
def test_errors_allowed_are_those_of_a_count_by_count_search(n: int, bound: float) -> None:
    for delta in (0.05, 0.5, 1e-9):
        fit = [k for k in range(n + 1) if binom.cdf(k, n, bound) <= delta]
        assert errors_allowed(n, bound, delta) == max(fit, default=-1)


def test_rows_of_a_tiny_bound_are_counted_without_listing_them() -> None:
    assert rows_needed(1e-9, 0.05) > 3e9


def test_promises_are_broken_no_more_often_than_stated() -> None:
    population = synthetic(n=400, seed=5)
    targets = Targets(max_over_refusal=0.05, fewest_misses=True)
    solution = solve(synthetic(n=100, seed=6), targets)
    free = free_knobs(population, targets)
    random = np.random.default_rng(0)
    broken = made = 0
    for _ in range(300):
        rows = random.integers(len(population), size=800)
        found = certify(population.select(rows), targets, solution, free, 0.9)
        if not found.certified:
            continue
        made += 1
        bias = [(found.bias or {}).get(k, 0.0) for k in population.taxonomy.knobs]
        true = over_refusal(population, knobs("route", bias)).value
        broken += (true or 0) > 0.05
    assert made > 200
    assert binomtest(broken, 300, 0.1, alternative="greater").pvalue > 0.01


def test_floors_are_broken_no_more_often_than_stated() -> None:
    # At the solver's setting 399 of 500 are refused, a hair under the floor of 80%, and one step
    # up all: a certificate is wrong exactly where it takes the setting as it is.
    margins = np.repeat([0.1, -0.1], [399, 101])
    entries: list[Any] = [("refuse", "a", [0, margin, -99]) for margin in margins]
    population = profile_of([*entries, ("respond", None, [9, 0, 0])])
    targets = Targets(min_rates={"a": 0.8})
    start = replace(solve(population, targets), bias={})
    free = free_knobs(population, targets)
    random = np.random.default_rng(0)
    found = [
        certify(population.select(np.append(rows, 500)), targets, start, free, 0.9)
        for rows in random.integers(500, size=(300, 100))
    ]
    assert all(one.shift in (0.0, 0.25) for one in found)
    broken = sum(one.shift == 0 for one in found)
    assert broken
    assert binomtest(broken, 300, 0.1, alternative="greater").pvalue > 0.01


def test_a_sampled_policy_is_certified_on_its_own_draws() -> None:
    profile = synthetic(n=200)
    targets = Targets(max_over_refusal=0.3, fewest_misses=True)
    solution = solve(profile, targets, decision="sampled")
    free = free_knobs(profile, targets)
    first = certify(profile, targets, solution, free, 0.9, seed=1)
    assert first == certify(profile, targets, solution, free, 0.9, seed=1)
    assert first != certify(profile, targets, solution, free, 0.9, seed=2)


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95.0])
def test_a_confidence_outside_0_to_1_is_refused(confidence: float) -> None:
    with pytest.raises(InputError, match="--confidence"):
        certified(synthetic(n=5), Targets(max_over_refusal=0.1), confidence)


def test_plain_rates_alone_cannot_be_certified() -> None:
    with pytest.raises(InputError, match="name --max-over-refusal or --min-rate"):
        certified(synthetic(n=5), Targets(rates={"a": 0.5}))


@pytest.mark.parametrize("targets", [Targets(max_over_refusal=0.0), Targets(min_rates={"a": 1.0})])
def test_what_no_number_of_rows_certifies_is_refused(targets: Targets) -> None:
    with pytest.raises(InputError, match="no number of rows certifies"):
        certified(synthetic(n=5), targets)
