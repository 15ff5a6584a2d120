"""Labelled rows: checked strictly whatever they are read from, and split by group."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from refusal_tokens.errors import InputError, one_message
from refusal_tokens.files import write_text
from refusal_tokens.maps import FIELDS, MapFault, RowMap, built_in_maps
from refusal_tokens.readers import HUB, Records, hub_columns, hub_parts, open_table
from refusal_tokens.row_checks import (
    REQUIRED,
    Messages,
    as_flag,
    checked_messages,
    record_faults,
)
from refusal_tokens.sources import Source, category_faults
from refusal_tokens.taxonomy import Taxonomy

MAX_FAULTS = 20


@dataclass(frozen=True)
class Row:
    """One labelled prompt.

    Attributes:
        id: unique within a data set.
        prompt: chat messages, ending in a user turn.
        response: the reply, or None to train the control token alone.
        label: ``refuse``, ``respond``, or None for traffic without labels.
        category: a taxonomy id; on a ``respond`` row the category that a wrong refusal would carry
            (a near-miss), None for an ordinary request.
        group: rows of one group never part across splits; the id where none is given.
        train_control: whether the control token counts in the loss; False trains the reply alone.
    """

    id: str
    prompt: Messages
    response: str | None
    label: str | None
    category: str | None
    group: str
    subcategory: str | None = None
    source: str | None = None
    train_control: bool = True

    @property
    def prompt_text(self) -> str:
        """The prompt as one string, for searching and reports: turns joined by newlines."""
        return "\n".join(message["content"] for message in self.prompt)

    @property
    def prompt_sha256(self) -> str:
        """SHA-256 over roles and contents."""
        payload = json.dumps([[m["role"], m["content"]] for m in self.prompt], ensure_ascii=False)
        return hashlib.sha256(payload.encode()).hexdigest()


def read_rows(
    paths: Sequence[str | Path],
    taxonomy: Taxonomy,
    *,
    row_map: str | Mapping[str, Any] | None = None,
    labelled: bool = True,
) -> list[Row]:
    """Read every row of files and Hub data sets, and check every one.

    Args:
        paths: ``*.jsonl``, ``*.parquet`` or ``*.csv`` files, or
            ``hub:owner/name[/config][:split]``.
        taxonomy: the categories that rows may carry.
        row_map: for sets of another shape, a built-in map's name, a YAML file, or the map itself.
        labelled: False admits rows without label.

    Raises:
        InputError: listing up to 20 faults with file, line, key, found and allowed.
    """
    sources = [Source(str(path), row_map) for path in paths]
    return [row for part in read_sources(sources, taxonomy, labelled=labelled) for row in part.rows]


@dataclass(frozen=True)
class Part:
    """The rows of one source.

    Attributes:
        source: where they are from.
        rows: in the order of the source.
        skipped: rows left out as faulty.
    """

    source: Source
    rows: list[Row]
    skipped: int = 0


def read_sources(
    sources: Sequence[Source], taxonomy: Taxonomy, *, labelled: bool = True
) -> list[Part]:
    """Read all rows of each source; see ``read_rows``. Counts and shares are ``mixing``'s.

    Raises:
        InputError: as ``read_rows``.
    """
    faults: list[str] = []
    places: dict[str, str] = {}
    parts = [_read_source(source, taxonomy, labelled, places, faults) for source in sources]
    if faults:
        raise _shortened(faults)
    return parts


def _read_source(
    source: Source, taxonomy: Taxonomy, labelled: bool, places: dict[str, str], faults: list[str]
) -> Part:
    """Read one source; ``places`` holds the ids seen so far, ``faults`` what was wrong."""
    rows, skipped = [], 0
    advice = "; another name would set this source's ids apart" if source.prefix else ""
    for place, record in _mapped_records(source, taxonomy, faults):
        found = record_faults(record, taxonomy, labelled)
        if not found and record["id"] in places:
            found = [f"id {record['id']!r} again; first seen at {places[record['id']]}{advice}"]
        if not found:
            places[record["id"]] = place
            rows.append(_row_from(record))
        elif source.skip_faulty:
            skipped += 1
        else:
            faults += [f"{place}: {fault}" for fault in found]
    if skipped and not rows:
        faults.append(f"{source.path}: all of its {skipped} rows are faulty")
    return Part(source, rows, skipped)


def _shortened(faults: list[str]) -> InputError:
    """Fold the first faults into one error that counts them all."""
    more = len(faults) - MAX_FAULTS
    if more <= 0:
        return one_message(faults, "rows")
    lines = [f"{len(faults)} faults in rows:", *faults[:MAX_FAULTS], f"... and {more} more"]
    return InputError("\n  ".join(lines))


def _mapped_records(source: Source, taxonomy: Taxonomy, faults: list[str]) -> Records:
    """Yield one source's records under the names of row fields; what it lacks goes to ``faults``.

    Faults of the map and of columns come before any record is converted.
    """
    table, row_map = open_table(source.path), source.row_map
    early = [*category_faults(source, taxonomy), *_column_faults(source, table.columns, row_map)]
    if early:
        faults += [f"{source.path}: {fault}" for fault in early]
        return
    title, prefix = source.title, source.prefix
    number = kept = 0
    makes_ids = row_map is not None and row_map.makes_ids(table.columns)
    unmapped: dict[str, list[str]] = {}
    for number, (place, found) in enumerate(table.records, 1):
        if row_map is not None and not row_map.keeps(found):
            continue
        kept += 1
        try:
            record = row_map.convert(found) if row_map else dict(found)
        except MapFault as fault:
            unmapped.setdefault(str(fault), []).append(place)
            continue
        if makes_ids:
            record["id"] = f"{title}-{number:06d}"
        elif prefix and isinstance(record.get("id"), str):
            record["id"] = f"{prefix}-{record['id']}"
        yield place, record
    if not kept:
        of = f"none of its {number} rows passes the map's where" if number else "no rows in it"
        faults.append(f"{source.path}: {of}")
    for text, places in unmapped.items():
        more = f" ({len(places)} rows)" if len(places) > 1 else ""
        faults.append(f"{places[0]}: {text}{more}")


def check_hub_columns(sources: Sequence[Source]) -> None:
    """Check the columns that Hub sets say they have, and that they may be read, before downloads.

    Raises:
        InputError: for a set that is missing or gated, or whose columns differ from its map's.
    """
    faults = []
    for source in sources:
        columns = hub_columns(source.path) if source.path.startswith(HUB) else None
        found = _column_faults(source, columns, source.row_map) if columns else []
        faults += [f"{source.path}: {fault}" for fault in found]
    if faults:
        raise one_message(faults, "rows")


def _column_faults(source: Source, columns: Sequence[str], row_map: RowMap | None) -> list[str]:
    """Say what a set's columns lack; an empty JSONL file has none, and is named as empty."""
    if row_map is not None:
        fault = row_map.column_fault(columns) if columns else None
        return [fault] if fault else []
    # A file's faults are named line by line; those of a Hub set are the same in every row.
    if not source.path.startswith(HUB) or set(REQUIRED) <= set(columns) <= set(FIELDS):
        return []
    name = hub_parts(source.path)[0]
    fitting = [key for key, m in built_in_maps().items() if f"{m.hub}/".startswith(f"{name}/")]
    advice = f"there are maps for it: {', '.join(fitting)}" if fitting else "it needs a map"
    return [
        f"columns: expected {', '.join(REQUIRED)}, and none but {', '.join(FIELDS)}; "
        f"found: {', '.join(columns)}; {advice}"
    ]


def _row_from(record: Mapping[str, Any]) -> Row:
    """Build a row from a record without faults."""
    return Row(
        id=record["id"],
        prompt=checked_messages(record["prompt"])[0],
        response=record.get("response"),
        label=record["label"],
        category=record.get("category"),
        group=record.get("group") or record["id"],
        subcategory=record.get("subcategory"),
        source=record.get("source"),
        train_control=as_flag(record.get("train_control")) is not False,
    )


def messages_from(prompt: str | Sequence[Mapping[str, str]], system: str | None = None) -> Messages:
    """Give a user's prompt the form of a row's, with an optional system prompt before it.

    Raises:
        InputError: if it is empty or its roles are out of order.
    """
    messages, faults = checked_messages(prompt)
    if faults:
        raise one_message([fault.replace("key 'prompt'", "prompt") for fault in faults], "prompt")
    if system is not None and messages[0]["role"] != "system":
        messages = ({"role": "system", "content": system}, *messages)
    return messages


def row_to_record(row: Row) -> dict[str, Any]:
    """Return the JSON form of a row; a single user message becomes a plain string."""
    record = {field: value for field, value in asdict(row).items() if field in FIELDS}
    single = len(row.prompt) == 1 and row.prompt[0]["role"] == "user"
    record["prompt"] = row.prompt[0]["content"] if single else [dict(m) for m in row.prompt]
    if row.train_control:
        del record["train_control"]
    return record


def write_jsonl(path: str | Path, rows: Iterable[Row]) -> None:
    """Write rows as JSONL, atomically."""
    lines = (json.dumps(row_to_record(row), ensure_ascii=False) for row in rows)
    write_text(path, "".join(f"{line}\n" for line in lines))


def data_hash(rows: Iterable[Row]) -> str:
    """SHA-256 over all that is trained or measured of rows, whatever their order."""

    def part(row: Row) -> list[Any]:
        kept = [row.id, row.prompt_sha256, row.label, row.category, row.response]
        kept += [] if row.group == row.id else [row.group]
        return kept if row.train_control else [*kept, "control token not trained"]

    parts = sorted(json.dumps(part(row), ensure_ascii=False) for row in rows)
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def split_by_group(
    rows: Sequence[Row], shares: Mapping[str, float], seed: str = "refusal_tokens"
) -> dict[str, list[Row]]:
    """Split rows into named parts, whole groups at a time.

    A group's place depends on its name and ``seed`` alone, so adding rows moves none.

    Args:
        rows: the rows, in any order.
        shares: name -> share of groups; the shares sum to 1.
        seed: changes the draw.

    Raises:
        InputError: if the shares do not sum to 1 or a part stays empty.
    """
    total = sum(shares.values())
    # Written so that NaN fails.
    if not (all(share > 0 for share in shares.values()) and abs(total - 1) <= 1e-9):
        raise InputError(f"split shares must be positive and sum to 1; found {total:g}")
    parts: dict[str, list[Row]] = {name: [] for name in shares}
    for row in rows:
        parts[part_of(row.group, shares, seed)].append(row)
    empty = [name for name, part in parts.items() if not part]
    if empty:
        raise InputError(f"split {', '.join(empty)} is empty: too few groups for its share")
    return parts


def part_of(group: str, shares: Mapping[str, float], seed: str) -> str:
    """Return the part that a group falls into, from its name and ``seed`` alone."""
    digest = hashlib.sha256(f"{seed}\0{group}".encode()).digest()
    draw = int.from_bytes(digest[:8], "big") / 2**64
    reached = 0.0
    for name, share in shares.items():
        reached += share
        if draw < reached:
            return name
    return name
