"""What refusal training cost in helpfulness: the tuned model against its base on benign prompts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedModel

from refusal_tokens.base_model import load_model, load_tokenizer, resolve
from refusal_tokens.checkpoint import Checkpoint
from refusal_tokens.errors import InputError
from refusal_tokens.evaluate import Plan, outcome_of, part_name, writer_of
from refusal_tokens.generation import Job, written
from refusal_tokens.likelihood import Answer, Likelihood, likelihoods
from refusal_tokens.outcomes import Outcome
from refusal_tokens.partial import Partial
from refusal_tokens.profiles import group_names
from refusal_tokens.rates import Rate, rate
from refusal_tokens.resampling import Measure, group_counts, measure
from refusal_tokens.rows import Row
from refusal_tokens.steering import SteeredModel

DRAWS = 2000


@dataclass(frozen=True)
class Perplexities:
    """Perplexity of the reference answers to one kind of prompt.

    Attributes:
        kind: ``ordinary`` or ``near-miss``.
        answers: how many.
        tokens: how many, the same under both models.
        base: exp of the mean negative log-likelihood of a token.
        tuned: the same, after a forced ``<|respond|>``.
        ratio: tuned over base, with a bootstrap interval by group.
    """

    kind: str
    answers: int
    tokens: int
    base: float
    tuned: float
    ratio: Measure


@dataclass(frozen=True)
class Replies:
    """Replies of one model to ordinary prompts.

    Attributes:
        refused: by text; undecided replies are left out.
        tokens: mean length, with a bootstrap interval by group; at most the limit on new tokens.
        truncated: cut off by that limit.
    """

    refused: Rate
    tokens: Measure
    truncated: Rate


@dataclass(frozen=True)
class Helpfulness:
    """The tuned model against its base.

    Attributes:
        base: name of the base model.
        perplexity: by kind of prompt; kinds without reference answers are not among them.
        base_replies: to ordinary prompts; None without such prompts.
        tuned_replies: to the same prompts, as the model decided itself.
    """

    base: str
    perplexity: tuple[Perplexities, ...]
    base_replies: Replies | None
    tuned_replies: Replies | None


def perplexities(
    kind: str,
    rows: Sequence[Row],
    base: Sequence[Likelihood],
    tuned: Sequence[Likelihood],
    seed: int = 0,
) -> Perplexities:
    """Compare two models on the same answers; there must be at least one.

    The ratio is ``exp((sum nll_tuned - sum nll_base) / tokens)``; whole groups are drawn.
    """
    tokens = np.array([found.tokens for found in base], np.float64)
    assert [found.tokens for found in tuned] == tokens.tolist(), "other tokens were counted"
    of_base = np.array([found.nll for found in base])
    of_tuned = np.array([found.nll for found in tuned])
    groups = _groups([(row.id, row.group) for row in rows])
    draws = [
        np.exp((weights @ (of_tuned - of_base)) / (weights @ tokens))
        for weights in _weights(groups, seed)
    ]
    ratio = float(np.exp((of_tuned - of_base).sum() / tokens.sum()))
    return Perplexities(
        kind=kind,
        answers=len(rows),
        tokens=int(tokens.sum()),
        base=float(np.exp(of_base.sum() / tokens.sum())),
        tuned=float(np.exp(of_tuned.sum() / tokens.sum())),
        ratio=measure(ratio, np.concatenate(draws)),
    )


def replies_of(outcomes: Sequence[Outcome], seed: int = 0) -> Replies | None:
    """Summarise replies, whose lengths must be known; None for no replies."""
    if not outcomes:
        return None
    known = [o for o in outcomes if o.verdict != "undecided"]
    lengths = np.array([o.tokens for o in outcomes], np.float64)
    groups = _groups([(o.id, o.group) for o in outcomes])
    draws = [(weights @ lengths) / weights.sum(axis=1) for weights in _weights(groups, seed)]
    return Replies(
        refused=rate(sum(o.verdict == "refused" for o in known), len(known)),
        tokens=measure(float(lengths.mean()), np.concatenate(draws)),
        truncated=rate(sum(not o.ended for o in outcomes), len(outcomes)),
    )


def _groups(pairs: Sequence[tuple[str, str | None]]) -> np.ndarray:
    names = group_names([own for own, _ in pairs], [group for _, group in pairs])
    return np.unique(names, return_inverse=True)[1].reshape(-1)


def _weights(groups: np.ndarray, seed: int) -> Iterator[np.ndarray]:
    """(draws, entries), how often each entry was drawn, some draws at a time."""
    for counts in group_counts(int(groups.max()) + 1, DRAWS, seed):
        yield counts[:, groups]


@dataclass(frozen=True)
class Base:
    """The model that the checkpoint was tuned from, found but not loaded.

    Attributes:
        name: as asked for.
        source: what ``from_pretrained`` loads.
    """

    name: str
    source: str


def find_base(name: str, checkpoint: Checkpoint) -> Base:
    """Find a base model and check that it counts tokens as the checkpoint does.

    Raises:
        InputError: if it is missing, or its tokens have other ids.
    """
    advice = "name another with --base, or leave the comparison out with --base none"
    try:
        source = resolve(name)
        tokenizer = load_tokenizer(source)
    except InputError as error:
        raise InputError(f"base model: {error}; {advice}") from None
    own = checkpoint.tokenizer.get_vocab()
    other = [token for token, i in tokenizer.get_vocab().items() if own.get(token) != i]
    if other:
        raise InputError(
            f"base model {name!r}: token {other[0]!r} has another id than in the checkpoint, so "
            f"perplexities cannot be compared; {advice}"
        )
    return Base(name, source)


def compare_with_base(
    model: SteeredModel,
    base: Base,
    rows: Sequence[Row],
    replies: Sequence[Outcome],
    plan: Plan,
    kept: Partial,
) -> tuple[Helpfulness, list[Outcome]]:
    """Hold the tuned model against its base on prompts that should be answered.

    Args:
        model: the tuned model.
        base: what it was tuned from.
        rows: whose reference answers are scored: those labelled respond that have one.
        replies: the tuned model's own; the base replies to the ordinary prompts among them.
        plan: the same as theirs.
        kept: finished parts of an interrupted run, added to.

    Returns:
        The comparison, and the base model's replies, judged.
    """
    checkpoint = model.checkpoint
    answered = [row for row in rows if row.label == "respond" and row.response is not None]
    own = [o for o in replies if o.forced is None and o.label == "respond" and o.category is None]
    respond = checkpoint.info.control_token_ids[:1]
    tuned = _answer_likelihoods(model, checkpoint.model, answered, respond, "tuned", kept)
    dtype = next(checkpoint.model.parameters()).dtype
    plain = load_model(base.source, dtype=dtype).to(checkpoint.model.device).eval()
    of_base = _answer_likelihoods(model, plain, answered, (), f"base {base.name}", kept)
    by_id = {row.id: row for row in rows}
    asked = [by_id[o.id] for o in own]
    jobs = {
        part_name("reply", row, f"base {base.name}"): Job(
            tuple(checkpoint.encoder.prompt_ids(row.prompt))
        )
        for row in asked
    }
    writer = writer_of(model, plain, plan)
    found = written(writer, jobs, plan.batch_size, kept, "Generating, base model")
    taxonomy = checkpoint.info.taxonomy
    outcomes = [
        outcome_of(row, None, None, reply, taxonomy, None)
        for row, reply in zip(asked, found, strict=True)
    ]
    compared = Helpfulness(
        base=base.name,
        perplexity=tuple(_by_kind(answered, of_base, tuned)),
        base_replies=replies_of(outcomes),
        tuned_replies=replies_of(own),
    )
    return compared, outcomes


def _answer_likelihoods(
    model: SteeredModel,
    scoring: PreTrainedModel,
    rows: Sequence[Row],
    control: Sequence[int],
    which: str,
    kept: Partial,
) -> list[Likelihood]:
    encoder = model.checkpoint.encoder
    answers = {}
    for row in rows:
        assert row.response is not None
        before = (*encoder.prompt_ids(row.prompt), *control)
        ids = (*before, *encoder.reply_ids(row.response))
        answers[part_name("answer", row, which)] = Answer(ids, len(before))
    return list(likelihoods(scoring, answers, kept, "Reference answers").values())


def _by_kind(
    rows: Sequence[Row], base: Sequence[Likelihood], tuned: Sequence[Likelihood]
) -> Iterator[Perplexities]:
    for kind in ("ordinary", "near-miss"):
        among = [i for i, row in enumerate(rows) if (row.category is None) == (kind == "ordinary")]
        if among:
            yield perplexities(
                kind, [rows[i] for i in among], [base[i] for i in among], [tuned[i] for i in among]
            )
