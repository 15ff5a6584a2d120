"""The outcomes file: generated replies and whether their text refuses."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from refusal_tokens.errors import InputError, unknown
from refusal_tokens.files import atomic_file, unique_keys
from refusal_tokens.judge import RULES, VERDICTS
from refusal_tokens.maps import LABELS
from refusal_tokens.rates import Rate, rate
from refusal_tokens.taxonomy import RESPOND_TOKEN

SCHEMA_VERSION = 1
METADATA_KEY = b"refusal_tokens"
JUDGE = RULES
# Of an evaluation, written beside its outcomes file.
SIDECARS = ("profile", "base")
OPTIONAL = ("preferred", "tokens", "ended")


@dataclass(frozen=True)
class Outcome:
    """One generated reply, judged.

    Attributes:
        forced: the control token that was forced; None where the model decided.
        decision: the control token that opened the reply; None for a model without.
        verdict: ``refused``, ``partly``, ``answered`` or ``undecided``.
        judge: who gave the verdict.
        preferred: the control token that the model decides on itself, with every bias at 0.
        tokens: length of the reply, without its control token.
        ended: whether the reply ended its turn; False where it was cut off.

    The last three are None where they are not known; files without their columns are read so.
    """

    id: str
    label: str | None
    category: str | None
    group: str | None
    forced: str | None
    decision: str | None
    text: str
    verdict: str
    judge: str = JUDGE
    preferred: str | None = None
    tokens: int | None = None
    ended: bool | None = None

    @property
    def adheres(self) -> bool:
        """Whether the text does what its control token says."""
        return self.verdict == ("answered" if self.decision == RESPOND_TOKEN else "refused")


def distinct(outcomes: Iterable[Outcome]) -> list[Outcome]:
    """Return each reply once: one that is both the model's own and forced is in a file twice."""
    return list({(outcome.id, outcome.decision): outcome for outcome in outcomes}.values())


def adherence(outcomes: Iterable[Outcome]) -> dict[str, Rate]:
    """Return the share of replies whose text agrees with the token, by token."""
    by_token: dict[str, list[bool]] = {}
    for outcome in outcomes:
        if outcome.decision is not None:
            by_token.setdefault(outcome.decision, []).append(outcome.adheres)
    return {token: rate(sum(found), len(found)) for token, found in by_token.items()}


def write_outcomes(path: str | Path, outcomes: Sequence[Outcome], metadata: Any) -> None:
    """Write an outcomes file atomically."""
    types = {"tokens": pa.int64(), "ended": pa.bool_()}
    schema = pa.schema([(f.name, types.get(f.name, pa.string())) for f in fields(Outcome)])
    table = pa.Table.from_pylist([asdict(outcome) for outcome in outcomes], schema)
    meta = {METADATA_KEY: json.dumps({"schema_version": SCHEMA_VERSION, **metadata})}
    with atomic_file(path) as temporary:
        pq.write_table(table.replace_schema_metadata(meta), temporary)


def beside(output: Path, what: str) -> Path:
    """Return where a further file of an evaluation lies."""
    return output.with_name(f"{output.stem}.{what}.parquet")


def holds_outcomes(path: str | Path) -> bool:
    """Tell an outcomes file from a profile, by its columns.

    Raises:
        InputError: if the file is missing or not a whole Parquet file.
    """
    return "verdict" in _opened(path, pq.read_schema).names


def read_outcomes(path: str | Path) -> tuple[tuple[Outcome, ...], Mapping[str, Any]]:
    """Read an outcomes file; return its replies and its metadata.

    Raises:
        InputError: if it is missing, truncated, of another schema version, lacks a column, or holds
            a label or verdict that is not one.
    """
    table = _opened(path, pq.read_table)
    metadata = _metadata(table, path)
    names = [field.name for field in fields(Outcome)]
    missing = [name for name in names if name not in (*table.column_names, *OPTIONAL)]
    if missing:
        raise InputError(f"{path}: column {missing[0]!r} is missing")
    kept = table.select([name for name in names if name in table.column_names])
    outcomes = tuple(Outcome(**record) for record in kept.to_pylist())
    for row, outcome in enumerate(outcomes, 1):
        if outcome.verdict not in VERDICTS:
            raise InputError(f"{path}, row {row}: {unknown('verdict', outcome.verdict, VERDICTS)}")
        if outcome.label not in (*LABELS, None):
            raise InputError(f"{path}, row {row}: {unknown('label', outcome.label, LABELS)}")
        if outcome.id is None:
            raise InputError(f"{path}, row {row}: id is missing")
    return outcomes, metadata


def _opened(path: str | Path, reader: Any) -> Any:
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file")
    try:
        return reader(path)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path}: not a whole Parquet file ({error})") from None


def _metadata(table: pa.Table, path: str | Path) -> dict[str, Any]:
    raw = (table.schema.metadata or {}).get(METADATA_KEY)
    try:
        metadata = json.loads(raw or b"null", object_pairs_hook=unique_keys(f"{path}: metadata"))
    except ValueError as error:
        raise InputError(f"{path}: metadata is not JSON ({error})") from None
    version = metadata.get("schema_version") if isinstance(metadata, dict) else None
    if version != SCHEMA_VERSION:
        raise InputError(
            f"{path}: outcomes schema version {version!r}; this version reads {SCHEMA_VERSION}"
        )
    found: dict[str, Any] = metadata
    return found


def by_text(outcomes: Sequence[Outcome], where: str) -> tuple[Outcome, ...]:
    """Return the replies whose opening the model chose itself, one a prompt.

    Raises:
        InputError: if there are none, or two for one prompt.
    """
    own = tuple(outcome for outcome in outcomes if outcome.forced is None)
    if not own:
        raise InputError(
            f"{where}: every reply has a forced control token; comparing by text needs replies "
            "that the model opened itself (forced: null)"
        )
    seen = set()
    for outcome in own:
        if outcome.id in seen:
            raise InputError(f"{where}: two replies for prompt {outcome.id!r}; one is needed")
        seen.add(outcome.id)
    return own
