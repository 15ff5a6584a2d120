"""Audit a labelled data set: counts, exact duplicates, label conflicts, leaks between splits."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from refusal_tokens.rows import Row
from refusal_tokens.taxonomy import RESPOND, Taxonomy

MAX_SHOWN = 10


@dataclass(frozen=True)
class Audit:
    """What an audit found.

    Attributes:
        counts: split -> (label, category) -> rows.
        with_response: split -> rows that carry a reply.
        faults: what must be mended; empty for a clean data set.
        warnings: what should be looked at.
    """

    counts: Mapping[str, Mapping[tuple[str | None, str | None], int]]
    with_response: Mapping[str, int]
    faults: tuple[str, ...]
    warnings: tuple[str, ...]


def audit(splits: Mapping[str, Sequence[Row]], taxonomy: Taxonomy) -> Audit:
    """Check splits that belong to one data set.

    Args:
        splits: name, usually the file, -> rows.
        taxonomy: the categories that each split should cover.
    """
    counts = {name: Counter((r.label, r.category) for r in rows) for name, rows in splits.items()}
    replies = {name: sum(r.response is not None for r in rows) for name, rows in splits.items()}
    faults = _duplicates(splits) + _shared_between_splits(splits)
    warnings = _special_spellings(splits) + _gaps(counts, taxonomy)
    return Audit(counts, replies, tuple(faults), tuple(warnings))


def _normal(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


def _key(row: Row) -> str:
    """Prompts with equal keys are duplicates: case, punctuation and spacing do not count."""
    words = _normal(row.prompt_text)
    roles = ",".join(message["role"] for message in row.prompt)
    return f"{roles}|{words}" if words else f"{roles}|{row.prompt_text}"


def _duplicates(splits: Mapping[str, Sequence[Row]]) -> list[str]:
    seen: dict[str, tuple[str, Row]] = {}
    faults = []
    for name, rows in splits.items():
        for row in rows:
            first = seen.setdefault(_key(row), (name, row))
            if first[1] is row:
                continue
            conflict = (first[1].label, first[1].category) != (row.label, row.category)
            what = "the same prompt with another label" if conflict else "the same prompt"
            faults.append(f"{name}: row {row.id!r} has {what} as {first[1].id!r} in {first[0]}")
    return _shortened(faults)


def _shared_between_splits(splits: Mapping[str, Sequence[Row]]) -> list[str]:
    faults = []
    for (name, rows), (other, other_rows) in combinations(splits.items(), 2):
        groups = {row.group for row in rows} & {row.group for row in other_rows}
        faults += [f"group {group!r} is in both {name} and {other}" for group in sorted(groups)]
    return _shortened(faults)


def _special_spellings(splits: Mapping[str, Sequence[Row]]) -> list[str]:
    """Prompts may hold anything; a control token's spelling in one is worth a look."""
    found = [
        f"{name}: the prompt of row {row.id!r} spells a special token; it is encoded as plain text"
        for name, rows in splits.items()
        for row in rows
        if re.search(r"<\|[a-z0-9_:]+\|>", row.prompt_text)
    ]
    return _shortened(found)


def _gaps(
    counts: Mapping[str, Mapping[tuple[str | None, str | None], int]], taxonomy: Taxonomy
) -> list[str]:
    warnings = []
    for name, cells in counts.items():
        for category in taxonomy.category_ids:
            for label in ("refuse", RESPOND):
                if not cells.get((label, category)):
                    kind = "refuse" if label == "refuse" else "near-miss respond"
                    warnings.append(f"{name}: no {kind} rows of {category}")
        if not cells.get((RESPOND, None)):
            warnings.append(f"{name}: no ordinary respond rows (category null)")
    return warnings


def _shortened(messages: list[str]) -> list[str]:
    more = len(messages) - MAX_SHOWN
    return messages[:MAX_SHOWN] + ([f"... and {more} more like these"] if more > 0 else [])


def audit_report(found: Audit, taxonomy: Taxonomy) -> str:
    """Return the audit as text: a table of counts, then faults and warnings."""
    names = list(found.counts)
    width = max([12, *(len(name) + 2 for name in names)])
    head = f"{'label':10}{'category':16}" + "".join(f"{name:>{width}}" for name in names)
    lines = [head]
    cells: list[tuple[str | None, str | None]] = [
        *((label, c) for c in taxonomy.category_ids for label in ("refuse", RESPOND, None)),
        (RESPOND, None),
        (None, None),
    ]
    for label, category in cells:
        numbers = [found.counts[name].get((label, category), 0) for name in names]
        if not any(numbers):
            continue
        row = "".join(f"{number:>{width}}" for number in numbers)
        lines.append(f"{label or 'none':10}{category or '-':16}{row}")
    totals = "".join(f"{sum(found.counts[name].values()):>{width}}" for name in names)
    lines.append(f"{'all':26}{totals}")
    replies = "".join(f"{found.with_response[name]:>{width}}" for name in names)
    lines.append(f"{'with a reply':26}{replies}")
    lines += [f"FAULT    {fault}" for fault in found.faults]
    lines += [f"warning  {warning}" for warning in found.warnings]
    return "\n".join(lines)
