"""Biases that meet demands on refusal rates.

Every rule refuses a prompt when some knob exceeds a number that belongs to that prompt and knob:
its *gap*. ``bias`` gives a prompt a finite gap for every knob, ``route`` and ``threshold`` for the
one knob it is routed to. So a greedy target is a choice of one gap per knob. Where each prompt has
one knob, that choice is a small integer programme, solved exactly (scipy's HiGHS); for ``bias`` it
is searched knob by knob, exactly along each knob, from several starts. Sampled rates are smooth in
the biases and are solved with sequential quadratic programming.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp, minimize

from refusal_tokens.arrays import Floats, Mask
from refusal_tokens.decision import Knobs, Rule, gaps, probabilities
from refusal_tokens.profiles import Profile
from refusal_tokens.targets import Demand

Decision = Literal["greedy", "sampled"]
# How far, in nats, a bias goes past the outermost gap when everything or nothing is to be refused.
BEYOND = 1.0
# No knob is moved further than this by the smooth solver; sigmoid(-30) is 1e-13.
MAX_BIAS = 30.0
# A rate this near a target meets it: the smooth solver stops within it.
TOLERANCE = 1e-4
# Where the search for `bias` holds one knob while the others settle anew, as quantiles of its gaps.
HELD_AT = (0.02, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8)
MAX_ROUNDS = 3


@dataclass(frozen=True)
class Problem:
    """Demands over a profile, and the knobs that may move to meet them.

    Attributes:
        profile: the rows.
        rule: the decision rule.
        decision: ``greedy`` or ``sampled`` (at temperature 1).
        wanted: the demands.
        free: (knobs,), which knobs may move; the others stay at 0.
        fewest_misses: what breaks ties; see ``Targets``.
    """

    profile: Profile
    rule: Rule
    decision: Decision
    wanted: list[Demand]
    free: NDArray[np.bool_]
    fewest_misses: bool

    def setting(self, bias: Floats) -> Knobs:
        """Return these biases, (knobs,), as a setting of the knobs."""
        return Knobs(
            self.rule, bias, np.full(len(bias), -np.inf), 0.0 if self.decision == "greedy" else 1.0
        )

    def refused(self, bias: Floats) -> Floats:
        """(prompts,), the probability that each prompt is refused: 0 or 1 if greedy."""
        chances = probabilities(self.profile.control_logits, self.setting(bias))
        return np.asarray(1.0 - chances[:, 0])

    @property
    def counted(self) -> Mask:
        """The rows that break ties: respond rows refused, or refuse rows missed."""
        return self.profile.is_label("refuse" if self.fewest_misses else "respond")

    def cost(self, refused: Floats) -> tuple[float, float]:
        """Total excess over the targets, then the share of the rows that break ties."""
        excess = sum(float(d.excess(refused[d.rows].mean())) for d in self.wanted)
        share = float(refused[self.counted].mean()) if self.counted.any() else 0.0
        return round(excess, 12), -share if self.fewest_misses else share

    def solve(self) -> Floats:
        """Return the biases, (knobs,), nats, that miss the demands by least, then cost least."""
        if self.decision == "sampled":
            return _solve_smooth(self)
        if self.rule == "bias" and self.free.sum() > 1:
            return _search(self)
        return _solve_exactly(self)


def _thresholds(gap: Floats) -> Floats:
    """Biases between the sorted gaps of one knob, and beyond both ends."""
    points = np.unique(gap[np.isfinite(gap)])
    if not len(points):
        return np.zeros(1)
    inner = (points[1:] + points[:-1]) / 2
    # Two neighbouring doubles have no number between them; the lower gap is exceeded by the upper.
    inner = np.where(inner > points[:-1], inner, points[1:])
    return np.concatenate([[points[0] - BEYOND], inner, [points[-1] + BEYOND]])


def _solve_exactly(problem: Problem) -> Floats:
    """Choose one threshold per free knob with an integer programme.

    Variables: one binary per knob and threshold (exactly one chosen per knob), and two slacks per
    demand. In the objective a prompt of slack outweighs the whole tie-break.
    """
    gap = gaps(problem.profile.control_logits, problem.rule)
    fixed: Mask = np.asarray((gap[:, ~problem.free] < 0.0).any(axis=1))
    knobs = np.flatnonzero(problem.free)
    choices = [_thresholds(gap[~fixed, k]) for k in knobs]
    counts = [_counts(problem, gap[:, k], fixed, choices[i]) for i, k in enumerate(knobs)]
    per_choice = np.concatenate(counts, axis=1)
    start = np.array([(fixed & d.rows).sum() for d in problem.wanted], dtype=np.float64)
    n_choices, n_demands = per_choice.shape[1], len(problem.wanted)
    one_each = np.zeros((len(knobs), n_choices + 2 * n_demands))
    begin = 0
    for i, options in enumerate(choices):
        one_each[i, begin : begin + len(options)] = 1.0
        begin += len(options)
    rows, low, high = _demand_rows(problem, per_choice[:-1], start)
    weight = len(problem.profile) + 1.0
    sign = -1.0 if problem.fewest_misses else 1.0
    objective = np.concatenate([sign * per_choice[-1], np.full(2 * n_demands, weight)])
    whole = np.concatenate([np.ones(n_choices), np.zeros(2 * n_demands)])
    result = milp(
        objective,
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(rows, low, high)],
        integrality=whole,
        bounds=Bounds(0, np.where(whole == 1, 1, np.inf)),
        # By default HiGHS stops within 0.01% of the best, which is whole prompts here.
        options={"mip_rel_gap": 0.0},
    )
    if result.x is None:
        raise RuntimeError(f"the integer programme was not solved: {result.message}")
    bias = np.zeros(len(problem.free))
    begin = 0
    for k, options in zip(knobs, choices, strict=True):
        bias[k] = options[int(result.x[begin : begin + len(options)].argmax())]
        begin += len(options)
    return bias


def _counts(problem: Problem, gap: Floats, fixed: Mask, choices: Floats) -> Floats:
    """(demands + 1, choices): rows that one knob refuses, per demand; last, those of the tie-break.

    Only rows that no fixed knob refuses already are counted.
    """
    groups = [*(d.rows for d in problem.wanted), problem.counted]
    columns = [
        np.searchsorted(np.sort(gap[group & ~fixed]), choices, side="left") for group in groups
    ]
    return np.array(columns, dtype=np.float64)


def _demand_rows(
    problem: Problem, per_choice: Floats, start: Floats
) -> tuple[Floats, Floats, Floats]:
    """Constraint rows ``count + short - over`` within bounds, in prompts, one a demand."""
    n = len(problem.wanted)
    rows = np.hstack([per_choice, np.eye(n), -np.eye(n)])
    low, high = np.full(n, -np.inf), np.full(n, np.inf)
    for i, demand in enumerate(problem.wanted):
        count = demand.value * demand.n - start[i]
        # A hair of room: 0.99 * 100 is not 99 in binary.
        if demand.kind != "at_most":
            low[i] = count - 1e-9
        if demand.kind != "at_least":
            high[i] = count + 1e-9
    return rows, low, high


def _search(problem: Problem) -> Floats:
    """Search knob by knob, each exactly over its gaps, from several starts; keep the best.

    A knob that refuses a prompt hides it from the other knobs, so that no single knob can be moved
    for the better though two together could. From the best setting found, each knob is therefore
    held at some of its gaps while the others settle anew.
    """
    gap = gaps(problem.profile.control_logits, problem.rule)
    low = np.where(problem.free, gap.min(axis=0) - BEYOND, 0.0)
    high = np.where(problem.free, gap.max(axis=0) + BEYOND, 0.0)
    routed = _solve_exactly(replace(problem, rule="route"))
    starts = [low, np.zeros(len(low)), (low + high) / 2, high, routed]
    found = [_descend(problem, gap, start.copy(), problem.free) for start in starts]
    best, cost = min(found, key=lambda one: one[1])
    for _ in range(MAX_ROUNDS):
        before = cost
        for knob in np.flatnonzero(problem.free):
            others = problem.free & (np.arange(len(low)) != knob)
            for value in np.quantile(gap[:, knob], HELD_AT):
                held = best.copy()
                held[knob] = value
                settled, _ = _descend(problem, gap, held, others)
                moved, reached_cost = _descend(problem, gap, settled, problem.free)
                if reached_cost < cost:
                    best, cost = moved, reached_cost
        if not cost < before:
            break
    return best


def _descend(
    problem: Problem, gap: Floats, bias: Floats, free: Mask
) -> tuple[Floats, tuple[float, float]]:
    """Move the free knobs in turn, each to its best threshold, until none gains; changes bias."""
    cost = problem.cost(np.asarray((bias > gap).any(axis=1), dtype=np.float64))
    while True:
        before = cost
        for k in np.flatnonzero(free):
            others: Mask = np.asarray(np.delete(bias > gap, k, axis=1).any(axis=1))
            value, reached = _best_threshold(problem, gap[:, k], others)
            if reached < cost:
                bias[k], cost = value, reached
        if not cost < before:
            return bias, cost


def _best_threshold(
    problem: Problem, gap: Floats, others: Mask
) -> tuple[float, tuple[float, float]]:
    """The best threshold of one knob while the others stand."""
    choices = _thresholds(gap[~others])
    counts = _counts(problem, gap, others, choices)
    excess = np.zeros(len(choices))
    for i, demand in enumerate(problem.wanted):
        share = (counts[i] + (others & demand.rows).sum()) / demand.n
        excess += demand.excess(share)
    size = max(1, int(problem.counted.sum()))
    tie = (counts[-1] + (others & problem.counted).sum()) / size
    tie = -tie if problem.fewest_misses else tie
    first = int(np.lexsort((tie, np.round(excess, 12)))[0])
    return float(choices[first]), (round(float(excess[first]), 12), float(tie[first]))


def _solve_smooth(problem: Problem) -> Floats:
    """Sampled rates: least excess first, then the tie-break within it, by SLSQP."""
    knobs = np.flatnonzero(problem.free)
    greedy = replace(problem, decision="greedy").solve()
    starts = [np.zeros(len(knobs)), np.clip(greedy[knobs], -MAX_BIAS, MAX_BIAS)]
    smooth = _Smooth(problem, knobs)
    limits = [(-MAX_BIAS, MAX_BIAS)] * len(knobs)
    options = {"ftol": 1e-14, "maxiter": 200}
    nearest = min(
        (
            minimize(smooth.excess, start, method="SLSQP", bounds=limits, options=options).x
            for start in starts
        ),
        key=smooth.excess,
    )
    found = [nearest]
    sides = smooth.sides(nearest)
    for start in (nearest, *starts):
        best = minimize(
            smooth.tie,
            start,
            method="SLSQP",
            bounds=limits,
            constraints=[{"type": "ineq", "fun": side} for side in sides],
            options={"ftol": 1e-9, "maxiter": 200},
        ).x
        if all(side(best).min() > -TOLERANCE / 2 for side in sides):
            found.append(best)
    return smooth.full(min(found, key=smooth.tie))


@dataclass(frozen=True)
class _Smooth:
    """A problem as functions of the free biases, (free knobs,), for scipy's solvers."""

    problem: Problem
    knobs: NDArray[np.int64]

    def full(self, values: Floats) -> Floats:
        bias = np.zeros(len(self.problem.free))
        bias[self.knobs] = values
        return bias

    def shares(self, values: Floats) -> Floats:
        refused = self.problem.refused(self.full(values))
        return np.array([refused[d.rows].mean() for d in self.problem.wanted])

    def tie(self, values: Floats) -> float:
        return self.problem.cost(self.problem.refused(self.full(values)))[1]

    def excess(self, values: Floats) -> float:
        pairs = zip(self.problem.wanted, self.shares(values), strict=True)
        return float(sum(d.excess(share) ** 2 for d, share in pairs))

    def sides(self, nearest: Floats) -> list[Any]:
        """Functions that are 0 or above where every demand is as well met as at ``nearest``."""
        wanted = self.problem.wanted
        values = np.array([d.value for d in wanted])
        pairs = zip(wanted, self.shares(nearest), strict=True)
        room = np.array([float(d.excess(share)) for d, share in pairs])
        lower = np.array([d.kind != "at_most" for d in wanted])
        upper = np.array([d.kind != "at_least" for d in wanted])
        sides = []
        if lower.any():
            sides.append(lambda v: (self.shares(v) - values + room)[lower])
        if upper.any():
            sides.append(lambda v: (values + room - self.shares(v))[upper])
        return sides
