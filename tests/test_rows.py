"""Rows: what is read from each kind of file, what each fault is told, and splits by group."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refusal_tokens.errors import InputError
from refusal_tokens.rows import (
    Row,
    data_hash,
    messages_from,
    read_rows,
    row_to_record,
    split_by_group,
    write_jsonl,
)
from refusal_tokens.taxonomy import default_taxonomy

TAXONOMY = default_taxonomy()
Read = Callable[..., list[Row]]
GOOD: dict[str, Any] = {"id": "a", "prompt": "Hi", "label": "respond"}
FULL: list[dict[str, Any]] = [
    {
        "id": "1",
        "prompt": 'Comma, "quote"\nand line',
        "response": "No.",
        "label": "refuse",
        "category": "safety",
        "group": "g",
        "subcategory": "s",
        "source": "us",
    },
    {
        "id": "2",
        "prompt": "Größe? 你好",
        "response": None,
        "label": "respond",
        "category": None,
        "group": None,
        "subcategory": None,
        "source": None,
    },
]


def plain(id: str, group: str | None = None) -> Row:
    return Row(id, ({"role": "user", "content": id},), None, "respond", None, group or id)


def write_table(path: Path, records: list[dict[str, Any]]) -> Path:
    """Write records as the kind of file that the suffix names."""
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(records), path)
    elif path.suffix == ".csv":
        with open(path, "w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, records[0])
            writer.writeheader()
            writer.writerows(records)
    else:
        lines = (json.dumps(record, ensure_ascii=False) for record in records)
        path.write_text("".join(f"{line}\n" for line in lines), "utf-8")
    return path


@pytest.fixture
def read(tmp_path: Path) -> Read:
    """Read rows from the text, bytes or records of one file."""

    def from_content(content: Any, name: str = "f.jsonl", **options: Any) -> list[Row]:
        path = tmp_path / name
        if isinstance(content, str | bytes):
            path.write_bytes(content.encode() if isinstance(content, str) else content)
        else:
            write_table(path, content)
        return read_rows([path], TAXONOMY, **options)

    return from_content


def fault_of(read: Read, content: Any, name: str = "f.jsonl", **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        read(content, name, **options)
    return str(caught.value)


@pytest.mark.parametrize("name", ["f.jsonl", "f.parquet", "f.csv", "F.JSONL"])
def test_every_kind_of_file_gives_the_same_rows(name: str, read: Read) -> None:
    user = ({"role": "user", "content": FULL[0]["prompt"]},)
    assert read(FULL, name) == [
        Row("1", user, "No.", "refuse", "safety", "g", "s", "us"),
        Row("2", ({"role": "user", "content": "Größe? 你好"},), None, "respond", None, "2"),
    ]


def test_a_plain_map_reads_files_of_another_shape(read: Read) -> None:
    records = [{"key": "1", "question": "Hi", "label": "respond", "extra": 3}]
    row_map = {"id": "key", "prompt": "question"}
    assert "unknown key 'key'" in fault_of(read, records)
    for name in ("f.jsonl", "f.parquet", "f.csv"):
        (row,) = read(records, name, row_map=row_map)
        assert (row.id, row.prompt_text, row.label) == ("1", "Hi", "respond")


def test_a_map_of_an_unknown_field_is_refused(read: Read) -> None:
    said = fault_of(read, [GOOD], row_map={"promt": "question"})
    assert said.startswith("map: unknown row field 'promt' (did you mean 'prompt'?)")


def test_a_mapped_column_that_is_missing_is_named(read: Read) -> None:
    records = [{**GOOD, "answer": "Hello."}]
    for name in ("f.csv", "f.jsonl", "f.parquet"):
        said = fault_of(read, records, name, row_map={"response": "anwser"})
        assert "no column 'anwser' to read 'response' from (did you mean 'answer'?)" in said
        assert said.endswith("found: id, prompt, label, answer")


def test_a_mapped_key_may_be_absent_from_some_lines(read: Read) -> None:
    records = [{**GOOD, "answer": "Hello."}, {**GOOD, "id": "b", "response": "Not this."}]
    rows = read(records, row_map={"response": "answer"})
    assert [row.response for row in rows] == ["Hello.", None]


def test_a_csv_column_twice_is_refused(read: Read) -> None:
    said = fault_of(read, "id,prompt,label,id\na,Hi,respond,b\n", "f.csv")
    assert said.endswith("f.csv, line 1: column 'id' twice")


@pytest.mark.parametrize("name", ["f.jsonl", "f.csv"])
def test_a_byte_order_mark_is_no_part_of_the_data(name: str, read: Read, tmp_path: Path) -> None:
    content = write_table(tmp_path / f"x{name}", [GOOD]).read_bytes()
    assert read(b"\xef\xbb\xbf" + content, name)[0].id == "a"


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0c", "\x1e"])
def test_a_separator_inside_a_json_string_ends_no_line(separator: str, read: Read) -> None:
    escaped = separator if separator > "\x1f" else f"\\u{ord(separator):04x}"
    (row,) = read(f'{{"id": "a", "prompt": "one{escaped}two", "label": "respond"}}\n')
    assert row.prompt_text == f"one{separator}two"


def test_windows_line_ends_and_blank_lines_are_read(read: Read) -> None:
    lines = [json.dumps({**GOOD, "id": name}) for name in "ab"]
    assert [row.id for row in read("\r\n\r\n".join(lines))] == ["a", "b"]


def test_line_numbers_count_blank_lines(read: Read) -> None:
    content = json.dumps(GOOD) + "\n\n" + json.dumps({**GOOD, "id": "b", "label": None})
    assert "f.jsonl, line 3: key 'label' is null; allowed: refuse, respond" in fault_of(
        read, content
    )


def test_a_truncated_last_line_is_suspected(read: Read) -> None:
    line = json.dumps(GOOD)
    said = fault_of(read, f"{line}\n{line[:-9]}")
    assert "f.jsonl, line 2: not JSON" in said
    assert "is the file truncated?" in said
    assert "is the file truncated?" not in fault_of(read, f"{line[:-9]}\n{line}\n")


@pytest.mark.parametrize("name", ["f.jsonl", "f.csv"])
def test_text_that_is_not_utf8_is_named_with_its_line(name: str, read: Read) -> None:
    said = fault_of(read, b"id,prompt,label\n\xff\xfe,Hi,respond\n", name)
    assert f"{name}, line 2: not UTF-8" in said


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("f.jsonl", ""),
        ("f.jsonl", "\n \n"),
        ("f.csv", ""),
        ("f.csv", "id,prompt,label\n"),
    ],
)
def test_a_file_without_rows_is_named(name: str, content: str, read: Read) -> None:
    assert fault_of(read, content, name).endswith(f"{name}: no rows in it")


def test_a_parquet_file_without_rows_is_named(read: Read, tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": pa.array([], pa.string())}), tmp_path / "e.parquet")
    with pytest.raises(InputError, match=r"e\.parquet: no rows in it"):
        read_rows([tmp_path / "e.parquet"], TAXONOMY)


def test_a_truncated_parquet_file_is_named(read: Read, tmp_path: Path) -> None:
    whole = write_table(tmp_path / "w.parquet", FULL).read_bytes()
    for content in (whole[:-7], b"", b"id,label\n"):
        assert "f.parquet: not a whole Parquet file" in fault_of(read, content, "f.parquet")


def test_a_damaged_parquet_file_is_named(read: Read, tmp_path: Path) -> None:
    records = [{**GOOD, "id": str(i), "prompt": f"p {i * 7919 % 999}"} for i in range(999)]
    whole = bytearray(write_table(tmp_path / "w.parquet", records).read_bytes())
    whole[100:140] = b"\xff" * 40
    assert "f.parquet" in fault_of(read, bytes(whole), "f.parquet")


@pytest.mark.parametrize("found", ["[1, 2]", "3", "null", '"text"'])
def test_a_line_that_is_no_object_is_named(found: str, read: Read) -> None:
    said = fault_of(read, f"{json.dumps(GOOD)}\n{found}\n")
    assert "f.jsonl, line 2: found " in said
    assert said.endswith("allowed: a JSON object")


def test_csv_lines_of_another_length_are_named(read: Read) -> None:
    for line in ("b,Hi", "b,Hi,respond,more"):
        said = fault_of(read, f"id,prompt,label\na,Hi,respond\n{line}\n", "f.csv")
        assert "f.csv, line 3: as many values as the header has columns are needed" in said


def test_an_open_quote_in_csv_is_named(read: Read) -> None:
    said = fault_of(read, 'id,prompt,label\na,"Hi,respond\n', "f.csv")
    assert "f.csv, line " in said
    assert ": not CSV (unexpected end of data)" in said


def test_broken_csv_is_named_with_its_own_line(read: Read) -> None:
    said = fault_of(read, 'id,prompt,label\na,Hi,respond\nb,"Hi"x,respond\n', "f.csv")
    assert "f.csv, line 3: not CSV" in said


def test_csv_holds_prompts_as_long_as_jsonl_does(read: Read) -> None:
    assert len(read([{**GOOD, "prompt": "x" * 140_000}], "f.csv")[0].prompt_text) == 140_000


def test_csv_can_say_train_control(read: Read) -> None:
    content = "id,prompt,label,train_control\na,true,respond,False\nb,Hi,respond,true\n"
    rows = read(content, "f.csv")
    assert [row.train_control for row in rows] == [False, True]
    assert rows[0].prompt_text == "true"
    assert read(content.replace("train_", "my_"), "f.csv", row_map={"train_control": "my_control"})
    assert "'train_control': found 'no'" in fault_of(read, content.replace("False", "no"), "f.csv")


def test_missing_files_folders_and_unknown_kinds_are_named(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").mkdir()
    for name, said in [
        ("gone.jsonl", "no such file"),
        ("d.jsonl", "is a folder"),
        ("rows.txt", "unknown kind of file; allowed: .jsonl, .parquet, .csv, or hub:"),
    ]:
        with pytest.raises(InputError, match=f"{name}: {said}"):
            read_rows([tmp_path / name], TAXONOMY)


SAFETY = {"label": "refuse", "category": "safety"}
ROLES_SAID = "allowed: at most one system message first"


def turns(*roles: str) -> list[dict[str, str]]:
    return [{"role": role, "content": f"text {i}"} for i, role in enumerate(roles)]


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        ({"promt": "x"}, "unknown key 'promt' (did you mean 'prompt'?); allowed: id, prompt"),
        ({"id": 3}, "key 'id': found int 3; allowed: text"),
        ({"id": None}, "key 'id': found NoneType None; allowed: text"),
        ({"id": " "}, "key 'id' is empty; allowed: text"),
        ({"prompt": ""}, "key 'prompt' is empty"),
        ({"prompt": " \n"}, "key 'prompt' is empty"),
        ({"prompt": None}, "key 'prompt': found NoneType; allowed: text, or a list of chat"),
        ({"prompt": 5}, "key 'prompt': found int; allowed: text"),
        ({"prompt": []}, "key 'prompt': found list; allowed: text"),
        ({"prompt": {"role": "user"}}, "key 'prompt': found dict; allowed: text"),
        ({"response": ["x"]}, "key 'response': found list ['x']; allowed: text"),
        ({"response": ""}, "key 'response' is empty; allowed: text, or null"),
        ({"label": None}, "key 'label' is null; allowed: refuse, respond"),
        ({"label": "refuze"}, "unknown label 'refuze' (did you mean 'refuse'?); allowed: refuse,"),
        ({"label": ["refuse"]}, "key 'label': unknown label ['refuse']"),
        ({"label": True}, "key 'label': unknown label True"),
        ({"category": "safty"}, "unknown category 'safty' (did you mean 'safety'?); allowed: saf"),
        ({"category": "Safety"}, "unknown category 'Safety' (did you mean 'safety'?)"),
        ({"label": "refuse"}, "key 'category' is null on a refuse row; allowed: safety, incomp"),
        ({"group": 7}, "key 'group': found int 7; allowed: text"),
        ({"group": ""}, "key 'group' is empty; allowed: text, or null"),
        ({"subcategory": False}, "key 'subcategory': found bool False; allowed: text"),
        ({"source": {}}, "key 'source': found dict {}; allowed: text"),
        ({"train_control": "no"}, "key 'train_control': found 'no'; allowed: true or false"),
        ({"train_control": 0}, "key 'train_control': found 0; allowed: true or false"),
        (
            {"train_control": False, "category": "safety"},
            "it would train an answer to a harmful request; allowed: another category",
        ),
        ({"response": "<|respond|> Hi"}, "key 'response' contains the control token <|respond|>"),
        (
            {**SAFETY, "response": "No <|refuse:safety|>"},
            "key 'response' contains the control token <|refuse:safety|>",
        ),
        ({"prompt": turns("user", "assistant")}, f"found the roles user, assistant; {ROLES_SAID}"),
        ({"prompt": turns("system")}, f"found the roles system; {ROLES_SAID}"),
        ({"prompt": turns("user", "user")}, f"found the roles user, user; {ROLES_SAID}"),
        ({"prompt": turns("user", "system", "user")}, ROLES_SAID),
        ({"prompt": turns("system", "system", "user")}, ROLES_SAID),
        ({"prompt": turns("assistant", "user")}, ROLES_SAID),
        (
            {"prompt": turns("user", "asistant", "user")},
            "key 'prompt', message 2: unknown role 'asistant' (did you mean 'assistant'?)",
        ),
        ({"prompt": ["Hi"]}, "key 'prompt', message 1: allowed: an object with exactly role"),
        ({"prompt": [{"role": "user"}]}, "message 1: allowed: an object with exactly role"),
        ({"prompt": [{**turns("user")[0], "name": "x"}]}, "message 1: allowed: an object with"),
        ({"prompt": [{"role": "user", "content": " "}]}, "message 1: content is empty or not text"),
        ({"prompt": [{"role": "user", "content": 3}]}, "message 1: content is empty or not text"),
    ],
)
def test_each_fault_gives_file_line_key_found_and_allowed(
    edit: Mapping[str, Any], said: str, read: Read
) -> None:
    before = {**GOOD, "id": "before"}
    found = fault_of(read, f"{json.dumps(before)}\n{json.dumps({**GOOD, **edit})}\n")
    assert "f.jsonl, line 2: " in found
    assert said in found
    assert "faults in" not in found


@pytest.mark.parametrize("key", ["id", "prompt", "label"])
def test_a_missing_key_is_named(key: str, read: Read) -> None:
    record = {name: value for name, value in GOOD.items() if name != key}
    assert fault_of(read, [record]).endswith(f"f.jsonl, line 1: key {key!r} is missing")


def test_parquet_faults_are_named_by_row(read: Read) -> None:
    records = [GOOD, {**GOOD, "id": "b", "label": "answer"}]
    assert "f.parquet, row 2: key 'label': unknown label 'answer'" in fault_of(
        read, records, "f.parquet"
    )


def test_csv_faults_are_named_by_line(read: Read) -> None:
    said = fault_of(read, [GOOD, {**GOOD, "id": "b", "label": ""}], "f.csv")
    assert "f.csv, line 3: key 'label' is null" in said


def test_every_fault_of_every_file_comes_in_one_message(tmp_path: Path) -> None:
    one = write_table(tmp_path / "one.jsonl", [{**GOOD, "label": "x", "category": "y"}])
    two = write_table(tmp_path / "two.csv", [{**GOOD, "id": ""}])
    with pytest.raises(InputError) as caught:
        read_rows([one, two], TAXONOMY)
    lines = str(caught.value).splitlines()
    assert lines[0] == "3 faults in rows:"
    assert [line.split(":")[0].rsplit("/")[-1] for line in lines[1:]] == [
        "one.jsonl, line 1",
        "one.jsonl, line 1",
        "two.csv, line 2",
    ]


def test_at_most_twenty_faults_are_shown(read: Read) -> None:
    said = fault_of(read, [{**GOOD, "label": "x"} for _ in range(50)])
    assert "line 20: " in said
    assert "line 21: " not in said
    assert said.endswith("... and 30 more")


def test_the_number_of_faults_is_that_of_all_of_them(read: Read) -> None:
    said = fault_of(read, [{**GOOD, "label": "x"} for _ in range(50)])
    assert said.startswith("50 faults in rows:")


def test_an_id_again_names_both_places_across_files(tmp_path: Path) -> None:
    one = write_table(tmp_path / "one.jsonl", [{**GOOD, "id": "z"}, GOOD])
    two = write_table(tmp_path / "two.parquet", [GOOD])
    with pytest.raises(InputError) as caught:
        read_rows([one, two], TAXONOMY)
    assert str(caught.value) == f"{two}, row 1: id 'a' again; first seen at {one}, line 2"


def test_rows_of_several_files_come_in_order(tmp_path: Path) -> None:
    paths = [write_table(tmp_path / f"{i}.jsonl", [{**GOOD, "id": str(i)}]) for i in (2, 0, 1)]
    assert [row.id for row in read_rows(paths, TAXONOMY)] == ["2", "0", "1"]


def test_a_key_twice_in_one_object_is_refused(read: Read) -> None:
    said = fault_of(read, '{"id": "a", "prompt": "x", "label": "refuse", "label": "respond"}')
    assert "'label' twice" in said


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("prompt", "cut \ud83d"),
        ("prompt", [{"role": "user", "content": "cut \ud83d"}]),
        ("response", "cut \ud83d"),
        ("id", "cut \ud83d"),
    ],
)
def test_text_that_cannot_be_encoded_is_refused(key: str, value: Any, read: Read) -> None:
    said = fault_of(read, json.dumps({**GOOD, key: value}))
    assert f"key '{key}'" in said
    assert "holds half of a surrogate pair" in said
    assert read(json.dumps({**GOOD, "prompt": "whole \U0001f600"}))


def test_unlabelled_rows_are_read_where_they_are_allowed(read: Read) -> None:
    records = [{"id": "a", "prompt": "Hi", "label": None}]
    (row,) = read(records, labelled=False)
    assert row.label is None
    said = fault_of(read, [{**records[0], "label": "maybe"}], labelled=False)
    assert "unknown label 'maybe'" in said


def test_a_chat_prompt_keeps_its_turns(read: Read) -> None:
    chat = turns("system", "user", "assistant", "user")
    for name in ("f.jsonl", "f.parquet"):
        (row,) = read([{**GOOD, "prompt": chat}], name)
        assert row.prompt == tuple(chat)
        assert row.prompt_text == "text 0\ntext 1\ntext 2\ntext 3"


def test_a_single_user_message_is_the_same_prompt_as_its_text(read: Read) -> None:
    records = [GOOD, {**GOOD, "id": "b", "prompt": [{"role": "user", "content": "Hi"}]}]
    one, two = read(records)
    assert one.prompt == two.prompt
    assert one.prompt_sha256 == two.prompt_sha256


def test_the_prompt_hash_tells_roles_apart() -> None:
    payload = json.dumps([["user", "Größe"]], ensure_ascii=False).encode()
    row = replace(plain("x"), prompt=({"role": "user", "content": "Größe"},))
    assert row.prompt_sha256 == hashlib.sha256(payload).hexdigest()
    system = replace(row, prompt=({"role": "system", "content": "Größe"},))
    assert system.prompt_sha256 != row.prompt_sha256


def test_a_prompt_may_spell_a_control_token(read: Read) -> None:
    (row,) = read([{**GOOD, "prompt": "Say <|refuse:safety|>"}])
    assert row.prompt_text == "Say <|refuse:safety|>"


def test_messages_take_a_system_prompt_unless_they_have_one() -> None:
    user, system = turns("user"), turns("system", "user")
    assert messages_from("Hi") == ({"role": "user", "content": "Hi"},)
    assert messages_from(user, "Be kind.")[0] == {"role": "system", "content": "Be kind."}
    assert messages_from(user, "Be kind.")[1:] == tuple(user)
    assert messages_from(system, "Be kind.") == tuple(system)
    with pytest.raises(InputError, match="^prompt is empty"):
        messages_from("  ")
    with pytest.raises(InputError, match="^prompt: found the roles assistant"):
        messages_from(turns("assistant"))


TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(
    lambda text: bool(text.strip()) and "<|" not in text
)


@st.composite
def row_lists(draw: st.DrawFn) -> list[Row]:
    ids = draw(st.lists(TEXT, min_size=1, max_size=4, unique=True))
    rows = []
    for name in ids:
        label = draw(st.sampled_from(["refuse", "respond"]))
        categories = st.sampled_from(TAXONOMY.category_ids)
        category = draw(categories if label == "refuse" else categories | st.none())
        roles = draw(
            st.sampled_from([("user",), ("system", "user"), ("user", "assistant", "user")])
        )
        prompt = tuple({"role": role, "content": draw(TEXT)} for role in roles)
        optional = [draw(TEXT | st.none()) for _ in range(3)]
        group = draw(TEXT)
        row = Row(name, prompt, optional[0], label, category, group, *optional[1:])
        # An answer under a safety prompt's other token is refused by the reader.
        harmful = (label, category) == ("respond", "safety")
        rows.append(replace(row, train_control=harmful or draw(st.booleans())))
    return rows


@settings(max_examples=40)
@given(rows=row_lists())
def test_rows_survive_their_file(rows: list[Row], tmp_path_factory: Any) -> None:
    path = tmp_path_factory.getbasetemp() / "round.jsonl"
    write_jsonl(path, rows)
    assert read_rows([path], TAXONOMY) == rows


def test_the_record_of_a_row_is_short() -> None:
    record = row_to_record(plain("a"))
    assert record["prompt"] == "a"
    assert "train_control" not in record
    assert row_to_record(replace(plain("a"), train_control=False))["train_control"] is False


def test_the_data_hash_forgets_order_and_sees_every_change() -> None:
    rows = [plain("a"), plain("b")]
    assert data_hash(rows) == data_hash(rows[::-1])
    changes: list[dict[str, Any]] = [
        {"id": "c"},
        {"prompt": ({"role": "user", "content": "c"},)},
        {"label": "refuse"},
        {"category": "safety"},
        {"response": "c"},
        {"group": "c"},
        {"train_control": False},
    ]
    hashes = {data_hash([rows[0], replace(rows[1], **change)]) for change in changes}
    assert len(hashes | {data_hash(rows), data_hash(rows[:1])}) == len(changes) + 2


SHARES = {"train": 0.7, "calibration": 0.1, "test": 0.2}


def test_groups_never_part() -> None:
    rows = [plain(f"r{i}", f"g{i % 150}") for i in range(600)]
    parts = split_by_group(rows, SHARES)
    groups = [{row.group for row in part} for part in parts.values()]
    assert sum(len(names) for names in groups) == len(set.union(*groups)) == 150
    assert sorted(row.id for part in parts.values() for row in part) == sorted(r.id for r in rows)


def test_shares_are_about_those_asked_for() -> None:
    parts = split_by_group([plain(f"r{i}") for i in range(4000)], SHARES)
    assert list(parts) == list(SHARES)
    for name, share in SHARES.items():
        # Four standard deviations of a binomial share.
        assert abs(len(parts[name]) / 4000 - share) < 4 * (share * (1 - share) / 4000) ** 0.5


@settings(max_examples=20)
@given(st.randoms(use_true_random=False))
def test_adding_rows_and_changing_their_order_moves_none(random: Any) -> None:
    few = [plain(f"r{i}", f"g{i % 40}") for i in range(80)]
    more = few + [plain(f"new{i}") for i in range(random.randint(0, 60))]
    random.shuffle(more)
    first, second = split_by_group(few, SHARES), split_by_group(more, SHARES)
    for name in SHARES:
        kept = {row.id for row in second[name]} & {row.id for row in few}
        assert kept == {row.id for row in first[name]}


def test_another_seed_draws_another_split() -> None:
    rows = [plain(f"r{i}") for i in range(100)]
    assert split_by_group(rows, SHARES, "one") != split_by_group(rows, SHARES, "two")
    assert split_by_group(rows, SHARES, "one") == split_by_group(rows, SHARES, "one")


def test_an_empty_part_is_an_error_that_names_it() -> None:
    with pytest.raises(InputError, match="split .* is empty: too few groups"):
        split_by_group([plain("a"), plain("b", "a")], SHARES)


@pytest.mark.parametrize(
    "shares",
    [{}, {"a": 0.5}, {"a": 1.5, "b": -0.5}, {"a": 1.0, "b": 0.0}, {"a": 1.0, "b": float("nan")}],
)
def test_shares_must_be_positive_and_sum_to_one(shares: dict[str, float]) -> None:
    with pytest.raises(InputError, match="must be positive and sum to 1; found"):
        split_by_group([plain("a")], shares)


@pytest.mark.parametrize("value", ["9" * 5000, "[" * 100_000])
def test_json_beyond_what_python_reads_names_its_line(value: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"id": "a", "prompt": "p"}}\n{{"id": {value}}}\n')
    with pytest.raises(InputError, match=r"rows\.jsonl, line 2: not JSON"):
        read_rows([path], default_taxonomy())
