"""Asked-for rates to biases, or the nearest reachable point and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from refusal_tokens.arrays import Floats
from refusal_tokens.decision import Knobs, Rule, probabilities
from refusal_tokens.profiles import Profile
from refusal_tokens.rates import Rate, rate
from refusal_tokens.solvers import TOLERANCE, Decision, Problem
from refusal_tokens.targets import Demand, Targets, demands, free_knobs


@dataclass(frozen=True)
class Reached:
    """One target beside what a setting reaches: ``asked`` 0 to 1, ``met`` within one prompt."""

    name: str
    kind: str
    asked: float
    rate: Rate
    met: bool


@dataclass(frozen=True)
class Solution:
    """The biases found for a set of targets.

    Attributes:
        bias: knob -> nats.
        rule: the decision rule.
        decision: ``greedy`` or ``sampled`` (at temperature 1).
        reached: every target on the rows solved on.
        over_refusal: of all respond rows.
        feasible: whether every floor and ceiling is kept, and every rate is within one prompt.
        reasons: why not; empty if feasible.
    """

    bias: Mapping[str, float]
    rule: Rule
    decision: Decision
    reached: tuple[Reached, ...]
    over_refusal: Rate
    feasible: bool
    reasons: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return asdict(self)


def solve(
    profile: Profile,
    targets: Targets,
    *,
    rule: Rule = "route",
    decision: Decision = "greedy",
) -> Solution:
    """Find the biases that reach the targets on a profile, with the least over-refusal.

    Knobs that no target names stay at 0; a ceiling or preset alone frees them all.

    Raises:
        InputError: for targets that are wrong in themselves. Targets that are merely out of reach
            give a solution with ``feasible`` False: the nearest reachable point.
    """
    wanted = demands(profile, targets)
    free = free_knobs(profile, targets)
    problem = Problem(profile, rule, decision, wanted, free, targets.fewest_misses)
    bias = problem.solve()
    return _describe(problem, bias)


def reached(profile: Profile, targets: Targets, setting: Knobs) -> tuple[Reached, ...]:
    """Return every target beside what a setting reaches on a profile.

    Sampled settings give expected rates.

    Raises:
        InputError: if the profile lacks rows that a target counts.
    """
    return _reached(profile, demands(profile, targets), setting)


def _reached(profile: Profile, wanted: list[Demand], setting: Knobs) -> tuple[Reached, ...]:
    refused = 1.0 - probabilities(profile.control_logits, setting)[:, 0]
    found = []
    for demand in wanted:
        share = rate(float(refused[demand.rows].sum()), demand.n)
        slack = 1.0 / demand.n if demand.kind == "equal" else 0.0
        met = demand.excess(share.value) <= slack + TOLERANCE
        found.append(Reached(demand.name, demand.kind, demand.value, share, bool(met)))
    return tuple(found)


def over_refusal(profile: Profile, setting: Knobs) -> Rate:
    """Return the over-refusal of all respond rows at a setting."""
    refused = 1.0 - probabilities(profile.control_logits, setting)[:, 0]
    benign = profile.is_label("respond")
    return rate(float(refused[benign].sum()), int(benign.sum()))


def _describe(problem: Problem, bias: Floats) -> Solution:
    profile, setting = problem.profile, problem.setting(bias)
    found = _reached(profile, problem.wanted, setting)
    names = profile.taxonomy.knobs
    return Solution(
        bias={name: float(value) for name, value in zip(names, bias, strict=True) if value},
        rule=problem.rule,
        decision=problem.decision,
        reached=found,
        over_refusal=over_refusal(profile, setting),
        feasible=all(entry.met for entry in found),
        reasons=tuple(
            _reason(problem, demand, setting)
            for demand, entry in zip(problem.wanted, found, strict=True)
            if not entry.met
        ),
    )


def _reason(problem: Problem, demand: Demand, setting: Knobs) -> str:
    """Say which rows keep a target from being met, and through which knobs."""
    profile = problem.profile
    chances = problem.refused(setting.bias)
    refused = chances > 0.5
    short = float(chances[demand.rows].mean()) < demand.value
    rows = np.flatnonzero(demand.rows & (~refused if short else refused))
    knobs = profile.control_logits[:, 1:].argmax(axis=1)
    parts = []
    for k, knob in enumerate(profile.taxonomy.knobs):
        own = rows[knobs[rows] == k]
        if not len(own):
            continue
        stays = "" if problem.free[k] else " (not named, so it stays at 0)"
        ids = ", ".join(str(profile.columns["id"][i]) for i in own[:3])
        more = ", ..." if len(own) > 3 else ""
        parts.append(f"{len(own)} lean to {knob}{stays}: {ids}{more}")
    side = "are not refused" if short else "are refused"
    return f"{demand.name}: {len(rows)} of {demand.n} rows {side}; " + "; ".join(parts)


def frontier(
    profile: Profile,
    targets: Targets,
    *,
    rule: Rule = "route",
    decision: Decision = "greedy",
    ceilings: tuple[float, ...] = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5),
) -> list[tuple[float, Solution]]:
    """Return the nearest reachable point under each ceiling on over-refusal.

    What an unreachable request is answered with: how much over-refusal its floors would cost.
    """
    return [
        (
            ceiling,
            solve(
                profile, replace(targets, max_over_refusal=ceiling), rule=rule, decision=decision
            ),
        )
        for ceiling in ceilings
    ]
