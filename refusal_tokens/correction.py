"""A rate corrected for the error of the judge that measured it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import ndtri

from refusal_tokens.rates import Rate


@dataclass(frozen=True)
class Corrected:
    """A true rate estimated from an observed one.

    Attributes:
        value: within [0, 1]; None where nothing was observed or the judge is useless.
        low, high: 95% interval; [0, 1] where the judge is useless.
        clipped: whether the estimate fell outside [0, 1] and was moved to its end.
        useless: sensitivity + specificity is at most 1, or the labels lack refusals or answers: the
            judge says nothing about the rate.
    """

    value: float | None
    low: float
    high: float
    clipped: bool
    useless: bool

    def __str__(self) -> str:
        if self.useless:
            return "not corrected: on the labels the judge does not tell refusals apart"
        if self.value is None:
            return "no replies"
        shown = f"{100 * self.value:5.1f}%  [{100 * self.low:.0f}, {100 * self.high:.0f}]"
        return shown + (" clipped" if self.clipped else "")


def corrected(observed: Rate, sensitivity: Rate, specificity: Rate) -> Corrected:
    """Estimate the true rate of refusals behind an observed one.

    (p + Sp - 1) / (Se + Sp - 1), Rogan and Gladen 1978, American Journal of Epidemiology 107. The
    interval is that of Lang and Reiczigel 2014, Preventive Veterinary Medicine 113: it counts the
    uncertainty of all three, with a success and a failure added to each (z²/2 to the observed
    rate). It takes the judge's errors to be the same on the labelled replies and on these.

    >>> from refusal_tokens.rates import rate
    >>> str(corrected(rate(50, 100), rate(90, 100), rate(95, 100)))
    ' 52.9%  [41, 66]'
    """
    if observed.value is None or sensitivity.value is None or specificity.value is None:
        useless = observed.value is not None
        return Corrected(None, 0.0, 1.0, False, useless)
    power = sensitivity.value + specificity.value - 1
    if power <= 0:
        return Corrected(None, 0.0, 1.0, False, True)
    value = (observed.value + specificity.value - 1) / power
    low, high = _interval(observed, sensitivity, specificity)
    # The interval's centre is shifted; it never leaves the estimate itself outside.
    kept = min(max(value, 0.0), 1.0)
    return Corrected(kept, min(low, kept), max(high, kept), value != kept, False)


def _interval(observed: Rate, sensitivity: Rate, specificity: Rate) -> tuple[float, float]:
    z = float(ndtri(0.975))
    n = observed.n + z**2
    share = (observed.count + z**2 / 2) / n
    n_se, n_sp = sensitivity.n + 2, specificity.n + 2
    se, sp = (sensitivity.count + 1) / n_se, (specificity.count + 1) / n_sp
    power = se + sp - 1
    if power <= 0:
        return 0.0, 1.0
    middle = (share + sp - 1) / power
    spread_se, spread_sp = se * (1 - se) / n_se, sp * (1 - sp) / n_sp
    shift = 2 * z**2 * (middle * spread_se - (1 - middle) * spread_sp)
    variance = share * (1 - share) / n + middle**2 * spread_se + (1 - middle) ** 2 * spread_sp
    half = z * float(np.sqrt(variance)) / power
    return max(0.0, middle + shift - half), min(1.0, middle + shift + half)
