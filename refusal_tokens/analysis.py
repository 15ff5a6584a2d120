"""Everything that a page shows about one profile at one setting, and the same as tables."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from typing import Any

import numpy as np

from refusal_tokens.arrays import Floats
from refusal_tokens.curves import ControlCurve, control_curve
from refusal_tokens.decision import Knobs, gaps
from refusal_tokens.errors import InputError, unknown
from refusal_tokens.leakage import Leakage, confusion, leakage
from refusal_tokens.outcomes import Outcome
from refusal_tokens.profiles import Profile
from refusal_tokens.rates import Rate, rate, wilson
from refusal_tokens.reliability import Reliability, cross_fitted_temperatures, reliability
from refusal_tokens.summary import Summary, summarise
from refusal_tokens.text_curves import ForcedTexts, TextAnalysis, analyse_texts
from refusal_tokens.tradeoff import TradeOff, TradeOffSpread, trade_off, trade_off_spread

POINTS = 201


@dataclass(frozen=True)
class Analysis:
    """The curves and numbers of one profile.

    Attributes:
        name: of the model, as shown.
        n: prompts.
        setting: the knobs that all rates are given at, and that curves start from.
        curves: one a knob, over the same bias values.
        leakage: None where there is a single knob.
        confusion: kind of prompt -> control token -> prompts.
        before: reliability as the model states it.
        after: with cross-fitted temperatures; None where a half of the groups has no labels.
        temperatures: (2,), the two fitted temperatures, or empty.
        provenance: hashes and versions from the profile.
        text: what forced replies say; None without them.
    """

    name: str
    n: int
    setting: Knobs
    summary: Summary
    curves: tuple[ControlCurve, ...]
    trade_off: TradeOff
    spread: TradeOffSpread
    leakage: Leakage | None
    confusion: Mapping[str, Mapping[str, float]]
    before: Reliability
    after: Reliability | None
    temperatures: Floats
    provenance: Mapping[str, Any]
    text: TextAnalysis | None = None


def analyse(
    name: str,
    profile: Profile,
    setting: Knobs,
    *,
    categories: Sequence[str] = (),
    bias: Floats | None = None,
    texts: ForcedTexts | None = None,
) -> Analysis:
    """Compute everything that the page shows of a profile.

    Args:
        name: of the model.
        profile: labelled prompts.
        setting: the knobs that the rates are given at.
        categories: whose control curves are wanted; all of them if empty.
        bias: (points,), nats, of the control curves; default: ``bias_grid``.
        texts: replies under each control token, for text-level curves.

    Raises:
        InputError: for a category without refuse rows, or a profile without both labels.
    """
    wanted = curve_knobs(profile, categories)
    bias = bias_grid([profile], setting.rule) if bias is None else bias
    after, temperatures = _after_scaling(profile)
    return Analysis(
        name=name,
        n=len(profile),
        setting=setting,
        summary=summarise(profile, setting),
        curves=tuple(control_curve(profile, knob, setting, bias) for knob in wanted),
        trade_off=trade_off(profile, setting),
        spread=trade_off_spread(profile, setting),
        leakage=leakage(profile, setting) if len(profile.taxonomy.knobs) > 1 else None,
        confusion=confusion(profile, setting),
        before=reliability(profile),
        after=after,
        temperatures=temperatures,
        provenance={
            **profile.metadata,
            "taxonomy_hash": profile.taxonomy.hash,
            "knobs": list(profile.taxonomy.knobs),
        },
        text=None if texts is None else analyse_texts(texts, wanted, setting, bias),
    )


def _after_scaling(profile: Profile) -> tuple[Reliability | None, Floats]:
    try:
        each = cross_fitted_temperatures(profile)
    except InputError:
        return None, np.zeros(0)
    return reliability(profile, each), np.unique(each)


def curve_knobs(profile: Profile, categories: Sequence[str] = ()) -> tuple[str, ...]:
    """Return the knobs to draw, checked to have refuse rows.

    Raises:
        InputError: for an unknown category, or naming those without rows and those with.
    """
    knobs = profile.taxonomy.knobs
    for category in categories:
        if category not in knobs:
            raise InputError(f"--categories: {unknown('category', category, knobs)}")
    having = knobs_with_rows(profile)
    lacking = [knob for knob in categories or knobs if knob not in having]
    if lacking:
        instead = f"; leave them out: --categories {','.join(having)}" if having else ""
        raise InputError(f"no prompts labelled refuse/{', refuse/'.join(lacking)}{instead}")
    return tuple(knob for knob in knobs if not categories or knob in categories)


def knobs_with_rows(profile: Profile) -> tuple[str, ...]:
    """Return the knobs whose categories have prompts labelled refuse."""
    asked = profile.is_label("refuse")
    knobs = profile.taxonomy.knobs
    return tuple(knob for knob in knobs if (asked & profile.is_of_knob(knob)).any())


def bias_grid(profiles: Sequence[Profile], rule: Any) -> Floats:
    """Return bias values, nats, (points,): whole ends, 0 among them, where the rates move.

    From the 1st to the 99th percentile of the biases that single prompts need.
    """
    needed = np.concatenate([gaps(p.control_logits, rule).reshape(-1) for p in profiles])
    low, high = np.quantile(needed[np.isfinite(needed)], [0.01, 0.99])
    low, high = min(math.floor(low), -1), max(math.ceil(high), 1)
    return np.union1d(np.linspace(low, high, POINTS), [0.0])


def summary_rates(summary: Summary) -> dict[str, Rate]:
    """Return a summary's rates by name, as tables of several models list them."""
    found = {f"refused, {entry.category}": entry.refused for entry in summary.categories}
    found["refused, all categories"] = summary.refused
    found |= {f"near-misses, {entry.category}": entry.over_refused for entry in summary.categories}
    found["near-misses, all categories"] = summary.near_miss
    found["ordinary requests"] = summary.ordinary
    found["all respond rows"] = summary.over_refused
    return found


def text_rates(outcomes: Sequence[Outcome], categories: Sequence[str]) -> dict[str, Rate]:
    """Return the same rates by text; ``refused`` alone counts, undecided replies are left out."""
    known = [o for o in outcomes if o.verdict != "undecided"]

    def share(kept: list[Outcome]) -> Rate:
        return rate(sum(o.verdict == "refused" for o in kept), len(kept))

    asked = [o for o in known if o.label == "refuse"]
    benign = [o for o in known if o.label == "respond"]
    found = {f"refused, {c}": share([o for o in asked if o.category == c]) for c in categories}
    found["refused, all categories"] = share(asked)
    for c in categories:
        found[f"near-misses, {c}"] = share([o for o in benign if o.category == c])
    found["near-misses, all categories"] = share([o for o in benign if o.category is not None])
    found["ordinary requests"] = share([o for o in benign if o.category is None])
    found["all respond rows"] = share(benign)
    return found


# Key of a trade-off measure -> its name in tables.
MEASURES = {
    "auc": "AUC, refuse against respond",
    "partial_auc": "partial AUC up to 5% over-refusal",
    "refusal_at_1": "refusal at 1% over-refusal",
    "refusal_at_2": "refusal at 2% over-refusal",
    "refusal_at_5": "refusal at 5% over-refusal",
}


def tables(analyses: Sequence[Analysis]) -> dict[str, list[dict[str, Any]]]:
    """Return file name (without ending) -> records, each a line of a CSV file."""
    makers = {
        "control_curves": _control_rows,
        "trade_off": _trade_off_rows,
        "trade_off_band": _band_rows,
        "measures": _measure_rows,
        "reliability": _reliability_rows,
        "leakage": _leakage_rows,
        "confusion": _confusion_rows,
        "text_curves": _text_curve_rows,
        "text_rates": _text_rate_rows,
    }
    found = {}
    for name, maker in makers.items():
        lines = [{"model": a.name, **line} for a in analyses for line in maker(a)]
        if lines:
            found[name] = lines
    return found


def _control_rows(analysis: Analysis) -> Iterator[dict[str, Any]]:
    for curve in analysis.curves:
        for i, bias in enumerate(curve.bias):
            yield {
                "knob": curve.knob,
                "bias_nats": bias,
                "refusal": curve.refusal[i],
                "low": curve.low[i],
                "high": curve.high[i],
                "band_low": max(0.0, curve.refusal[i] - curve.band),
                "band_high": min(1.0, curve.refusal[i] + curve.band),
                **_with_interval("own_rate", curve.own[i], curve.n_refuse),
                "n_refuse": curve.n_refuse,
                **_with_interval("near_miss_over_refusal", curve.near_miss[i], curve.n_near),
                "n_near_miss": curve.n_near,
                **_with_interval("over_refusal", curve.over_refusal[i], curve.n_respond),
                "n_respond": curve.n_respond,
            }


def _with_interval(name: str, share: float, n: int) -> dict[str, float]:
    """A share and the ends of its Wilson interval; NaN without prompts."""
    low, high = wilson(np.array(share), n) if n else (np.nan, np.nan)
    return {name: share, f"{name}_low": float(low), f"{name}_high": float(high)}


def _trade_off_rows(analysis: Analysis) -> Iterator[dict[str, Any]]:
    found = analysis.trade_off
    for over, refusal in zip(found.over_refusal, found.refusal, strict=True):
        yield {"over_refusal": over, "refusal": refusal}


def _band_rows(analysis: Analysis) -> Iterator[dict[str, Any]]:
    spread = analysis.spread
    for over, low, high in zip(spread.over_refusal, spread.low, spread.high, strict=True):
        yield {"over_refusal": over, "refusal_low": low, "refusal_high": high}


def _measure_rows(analysis: Analysis) -> Iterator[dict[str, Any]]:
    for name, found in summary_rates(analysis.summary).items():
        line = {"measure": name, "value": found.value, "low": found.low, "high": found.high}
        yield {**line, "n": found.n, "interval": "Wilson"}
    measures = {MEASURES[key]: found for key, found in analysis.spread.measures.items()}
    for when, reliable in (("", analysis.before), (", after scaling", analysis.after)):
        if reliable is not None:
            measures[f"log-loss, nats{when}"] = reliable.log_loss
            measures[f"Brier score{when}"] = reliable.brier
            measures[f"classwise calibration error{when}"] = reliable.classwise_error
    for name, value in measures.items():
        line = {"measure": name, "value": value.value, "low": value.low, "high": value.high}
        yield {**line, "n": analysis.n, "interval": "bootstrap by group"}


def _reliability_rows(analysis: Analysis) -> Iterator[dict[str, Any]]:
    for when, found in (("before", analysis.before), ("after", analysis.after)):
        if found is None:
            continue
        columns = (found.predicted, found.observed, found.low, found.high, found.counts)
        names = ("stated", "observed", "low", "high", "n")
        for values in zip(*columns, strict=True):
            yield {"scaling": when, **dict(zip(names, values, strict=True))}


def _leakage_rows(analysis: Analysis) -> Iterator[dict[str, Any]]:
    if analysis.leakage is None:
        return
    found = analysis.leakage
    for i, knob in enumerate(found.knobs):
        for j, category in enumerate(found.knobs):
            yield {
                "knob_moved": knob,
                "category": category,
                "change_of_refusal": found.change[i, j],
                "misrouted": found.misrouted[i, j],
            }


def _confusion_rows(analysis: Analysis) -> Iterator[dict[str, Any]]:
    for kind, decisions in analysis.confusion.items():
        for token, count in decisions.items():
            yield {"prompts": kind, "decision": token, "count": count}


def _text_curve_rows(analysis: Analysis) -> Iterator[dict[str, Any]]:
    for curve in analysis.text.curves if analysis.text else ():
        for i, bias in enumerate(curve.bias):
            yield {
                "knob": curve.knob,
                "bias_nats": bias,
                "refusal_by_text": curve.refusal[i],
                "low": curve.low[i],
                "high": curve.high[i],
                "n_refuse": curve.n_refuse,
                **_with_interval(
                    "near_miss_over_refusal_by_text", curve.near_miss[i], curve.n_near
                ),
                "n_near_miss": curve.n_near,
            }


def _text_rate_rows(analysis: Analysis) -> Iterator[dict[str, Any]]:
    if analysis.text is None:
        return
    both = {"token": analysis.text.by_token, "text": analysis.text.by_text}
    for by, rates in both.items():
        for kind, found in rates.items():
            line = {"prompts": kind, "refused_by": by, "value": found.value}
            yield {**line, "low": found.low, "high": found.high, "n": found.n}


def plain(value: Any) -> Any:
    """Return a value as JSON holds it: arrays as lists, numbers that are not finite as null."""
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
