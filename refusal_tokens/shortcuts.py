"""Shortcuts: how well bare words, or bare form, tell refusals from their near-misses.

A near-miss shares the topic of a refusal but should be answered. Where a bag of words tells the two
apart, a model can learn the words in place of the difference.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refusal_tokens.arrays import Floats, Mask
from refusal_tokens.forms import form_features, words
from refusal_tokens.rows import Row
from refusal_tokens.taxonomy import RESPOND

FOLDS = 5
MIN_ROWS = 10
TELLING = 10
HIGH = 0.75


@dataclass(frozen=True)
class Area:
    """An area under the ROC curve with its 95% interval: 0.5 is chance, 1 tells all apart."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


@dataclass(frozen=True)
class Word:
    """A word, or two words in a row, with the rows of each label that hold it."""

    text: str
    refuse: int
    respond: int

    def __str__(self) -> str:
        return f"{self.text} {self.refuse}:{self.respond}"


@dataclass(frozen=True)
class Shortcut:
    """What tells the refuse rows of a category from its near-miss respond rows.

    Attributes:
        refuse: number of refuse rows.
        respond: number of near-miss respond rows.
        words: how well a bag of words does on groups it has not seen; None with too few rows, or
            where no word occurs in two of them.
        form: how well length, punctuation and opening do, without any word; None with too few rows.
        refuse_words: the words that speak most for a refusal, strongest first.
        respond_words: the words that speak most for an answer, strongest first.
    """

    category: str
    refuse: int
    respond: int
    words: Area | None
    form: Area | None
    refuse_words: tuple[Word, ...]
    respond_words: tuple[Word, ...]


def find_shortcuts(rows: Sequence[Row], category: str) -> Shortcut:
    """Measure the shortcuts of one category over all its rows.

    Both classifiers are logistic regressions, scored on held-out groups in ``FOLDS`` folds. A class
    needs ``MIN_ROWS`` rows in ``FOLDS`` groups; below that the areas are None. The intervals allow
    for the draw of the held-out groups, not for that of the groups learnt from: on simulated sets
    of 60 to 300 rows without any shortcut they held 0.5 in 80% to 98% of cases.
    """
    own = [row for row in rows if row.category == category and row.label is not None]
    own.sort(key=lambda row: (row.group, row.id, row.prompt_text))
    refuse = np.array([row.label != RESPOND for row in own], dtype=bool)
    groups = np.unique([row.group for row in own], return_inverse=True)[1]
    sizes = int(refuse.sum()), int((~refuse).sum())
    if not own or any(
        mask.sum() < MIN_ROWS or len(set(groups[mask])) < FOLDS for mask in (refuse, ~refuse)
    ):
        return Shortcut(category, *sizes, None, None, (), ())
    features = np.array([form_features(row) for row in own], dtype=np.float64)
    form = _area(_form_model(), features, refuse, groups)
    names, counts = _word_counts([row.prompt_text for row in own])
    if not names:
        return Shortcut(category, *sizes, None, form, (), ())
    area = _area(_regression(), counts, refuse, groups)
    return Shortcut(category, *sizes, area, form, *_telling_words(names, counts, refuse))


def _word_counts(texts: Sequence[str]) -> tuple[Sequence[str], Any]:
    """Return words and pairs of words, and a sparse (rows, words) matrix of 1 where one occurs.

    Words of a single row are left out; there may be no others. The words come from all rows,
    without their labels, so held-out labels stay unseen.
    """
    if max(Counter(word for text in texts for word in set(words(text))).values(), default=0) < 2:
        return [], None
    from sklearn.feature_extraction.text import CountVectorizer

    counter = CountVectorizer(
        binary=True, ngram_range=(1, 2), tokenizer=words, token_pattern=None, min_df=2
    )
    counts = counter.fit_transform(texts)
    return [str(name) for name in counter.get_feature_names_out()], counts


def _form_model() -> Any:
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), _regression())


def _regression() -> Any:
    from sklearn.linear_model import LogisticRegression

    # Balanced, so that the scores of folds with other shares of refusals can be pooled.
    return LogisticRegression(class_weight="balanced", solver="liblinear", random_state=0)


def _area(model: Any, inputs: Any, refuse: Mask, groups: NDArray[np.intp]) -> Area | None:
    """Cross-validate by group; None where a fold leaves one class without rows to learn from."""
    from sklearn.model_selection import StratifiedGroupKFold

    scores = np.zeros(len(refuse))
    for train, held_out in StratifiedGroupKFold(FOLDS).split(groups, refuse, groups):
        if len(set(refuse[train])) < 2:
            return None
        model.fit(inputs[train], refuse[train])
        scores[held_out] = model.decision_function(inputs[held_out])
    return grouped_area(scores, refuse, groups)


def grouped_area(scores: Floats, positive: Mask, groups: NDArray[np.intp]) -> Area:
    """Return the AUC with a 95% interval that allows for likeness within groups.

    Obuchowski (1997), Nonparametric analysis of clustered ROC curve data, Biometrics 53: DeLong's
    structural components, summed by group. The interval is cut to [0, 1].

    Args:
        scores: (rows,), higher for positive.
        positive: (rows,), both classes present.
        groups: (rows,), a number from 0 for each row's group.
    """
    from scipy.stats import rankdata

    n, m = int(positive.sum()), int((~positive).sum())
    ranks = rankdata(scores)
    # Share of the other class that each row stands above (positives) or below (negatives).
    placement = np.empty(len(scores))
    placement[positive] = (ranks[positive] - rankdata(scores[positive])) / m
    placement[~positive] = 1 - (ranks[~positive] - rankdata(scores[~positive])) / n
    value = float(placement[positive].mean())
    excess = placement - value
    above, below = (
        np.bincount(groups, np.where(mask, excess, 0.0)).astype(np.float64)
        for mask in (positive, ~positive)
    )
    count = len(set(groups))
    with_positive, with_negative = len(set(groups[positive])), len(set(groups[~positive]))
    variance = (
        _scaled(above * above, with_positive) / n**2
        + _scaled(below * below, with_negative) / m**2
        + 2 * _scaled(above * below, count) / (n * m)
    )
    half = 1.96 * float(np.sqrt(max(variance, 0.0)))
    return Area(value, max(0.0, value - half), min(1.0, value + half))


def _scaled(products: Floats, groups: int) -> float:
    return float(products.sum()) * groups / max(1, groups - 1)


def _telling_words(
    names: Sequence[str], counts: Any, refuse: Mask
) -> tuple[tuple[Word, ...], tuple[Word, ...]]:
    """Return the words with the largest weights on each side, in a fit to all rows."""
    weights = _regression().fit(counts, refuse).coef_[0]
    seen = [np.asarray(counts[mask].sum(axis=0)).ravel() for mask in (refuse, ~refuse)]

    def top(order: Floats) -> tuple[Word, ...]:
        best = sorted(range(len(names)), key=lambda i: (round(float(order[i]), 9), names[i]))[
            :TELLING
        ]
        return tuple(Word(names[i], int(seen[0][i]), int(seen[1][i])) for i in best)

    return top(-weights), top(weights)
