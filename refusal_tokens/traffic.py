"""What a model does with prompts that nobody has labelled, and how far they are from others."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from refusal_tokens.decision import Knobs, probabilities
from refusal_tokens.errors import InputError
from refusal_tokens.profiles import Profile
from refusal_tokens.rates import Rate, rate
from refusal_tokens.summary import refusal_scores
from refusal_tokens.taxonomy import RESPOND


@dataclass(frozen=True)
class Shares:
    """What is done with a set of prompts at one setting of the knobs; labels are not used.

    Attributes:
        decisions: the share of each decision, knobs first, ``respond`` last; expected ones if the
            setting samples.
        refused: of any refusal.
        control_mass: mean probability of the control tokens, unmasked.
    """

    decisions: dict[str, Rate]
    refused: Rate
    control_mass: float

    def by_name(self) -> dict[str, Rate]:
        """Return every share by name, ``refused`` first."""
        return {"refused": self.refused, **self.decisions}


@dataclass(frozen=True)
class Difference:
    """A share less another, with a 95% interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        points = f"{100 * self.value:+5.1f} points"
        return f"{points}  [{100 * self.low:+.1f}, {100 * self.high:+.1f}]"


@dataclass(frozen=True)
class Drift:
    """How traffic differs from other prompts of the same model.

    Attributes:
        against: what is done with those at the same setting.
        differences: of each share, traffic less those.
        distance: greatest gap between the distributions of the log-odds of refusal
            (Kolmogorov-Smirnov).
        p_value: of a distance this large, were both sets drawn from the same prompts.
    """

    against: Shares
    differences: dict[str, Difference]
    distance: float
    p_value: float


def shares(profile: Profile, setting: Knobs) -> Shares:
    """Return the share of each decision over a profile's prompts.

    Raises:
        InputError: if the profile is empty.
    """
    n = len(profile)
    if not n:
        raise InputError("no prompts in the profile")
    counts = probabilities(profile.control_logits, setting).sum(axis=0)
    names = (*profile.taxonomy.knobs, RESPOND)
    decisions = dict(zip(names, (rate(c, n) for c in (*counts[1:], counts[0])), strict=True))
    refused = rate(n - counts[0], n)
    return Shares(decisions, refused, float(profile.control_mass.mean()))


def difference(a: Rate, b: Rate) -> Difference:
    """Return a less b with Newcombe's interval from the two score intervals (1998, method 10).

    >>> from refusal_tokens.rates import rate
    >>> str(difference(rate(56, 70), rate(48, 80)))
    '+20.0 points  [+5.2, +33.4]'
    """
    ends = (a.value, a.low, a.high, b.value, b.low, b.high)
    va, la, ha, vb, lb, hb = (np.nan if end is None else end for end in ends)
    low, high = np.hypot(va - la, hb - vb), np.hypot(ha - va, vb - lb)
    return Difference(va - vb, float(va - vb - low), float(va - vb + high))


def drift(traffic: Profile, against: Profile, setting: Knobs) -> Drift:
    """Compare traffic with other prompts of the same model at one setting.

    Prompts are taken as independent: many copies of one prompt make a difference look surer than it
    is. That the log-odds of refusal are alike does not say that the prompts are.

    Args:
        traffic: its labels are not used.
        against: of the same model, such as the prompts a policy was chosen on, or traffic of last
            month; neither are its.
        setting: of the knobs.
    """
    from scipy.stats import ks_2samp

    now, then = shares(traffic, setting), shares(against, setting)
    test = ks_2samp(refusal_scores(traffic), refusal_scores(against))
    differences = {
        name: difference(share, then.by_name()[name]) for name, share in now.by_name().items()
    }
    return Drift(then, differences, float(test.statistic), float(test.pvalue))


def traffic_table(now: Shares, found: Drift | None) -> str:
    """Return the screen: a line a share, beside those compared with."""
    heads = ["traffic", "against", "difference"] if found else ["traffic"]
    lines = [" " * 18 + "".join(f"{head:28}" for head in heads).rstrip()]
    for name, share in now.by_name().items():
        columns = [str(share)]
        if found:
            columns += [str(found.against.by_name()[name]), str(found.differences[name])]
        label = name if name in ("refused", RESPOND) else f"  {name}"
        lines.append(f"{label:18}" + "".join(f"{column:28}" for column in columns).rstrip())
    mass = f"{'control mass':18}{now.control_mass:.4f} unmasked"
    if found:
        mass += f", against {found.against.control_mass:.4f}"
        lines += [mass, "", _drift_line(found)]
    else:
        lines.append(mass)
    return "\n".join(lines)


def _drift_line(found: Drift) -> str:
    what = (
        "the two sets of prompts differ"
        if found.p_value < 0.05
        else "no difference is shown between the two sets of prompts"
    )
    return (
        f"Refusal log-odds: greatest gap between the distributions {found.distance:.3f}, "
        f"p={found.p_value:.2g} (Kolmogorov-Smirnov): {what}."
    )


def traffic_record(now: Shares, found: Drift | None) -> dict[str, Any]:
    """Return the JSON form."""
    return {"traffic": asdict(now), "drift": asdict(found) if found else None}
