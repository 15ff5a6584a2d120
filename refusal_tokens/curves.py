"""What one knob does while the others stand: its control curve, exact from the control logits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from refusal_tokens.arrays import Floats, Mask
from refusal_tokens.decision import Knobs, gaps, held_by_floor, margins
from refusal_tokens.errors import InputError
from refusal_tokens.profiles import Profile
from refusal_tokens.rates import wilson


@dataclass(frozen=True)
class ControlCurve:
    """What one knob does while the others stand.

    Attributes:
        knob: which one moves.
        bias: (points,), nats.
        n_refuse: prompts of its category labelled refuse.
        refusal: (points,), their refusal rate.
        low: (points,), lower end of its pointwise 95% Wilson interval.
        high: (points,), upper end.
        band: half width of a 95% band for the whole curve (Dvoretzky-Kiefer-Wolfowitz with
            Massart's constant, 1990): the curve is an empirical distribution function of the bias.
        own: (points,), share refused as this category.
        n_near: its near-miss respond rows.
        near_miss: (points,), their over-refusal; NaN without such rows.
        n_respond: all respond rows.
        over_refusal: (points,), theirs.
    """

    knob: str
    bias: Floats
    n_refuse: int
    refusal: Floats
    low: Floats
    high: Floats
    band: float
    own: Floats
    n_near: int
    near_miss: Floats
    n_respond: int
    over_refusal: Floats


def control_curve(profile: Profile, knob: str, setting: Knobs, bias: Floats) -> ControlCurve:
    """Return one knob's control curve, exact from the control logits.

    Args:
        profile: labelled prompts.
        knob: which one moves; with one refusal token, it stands for all categories.
        setting: where the others stand, the rule, and whether decisions are sampled.
        bias: (points,), nats.

    Raises:
        InputError: if the knob's category has no refuse rows.
    """
    index = profile.taxonomy.knob_index(knob)
    asked, benign = profile.is_label("refuse"), profile.is_label("respond")
    inside = profile.is_of_knob(knob)
    near = benign & inside & ~profile.is_category(None)
    n_refuse = int((asked & inside).sum())
    if not n_refuse:
        raise InputError(f"no prompts labelled refuse/{knob} in the profile")

    def along(rows: Mask) -> tuple[Floats, Floats]:
        return _rates_along(profile.control_logits[rows], setting, index, bias)

    refusal, own = along(asked & inside)
    low, high = wilson(refusal, n_refuse)
    return ControlCurve(
        knob=knob,
        bias=bias,
        n_refuse=n_refuse,
        refusal=refusal,
        low=low,
        high=high,
        band=float(np.sqrt(np.log(2 / 0.05) / (2 * n_refuse))),
        own=own,
        n_near=int(near.sum()),
        near_miss=along(near)[0],
        n_respond=int(benign.sum()),
        over_refusal=along(benign)[0],
    )


def _rates_along(
    logits: NDArray[np.floating], setting: Knobs, index: int, bias: Floats
) -> tuple[Floats, Floats]:
    """(points,), shares of prompts refused at all, and as this knob's category, as it moves."""
    if not len(logits):
        return np.full(len(bias), np.nan), np.full(len(bias), np.nan)
    if setting.temperature == 0:
        return _greedy_along(logits, setting, index, bias)
    along = _sampled_bias_along if setting.rule == "bias" else _sampled_routed_along
    exact: Floats = np.asarray(logits, np.float64)
    any_refusal, own = along(exact, setting, index, bias)
    held = held_by_floor(exact, setting)
    if held.any():
        # What the rule would answer, a floor refuses, as the floor's category.
        any_refusal = along(exact[held == 0], setting, index, bias)[0] + (held > 0).sum()
        mine = exact[held == index + 1]
        own = own + len(mine) - along(mine, setting, index, bias)[0]
    return any_refusal / len(logits), own / len(logits)


def _sampled_bias_along(
    logits: Floats, setting: Knobs, index: int, bias: Floats
) -> tuple[Floats, Floats]:
    """Summed probabilities of any refusal and of this knob's, softmax over the biased logits."""
    biased = (logits + np.concatenate([[0.0], setting.bias])) / setting.temperature
    others = np.logaddexp.reduce(np.delete(biased, index + 1, axis=1), axis=1)
    own = np.empty(len(bias))
    respond = np.empty(len(bias))
    for point, value in enumerate(bias):
        moved = (logits[:, index + 1] + value) / setting.temperature
        taken = expit(moved - others)
        own[point] = taken.sum()
        respond[point] = ((1.0 - taken) * np.exp(biased[:, 0] - others)).sum()
    return len(logits) - respond, own


def _sampled_routed_along(
    logits: Floats, setting: Knobs, index: int, bias: Floats
) -> tuple[Floats, Floats]:
    """The same for a coin a prompt: only the prompts routed to this knob change."""
    margin, category = margins(logits, setting)
    routed = category == index + 1
    base = margin[routed] - setting.bias[index]
    own = np.array([expit((base + value) / setting.temperature).sum() for value in bias])
    return own + expit(margin[~routed] / setting.temperature).sum(), own


def _greedy_along(
    logits: NDArray[np.floating], setting: Knobs, index: int, bias: Floats
) -> tuple[Floats, Floats]:
    gap = gaps(logits, setting.rule)
    held = held_by_floor(np.asarray(logits, np.float64), setting)
    others = np.delete(setting.bias > gap, index, axis=1).any(axis=1)
    refused = np.where(others | (held > 0), -np.inf, gap[:, index])
    own = gap[:, index]
    if setting.rule == "bias":
        # As this category: it must beat the other knobs too, not only respond.
        rivals = np.delete(logits[:, 1:] + setting.bias, index, axis=1)
        if rivals.shape[1]:
            own = np.maximum(own, rivals.max(axis=1) - logits[:, index + 1])
    # What no knob refuses, a floor refuses, as the floor's category.
    own = np.where((held == index + 1) & ~others, -np.inf, own)
    return _share_below(refused, bias), _share_below(own, bias)


def _share_below(values: Floats, points: Floats) -> Floats:
    return np.searchsorted(np.sort(values), points, side="left") / len(values)
