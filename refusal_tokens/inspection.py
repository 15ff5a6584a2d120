"""Why was this prompt refused, and what would flip it?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from refusal_tokens.checkpoint import Checkpoint
from refusal_tokens.decision import decide, flips, margins, probabilities
from refusal_tokens.policy import Policy
from refusal_tokens.prefill import last_logits


@dataclass(frozen=True)
class KnobChange:
    """A change of one knob that flips the decision: ``bias`` is where it flips, in nats."""

    knob: str
    now: float
    bias: float
    decision: str


@dataclass(frozen=True)
class Inspection:
    """What the model read at one prompt's decision position.

    Attributes:
        control_logits: token -> nats.
        probabilities: token -> probability under masking, before the knobs.
        decision_probabilities: token -> probability of the decision under the policy.
        control_mass: probability of the control tokens together, unmasked.
        margin: left side of the rule, nats; above 0 refuses.
        decision: ``respond`` or the category.
        changes: for each knob that can flip the decision alone, the smallest change, nearest
            first.
    """

    rule: str
    bias: Mapping[str, float]
    control_logits: Mapping[str, float]
    probabilities: Mapping[str, float]
    decision_probabilities: Mapping[str, float]
    control_mass: float
    margin: float
    decision: str
    changes: tuple[KnobChange, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return asdict(self)


def inspect_prompt(
    checkpoint: Checkpoint, messages: Sequence[Mapping[str, str]], policy: Policy
) -> Inspection:
    """Read one prompt's control logits and explain the decision."""
    taxonomy = checkpoint.info.taxonomy
    setting = policy.knobs(taxonomy)
    full = last_logits(checkpoint, [checkpoint.encoder.prompt_ids(messages)]).cpu().numpy()[0]
    logits = full[list(checkpoint.info.control_token_ids)].astype(np.float64)
    names = ("respond", *taxonomy.knobs)
    total = np.logaddexp.reduce(logits)
    margin, _ = margins(logits[None, :], setting)
    chances = probabilities(logits[None, :], setting)[0]

    def by_token(values: np.ndarray) -> dict[str, float]:
        return dict(zip(taxonomy.tokens, map(float, values), strict=True))

    return Inspection(
        rule=policy.rule,
        bias=dict(zip(taxonomy.knobs, map(float, setting.bias), strict=True)),
        control_logits=by_token(logits),
        probabilities=by_token(np.exp(logits - total)),
        decision_probabilities=by_token(chances),
        control_mass=float(np.exp(total - np.logaddexp.reduce(full.astype(np.float64)))),
        margin=float(margin[0]),
        decision=names[int(decide(logits[None, :], setting)[0])]
        if not setting.temperature
        else names[int(chances.argmax())],
        changes=tuple(
            KnobChange(
                taxonomy.knobs[flip.knob],
                float(setting.bias[flip.knob]),
                flip.bias,
                names[flip.decision],
            )
            for flip in flips(logits, setting)
        ),
    )


def inspection_report(found: Inspection) -> str:
    """Return an inspection as text."""
    lines = [f"decision: {found.decision}   (rule {found.rule}, margin {found.margin:+.2f} nats)"]
    lines.append(f"{'token':26}{'logit':>9}{'probability':>13}{'bias':>8}")
    knobs = [None, *found.bias]
    for knob, (token, logit) in zip(knobs, found.control_logits.items(), strict=True):
        bias = "" if knob is None else f"{found.bias[knob]:+.1f}"
        lines.append(f"{token:26}{logit:9.2f}{found.probabilities[token]:13.4f}{bias:>8}")
    lines.append(f"control tokens together: {found.control_mass:.4f} of the probability, unmasked")
    if not found.changes:
        lines.append("no single knob flips this decision")
    for change in found.changes:
        side = "above" if change.bias >= change.now else "below"
        lines.append(
            f"{change.knob} {side} {change.bias:+.2f} (now {change.now:+.2f}): {change.decision}"
        )
    return "\n".join(lines)
