"""Faults of a text that show without reading it: nothing said, the same said again, cut off."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from refusal_tokens.outcomes import Outcome, distinct
from refusal_tokens.rates import Rate, rate

WORDS, TIMES = 4, 3


def is_empty(text: str) -> bool:
    """Whether a text holds no word."""
    return re.search(r"\w", text) is None


def is_repeated(text: str) -> bool:
    """Whether some run of four words comes three times or more.

    >>> is_repeated("I like tea. " * 2), is_repeated("I really like tea. " * 3)
    (False, True)
    """
    words = re.findall(r"\w+", text.lower())
    runs = Counter(tuple(words[i : i + WORDS]) for i in range(len(words) - WORDS + 1))
    return max(runs.values(), default=0) >= TIMES


@dataclass(frozen=True)
class Fluency:
    """Faults of the replies that one control token opened.

    Attributes:
        token: that opened them.
        truncated: cut off by the limit on new tokens; of replies whose end is known.
        mean_tokens: their mean length; None where no length is known.
    """

    token: str
    empty: Rate
    repeated: Rate
    truncated: Rate
    mean_tokens: float | None


def fluency(outcomes: Iterable[Outcome]) -> list[Fluency]:
    """Return the faults by opening token."""
    by_token: dict[str, list[Outcome]] = {}
    for outcome in distinct(outcomes):
        if outcome.decision is not None:
            by_token.setdefault(outcome.decision, []).append(outcome)
    return [_of_token(token, found) for token, found in sorted(by_token.items())]


def _of_token(token: str, replies: list[Outcome]) -> Fluency:
    known = [reply for reply in replies if reply.ended is not None]
    lengths = [reply.tokens for reply in replies if reply.tokens is not None]
    return Fluency(
        token=token,
        empty=rate(sum(is_empty(reply.text) for reply in replies), len(replies)),
        repeated=rate(sum(is_repeated(reply.text) for reply in replies), len(replies)),
        truncated=rate(sum(not reply.ended for reply in known), len(known)),
        mean_tokens=sum(lengths) / len(lengths) if lengths else None,
    )
