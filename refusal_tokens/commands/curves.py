"""``curves``: one profile to a page of control curves, trade-off, reliability and leakage."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from refusal_tokens.commands.common import command, names_of, next_line
from refusal_tokens.errors import InputError

if TYPE_CHECKING:
    from refusal_tokens.analysis import Analysis
    from refusal_tokens.decision import Knobs
    from refusal_tokens.profiles import Profile
    from refusal_tokens.text_curves import ForcedTexts


def add(commands: Any) -> None:
    """Add the subcommand."""
    added = command(
        commands,
        "curves",
        _curves,
        "Draw what each knob does, from a profile: a page, figures and numbers.",
    )
    added.add_argument("profile", help="a profile of labelled prompts")
    report_options(added)
    added.add_argument("--decision", choices=["greedy", "sampled"], help="default: greedy")
    added.add_argument(
        "--policy", metavar="FILE", help="the setting to start from; default: every bias at 0"
    )
    added.add_argument(
        "--outcomes",
        metavar="FILE",
        help="replies under each forced control token, of the same model and prompts, from "
        "`evaluate`: adds text-level curves",
    )
    added.add_argument("--name", help="what to call the model; default: its run, or the file")


def report_options(added: argparse.ArgumentParser) -> None:
    """Add what ``curves`` and ``compare`` share."""
    added.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to write")
    added.add_argument("--rule", choices=["route", "bias", "threshold"], help="default: route")
    added.add_argument(
        "--categories", default="", metavar="A,B", help="draw these alone; default: all of them"
    )
    added.add_argument("--overwrite", action="store_true", help="replace the report that is there")
    added.add_argument("--json", action="store_true", help="print JSON")


def _curves(options: argparse.Namespace) -> None:
    from refusal_tokens.analysis import plain
    from refusal_tokens.profiles import read_profile
    from refusal_tokens.report import build_report, check_output, write_report

    check_output(options.output, options.overwrite)
    profile = read_profile(options.profile)
    setting = _setting(options, profile)
    name = options.name or names_of([options.profile])[0]
    texts = _texts(options, profile)
    try:
        report = build_report(
            {name: profile},
            setting,
            categories=listed(options.categories),
            texts={} if texts is None else {name: texts},
        )
    except InputError as error:
        raise InputError(f"{options.profile}: {error}") from None
    write_report(options.output, report, f"Refusal rates of {name}")
    analysis = report.analyses[0]
    if options.json:
        shown = {"summary": analysis.summary, "measures": analysis.spread.measures}
        if analysis.text is not None:
            shown["text"] = replace(analysis.text, curves=())
        print(json.dumps(plain({"output": str(options.output), **shown}), indent=2))
    else:
        print(_screen(analysis, options))


def _texts(options: argparse.Namespace, profile: Profile) -> ForcedTexts | None:
    from refusal_tokens.outcomes import read_outcomes
    from refusal_tokens.text_curves import forced_texts

    if options.outcomes is None:
        return None
    outcomes, metadata = read_outcomes(options.outcomes)
    names = f"{options.profile} and {options.outcomes}"
    return forced_texts(profile, outcomes, metadata, names)


def listed(text: str) -> list[str]:
    """Split a list at its commas."""
    return [part.strip() for part in text.split(",") if part.strip()]


def _setting(options: argparse.Namespace, profile: Profile) -> Knobs:
    from refusal_tokens.decision import knobs
    from refusal_tokens.policy import load_policy

    zero = [0.0] * len(profile.taxonomy.knobs)
    if options.policy is None:
        temperature = 1.0 if options.decision == "sampled" else 0.0
        return knobs(options.rule or "route", zero, temperature)
    fingerprint = str(profile.metadata.get("model_fingerprint"))
    policy = load_policy(options.policy, profile.taxonomy, fingerprint)
    if not policy.masked:
        raise InputError(
            f"{options.policy}: the policy is not masked, so its rates do not follow from the "
            "control logits; use one with masked: true"
        )
    decision = "greedy" if policy.temperature == 0 else "sampled"
    for option, asked, own in (
        ("--rule", options.rule, policy.rule),
        ("--decision", options.decision, decision),
    ):
        if asked is not None and asked != own:
            raise InputError(
                f"{option} {asked}: {options.policy} says {own}; leave one of them out"
            )
    return policy.knobs(profile.taxonomy)


def _screen(analysis: Analysis, options: argparse.Namespace) -> str:
    from refusal_tokens.page import setting_words
    from refusal_tokens.summary import summary_table

    setting = setting_words(analysis.setting, analysis.provenance["knobs"])
    lines = [f"{options.profile}: {setting}", "", summary_table(analysis.summary)]
    labelled = analysis.summary.refused.n + analysis.summary.over_refused.n
    for ceiling in (1, 2, 5):
        found = analysis.spread.measures[f"refusal_at_{ceiling}"]
        numbers = [f"{100 * value:.0f}" for value in (found.low, found.high)]
        name = f"refused at {ceiling}% over-refusal"
        lines.append(f"{name:32}{100 * found.value:5.1f}%  [{', '.join(numbers)}] n={labelled}")
    if analysis.text is not None:
        lines += ["", f"{'':24}{'refused by token':27}refused by text"]
        for kind, by_text in analysis.text.by_text.items():
            lines.append(f"{kind:24}{analysis.text.by_token[kind]!s:27}{by_text}")
        lines.append(f"{analysis.text.left_out} prompts lack a reply under some token")
    lines += ["", f"Page, figures and numbers: {options.output}/index.html", ""]
    following = ["target", options.profile, "--preset", "balanced", "--output", "policy.json"]
    if options.policy:
        following = ["generate", "RUN", "--policy", options.policy, "PROMPT"]
    lines.append(next_line("refusal-tokens", *following))
    return "\n".join(lines)
