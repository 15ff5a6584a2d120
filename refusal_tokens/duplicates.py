"""Rows that say the same: exact and near duplicates, label conflicts, groups in two splits.

Exact duplicates agree word for word; case, punctuation and spacing do not count. Near duplicates
share at least ``NEAR`` of their word 3-grams (Jaccard similarity). MinHash with banding (Broder
1997; Leskovec, Rajaraman and Ullman, Mining of Massive Datasets, chapter 3) only proposes
candidates; the exact similarity decides.

Prompts under ``SHORT`` words have at most two 3-grams, so that one changed word would say nothing.
They are near duplicates only where they hold the same words in another order: "cats or dogs?" and
"dogs or cats?" are, "what is a quark" and "what is a quasar" are not. A script without spaces
between words counts a sentence as one word, so there only exact duplicates are found.

A minimal pair, one word apart with another label, belongs in one group: then it is meant, and never
parts across splits. The same pair in two groups is a conflict. A row without reply and a
counterfactual row of one group may share a prompt: they are trained as one example.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

from refusal_tokens.findings import Finding, Splits
from refusal_tokens.rows import Row

NEAR = 0.7
GRAM = 3
SHORT = 5
# A pair at similarity s becomes a candidate with probability 1 - (1 - s**2)**18: at 0.7 all but
# 5e-6 of them. At 0.2 it is every other pair: prompts rarely share even one 3-gram, so that a wide
# net is cheaper than more bands.
BANDS, BAND_ROWS = 18, 2

Grams = frozenset[tuple[str, ...]]


@dataclass(frozen=True)
class Pair:
    """Two rows whose prompts are duplicates, in the order of splits and ids.

    Attributes:
        similarity: shared word 3-grams over all word 3-grams, of the whole prompt or of its last
            turn, whichever is lower; 1.0 for exact duplicates.
        exact: whether they agree word for word.
    """

    first_split: str
    first: Row
    split: str
    row: Row
    similarity: float
    exact: bool

    @property
    def conflict(self) -> str | None:
        """What the two disagree in: ``label``, or else ``category``; None where both agree.

        A row that trains the text alone is no answer to which token its prompt asks for.
        """
        if not (self.first.train_control and self.row.train_control):
            return None
        if self.first.label != self.row.label:
            return "label"
        return "category" if self.first.category != self.row.category else None

    @property
    def marked(self) -> bool:
        """Whether both are of one group in one split: a pair that was written as one."""
        return self.first.group == self.row.group and self.first_split == self.split

    @property
    def joined(self) -> bool:
        """Whether both are trained as one example: the decision of one, the text of the other."""
        one, other = sorted((self.first, self.row), key=lambda row: row.train_control)
        return (
            self.exact
            and self.marked
            and not one.train_control
            and other.train_control
            and other.response is None
        )


@dataclass(frozen=True)
class _Sketch:
    split: str
    row: Row
    roles: tuple[str, ...]
    grams: Grams
    last_grams: Grams


def duplicate_findings(splits: Splits) -> list[Finding]:
    """Return the faults and warnings about rows that say the same, and groups in two splits."""
    exact, distinct = _exact_pairs(splits)
    pairs = [*exact, *near_pairs(distinct)]
    found = [finding for pair in pairs if (finding := _judge(pair)) is not None]
    return found + _shared_groups(splits)


def _judge(pair: Pair) -> Finding | None:
    """Near duplicates of one group in one split are meant where their labels differ."""
    if pair.joined:
        return None
    place = f"as {pair.first.id!r} in {pair.first_split}"
    if not pair.exact:
        place += f" ({pair.similarity:.2f} of their word {GRAM}-grams)"
    prompt = "the same prompt" if pair.exact else "nearly the same prompt"
    other = f" with another {pair.conflict}" if pair.conflict else ""
    message = f"{pair.split}: row {pair.row.id!r} has {prompt}{other} {place}"
    kind = f"{'exact' if pair.exact else 'near'} {'conflict' if pair.conflict else 'duplicate'}"
    if pair.exact or not pair.marked:
        return Finding(kind, message, fault=True)
    return None if pair.conflict else Finding(f"{kind} in a group", message)


def normal(text: str) -> str:
    """Return the words of a text, lower case, one space between them.

    >>> normal("What's  the TIME?")
    'what s the time'
    """
    return " ".join(re.findall(r"\w+", text.lower()))


def exact_key(row: Row) -> str:
    """Prompts with equal keys are exact duplicates: same roles, same words in the same order."""
    roles = ",".join(message["role"] for message in row.prompt)
    return f"{roles}|{normal(row.prompt_text) or row.prompt_text}"


def word_grams(text: str) -> Grams:
    """Return the word 3-grams of a text; a short text is one gram, its words in sorted order.

    >>> sorted(word_grams("Dogs or cats?")), len(word_grams("one two three four five"))
    ([('', 'cats', 'dogs', 'or')], 3)
    """
    words = normal(text).split() or [text]
    if len(words) < SHORT:
        return frozenset({("", *sorted(words))})
    return frozenset(tuple(words[i : i + GRAM]) for i in range(len(words) - GRAM + 1))


def jaccard(one: Grams, other: Grams) -> float:
    """Return the shared part of two sets of grams (Jaccard 1912)."""
    shared = len(one & other)
    return shared / (len(one) + len(other) - shared)


def _exact_pairs(splits: Splits) -> tuple[list[Pair], list[tuple[str, Row]]]:
    """Pair each copy with the first of its key; also return the first rows, one a key."""
    seen: dict[str, tuple[str, Row]] = {}
    pairs = []
    for name, rows in splits.items():
        for row in sorted(rows, key=lambda row: row.id):
            split, first = seen.setdefault(exact_key(row), (name, row))
            if first is not row:
                pairs.append(Pair(split, first, name, row, 1.0, exact=True))
    return pairs, list(seen.values())


def near_pairs(rows: Sequence[tuple[str, Row]]) -> Iterator[Pair]:
    """Yield the pairs of near duplicates among (split, row), each pair once.

    Roles must agree, and both the whole prompts and their last turns must be near: a long system
    prompt that many rows share does not make them duplicates.
    """
    sketches = [_sketch(split, row) for split, row in rows]
    for i, j in _candidates([sketch.grams for sketch in sketches]):
        one, other = sketches[i], sketches[j]
        if one.roles != other.roles:
            continue
        similarity = min(jaccard(one.grams, other.grams), jaccard(one.last_grams, other.last_grams))
        if similarity >= NEAR:
            yield Pair(one.split, one.row, other.split, other.row, similarity, exact=False)


def _sketch(split: str, row: Row) -> _Sketch:
    roles = tuple(message["role"] for message in row.prompt)
    whole = word_grams(row.prompt_text)
    last = whole if len(row.prompt) == 1 else word_grams(row.prompt[-1]["content"])
    return _Sketch(split, row, roles, whole, last)


def _candidates(grams: Sequence[Grams]) -> Iterator[tuple[int, int]]:
    """Yield i < j for all sets that may be near, by MinHash with locality-sensitive hashing."""
    from datasketch import MinHash, MinHashLSH

    index = MinHashLSH(num_perm=BANDS * BAND_ROWS, params=(BANDS, BAND_ROWS))
    items = ([" ".join(gram).encode() for gram in sorted(one)] for one in grams)
    for j, sketch in enumerate(MinHash.generator(items, num_perm=BANDS * BAND_ROWS, seed=1)):
        for i in sorted(index.query(sketch)):
            yield i, j
        index.insert(j, sketch)


def _shared_groups(splits: Splits) -> list[Finding]:
    groups = {name: {row.group for row in rows} for name, rows in splits.items()}
    return [
        Finding("group in two splits", f"group {group!r} is in both {name} and {other}", fault=True)
        for name, other in combinations(splits, 2)
        for group in sorted(groups[name] & groups[other])
    ]
