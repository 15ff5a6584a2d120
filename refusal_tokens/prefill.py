"""One prefill pass a prompt: the control logits and what is left of the vocabulary."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm
from transformers import PretrainedConfig

from refusal_tokens.checkpoint import Checkpoint, CheckpointInfo, info_summary, versions
from refusal_tokens.errors import InputError
from refusal_tokens.head import logit_transform
from refusal_tokens.partial import partial_file
from refusal_tokens.profiles import Profile, text_columns
from refusal_tokens.rows import Row, data_hash
from refusal_tokens.shared_prefix import hidden_states
from refusal_tokens.taxonomy import Taxonomy

BATCH_TOKENS = 4096


def profile_rows(
    checkpoint: Checkpoint,
    rows: Sequence[Row],
    *,
    temperatures: Sequence[float] = (1.0,),
    batch_tokens: int = BATCH_TOKENS,
    progress: bool = True,
    partial: Path | None = None,
) -> Profile:
    """Profile a model over labelled prompts.

    Under ``accelerate launch`` each process takes its share of the prompts, and each returns the
    whole profile.

    Args:
        checkpoint: the model.
        rows: the prompts.
        temperatures: for which to store the logsumexp of the rest of the vocabulary; 1 is
            always among them.
        batch_tokens: padded tokens in a batch, at most.
        progress: show a bar once it has run for two seconds.
        partial: a file to keep finished prompts in, so that an interrupted run goes on; removed at
            the end. A file of another model or of other prompts is not used.

    Raises:
        InputError: for no rows, a prompt beyond the model's context, or a temperature of 0 or less.
    """
    if not rows:
        raise InputError("no rows to profile")
    if any(not t > 0 for t in temperatures):
        raise InputError(f"temperatures must be above 0; found {list(temperatures)}")
    temperatures = sorted({1.0, *temperatures})
    prompts = [checkpoint.encoder.prompt_ids(row.prompt) for row in rows]
    check_lengths(context_limit(checkpoint.model.config), rows, prompts)
    weights = next(checkpoint.model.parameters())
    dtype = str(weights.dtype).removeprefix("torch.")
    metadata = profile_metadata(checkpoint.info, rows, dtype, weights.device.type)
    state = PartialState()
    mine = range(state.process_index, len(rows), state.num_processes)
    results = Results.empty(len(rows), len(checkpoint.info.taxonomy.tokens), temperatures)
    if partial is not None:
        partial = partial.with_name(f"{partial.name}.{state.process_index}")
    with partial_file(partial, [metadata, [row.id for row in rows], temperatures]) as kept:
        results.restore(kept.done)
        todo = [i for i in mine if not results.done[i]]
        with tqdm(
            total=len(mine), initial=len(mine) - len(todo), desc="Profiling", unit="prompt",
            delay=2, disable=not progress or not state.is_main_process,
        ) as bar:  # fmt: skip
            for batch in batches(checkpoint, prompts, todo, batch_tokens):
                logits = last_logits(checkpoint, [prompts[i] for i in batch])
                results.fill(checkpoint, batch, logits)
                kept.put(results.parts(batch))
                bar.update(len(batch))
        results.gather()
    return results.profile(rows, prompts, checkpoint.info.taxonomy, metadata)


def profile_metadata(
    info: CheckpointInfo, rows: Sequence[Row], dtype: str, device: str
) -> dict[str, Any]:
    """Return what a profile says of the model and of how it was run."""
    return {
        **info_summary(info),
        "data_hash": data_hash(rows),
        "dtype": dtype,
        "device": device,
        "versions": versions(),
    }


@dataclass
class Results:
    """What is read off each prompt, filled as batches come in.

    Attributes:
        temperatures: of ``rests``.
        control: (prompts, 1 + categories), float32.
        rest_max: (prompts,), float32.
        rests: (prompts, temperatures), float32.
        done: (prompts,), which are filled.
    """

    temperatures: Sequence[float]
    control: NDArray[np.float32]
    rest_max: NDArray[np.float32]
    rests: NDArray[np.float32]
    done: NDArray[np.bool_]

    @classmethod
    def empty(cls, prompts: int, tokens: int, temperatures: Sequence[float]) -> Results:
        """Return results of which none is filled."""
        return cls(
            temperatures,
            np.zeros((prompts, tokens), np.float32),
            np.zeros(prompts, np.float32),
            np.zeros((prompts, len(temperatures)), np.float32),
            np.zeros(prompts, bool),
        )

    def fill(self, checkpoint: Checkpoint, batch: Sequence[int], logits: Tensor) -> None:
        """Take one batch's logits, (batch, vocabulary), which are changed."""
        rows = np.array(batch)
        ids = torch.tensor(checkpoint.info.control_token_ids, device=logits.device)
        self.control[rows] = logits[:, ids].cpu().numpy()
        logits[:, ids] = -torch.inf
        self.rest_max[rows] = logits.max(dim=-1).values.cpu().numpy()
        for i, temperature in enumerate(self.temperatures):
            self.rests[rows, i] = torch.logsumexp(logits / temperature, dim=-1).cpu().numpy()
        self.done[rows] = True

    def _arrays(self) -> dict[str, NDArray[Any]]:
        return {name: getattr(self, name) for name in ("control", "rest_max", "rests")}

    def parts(self, batch: Sequence[int]) -> dict[str, Any]:
        """Return what was read off these prompts, as a partial file holds it."""
        arrays = self._arrays().values()
        return {str(i): [array[i].tolist() for array in arrays] for i in batch}

    def restore(self, parts: Mapping[str, Any]) -> None:
        """Take up what an interrupted run has filled."""
        for name, values in parts.items():
            for array, value in zip(self._arrays().values(), values, strict=True):
                array[int(name)] = value
            self.done[int(name)] = True

    def profile(
        self,
        rows: Sequence[Row],
        prompts: Sequence[Sequence[int]],
        taxonomy: Taxonomy,
        metadata: Mapping[str, Any],
    ) -> Profile:
        """Return the filled results as a profile."""
        return Profile(
            columns=text_columns(rows),
            control_logits=self.control,
            rest_max=self.rest_max,
            rest_logsumexp=dict(zip(self.temperatures, self.rests.T, strict=True)),
            prompt_tokens=np.array([len(prompt) for prompt in prompts], np.int64),
            taxonomy=taxonomy,
            metadata=metadata,
        )

    def gather(self) -> None:
        """Join what all processes have filled."""
        for array in (*self._arrays().values(), self.done):
            parts = gather_object([(np.flatnonzero(self.done), array[self.done])])
            for rows, values in parts:
                array[rows] = values
        assert self.done.all(), "prompts are missing from the profile"


def context_limit(config: PretrainedConfig) -> int | None:
    """Return how many tokens a model takes; None where its configuration does not say."""
    limit: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    return limit


def check_lengths(limit: int | None, rows: Sequence[Row], prompts: Sequence[Sequence[int]]) -> None:
    """Check that prompts fit the model.

    Raises:
        InputError: naming the first that does not.
    """
    for row, prompt in zip(rows, prompts, strict=True):
        if limit is not None and len(prompt) > limit:
            raise InputError(
                f"row {row.id!r}: the prompt has {len(prompt)} tokens; the model takes {limit}"
            )


def batches(
    checkpoint: Checkpoint, prompts: Sequence[Sequence[int]], todo: Sequence[int], batch_tokens: int
) -> Iterator[list[int]]:
    """Batches of the indices ``todo``: prompts that open with the template's head stay together."""
    head = checkpoint.encoder.template_head
    for with_head in (True, False):
        indices = [i for i in todo if (tuple(prompts[i][: len(head)]) == head) is with_head]
        yield from _even(indices, [len(p) for p in prompts], batch_tokens)


def _even(indices: Sequence[int], lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Indices in batches of similar length; at most ``batch_tokens`` once padded."""
    batch: list[int] = []
    for index in sorted(indices, key=lengths.__getitem__):
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
    hidden = hidden_states(model.base_model, ids, mask.long())
    last = hidden[torch.arange(len(prompts), device=device), lengths - 1]
    head = model.get_output_embeddings()
    logits = head(last).float()
    # The control logits decide: in float32 even where the model runs in bfloat16.
    control = torch.tensor(checkpoint.info.control_token_ids, device=device)
    logits[:, control] = last.float() @ head.weight[control].float().T + _bias(head, control)
    return logit_transform(model)(logits)


def _bias(head: torch.nn.Module, ids: Tensor) -> Tensor | float:
    bias = getattr(head, "bias", None)
    return 0.0 if bias is None else bias[ids].float()
