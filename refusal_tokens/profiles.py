"""The profile file: the control logits of one model over one labelled prompt set."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from refusal_tokens.errors import InputError, unknown
from refusal_tokens.files import atomic_file, unique_keys
from refusal_tokens.maps import LABELS
from refusal_tokens.rows import part_of
from refusal_tokens.taxonomy import Taxonomy, taxonomy_from_dict

SCHEMA_VERSION = 1
METADATA_KEY = b"refusal_tokens"
TEXT_COLUMNS = ("id", "prompt_sha256", "label", "category", "subcategory", "group", "source")


@dataclass(frozen=True)
class Profile:
    """Control logits and labels, one entry a prompt.

    Attributes:
        columns: the text columns of the file, each (prompts,), None where missing.
        control_logits: (prompts, 1 + categories), nats, respond first.
        rest_max: (prompts,), greatest logit outside the control tokens, nats.
        rest_logsumexp: temperature -> (prompts,), logsumexp of the other logits divided by the
            temperature.
        prompt_tokens: (prompts,), length of the prompt in tokens.
        taxonomy: what the control logits stand for.
        metadata: schema version, model fingerprint, data hash, system prompt, dtype, versions.
    """

    columns: Mapping[str, NDArray[np.object_]]
    control_logits: NDArray[np.float32]
    rest_max: NDArray[np.float32]
    rest_logsumexp: Mapping[float, NDArray[np.float32]]
    prompt_tokens: NDArray[np.int64]
    taxonomy: Taxonomy
    metadata: Mapping[str, Any]

    def __len__(self) -> int:
        return len(self.control_logits)

    @cached_property
    def token_index(self) -> NDArray[np.int64]:
        """(prompts,), the control token each label asks for; -1 where there is no label."""
        pairs = zip(self.columns["label"], self.columns["category"], strict=True)
        found = np.array(
            [-1 if label is None else self.taxonomy.token_index(label, c) for label, c in pairs],
            dtype=np.int64,
        )
        found.flags.writeable = False
        return found

    # Curves ask for these masks thousands of times; comparing codes is 100 times as fast as
    # comparing Python objects.
    @cached_property
    def _labels(self) -> tuple[dict[str | None, int], NDArray[np.int64]]:
        return _codes(self.columns["label"])

    @cached_property
    def _categories(self) -> tuple[dict[str | None, int], NDArray[np.int64]]:
        return _codes(self.columns["category"])

    def is_label(self, label: str) -> NDArray[np.bool_]:
        """(prompts,), which prompts carry this label."""
        code, found = self._labels
        return np.asarray(found == code.get(label, -1))

    def is_category(self, category: str | None) -> NDArray[np.bool_]:
        """(prompts,), which prompts carry this category."""
        code, found = self._categories
        return np.asarray(found == code.get(category, -1))

    def is_of_knob(self, knob: str) -> NDArray[np.bool_]:
        """(prompts,), which prompts a knob is about: its category's; all for the single one."""
        if self.taxonomy.single_token:
            return np.ones(len(self), dtype=bool)
        return self.is_category(knob)

    def select(self, rows: NDArray[np.bool_] | NDArray[np.integer]) -> Profile:
        """Return the profile of some prompts: a mask, (prompts,), or their indices in any order."""
        return replace(
            self,
            columns={name: values[rows] for name, values in self.columns.items()},
            control_logits=self.control_logits[rows],
            rest_max=self.rest_max[rows],
            rest_logsumexp={t: values[rows] for t, values in self.rest_logsumexp.items()},
            prompt_tokens=self.prompt_tokens[rows],
        )

    @cached_property
    def groups(self) -> NDArray[np.int64]:
        """(prompts,), a number for each group; a prompt without one is a group of its own."""
        names = group_names(self.columns["id"], self.columns["group"])
        found = np.unique(names, return_inverse=True)[1].reshape(-1)
        found.flags.writeable = False
        return found

    @property
    def data_hash(self) -> str:
        """SHA-256 over prompts, labels and control logits, whatever the order of the prompts."""
        columns = (self.columns[name] for name in ("prompt_sha256", "label", "category"))
        parts = sorted(
            json.dumps([*texts, logits.tobytes().hex()])
            for *texts, logits in zip(*columns, self.control_logits, strict=True)
        )
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    @property
    def control_mass(self) -> NDArray[np.float64]:
        """(prompts,), softmax probability of all control tokens together, unmasked, at T = 1."""
        control = np.logaddexp.reduce(self.control_logits.astype(np.float64), axis=1)
        rest = self.rest_logsumexp[1.0].astype(np.float64)
        return np.asarray(1.0 / (1.0 + np.exp(rest - control)))


def _codes(values: NDArray[np.object_]) -> tuple[dict[str | None, int], NDArray[np.int64]]:
    """Number the distinct values in order of appearance; return the numbers and the column."""
    code = {value: i for i, value in enumerate(dict.fromkeys(values))}
    return code, np.array([code[value] for value in values], dtype=np.int64)


def write_profile(path: str | Path, profile: Profile) -> None:
    """Write a profile file atomically."""
    width = profile.control_logits.shape[1]
    flat = pa.array(profile.control_logits.reshape(-1), pa.float32())
    table: dict[str, Any] = {
        name: pa.array(list(profile.columns[name]), pa.string()) for name in TEXT_COLUMNS
    }
    table["control_logits"] = pa.FixedSizeListArray.from_arrays(flat, width)
    table["rest_max"] = pa.array(profile.rest_max, pa.float32())
    temperatures = sorted(profile.rest_logsumexp)
    rests = np.stack([profile.rest_logsumexp[t] for t in temperatures], axis=1)
    table["rest_logsumexp"] = pa.FixedSizeListArray.from_arrays(
        pa.array(rests.reshape(-1), pa.float32()), len(temperatures)
    )
    table["prompt_tokens"] = pa.array(profile.prompt_tokens, pa.int64())
    metadata = {
        **profile.metadata,
        "schema_version": SCHEMA_VERSION,
        "taxonomy": profile.taxonomy.to_dict(),
        "temperatures": temperatures,
    }
    arrow = pa.table(table).replace_schema_metadata({METADATA_KEY: json.dumps(metadata)})
    with atomic_file(path) as temporary:
        pq.write_table(arrow, temporary)


def read_profile(path: str | Path) -> Profile:
    """Read a profile file.

    Raises:
        InputError: if it is missing, truncated, of another schema version, lacks a column or
            metadata, or holds an unknown label or category or numbers that are not finite.
    """
    if Path(path).is_dir():
        raise InputError(f"{path}: is a folder; allowed: a file that `profile` wrote")
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file")
    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path}: not a whole Parquet file ({error})") from None
    metadata = _metadata(table, path)
    taxonomy = taxonomy_from_dict(metadata.pop("taxonomy"), str(path))
    temperatures = metadata.pop("temperatures")
    columns = {name: _strings(table, name, path) for name in TEXT_COLUMNS}
    _check_names(columns["label"], "label", LABELS, path)
    _check_names(columns["category"], "category", taxonomy.category_ids, path)
    logits = _numbers(table, "control_logits", path, len(taxonomy.tokens))
    rests = _numbers(table, "rest_logsumexp", path, len(temperatures))
    return Profile(
        columns=columns,
        control_logits=logits,
        rest_max=_numbers(table, "rest_max", path),
        rest_logsumexp={t: rests[:, i] for i, t in enumerate(temperatures)},
        prompt_tokens=_numbers(table, "prompt_tokens", path).astype(np.int64),
        taxonomy=taxonomy,
        metadata=metadata,
    )


def _metadata(table: pa.Table, path: str | Path) -> dict[str, Any]:
    raw = (table.schema.metadata or {}).get(METADATA_KEY)
    if raw is None:
        raise InputError(f"{path}: not a profile (no refusal_tokens metadata)")
    try:
        metadata = json.loads(raw, object_pairs_hook=unique_keys(f"{path}: metadata"))
    except ValueError as error:
        raise InputError(f"{path}: metadata is not JSON ({error})") from None
    if not isinstance(metadata, dict):
        raise InputError(f"{path}: metadata: found {type(metadata).__name__}; allowed: an object")
    version = metadata.get("schema_version")
    if version != SCHEMA_VERSION:
        raise InputError(
            f"{path}: profile schema version {version!r}; this version reads {SCHEMA_VERSION}"
        )
    for key in ("taxonomy", "temperatures"):
        if key not in metadata:
            raise InputError(f"{path}: metadata: key {key!r} is missing")
    temperatures = metadata["temperatures"]
    if not isinstance(temperatures, list) or not all(type(t) in (int, float) for t in temperatures):
        raise InputError(f"{path}: metadata: temperatures must be a list of numbers")
    if 1.0 not in temperatures:
        raise InputError(f"{path}: metadata: temperatures: found {temperatures}; 1 must be there")
    return metadata


def _column(table: pa.Table, name: str, path: str | Path) -> list[Any]:
    if name not in table.column_names:
        raise InputError(f"{path}: column {name!r} is missing")
    values: list[Any] = table[name].to_pylist()
    return values


def _strings(table: pa.Table, name: str, path: str | Path) -> NDArray[np.object_]:
    return np.array(_column(table, name, path), dtype=object)


def _check_names(
    values: NDArray[np.object_], name: str, allowed: Sequence[str], path: str | Path
) -> None:
    for row, value in enumerate(values, 1):
        if value is not None and value not in allowed:
            raise InputError(f"{path}, row {row}: {unknown(name, value, allowed)}")


def _numbers(
    table: pa.Table, name: str, path: str | Path, width: int | None = None
) -> NDArray[np.float32]:
    """Read a column of finite numbers, or of lists of ``width`` of them."""
    column = _column(table, name, path)
    expected = "(prompts,)" if width is None else f"(prompts, {width})"
    shape = (len(column),) if width is None else (len(column), width)
    if not column:
        return np.zeros(shape, np.float32)
    try:
        values = np.asarray(column, dtype=np.float32)
    except (ValueError, TypeError):
        raise InputError(f"{path}: {name} does not hold numbers of shape {expected}") from None
    if values.shape != shape:
        raise InputError(f"{path}: {name} has shape {values.shape}; expected {expected}")
    bad = np.argwhere(~np.isfinite(values))
    if len(bad):
        raise InputError(f"{path}, row {bad[0, 0] + 1}: {name} is not finite")
    return values


def text_columns(rows: Sequence[Any]) -> dict[str, NDArray[np.object_]]:
    """Return the text columns of a profile for these rows."""
    return {
        name: np.array([getattr(row, name) for row in rows], dtype=object) for name in TEXT_COLUMNS
    }


def group_names(ids: Iterable[str], groups: Iterable[str | None]) -> list[str]:
    """Name the group of each prompt; a prompt without one is a group of its own."""
    return [
        f"id {own}" if group is None else f"group {group}"
        for own, group in zip(ids, groups, strict=True)
    ]


def split_profile(profile: Profile, seed: str = "certificate") -> tuple[Profile, Profile]:
    """Split a profile's prompts in two halves, whole groups at a time, by the groups' names."""
    names = group_names(profile.columns["id"], profile.columns["group"])
    halves = {"first": 0.5, "second": 0.5}
    first = np.array([part_of(name, halves, seed) == "first" for name in names], dtype=bool)
    return profile.select(first), profile.select(~first)


def check_model(profile: Profile, model_fingerprint: str, taxonomy: Taxonomy, where: str) -> None:
    """Check that a profile is of a model.

    Args:
        profile: it.
        model_fingerprint: the model's, as in its checkpoint's info.
        taxonomy: the model's.
        where: what the message calls the profile.

    Raises:
        InputError: if it is of another one.
    """
    for what, found, own in (
        ("model fingerprint", profile.metadata.get("model_fingerprint"), model_fingerprint),
        ("taxonomy hash", profile.taxonomy.hash, taxonomy.hash),
    ):
        if found != own:
            raise InputError(f"{where} is of another model: {what} {found}; this has {own}")


def same_model(a: Profile, b: Profile, a_name: str, b_name: str) -> None:
    """Check that two profiles are of one model and taxonomy.

    Raises:
        InputError: naming both hashes.
    """
    for what, of_a, of_b in (
        ("taxonomy", a.taxonomy.hash, b.taxonomy.hash),
        *(
            (key.replace("_", " "), a.metadata.get(key), b.metadata.get(key))
            for key in ("model_fingerprint", "system_prompt")
        ),
    ):
        if of_a != of_b:
            raise InputError(f"{a_name} and {b_name} differ in {what}: {of_a} and {of_b}")
