"""Greedy replies in batches: a prompt is run once, however many openings its replies continue."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel
from transformers import PreTrainedTokenizerFast as Tokenizer
from transformers.cache_utils import DynamicCache

from refusal_tokens.partial import Partial
from refusal_tokens.shared_prefix import can_share


@dataclass(frozen=True)
class Job:
    """One reply to generate.

    Attributes:
        prompt: token ids up to the decision position.
        opening: ids that the reply is made to open with: a control token, or nothing. Equally
            many in all jobs of a batch.
    """

    prompt: tuple[int, ...]
    opening: tuple[int, ...] = ()


@dataclass(frozen=True)
class Continuation:
    """What followed the opening.

    Attributes:
        text: without special tokens.
        tokens: with the end of the turn, without the opening.
        ended: whether the turn ended; False where ``max_new_tokens`` cut it off.
    """

    text: str
    tokens: int
    ended: bool


@dataclass(frozen=True)
class Writer:
    """A model that continues openings.

    Attributes:
        ends: ids that end a turn.
        pad_id: fills batches up.
        processor: applied to every logit, as by ``generate``; None for none.
    """

    model: PreTrainedModel
    tokenizer: Tokenizer
    ends: tuple[int, ...]
    pad_id: int
    max_new_tokens: int
    processor: LogitsProcessor | None = None

    @torch.no_grad()
    def write(self, jobs: Sequence[Job]) -> list[Continuation]:
        """Continue a batch of openings greedily; it stops once every reply has ended."""
        prompts = list(dict.fromkeys(job.prompt for job in jobs))
        place = {prompt: i for i, prompt in enumerate(prompts)}
        device = self.model.device
        ids, mask = left_padded(prompts, self.pad_id, device)
        of_prompt = torch.tensor([place[job.prompt] for job in jobs], device=device)
        openings = torch.tensor([job.opening for job in jobs], dtype=torch.long, device=device)
        settings: dict[str, Any] = {}
        if len(prompts) < len(jobs) and can_share(self.model):
            settings["past_key_values"] = self._run_once(ids, mask, of_prompt)
        output = self.model.generate(
            input_ids=torch.cat([ids[of_prompt], openings], dim=1),
            attention_mask=torch.cat([mask[of_prompt], torch.ones_like(openings)], dim=1),
            logits_processor=LogitsProcessorList([self.processor] if self.processor else []),
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            eos_token_id=list(self.ends) or None,
            pad_token_id=self.pad_id,
            **settings,
        )
        width = ids.shape[1] + openings.shape[1]
        return [self._continuation(new) for new in output[:, width:].tolist()]

    def _run_once(self, ids: Tensor, mask: Tensor, of_prompt: Tensor) -> DynamicCache:
        """Keys and values of the prompts, one copy a job.

        The last token is left to ``generate``, which needs one to go on from.
        """
        cache = DynamicCache(config=self.model.config)
        self.model.base_model(
            input_ids=ids[:, :-1],
            attention_mask=mask[:, :-1],
            position_ids=(mask[:, :-1].cumsum(dim=1) - 1).clamp(min=0),
            past_key_values=cache,
            use_cache=True,
        )
        cache.batch_select_indices(of_prompt)
        return cache

    def _continuation(self, ids: list[int]) -> Continuation:
        end = next((i for i, token in enumerate(ids) if token in self.ends), None)
        ids = ids if end is None else ids[: end + 1]
        text = self.tokenizer.decode(ids, skip_special_tokens=True).strip()
        return Continuation(text, len(ids), end is not None)


def written(
    writer: Writer, jobs: Mapping[str, Job], batch_size: int, kept: Partial, what: str
) -> list[Continuation]:
    """Write the jobs that are not finished; return what each found, in their order."""
    todo = [name for name in jobs if name not in kept.done]
    with tqdm(
        total=len(jobs), initial=len(jobs) - len(todo), desc=what, unit="reply", delay=2
    ) as bar:
        for batch in batches_of([jobs[name] for name in todo], batch_size):
            names = [todo[i] for i in batch]
            found = writer.write([jobs[name] for name in names])
            kept.put({name: astuple(one) for name, one in zip(names, found, strict=True)})
            bar.update(len(batch))
    return [Continuation(*kept.done[name]) for name in jobs]


def pad_id(tokenizer: Tokenizer) -> int:
    """Return the id that pads batches: the tokenizer's own, or the end of a text."""
    pad = tokenizer.pad_token_id
    return int(pad if pad is not None else tokenizer.eos_token_id or 0)


def turn_ends(model: PreTrainedModel) -> tuple[int, ...]:
    """Return the ids that end a turn, as the model's generation settings name them."""
    ends = model.generation_config.eos_token_id
    return (ends,) if isinstance(ends, int) else tuple(ends or ())


def left_padded(
    prompts: Sequence[Sequence[int]], pad_id: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return ids and mask, (prompts, tokens), padded on the left: their ends fall together."""
    longest = max(map(len, prompts))
    padding = [longest - len(prompt) for prompt in prompts]
    ids = [[pad_id] * n + list(prompt) for n, prompt in zip(padding, prompts, strict=True)]
    mask = torch.arange(longest) >= torch.tensor(padding)[:, None]
    return torch.tensor(ids, device=device), mask.long().to(device)


def batches_of(jobs: Sequence[Job], size: int) -> Iterator[list[int]]:
    """Indices of jobs in batches of similar length, the replies to one prompt side by side.

    The longest come first: what does not fit in memory fails at once, and the time left that a
    progress bar shows is not too short.
    """
    order = sorted(range(len(jobs)), key=lambda i: (-len(jobs[i].prompt), jobs[i].prompt))
    for start in range(0, len(order), size):
        yield order[start : start + size]
