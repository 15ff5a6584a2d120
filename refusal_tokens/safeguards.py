"""A harmful request must never be answered in training: rows that would teach it are found here.

Rows whose control token is not trained teach a reply that goes against the prompt. A refusal of a
harmless request does no harm; an answer to a harmful one, under ``<|respond|>``, would.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from refusal_tokens.duplicates import exact_key
from refusal_tokens.errors import one_message
from refusal_tokens.rows import Row
from refusal_tokens.taxonomy import HARMFUL, RESPOND


def harmful_answers(rows: Iterable[Row], among: Iterable[Row] | None = None) -> list[str]:
    """Name the rows that reply under ``<|respond|>`` to a prompt that others ask to refuse.

    Prompts are the same where they agree word for word; case and punctuation do not count. Only the
    category ``safety`` is looked at: an incomplete question may well be answered.

    Args:
        rows: those that are trained or shipped together.
        among: where refusals are looked for; None: in ``rows``. Rows that a recipe leaves out still
            say that their prompt is harmful.
    """
    rows = list(rows)
    asked = {
        exact_key(row): row.id
        for row in (rows if among is None else among)
        if row.label == "refuse" and row.category == HARMFUL and row.train_control
    }
    return [
        f"row {row.id!r} answers the prompt that {asked[key]!r} refuses as {HARMFUL}; allowed: a "
        "refusal, or no reply"
        for row in rows
        if row.label == RESPOND and row.response is not None and (key := exact_key(row)) in asked
    ]


def spelled_tokens(rows: Iterable[Row], tokens: Iterable[str]) -> list[str]:
    """Return the ids of rows whose prompt spells one of the tokens; it is encoded as plain text."""
    tokens = tuple(tokens)
    return [row.id for row in rows if any(token in row.prompt_text for token in tokens)]


def check_answers(rows: Iterable[Row], among: Iterable[Row]) -> None:
    """Refuse rows that would train an answer to a harmful request; see ``harmful_answers``.

    Raises:
        InputError: naming up to twenty of them.
    """
    found = harmful_answers(rows, among)
    if found:
        raise one_message(found[:20], "the training rows")


def trained_prompts(train: Sequence[Row], measured: Sequence[Row]) -> list[str]:
    """Return the ids of measured rows whose prompt is trained on: their rates say too much."""
    seen = {row.prompt_sha256 for row in train}
    return [row.id for row in measured if row.prompt_sha256 in seen]
