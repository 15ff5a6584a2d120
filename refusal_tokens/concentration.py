"""Wordings that recur: openings of prompts and replies, and replies made from one template."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from refusal_tokens.findings import Cell, Finding, cell_name
from refusal_tokens.forms import words
from refusal_tokens.rows import Row

SHARE = 0.01
# In a small cell one row is above the share; fewer rows than this are no pattern.
LEAST = 5
PROMPT_WORDS, REPLY_WORDS = 4, 3
SHINGLE = 5
SLOT = "_"
SHOWN = 5


@dataclass(frozen=True)
class Repeat:
    """A wording that more than ``SHARE`` of the texts of one kind share.

    Attributes:
        kind: ``prompt opening``, ``reply opening`` or ``reply template``.
        where: label/category.
        text: the words; in a template ``_`` stands for a rare word.
        rows: how many texts hold it.
        of: how many texts there are.
    """

    kind: str
    where: str
    text: str
    rows: int
    of: int


def repeats(rows: Sequence[Row]) -> list[Repeat]:
    """Return the wordings that recur, by kind and place, most frequent first."""
    cells: dict[Cell, list[Row]] = defaultdict(list)
    for row in rows:
        cells[row.label, row.category].append(row)
    found: list[Repeat] = []
    for cell in sorted(cells, key=cell_name):
        prompts = [row.prompt[-1]["content"] for row in cells[cell]]
        replies = [row.response for row in cells[cell] if row.response is not None]
        found += _openings("prompt opening", cell_name(cell), prompts, PROMPT_WORDS)
        found += _openings("reply opening", cell_name(cell), replies, REPLY_WORDS)
        for text, count in reply_templates(replies):
            found.append(Repeat("reply template", cell_name(cell), text, count, len(replies)))
    return sorted(found, key=lambda repeat: repeat.kind)


def repeat_findings(found: Iterable[Repeat]) -> list[Finding]:
    """Return one warning for each kind and place, with the most frequent wordings."""
    places: dict[tuple[str, str], list[Repeat]] = defaultdict(list)
    for repeat in found:
        places[repeat.kind, repeat.where].append(repeat)
    return [
        Finding(kind, f"{where}: {_listed(own)}, each above {SHARE:.0%} of {own[0].of}")
        for (kind, where), own in places.items()
    ]


def _listed(own: Sequence[Repeat]) -> str:
    shown = ", ".join(f"'{repeat.text}' {repeat.rows}" for repeat in own[:SHOWN])
    return shown + (f" and {len(own) - SHOWN} more" if len(own) > SHOWN else "")


def _openings(kind: str, where: str, texts: Sequence[str], length: int) -> Iterator[Repeat]:
    """Yield the first words that recur; texts of fewer words have no opening."""
    openings = [words(text)[:length] for text in texts]
    counts = Counter(" ".join(opening) for opening in openings if len(opening) == length)
    for text, count in _above(counts, len(texts)):
        yield Repeat(kind, where, text, count, len(texts))


def _above(counts: Counter[str], of: int) -> list[tuple[str, int]]:
    """Return what is above the threshold, most frequent first, then by text."""
    kept = [(text, n) for text, n in counts.items() if n >= LEAST and n > SHARE * of]
    return sorted(kept, key=lambda item: (-item[1], item[0]))


def reply_templates(replies: Sequence[str]) -> list[tuple[str, int]]:
    """Return the templates that recur among replies of one kind, with their counts.

    A word in at most ``SHARE`` of the replies becomes a slot. A template is a run of ``SHINGLE``
    words that recurs and holds one slot at most. The most frequent template takes its replies out
    before the next is sought, so that overlapping runs of one sentence do not count it twice.
    """
    texts = [words(reply) for reply in replies]
    known = Counter(word for text in texts for word in set(text))
    rare = max(LEAST - 1, SHARE * len(replies))
    runs = [_runs([word if known[word] > rare else SLOT for word in text]) for text in texts]
    common = {text for text, _ in _above(Counter(run for own in runs for run in own), len(texts))}
    left = [own & common for own in runs]
    found = []
    while best := _above(Counter(run for own in left for run in own), len(texts)):
        text, count = best[0]
        found.append((text, count))
        left = [own for own in left if text not in own]
    return found


def _runs(text: Sequence[str]) -> set[str]:
    runs = (text[i : i + SHINGLE] for i in range(len(text) - SHINGLE + 1))
    return {" ".join(run) for run in runs if run.count(SLOT) <= 1}
