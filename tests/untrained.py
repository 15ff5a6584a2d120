"""A checkpoint that was never trained: random weights, control tokens of any rank."""

from __future__ import annotations

from pathlib import Path

import torch
from conftest import make_model, make_tokenizer

from refusal_tokens.chat import ChatEncoder
from refusal_tokens.checkpoint import CheckpointInfo, save_checkpoint
from refusal_tokens.taxonomy import Taxonomy, default_taxonomy
from refusal_tokens.tokens import add_control_tokens


def save_untrained(
    folder: Path, *, tied: bool = True, spare: int = 0, taxonomy: Taxonomy | None = None
) -> CheckpointInfo:
    """Save one with ``spare`` embedding rows beyond the tokenizer's ids."""
    taxonomy = taxonomy or default_taxonomy()
    tokenizer = make_tokenizer()
    ids = add_control_tokens(tokenizer, taxonomy)
    tokenizer.add_tokens(["plainly_added"])
    model = make_model(len(tokenizer) + spare, tied=tied)
    with torch.no_grad():
        # Norms that are not all ones, so that a lost or swapped one shows.
        for name, values in model.named_parameters():
            if "norm" in name:
                values.uniform_(0.5, 1.5)
    info = CheckpointInfo(
        taxonomy=taxonomy,
        control_token_ids=tuple(ids),
        generation_prompt_ids=ChatEncoder(tokenizer).generation_prompt_ids,
        system_prompt=None,
        chat_template_kwargs={},
        base_model="untrained",
        recipe={},
        data={},
        versions={},
    )
    return save_checkpoint(folder, model, tokenizer, info)
