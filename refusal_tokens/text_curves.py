"""Text-level refusal at every setting of the knobs, from one generation a prompt and control token.

With greedy text a reply follows from its prompt and its control token. So with ``a_k(x)`` = 1 where
the reply to prompt x under token k refuses, and ``p_k(x; b)`` the probability of deciding on k, the
share of prompts whose text refuses is ``mean_x sum_k p_k(x; b) a_k(x)`` at every setting b, for
every rule, greedy or sampled. Nothing is generated again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from refusal_tokens.arrays import Floats, Mask
from refusal_tokens.decision import Knobs, probabilities
from refusal_tokens.errors import InputError
from refusal_tokens.outcomes import Outcome
from refusal_tokens.profiles import Profile
from refusal_tokens.rates import Rate, rate, wilson


@dataclass(frozen=True)
class ForcedTexts:
    """Which replies refuse, for the prompts that have one under each control token.

    Attributes:
        profile: of these prompts alone.
        refuses: (prompts, 1 + categories), 1 where the reply under the token refuses, else 0.
        left_out: prompts that lack a reply under some token, such as harmful ones that are not
            forced to respond.
        undecided: replies whose judge could not tell; they count as not refusing.
        judges: who gave the verdicts.
    """

    profile: Profile
    refuses: Floats
    left_out: int
    undecided: int
    judges: tuple[str, ...]


def forced_texts(
    profile: Profile, outcomes: Sequence[Outcome], metadata: Mapping[str, Any], names: str
) -> ForcedTexts:
    """Match forced replies with the profile of the same model and prompts.

    Args:
        profile: of labelled prompts.
        outcomes: among them one reply for each prompt and forced control token.
        metadata: of the outcomes file.
        names: of the two files, for messages.

    Raises:
        InputError: if model or prompts differ (naming both hashes), a reply comes twice, or no
            prompt has a reply under each control token.
    """
    for key, what in (("model_fingerprint", "model"), ("data_hash", "prompts")):
        ours, theirs = profile.metadata.get(key), metadata.get(key)
        if ours != theirs:
            raise InputError(
                f"{names}: of different {what} ({key} {ours} and {theirs}); `refusal-tokens "
                "evaluate` writes the profile that fits beside its outcomes"
            )
    place = {row: i for i, row in enumerate(profile.columns["id"])}
    tokens = {token: k for k, token in enumerate(profile.taxonomy.tokens)}
    refuses = np.full((len(profile), len(tokens)), np.nan)
    forced = [o for o in outcomes if o.forced is not None]
    for outcome in forced:
        if outcome.id not in place or outcome.forced not in tokens:
            raise InputError(
                f"{names}: prompt {outcome.id!r} with {outcome.forced} is not in the profile"
            )
        at = place[outcome.id], tokens[outcome.forced]
        if not np.isnan(refuses[at]):
            raise InputError(f"{names}: two replies for prompt {outcome.id!r}, {outcome.forced}")
        refuses[at] = outcome.verdict == "refused"
    whole = ~np.isnan(refuses).any(axis=1)
    if not whole.any():
        raise InputError(
            f"{names}: no prompt has a reply under each of {', '.join(tokens)}; "
            "run evaluate with --force all"
        )
    kept = {profile.columns["id"][i] for i in np.flatnonzero(whole)}
    return ForcedTexts(
        profile=profile.select(whole),
        refuses=refuses[whole],
        left_out=int((~whole).sum()),
        undecided=sum(o.verdict == "undecided" for o in forced if o.id in kept),
        judges=tuple(sorted({o.judge for o in forced})),
    )


def text_refusal(texts: ForcedTexts, setting: Knobs) -> Floats:
    """Return the probability that each prompt's text refuses, (prompts,), at one setting."""
    return _refusal(texts, np.ones(len(texts.profile), bool), setting)


def _refusal(texts: ForcedTexts, rows: Mask, setting: Knobs) -> Floats:
    chances = probabilities(texts.profile.control_logits[rows], setting)
    found: Floats = (chances * texts.refuses[rows]).sum(axis=1)
    return found


def text_rates_at(texts: ForcedTexts, setting: Knobs) -> dict[str, Rate]:
    """Return the text-level refusal rate of each kind of prompt at one setting.

    There are no pools: where harmful prompts lack a reply they would be of another mix.
    """
    refused = text_refusal(texts, setting)
    return {
        kind: rate(float(refused[rows].sum()), int(rows.sum()))
        for kind, rows in kinds(texts.profile).items()
        if rows.any()
    }


def kinds(profile: Profile) -> dict[str, Mask]:
    """Return kind of prompt -> (prompts,), which prompts are of it."""
    asked, benign = profile.is_label("refuse"), profile.is_label("respond")
    ids = profile.taxonomy.category_ids
    found = {f"refuse {c}": asked & profile.is_category(c) for c in ids}
    found |= {f"near-miss {c}": benign & profile.is_category(c) for c in ids}
    return found | {"ordinary": benign & profile.is_category(None)}


@dataclass(frozen=True)
class TextCurve:
    """Text-level refusal as one knob moves, the others standing at a setting.

    Attributes:
        knob: that moves.
        bias: (points,), nats.
        n_refuse: refuse rows of its category with a reply under each token.
        refusal: (points,), share of these whose text refuses; NaN without such rows.
        low: (points,), 95% Wilson interval.
        high: (points,), its upper end.
        n_near: near-miss rows of its category with a reply under each token.
        near_miss: (points,), share of these whose text refuses; NaN without such rows.
    """

    knob: str
    bias: Floats
    n_refuse: int
    refusal: Floats
    low: Floats
    high: Floats
    n_near: int
    near_miss: Floats


def text_curve(texts: ForcedTexts, knob: str, setting: Knobs, bias: Floats) -> TextCurve:
    """Return one knob's text-level curve.

    Args:
        texts: replies under each control token.
        knob: which one moves; with one refusal token, it stands for all categories.
        setting: where the others stand, the rule, and whether decisions are sampled.
        bias: (points,), nats.
    """
    profile = texts.profile
    index = profile.taxonomy.knob_index(knob)
    inside = profile.is_of_knob(knob)
    asked = profile.is_label("refuse") & inside
    near = profile.is_label("respond") & inside & ~profile.is_category(None)
    refusal = _along(texts, asked, setting, index, bias)
    n = int(asked.sum())
    low, high = wilson(refusal, n) if n else (refusal, refusal)
    return TextCurve(
        knob=knob,
        bias=bias,
        n_refuse=n,
        refusal=refusal,
        low=low,
        high=high,
        n_near=int(near.sum()),
        near_miss=_along(texts, near, setting, index, bias),
    )


def _along(texts: ForcedTexts, rows: Mask, setting: Knobs, index: int, bias: Floats) -> Floats:
    """(points,), mean text-level refusal of some prompts as a knob moves."""
    if not rows.any():
        return np.full(len(bias), np.nan)
    found = np.empty(len(bias))
    for point, value in enumerate(bias):
        moved = setting.bias.copy()
        moved[index] = value
        found[point] = _refusal(texts, rows, replace(setting, bias=moved)).mean()
    return found


@dataclass(frozen=True)
class TextAnalysis:
    """What a page shows of the text at one setting of the knobs.

    Attributes:
        curves: one a knob that has prompts with all replies.
        by_token: kind of prompt -> refused by control token, of the same prompts as ``by_text``.
        by_text: kind of prompt -> refused by text.
        prompts: with a reply under each control token.
        left_out: prompts without.
        undecided: replies whose judge could not tell; they count as not refusing.
        judges: who gave the verdicts.
    """

    curves: tuple[TextCurve, ...]
    by_token: Mapping[str, Rate]
    by_text: Mapping[str, Rate]
    prompts: int
    left_out: int
    undecided: int
    judges: tuple[str, ...]


def analyse_texts(
    texts: ForcedTexts, knobs: Sequence[str], setting: Knobs, bias: Floats
) -> TextAnalysis:
    """Compute what a page shows of the text: a curve for each of these knobs, and the rates."""
    curves = [text_curve(texts, knob, setting, bias) for knob in knobs]
    obeyed = replace(texts, refuses=np.tile(_is_refusal(texts), (len(texts.profile), 1)))
    return TextAnalysis(
        curves=tuple(curve for curve in curves if curve.n_refuse or curve.n_near),
        by_token=text_rates_at(obeyed, setting),
        by_text=text_rates_at(texts, setting),
        prompts=len(texts.profile),
        left_out=texts.left_out,
        undecided=texts.undecided,
        judges=texts.judges,
    )


def _is_refusal(texts: ForcedTexts) -> Floats:
    """(1 + categories,), 0 for respond: as if every text did what its token says."""
    return np.array([0.0] + [1.0] * (texts.refuses.shape[1] - 1))
