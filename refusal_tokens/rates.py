"""Shares with their n and interval, and the area under a ROC curve."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

from refusal_tokens.arrays import Floats, Mask


@dataclass(frozen=True)
class Rate:
    """A share with its n and 95% Wilson interval. ``value`` is None where n is 0."""

    count: float
    n: int
    value: float | None
    low: float | None
    high: float | None

    def __str__(self) -> str:
        if self.value is None or self.low is None or self.high is None:
            return "no prompts"
        low, high = f"{100 * self.low:.0f}", f"{100 * self.high:.0f}"
        return f"{100 * self.value:5.1f}%  [{low}, {high}]  n={self.n}"


def wilson(share: NDArray[np.floating], n: float) -> tuple[Floats, Floats]:
    """Return the 95% score interval of shares of n prompts (Wilson 1927)."""
    share = np.asarray(share, dtype=np.float64)
    z = ndtri(0.975)
    middle = share + z**2 / (2 * n)
    half = z * np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    scale = 1 + z**2 / n
    # The interval holds its share; at 0 and 1 rounding could leave it a hair outside.
    low, high = (middle - half) / scale, (middle + half) / scale
    return np.clip(low, 0.0, share), np.clip(high, share, 1.0)


def rate(count: float, n: int) -> Rate:
    """Return a share with its Wilson interval; an expected count need not be whole.

    >>> str(rate(9, 10))
    ' 90.0%  [60, 98]  n=10'
    """
    if n == 0:
        return Rate(0, 0, None, None, None)
    low, high = wilson(np.array(count / n), n)
    return Rate(count, n, count / n, float(low), float(high))


def clustered_rate(hits: Sequence[bool], clusters: Sequence[Hashable]) -> Rate:
    """Return the share of hits among items that come in clusters, such as replies to one prompt.

    Wilson's interval of as many independent items as the clusters are worth: n over the design
    effect, which is the variance of the share between clusters over that of independent items (Rao
    and Scott 1992, Biometrics 48). It is never taken below 1; where all items are alike, which
    tells nothing of it, each cluster counts as one item. With few clusters, or one lone miss, it is
    a rough estimate.

    Args:
        hits: one an item.
        clusters: which one each item belongs to.

    >>> str(clustered_rate([True, True, False, False], ["a", "a", "b", "b"]))
    ' 50.0%  [5, 95]  n=4'
    """
    n = len(hits)
    if len(set(clusters)) == n:
        return rate(sum(hits), n)
    share = sum(hits) / n
    excess: dict[Hashable, float] = {}
    for hit, cluster in zip(hits, clusters, strict=True):
        excess[cluster] = excess.get(cluster, 0.0) + hit - share
    m = len(excess)
    worth = float(m)
    if 0 < share < 1 and m > 1:
        between = m / (m - 1) * sum(value**2 for value in excess.values()) / n**2
        worth = n / max(1.0, between / (share * (1 - share) / n))
    low, high = wilson(np.array(share), worth)
    return Rate(sum(hits), n, share, float(low), float(high))


def auc(scores: NDArray[np.floating], positive: Mask) -> float | None:
    """Return the area under the ROC curve, ties counted half; None unless both classes occur."""
    n_positive = int(positive.sum())
    n_negative = len(positive) - n_positive
    if not n_positive or not n_negative:
        return None
    scores = np.asarray(scores)
    below = np.sort(scores[~positive])
    wins = np.searchsorted(below, scores[positive], side="left").sum()
    ties = np.searchsorted(below, scores[positive], side="right").sum() - wins
    return float((wins + ties / 2) / (n_positive * n_negative))
