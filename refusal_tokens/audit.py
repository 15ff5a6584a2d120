"""Audit a labelled data set: counts, forms, duplicates, leaks, shortcuts and recurring wordings."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from refusal_tokens.concentration import Repeat, repeat_findings, repeats
from refusal_tokens.duplicates import duplicate_findings
from refusal_tokens.findings import Cell, Finding, Splits, cell_name
from refusal_tokens.forms import FormSpread, language, spread
from refusal_tokens.rows import Row
from refusal_tokens.safeguards import harmful_answers
from refusal_tokens.shortcuts import HIGH, Shortcut, find_shortcuts
from refusal_tokens.taxonomy import RESPOND, Taxonomy

# Control tokens, and what tokenizers of common model families take for a special token.
_SPECIAL = re.compile(
    r"<[|｜][\w:▁]+[|｜]>|</?s>|\[/?INST\]|<</?SYS>>"
    r"|<(?:start|end)_of_turn>|<(?:bos|eos|pad|unk)>",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Part:
    """The rows of one split that agree in all they are labelled with."""

    split: str
    label: str | None
    category: str | None
    subcategory: str | None
    source: str | None
    rows: int
    with_response: int


@dataclass(frozen=True)
class Audit:
    """What an audit found.

    Attributes:
        splits: the names of the splits.
        parts: the counts; every row is in exactly one part.
        forms: (label, category) -> how their prompts look, over all splits.
        shortcuts: one for each category of the taxonomy, over all splits.
        repeats: wordings that recur, over all splits.
        languages: language -> rows; an estimate, see ``forms.language``.
        findings: faults and warnings.
    """

    splits: tuple[str, ...]
    parts: tuple[Part, ...]
    forms: Mapping[Cell, FormSpread]
    shortcuts: tuple[Shortcut, ...]
    repeats: tuple[Repeat, ...]
    languages: Mapping[str, int]
    findings: tuple[Finding, ...]

    @property
    def faults(self) -> tuple[str, ...]:
        """What must be mended; empty for a clean data set."""
        return tuple(finding.message for finding in self.findings if finding.fault)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What should be looked at."""
        return tuple(finding.message for finding in self.findings if not finding.fault)

    @property
    def counts(self) -> dict[str, dict[Cell, int]]:
        """Split -> (label, category) -> rows."""
        counts: dict[str, Counter[Cell]] = {name: Counter() for name in self.splits}
        for part in self.parts:
            counts[part.split][part.label, part.category] += part.rows
        return {name: dict(cells) for name, cells in counts.items()}

    @property
    def with_response(self) -> dict[str, int]:
        """Split -> rows that carry a reply."""
        replies = dict.fromkeys(self.splits, 0)
        for part in self.parts:
            replies[part.split] += part.with_response
        return replies

    def record(self) -> dict[str, Any]:
        """Return the JSON form."""
        cells = self.counts.items()
        return {
            "counts": {name: {cell_name(c): n for c, n in own.items()} for name, own in cells},
            "parts": [asdict(part) for part in self.parts],
            "forms": {cell_name(cell): asdict(own) for cell, own in self.forms.items()},
            "shortcuts": [asdict(shortcut) for shortcut in self.shortcuts],
            "repeats": [asdict(repeat) for repeat in self.repeats],
            "languages": dict(self.languages),
            "faults": [asdict(finding) for finding in self.findings if finding.fault],
            "warnings": [asdict(finding) for finding in self.findings if not finding.fault],
        }


def audit(splits: Splits, taxonomy: Taxonomy) -> Audit:
    """Check splits that belong to one data set; the order of their rows does not matter.

    Args:
        splits: name, usually the file, -> rows.
        taxonomy: the categories that each split should cover.
    """
    splits = {name: sorted(rows, key=lambda row: row.id) for name, rows in splits.items()}
    rows = [row for own in splits.values() for row in own]
    # Rows that train the text alone open with a token that their prompt does not ask for.
    asking = [row for row in rows if row.train_control]
    parts = _parts(splits)
    shortcuts = tuple(find_shortcuts(asking, category) for category in taxonomy.category_ids)
    recurring = repeats(rows)
    findings = [
        *duplicate_findings(splits),
        *_special_spellings(splits),
        *_gaps(splits, parts, taxonomy),
        *_without_replies(parts),
        *_high_areas(shortcuts),
        *repeat_findings(recurring),
        *(Finding("harmful answer", text, fault=True) for text in harmful_answers(rows)),
    ]
    languages = Counter(language(row.prompt_text) for row in rows)
    return Audit(
        splits=tuple(splits),
        parts=parts,
        forms=_forms(asking),
        shortcuts=shortcuts,
        repeats=tuple(recurring),
        languages=dict(sorted(languages.items())),
        findings=tuple(findings),
    )


def _parts(splits: Splits) -> tuple[Part, ...]:
    parts = []
    for name, rows in splits.items():
        alike = defaultdict(list)
        for row in rows:
            alike[row.label, row.category, row.subcategory, row.source].append(row)
        for key in sorted(alike, key=lambda key: [(part is None, part or "") for part in key]):
            replies = sum(row.response is not None for row in alike[key])
            parts.append(Part(name, *key, rows=len(alike[key]), with_response=replies))
    return tuple(parts)


def _forms(rows: Sequence[Row]) -> dict[Cell, FormSpread]:
    cells: dict[Cell, list[Row]] = defaultdict(list)
    for row in rows:
        cells[row.label, row.category].append(row)
    return {cell: spread(cells[cell]) for cell in sorted(cells, key=cell_name)}


def _special_spellings(splits: Splits) -> Iterator[Finding]:
    """Texts may hold anything; a control token's spelling in one is worth a look."""
    for name, rows in splits.items():
        for row in rows:
            for what, text in (("prompt", row.prompt_text), ("reply", row.response or "")):
                if _SPECIAL.search(text):
                    yield Finding(
                        "special token",
                        f"{name}: the {what} of row {row.id!r} spells a special token; "
                        "it is encoded as plain text",
                    )


def _gaps(splits: Splits, parts: Sequence[Part], taxonomy: Taxonomy) -> Iterator[Finding]:
    held = {(part.split, part.label, part.category) for part in parts}
    for name, rows in splits.items():
        if rows and not any(row.train_control for row in rows):
            continue
        for category in taxonomy.category_ids:
            for label, kind in (("refuse", "refuse"), (RESPOND, "near-miss respond")):
                if (name, label, category) not in held:
                    yield Finding("gap", f"{name}: no {kind} rows of {category}")
        if (name, RESPOND, None) not in held:
            yield Finding("gap", f"{name}: no ordinary respond rows (category null)")


def _without_replies(parts: Sequence[Part]) -> Iterator[Finding]:
    """Yield the cells without a reply in any split: only their control token would be trained."""
    rows: Counter[Cell] = Counter()
    replies: Counter[Cell] = Counter()
    for part in parts:
        if part.label is not None:
            rows[part.label, part.category] += part.rows
            replies[part.label, part.category] += part.with_response
    if rows and not replies.total():
        yield Finding("no reply", "no row has a reply: only the control token would be trained")
        return
    for cell in sorted(rows, key=cell_name):
        if not replies[cell]:
            yield Finding("no reply", f"{cell_name(cell)}: none of {rows[cell]} rows has a reply")


def _high_areas(shortcuts: Sequence[Shortcut]) -> Iterator[Finding]:
    for found in shortcuts:
        for what, area in (("words", found.words), ("form", found.form)):
            if area is not None and area.value > HIGH:
                yield Finding(
                    "shortcut",
                    f"{found.category}: {what} alone tell refuse from near-miss rows, AUC "
                    f"{area.value:.3f} is over {HIGH}; a model may learn them in place of the "
                    "difference",
                )
