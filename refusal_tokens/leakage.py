"""Where decisions go: what moving one knob does to other categories, and which token is chosen."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from refusal_tokens.arrays import Floats, Ints, Mask
from refusal_tokens.decision import Knobs, decide, gaps, probabilities
from refusal_tokens.profiles import Profile


@dataclass(frozen=True)
class Leakage:
    """What moving one knob does to every other category.

    Attributes:
        knobs: that move, in order.
        change: (knobs, categories), change of each category's refusal rate, -1 to 1, when the
            knob's own category is taken from a refusal rate of 25% to one of 75%. NaN where a
            category has no refuse rows, or cannot be taken there.
        misrouted: (knobs, categories), share of each category's refuse rows whose top refusal
            token is the knob's.
        changed_unrouted: refuse rows of other categories whose decision changed though their top
            refusal token is not the moved knob's; always 0 with ``route`` and ``threshold``.
    """

    knobs: tuple[str, ...]
    change: Floats
    misrouted: Floats
    changed_unrouted: int


def leakage(profile: Profile, setting: Knobs) -> Leakage:
    """Return the leakage matrix at a setting, by greedy decisions."""
    greedy = replace(setting, temperature=0.0)
    taxonomy = profile.taxonomy
    shape = (len(taxonomy.knobs), len(taxonomy.category_ids))
    change, misrouted = np.full(shape, np.nan), np.full(shape, np.nan)
    top = profile.control_logits[:, 1:].argmax(axis=1)
    unrouted = 0
    rows = {c: profile.is_label("refuse") & profile.is_category(c) for c in taxonomy.category_ids}
    for i, knob in enumerate(taxonomy.knobs):
        for j, category in enumerate(taxonomy.category_ids):
            if rows[category].any():
                misrouted[i, j] = (top[rows[category]] == i).mean()
        own = rows.get(knob)
        if own is None or not own.any():
            continue
        before, after = (_at_rate(profile, greedy, i, own, wanted) for wanted in (0.25, 0.75))
        for j, category in enumerate(taxonomy.category_ids):
            inside = rows[category]
            if inside.any():
                change[i, j] = (after > 0)[inside].mean() - (before > 0)[inside].mean()
            if category != knob:
                unrouted += int(((before != after) & inside & (top != i)).sum())
    return Leakage(taxonomy.knobs, change, misrouted, unrouted)


def _at_rate(profile: Profile, setting: Knobs, index: int, own: Mask, wanted: float) -> Ints:
    """Decisions once one knob is set so that its own rows are refused at a rate."""
    gap = gaps(profile.control_logits[own], setting.rule)
    others = np.delete(setting.bias > gap, index, axis=1).any(axis=1)
    needed = np.sort(np.where(others, -np.inf, gap[:, index]))
    finite = needed[np.isfinite(needed)]
    place = round(wanted * len(needed)) - int((needed == -np.inf).sum())
    bias = setting.bias.copy()
    if len(finite):
        padded = np.concatenate([[finite[0] - 1], finite, [finite[-1] + 1]])
        place = min(max(place, 0), len(finite))
        bias[index] = (padded[place] + padded[place + 1]) / 2
    return decide(profile.control_logits, replace(setting, bias=bias))


def confusion(profile: Profile, setting: Knobs) -> dict[str, dict[str, float]]:
    """Return kind of prompt -> decision -> prompts; expected numbers if decisions are sampled.

    Kinds are ``refuse CATEGORY``, ``near-miss CATEGORY`` and ``ordinary``; decisions are the
    control tokens.
    """
    chances = probabilities(profile.control_logits, setting)
    asked, benign = profile.is_label("refuse"), profile.is_label("respond")
    categories = profile.taxonomy.category_ids
    kinds = {f"refuse {c}": asked & profile.is_category(c) for c in categories}
    kinds |= {f"near-miss {c}": benign & profile.is_category(c) for c in categories}
    kinds["ordinary"] = benign & profile.is_category(None)
    return {
        kind: dict(zip(profile.taxonomy.tokens, map(float, chances[rows].sum(axis=0)), strict=True))
        for kind, rows in kinds.items()
        if rows.any()
    }
