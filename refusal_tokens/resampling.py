"""Bootstrap by group: rows of one group are drawn together or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from refusal_tokens.arrays import Floats

# Draws made at once: bounds memory at this many numbers a group, or a prompt.
CHUNK = 50


@dataclass(frozen=True)
class Measure:
    """A number with its 95% bootstrap interval, resampled by group."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f}  [{self.low:.3f}, {self.high:.3f}]"


def measure(value: float, draws: NDArray[np.floating]) -> Measure:
    """Return a number with the 95% percentile interval of its bootstrap draws.

    Draws that lack a label are NaN and left out; where none is left, the interval is NaN.
    """
    known = np.asarray(draws)[~np.isnan(draws)]
    low, high = np.quantile(known, [0.025, 0.975]) if len(known) else (np.nan, np.nan)
    return Measure(float(value), float(low), float(high))


def group_counts(n_groups: int, draws: int, seed: int) -> Iterator[Floats]:
    """Draw groups with replacement, as often as there are groups.

    Args:
        n_groups: how many there are, numbered from 0.
        draws: how many times.
        seed: of the draws.

    Yields:
        (up to ``CHUNK``, groups), how often each group was drawn; ``draws`` rows in all. Indexed
        with the group of each prompt, a row holds the prompts' weights in that draw.
    """
    random = np.random.default_rng(seed)
    for begin in range(0, draws, CHUNK):
        size = min(CHUNK, draws - begin)
        drawn = random.integers(n_groups, size=(size, n_groups))
        drawn += n_groups * np.arange(size)[:, None]
        counts = np.bincount(drawn.reshape(-1), minlength=size * n_groups)
        yield counts.reshape(size, n_groups).astype(np.float64)
