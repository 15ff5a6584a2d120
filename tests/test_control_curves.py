"""Control curves, leakage and confusion: what they say is what ``summarise`` and the rules say."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planted import normal_profile, regrouped
from test_profiles import TWO, Entry, profile_of

from refusal_tokens.curves import control_curve
from refusal_tokens.decision import RULES, Knobs, Rule, decide, probabilities
from refusal_tokens.errors import InputError
from refusal_tokens.leakage import confusion, leakage
from refusal_tokens.profiles import Profile
from refusal_tokens.summary import own_rates, summarise
from refusal_tokens.taxonomy import Category, Taxonomy
from refusal_tokens.tradeoff import trade_off

LIGHT = settings(max_examples=40)
BIAS = np.linspace(-6, 6, 13)
ENTRIES = st.lists(
    st.tuples(
        st.sampled_from(["refuse", "respond"]),
        st.sampled_from(["a", "b"]),
        st.lists(st.floats(-9, 9, width=32), min_size=3, max_size=3),
    ),
    min_size=1,
    max_size=10,
)
NO_FLOOR = [-np.inf, -np.inf]


def setting_of(rule: Rule, bias: list[float], temperature: float, floor: list[float]) -> Knobs:
    return Knobs(rule, np.array(bias, float), np.array(floor, float), temperature)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("floor", [NO_FLOOR, [-0.5, -np.inf], [1.0, -0.3]])
def test_a_point_of_the_curve_is_the_summary_at_that_setting(
    rule: Rule, temperature: float, floor: list[float]
) -> None:
    profile = normal_profile(60)
    setting = setting_of(rule, [0.0, 0.8], temperature, floor)
    curve = control_curve(profile, "a", setting, BIAS)
    inside = profile.is_label("refuse") & profile.is_category("a")
    for i, bias in enumerate(BIAS):
        at = replace(setting, bias=np.array([bias, 0.8]))
        entry = summarise(profile, at).categories[0]
        assert curve.refusal[i] == pytest.approx(entry.refused.value, abs=1e-12)
        assert curve.near_miss[i] == pytest.approx(entry.over_refused.value, abs=1e-12)
        everyone = summarise(profile, at).over_refused.value
        assert curve.over_refusal[i] == pytest.approx(everyone, abs=1e-12)
        chances = probabilities(profile.control_logits, at)[inside]
        assert curve.refusal[i] == pytest.approx(1 - chances[:, 0].mean(), abs=1e-12)
        assert curve.own[i] == pytest.approx(chances[:, 1].mean(), abs=1e-12)
    assert (curve.n_refuse, curve.n_near, curve.n_respond) == (15, 12, 30)


def test_the_greedy_curve_is_what_decisions_say() -> None:
    profile = normal_profile(60)
    setting = setting_of("route", [0, 0], 0.0, NO_FLOOR)
    curve = control_curve(profile, "b", setting, BIAS)
    rows = profile.is_label("refuse") & profile.is_category("b")
    for i, bias in enumerate(BIAS):
        at = replace(setting, bias=np.array([0, bias]))
        decisions = decide(profile.control_logits, at)
        assert curve.refusal[i] == (decisions[rows] > 0).mean()
        assert curve.own[i] == pytest.approx(own_rates(profile, "b", at).value)


@pytest.mark.parametrize("rule", RULES)
@LIGHT
@given(ENTRIES, st.floats(-3, 3), st.sampled_from([0.0, 0.5, 2.0]))
def test_every_rate_rises_with_its_own_knob(
    rule: Rule, entries: list[Entry], other: float, temperature: float
) -> None:
    entries = [*entries, ("refuse", "a", [0.0, 1.0, 0.5])]
    setting = setting_of(rule, [0, other], temperature, NO_FLOOR)
    curve = control_curve(profile_of(entries), "a", setting, BIAS)
    for values in (curve.refusal, curve.own, curve.near_miss, curve.over_refusal):
        if not np.isnan(values).any():
            assert (np.diff(values) >= -1e-12).all()


ONE = Taxonomy(TWO.categories[:1], TWO.respond_description)


@LIGHT
@given(ENTRIES, st.sampled_from([0.0, 0.8]))
def test_with_one_category_all_rules_draw_the_same_curves(
    entries: list[Entry], temperature: float
) -> None:
    own: list[Entry] = [(label, "a", z[:2]) for label, _, z in entries]
    own += [("refuse", "a", [0.0, 1.0]), ("respond", "a", [2.0, 0.0])]
    profile = profile_of(own, ONE)
    found = []
    for rule in RULES:
        setting = Knobs(rule, np.zeros(1), np.full(1, -np.inf), temperature)
        curve, whole = control_curve(profile, "a", setting, BIAS), trade_off(profile, setting)
        numbers = (curve.refusal, curve.own, whole.over_refusal, whole.refusal)
        found.append(np.concatenate(numbers))
    np.testing.assert_allclose(found[1], found[0], atol=1e-9)
    np.testing.assert_allclose(found[2], found[0], atol=1e-9)


@LIGHT
@given(st.randoms(use_true_random=False), st.sampled_from(RULES), st.sampled_from([0.0, 1.0]))
def test_the_order_of_prompts_changes_nothing(random: object, rule: Rule, t: float) -> None:
    profile = regrouped(normal_profile(40), 1)
    order = np.random.default_rng(random.randrange(2**30)).permutation(len(profile))  # type: ignore[attr-defined]
    shuffled = profile.select(order)
    setting = setting_of(rule, [0.3, -0.2], t, NO_FLOOR)
    for knob in ("a", "b"):
        one, two = (control_curve(p, knob, setting, BIAS) for p in (profile, shuffled))
        np.testing.assert_allclose(one.refusal, two.refusal, atol=1e-12)
    np.testing.assert_allclose(
        trade_off(profile, setting).refusal, trade_off(shuffled, setting).refusal, atol=1e-12
    )
    np.testing.assert_array_equal(
        leakage(profile, setting).change, leakage(shuffled, setting).change
    )


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_order_of_categories_changes_nothing(rule: Rule, temperature: float) -> None:
    profile = normal_profile(60)
    swapped = swap_categories(profile)
    one = setting_of(rule, [0.4, -0.3], temperature, NO_FLOOR)
    two = setting_of(rule, [-0.3, 0.4], temperature, NO_FLOOR)
    for knob in ("a", "b"):
        before = control_curve(profile, knob, one, BIAS)
        after = control_curve(swapped, knob, two, BIAS)
        np.testing.assert_allclose(before.refusal, after.refusal, atol=1e-12)
        np.testing.assert_allclose(before.own, after.own, atol=1e-12)
    first, second = leakage(profile, one), leakage(swapped, two)
    np.testing.assert_array_equal(first.change, second.change[::-1, ::-1])
    counts = confusion(swapped, two)
    for kind, decisions in confusion(profile, one).items():
        assert counts[kind] == pytest.approx(decisions)


def swap_categories(profile: Profile) -> Profile:
    return replace(
        profile,
        control_logits=profile.control_logits[:, [0, 2, 1]],
        taxonomy=Taxonomy(TWO.categories[::-1], TWO.respond_description),
    )


def test_leakage_of_planted_logits() -> None:
    # Each category's rows need -1 to -4; of b's, two lean to a.
    entries: list[Entry] = [("refuse", "a", [0, -k, -20]) for k in (1, 2, 3, 4)]
    entries += [("refuse", "b", [0, -20, -k]) for k in (1, 2)]
    entries += [("refuse", "b", [0, -2.2, -20]), ("refuse", "b", [0, -9, -20])]
    found = leakage(profile_of(entries), setting_of("route", [0, 0], 0.0, NO_FLOOR))
    np.testing.assert_allclose(found.change[0], [0.5, 0.25])
    assert found.misrouted.tolist() == [[1.0, 0.5], [0.0, 0.5]]
    assert found.changed_unrouted == 0


def test_confusion_counts_every_prompt_once() -> None:
    profile = normal_profile(60)
    for temperature in (0.0, 1.0):
        counts = confusion(profile, setting_of("bias", [0, 0], temperature, NO_FLOOR))
        assert sum(sum(row.values()) for row in counts.values()) == pytest.approx(60)
        assert sum(counts["ordinary"].values()) == pytest.approx(6)


def test_a_knob_without_refuse_rows_has_no_curve() -> None:
    profile = profile_of([("refuse", "a", [0.0, 1.0, 0.0])])
    with pytest.raises(InputError, match="no prompts labelled refuse/b"):
        control_curve(profile, "b", setting_of("route", [0, 0], 0.0, NO_FLOOR), BIAS)


def test_one_token_stands_for_all_categories() -> None:
    taxonomy = Taxonomy((Category("a", "A."), Category("b", "B.")), "Fine.", single_token=True)
    profile = normal_profile(40, taxonomy=taxonomy)
    setting = Knobs("route", np.zeros(1), np.full(1, -np.inf), 0.0)
    curve = control_curve(profile, "refuse", setting, BIAS)
    assert (curve.n_refuse, curve.n_near) == (20, 16)


def test_one_token_serves_a_single_category_too() -> None:
    taxonomy = Taxonomy((Category("a", "A."),), "Fine.", single_token=True)
    profile = normal_profile(40, taxonomy=taxonomy)
    setting = Knobs("route", np.zeros(1), np.full(1, -np.inf), 0.0)
    curve = control_curve(profile, "refuse", setting, BIAS)
    assert (curve.n_refuse, curve.n_near) == (20, 16)
