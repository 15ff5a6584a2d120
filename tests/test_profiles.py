"""The profile file: round trip, what it says about prompts, and what broken files are told."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT

from refusal_tokens.errors import InputError
from refusal_tokens.profiles import (
    METADATA_KEY,
    TEXT_COLUMNS,
    Profile,
    read_profile,
    split_profile,
    text_columns,
    write_profile,
)
from refusal_tokens.rows import Row
from refusal_tokens.taxonomy import Category, Taxonomy

TWO = Taxonomy((Category("a", "First."), Category("b", "Second.")), "Fine.")
Entry = tuple[str | None, str | None, list[float]]
ENTRIES: list[Entry] = [
    ("refuse", "a", [0.0, 2.5, -1.0]),
    ("refuse", "b", [1.0, 0.0, 3.0]),
    ("respond", "b", [4.0, 0.0, 0.0]),
    ("respond", None, [4.0, -2.0, 0.0]),
    (None, None, [0.0, 0.0, 0.0]),
]


def profile_of(
    entries: Sequence[Entry], taxonomy: Taxonomy = TWO, rest: Sequence[float] | None = None
) -> Profile:
    """A profile of label, category and control logits; the rest of the vocabulary at -5."""
    rows = [
        Row(f"r{i}", ({"role": "user", "content": f"Prüfung {i}"},), None, label, category, "g")
        for i, (label, category, _) in enumerate(entries)
    ]
    logits = np.array([entry[2] for entry in entries], dtype=np.float32)
    others = np.array([-5.0] * len(rows) if rest is None else rest, dtype=np.float32)
    return Profile(
        columns=text_columns(rows),
        control_logits=logits,
        rest_max=others - 1,
        rest_logsumexp={1.0: others, 0.7: others + 2},
        prompt_tokens=np.arange(3, 3 + len(rows)),
        taxonomy=taxonomy,
        metadata={"model_fingerprint": "f00", "system_prompt": None, "dtype": "float32"},
    )


@pytest.fixture
def edited(tmp_path: Path) -> Callable[..., Path]:
    """Write a good profile, then change its table or its metadata."""

    def build(
        change: Callable[[pa.Table], pa.Table] = lambda table: table,
        metadata: Callable[[dict[str, Any]], Any] = lambda data: data,
    ) -> Path:
        path = tmp_path / "p.parquet"
        write_profile(path, profile_of(ENTRIES))
        table = pq.read_table(path)
        stored = metadata(json.loads(table.schema.metadata[METADATA_KEY]))
        text = stored if isinstance(stored, str) else json.dumps(stored)
        pq.write_table(change(table).replace_schema_metadata({METADATA_KEY: text}), path)
        return path

    return build


def without(key: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda data: {name: value for name, value in data.items() if name != key}


def column(name: str, values: pa.Array) -> Callable[[pa.Table], pa.Table]:
    return lambda table: table.set_column(table.column_names.index(name), name, values)


@pytest.mark.parametrize("single", [False, True])
def test_a_profile_survives_its_file(single: bool, tmp_path: Path) -> None:
    taxonomy = Taxonomy(TWO.categories, TWO.respond_description, single)
    width = len(taxonomy.tokens)
    before = profile_of([(label, c, z[:width]) for label, c, z in ENTRIES], taxonomy)
    write_profile(tmp_path / "p.parquet", before)
    after = read_profile(tmp_path / "p.parquet")
    assert len(after) == 5
    assert after.taxonomy == taxonomy
    assert after.taxonomy.hash == taxonomy.hash
    for name in TEXT_COLUMNS:
        assert after.columns[name].tolist() == before.columns[name].tolist()
    for name in ("control_logits", "rest_max", "prompt_tokens"):
        np.testing.assert_array_equal(getattr(after, name), getattr(before, name))
    assert set(after.rest_logsumexp) == {0.7, 1.0}
    for temperature, values in before.rest_logsumexp.items():
        np.testing.assert_array_equal(after.rest_logsumexp[temperature], values)
    assert before.metadata.items() <= after.metadata.items()


def test_a_profile_written_again_is_the_same_file(tmp_path: Path) -> None:
    write_profile(tmp_path / "a.parquet", profile_of(ENTRIES))
    write_profile(tmp_path / "b.parquet", read_profile(tmp_path / "a.parquet"))
    a, b = (pq.read_table(tmp_path / name) for name in ("a.parquet", "b.parquet"))
    assert a.equals(b)
    keys = [json.loads(table.schema.metadata[METADATA_KEY]) for table in (a, b)]
    assert keys[0] == keys[1]


def test_the_file_has_the_columns_other_programs_rely_on(tmp_path: Path) -> None:
    write_profile(tmp_path / "p.parquet", profile_of(ENTRIES))
    table = pq.read_table(tmp_path / "p.parquet")
    assert table.schema.field("control_logits").type == pa.list_(pa.float32(), 3)
    assert table["control_logits"].to_pylist()[0] == [0.0, 2.5, -1.0]
    metadata = json.loads(table.schema.metadata[METADATA_KEY])
    assert metadata["schema_version"] == 1
    assert metadata["taxonomy"]["categories"][1] == {
        "id": "b",
        "token": "<|refuse:b|>",
        "description": "Second.",
    }


def test_labels_and_categories_are_found() -> None:
    profile = profile_of(ENTRIES)
    assert profile.token_index.tolist() == [1, 2, 0, 0, -1]
    assert profile.is_label("refuse").tolist() == [True, True, False, False, False]
    assert profile.is_category("b").tolist() == [False, True, True, False, False]
    assert profile.is_category(None).tolist() == [False, False, False, True, True]


def test_control_mass_is_the_share_of_the_softmax() -> None:
    rest = [np.log(3.0), -5.0, 90.0, -90.0, 0.0]
    found = profile_of(ENTRIES, rest=rest).control_mass
    for mass, (_, _, logits), other in zip(found, ENTRIES, rest, strict=True):
        control = np.exp(logits).sum()
        assert mass == pytest.approx(control / (control + np.exp(other)), rel=1e-5)
    assert found[4] == pytest.approx(3 / 4)


def with_column(profile: Profile, name: str, values: Sequence[str | None]) -> Profile:
    made = np.array([*values], dtype=object)
    return replace(profile, columns={**profile.columns, name: made})


def test_the_data_hash_forgets_order_and_sees_every_change() -> None:
    profile = profile_of(ENTRIES)
    logits = profile.control_logits.copy()
    logits[3, 1] = np.nextafter(logits[3, 1], np.float32(0))
    swapped = [0, 1, 3, 2, 4]
    changes = [
        replace(profile, control_logits=logits),
        # The same logits, at each other's prompts.
        replace(profile, control_logits=profile.control_logits[swapped]),
        with_column(profile, "label", ["refuse", "refuse", "refuse", "respond", None]),
        with_column(profile, "category", ["a", "b", "a", None, None]),
        with_column(profile, "prompt_sha256", ["0" * 64, *profile.columns["prompt_sha256"][1:]]),
        profile.select(np.arange(4)),
        profile.select(np.array([0, 0, 1, 2, 3, 4])),
    ]
    assert len({one.data_hash for one in (profile, *changes)}) == len(changes) + 1
    assert profile.select(np.array([4, 2, 0, 3, 1])).data_hash == profile.data_hash


def test_a_profile_is_halved_by_whole_groups_and_loses_nothing() -> None:
    # 60 prompts in groups of three, then 60 of no group; the first logit numbers them.
    entries: list[Entry] = [("refuse", "a", [float(i), 0.0, 0.0]) for i in range(120)]
    groups = [f"g{i // 3}" if i < 60 else None for i in range(120)]
    halves = split_profile(with_column(profile_of(entries), "group", groups))
    numbers = [half.control_logits[:, 0].astype(int).tolist() for half in halves]
    assert sorted(numbers[0] + numbers[1]) == list(range(120))
    for half, own in zip(halves, numbers, strict=True):
        assert half.columns["id"].tolist() == [f"r{i}" for i in own]
    first, second = ({groups[i] for i in own} for own in numbers)
    assert first & second == {None}
    # Neither half is left with the groups alone, or without any.
    assert min(len(first), len(second)) > 1


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"gone\.parquet: no such file"):
        read_profile(tmp_path / "gone.parquet")


@pytest.mark.parametrize("kept", [0, 3, 200, -1])
def test_a_truncated_file_is_named(kept: int, tmp_path: Path) -> None:
    path = tmp_path / "cut.parquet"
    write_profile(path, profile_of(ENTRIES))
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(InputError, match=r"cut\.parquet: not a whole Parquet file"):
        read_profile(path)


def test_a_text_file_is_not_a_profile(tmp_path: Path) -> None:
    (tmp_path / "t.parquet").write_text("id,label\n" * 20)
    with pytest.raises(InputError, match="not a whole Parquet file"):
        read_profile(tmp_path / "t.parquet")


def test_a_foreign_parquet_file_is_not_a_profile(tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": ["a"], "control_logits": [[0.0, 1.0]]}), tmp_path / "f.parquet")
    with pytest.raises(InputError, match="not a profile"):
        read_profile(tmp_path / "f.parquet")


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_another_schema_version_is_named(version: Any, edited: Callable[..., Path]) -> None:
    path = edited(metadata=lambda data: {**data, "schema_version": version})
    with pytest.raises(InputError, match=f"schema version {version!r}; this version reads 1"):
        read_profile(path)


@pytest.mark.parametrize("name", ["control_logits", "rest_logsumexp"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, None])
def test_logits_that_are_not_finite_are_named_with_their_row(
    name: str, value: float | None, edited: Callable[..., Path]
) -> None:
    width = 3 if name == "control_logits" else 2
    values: list[list[float | None]] = [[0.0] * width for _ in ENTRIES]
    values[2][1] = value
    path = edited(column(name, pa.array(values, pa.list_(pa.float32(), width))))
    with pytest.raises(InputError, match=f"row 3: {name} is not finite"):
        read_profile(path)


def test_logits_of_another_width_are_named(edited: Callable[..., Path]) -> None:
    path = edited(column("control_logits", pa.array([[0.0, 1.0]] * 5)))
    with pytest.raises(InputError, match=r"control_logits has shape \(5, 2\).*\(prompts, 3\)"):
        read_profile(path)


@pytest.mark.parametrize("name", [*TEXT_COLUMNS, "control_logits", "rest_logsumexp"])
def test_a_missing_column_is_named(name: str, edited: Callable[..., Path]) -> None:
    path = edited(lambda table: table.drop_columns([name]))
    with pytest.raises(InputError, match=f"column '{name}' is missing"):
        read_profile(path)


@pytest.mark.parametrize(("name", "value"), [("label", "refused"), ("category", "safty")])
def test_an_unknown_name_is_shown_with_its_row(
    name: str, value: str, edited: Callable[..., Path]
) -> None:
    def spoil(table: pa.Table) -> pa.Table:
        values = table[name].to_pylist()
        values[2] = value
        return table.set_column(table.schema.get_field_index(name), name, [values])

    with pytest.raises(InputError, match=f"row 3: unknown {name} '{value}'"):
        read_profile(edited(spoil))


@pytest.mark.parametrize("name", ["rest_max", "prompt_tokens"])
def test_a_missing_number_column_is_named(name: str, edited: Callable[..., Path]) -> None:
    path = edited(lambda table: table.drop_columns([name]))
    with pytest.raises(InputError, match=name):
        read_profile(path)


@pytest.mark.parametrize(
    "metadata",
    [
        without("taxonomy"),
        without("temperatures"),
        lambda data: {**data, "temperatures": [[1.0]]},
        lambda data: {**data, "temperatures": [0.5]},
        lambda _: [1],
        lambda _: '{"a',
    ],
)
def test_broken_metadata_is_told(metadata: Any, edited: Callable[..., Path]) -> None:
    with pytest.raises(InputError, match=r"p\.parquet"):
        read_profile(edited(metadata=metadata))


@pytest.mark.parametrize(
    "values", [pa.array([[1.0], [1.0, 2.0]] + [[0.0] * 3] * 3), pa.array(["a"] * 5)]
)
def test_logits_that_are_no_matrix_are_told(values: pa.Array, edited: Callable[..., Path]) -> None:
    with pytest.raises(InputError, match="control_logits"):
        read_profile(edited(column("control_logits", values)))


def test_a_rest_max_that_is_not_finite_is_told(edited: Callable[..., Path]) -> None:
    for value in (float("nan"), None):
        values = pa.array([0.0, value, 0.0, 0.0, 0.0], pa.float32())
        with pytest.raises(InputError, match="row 2: rest_max is not finite"):
            read_profile(edited(column("rest_max", values)))


def test_an_empty_profile_is_read(edited: Callable[..., Path]) -> None:
    assert len(read_profile(edited(lambda table: table.slice(0, 0)))) == 0


def test_the_shipped_run_answers_small_talk() -> None:
    # A default run that refused "Hi" as incomplete once went unseen: no test row was a greeting.
    shipped = read_profile(ROOT / "data" / "profiles" / "smollm2-135m.parquet")
    chat = [name == "chat" for name in shipped.columns["subcategory"]]
    refused = shipped.control_logits[chat].argmax(axis=1) > 0
    assert len(refused) >= 25
    assert refused.mean() <= 0.1
