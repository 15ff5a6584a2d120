"""Replies of models without control tokens, judged by their text."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tqdm import tqdm

from refusal_tokens.base_model import fast_dtype, load_model, load_tokenizer, resolve
from refusal_tokens.chat import ChatEncoder
from refusal_tokens.judge import judge
from refusal_tokens.outcomes import Outcome
from refusal_tokens.rows import Row
from refusal_tokens.steering import left_padded, pad_id


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
    ends = model.generation_config.eos_token_id
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    stops = [*ends, encoder.reply_ids("x")[-1]]
    outcomes = []
    with tqdm(total=len(rows), desc="Generating", unit="reply", delay=2) as bar:
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            prompts = [encoder.prompt_ids(row.prompt) for row in batch]
            inputs = left_padded(prompts, pad_id(tokenizer), model.device)
            with torch.no_grad():
                output = model.generate(
                    **inputs,
                    max_new_tokens=max_new_tokens,
                    do_sample=False,
                    pad_token_id=pad_id(tokenizer),
                    eos_token_id=stops,
                )
            new = output[:, inputs["input_ids"].shape[1] :].tolist()
            texts = [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]
            outcomes += [_outcome(row, text) for row, text in zip(batch, texts, strict=True)]
            bar.update(len(batch))
    return outcomes


def _outcome(row: Row, text: str) -> Outcome:
    # The judge is told the category that a refusal of this prompt would have: the loose signs of
    # that category count, as they do for a reply opened by its token.
    verdict = judge(text, row.category)
    return Outcome(row.id, row.label, row.category, row.group, None, None, text, verdict)
