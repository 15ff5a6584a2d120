"""Duplicates: planted at known similarities; which pairs are faults; order changes nothing."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import combinations

import pytest
from audit_rows import chat, row
from hypothesis import given
from hypothesis import strategies as st

from refusal_tokens.duplicates import (
    NEAR,
    duplicate_findings,
    jaccard,
    near_pairs,
    word_grams,
)
from refusal_tokens.findings import Finding
from refusal_tokens.rows import Row

# Ten words; a change of the last one leaves 7 of 9 word 3-grams shared, of the fifth 5 of 11.
TEN = "one two three four five six seven eight nine ten"
LAST = TEN.replace("ten", "zero")
FIFTH = TEN.replace("five", "zero")


def kinds(*rows: Row) -> list[tuple[str, bool]]:
    return [(found.kind, found.fault) for found in duplicate_findings({"train": rows})]


@pytest.mark.parametrize(
    ("one", "other", "similarity"),
    [
        (TEN, LAST, 7 / 9),
        (TEN, FIFTH, 5 / 11),
        (TEN, TEN, 1.0),
        (TEN, "none of these words are in it", 0.0),
        ("what is a quark", "what is a quasar", 0.0),
        ("cats or dogs?", "Dogs or cats", 1.0),
        ("one two three four", "one two three four five", 0.0),
        ("?!", "!?", 0.0),
        ("熊猫住在哪里", "北极熊住在哪里", 0.0),
    ],
)
def test_similarity_is_the_shared_part_of_word_trigrams(
    one: str, other: str, similarity: float
) -> None:
    assert jaccard(word_grams(one), word_grams(other)) == pytest.approx(similarity)


# The least similarity that counts, and the nearest below it that prompts so short can have.
@pytest.mark.parametrize(
    ("one", "other", "similarity", "found"),
    [
        (TEN, LAST, 7 / 9, True),
        (TEN, LAST + " nought", 7 / 10, True),
        (TEN + " eleven twelve thirteen", TEN + " eleven zero nought", 9 / 13, False),
        (TEN, FIFTH, 5 / 11, False),
    ],
)
def test_near_duplicates_share_seven_tenths_of_their_trigrams_or_more(
    one: str, other: str, similarity: float, found: bool
) -> None:
    assert jaccard(word_grams(one), word_grams(other)) == pytest.approx(similarity)
    pairs = list(near_pairs([("train", row("p", one)), ("test", row("q", other))]))
    assert bool(pairs) == found
    if found:
        assert (pairs[0].first.id, pairs[0].row.id) == ("p", "q")
        assert pairs[0].similarity == pytest.approx(similarity)


def test_every_near_pair_among_many_rows_is_found() -> None:
    """The hashing only proposes: its pairs are those of a comparison of all with all."""
    draw = random.Random(0)
    words = [f"w{i}" for i in range(40)]
    rows = []
    for number in range(60):
        base = draw.choices(words, k=12)
        for copy in range(4):
            at = draw.randrange(12)
            rows.append(row(f"{number}-{copy}", " ".join([*base[:at], "x", *base[at + 1 :]])))
    grams = {one.id: word_grams(one.prompt_text) for one in rows}
    expected = {
        (a.id, b.id) for a, b in combinations(rows, 2) if jaccard(grams[a.id], grams[b.id]) >= NEAR
    }
    pairs = {(pair.first.id, pair.row.id) for pair in near_pairs([("train", one) for one in rows])}
    assert len(expected) > 10
    assert pairs == expected


def test_near_duplicates_in_one_split_and_across_splits_are_faults() -> None:
    one, other = row("p", TEN), row("q", LAST)
    expected = "row 'q' has nearly the same prompt as 'p' in train (0.78 of their word 3-grams)"
    for splits in ({"train": [one, other]}, {"train": [one], "test": [other]}):
        (found,) = duplicate_findings(splits)
        assert found == Finding("near duplicate", f"{list(splits)[-1]}: {expected}", fault=True)


def test_near_duplicates_with_other_labels_are_conflicts() -> None:
    refuse, respond = row("p", TEN, "refuse", "a"), row("q", LAST, "respond", "a")
    assert kinds(refuse, respond) == [("near conflict", True)]
    assert kinds(respond, row("r", FIFTH, "refuse", "a")) == []
    (found,) = duplicate_findings({"train": [respond, row("r", TEN)]})
    assert "nearly the same prompt with another category" in found.message


def test_a_group_may_hold_near_duplicates_with_other_labels_but_not_exact_ones() -> None:
    refuse = row("p", TEN, "refuse", "a", group="g")
    assert kinds(refuse, row("q", LAST, "respond", "a", group="g")) == []
    assert kinds(refuse, row("q", LAST, "refuse", "a", group="g")) == [
        ("near duplicate in a group", False)
    ]
    assert kinds(refuse, row("q", TEN, "respond", "a", group="g")) == [("exact conflict", True)]


def test_a_row_without_reply_and_its_counterfactual_reply_are_one_example() -> None:
    asking = row("p", TEN, "refuse", "a", group="g")
    obeying = replace(row("q", TEN, "refuse", "b", group="g", response="No."), train_control=False)
    assert kinds(asking, obeying) == []
    assert kinds(asking, replace(obeying, group="h")) == [("exact duplicate", True)]
    assert kinds(replace(asking, response="No."), obeying) == [("exact duplicate", True)]
    parted = duplicate_findings({"train": [asking], "test": [obeying]})
    assert [one.kind for one in parted] == ["exact duplicate", "group in two splits"]


def test_a_group_over_two_splits_does_not_excuse_its_near_duplicates() -> None:
    refuse = row("p", TEN, "refuse", "a", group="g")
    respond = row("q", LAST, "respond", "a", group="g")
    found = duplicate_findings({"train": [refuse], "test": [respond]})
    assert [one.kind for one in found] == ["near conflict", "group in two splits"]


def test_a_shared_system_prompt_makes_no_duplicates() -> None:
    system = "system: You answer for a bank and stay polite, brief and within its own products"
    one = chat("p", system, "user: How do I open an account for my child?")
    other = chat("q", system, "user: Where is the branch that is nearest to Ghent?")
    assert jaccard(word_grams(one.prompt_text), word_grams(other.prompt_text)) < NEAR
    long = chat("r", system + f" {TEN}" * 9, one.prompt[-1]["role"] + ": Which card is free?")
    longer = chat("s", system + f" {TEN}" * 9, "user: Who owns you?")
    assert jaccard(word_grams(long.prompt_text), word_grams(longer.prompt_text)) >= NEAR
    assert kinds(one, other, long, longer) == []
    assert kinds(one, chat("t", f"{system} only", one.prompt[-1]["role"] + ": " + TEN)) == []


def test_turns_of_other_roles_are_other_prompts() -> None:
    assert kinds(row("p", TEN), chat("q", f"system: {TEN}", f"user: {LAST}")) == []


@given(order=st.permutations(range(8)))
def test_the_order_of_rows_changes_nothing(order: list[int]) -> None:
    rows = [
        row("a", TEN, "refuse", "a"), row("b", LAST), row("c", LAST, "refuse", "a"),
        row("d", TEN.upper()), row("e", f"{TEN} eleven", group="g"), row("f", "Other", group="g"),
        row("g", "other!"), row("h", FIFTH),
    ]  # fmt: skip
    shuffled = [rows[i] for i in order]
    assert duplicate_findings({"train": shuffled}) == duplicate_findings({"train": rows})
