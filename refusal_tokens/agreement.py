"""Judges against labels given by hand: precision, recall, specificity and kappa."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refusal_tokens.arrays import Mask
from refusal_tokens.errors import InputError, unknown
from refusal_tokens.files import read_text, unique_keys
from refusal_tokens.judge import VERDICTS, Case, Verdict, conversation
from refusal_tokens.rates import Rate, rate
from refusal_tokens.resampling import Measure, group_counts, measure
from refusal_tokens.taxonomy import RESPOND_TOKEN

REQUIRED = ("id", "prompt", "category", "forced", "decision", "text", "verdict", "reason_fits")
DRAWS = 2000


@dataclass(frozen=True)
class Label:
    """One generated reply and what a reader says it does.

    Attributes:
        case: what judges see.
        forced: the control token that was forced; None where the model decided.
        decision: the control token that opened the reply.
        verdict: the reader's.
        reason_fits: whether a refusal's reason fits the category of its token; None for answers and
            undecided replies.
    """

    id: str
    case: Case
    forced: str | None
    decision: str
    verdict: Verdict
    reason_fits: bool | None


def expected_of(decision: str | None) -> str | None:
    """Return the category of a refusal token; None for ``<|respond|>`` and where there is none.

    >>> expected_of("<|refuse:safety|>")
    'safety'
    """
    if decision is None or decision == RESPOND_TOKEN:
        return None
    return decision.removeprefix("<|refuse").removesuffix("|>").removeprefix(":") or None


def read_labels(path: str | Path) -> tuple[Label, ...]:
    """Read labelled replies from JSONL.

    Raises:
        InputError: naming the line, for a missing key, an unknown verdict or an id twice; and where
            there is no label.
    """
    labels: list[Label] = []
    seen: set[str] = set()
    for number, line in enumerate(read_text(path).splitlines(), 1):
        where = f"{path}, line {number}"
        if not line.strip():
            continue
        label = _label(line, where)
        if label.id in seen:
            raise InputError(f"{where}: id {label.id!r} twice")
        seen.add(label.id)
        labels.append(label)
    if not labels:
        raise InputError(f"{path}: no labels")
    return tuple(labels)


def _label(line: str, where: str) -> Label:
    try:
        record = json.loads(line, object_pairs_hook=unique_keys(where))
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not JSON ({error.msg})") from None
    if not isinstance(record, dict):
        raise InputError(f"{where}: found {type(record).__name__}; allowed: an object")
    for key in REQUIRED:
        if key not in record:
            raise InputError(f"{where}: key {key!r} is missing")
    if record["verdict"] not in VERDICTS:
        raise InputError(f"{where}: {unknown('verdict', record['verdict'], VERDICTS)}")
    for key in ("id", "text", "decision"):
        if not isinstance(record[key], str):
            raise InputError(f"{where}: {key} must be a text; found {record[key]!r}")
    if record["reason_fits"] not in (True, False, None):
        raise InputError(f"{where}: reason_fits must be true, false or null")
    case = Case(
        _prompt(record["prompt"], where),
        record["text"],
        expected_of(record["decision"]),
        record["category"],
    )
    return Label(
        record["id"],
        case,
        record["forced"],
        record["decision"],
        record["verdict"],
        record["reason_fits"],
    )


def _prompt(prompt: Any, where: str) -> str:
    if isinstance(prompt, str):
        return prompt
    try:
        return conversation(prompt)
    except (KeyError, TypeError, IndexError):
        raise InputError(f"{where}: prompt must be a text or a list of messages") from None


@dataclass(frozen=True)
class Agreement:
    """One judge against the labels, ``refused`` against ``partly`` and ``answered`` together.

    Replies that the reader or the judge leaves undecided are counted apart and enter no rate.

    Attributes:
        judge: its name.
        n: replies that both decide.
        label_undecided: replies the reader could not decide, whatever the judge says.
        judge_undecided: of the others, those the judge leaves undecided.
        precision: of those the judge calls refused, how many the reader does.
        recall: of those the reader calls refused, how many the judge does: its sensitivity.
        specificity: of those the reader calls partly or answered, how many the judge does not call
            refused.
        kappa: Cohen 1960, with a bootstrap interval; None where reader or judge knows one verdict
            only.
        counts: reader's verdict -> judge's verdict -> replies, all of them.
    """

    judge: str
    n: int
    label_undecided: int
    judge_undecided: int
    precision: Rate
    recall: Rate
    specificity: Rate
    kappa: Measure | None
    counts: dict[Verdict, dict[Verdict, int]]


def agreement(
    judge: str, labels: Sequence[Verdict], verdicts: Sequence[Verdict], seed: int = 0
) -> Agreement:
    """Compare a judge's verdicts with the reader's, reply by reply.

    Args:
        seed: of the bootstrap draws.
    """
    pairs = list(zip(labels, verdicts, strict=True))
    decided = [(a, b) for a, b in pairs if "undecided" not in (a, b)]
    truth = np.array([a == "refused" for a, _ in decided], bool)
    found = np.array([b == "refused" for _, b in decided], bool)
    both = int((truth & found).sum())
    neither = int((~truth & ~found).sum())
    counts = {a: {b: pairs.count((a, b)) for b in VERDICTS} for a in VERDICTS}
    return Agreement(
        judge,
        len(decided),
        sum(a == "undecided" for a, _ in pairs),
        sum(a != "undecided" and b == "undecided" for a, b in pairs),
        rate(both, int(found.sum())),
        rate(both, int(truth.sum())),
        rate(neither, int((~truth).sum())),
        _kappa_measure(truth, found, seed),
        counts,
    )


def _kappa_measure(truth: Mask, found: Mask, seed: int) -> Measure | None:
    if truth.all() or found.all() or not truth.any() or not found.any():
        return None
    cells = np.stack([truth & found, truth & ~found, ~truth & found, ~truth & ~found], axis=1)
    draws = [kappa(w @ cells.astype(float)) for w in group_counts(len(truth), DRAWS, seed)]
    return measure(float(kappa(cells.sum(axis=0)[None].astype(float))[0]), np.concatenate(draws))


def kappa(cells: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return Cohen's kappa of 2 x 2 tables, NaN where chance alone agrees always.

    Args:
        cells: (tables, 4), counts of: both, the first only, the second only, neither.
    """
    shares = cells / cells.sum(axis=1, keepdims=True)
    both, first, second, neither = shares.T
    chance = (both + first) * (both + second) + (second + neither) * (first + neither)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(np.where(chance < 1, (both + neither - chance) / (1 - chance), np.nan))


def reasons(labels: Sequence[Label]) -> dict[str, Rate]:
    """Return, by refusal token, the share of refusals whose reason fits the token's category."""
    by_token: dict[str, list[bool]] = {}
    for label in labels:
        if label.reason_fits is not None:
            by_token.setdefault(label.decision, []).append(label.reason_fits)
    return {token: rate(sum(found), len(found)) for token, found in sorted(by_token.items())}
