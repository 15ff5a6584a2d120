"""The audit: duplicates, conflicts, leaks and gaps; and the shipped data passes it."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import pytest
from audit_rows import clean, row
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from refusal_tokens.audit import audit
from refusal_tokens.audit_report import audit_report
from refusal_tokens.cli import main
from refusal_tokens.rows import Row, read_rows, write_jsonl
from refusal_tokens.taxonomy import Category, Taxonomy, default_taxonomy

ONE = Taxonomy((Category("a", "First."),), "Fine.")
SPLITS = ("train", "calibration", "test")


@pytest.fixture(scope="module")
def shipped() -> Mapping[str, list[Row]]:
    taxonomy = default_taxonomy()
    return {name: read_rows([ROOT / "data" / f"{name}.jsonl"], taxonomy) for name in SPLITS}


def test_clean_splits_have_neither_faults_nor_warnings() -> None:
    found = audit({"train": clean("x"), "test": clean("y")}, ONE)
    assert found.faults == found.warnings == ()
    assert found.counts["train"] == {("refuse", "a"): 1, ("respond", "a"): 1, ("respond", None): 1}
    assert found.with_response == {"train": 3, "test": 3}


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


@pytest.mark.parametrize(
    "token", ["<|refuse:cat2|>", "<|Assistant|>", "</s>", "[INST]", "<start_of_turn>", "<｜User｜>"]
)
def test_any_family_s_special_token_is_warned_of(token: str) -> None:
    assert audit({"train": [*clean("x"), row("p", f"Say {token}")]}, ONE).warnings


def test_a_reply_that_spells_a_token_is_warned_of() -> None:
    rows = [*clean("x"), row("p", "Say it", response="It is <|im_end|>.")]
    (warning,) = audit({"train": rows}, ONE).warnings
    assert "the reply of row 'p' spells a special token" in warning


def test_a_cell_without_any_reply_is_warned_of_once_over_all_splits() -> None:
    refusal = row("p", "One more", "refuse", "a")
    splits = {"train": clean("x")[1:], "test": [*clean("y")[1:], refusal]}
    assert "refuse/a: none of 1 rows has a reply" in audit(splits, ONE).warnings
    assert audit({"train": clean("x"), "test": [*clean("y"), refusal]}, ONE).warnings == ()


def test_data_without_a_single_reply_is_warned_of_once() -> None:
    rows = [row("p", "One", "refuse", "a"), row("q", "Two", "respond", "a"), row("r", "Three")]
    assert audit({"train": rows}, ONE).warnings == (
        "no row has a reply: only the control token would be trained",
    )


def test_a_planted_shortcut_is_warned_of() -> None:
    rows = shortcut_rows()
    found = audit({"train": rows}, ONE)
    (warning,) = (one.message for one in found.findings if one.kind == "shortcut")
    assert warning.startswith("a: words alone tell refuse from near-miss rows, AUC 1.000 is over")
    assert found.faults == ()
    report = audit_report(found, ONE)
    assert "1.00 [1.00, 1.00]" in report
    assert "a refuse: silently 40:0" in report


def shortcut_rows() -> list[Row]:
    ends = {"refuse": "silently", "respond": "publicly"}
    return [
        row(f"{i}{label}", f"Thing{i} and other{i} {end}", label, "a", f"g{i}", "Fine.")
        for i in range(40)
        for label, end in ends.items()
    ]


@settings(max_examples=10)
@given(seed=st.integers())
def test_the_order_of_rows_changes_nothing(seed: int) -> None:
    rows = [*clean("x"), *shortcut_rows(), row("p", "refuse X"), row("q", "Say <|x|>")]
    shuffled = random.Random(seed).sample(rows, len(rows))
    one, other = audit({"train": rows}, ONE), audit({"train": shuffled}, ONE)
    assert one == other
    assert json.dumps(one.record()) == json.dumps(other.record())


def test_many_faults_of_a_kind_are_shortened_and_counted_in_the_report_only() -> None:
    found = audit({"train": [row(f"r{i:02}", "Same") for i in range(15)]}, ONE)
    assert len(found.faults) == 14
    lines = [line for line in audit_report(found, ONE).splitlines() if line.startswith("FAULT")]
    assert len(lines) == 11
    assert lines[-1] == "FAULT    exact duplicate: ... and 4 more like these"


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
        ["with", "a", "reply", "3", "2"],
    ]
    assert "FAULT    exact duplicate: train: row 'x1' has the same prompt as 'p' in train" in report
    assert "warning  gap: test: no ordinary respond rows" in report
    assert "not measured" in report


def test_the_command_prints_everything_as_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "train.jsonl"
    write_jsonl(path, [row(f"r{i:02}", "Same", "refuse", "safety") for i in range(15)])
    assert main(["data", "check", str(path), "--json"]) == 2
    found = json.loads(capsys.readouterr().out)
    assert found["counts"] == {"train": {"refuse/safety": 15}}
    assert found["parts"][0]["with_response"] == 0
    assert len(found["faults"]) == 14
    assert set(found["faults"][0]) == {"kind", "message", "fault"}
    assert found["forms"]["refuse/safety"]["shares"]["fragment"] == 1.0
    assert [one["category"] for one in found["shortcuts"]] == list(default_taxonomy().category_ids)
    assert found["languages"] == {"en": 15}


def test_unlabelled_rows_with_a_category_are_counted() -> None:
    rows = [row("p", "One", None, "a"), row("q", "Two", None)]
    report = audit_report(audit({"traffic": rows}, ONE), ONE)
    assert ["all", "2"] in [line.split() for line in report.splitlines()]


def test_the_shipped_data_has_no_faults_and_every_shortcut_is_measured(
    shipped: Mapping[str, list[Row]],
) -> None:
    found = audit(shipped, default_taxonomy())
    assert found.faults == ()
    assert [one.category for one in found.shortcuts] == list(default_taxonomy().category_ids)
    for one in found.shortcuts:
        assert one.words is not None
        assert one.form is not None
        assert len(one.refuse_words) == len(one.respond_words) == 10
    assert sum(part.rows for part in found.parts) == sum(map(len, shipped.values()))


def test_the_shipped_data_covers_every_kind_in_every_split(
    shipped: Mapping[str, list[Row]],
) -> None:
    assert len(shipped["train"]) >= 5000
    assert len(shipped["calibration"]) >= 2000
    assert sum(row.label == "respond" for row in shipped["calibration"]) >= 1400
    assert len(shipped["test"]) >= 1000
    for name, rows in shipped.items():
        cells = Counter((row.label, row.category) for row in rows)
        for category in default_taxonomy().category_ids:
            assert cells["refuse", category] >= 100, (name, category)
            assert cells["respond", category] >= 100, (name, category)
        assert cells["respond", None] >= 400, name
    # What train rows with a reply have to cover, besides those that train the control token alone.
    replied = [row for row in shipped["train"] if row.response and row.train_control]
    cells = Counter((row.label, row.category) for row in replied)
    for category in default_taxonomy().category_ids:
        assert cells["refuse", category] >= 450, category
        assert cells["respond", category] >= 300, category
    assert cells["respond", None] >= 1200


def test_the_shipped_ids_are_unique_over_all_splits() -> None:
    paths = [ROOT / "data" / f"{name}.jsonl" for name in SPLITS]
    rows = read_rows(paths, default_taxonomy())
    lines = sum(path.read_text("utf-8").count("\n") for path in paths)
    assert len({row.id for row in rows}) == len(rows) == lines


def test_the_report_of_no_splits_is_an_empty_table() -> None:
    lines = audit_report(audit({}, ONE), ONE).splitlines()
    assert [line.split()[0] for line in lines] == ["label", "all", "with"]
