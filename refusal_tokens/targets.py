"""What may be asked of a model: rates, floors and ceilings, and the rows each of them counts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from refusal_tokens.arrays import Mask
from refusal_tokens.errors import InputError, one_message, unknown
from refusal_tokens.profiles import Profile


@dataclass(frozen=True)
class Targets:
    """What is asked for.

    Attributes:
        rates: category -> refusal rate to come as near to as the steps allow.
        min_rates: category -> least refusal rate.
        max_over_refusal: ceiling on the over-refusal of all respond rows, or None.
        max_category_over_refusal: category -> ceiling on its near-miss rows.
        fewest_misses: with a ceiling: refuse as many of the refuse rows as it allows, instead of
            as few of the respond rows as the floors allow.
    """

    rates: Mapping[str, float] = field(default_factory=dict)
    min_rates: Mapping[str, float] = field(default_factory=dict)
    max_over_refusal: float | None = None
    max_category_over_refusal: Mapping[str, float] = field(default_factory=dict)
    fewest_misses: bool = False

    @property
    def named(self) -> set[str]:
        """The categories that a target names: their knobs are free."""
        return {*self.rates, *self.min_rates, *self.max_category_over_refusal}

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return asdict(self)


def preset(name: str, categories: tuple[str, ...]) -> Targets:
    """Return the targets of a preset, stated as rates.

    ``strict``: safety at least 99%, the others at least 90%, then the least over-refusal.
    ``balanced``: the fewest misses with over-refusal at most 5%. ``permissive``: the same at 1%.

    Raises:
        InputError: for another name.
    """
    if name == "strict":
        return Targets(min_rates={c: 0.99 if c == "safety" else 0.9 for c in categories})
    ceilings = {"balanced": 0.05, "permissive": 0.01}
    if name not in ceilings:
        raise InputError(f"--preset: {unknown('preset', name, ('strict', *ceilings))}")
    return Targets(max_over_refusal=ceilings[name], fewest_misses=True)


@dataclass(frozen=True)
class Demand:
    """One target over one group of rows, as the solvers see it.

    Attributes:
        name: for messages, such as ``min-rate safety``.
        kind: ``equal``, ``at_least`` or ``at_most``.
        category: of the rows; None for all respond rows.
        rows: (prompts,), which rows it counts.
        value: the rate asked for.
    """

    name: str
    kind: Literal["equal", "at_least", "at_most"]
    category: str | None
    rows: Mask
    value: float

    @property
    def n(self) -> int:
        """How many rows it counts."""
        return int(self.rows.sum())

    def excess(self, share: Any) -> Any:
        """Return by how much a reached share misses the target, 0 or above."""
        if self.kind == "equal":
            return np.abs(share - self.value)
        if self.kind == "at_least":
            return np.maximum(self.value - share, 0.0)
        return np.maximum(share - self.value, 0.0)


def demands(profile: Profile, targets: Targets) -> list[Demand]:
    """Turn targets into demands over a profile's rows.

    Raises:
        InputError: for unknown categories, rates outside 0 to 1, contradictions, or a target whose
            rows the profile lacks; every fault at once.
    """
    asked, benign = profile.is_label("refuse"), profile.is_label("respond")
    found = [
        *(
            Demand(f"rate {c}", "equal", c, asked & profile.is_category(c), value)
            for c, value in targets.rates.items()
        ),
        *(
            Demand(f"min-rate {c}", "at_least", c, asked & profile.is_category(c), value)
            for c, value in targets.min_rates.items()
        ),
        *(
            Demand(f"max-over-refusal {c}", "at_most", c, benign & profile.is_category(c), value)
            for c, value in targets.max_category_over_refusal.items()
        ),
    ]
    if targets.max_over_refusal is not None:
        found.append(Demand("max-over-refusal", "at_most", None, benign, targets.max_over_refusal))
    faults = []
    known = profile.taxonomy.category_ids
    for demand in found:
        if demand.category is not None and demand.category not in known:
            faults.append(f"{demand.name}: {unknown('category', demand.category, known)}")
        elif not 0 <= demand.value <= 1:
            faults.append(f"{demand.name}: found {demand.value:g}; allowed: 0 to 1")
        elif not demand.n:
            kind = "respond" if demand.kind == "at_most" else "refuse"
            faults.append(f"{demand.name}: the profile has no {kind} rows of it")
    for c in set(targets.rates) & set(targets.min_rates):
        if targets.rates[c] < targets.min_rates[c]:
            faults.append(
                f"rate {c}={targets.rates[c]:g} contradicts min-rate {c}={targets.min_rates[c]:g}"
            )
    if not found:
        faults.append(
            "nothing is asked for; use --rate, --min-rate, --max-over-refusal or --preset"
        )
    if not benign.any() and not faults:
        faults.append("the profile has no respond rows, so over-refusal cannot be told")
    if faults:
        raise one_message(faults, "targets")
    return found


def free_knobs(profile: Profile, targets: Targets) -> NDArray[np.bool_]:
    """(knobs,), which knobs may move: those that a target names, or all where none is named."""
    knobs = profile.taxonomy.knobs
    if profile.taxonomy.single_token or not targets.named:
        return np.ones(len(knobs), dtype=bool)
    return np.array([knob in targets.named for knob in knobs])
