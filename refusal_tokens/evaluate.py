"""Generate under the model's own decisions and under forced control tokens, and judge the text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field

from transformers import LogitsProcessor, PreTrainedModel

from refusal_tokens.decision import decide, draws
from refusal_tokens.errors import InputError, unknown
from refusal_tokens.evaluation import HARMLESS
from refusal_tokens.generation import Continuation, Job, Writer, written
from refusal_tokens.judge import judge
from refusal_tokens.outcomes import Outcome
from refusal_tokens.partial import Partial
from refusal_tokens.policy import Policy
from refusal_tokens.profiles import Profile
from refusal_tokens.rows import Row
from refusal_tokens.steering import RefusalLogitsProcessor, SteeredModel
from refusal_tokens.taxonomy import RESPOND_TOKEN, Taxonomy


@dataclass(frozen=True)
class Plan:
    """What is generated for each prompt.

    Attributes:
        force: control tokens to force besides the model's own decision.
        respond_to: categories whose refuse prompts may be forced to respond.
        policy: of the own decisions; masked.
        max_new_tokens: of a reply, without its control token.
        batch_size: replies generated together.
    """

    force: tuple[str, ...]
    respond_to: frozenset[str] = frozenset(HARMLESS)
    policy: Policy = field(default_factory=Policy)
    max_new_tokens: int = 64
    batch_size: int = 48

    def check(self, taxonomy: Taxonomy) -> None:
        """Check the plan against a taxonomy.

        Raises:
            InputError: for an unknown token, category or knob, or a policy that is not masked.
        """
        for token in self.force:
            if token not in taxonomy.tokens:
                raise InputError(unknown("control token", token, taxonomy.tokens))
        self.policy.knobs(taxonomy)
        if not self.policy.masked:
            raise InputError(
                "the policy is not masked, so the control logits alone do not decide; use one "
                "with masked: true"
            )

    def forces(self, row: Row, token: str) -> bool:
        """Whether a token is forced on a row: clearly harmful requests are not answered."""
        harmless = row.label != "refuse" or row.category in self.respond_to
        return token in self.force and (token != RESPOND_TOKEN or harmless)


def generate_outcomes(
    model: SteeredModel, rows: Sequence[Row], profile: Profile, plan: Plan, kept: Partial
) -> list[Outcome]:
    """Generate and judge: one own reply a row, then one for each control token forced on it.

    Text is greedy, so that a reply follows from its prompt and its control token: the own reply is
    the forced one where the model decides on that token, and is not generated twice.

    Args:
        model: the checkpoint.
        rows: labelled prompts.
        profile: of these rows, in their order; its control logits decide.
        plan: what to generate.
        kept: finished replies of an interrupted run, added to.

    Raises:
        InputError: as ``Plan.check``.
    """
    taxonomy = model.checkpoint.info.taxonomy
    plan.check(taxonomy)
    setting = plan.policy.knobs(taxonomy)
    random = draws(plan.policy.seed, range(len(rows))) if setting.temperature else None
    own = [taxonomy.tokens[i] for i in decide(profile.control_logits, setting, random)]
    zero = Policy().knobs(taxonomy)
    preferred = [taxonomy.tokens[i] for i in decide(profile.control_logits, zero)]
    forced = [
        (i, token)
        for token in taxonomy.tokens
        for i, row in enumerate(rows)
        if plan.forces(row, token)
    ]
    openings = dict.fromkeys([*enumerate(own), *forced])
    texts = _replies(model, rows, list(openings), plan, kept)

    def outcome(i: int, token: str, forced: str | None) -> Outcome:
        return outcome_of(rows[i], token, forced, texts[i, token], taxonomy, preferred[i])

    found = [outcome(i, token, None) for i, token in enumerate(own)]
    return found + [outcome(i, token, token) for i, token in forced]


def _replies(
    model: SteeredModel,
    rows: Sequence[Row],
    openings: Sequence[tuple[int, str]],
    plan: Plan,
    kept: Partial,
) -> dict[tuple[int, str], Continuation]:
    info, encoder = model.checkpoint.info, model.checkpoint.encoder
    ids = dict(zip(info.taxonomy.tokens, info.control_token_ids, strict=True))
    prompts = [tuple(encoder.prompt_ids(row.prompt)) for row in rows]
    jobs = {
        part_name("reply", rows[i], token): Job(prompts[i], (ids[token],)) for i, token in openings
    }
    processor = RefusalLogitsProcessor(info, Policy())
    writer = writer_of(model, model.checkpoint.model, plan, processor)
    found = written(writer, jobs, plan.batch_size, kept, "Generating")
    return dict(zip(openings, found, strict=True))


def part_name(kind: str, row: Row, of: str) -> str:
    """The name of a finished part in the partial file."""
    return json.dumps([kind, row.id, of])


def writer_of(
    model: SteeredModel,
    writing: PreTrainedModel,
    plan: Plan,
    processor: LogitsProcessor | None = None,
) -> Writer:
    """Return a writer of plain text for a model with this checkpoint's tokens."""
    return Writer(
        writing,
        model.checkpoint.tokenizer,
        model.ends,
        model.pad_id,
        plan.max_new_tokens,
        processor,
    )


def outcome_of(
    row: Row,
    token: str | None,
    forced: str | None,
    reply: Continuation,
    taxonomy: Taxonomy,
    preferred: str | None,
) -> Outcome:
    """Judge a reply that ``token`` opened; None for a model without control tokens."""
    index = taxonomy.tokens.index(token) if token is not None else 0
    expected = taxonomy.knobs[index - 1] if index else None
    verdict = judge(reply.text, expected)
    return Outcome(
        row.id, row.label, row.category, row.group, forced, token, reply.text, verdict,
        preferred=preferred, tokens=reply.tokens, ended=reply.ended,
    )  # fmt: skip
