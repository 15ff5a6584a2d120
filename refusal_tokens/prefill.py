"""One prefill pass a prompt: the control logits and what is left of the vocabulary."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from refusal_tokens.checkpoint import Checkpoint, info_summary, versions
from refusal_tokens.errors import InputError
from refusal_tokens.head import logit_transform
from refusal_tokens.profiles import Profile, text_columns
from refusal_tokens.rows import Row, data_hash

BATCH_TOKENS = 4096


def profile_rows(
    checkpoint: Checkpoint,
    rows: Sequence[Row],
    *,
    temperatures: Sequence[float] = (1.0,),
    batch_tokens: int = BATCH_TOKENS,
    progress: bool = True,
) -> Profile:
    """Profile a model over labelled prompts.

    Args:
        checkpoint: the model.
        rows: the prompts.
        temperatures: for which to store the logsumexp of the rest of the vocabulary; 1 is
            always among them.
        batch_tokens: padded tokens in a batch, at most.
        progress: show a bar once it has run for two seconds.

    Raises:
        InputError: for no rows, a prompt beyond the model's context, or a temperature of 0 or less.
    """
    if not rows:
        raise InputError("no rows to profile")
    if any(not t > 0 for t in temperatures):
        raise InputError(f"temperatures must be above 0; found {list(temperatures)}")
    temperatures = sorted({1.0, *temperatures})
    encoder = checkpoint.encoder
    prompts = [encoder.prompt_ids(row.prompt) for row in rows]
    _check_lengths(checkpoint, rows, prompts)
    width = len(checkpoint.info.taxonomy.tokens)
    control = np.zeros((len(rows), width), np.float32)
    rest_max = np.zeros(len(rows), np.float32)
    rest = {t: np.zeros(len(rows), np.float32) for t in temperatures}
    with tqdm(
        total=len(rows), desc="Profiling", unit="prompt", delay=2, disable=not progress
    ) as bar:
        for batch in _batches([len(prompt) for prompt in prompts], batch_tokens):
            logits = last_logits(checkpoint, [prompts[i] for i in batch])
            ids = torch.tensor(checkpoint.info.control_token_ids, device=logits.device)
            control[batch] = logits[:, ids].cpu().numpy()
            logits[:, ids] = -torch.inf
            rest_max[batch] = logits.max(dim=-1).values.cpu().numpy()
            for t in temperatures:
                rest[t][batch] = torch.logsumexp(logits / t, dim=-1).cpu().numpy()
            bar.update(len(batch))
    weights = next(checkpoint.model.parameters())
    metadata = {
        **info_summary(checkpoint.info),
        "data_hash": data_hash(rows),
        "dtype": str(weights.dtype).removeprefix("torch."),
        "device": weights.device.type,
        "versions": versions(),
    }
    return Profile(
        columns=text_columns(rows),
        control_logits=control,
        rest_max=rest_max,
        rest_logsumexp=rest,
        prompt_tokens=np.array([len(prompt) for prompt in prompts], np.int64),
        taxonomy=checkpoint.info.taxonomy,
        metadata=metadata,
    )


def _check_lengths(
    checkpoint: Checkpoint, rows: Sequence[Row], prompts: Sequence[Sequence[int]]
) -> None:
    limit = getattr(checkpoint.model.config.get_text_config(), "max_position_embeddings", None)
    for row, prompt in zip(rows, prompts, strict=True):
        if limit is not None and len(prompt) > limit:
            raise InputError(
                f"row {row.id!r}: the prompt has {len(prompt)} tokens; the model takes {limit}"
            )


def _batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Indices in batches of similar length; at most ``batch_tokens`` once padded."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        # Sorted ascending: this prompt is the longest of its batch.
        if batch and (len(batch) + 1) * lengths[index] > batch_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


@torch.no_grad()
def last_logits(checkpoint: Checkpoint, prompts: Sequence[Sequence[int]]) -> Tensor:
    """Return the logits at the decision position, (prompts, vocabulary), float32, nats.

    Only the last position of each prompt is projected to the vocabulary.
    """
    model = checkpoint.model
    device = next(model.parameters()).device
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    longest = int(lengths.max())
    ids = torch.tensor([[*p, *[0] * (longest - len(p))] for p in prompts], device=device)
    mask = torch.arange(longest, device=device) < lengths[:, None]
    hidden = model.base_model(input_ids=ids, attention_mask=mask.long(), use_cache=False)
    last = hidden.last_hidden_state[torch.arange(len(prompts), device=device), lengths - 1]
    head = model.get_output_embeddings()
    logits = head(last).float()
    # The control logits decide: in float32 even where the model runs in bfloat16.
    control = torch.tensor(checkpoint.info.control_token_ids, device=device)
    logits[:, control] = last.float() @ head.weight[control].float().T + _bias(head, control)
    return logit_transform(model)(logits)


def _bias(head: torch.nn.Module, ids: Tensor) -> Tensor | float:
    bias = getattr(head, "bias", None)
    return 0.0 if bias is None else bias[ids].float()
