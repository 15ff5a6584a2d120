"""Hidden states of a batch, its common first tokens run once.

A chat template opens every prompt with the same tokens: its header, and often a system prompt that
is longer than the user's request. Their keys and values are the same in every row, so they are
computed for one row and lent to the others; gradients flow back through the loan and add up.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

# Below this, a second pass through the layers costs more than it saves.
MIN_TOKENS = 8


def hidden_states(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Return the last hidden states, (batch, tokens, width), as one plain forward would.

    Args:
        model: without its head.
        input_ids: (batch, tokens), padded on the right.
        attention_mask: (batch, tokens), 1 on tokens.
    """
    shared = _shared_tokens(input_ids, attention_mask)
    if shared < MIN_TOKENS or not can_share(model):
        plain: Tensor = model(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=False
        ).last_hidden_state
        return plain
    rows = len(input_ids)
    cache = DynamicCache()
    first = model(input_ids=input_ids[:1, :shared], past_key_values=cache, use_cache=True)
    for layer in cache.layers:
        layer.keys = layer.keys.expand(rows, -1, -1, -1)
        layer.values = layer.values.expand(rows, -1, -1, -1)
    rest = model(
        input_ids=input_ids[:, shared:],
        attention_mask=attention_mask,
        past_key_values=cache,
        use_cache=True,
    )
    lent = first.last_hidden_state.expand(rows, -1, -1)
    return torch.cat([lent, rest.last_hidden_state], dim=1)


def _shared_tokens(input_ids: Tensor, attention_mask: Tensor) -> int:
    """How many first columns are the same in every row; at least one column is left over."""
    if len(input_ids) == 1:
        return 0
    same = (input_ids == input_ids[:1]).all(dim=0) & (attention_mask == 1).all(dim=0)
    return min(int(same.long().cumprod(dim=0).sum()), input_ids.shape[1] - 1)


def can_share(model: PreTrainedModel) -> bool:
    """Whether the model keeps keys and values of every token, and nothing else, between passes."""
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or ["full_attention"]
    # Recomputing layers in the backward pass cannot use a cache.
    recomputes = model.training and model.is_gradient_checkpointing
    stateful = getattr(model, "_is_stateful", False) or config.is_encoder_decoder
    return set(kinds) == {"full_attention"} and not recomputes and not stateful
