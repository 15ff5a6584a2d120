"""Shortcuts: planted ones are found, absent ones are not, and the interval keeps its promise."""

from __future__ import annotations

import random

import numpy as np
import pytest
from audit_rows import row

from refusal_tokens.rates import auc
from refusal_tokens.rows import Row
from refusal_tokens.shortcuts import find_shortcuts, grouped_area

WORDS = [f"word{i}" for i in range(30)]


def pairs(seed: int, refuse_end: str = "", respond_end: str = "", count: int = 60) -> list[Row]:
    """Minimal pairs of the same random words, each label with an ending of its own."""
    draw = random.Random(seed)
    rows = []
    for number in range(count):
        for label, end in (("refuse", refuse_end), ("respond", respond_end)):
            text = " ".join(draw.choices(WORDS, k=8)) + end
            rows.append(row(f"{number}-{label}", text, label, "a", group=f"g{number}"))
    return rows


def test_a_planted_word_is_found_and_named() -> None:
    found = find_shortcuts(pairs(0, " silently", " publicly"), "a")
    assert found.words is not None
    assert found.words.value > 0.99
    assert (found.refuse, found.respond) == (60, 60)
    assert str(found.refuse_words[0]) == "silently 60:0"
    assert str(found.respond_words[0]) == "publicly 0:60"
    assert len(found.refuse_words) == len(found.respond_words) == 10
    assert found.form is not None
    assert found.form.value < 0.7


def test_a_planted_form_is_found_without_words() -> None:
    found = find_shortcuts(pairs(0, "?", "."), "a")
    assert found.words is not None
    assert found.form is not None
    assert found.form.value > 0.99
    assert found.words.value < 0.7


def test_without_a_shortcut_the_areas_are_near_chance() -> None:
    found = [find_shortcuts(pairs(seed, count=100), "a") for seed in range(8)]
    for areas in ([one.words for one in found], [one.form for one in found]):
        values = [area.value for area in areas if area is not None]
        assert np.mean(values) == pytest.approx(0.5, abs=0.04)


def test_the_order_of_rows_changes_nothing() -> None:
    rows = pairs(1, " secretly")
    assert find_shortcuts(random.Random(2).sample(rows, len(rows)), "a") == find_shortcuts(
        rows, "a"
    )


def test_only_labelled_rows_of_the_category_count() -> None:
    rows = pairs(1, " secretly")
    others = [row("x", "other", "refuse", "b"), row("y", "none", None, "a"), row("z", "plain")]
    assert find_shortcuts([*others, *rows], "a") == find_shortcuts(rows, "a")


@pytest.mark.parametrize("count", [0, 1, 4, 9])
def test_too_few_rows_give_no_area(count: int) -> None:
    found = find_shortcuts(pairs(0, count=count), "a")
    assert (found.words, found.form, found.refuse_words) == (None, None, ())
    assert (found.refuse, found.respond) == (count, count)


def test_rows_without_a_word_in_common_give_the_area_of_form_alone() -> None:
    rows = [
        row(f"{i}", f"w{i}" + "?" * (i % 2), ("refuse", "respond")[i % 2], "a") for i in range(60)
    ]
    found = find_shortcuts(rows, "a")
    assert found.words is None
    assert found.form is not None
    assert found.form.value == 1.0


def test_too_few_groups_give_no_area() -> None:
    rows = [row(f"{i}", f"text {i}", ("refuse", "respond")[i % 2], "a", "g") for i in range(40)]
    assert find_shortcuts(rows, "a").words is None


def test_the_area_is_that_of_the_ranks_and_single_groups_give_delong() -> None:
    scores = np.array([0.1, 0.4, 0.35, 0.8, 0.4])
    positive = np.array([False, False, True, True, True])
    found = grouped_area(scores, positive, np.arange(5))
    assert found.value == pytest.approx(auc(scores, positive))
    # Placements of the positives 1/2, 1, 3/4 and of the negatives 1, 1/2 around the area 3/4.
    half = 1.96 * np.sqrt(0.0625 / 3 + 0.125 / 2)
    assert found.low == pytest.approx(found.value - half)
    assert found.high == 1.0


def test_rows_of_one_group_count_as_less_than_rows_of_their_own() -> None:
    draw = np.random.default_rng(0)
    scores = np.repeat(draw.normal(size=40), 5)
    positive = np.repeat(np.arange(40) % 2 == 0, 5)
    alone = grouped_area(scores, positive, np.arange(200))
    grouped = grouped_area(scores, positive, np.repeat(np.arange(40), 5))
    assert grouped.value == alone.value
    assert grouped.high - grouped.low > 1.8 * (alone.high - alone.low)


def test_the_interval_covers_chance_as_often_as_it_says() -> None:
    draw = np.random.default_rng(1)
    groups = np.repeat(np.arange(60), 2)
    covered = []
    for _ in range(400):
        scores = np.repeat(draw.normal(size=60), 2) + draw.normal(size=120)
        found = grouped_area(scores, np.tile([True, False], 60), groups)
        covered.append(found.low <= 0.5 <= found.high)
    assert 0.91 <= np.mean(covered) <= 0.99
