"""Control tokens in a model: add them, start their rows, and train just those rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
from torch import Tensor, nn
from torch.nn import functional
from transformers import AddedToken, PreTrainedModel
from transformers import PreTrainedTokenizerFast as Tokenizer

from refusal_tokens.chat import control_ids
from refusal_tokens.errors import InputError
from refusal_tokens.head import logit_transform
from refusal_tokens.taxonomy import Taxonomy


def add_control_tokens(tokenizer: Tokenizer, taxonomy: Taxonomy) -> list[int]:
    """Add the K+1 control tokens as special tokens, keeping those that are there.

    Returns:
        Their ids, ``<|respond|>`` first.

    Raises:
        InputError: if the tokenizer already has control tokens of another taxonomy.
    """
    own = set(taxonomy.tokens)
    vocabulary = tokenizer.get_vocab()
    foreign = [t for t in vocabulary if t.startswith("<|refuse") and t not in own]
    if foreign:
        raise InputError(
            f"the model already has the refusal token {foreign[0]}, which is not in this taxonomy "
            f"({', '.join(taxonomy.tokens)}); start from a model without refusal tokens"
        )
    added = [AddedToken(token, special=True, normalized=False) for token in taxonomy.tokens]
    tokenizer.add_special_tokens(
        {"additional_special_tokens": added}, replace_extra_special_tokens=False
    )
    return control_ids(tokenizer, taxonomy.tokens)


def fit_vocabulary(model: PreTrainedModel, ids: Sequence[int]) -> None:
    """Grow the embedding so that every id has a row; spare rows are used and nothing shrinks."""
    rows = model.get_input_embeddings().weight.shape[0]
    needed = max(rows, max(ids) + 1)
    if needed > rows:
        model.resize_token_embeddings(needed, mean_resizing=False)


@torch.no_grad()
def start_rows(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    ids: Sequence[int],
    descriptions: Sequence[str],
    start: str = "description",
    seed: int = 0,
) -> None:
    """Give each control token's rows a start, at both ends of the model.

    Args:
        model: with a row for every id.
        tokenizer: of the model.
        ids: of the control tokens.
        descriptions: one a token.
        start: ``description``, the mean embedding of the description's tokens; ``mean``, the mean
            of all other rows, the same for every token, as a resized embedding has it but for a
            little noise; ``random``, normal with the mean and deviation of the other rows, column
            by column.
        seed: of the random start.
    """
    weights = [model.get_input_embeddings().weight]
    head = model.get_output_embeddings()
    if head is not None and head.weight is not weights[0]:
        weights.append(head.weight)
    for weight in weights:
        if start == "description":
            rows = _described(weight, tokenizer, descriptions)
        else:
            rows = _like_others(weight, ids, seed if start == "random" else None)
        weight[list(ids)] = rows.to(weight.dtype)


def _described(weight: Tensor, tokenizer: Tokenizer, descriptions: Sequence[str]) -> Tensor:
    encoded = [tokenizer.encode(text, add_special_tokens=False) for text in descriptions]
    return torch.stack([weight[words].float().mean(dim=0) for words in encoded])


def _like_others(weight: Tensor, ids: Sequence[int], seed: int | None) -> Tensor:
    """(tokens, width): the mean of the other rows, or draws around it where there is a seed."""
    others = torch.ones(len(weight), dtype=torch.bool, device=weight.device)
    others[list(ids)] = False
    known = weight[others].float()
    mean = known.mean(dim=0).expand(len(ids), -1)
    if seed is None:
        return mean
    # Drawn on the CPU: the same rows on every device.
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(seed))
    return mean + noise.to(mean.device) * known.std(dim=0)


@torch.no_grad()
def lift_rows(model: PreTrainedModel, ids: Sequence[int], prompts: Sequence[Sequence[int]]) -> None:
    """Shift the control tokens' output rows so that they hold most of the first position's mass.

    A fresh row scores a dozen nats below the words a reply usually opens with, and training spends
    its first steps on closing that gap instead of on telling prompts apart. The gap is closed
    here: all rows move by the same small vector along the mean hidden state at the decision
    position, so that their differences, which come from the descriptions, stay as they are.

    Args:
        model: with rows started.
        ids: of the control tokens.
        prompts: token ids up to the decision position; a few dozen are enough.
    """
    head = model.get_output_embeddings()
    device = head.weight.device
    states = [
        model.base_model(torch.tensor([list(prompt)], device=device)).last_hidden_state[0, -1]
        for prompt in prompts
    ]
    hidden = torch.stack(states).float()
    bias = None if head.bias is None else head.bias.float()
    raw = functional.linear(hidden, head.weight.float(), bias)
    control = raw[:, list(ids)].mean()
    transform = logit_transform(model)
    logits = transform(raw)
    logits[:, list(ids)] = -torch.inf
    # Together they should score log(9) above the rest: nine tenths of the mass.
    wanted = torch.logsumexp(logits, dim=1).mean() + math.log(9 / len(ids))
    mean = hidden.mean(dim=0)
    shift = (transform.inverse(wanted) - control) * mean / (mean @ mean)
    for token in ids:
        head.weight[token] = (head.weight[token].float() + shift).to(head.weight.dtype)


def trainable_token_indices(model: PreTrainedModel, ids: Sequence[int]) -> dict[str, list[int]]:
    """Return PEFT's ``trainable_token_indices`` for the rows of both ends of a model."""
    modules = {module: name for name, module in model.named_modules()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    indices = {modules[embedding].rpartition(".")[2]: list(ids)}
    # PEFT wraps a tied head itself; an untied one must be named.
    if head is not None and head.weight is not embedding.weight:
        indices[modules[head].rpartition(".")[2]] = list(ids)
    return indices


class SparseTokensLayer(TrainableTokensLayer):  # type: ignore[misc]
    """PEFT's layer for training single token rows, without touching the rest of the matrix.

    PEFT copies the whole matrix at each forward and builds a dense gradient of it at each backward.
    Here the frozen matrix does the ordinary work and the trained rows replace their part of the
    result: the values are the same, and the gradient reaches the rows alone. Parameters and file
    format stay PEFT's.
    """

    def forward_adapters(self, x: Tensor, active_adapters: list[str], *args: Any) -> Tensor:
        """Embed ids, (batch, tokens), or project hidden states, (..., width), to logits."""
        result: Tensor = self.base_layer(x, *args)
        if self.disable_adapters or self.merged or not active_adapters:
            return result
        name = active_adapters[0]
        rows: Tensor = self.trainable_tokens_delta[name]
        ids = torch.tensor(self.token_indices[name], device=x.device)
        if isinstance(self.base_layer, nn.Embedding):
            return self._replace_embeddings(x, result, rows, ids)
        # Control logits decide, so they are kept in float32: a bfloat16 logit near 20 is 0.1 wide.
        with torch.autocast(x.device.type, enabled=False):
            logits = functional.linear(x.float(), rows.float())
            bias = getattr(self.base_layer, "bias", None)
            if bias is not None:
                logits = logits + bias[ids]
            return result.to(torch.float32, copy=True).index_copy_(-1, ids, logits)

    def _replace_embeddings(self, x: Tensor, result: Tensor, rows: Tensor, ids: Tensor) -> Tensor:
        scale = self._get_embed_scale()
        if scale is not None:
            rows = rows * scale.to(rows.dtype)
        matches = x.unsqueeze(-1) == ids
        own = functional.embedding(matches.int().argmax(dim=-1), rows).to(result.dtype)
        return torch.where(matches.any(dim=-1, keepdim=True), own, result)


def make_rows_sparse(model: nn.Module) -> None:
    """Give this model's trained token rows the sparse forward, and hold them in float32.

    TRL casts trainable parameters to bfloat16 when the base is quantised; small updates to token
    rows would round away.
    """
    for module in model.modules():
        if type(module) is TrainableTokensLayer:
            # The layer keeps its parameters and hooks; only how it computes changes.
            module.__class__ = SparseTokensLayer
            for name, parameter in module.named_parameters():
                if "trainable_tokens_delta" in name:
                    parameter.data = parameter.data.float()
