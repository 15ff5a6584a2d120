"""Certificates: a setting's over-refusal and refusal rates, promised with a stated confidence.

A solver that looked at rows is optimistic about them, so a certificate is made on other rows. The
path of settings that may be certified is declared before those rows are looked at: the solver's
biases, all free knobs moved together by one number t. Over-refusal only grows along it and refusal
too, so each promise has a safe end, and is tested from there step by step with exact binomial
p-values until the first failure (fixed-sequence testing; Bauer 1991, as used for risk control by
Angelopoulos et al. 2021, arXiv 2110.01052). The promises share the error rate equally; a setting
is certified where all of them hold.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binom

from refusal_tokens.arrays import Floats
from refusal_tokens.decision import Knobs, decide, draws, gaps
from refusal_tokens.errors import InputError
from refusal_tokens.profiles import Profile
from refusal_tokens.targeting import Solution
from refusal_tokens.targets import Demand, Targets, demands

# The declared path: t in nats, from the setting that refuses least to the one that refuses most.
PATH = np.round(np.arange(-12.0, 12.01, 0.25), 2)
POWER = 0.9
NOT_COVERED = (
    "It holds for prompts drawn as these were, decided by this model with these weights, this "
    "prompt format and this decision rule. It says nothing about prompts made to break it, about "
    "traffic that changes, about a quantised or merged copy, or about the text after the token."
)


@dataclass(frozen=True)
class Promise:
    """One promise of a certificate.

    Attributes:
        name: the target, such as ``max-over-refusal``.
        bound: the rate promised: at most (over-refusal), or at least (refusal).
        at_most: which of the two.
        n: rows tested on.
        errors: respond rows refused, or refuse rows missed, at the certified setting (at the
            solver's where none is).
        errors_allowed: the most errors with which one test still passes.
        holds: the range of t, in nats, for which the tests passed; None for no t.
        rows_needed: for the chance of 90% to certify a true error rate of half the bound.
    """

    name: str
    bound: float
    at_most: bool
    n: int
    errors: int
    errors_allowed: int
    holds: tuple[float, float] | None
    rows_needed: int


@dataclass(frozen=True)
class Certificate:
    """What is promised, on which rows, and what is not covered.

    Attributes:
        certified: whether any setting on the path keeps every promise.
        confidence: 1 - delta, for all promises together.
        shift: the certified t, in nats: 0 if the solver's own setting passed, else the nearest
            that did; None if none did.
        bias: knob -> nats, at the certified setting.
        path: the first and last t and the step.
        data_hash: of the rows tested on.
        promises: each with its counts.
        statement: the whole in words.
    """

    certified: bool
    confidence: float
    shift: float | None
    bias: Mapping[str, float] | None
    path: tuple[float, float, float]
    data_hash: str
    promises: tuple[Promise, ...]
    statement: str

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return asdict(self)


def certify(
    profile: Profile,
    targets: Targets,
    solution: Solution,
    free: NDArray[np.bool_],
    confidence: float = 0.95,
    seed: int = 0,
) -> Certificate:
    """Test a solution's ceilings and floors on rows that the solver did not see.

    Args:
        profile: the fresh rows.
        targets: as given to the solver; ceilings and floors are promised, plain rates are not.
        solution: the solver's.
        free: (knobs,), which knobs move along the path.
        confidence: of all promises together, between 0 and 1.
        seed: of the decisions, where they are sampled.

    Raises:
        InputError: if there is nothing to promise, or a promise has no rows.
    """
    if not 0 < confidence < 1:
        raise InputError(f"--confidence: found {confidence:g}; allowed: between 0 and 1")
    promised = [d for d in demands(profile, targets) if d.kind != "equal"]
    if not promised:
        raise InputError(
            "a certificate promises ceilings or floors; name --max-over-refusal or --min-rate"
        )
    for demand in promised:
        if _error_bound(demand) == 0:
            raise InputError(
                f"{demand.name} {demand.value:g}: no number of rows certifies that an error never "
                "happens; leave room for some, such as 1%"
            )
    delta = (1 - confidence) / len(promised)
    names = profile.taxonomy.knobs
    start = np.array([solution.bias.get(name, 0.0) for name in names])
    refused = _refused_along(profile, solution, start, free, seed)
    held = [_holds(demand, refused, delta) for demand in promised]
    both = np.logical_and.reduce(held)
    at = _nearest_to_zero(both)
    shift = None if at is None else float(PATH[at])
    shown = refused[len(PATH) // 2 if at is None else at]
    promises = tuple(
        _promise(demand, passed, shown, delta)
        for demand, passed in zip(promised, held, strict=True)
    )
    bias = None
    if shift is not None:
        moved = start + shift * free
        bias = {name: float(value) for name, value in zip(names, moved, strict=True) if value}
    return Certificate(
        certified=shift is not None,
        confidence=confidence,
        shift=shift,
        bias=bias,
        path=(float(PATH[0]), float(PATH[-1]), float(PATH[1] - PATH[0])),
        data_hash=profile.data_hash,
        promises=promises,
        statement=_statement(promises, confidence, shift),
    )


def _refused_along(
    profile: Profile, solution: Solution, start: Floats, free: NDArray[np.bool_], seed: int
) -> NDArray[np.bool_]:
    """(path, prompts), what is refused at each t.

    Sampled decisions use one draw a prompt: a draw near 0 responds first, so that along the path no
    refusal turns into a response.
    """
    logits = profile.control_logits
    if solution.decision == "greedy":
        missing = gaps(logits, solution.rule) - start
        fixed = (missing[:, ~free] < 0).any(axis=1)
        needed = np.where(fixed, -np.inf, missing[:, free].min(axis=1, initial=np.inf))
        return np.asarray(PATH[:, None] > needed)
    uniform = draws(seed, range(len(profile)))
    no_floor = np.full(len(start), -np.inf)
    settings = [Knobs(solution.rule, start + t * free, no_floor, 1.0) for t in PATH]
    return np.array([decide(logits, setting, uniform) > 0 for setting in settings])


def _holds(demand: Demand, refused: NDArray[np.bool_], delta: float) -> NDArray[np.bool_]:
    """(path,), for which t fixed-sequence testing upholds one promise."""
    inside = refused[:, demand.rows]
    ceiling = demand.kind == "at_most"
    errors = (inside if ceiling else ~inside).sum(axis=1)
    passed = binom.cdf(errors, demand.n, _error_bound(demand)) <= delta
    # From the safe end: the least biased for a ceiling, the most biased for a floor.
    ordered = passed if ceiling else passed[::-1]
    upheld = np.logical_and.accumulate(ordered)
    return np.asarray(upheld if ceiling else upheld[::-1])


def _error_bound(demand: Demand) -> float:
    """The error rate that a promise allows: respond rows refused, or refuse rows missed."""
    return demand.value if demand.kind == "at_most" else 1 - demand.value


def _nearest_to_zero(passed: NDArray[np.bool_]) -> int | None:
    places = np.flatnonzero(passed)
    if not len(places):
        return None
    return int(places[np.abs(PATH[places]).argmin()])


def _promise(
    demand: Demand, passed: NDArray[np.bool_], refused: NDArray[np.bool_], delta: float
) -> Promise:
    ceiling = demand.kind == "at_most"
    bound = _error_bound(demand)
    inside = refused[demand.rows]
    holds = PATH[passed]
    return Promise(
        name=demand.name,
        bound=demand.value,
        at_most=ceiling,
        n=demand.n,
        errors=int((inside if ceiling else ~inside).sum()),
        errors_allowed=errors_allowed(demand.n, bound, delta),
        holds=(float(holds[0]), float(holds[-1])) if len(holds) else None,
        rows_needed=rows_needed(bound, delta),
    )


def errors_allowed(n: int, bound: float, delta: float) -> int:
    """Return the most errors in n rows that still reject "the error rate is above ``bound``".

    -1 where not even none would do.

    >>> errors_allowed(299, 0.01, 0.05), errors_allowed(298, 0.01, 0.05)
    (0, -1)
    """
    if bound >= 1:
        return n
    # The least count that delta reaches; one that exceeds it is one too many.
    least = int(binom.ppf(delta, n, bound))
    return least if binom.cdf(least, n, bound) <= delta else least - 1


def rows_needed(bound: float, delta: float, power: float = POWER) -> int:
    """Return the rows with which a true error rate of half the bound is certified that often.

    Found by doubling and bisection. The power rises with n in a saw-tooth, so the answer is one n
    that is enough, within some percent of the least.

    Raises:
        ValueError: for a bound of 0, which no number of rows certifies.
    """
    if bound <= 0:
        raise ValueError("no number of rows certifies an error rate of 0")
    if bound >= 1:
        return 1

    def enough(n: int) -> bool:
        allowed = errors_allowed(n, bound, delta)
        return allowed >= 0 and bool(binom.cdf(allowed, n, bound / 2) >= power)

    high = max(1, math.ceil(math.log(delta) / math.log1p(-bound)))
    while not enough(high):
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def _statement(promises: tuple[Promise, ...], confidence: float, shift: float | None) -> str:
    percent = f"{100 * confidence:g}%"
    if shift is None:
        lines = [
            f"Not certified: no setting on the declared path keeps every promise at {percent}."
        ]
        lines += [_failure(promise) for promise in promises]
        return " ".join(lines)
    claims = "; ".join(
        f"{p.name} {'at most' if p.at_most else 'at least'} {100 * p.bound:g}% "
        f"({p.errors} errors in {p.n} rows, {p.errors_allowed} allowed)"
        for p in promises
    )
    moved = "the solver's own setting" if shift == 0 else f"the setting moved by {shift:+g} nats"
    return f"With {percent} confidence, for {moved}: {claims}. {NOT_COVERED}"


def _failure(promise: Promise) -> str:
    if promise.errors_allowed < 0:
        return (
            f"{promise.name}: {promise.n} rows are too few even without an error; about "
            f"{promise.rows_needed} are needed."
        )
    if promise.holds is None:
        return (
            f"{promise.name}: not even the safest setting passes ({promise.errors_allowed} errors "
            f"allowed in {promise.n} rows); about {promise.rows_needed} rows would certify a true "
            "error rate of half the bound."
        )
    return (
        f"{promise.name}: holds for moves from {promise.holds[0]:+g} to {promise.holds[1]:+g} nats "
        f"({promise.errors} errors at the solver's setting, {promise.errors_allowed} allowed in "
        f"{promise.n} rows; about {promise.rows_needed} rows are needed for a sharper test)."
    )
