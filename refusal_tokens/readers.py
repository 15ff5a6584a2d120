"""Records from JSONL, Parquet and CSV files and from the Hub, each with the place it stands at."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from refusal_tokens.errors import InputError, nearest
from refusal_tokens.files import read_bytes, read_text, unique_keys

HUB = "hub:"
HUB_FORM = "hub:owner/name[/config][:split]"
MAX_CELL = 2**31 - 1

Records = Iterable[tuple[str, Mapping[str, Any]]]


@dataclass(frozen=True)
class Table:
    """A file or Hub set that is open but not converted yet.

    Attributes:
        columns: the names in it; of JSONL, the keys of any line.
        records: (place, column -> value), once.
    """

    columns: tuple[str, ...]
    records: Records


def open_table(path: str) -> Table:
    """Open a file by its suffix, or a Hub data set.

    Args:
        path: a ``.jsonl``, ``.parquet`` or ``.csv`` file, or ``hub:owner/name[/config][:split]``;
            the split is ``train`` where none is given, and may be a slice such as
            ``train[:1000]``.

    Raises:
        InputError: if it is missing, damaged, gated, or of an unknown kind.
    """
    if path.startswith(HUB):
        return _hub_table(path)
    readers: dict[str, Callable[[str], Table]] = {
        ".jsonl": _jsonl_table,
        ".parquet": _parquet_table,
        ".csv": _csv_table,
    }
    reader = readers.get(Path(path).suffix.lower())
    if reader is None:
        raise InputError(
            f"{path}: unknown kind of file; allowed: {', '.join(readers)}, or {HUB_FORM}"
        )
    return reader(path)


def _jsonl_table(path: str) -> Table:
    records = list(_jsonl_records(path))
    return Table(tuple(dict.fromkeys(key for _, record in records for key in record)), records)


def _jsonl_records(path: str) -> Records:
    text = read_text(path)
    # Only "\n" ends a line: str.splitlines also splits at separators that JSON strings may hold.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            record = json.loads(line, object_pairs_hook=unique_keys(place))
        except json.JSONDecodeError as error:
            cut = " (is the file truncated?)" if number == text.count("\n") + 1 else ""
            raise InputError(f"{place}: not JSON: {error.msg}{cut}") from None
        except (ValueError, RecursionError) as error:
            raise InputError(f"{place}: not JSON that can be read ({error})") from None
        if not isinstance(record, dict):
            raise InputError(f"{place}: found {type(record).__name__}; allowed: a JSON object")
        yield place, record


def _parquet_table(path: str) -> Table:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(io.BytesIO(read_bytes(path)))
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path}: not a whole Parquet file ({error})") from None
    rows = (row for batch in table.to_batches() for row in batch.to_pylist())
    numbered = ((f"{path}, row {number}", row) for number, row in enumerate(rows, 1))
    return Table(tuple(table.column_names), numbered)


def _csv_table(path: str) -> Table:
    csv.field_size_limit(MAX_CELL)
    reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    try:
        header = next(reader, [])
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.line_num}: not CSV ({error})") from None
    for name in header:
        if header.count(name) > 1:
            raise InputError(f"{path}, line 1: column {name!r} twice")
    return Table(tuple(header), _csv_records(path, reader, header))


def _csv_records(path: str, reader: Any, header: list[str]) -> Records:
    try:
        for cells in filter(None, reader):
            place = f"{path}, line {reader.line_num}"
            if len(cells) != len(header):
                raise InputError(f"{place}: as many values as the header has columns are needed")
            # CSV has no null: an empty cell is one.
            yield place, {key: cell or None for key, cell in zip(header, cells, strict=True)}
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.line_num}: not CSV ({error})") from None


def hub_parts(path: str) -> tuple[str, str | None, str]:
    """Take ``hub:owner/name[/config][:split]`` apart.

    >>> hub_parts("hub:allenai/coconot/original:test")
    ('allenai/coconot', 'original', 'test')

    Raises:
        InputError: for another form.
    """
    whole, _, split = path.removeprefix(HUB).partition(":")
    names = whole.split("/")
    if len(names) not in (2, 3) or not all(names):
        raise InputError(f"{path}: allowed: {HUB_FORM}")
    return "/".join(names[:2]), names[2] if len(names) == 3 else None, split or "train"


def _hub_table(path: str) -> Table:
    import datasets
    from datasets.exceptions import DatasetsError

    name, config, split = hub_parts(path)
    try:
        dataset = datasets.load_dataset(name, config, split=split)
    except (DatasetsError, OSError, ValueError) as error:
        raise InputError(f"{path}: {_hub_fault(name, config, split, error)}") from None
    numbered = ((f"{path}, row {number}", row) for number, row in enumerate(dataset, 1))
    return Table(tuple(dataset.column_names), numbered)


def hub_columns(path: str) -> tuple[str, ...] | None:
    """Return the columns that a Hub set's card states, without downloading it; None without.

    Raises:
        InputError: if the set is missing or gated, or the Hub cannot be reached.
    """
    import datasets
    from datasets.exceptions import DatasetsError

    name, config, split = hub_parts(path)
    try:
        features = datasets.load_dataset_builder(name, config).info.features
    except (DatasetsError, OSError, ValueError) as error:
        raise InputError(f"{path}: {_hub_fault(name, config, split, error)}") from None
    return tuple(features) if features else None


def _hub_fault(name: str, config: str | None, split: str, error: Exception) -> str:
    """Say why a Hub set cannot be loaded, and what to do."""
    from datasets.exceptions import DatasetGenerationError
    from huggingface_hub.errors import GatedRepoError

    if isinstance(error, DatasetGenerationError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    # The first two lines: for a missing configuration, the second lists the ones there are.
    reason = " ".join(str(error).splitlines()[:2]) or type(error).__name__
    page = f"https://huggingface.co/datasets/{name}"
    if isinstance(error.__cause__ or error, GatedRepoError) or "gated dataset" in reason:
        return (
            f"this set is gated; accept its terms at {page}, then log in with "
            "`hf auth login`, or set HF_TOKEN"
        )
    if isinstance(error, ConnectionError):
        return f"the Hub cannot be reached ({reason}); a downloaded file can be named as path"
    known = re.findall(r"'([^']+)'", reason.partition("vailable: ")[2] or reason.partition("[")[2])
    wanted = config if config and "onfig" in reason else split
    return f"cannot be loaded ({reason}){nearest(wanted, known)}"
