"""The decision rules: planted answers, identities, floors, sampling and flips."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.stats import binom

from refusal_tokens.decision import (
    RULES,
    Flip,
    Knobs,
    Rule,
    decide,
    draws,
    flips,
    knobs,
    margins,
    probabilities,
)
from refusal_tokens.policy import Policy
from refusal_tokens.taxonomy import Category, Taxonomy

EACH_RULE = pytest.mark.parametrize("rule", RULES)
LIGHT = settings(max_examples=60)
NATS = st.floats(-20, 20)
# Multiples of 1/8 add without rounding, so that equalities hold exactly and ties are common.
EIGHTHS = st.integers(-64, 64).map(lambda n: n / 8)


def logits_of(categories: int, values: st.SearchStrategy[float] = NATS) -> Any:
    shape = st.tuples(st.integers(1, 12), st.just(categories + 1))
    return arrays(np.float64, shape, elements=values)


@st.composite
def cases(
    draw: st.DrawFn, values: st.SearchStrategy[float] = NATS, least: int = 1
) -> tuple[Any, Any]:
    """Logits of some prompts, and a bias per category."""
    categories = draw(st.integers(least, 5))
    bias = arrays(np.float64, categories, elements=values)
    return draw(logits_of(categories, values)), draw(bias)


def one(logits: list[float], rule: Rule, bias: list[float]) -> int:
    return int(decide(np.array([logits]), knobs(rule, bias))[0])


@pytest.mark.parametrize(
    ("rule", "margin"),
    # LSE(3, 2) = 3.313262; LSE(1, 2) = 2.313262.
    [("bias", 3 - 1), ("route", 3.313262 - 1), ("threshold", 3 - 2.313262)],
)
def test_margins_are_the_left_sides_of_the_rules(rule: Rule, margin: float) -> None:
    found, category = margins(np.array([[1.0, 3.0, 2.0]]), knobs(rule, [0.0, 0.0]))
    assert found[0] == pytest.approx(margin, abs=1e-6)
    assert category[0] == 1


@pytest.mark.parametrize(
    ("rule", "logits", "bias", "decision"),
    [
        # Two weak refusals outweigh respond together, not each: LSE(0.5, 0.5) = 1.193.
        ("bias", [1, 0.5, 0.5], [0, 0], 0),
        ("route", [1, 0.5, 0.5], [0, 0], 1),
        ("threshold", [1, 0.5, 0.5], [0, 0], 0),
        # LSE(1, 0.5) = 1.47408, so that the top category needs 0.97408 more.
        ("threshold", [1, 0.5, 0.5], [0.9740, 0], 0),
        ("threshold", [1, 0.5, 0.5], [0.9742, 0], 1),
        ("route", [1, 0.5, 0.5], [-0.1931, 0], 1),
        ("route", [1, 0.5, 0.5], [-0.1932, 0], 0),
        # A bias takes prompts from another category under `bias` alone.
        ("bias", [0, 2, 1], [0, 1.5], 2),
        ("route", [0, 2, 1], [0, 1.5], 1),
        ("threshold", [0, 2, 1], [0, 1.5], 1),
        # A knob lowered under `bias` hands its prompt to the next; under `route` it answers.
        ("bias", [0, 2, 1], [-9, 0], 2),
        ("route", [0, 2, 1], [-9, 0], 0),
        ("threshold", [0, 2, 1], [-9, 0], 0),
        ("bias", [1, 0, 0.5], [0, 0.75], 2),
        ("route", [5, 0, 1], [0, 3.6], 0),  # LSE(0, 1) = 1.31326; 3.68674 are needed
        ("route", [5, 0, 1], [0, 3.7], 2),
    ],
)
def test_planted_answers(rule: Rule, logits: list[float], bias: list[float], decision: int) -> None:
    assert one(logits, rule, bias) == decision


@EACH_RULE
def test_ties_respond(rule: Rule) -> None:
    assert one([0.5, 0.5], rule, [0.0]) == 0
    assert one([1.5, 0.5], rule, [1.0]) == 0
    assert one([1.5, 0.5], rule, [1.0 + 2**-40]) == 1


def test_equal_categories_go_to_the_first() -> None:
    for rule in RULES:
        assert one([-9, 1, 1, 0], rule, [1, 1, 1]) == 1


@LIGHT
@given(cases(EIGHTHS))
def test_zero_bias_is_the_unsteered_arg_max(case: tuple[Any, Any]) -> None:
    logits, bias = case
    unsteered = decide(logits, knobs("bias", np.zeros_like(bias)))
    np.testing.assert_array_equal(unsteered, logits.argmax(axis=1))


@LIGHT
@given(cases(EIGHTHS))
def test_a_bias_equals_the_same_amount_on_the_logits(case: tuple[Any, Any]) -> None:
    logits, bias = case
    shifted = logits + np.concatenate([[0.0], bias])
    np.testing.assert_array_equal(decide(logits, knobs("bias", bias)), shifted.argmax(axis=1))


@LIGHT
@given(logits_of(1, EIGHTHS), EIGHTHS)
def test_with_one_category_all_rules_agree(logits: Any, bias: float) -> None:
    by_hand = (logits[:, 1] + bias > logits[:, 0]).astype(int)
    for rule in RULES:
        np.testing.assert_array_equal(decide(logits, knobs(rule, [bias])), by_hand)


@EACH_RULE
@LIGHT
@given(cases(), st.data())
def test_raising_a_knob_releases_no_prompt(rule: Rule, case: tuple[Any, Any], data: Any) -> None:
    logits, bias = case
    knob = data.draw(st.integers(0, len(bias) - 1))
    raised = bias.copy()
    raised[knob] += data.draw(st.floats(0, 20))
    before, after = decide(logits, knobs(rule, bias)), decide(logits, knobs(rule, raised))
    assert ((after > 0) >= (before > 0)).all()
    assert ((after == knob + 1) >= (before == knob + 1)).all()


@EACH_RULE
@LIGHT
@given(cases(EIGHTHS), EIGHTHS, st.data())
def test_a_knob_moved_and_moved_back_is_as_before(
    rule: Rule, case: tuple[Any, Any], step: float, data: Any
) -> None:
    logits, bias = case
    names = [f"c{i}" for i in range(len(bias))]
    taxonomy = Taxonomy(tuple(Category(name, "x") for name in names), "y")
    policy = Policy(rule, dict(zip(names, bias.tolist(), strict=True)))
    knob = data.draw(st.sampled_from(names))
    moved = policy.with_bias({knob: policy.bias[knob] + step})
    back = moved.with_bias({knob: moved.bias[knob] - step})
    np.testing.assert_array_equal(
        decide(logits, back.knobs(taxonomy)), decide(logits, knobs(rule, bias))
    )


@EACH_RULE
@LIGHT
@given(cases(), st.randoms(use_true_random=False))
def test_prompts_permuted_permute_the_decisions(
    rule: Rule, case: tuple[Any, Any], random: Any
) -> None:
    logits, bias = case
    order = random.sample(range(len(logits)), len(logits))
    found = decide(logits, knobs(rule, bias))
    np.testing.assert_array_equal(decide(logits[order], knobs(rule, bias)), found[order])


@EACH_RULE
@LIGHT
@given(cases(EIGHTHS), st.randoms(use_true_random=False))
def test_categories_permuted_permute_the_decisions(
    rule: Rule, case: tuple[Any, Any], random: Any
) -> None:
    logits, bias = case
    # Distinct refusals, biased or not: a tie between categories goes to the first of them.
    logits[:, 1:] += np.arange(len(bias)) / 64
    biased = logits[:, 1:] + bias
    assume(all(len(set(row)) == len(row) for row in biased.tolist()))
    # A sum depends on its order in the last bit, so that ties with respond are left out.
    found, _ = margins(logits, knobs(rule, bias))
    assume((np.abs(found) > 1e-9).all())
    order = np.array(random.sample(range(len(bias)), len(bias)))
    permuted = decide(logits[:, [0, *(order + 1)]], knobs(rule, bias[order]))
    names = np.array([0, *(order + 1)])
    np.testing.assert_array_equal(names[permuted], decide(logits, knobs(rule, bias)))


@LIGHT
@given(cases(), st.floats(0.01, 0.99))
def test_equal_route_biases_are_a_threshold_on_the_summed_probability(
    case: tuple[Any, Any], tau: float
) -> None:
    logits, bias = case
    weights = np.exp(logits)
    summed = weights[:, 1:].sum(axis=1) / weights.sum(axis=1)
    assume((np.abs(summed - tau) > 1e-9).all())
    bias = np.full_like(bias, -math.log(tau / (1 - tau)))
    refused = decide(logits, knobs("route", bias)) > 0
    np.testing.assert_array_equal(refused, summed > tau)


@LIGHT
@given(cases(), st.floats(0.01, 0.99))
def test_threshold_is_one_on_the_probability_of_the_top_category(
    case: tuple[Any, Any], tau: float
) -> None:
    logits, bias = case
    weights = np.exp(logits)
    top = weights[:, 1:].max(axis=1) / weights.sum(axis=1)
    assume((np.abs(top - tau) > 1e-9).all())
    bias = np.full_like(bias, -math.log(tau / (1 - tau)))
    found = decide(logits, knobs("threshold", bias))
    np.testing.assert_array_equal(found, np.where(top > tau, logits[:, 1:].argmax(axis=1) + 1, 0))


@LIGHT
@given(cases(least=2), NATS, st.data())
def test_a_route_knob_acts_only_on_prompts_routed_to_it(
    case: tuple[Any, Any], value: float, data: Any
) -> None:
    logits, bias = case
    knob = data.draw(st.integers(0, len(bias) - 1))
    elsewhere = logits[:, 1:].argmax(axis=1) != knob
    moved = bias.copy()
    moved[knob] = value
    before, after = decide(logits, knobs("route", bias)), decide(logits, knobs("route", moved))
    np.testing.assert_array_equal(after[elsewhere], before[elsewhere])
    assert set(after[~elsewhere]) <= {0, knob + 1}


@EACH_RULE
@LIGHT
@given(cases(), st.sampled_from([0.0, 0.5]), st.data())
def test_a_floor_holds_its_prompts_whatever_the_knobs_say(
    rule: Rule, case: tuple[Any, Any], temperature: float, data: Any
) -> None:
    logits, bias = case
    finite = st.floats(-20, 20) | st.just(-np.inf)
    floor = data.draw(arrays(np.float64, len(bias), elements=finite))
    numbers = data.draw(arrays(np.float64, len(logits), elements=st.floats(0, 0.999)))
    held = (logits[:, 1:] + floor > logits[:, :1]).any(axis=1)
    with_floor = decide(logits, Knobs(rule, bias, floor, temperature), numbers)
    without = decide(logits, knobs(rule, bias, temperature), numbers)
    assert (with_floor[held] > 0).all()
    np.testing.assert_array_equal(with_floor[~held], without[~held])
    np.testing.assert_array_equal(with_floor[without > 0], without[without > 0])


@EACH_RULE
def test_a_floor_answers_for_its_own_category(rule: Rule) -> None:
    logits = np.array([[0.0, 1.0, 3.0]])
    lowered = Knobs(rule, np.array([0.0, -30.0]), np.array([-0.5, -np.inf]))
    assert decide(logits, lowered).tolist() == [1]
    assert decide(np.array([[0.0, 0.5, 3.0]]), lowered).tolist() == [1 if rule == "bias" else 0]


@EACH_RULE
def test_a_floor_takes_the_chance_of_responding(rule: Rule) -> None:
    logits = np.array([[0.0, 1.0, 0.5], [0.0, -1.0, 0.5]])
    floors = np.array([0.0, -np.inf])
    free = probabilities(logits, knobs(rule, [0.0, 0.0], 1.0))
    found = probabilities(logits, Knobs(rule, np.zeros(2), floors, 1.0))
    np.testing.assert_allclose(found[0], [0, free[0, 0] + free[0, 1], free[0, 2]], atol=1e-12)
    np.testing.assert_allclose(found[1], free[1])


def by_hand(rule: Rule, temperature: float) -> list[float]:
    """Chances for logits [0.5, 1.0, 0.25] with biases [-0.25, 0.5]."""
    if rule == "bias":
        weights = [math.exp(x / temperature) for x in (0.5, 0.75, 0.75)]
        return [w / sum(weights) for w in weights]
    if rule == "route":
        margin = math.log(math.exp(1.0) + math.exp(0.25)) - 0.5 - 0.25
    else:
        margin = 1.0 - math.log(math.exp(0.5) + math.exp(0.25)) - 0.25
    refuse = 1 / (1 + math.exp(-margin / temperature))
    return [1 - refuse, refuse, 0.0]


@EACH_RULE
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_probabilities_are_those_worked_by_hand(rule: Rule, temperature: float) -> None:
    found = probabilities(np.array([[0.5, 1.0, 0.25]]), knobs(rule, [-0.25, 0.5], temperature))
    np.testing.assert_allclose(found, [by_hand(rule, temperature)], atol=1e-12)


@EACH_RULE
@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_sampled_frequencies_lie_within_a_999_band(rule: Rule, temperature: float) -> None:
    n = 5000
    logits = np.tile([0.5, 1.0, 0.25], (n, 1))
    setting = knobs(rule, [-0.25, 0.5], temperature)
    counts = np.bincount(decide(logits, setting, draws(11, range(n))), minlength=3)
    for count, chance in zip(counts, by_hand(rule, temperature), strict=True):
        low, high = binom.ppf([0.0005, 0.9995], n, chance)
        assert low <= count <= high, (count, chance)


@EACH_RULE
@LIGHT
@given(cases(), st.floats(0.05, 5), st.integers(0, 2**32 - 1))
def test_a_batch_equals_its_rows(
    rule: Rule, case: tuple[Any, Any], temperature: float, seed: int
) -> None:
    logits, bias = case
    rows = [7 * i for i in range(len(logits))]
    setting = knobs(rule, bias, temperature)
    batch = decide(logits, setting, draws(seed, rows))
    alone = [
        decide(logits[i : i + 1], setting, draws(seed, [row]))[0] for i, row in enumerate(rows)
    ]
    assert batch.tolist() == alone


def test_a_draw_depends_on_seed_row_and_sequence_alone() -> None:
    rows, sequences = [5, 0, 3, 5], [0, 0, 2, 1]
    together = draws(9, rows, sequences)
    alone = [draws(9, [r], [s])[0] for r, s in zip(rows, sequences, strict=True)]
    assert together.tolist() == alone
    assert draws(9, [5])[0] == together[0]
    others = [draws(8, [5])[0], draws(9, [6])[0], draws(9, [5], [1])[0], draws(5, [9])[0]]
    assert len({together[0], *others}) == 5
    assert ((together >= 0) & (together < 1)).all()


@EACH_RULE
@LIGHT
@given(cases())
def test_a_cold_temperature_decides_as_greedily(rule: Rule, case: tuple[Any, Any]) -> None:
    logits, bias = case
    logits[:, 1:] += np.arange(len(bias)) / 16
    biased = np.sort(logits + np.concatenate([[0.0], bias]), axis=1)
    assume((np.diff(biased, axis=1) > 0.01).all())
    assume((np.abs(margins(logits, knobs(rule, bias))[0]) > 0.01).all())
    sampled = decide(logits, knobs(rule, bias, 1e-4), draws(0, range(len(logits))))
    np.testing.assert_array_equal(sampled, decide(logits, knobs(rule, bias)))


@EACH_RULE
@LIGHT
@given(cases(), st.floats(0, 3))
def test_probabilities_sum_to_one(rule: Rule, case: tuple[Any, Any], temperature: float) -> None:
    logits, bias = case
    assume(temperature == 0 or temperature > 1e-3)
    found = probabilities(logits, knobs(rule, bias, temperature))
    assert (found >= 0).all()
    np.testing.assert_allclose(found.sum(axis=1), 1.0)


@pytest.mark.filterwarnings("error")
@EACH_RULE
def test_the_smallest_temperatures_give_no_nan(rule: Rule) -> None:
    found = probabilities(np.array([[0.0, 3.0], [2.0, 2.0]]), knobs(rule, [0.0], 1e-310))
    assert found.tolist() == [[0.0, 1.0], [0.5, 0.5]]


def test_wrong_arrays_are_refused() -> None:
    with pytest.raises(ValueError, match="must be finite"):
        decide(np.array([[0.0, np.nan]]), knobs("route", [0.0]))
    with pytest.raises(ValueError, match="must be finite"):
        decide(np.array([[np.inf, 0.0]]), knobs("route", [0.0]))
    with pytest.raises(ValueError, match=r"shape \(1, 3\); expected \(prompts, 2\)"):
        decide(np.zeros((1, 3)), knobs("bias", [0.0]))
    with pytest.raises(ValueError, match=r"shape \(3,\)"):
        decide(np.zeros(3), knobs("bias", [0.0, 0.0]))
    with pytest.raises(ValueError, match="needs draws"):
        decide(np.zeros((1, 2)), knobs("bias", [0.0], 1.0))


def test_huge_logits_do_not_overflow() -> None:
    logits = np.array([[1e4, 1e4 + 1, -1e4], [-1e4, -1e4 - 1, -2e4]], dtype=np.float32)
    for rule in RULES:
        assert decide(logits, knobs(rule, [0.0, 0.0])).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("rule", "logits", "bias", "expected"),
    [
        # Now refused as 1. Below -1 knob 1 hands over to 2; knob 2 overtakes above 1.
        ("bias", [0, 2, 1], [0, 0], [Flip(0, -1.0, 2), Flip(1, 1.0, 2)]),
        # Answered: either knob must lift its own logit above respond.
        ("bias", [3, 2, 1], [0, 0], [Flip(0, 1.0, 1), Flip(1, 2.0, 2)]),
        # Only the knob that the prompt is routed to acts: LSE(2, 1) = 2.313262.
        ("route", [0, 2, 1], [0, 0], [Flip(0, -2.313262, 0)]),
        ("route", [5, 2, 1], [0, 0], [Flip(0, 2.686738, 1)]),
        # LSE(0, 1) = 1.313262.
        ("threshold", [0, 2, 1], [0, 0], [Flip(0, -0.686738, 0)]),
    ],
)
def test_flips_worked_by_hand(
    rule: Rule, logits: list[float], bias: list[float], expected: list[Flip]
) -> None:
    found = flips(np.array(logits, dtype=float), knobs(rule, bias))
    assert [(flip.knob, flip.decision) for flip in found] == [
        (flip.knob, flip.decision) for flip in expected
    ]
    assert [f.bias for f in found] == pytest.approx([f.bias for f in expected], abs=1e-6)


@EACH_RULE
@settings(max_examples=80)
@given(cases(), st.data())
def test_flips_change_the_decision_when_crossed_and_not_before(
    rule: Rule, case: tuple[Any, Any], data: Any
) -> None:
    logits, bias = case
    prompt = logits[0]
    floor = data.draw(arrays(np.float64, len(bias), elements=st.floats(-9, 0) | st.just(-np.inf)))
    setting = Knobs(rule, bias, floor)
    biased = np.sort(prompt + np.concatenate([[0.0], bias]))
    assume((np.diff(biased) > 1e-3).all())
    assume(abs(margins(prompt[None], setting)[0][0]) > 1e-3)

    def decision_at(knob: int, value: float) -> int:
        moved = bias.copy()
        moved[knob] = value
        return int(decide(prompt[None], Knobs(rule, moved, floor))[0])

    now = int(decide(prompt[None], setting)[0])
    found = {flip.knob: flip for flip in flips(prompt, setting)}
    for knob in range(len(bias)):
        start = bias[knob]
        if knob not in found:
            values = [*np.linspace(start - 90, start + 90, 61)]
            assert {decision_at(knob, value) for value in values} == {now}
            continue
        flip = found[knob]
        way = math.copysign(1e-6, flip.bias - start)
        assert decision_at(knob, flip.bias + way) == flip.decision != now
        nearer = np.linspace(start, flip.bias - way, 9)
        farther = 2 * start - nearer
        assert {decision_at(knob, value) for value in [*nearer, *farther]} == {now}
    distances = [abs(flip.bias - bias[knob]) for knob, flip in found.items()]
    assert distances == sorted(distances)


def test_a_category_that_wins_by_a_tie_flips_at_once_when_lowered() -> None:
    found = flips(np.array([0.0, 2.0, 2.0]), knobs("bias", [0.0, 0.0]))
    assert Flip(0, 0.0, 2) in found


def test_a_tie_is_found_though_sums_are_rounded() -> None:
    (one, _) = flips(np.array([0.0, 2.0, 2.0]), knobs("bias", [0.1, 0.1]))
    assert (one.knob, one.bias, one.decision) == (0, pytest.approx(0.1), 2)


def test_a_rule_of_another_name_is_no_rule() -> None:
    with pytest.raises(ValueError, match="found 'Route'; allowed: route, bias, threshold"):
        knobs("Route", [0.0])  # type: ignore[arg-type]
