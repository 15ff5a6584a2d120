"""An evaluation as one screen of text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from refusal_tokens.evaluation import Evaluation

if TYPE_CHECKING:
    from refusal_tokens.helpfulness import Helpfulness, Replies


def evaluation_table(found: Evaluation, limit: int, helpfulness: Helpfulness | None) -> str:
    """Return the screen that ends ``evaluate``.

    Args:
        found: what the outcomes say.
        limit: on new tokens; names the column of replies that were cut off.
        helpfulness: against the base model, where that was measured.
    """
    lines = [*_kinds(found), "", *_adherence(found), "", *_fluency(found, limit)]
    if helpfulness is not None:
        lines += ["", *_helpfulness(helpfulness, limit)]
    return "\n".join(lines)


def _kinds(found: Evaluation) -> Iterator[str]:
    yield "The model's own decisions, with 95% intervals"
    yield f"{'':24}{'refused by token':27}{'refused by text':27}token and text agree"
    for kind in found.kinds:
        apart = [f"{kind.partly} partly"] * (kind.partly > 0)
        apart += [f"{kind.undecided} undecided"] * (kind.undecided > 0)
        rates = f"{kind.by_token!s:27}{kind.by_text!s:27}{kind.agreement}"
        yield f"{kind.kind:24}{rates}  {', '.join(apart)}".rstrip()
    if found.missing:
        yield f"No prompts: {', '.join(found.missing)}"


def _adherence(found: Evaluation) -> Iterator[str]:
    if not found.adherence:
        yield "No control token was forced"
        return
    yield "Text that obeys a forced token, where the model"
    yield f"{'':26}{'prefers this token':27}{'prefers another':27}on prompts"
    for entry in found.adherence:
        rates = f"{entry.preferred!s:27}{entry.not_preferred!s:27}"
        apart = f", {entry.undecided} undecided" if entry.undecided else ""
        yield f"{entry.token:26}{rates}{entry.prompts}{apart}"


def _fluency(found: Evaluation, limit: int) -> Iterator[str]:
    yield "Replies after each token"
    yield f"{'':26}{'empty':27}{'repeats itself':27}{f'cut off at {limit} tokens':27}mean tokens"
    for entry in found.fluency:
        rates = f"{entry.empty!s:27}{entry.repeated!s:27}{entry.truncated!s:27}"
        yield f"{entry.token:26}{rates}" + (
            "" if entry.mean_tokens is None else f"{entry.mean_tokens:.1f}"
        )


def _helpfulness(found: Helpfulness, limit: int) -> Iterator[str]:
    yield f"Helpfulness against the base model {found.base}"
    for entry in found.perplexity:
        n = f"n={entry.answers} answers, {entry.tokens} tokens"
        levels = f"{entry.base:.2f} -> {entry.tuned:.2f}"
        yield f"perplexity, {entry.kind:12}{levels}, tuned over base {entry.ratio}  {n}"
    if not found.perplexity:
        yield "perplexity: no respond rows with a reference answer"
    both = {"base": found.base_replies, "tuned": found.tuned_replies}
    for name, replies in both.items():
        if replies is not None:
            yield f"ordinary prompts, {name:6}{_replies(replies, limit)}"
    if found.base_replies is None:
        yield "ordinary prompts: none in the data"


def _replies(found: Replies, limit: int) -> str:
    length = f"{found.tokens.value:.1f} [{found.tokens.low:.1f}, {found.tokens.high:.1f}]"
    return f"refused by text {found.refused}; {length} tokens; cut off at {limit} {found.truncated}"
