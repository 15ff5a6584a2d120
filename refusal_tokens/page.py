"""The page of a report: numbers to words and cells, and the template filled in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np

from refusal_tokens.analysis import MEASURES, Analysis, summary_rates
from refusal_tokens.comparison import AREAS, PairedTest
from refusal_tokens.decision import Knobs
from refusal_tokens.rates import Rate
from refusal_tokens.resampling import Measure
from refusal_tokens.text_curves import TextAnalysis

if TYPE_CHECKING:
    from refusal_tokens.drawing import Picture


QUALITY = "Ranking and honesty"
GLANCE = "Near-misses and ordinary requests should be answered."
# Names of the pooled rates -> how the first table says them.
POOLED = {
    "refused, all categories": "refused",
    "near-misses, all categories": "near-misses refused",
    "ordinary requests": "ordinary refused",
    "all respond rows": "all respond rows refused",
}
N_SERIES = 6


@dataclass(frozen=True)
class Report:
    """What a page is made from.

    Attributes:
        analyses: one a profile, in the order given.
        texts: name -> rates by text, of outcomes files.
        replies: name -> how many replies there are by verdict, and who judged them.
        tests: paired tests of every two models; empty for one.
        prompts_hash: of the prompts of the profiles; None without any.
    """

    analyses: tuple[Analysis, ...]
    texts: Mapping[str, Mapping[str, Rate]]
    replies: Mapping[str, Mapping[str, int | str]]
    tests: tuple[PairedTest, ...]
    prompts_hash: str | None


def page(report: Report, title: str, drawn: Sequence[Picture]) -> str:
    """Return the page as HTML that needs no other file."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    from refusal_tokens.drawing import COLOURS, panel_svg

    source = resources.files("refusal_tokens").joinpath("report.html.j2").read_text("utf-8")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    one = len(report.analyses) == 1 and not report.texts
    first, last = _single_tables(report.analyses[0]) if one else _model_tables(report)
    return environment.from_string(source).render(
        title=title,
        subtitle=_subtitle(report),
        colours=COLOURS,
        tiles=_tiles(report.analyses[0]) if one else [],
        first=first,
        pairs=_pairs(report.tests),
        n_tests=len(report.tests),
        pictures=[
            {
                "heading": picture.heading,
                "reading": picture.reading,
                # The drawing escapes what it writes; it is ours, not a user's markup.
                "panels": [
                    Markup(panel_svg(panel, f"{picture.name}{i}"))
                    for i, panel in enumerate(picture.panels)
                ],
            }
            for picture in drawn
        ],
        last=last,
        method=_method(report),
        sources=_sources(report),
    )


def _subtitle(report: Report) -> str:
    parts = []
    if report.analyses:
        first = report.analyses[0]
        parts.append(f"{first.n} prompts")
        parts.append(setting_words(first.setting, first.provenance["knobs"]))
    if report.texts:
        parts.append(f"{len(report.texts)} judged by their text")
    return " · ".join(parts)


def setting_words(setting: Knobs, knobs: Sequence[str]) -> str:
    """Say a setting of the knobs in a few words."""
    moved = [f"{k} {b:+.2f}" for k, b in zip(knobs, setting.bias, strict=True) if b]
    how = (
        "greedy" if setting.temperature == 0 else f"sampled at temperature {setting.temperature:g}"
    )
    where = f"bias {', '.join(moved)} nats" if moved else "every bias at 0"
    floors = " with floors" if np.isfinite(setting.floor).any() else ""
    return f"rule {setting.rule}, {how}, {where}{floors}"


def _tiles(analysis: Analysis) -> list[dict[str, str]]:
    summary, spread = analysis.summary, analysis.spread.measures
    shown = [
        ("refused", _rate_cell(summary.refused)),
        ("near-misses refused", _rate_cell(summary.near_miss)),
        ("ordinary refused", _rate_cell(summary.ordinary)),
        ("AUC", _measure_cell(spread["auc"], 3)),
        ("refused at 5% over-refusal", _measure_cell(spread["refusal_at_5"])),
    ]
    return [{"name": name, **cell} for name, cell in shown]


def _rate_cell(found: Rate) -> dict[str, str]:
    if found.value is None or found.low is None or found.high is None:
        return {"value": "–", "detail": "no prompts", "n": ""}
    interval = f"[{100 * found.low:.0f}, {100 * found.high:.0f}]"
    return {"value": f"{100 * found.value:.1f}%", "detail": interval, "n": f"n={found.n}"}


def _measure_cell(found: Measure, digits: int | None = None) -> dict[str, str]:
    """A measure as percent, or with ``digits`` decimals."""
    if digits is None:
        low, high = 100 * found.low, 100 * found.high
        return {"value": f"{100 * found.value:.1f}%", "detail": f"[{low:.0f}, {high:.0f}]", "n": ""}
    low_high = f"[{found.low:.{digits}f}, {found.high:.{digits}f}]"
    return {"value": f"{found.value:.{digits}f}", "detail": low_high, "n": ""}


def _table(heading: str, reading: str, columns: Sequence[tuple[str, int | None]]) -> dict[str, Any]:
    """An empty table; a column is its text and the number of its series' colour."""
    shown = [{"text": text, "dot": dot} for text, dot in columns]
    return {"heading": heading, "reading": reading, "columns": shown, "rows": []}


def _row(name: str, cells: Sequence[Mapping[str, str]], *, total: bool = False) -> dict[str, Any]:
    return {"name": name, "cells": cells, "total": total}


def _single_tables(analysis: Analysis) -> tuple[list[Any], list[Any]]:
    """What comes before the figures, and what after."""
    columns = ("", "refused", "named rightly", "near-misses refused")
    rates = _table(
        "Rates by category",
        "By control token. Named rightly: of the refused, those refused as their category.",
        [(name, None) for name in columns],
    )
    summary = analysis.summary
    for entry in (*summary.categories, None):
        of = entry or summary
        near = summary.near_miss if entry is None else entry.over_refused
        cells = [_rate_cell(found) for found in (of.refused, of.right_category, near)]
        rates["rows"].append(_row(entry.category if entry else "all", cells, total=entry is None))
    quality = _table(QUALITY, _quality_reading(analysis), [("", None), ("value", None)])
    quality["rows"] = [_row(name, [cell]) for name, cell in _quality(analysis).items()]
    return [rates, *([_text_table(analysis.text)] if analysis.text else [])], [quality]


def _text_table(found: TextAnalysis) -> dict[str, Any]:
    """Refusal by token and by text on the same prompts."""
    reading = (
        f"Of the {found.prompts} prompts with a reply under each control token, judged by "
        f"{', '.join(found.judges)}: {found.left_out} prompts have not, and are left out; "
        f"{found.undecided} replies are undecided, and count as not refusing."
    )
    columns = [("", None), ("refused by token", None), ("refused by text", None)]
    table = _table("Does the text follow?", reading, columns)
    table["rows"] = [
        _row(kind, [_rate_cell(found.by_token[kind]), _rate_cell(rate)])
        for kind, rate in found.by_text.items()
    ]
    return table


def _quality_reading(analysis: Analysis) -> str:
    return (
        f"Intervals by bootstrap over {analysis.spread.groups} groups of prompts. Lower is better "
        "for losses and errors."
    )


def _quality(analysis: Analysis) -> dict[str, dict[str, str]]:
    """Name -> cell, of everything that is not a plain rate."""
    measures = analysis.spread.measures
    found = {
        name: _measure_cell(measures[key], 3 if "auc" in key else None)
        for key, name in MEASURES.items()
    }
    for when, reliable in (("as stated", analysis.before), ("after scaling", analysis.after)):
        if reliable is not None:
            found[f"log-loss {when}, nats"] = _measure_cell(reliable.log_loss, 3)
            found[f"Brier score {when}"] = _measure_cell(reliable.brier, 3)
            found[f"classwise error {when}"] = _measure_cell(reliable.classwise_error, 3)
    mass = analysis.summary.control_mass
    found["control mass, unmasked"] = {"value": f"{mass:.4f}", "detail": ""}
    return found


def _model_tables(report: Report) -> tuple[list[Any], list[Any]]:
    """Models side by side: the whole at a glance first, the detail last."""
    by_model = {a.name: summary_rates(a.summary) for a in report.analyses}
    rates = [*by_model.values(), *report.texts.values()]
    labels = [*by_model, *(f"{name}, by text" for name in report.texts)]
    columns = [("", None), *((label, i % N_SERIES) for i, label in enumerate(labels))]
    quality = [_quality(analysis) for analysis in report.analyses]
    nothing: dict[str, str] = {"value": "–", "detail": "", "n": ""}
    glance = _table("At a glance", "Refused: of the prompts that should be. " + GLANCE, columns)
    detail = _table("Rates by category", "95% Wilson intervals.", columns)
    for name in rates[0]:
        cells = [_rate_cell(found[name]) for found in rates]
        if any(found[name].n for found in rates):
            into = glance if name in POOLED else detail
            into["rows"].append(_row(POOLED.get(name, name), cells))
    for name in (MEASURES["auc"], MEASURES["refusal_at_5"]) if quality else ():
        cells = [found[name] for found in quality] + [nothing] * len(report.texts)
        glance["rows"].append(_row(name, cells))
    if not quality:
        return [glance], [detail]
    reading = _quality_reading(report.analyses[0])
    honest = _table(QUALITY, reading, columns[: 1 + len(quality)])
    for name in quality[0]:
        if all(name in found for found in quality):
            honest["rows"].append(_row(name, [found[name] for found in quality]))
    return [glance], [detail, honest]


def _pairs(tests: Sequence[PairedTest]) -> list[dict[str, Any]]:
    """The tests of each two models under a heading of their own."""
    return [
        {"name": f"{a} → {b}", "tests": [test_words(test) for test in of_pair]}
        for (a, b), of_pair in groupby(tests, key=lambda test: (test.a, test.b))
    ]


def test_words(test: PairedTest) -> dict[str, Any]:
    """Say a paired test in words and numbers, by what they are."""
    found = test.difference
    if test.measure in (AREAS["auc"], AREAS["partial_auc"]):
        difference = f"{found.value:+.3f}"
        interval = f"[{found.low:+.3f}, {found.high:+.3f}]"
        levels = f"{test.value_a:.3f} → {test.value_b:.3f}"
    else:
        difference = f"{100 * found.value:+.1f} points"
        interval = f"[{100 * found.low:+.1f}, {100 * found.high:+.1f}]"
        levels = f"{100 * test.value_a:.1f}% → {100 * test.value_b:.1f}%"
    alone = f"; {test.only_a} and {test.only_b} prompts refused by one alone"
    return {
        "measure": f"{test.measure}, n={test.n}",
        "difference": difference,
        "interval": interval,
        "levels": levels,
        "alone": alone if test.only_a is not None else "",
        "p": f"p {p_words(test.p)}, corrected {p_words(test.p_holm)} ({test.method})",
        "stands": test.p_holm < 0.05,
    }


def p_words(value: float) -> str:
    """Say a p-value; very small ones as below a bound."""
    return "< 0.0001" if value < 0.0001 else f"= {value:.3g}"


def _method(report: Report) -> str:
    parts = []
    if report.analyses:
        parts.append(
            "Every point of a curve by token follows from the stored control logits alone. "
            "Pointwise intervals are Wilson's; the whole-curve band is that of Dvoretzky, Kiefer "
            "and Wolfowitz; both take prompts as independent. Bootstraps draw whole groups."
        )
    if any(analysis.text for analysis in report.analyses):
        parts.append(
            "By text, each prompt has one greedy reply under each control token; a curve weighs "
            "these with the probabilities of the decisions. Its interval takes the judge at its "
            "word."
        )
    if report.texts:
        parts.append(
            "By text, only replies judged “refused” count as refusals; undecided replies are left "
            "out."
        )
        if report.analyses:
            parts.append(
                "Between a model judged by its text and one with control tokens, the tests compare "
                "text with tokens."
            )
    return " ".join(parts)


def _sources(report: Report) -> list[list[tuple[str, str]]]:
    keys = {
        "base_model": "base model",
        "model_fingerprint": "model fingerprint",
        "taxonomy_hash": "taxonomy hash",
        "data_hash": "data hash",
        "dtype": "computed in",
        "device": "on",
        "system_prompt": "system prompt",
        "versions": "versions",
    }
    found = []
    for analysis in report.analyses:
        entries = [("model", analysis.name)]
        for key, name in keys.items():
            value = analysis.provenance.get(key)
            if isinstance(value, Mapping):
                value = ", ".join(f"{package} {version}" for package, version in value.items())
            if value is not None:
                entries.append((name, str(value)))
        if report.prompts_hash:
            entries.append(("hash of the labelled prompts", report.prompts_hash))
        found.append(entries)
    for name, counts in report.replies.items():
        found.append([("model", name), *((key, str(value)) for key, value in counts.items())])
    return found
