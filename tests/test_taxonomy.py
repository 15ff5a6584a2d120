"""Categories, their tokens and knobs, and what a wrong taxonomy file is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refusal_tokens.errors import InputError
from refusal_tokens.taxonomy import (
    Category,
    Taxonomy,
    default_taxonomy,
    load_taxonomy,
    taxonomy_from_dict,
)

FIVE = ("safety", "incomplete", "indeterminate", "humanizing", "unsupported")
IDS = st.from_regex(r"[a-z][a-z0-9_]{0,31}", fullmatch=True).filter(
    lambda name: name not in ("respond", "refuse")
)


def of(*names: str, single: bool = False) -> Taxonomy:
    return Taxonomy(tuple(Category(name, f"About {name}.") for name in names), "Fine.", single)


def data(*entries: Any, **more: Any) -> dict[str, Any]:
    return {"categories": list(entries), **more}


GOOD = {"id": "legal", "description": "Asks for legal advice."}


def test_the_default_has_the_five_categories_of_coconot_in_order() -> None:
    taxonomy = default_taxonomy()
    assert taxonomy.category_ids == taxonomy.knobs == FIVE
    assert taxonomy.tokens == ("<|respond|>", *(f"<|refuse:{name}|>" for name in FIVE))
    assert len(taxonomy.descriptions) == 6


def test_the_one_token_form_has_one_knob_and_keeps_the_categories() -> None:
    taxonomy = default_taxonomy(single_token=True)
    assert taxonomy.tokens == ("<|respond|>", "<|refuse|>")
    assert taxonomy.knobs == ("refuse",)
    assert taxonomy.category_ids == FIVE
    assert [taxonomy.token_index("refuse", name) for name in FIVE] == [1] * 5
    for description in default_taxonomy().descriptions[1:]:
        assert description in taxonomy.descriptions[1]


def test_a_label_and_category_find_their_token() -> None:
    taxonomy = of("a", "b", "c")
    assert taxonomy.token_index("respond", "b") == 0
    assert taxonomy.token_index("respond", None) == 0
    assert taxonomy.tokens[taxonomy.token_index("refuse", "c")] == "<|refuse:c|>"
    assert taxonomy.knob_index("c") == 2


def test_unknown_labels_categories_and_knobs_are_told_the_nearest() -> None:
    taxonomy = default_taxonomy()
    with pytest.raises(InputError, match=r"unknown label 'refused' \(did you mean 'refuse'\?\)"):
        taxonomy.token_index("refused", "safety")
    with pytest.raises(InputError, match="did you mean 'humanizing'"):
        taxonomy.token_index("refuse", "humanising")
    with pytest.raises(InputError, match="unknown category None; allowed: safety, "):
        taxonomy.token_index("refuse", None)
    with pytest.raises(InputError, match="did you mean 'unsupported'"):
        taxonomy.knob_index("unsuported")
    with pytest.raises(InputError, match="unknown category 'safety'.*allowed: refuse"):
        default_taxonomy(single_token=True).knob_index("safety")


@settings(max_examples=40)
@given(st.lists(IDS, min_size=1, max_size=64, unique=True), st.booleans())
def test_a_taxonomy_survives_its_json_form(names: list[str], single: bool) -> None:
    taxonomy = of(*names, single=single)
    again = taxonomy_from_dict(taxonomy.to_dict(), "file")
    assert again == taxonomy
    assert again.hash == taxonomy.hash


def test_the_hash_tells_order_form_and_categories_apart() -> None:
    hashes = {of("a", "b").hash, of("b", "a").hash, of("a", "c").hash, of("a", "b", "c").hash}
    assert len(hashes | {of("a", "b", single=True).hash}) == 5
    assert of("a", "b").hash == of("a", "b").hash


@pytest.mark.parametrize("name", ["Safety", "1a", "a-b", "", "a" * 33, "é", "a b", "a\n"])
def test_an_id_that_makes_no_token_is_refused(name: str) -> None:
    with pytest.raises(InputError, match="category id .*; allowed: "):
        of(name)


def test_ids_up_to_32_characters_and_64_categories_are_allowed() -> None:
    assert of("a" * 32).category_ids == ("a" * 32,)
    assert len(of(*(f"c{i}" for i in range(64))).tokens) == 65
    with pytest.raises(InputError, match="65 categories; allowed: 1 to 64"):
        of(*(f"c{i}" for i in range(65)))
    with pytest.raises(InputError, match="0 categories; allowed: 1 to 64"):
        of()


@pytest.mark.parametrize("name", ["respond", "refuse"])
def test_reserved_ids_are_refused(name: str) -> None:
    with pytest.raises(InputError, match=f"category id '{name}' is reserved"):
        of("a", name)


def test_every_fault_of_the_categories_is_listed_at_once() -> None:
    with pytest.raises(InputError) as caught:
        Taxonomy((Category("A", "x"), Category("b", " "), Category("b", "x")), "Fine.")
    message = str(caught.value)
    assert message.startswith("3 faults in taxonomy:")
    assert "category id 'A'" in message
    assert "'b' has no description" in message
    assert "'b' twice" in message


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ([], "found list; allowed: a mapping"),
        (None, "found NoneType; allowed: a mapping"),
        ({}, "categories must be a list"),
        (data(), "categories must be a list"),
        ({"categories": {"id": "a"}}, "categories must be a list"),
        (data(GOOD, categorys=[]), r"unknown key 'categorys' \(did you mean 'categories'\?\)"),
        (data(GOOD, {"id": False, "description": "x"}), "category 2 must have a text id"),
        (data("safety"), "category 1 must have a text id"),
        (data({"id": "a"}), "category 1 needs both id and description"),
        (data({**GOOD, "descripton": "x"}), r"'descripton' \(did you mean 'description'\?\)"),
        (data(GOOD, respond=""), "respond must be a sentence"),
        (data(GOOD, respond=None), "respond must be a sentence"),
        (data(GOOD, respond={"token": "<|respond|>"}), "respond must be a sentence"),
        (data(GOOD, single_token="yes"), "single_token must be true or false"),
        (data({**GOOD, "id": "Legal"}), "category id 'Legal'"),
    ],
)
def test_a_wrong_taxonomy_is_told_the_file_and_the_fault(wrong: Any, said: str) -> None:
    with pytest.raises(InputError, match=r"^my\.yaml: " + f"(.|\n)*{said}"):
        taxonomy_from_dict(wrong, "my.yaml")


def test_several_faults_of_a_file_come_in_one_message() -> None:
    with pytest.raises(InputError) as caught:
        taxonomy_from_dict(data({"id": "a"}, tokens=1, single_token=3), "my.yaml")
    assert str(caught.value).startswith("3 faults in my.yaml:")


def test_a_user_taxonomy_is_read_from_yaml(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "respond: Just answer.\ncategories:\n  - id: legal\n    description: >-\n"
        "      Asks for\n      legal advice.\n"
    )
    taxonomy = load_taxonomy(path)
    assert taxonomy.tokens == ("<|respond|>", "<|refuse:legal|>")
    assert taxonomy.descriptions == ("Just answer.", "Asks for legal advice.")
    assert load_taxonomy(path, single_token=True).tokens[1] == "<|refuse|>"


def test_a_missing_or_broken_taxonomy_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"gone\.yaml: no such file"):
        load_taxonomy(tmp_path / "gone.yaml")
    (tmp_path / "bad.yaml").write_text("categories:\n  - id: a\n - id: b\n")
    with pytest.raises(InputError, match=r"bad\.yaml, line 3: not YAML"):
        load_taxonomy(tmp_path / "bad.yaml")
    (tmp_path / "two.yaml").write_text("categories: []\ncategories: []\n")
    with pytest.raises(InputError, match=r"two\.yaml, line 2: key 'categories' twice"):
        load_taxonomy(tmp_path / "two.yaml")


def test_a_token_spelled_otherwise_is_refused() -> None:
    with pytest.raises(InputError, match="token"):
        taxonomy_from_dict(data({**GOOD, "token": "<|mine|>"}), "my.yaml")


def test_the_token_that_the_package_makes_may_be_stated() -> None:
    token = f"<|refuse:{GOOD['id']}|>"
    stated = data({**GOOD, "token": token})
    assert taxonomy_from_dict(stated, "my.yaml").tokens[1] == token
    assert taxonomy_from_dict(stated, "my.yaml", single_token=True).tokens[1] == "<|refuse|>"
    with pytest.raises(InputError, match=r"my\.yaml: category 1: token"):
        taxonomy_from_dict({**stated, "single_token": True}, "my.yaml")
    with pytest.raises(InputError, match=r"my\.yaml: respond: token '<\|ok\|>'"):
        taxonomy_from_dict(
            {**stated, "respond": {"token": "<|ok|>", "description": "x"}}, "my.yaml"
        )
