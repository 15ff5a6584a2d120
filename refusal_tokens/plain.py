"""Replies of models without control tokens, judged by their text."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from refusal_tokens.base_model import fast_dtype, load_model, load_tokenizer, resolve
from refusal_tokens.chat import ChatEncoder
from refusal_tokens.generation import Continuation, Job, Writer, pad_id, turn_ends, written
from refusal_tokens.judge import judge
from refusal_tokens.outcomes import Outcome
from refusal_tokens.partial import Partial
from refusal_tokens.rows import Row


def plain_outcomes(
    name: str,
    rows: Sequence[Row],
    *,
    system_prompt: str | None = None,
    max_new_tokens: int = 64,
    batch_size: int = 16,
) -> list[Outcome]:
    """Generate one greedy reply a row with a model that has no control tokens, and judge it.

    Args:
        name: bundled name, folder or Hub id.
        rows: with or without labels.
        system_prompt: put before conversations that have none; None leaves it to the template.
        max_new_tokens: of each reply.
        batch_size: replies at once.

    Raises:
        InputError: if the model cannot be loaded.
    """
    folder = resolve(name)
    tokenizer = load_tokenizer(folder)
    encoder = ChatEncoder(tokenizer, system_prompt)
    model = load_model(folder, dtype=fast_dtype()).eval()
    if torch.accelerator.is_available():
        model.to(torch.accelerator.current_accelerator())
    # An instruct model's own settings may say when to stop, not that a turn ends as its template
    # does.
    ends = (*turn_ends(model), encoder.reply_ids("x")[-1])
    writer = Writer(model, tokenizer, ends, pad_id(tokenizer), max_new_tokens)
    jobs = {row.id: Job(tuple(encoder.prompt_ids(row.prompt))) for row in rows}
    replies = written(writer, jobs, batch_size, Partial(None, None), "Generating")
    return [_outcome(row, reply) for row, reply in zip(rows, replies, strict=True)]


def _outcome(row: Row, reply: Continuation) -> Outcome:
    # The judge is told the category that a refusal of this prompt would have: the loose signs of
    # that category count, as they do for a reply opened by its token.
    return Outcome(
        row.id, row.label, row.category, row.group, None, None, reply.text,
        judge(reply.text, row.category), tokens=reply.tokens, ended=reply.ended,
    )  # fmt: skip
