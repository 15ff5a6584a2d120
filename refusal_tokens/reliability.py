"""Are the control probabilities honest? Reliability, log-loss, Brier score, temperature scaling."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

from refusal_tokens.arrays import Floats
from refusal_tokens.errors import InputError
from refusal_tokens.profiles import Profile, split_profile
from refusal_tokens.rates import wilson
from refusal_tokens.resampling import Measure, group_counts, measure

BINS = 10
BOOTSTRAPS = 200
# Temperatures tried, as natural logarithms.
LOG_TEMPERATURES = (-3.0, 3.0)


@dataclass(frozen=True)
class Reliability:
    """How far the refusal probability can be taken at its word.

    Attributes:
        n: labelled prompts.
        predicted: (bins,), mean refusal probability in bins of equal numbers of prompts.
        observed: (bins,), share labelled refuse.
        low: (bins,), lower end of its 95% Wilson interval.
        high: (bins,), upper end.
        counts: (bins,), prompts.
        log_loss: of the control token asked for, nats.
        brier: of refusal against response, 0 to 1.
        classwise_error: mean over control tokens of the gap between probability and frequency,
            over bins (Kull et al. 2019).
    """

    n: int
    predicted: Floats
    observed: Floats
    low: Floats
    high: Floats
    counts: NDArray[np.int64]
    log_loss: Measure
    brier: Measure
    classwise_error: Measure


def reliability(profile: Profile, temperature: float | Floats = 1.0, seed: int = 0) -> Reliability:
    """Measure the control probabilities, softmax(z / temperature) over the control tokens.

    Args:
        profile: labelled prompts.
        temperature: one, or one a prompt.
        seed: of the bootstrap.

    Raises:
        InputError: if no prompt is labelled.
    """
    wanted = profile.token_index
    if not (wanted >= 0).any():
        raise InputError("reliability needs labelled prompts in the profile")
    divisor = np.broadcast_to(np.asarray(temperature, dtype=np.float64), len(profile))
    log_chances = _log_chances(profile.select(wanted >= 0), divisor[wanted >= 0])
    groups = profile.groups[wanted >= 0]
    wanted = wanted[wanted >= 0]
    refusal = 1.0 - np.exp(log_chances[:, 0])
    bins = _equal_bins(refusal)
    counts = np.bincount(bins, minlength=BINS)
    full = counts > 0
    predicted = np.bincount(bins, refusal, BINS)[full] / counts[full]
    observed = np.bincount(bins, wanted > 0, BINS)[full] / counts[full]
    ends = [wilson(np.array(o), int(c)) for o, c in zip(observed, counts[full], strict=True)]
    measures = _bootstrapped(log_chances, wanted, groups, seed)
    return Reliability(
        n=len(wanted),
        predicted=predicted,
        observed=observed,
        low=np.array([float(low) for low, _ in ends]),
        high=np.array([float(high) for _, high in ends]),
        counts=counts[full],
        **measures,
    )


def _log_chances(profile: Profile, temperature: Floats) -> Floats:
    logits = profile.control_logits.astype(np.float64) / temperature[:, None]
    return np.asarray(log_softmax(logits, axis=1))


def _equal_bins(values: Floats) -> NDArray[np.int64]:
    """(prompts,), the bin of each value: equal numbers a bin, equal values together."""
    edges = np.quantile(values, np.linspace(0, 1, BINS + 1)[1:-1])
    return np.searchsorted(edges, values, side="right")


def _log_loss(log_chances: Floats, wanted: NDArray[np.int64]) -> float:
    return float(-log_chances[np.arange(len(wanted)), wanted].mean())


def _bootstrapped(
    log_chances: Floats, wanted: NDArray[np.int64], groups: NDArray[np.int64], seed: int
) -> dict[str, Measure]:
    """The three measures, from sums per group: a draw then costs one product of matrices.

    Bins stay those of all prompts in every draw.
    """
    sums = _sums_by_group(log_chances, wanted, groups)
    whole = _measures(sums.sum(axis=0, keepdims=True))
    draws = [_measures(counts @ sums) for counts in group_counts(len(sums), BOOTSTRAPS, seed)]
    return {
        name: measure(float(value[0]), np.concatenate([part[name] for part in draws]))
        for name, value in whole.items()
    }


def _sums_by_group(
    log_chances: Floats, wanted: NDArray[np.int64], groups: NDArray[np.int64]
) -> Floats:
    """Sums that the measures are made of, (groups, 3 + tokens * bins).

    Prompts, log-losses, squared errors; then, in each bin of each token's probability, the
    probability less the frequency.
    """
    numbers = np.unique(groups, return_inverse=True)[1].reshape(-1)
    n_groups, tokens = int(numbers.max()) + 1, log_chances.shape[1]
    refusal = 1.0 - np.exp(log_chances[:, 0])
    log_losses = -log_chances[np.arange(len(wanted)), wanted]
    columns = [np.ones(len(wanted)), log_losses, np.square(refusal - (wanted > 0))]
    sums = np.stack([np.bincount(numbers, column, n_groups) for column in columns], axis=1)
    binned = np.zeros((n_groups, tokens * BINS))
    for token in range(tokens):
        chances = np.exp(log_chances[:, token])
        places = numbers * BINS + _equal_bins(chances)
        gap = np.bincount(places, chances - (wanted == token), n_groups * BINS)
        binned[:, token * BINS : (token + 1) * BINS] = gap.reshape(n_groups, BINS)
    return np.hstack([sums, binned])


def _measures(sums: Floats) -> dict[str, Floats]:
    """Each (draws,), from (draws, 3 + tokens * bins) sums."""
    n = sums[:, 0]
    error = np.abs(sums[:, 3:]).sum(axis=1) / ((sums.shape[1] - 3) // BINS)
    return {"log_loss": sums[:, 1] / n, "brier": sums[:, 2] / n, "classwise_error": error / n}


def fit_temperature(profile: Profile) -> float:
    """Return the temperature with the least log-loss (Guo et al. 2017).

    Raises:
        InputError: if no prompt is labelled.
    """
    wanted = profile.token_index
    if not (wanted >= 0).any():
        raise InputError("temperature scaling needs labelled prompts in the profile")
    labelled = profile.select(wanted >= 0)
    wanted = wanted[wanted >= 0]

    def loss(log_temperature: float) -> float:
        divisor = np.full(len(wanted), np.exp(log_temperature))
        return _log_loss(_log_chances(labelled, divisor), wanted)

    found = minimize_scalar(loss, bounds=LOG_TEMPERATURES, method="bounded")
    return float(np.exp(found.x))


def cross_fitted_temperatures(profile: Profile) -> Floats:
    """(prompts,), for each prompt the temperature fitted on the half that it is not in.

    Halves are of whole groups, so that no prompt is scaled by what it taught.

    Raises:
        InputError: if a half has no labelled prompts.
    """
    first, second = split_profile(profile, seed="temperature")
    inside = np.isin(profile.columns["id"].astype(str), first.columns["id"].astype(str))
    return np.where(inside, fit_temperature(second), fit_temperature(first))
