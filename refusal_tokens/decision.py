"""The decision rules: control logits and knobs in, decisions out. Pure NumPy.

Every part of the package that decides anything calls ``decide``; the rules are those of
"Refusal Tokens" (Jain et al., arXiv 2412.06748) and two variants:

* ``bias``: refuse when ``max_k z[k] + b[k] > z[0]``, as the arg max. The paper's logit bias.
* ``route``: refuse when ``LSE(z[1:]) - z[0] + b[k*] > 0``, as ``k* = argmax z[1:]``. A knob acts
  only on prompts that are routed to its category.
* ``threshold``: refuse when ``z[k*] - LSE(all others) + b[k*] > 0``, as ``k*``. The paper's
  threshold on the top category's probability: ``b = -logit(tau)``.

Ties respond. With one category the three agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, logsumexp, softmax

from refusal_tokens.arrays import Floats, Ints

RULES = ("route", "bias", "threshold")
Rule = Literal["route", "bias", "threshold"]
# How far beyond a breakpoint, in nats, ``flips`` looks.
STEP = 1e-6


@dataclass(frozen=True)
class Knobs:
    """What a decision depends on besides the logits.

    Attributes:
        rule: one of ``RULES``.
        bias: (categories,), nats; positive refuses more readily.
        floor: (categories,), nats; a prompt with ``z[c] + floor[c] > z[0]`` is refused whatever
            the rule says. ``-inf`` where there is none.
        temperature: 0 decides greedily; above 0 the decision is sampled.
    """

    rule: Rule
    bias: Floats
    floor: Floats
    temperature: float = 0.0


def knobs(rule: Rule, bias: Sequence[float] | Floats, temperature: float = 0.0) -> Knobs:
    """Return knobs without floors.

    Raises:
        ValueError: for a rule that is none of ``RULES``.
    """
    if rule not in RULES:
        raise ValueError(f"rule: found {rule!r}; allowed: {', '.join(RULES)}")
    values = np.asarray(bias, dtype=np.float64)
    return Knobs(rule, values, np.full(len(values), -np.inf), temperature)


def margins(control_logits: NDArray[np.floating], setting: Knobs) -> tuple[Floats, Ints]:
    """Return by how much each prompt is refused, and as what.

    Args:
        control_logits: (prompts, 1 + categories), nats, respond first.
        setting: rule and biases; floors and temperature play no part here.

    Returns:
        The left side of the rule, (prompts,), nats: above 0 refuses. And the index of the
        category, (prompts,), counted from 1.
    """
    logits = np.asarray(control_logits, dtype=np.float64)
    refusals = logits[:, 1:]
    if setting.rule == "bias":
        biased = refusals + setting.bias
        best = biased.argmax(axis=1)
        return biased.max(axis=1) - logits[:, 0], best + 1
    best = refusals.argmax(axis=1)
    bias = setting.bias[best]
    if setting.rule == "route":
        return logsumexp(refusals, axis=1) - logits[:, 0] + bias, best + 1
    rows = np.arange(len(logits))
    others = logits.copy()
    others[rows, best + 1] = -np.inf
    return refusals[rows, best] - logsumexp(others, axis=1) + bias, best + 1


def gaps(control_logits: NDArray[np.floating], rule: Rule) -> Floats:
    """Return the bias that each knob must exceed for a prompt to be refused through it.

    Args:
        control_logits: (prompts, 1 + categories), nats, respond first.
        rule: one of ``RULES``.

    Returns:
        (prompts, categories), nats; infinite where no bias of that knob refuses the prompt. A
        prompt is refused, greedily, if and only if some knob's bias exceeds its gap.
    """
    logits = np.asarray(control_logits, dtype=np.float64)
    if rule == "bias":
        return logits[:, :1] - logits[:, 1:]
    zero = np.zeros(logits.shape[1] - 1)
    margin, category = margins(logits, Knobs(rule, zero, zero - np.inf))
    found = np.full((len(logits), len(zero)), np.inf)
    found[np.arange(len(logits)), category - 1] = -margin
    return found


def held_by_floor(logits: Floats, setting: Knobs) -> Ints:
    """Return the category whose floor holds each prompt, counted from 1, or 0 where none does."""
    held = logits[:, 1:] + setting.floor
    return np.where(held.max(axis=1) > logits[:, 0], held.argmax(axis=1) + 1, 0)


def decide(
    control_logits: NDArray[np.floating], setting: Knobs, draws: Floats | None = None
) -> Ints:
    """Decide for each prompt.

    Args:
        control_logits: (prompts, 1 + categories), nats, respond first.
        setting: the knobs.
        draws: (prompts,), uniform in [0, 1); needed when the temperature is above 0.

    Returns:
        (prompts,), 0 to respond, else the refusing category counted from 1.

    Raises:
        ValueError: for logits that are not finite, or missing draws.

    >>> decide(np.array([[0.0, 2.0, 1.0]]), knobs("bias", [0.0, 1.5]))
    array([2])
    """
    logits = _checked(control_logits, setting)
    if setting.temperature == 0:
        margin, category = margins(logits, setting)
        choice = np.where(margin > 0, category, 0)
    else:
        if draws is None:
            raise ValueError("a sampled decision needs draws")
        reached = np.cumsum(_sampling_probabilities(logits, setting), axis=1)
        # Rounding can leave the last sum below 1; the draw is scaled to what is there.
        choice = (np.asarray(draws)[:, None] * reached[:, -1:] >= reached).sum(axis=1)
    return np.where(choice == 0, held_by_floor(logits, setting), choice)


def probabilities(control_logits: NDArray[np.floating], setting: Knobs) -> Floats:
    """Return the probability of each decision, (prompts, 1 + categories).

    At temperature 0 a row is 1 at its decision and 0 elsewhere.
    """
    logits = _checked(control_logits, setting)
    if setting.temperature == 0:
        return np.eye(logits.shape[1])[decide(logits, setting)]
    chances = _sampling_probabilities(logits, setting)
    held = held_by_floor(logits, setting)
    rows = np.flatnonzero(held)
    chances[rows, held[rows]] += chances[rows, 0]
    chances[rows, 0] = 0.0
    return chances


def _sampling_probabilities(logits: Floats, setting: Knobs) -> Floats:
    if setting.rule == "bias":
        biased = logits + np.concatenate([[0.0], setting.bias])
        below = biased - biased.max(axis=1, keepdims=True)
        return np.asarray(softmax(_divided(below, setting.temperature), axis=1))
    margin, category = margins(logits, setting)
    chances = np.zeros_like(logits)
    refuse = expit(_divided(margin, setting.temperature))
    chances[:, 0] = 1.0 - refuse
    chances[np.arange(len(logits)), category] = refuse
    return chances


def _divided(values: Floats, temperature: float) -> Floats:
    """Divide; at the smallest temperatures what is not 0 becomes infinite, as it should."""
    with np.errstate(over="ignore"):
        return values / temperature


def _checked(control_logits: NDArray[np.floating], setting: Knobs) -> Floats:
    logits = np.asarray(control_logits, dtype=np.float64)
    if logits.ndim != 2 or logits.shape[1] != len(setting.bias) + 1:
        raise ValueError(
            f"control logits of shape {logits.shape}; expected (prompts, {len(setting.bias) + 1})"
        )
    if not np.isfinite(logits).all():
        raise ValueError("control logits must be finite")
    return logits


def draws(seed: int, rows: Sequence[int], sequences: Sequence[int] | None = None) -> Floats:
    """Return one uniform number in [0, 1) for each row.

    A number depends on the seed, the row's number and the number of the sequence returned for it,
    not on the batch it is in. Each must be below 2**32: NumPy splits greater ones in two, so that
    they would share draws.
    """
    numbers = sequences if sequences is not None else [0] * len(rows)
    keys = zip(rows, numbers, strict=True)
    return np.array([np.random.default_rng([seed, row, n]).random() for row, n in keys])


@dataclass(frozen=True)
class Flip:
    """The smallest change of one knob that changes a decision.

    Attributes:
        knob: index of the category, from 0.
        bias: the value, in nats, at which the decision changes, once crossed.
        decision: the decision beyond it: 0 to respond, else a category counted from 1.
    """

    knob: int
    bias: float
    decision: int


def flips(control_logits: NDArray[np.floating], setting: Knobs) -> list[Flip]:
    """Return, for one prompt and a greedy decision, the nearest change each knob can make.

    Args:
        control_logits: (1 + categories,), nats.
        setting: the knobs as they stand.

    Returns:
        One entry for each knob that can change the decision by itself, nearest first.
    """
    logits = np.asarray(control_logits, dtype=np.float64)[None, :]
    now = int(decide(logits, setting)[0])
    found = []
    for index in range(len(setting.bias)):
        for bias in _breakpoints(logits, setting, index):
            beyond = _decisions_beyond(logits, setting, index, bias)
            found += [Flip(index, bias, then) for then in beyond if then != now]
    found.sort(key=lambda flip: abs(flip.bias - setting.bias[flip.knob]))
    nearest: dict[int, Flip] = {}
    for flip in found:
        nearest.setdefault(flip.knob, flip)
    return list(nearest.values())


def _breakpoints(logits: Floats, setting: Knobs, index: int) -> list[float]:
    """Where the decision can change as one knob moves: its margin crosses 0, or it overtakes."""
    if setting.rule == "bias":
        others = np.delete(logits[0, 1:] + setting.bias, index)
        rivals = [float(logits[0, 0]), *(float(value) for value in others)]
        return [rival - float(logits[0, 1 + index]) for rival in rivals]
    margin, category = margins(logits, setting)
    if category[0] != index + 1:
        return []
    return [float(setting.bias[index] - margin[0])]


def _decisions_beyond(logits: Floats, setting: Knobs, index: int, bias: float) -> list[int]:
    """The decision just beyond a breakpoint; at a tie, where the knob stands on it, both sides."""
    way = bias - setting.bias[index]
    steps = (STEP, -STEP) if abs(way) < STEP else (np.copysign(STEP, way),)
    decisions = []
    for step in steps:
        moved = setting.bias.copy()
        moved[index] = bias + step
        decisions.append(int(decide(logits, replace(setting, bias=moved))[0]))
    return decisions
