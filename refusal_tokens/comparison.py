"""Two or more models on the same prompts: rates, paired tests, Holm's correction.

A profile gives a model's decisions at bias 0 and its trade-off; an outcomes file gives whether its
text refused, at the one setting it was generated with. Pairs of either kind are compared on the
prompts they share.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import bdtr

from refusal_tokens.arrays import Floats, Mask
from refusal_tokens.decision import Knobs, decide
from refusal_tokens.errors import InputError
from refusal_tokens.outcomes import Outcome
from refusal_tokens.profiles import Profile, group_names
from refusal_tokens.resampling import Measure, group_counts, measure
from refusal_tokens.tradeoff import curve_measures, scored, weighted_curves

Key = tuple[str | None, ...]
DRAWS = 2000
# Measures of decisions -> label of the rows that they count.
DECIDED = {"refusal of refuse rows": "refuse", "over-refusal": "respond"}
AREAS = {
    "auc": "AUC",
    "partial_auc": "partial AUC up to 5% over-refusal",
    "refusal_at_5": "refusal at 5% over-refusal",
}


@dataclass(frozen=True)
class Entrant:
    """One model as the paired tests see it.

    Attributes:
        name: shown in tables and figures.
        keys: of each prompt: id, label, category.
        label: (prompts,), ``refuse``, ``respond`` or None.
        refused: (prompts,), whether it was refused, by token at bias 0, or by text.
        groups: (prompts,), names of the groups that are resampled together.
        scores: (prompts,), nats, as in ``tradeoff.scored``; None for outcomes.
    """

    name: str
    keys: tuple[Key, ...]
    label: NDArray[np.object_]
    refused: Mask
    groups: NDArray[np.object_]
    scores: Floats | None


@dataclass(frozen=True)
class PairedTest:
    """One difference between two models on the prompts they share.

    Attributes:
        a: first model.
        b: second model.
        measure: what is compared.
        value_a: of the first, 0 to 1.
        value_b: of the second, 0 to 1.
        difference: second less first, with its 95% bootstrap interval by group (paired: both on the
            same draws).
        n: prompts.
        only_a: prompts that only the first refused; None for areas.
        only_b: prompts that only the second refused; None for areas.
        method: ``McNemar, exact`` or ``bootstrap by group``.
        p: two-sided.
        p_holm: corrected for all tests of the table.
    """

    a: str
    b: str
    measure: str
    value_a: float
    value_b: float
    difference: Measure
    n: int
    only_a: int | None
    only_b: int | None
    method: str
    p: float
    p_holm: float

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return asdict(self)


def prompt_keys(profile: Profile) -> list[Key]:
    """Return what tells each prompt apart: its hash, label and category."""
    names = ("prompt_sha256", "label", "category")
    return list(zip(*(profile.columns[name] for name in names), strict=True))


def prompts_hash(keys: Sequence[Key]) -> str:
    """SHA-256 over prompts with their labels, whatever their order."""
    text = "\n".join(sorted(json.dumps(list(key)) for key in keys))
    return hashlib.sha256(text.encode()).hexdigest()


def align(profiles: Mapping[str, Profile]) -> dict[str, Profile]:
    """Bring the prompts of all profiles into the order of the first.

    Raises:
        InputError: for different taxonomies or prompts, naming both hashes.
    """
    names = list(profiles)
    if not names:
        return {}
    first = profiles[names[0]]
    keys = prompt_keys(first)
    aligned = {names[0]: first}
    for name in names[1:]:
        other = profiles[name]
        if other.taxonomy.hash != first.taxonomy.hash:
            raise InputError(
                f"{names[0]} and {name} differ in taxonomy: {first.taxonomy.hash} and "
                f"{other.taxonomy.hash}"
            )
        own = prompt_keys(other)
        lacking, extra = Counter(keys) - Counter(own), Counter(own) - Counter(keys)
        if lacking or extra:
            raise InputError(
                f"{names[0]} and {name} are of different prompts: {lacking.total()} only in the "
                f"first, {extra.total()} only in the second; prompt hashes {prompts_hash(keys)} "
                f"and {prompts_hash(own)}"
            )
        order = np.empty(len(keys), dtype=np.int64)
        order[_sorted(keys)] = _sorted(own)
        aligned[name] = other.select(order)
    return aligned


def _sorted(keys: Sequence[Key]) -> NDArray[np.int64]:
    """Order of the keys; missing values sort as empty text."""
    plain = [tuple(part or "" for part in key) for key in keys]
    return np.array(sorted(range(len(keys)), key=plain.__getitem__), dtype=np.int64)


def profile_entrant(name: str, profile: Profile, setting: Knobs) -> Entrant:
    """Enter a profile, greedy at a setting.

    Raises:
        InputError: unless it has refuse and respond rows.
    """
    greedy = replace(setting, temperature=0.0)
    columns = profile.columns
    keys = tuple(zip(columns["id"], columns["label"], columns["category"], strict=True))
    return Entrant(
        name=name,
        keys=keys,
        label=columns["label"],
        refused=np.asarray(decide(profile.control_logits, greedy) > 0),
        groups=np.array(group_names(columns["id"], columns["group"]), dtype=object),
        scores=scored(profile, greedy)[0],
    )


def text_entrant(name: str, outcomes: Sequence[Outcome]) -> Entrant:
    """Enter replies judged by text; undecided ones are left out, so that none is guessed."""
    known = [outcome for outcome in outcomes if outcome.verdict != "undecided"]
    return Entrant(
        name=name,
        keys=tuple((o.id, o.label, o.category) for o in known),
        label=np.array([o.label for o in known], dtype=object),
        refused=np.array([o.verdict == "refused" for o in known], dtype=bool),
        groups=np.array(group_names([o.id for o in known], [o.group for o in known]), dtype=object),
        scores=None,
    )


def paired_tests(
    entrants: Sequence[Entrant], *, draws: int = DRAWS, seed: int = 0
) -> tuple[PairedTest, ...]:
    """Test every pair of models; p-values are corrected over the whole table (Holm 1979).

    Raises:
        InputError: if two models share no labelled prompts.
    """
    tests = [test for a, b in combinations(entrants, 2) for test in _pair_tests(a, b, draws, seed)]
    corrected = holm([test.p for test in tests])
    return tuple(replace(test, p_holm=float(p)) for test, p in zip(tests, corrected, strict=True))


def _pair_tests(a: Entrant, b: Entrant, draws: int, seed: int) -> list[PairedTest]:
    a, b = _shared(a, b)
    even = np.ones((1, len(a.label)))
    of_a, of_b = _values(a, even), _values(b, even)
    drawn = _drawn_differences(a, b, draws, seed)
    tests = []
    for name in (name for name in of_a if name in of_b):
        value_a, value_b = float(of_a[name][0]), float(of_b[name][0])
        rows = np.isin(a.label, [DECIDED[name]] if name in DECIDED else list(DECIDED.values()))
        only_a, only_b = None, None
        if name in DECIDED:
            only_a = int((a.refused & ~b.refused & rows).sum())
            only_b = int((~a.refused & b.refused & rows).sum())
        exact = only_a is not None and only_b is not None
        p = mcnemar(only_a or 0, only_b or 0) if exact else bootstrap_p(drawn[name])
        tests.append(
            PairedTest(
                a=a.name,
                b=b.name,
                measure=name,
                value_a=value_a,
                value_b=value_b,
                difference=measure(value_b - value_a, drawn[name]),
                n=int(rows.sum()),
                only_a=only_a,
                only_b=only_b,
                method="McNemar, exact" if exact else "bootstrap by group",
                p=p,
                p_holm=p,
            )
        )
    return tests


def _values(entrant: Entrant, weights: Floats) -> dict[str, Floats]:
    """Name of a measure -> (draws,), for prompts that count ``weights``, (draws, prompts)."""
    found = {}
    masks = {label: np.asarray(entrant.label == label) for label in DECIDED.values()}
    for name, label in DECIDED.items():
        if masks[label].any():
            counted = weights * masks[label]
            with np.errstate(invalid="ignore"):
                found[name] = counted @ entrant.refused / counted.sum(axis=1)
    if entrant.scores is not None:
        curves = weighted_curves(entrant.scores, masks["refuse"], masks["respond"], weights, 0.0)
        areas = curve_measures(*curves)
        found |= {name: areas[key] for key, name in AREAS.items()}
    return found


def _drawn_differences(a: Entrant, b: Entrant, draws: int, seed: int) -> dict[str, Floats]:
    """Name of a measure -> (draws,), second less first, both on the same bootstrap draws."""
    numbers = np.unique(a.groups.astype(str), return_inverse=True)[1].reshape(-1)
    parts = []
    for counts in group_counts(int(numbers.max()) + 1, draws, seed):
        of_a, of_b = (_values(entrant, counts[:, numbers]) for entrant in (a, b))
        parts.append({name: of_b[name] - of_a[name] for name in of_a if name in of_b})
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _shared(a: Entrant, b: Entrant) -> tuple[Entrant, Entrant]:
    """Both models on the prompts they share, in the order of the first."""
    if a.scores is not None and b.scores is not None:
        # Two profiles: aligned by the hashes of their prompts, which is stricter than ids.
        return a, b
    place = {key: i for i, key in enumerate(b.keys)}
    pairs = [(i, place[key]) for i, key in enumerate(a.keys) if key in place and key[1]]
    if not pairs:
        raise InputError(
            f"{a.name} and {b.name} share no labelled prompts; prompt hashes "
            f"{prompts_hash(a.keys)} and {prompts_hash(b.keys)}"
        )
    rows = np.array(pairs, dtype=np.int64)
    return _taken(a, rows[:, 0]), _taken(b, rows[:, 1])


def _taken(entrant: Entrant, rows: NDArray[np.int64]) -> Entrant:
    return replace(
        entrant,
        keys=tuple(entrant.keys[i] for i in rows),
        label=entrant.label[rows],
        refused=entrant.refused[rows],
        groups=entrant.groups[rows],
        scores=None if entrant.scores is None else entrant.scores[rows],
    )


def mcnemar(only_a: int, only_b: int) -> float:
    """Return the exact two-sided p-value of McNemar's test (1947).

    Args:
        only_a: prompts that only the first model refused.
        only_b: prompts that only the second refused.

    >>> mcnemar(0, 3)
    0.25
    """
    n = only_a + only_b
    return 1.0 if n == 0 else min(1.0, float(2 * bdtr(min(only_a, only_b), n, 0.5)))


def bootstrap_p(differences: Floats) -> float:
    """Return the two-sided p-value of bootstrap draws of a difference; never 0.

    Twice the smaller share of draws on one side of 0, the observed data counted as one draw
    (Davison and Hinkley 1997, section 4.2).
    """
    known = differences[~np.isnan(differences)]
    tail = min((known <= 0).sum(), (known >= 0).sum())
    return min(1.0, 2 * (float(tail) + 1) / (len(known) + 1))


def holm(p_values: Sequence[float]) -> Floats:
    """Return p-values corrected for being several (Holm 1979), in their order.

    >>> holm([0.01, 0.04, 0.03]).round(3).tolist()
    [0.03, 0.06, 0.06]
    """
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p, kind="stable")
    steps = p[order] * np.arange(len(p), 0, -1)
    corrected = np.empty_like(p)
    corrected[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return corrected
