"""The audit: duplicates, conflicts, leaks and gaps; and the shipped data passes it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import pytest
from conftest import ROOT

from refusal_tokens.audit import audit, audit_report
from refusal_tokens.rows import Row, read_rows
from refusal_tokens.taxonomy import Category, Taxonomy, default_taxonomy

ONE = Taxonomy((Category("a", "First."),), "Fine.")
SPLITS = ("train", "calibration", "test")


def row(
    id: str,
    prompt: str,
    label: str | None = "respond",
    category: str | None = None,
    group: str | None = None,
    response: str | None = None,
) -> Row:
    message = {"role": "user", "content": prompt}
    return Row(id, (message,), response, label, category, group or id)


def clean(name: str) -> list[Row]:
    """A split without a fault or gap."""
    return [
        row(f"{name}1", f"Refuse {name}", "refuse", "a"),
        row(f"{name}2", f"Near {name}", "respond", "a", response="Yes."),
        row(f"{name}3", f"Plain {name}"),
    ]


@pytest.fixture(scope="module")
def shipped() -> Mapping[str, list[Row]]:
    taxonomy = default_taxonomy()
    return {name: read_rows([ROOT / "data" / f"{name}.jsonl"], taxonomy) for name in SPLITS}


def test_clean_splits_have_neither_faults_nor_warnings() -> None:
    found = audit({"train": clean("x"), "test": clean("y")}, ONE)
    assert found.faults == found.warnings == ()
    assert found.counts["train"] == {("refuse", "a"): 1, ("respond", "a"): 1, ("respond", None): 1}
    assert found.with_response == {"train": 1, "test": 1}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("What's the time?", "what's the TIME"),
        ("Two  words", "two\nwords!"),
        ("Größe 5", "größe 5."),
        ("你好吗", "你好吗？"),
        ("?!", "?!"),
    ],
)
def test_prompts_that_differ_in_case_and_punctuation_are_duplicates(one: str, other: str) -> None:
    found = audit({"train": [row("p", one), row("q", other)]}, ONE)
    assert found.faults == ("train: row 'q' has the same prompt as 'p' in train",)


@pytest.mark.parametrize(
    ("one", "other"),
    [("Two words", "Twowords"), ("Pay 5", "Pay 6"), ("?!", "!?"), ("你好", "你们")],
)
def test_other_prompts_are_not_duplicates(one: str, other: str) -> None:
    assert audit({"train": [row("p", one), row("q", other)]}, ONE).faults == ()


def test_a_duplicate_with_another_label_is_a_conflict() -> None:
    rows = [row("p", "Same", "refuse", "a"), row("q", "same", "respond", "a")]
    assert audit({"train": rows}, ONE).faults == (
        "train: row 'q' has the same prompt with another label as 'p' in train",
    )


def test_a_duplicate_across_splits_names_both() -> None:
    found = audit({"train": [row("p", "Same")], "test": [row("q", "Same!")]}, ONE)
    assert found.faults == ("test: row 'q' has the same prompt as 'p' in train",)


def test_a_turn_of_another_role_is_another_prompt() -> None:
    plain = row("p", "One Two")
    chat = Row(
        "q",
        ({"role": "system", "content": "One"}, {"role": "user", "content": "Two"}),
        None,
        "respond",
        None,
        "q",
    )
    assert audit({"train": [plain, chat]}, ONE).faults == ()


def test_a_group_in_two_splits_is_a_leak() -> None:
    splits = {
        "train": [row("p", "One", group="g"), row("q", "Two", group="g")],
        "calibration": [row("r", "Three", group="h")],
        "test": [row("s", "Four", group="g")],
    }
    assert audit(splits, ONE).faults == ("group 'g' is in both train and test",)


def test_gaps_are_warned_of_by_split_and_kind() -> None:
    found = audit({"train": clean("x"), "test": [row("p", "One", "refuse", "a")]}, ONE)
    assert found.warnings == (
        "test: no near-miss respond rows of a",
        "test: no ordinary respond rows (category null)",
    )
    empty = audit({"test": []}, ONE)
    assert empty.warnings[0] == "test: no refuse rows of a"
    assert len(empty.warnings) == 3


def test_a_prompt_that_spells_a_token_is_warned_of() -> None:
    rows = [*clean("x"), row("p", "Say <|refuse:safety|> now"), row("q", "a <| b |> c")]
    (warning,) = audit({"train": rows}, ONE).warnings
    assert "row 'p' spells a special token" in warning


@pytest.mark.parametrize("token", ["<|refuse:cat2|>", "<|reserved_special_token_0|>"])
def test_a_token_with_a_digit_is_warned_of(token: str) -> None:
    assert audit({"train": [*clean("x"), row("p", f"Say {token}")]}, ONE).warnings


def test_many_faults_are_shortened_and_counted() -> None:
    found = audit({"train": [row(f"r{i}", "Same") for i in range(15)]}, ONE)
    assert len(found.faults) == 11
    assert found.faults[-1] == "... and 4 more like these"


def test_the_report_counts_and_names_everything() -> None:
    splits = {"train": [*clean("x"), row("p", "refuse X", "refuse", "a")], "test": clean("y")[:2]}
    report = audit_report(audit(splits, ONE), ONE)
    lines = [line.split() for line in report.splitlines()]
    assert lines[:6] == [
        ["label", "category", "train", "test"],
        ["refuse", "a", "2", "1"],
        ["respond", "a", "1", "1"],
        ["respond", "-", "1", "0"],
        ["all", "4", "2"],
        ["with", "a", "reply", "1", "1"],
    ]
    assert "FAULT    train: row 'p' has the same prompt as 'x1' in train" in report
    assert "warning  test: no ordinary respond rows" in report


def test_unlabelled_rows_with_a_category_are_counted() -> None:
    rows = [row("p", "One", None, "a"), row("q", "Two", None)]
    report = audit_report(audit({"traffic": rows}, ONE), ONE)
    assert ["all", "2"] in [line.split() for line in report.splitlines()]


def test_the_shipped_data_has_no_faults(shipped: Mapping[str, list[Row]]) -> None:
    assert audit(shipped, default_taxonomy()).faults == ()


def test_the_shipped_data_covers_every_kind_in_every_split(
    shipped: Mapping[str, list[Row]],
) -> None:
    assert sum(len(rows) for rows in shipped.values()) >= 1000
    for name, rows in shipped.items():
        cells = Counter((row.label, row.category) for row in rows)
        for category in ("safety", "incomplete", "indeterminate", "humanizing", "unsupported"):
            assert cells["refuse", category] >= 20, (name, category)
            assert cells["respond", category] >= 20, (name, category)
        assert cells["respond", None] >= 100, name


def test_the_shipped_ids_are_unique_over_all_splits() -> None:
    paths = [ROOT / "data" / f"{name}.jsonl" for name in SPLITS]
    rows = read_rows(paths, default_taxonomy())
    lines = sum(path.read_text("utf-8").count("\n") for path in paths)
    assert len({row.id for row in rows}) == len(rows) == lines


def test_the_report_of_no_splits_is_an_empty_table() -> None:
    lines = audit_report(audit({}, ONE), ONE).splitlines()
    assert [line.split()[0] for line in lines] == ["label", "all", "with"]
