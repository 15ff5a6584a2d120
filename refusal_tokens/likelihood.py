"""How likely a model finds given replies: their negative log-likelihood, token by token."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm
from transformers import PreTrainedModel

from refusal_tokens.head import logit_transform
from refusal_tokens.partial import Partial
from refusal_tokens.shared_prefix import hidden_states

BATCH_TOKENS = 2048
HEAD_POSITIONS = 512


@dataclass(frozen=True)
class Likelihood:
    """How likely a model finds one reference answer.

    Attributes:
        nll: summed over its tokens, nats.
        tokens: with the end of the turn; the control token before it is not counted.
    """

    nll: float
    tokens: int


@dataclass(frozen=True)
class Answer:
    """A reference answer as a model reads it.

    Attributes:
        ids: prompt, control token where there is one, answer, end of the turn.
        start: index of the answer's first token.
    """

    ids: tuple[int, ...]
    start: int


def likelihoods(
    model: PreTrainedModel, answers: Mapping[str, Answer], kept: Partial, what: str
) -> dict[str, Likelihood]:
    """Return the likelihood of each answer.

    Args:
        model: causal, in evaluation mode.
        answers: by a name that is unique in ``kept``.
        kept: finished parts of an interrupted run, added to.
        what: shown beside the progress bar.
    """
    todo = {name: answer for name, answer in answers.items() if name not in kept.done}
    with tqdm(
        total=len(answers), initial=len(answers) - len(todo), desc=what, unit="answer", delay=2
    ) as bar:
        for names in _batches(todo):
            found = _batch_likelihoods(model, [todo[name] for name in names])
            kept.put(dict(zip(names, found, strict=True)))
            bar.update(len(names))
    return {name: Likelihood(*kept.done[name]) for name in answers}


def _batches(answers: Mapping[str, Answer]) -> Iterator[list[str]]:
    """Names in batches of similar length, longest first."""
    batch: list[str] = []
    for name in sorted(answers, key=lambda name: -len(answers[name].ids)):
        if batch and (len(batch) + 1) * len(answers[batch[0]].ids) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(name)
    if batch:
        yield batch


@torch.no_grad()
def _batch_likelihoods(
    model: PreTrainedModel, answers: Sequence[Answer]
) -> list[tuple[float, int]]:
    device = model.device
    longest = max(len(answer.ids) for answer in answers)
    rows = [[*a.ids, *[0] * (longest - len(a.ids))] for a in answers]
    ids = torch.tensor(rows, device=device)
    places = torch.arange(longest, device=device)
    lengths = torch.tensor([[len(a.ids)] for a in answers], device=device)
    starts = torch.tensor([[a.start] for a in answers], device=device)
    hidden = hidden_states(model.base_model, ids, (places < lengths).long())
    # The logits of a token are read one position before it.
    row, place = ((places >= starts) & (places < lengths)).nonzero(as_tuple=True)
    nll = _token_nll(model, hidden[row, place - 1], ids[row, place])
    totals = torch.zeros(len(answers), dtype=torch.float64, device=device)
    totals.index_add_(0, row, nll)
    counted = [len(a.ids) - a.start for a in answers]
    return list(zip(totals.tolist(), counted, strict=True))


def _token_nll(model: PreTrainedModel, hidden: Tensor, targets: Tensor) -> Tensor:
    """(positions,), float64, nats; the head runs over few positions at a time to bound memory."""
    head, transform = model.get_output_embeddings(), logit_transform(model)
    parts = [
        functional.cross_entropy(transform(head(states).float()), ids, reduction="none")
        for states, ids in zip(
            torch.split(hidden, HEAD_POSITIONS), torch.split(targets, HEAD_POSITIONS), strict=True
        )
    ]
    return torch.cat(parts).double()
