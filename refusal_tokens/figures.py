"""The figures of a page: control curves, trade-off and reliability of one model or several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib as mpl
import numpy as np

from refusal_tokens.analysis import Analysis
from refusal_tokens.curves import ControlCurve
from refusal_tokens.drawing import (
    MARKERS,
    PANEL,
    Axes,
    Panel,
    Picture,
    colour,
    legend,
    percent_axis,
    short,
    titles,
)
from refusal_tokens.matrices import matrix_pictures
from refusal_tokens.rates import Rate
from refusal_tokens.reliability import Reliability
from refusal_tokens.text_curves import TextCurve
from refusal_tokens.tradeoff import CEILINGS

AT_CEILINGS = "at 1%, 2%, 5% over-refusal"


def pictures(
    analyses: Sequence[Analysis], texts: Mapping[str, Mapping[str, Rate]]
) -> list[Picture]:
    """Return the figures of a page.

    Args:
        analyses: one a profile.
        texts: rates by text of models without control tokens, by name; points of the trade-off.
    """
    if not analyses:
        return []
    found = [_control_picture(analyses), _trade_off_picture(analyses, texts)]
    found.append(_reliability_picture(analyses))
    if len(analyses) == 1:
        found += matrix_pictures(analyses[0])
    return found


# --- control curves


def _control_picture(analyses: Sequence[Analysis]) -> Picture:
    one = len(analyses) == 1
    panels = []
    for i, curve in enumerate(analyses[0].curves):
        index = _knob_index(analyses[0], curve.knob)

        def draw(ax: Axes, i: int = i, index: int = index) -> None:
            if one:
                curve = analyses[0].curves[i]
                text = _text_of(analyses[0], curve.knob)
                _draw_control(ax, curve, float(analyses[0].setting.bias[index]), text)
            else:
                _draw_controls(ax, [a.curves[i] for a in analyses], [a.name for a in analyses])

        height = PANEL[1] if one else PANEL[1] + 0.12 * max(0, len(analyses) - 2)
        panels.append(Panel(draw, (PANEL[0], height), f"Control curve of {curve.knob}"))
    lines = (
        "Solid blue: prompts that should be refused. Dashed: of these, refused as this category. "
        "Orange: look-alikes that should be answered."
        if one
        else "Solid: prompts that should be refused. Dashed: look-alikes that should be answered."
    )
    if one and analyses[0].text is not None:
        lines += " Dotted: refused by text, whatever token opened the reply."
    return Picture(
        "control_curves",
        "What each knob does",
        f"{lines} The other knobs stand still.",
        tuple(panels),
    )


def _knob_index(analysis: Analysis, knob: str) -> int:
    return list(analysis.provenance["knobs"]).index(knob)


def _text_of(analysis: Analysis, knob: str) -> TextCurve | None:
    curves = analysis.text.curves if analysis.text else ()
    return next((curve for curve in curves if curve.knob == knob), None)


def _draw_text(ax: Axes, curve: TextCurve) -> None:
    """Refusal by text, of the prompts that have a reply under each token."""
    dots = {"lw": 1.9, "ls": (0, (1, 1.1))}
    if curve.n_refuse:
        label = f"refused by text, n={curve.n_refuse}"
        ax.plot(curve.bias, 100 * curve.refusal, color=colour(2), label=label, **dots)
        ends = (100 * curve.low, 100 * curve.high)
        ax.fill_between(curve.bias, *ends, color=colour(2), alpha=0.16, lw=0)
    if curve.n_near:
        label = f"near-misses by text, n={curve.n_near}"
        ax.plot(curve.bias, 100 * curve.near_miss, color=colour(3), label=label, **dots)


def _draw_control(
    ax: Axes, curve: ControlCurve, at: float, by_text: TextCurve | None = None
) -> None:
    """One model: refusal with interval and band, own rate, near-misses."""
    blue, orange = colour(0), colour(1)
    percent = 100 * curve.refusal
    low, high = np.clip([curve.refusal - curve.band, curve.refusal + curve.band], 0, 1) * 100
    ax.fill_between(
        curve.bias, low, high, color=blue, alpha=0.12, lw=0, label="whole-curve 95% band"
    )
    ax.fill_between(
        curve.bias,
        100 * curve.low,
        100 * curve.high,
        color=blue,
        alpha=0.26,
        lw=0,
        label="pointwise 95% interval",
    )
    ax.plot(curve.bias, percent, color=blue, lw=1.9, label=f"refused, n={curve.n_refuse}")
    ax.plot(
        curve.bias,
        100 * curve.own,
        color=blue,
        lw=1.3,
        ls=(0, (4, 2)),
        label=f"refused as {curve.knob}",
    )
    here = float(np.interp(at, curve.bias, percent))
    said = f"{here:.0f}% refused at bias {at:g}"
    ax.plot([at], [here], "o", color=blue, ms=4.5)
    if curve.n_near:
        near = 100 * curve.near_miss
        text = f"near-misses refused, n={curve.n_near}"
        ax.plot(curve.bias, near, color=orange, lw=1.7, label=text)
        near_here = float(np.interp(at, curve.bias, near))
        ax.plot([at], [near_here], "o", color=orange, ms=4.5)
        said += f", {near_here:.0f}% of near-misses"
    order = [2, 3, 4, 1, 0] if curve.n_near else [2, 3, 1, 0]
    if by_text is not None:
        _draw_text(ax, by_text)
        order += range(len(order), len(ax.get_legend_handles_labels()[1]))
    _bias_axes(ax, curve, at)
    titles(ax, curve.knob, said)
    legend(ax, order=order)


def _draw_controls(ax: Axes, curves: Sequence[ControlCurve], names: Sequence[str]) -> None:
    """Several models on the same prompts."""
    first = curves[0]
    for i, (curve, name) in enumerate(zip(curves, names, strict=True)):
        shade = colour(i)
        low, high = 100 * curve.low, 100 * curve.high
        ax.fill_between(curve.bias, low, high, color=shade, alpha=0.16, lw=0)
        ax.plot(curve.bias, 100 * curve.refusal, color=shade, lw=1.8, label=short(name))
        ax.plot(curve.bias, 100 * curve.near_miss, color=shade, lw=1.2, ls=(0, (4, 2)))
    muted = colour("muted")
    ax.plot([], [], color=muted, lw=1.8, label=f"refuse rows, n={first.n_refuse}")
    if first.n_near:
        ax.plot([], [], color=muted, lw=1.2, ls=(0, (4, 2)), label=f"near-misses, n={first.n_near}")
    at = [100 * float(np.interp(0, c.bias, c.refusal)) for c in curves]
    _bias_axes(ax, first, 0.0)
    ends = f"{min(at):.0f}% to {max(at):.0f}%" if len(at) > 2 else " and ".join(
        f"{value:.0f}%" for value in at
    )  # fmt: skip
    titles(ax, first.knob, f"{ends} refused at bias 0")
    legend(ax)


def _bias_axes(ax: Axes, curve: ControlCurve, at: float) -> None:
    ax.axvline(at, color=colour("muted"), lw=0.9, ls=":")
    ax.set_xlim(curve.bias[0], curve.bias[-1])
    ax.set_xlabel(f"bias on {curve.knob}, nats")
    percent_axis(ax.yaxis, ax.set_ylim)
    ax.xaxis.set_major_locator(mpl.ticker.MaxNLocator(7, integer=True, steps=[1, 2, 5, 10]))
    ax.set_ylabel("share of prompts")


# --- trade-off


def _trade_off_picture(
    analyses: Sequence[Analysis], texts: Mapping[str, Mapping[str, Rate]]
) -> Picture:
    def zoomed(ax: Axes) -> None:
        _draw_trade_off(ax, analyses, texts, 0.2)

    def full(ax: Axes) -> None:
        _draw_trade_off(ax, analyses, texts, 1.0)

    size = (PANEL[0], PANEL[1] + 0.14 * max(0, (len(analyses) + len(texts) - 1) // 2))
    crosses = " Crosses: models judged by their text, at their one setting." if texts else ""
    return Picture(
        "trade_off",
        "Refusing what should be refused, against refusing what should not",
        "All knobs move together along a curve. Up and to the left is better. The band is a 95% "
        f"bootstrap interval over groups of prompts.{crosses}",
        (
            Panel(zoomed, size, "Refusal against over-refusal, 0 to 20%"),
            Panel(full, size, "Refusal against over-refusal, whole range"),
        ),
    )


def _draw_trade_off(
    ax: Axes, analyses: Sequence[Analysis], texts: Mapping[str, Mapping[str, Rate]], top: float
) -> None:
    zoom = top < 1
    for i, analysis in enumerate(analyses):
        shade, found, spread = colour(i), analysis.trade_off, analysis.spread
        band = (100 * spread.over_refusal, 100 * spread.low, 100 * spread.high)
        ax.fill_between(*band, color=shade, alpha=0.15, lw=0)
        area = f"AUC {spread.measures['auc']}"
        if len(analyses) > 1:
            area = f"{short(analysis.name)}, AUC {found.auc:.3f}"
        ax.plot(100 * found.over_refusal, 100 * found.refusal, color=shade, lw=1.8, label=area)
        over, refused = analysis.summary.over_refused.value, analysis.summary.refused.value
        if over is not None and refused is not None and over <= top:
            mark = _setting_name(analysis) if len(analyses) == 1 else None
            marker = MARKERS[i % len(MARKERS)]
            ax.plot([100 * over], [100 * refused], marker, color=shade, ms=6.5, label=mark)
        if zoom:
            _mark_ceilings(ax, analysis, shade, with_text=len(analyses) == 1)
    for j, (name, rates) in enumerate(texts.items(), len(analyses)):
        _draw_text_point(ax, name, rates, colour(j), top)
    if len(analyses) > 1:
        muted = colour("muted")
        ax.plot([], [], "o", color=muted, ms=6, label=_setting_name(analyses[0]))
        if zoom:
            ax.plot([], [], ls="", marker="|", ms=9, mew=1.6, color=muted, label=AT_CEILINGS)
    first = analyses[0].trade_off
    percent_axis(ax.xaxis, ax.set_xlim, top)
    percent_axis(ax.yaxis, ax.set_ylim)
    ax.set_xlabel(f"over-refusal, of {first.n_respond} respond rows")
    ax.set_ylabel(f"refusal, of {first.n_refuse} refuse rows")
    _trade_off_titles(ax, analyses, zoom)
    legend(ax)


def _setting_name(analysis: Analysis) -> str:
    return "at bias 0" if not analysis.setting.bias.any() else "at the policy's setting"


def _mark_ceilings(ax: Axes, analysis: Analysis, shade: str, *, with_text: bool) -> None:
    places = []
    for ceiling in CEILINGS:
        value = analysis.trade_off.refusal_at[ceiling].value
        if value is None:
            continue
        places.append((100 * ceiling, 100 * value))
        if with_text:
            ax.annotate(
                f"{100 * value:.0f}% at {100 * ceiling:g}%",
                places[-1],
                xytext=(7, -9),
                textcoords="offset points",
                fontsize=7.8,
                color=colour("ink"),
            )
    label = AT_CEILINGS if with_text else None
    xs, ys = zip(*places, strict=True)
    ax.plot(xs, ys, ls="", marker="|", ms=9, mew=1.6, color=shade, label=label)


def _draw_text_point(
    ax: Axes, name: str, rates: Mapping[str, Rate], shade: str, top: float
) -> None:
    over, refused = rates["all respond rows"], rates["refused, all categories"]
    if over.value is None or refused.value is None or over.value > top:
        return
    ax.errorbar(
        [100 * over.value],
        [100 * refused.value],
        xerr=_bars(over),
        yerr=_bars(refused),
        color=shade,
        fmt="X",
        ms=6,
        lw=1.1,
        label=f"{short(name)}, by text",
    )


def _bars(found: Rate) -> list[list[float]]:
    """Lengths of the two arms of an error bar, in percent."""
    if found.value is None or found.low is None or found.high is None:
        return [[0.0], [0.0]]
    return [[100 * (found.value - found.low)], [100 * (found.high - found.value)]]


def _trade_off_titles(ax: Axes, analyses: Sequence[Analysis], zoom: bool) -> None:
    if not zoom:
        titles(ax, "Whole range", "as all knobs move together")
        return
    values = [a.trade_off.refusal_at[0.05].value or 0 for a in analyses]
    if len(values) <= 2:
        shown = " and ".join(f"{100 * value:.0f}%" for value in values)
    else:
        shown = f"{100 * min(values):.0f}% to {100 * max(values):.0f}%"
    titles(ax, "Up to 20% over-refusal", f"{shown} refused at 5% over-refusal")


# --- reliability


def _reliability_picture(analyses: Sequence[Analysis]) -> Picture:
    def before(ax: Axes) -> None:
        _draw_reliability(ax, "As the model states it", analyses, [a.before for a in analyses])

    def after(ax: Axes) -> None:
        known = [(a, a.after) for a in analyses if a.after is not None]
        scaled = ""
        if len(known) == 1:
            scaled = ", T = " + " and ".join(f"{t:.2f}" for t in known[0][0].temperatures)
        of, found = [a for a, _ in known], [r for _, r in known]
        _draw_reliability(ax, "After temperature scaling", of, found, scaled)

    panels = [Panel(before, PANEL, "Reliability as stated")]
    if any(a.after is not None for a in analyses):
        panels.append(Panel(after, PANEL, "Reliability after temperature scaling"))
    return Picture(
        "reliability",
        "Can the refusal probability be taken at its word?",
        "On the diagonal, prompts given a refusal probability of 70% are ones that should be "
        "refused 70% of the time, in this mix of prompts. Temperatures are fitted on the other "
        "half of the groups.",
        tuple(panels),
    )


def _draw_reliability(
    ax: Axes,
    title: str,
    analyses: Sequence[Analysis],
    found: Sequence[Reliability],
    scaled: str = "",
) -> None:
    ax.plot([0, 100], [0, 100], color=colour("muted"), lw=0.9, ls=":", label="taken at its word")
    errors = []
    for i, (analysis, one) in enumerate(zip(analyses, found, strict=True)):
        gap = np.abs(one.predicted - one.observed)
        errors.append(100 * float((gap * one.counts).sum() / one.n))
        each = f"{len(one.counts)} bins, n={one.n}"
        ax.errorbar(
            100 * one.predicted,
            100 * one.observed,
            yerr=100 * np.clip([one.observed - one.low, one.high - one.observed], 0, 1),
            color=colour(i),
            marker=MARKERS[i % len(MARKERS)],
            ms=4.5,
            lw=1.3,
            elinewidth=1.0,
            capsize=2,
            clip_on=False,
            label=each if len(found) == 1 else f"{short(analysis.name)}, {each}",
        )
    for axis, limit in ((ax.xaxis, ax.set_xlim), (ax.yaxis, ax.set_ylim)):
        percent_axis(axis, limit)
    ax.set_xlabel("stated refusal probability")
    ax.set_ylabel("share that should be refused")
    shown = [f"{error:.1f}" for error in errors]
    span = " and ".join(shown) if len(shown) <= 2 else f"{min(errors):.1f} to {max(errors):.1f}"
    titles(ax, title, f"{span} points off on average{scaled}")
    legend(ax)
