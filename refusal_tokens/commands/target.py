"""``target``: asked-for rates to a policy, or the nearest reachable point and why."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from refusal_tokens.commands.common import command, next_line, pairs
from refusal_tokens.errors import InputError
from refusal_tokens.files import check_new_file

if TYPE_CHECKING:
    from refusal_tokens.certificates import Certificate
    from refusal_tokens.policy import Policy
    from refusal_tokens.profiles import Profile
    from refusal_tokens.summary import Summary
    from refusal_tokens.targeting import Reached, Solution
    from refusal_tokens.targets import Targets


def add(commands: Any) -> None:
    """Add the subcommand."""
    added = command(commands, "target", _target, "Find the biases that reach asked-for rates.")
    added.add_argument("profile", help="a profile of labelled prompts to solve on")
    rate_options = (
        ("--rate", "refusal rate of a category, as near as the steps allow"),
        ("--min-rate", "least refusal rate of a category"),
    )
    for name, text in rate_options:
        added.add_argument(name, action="append", default=[], metavar="CATEGORY=RATE", help=text)
    added.add_argument(
        "--max-over-refusal",
        action="append",
        default=[],
        metavar="[CATEGORY=]RATE",
        help="ceiling over all respond rows, or over a category's near-misses",
    )
    added.add_argument("--preset", help="strict, balanced or permissive")
    added.add_argument(
        "--rule",
        choices=["route", "bias", "threshold"],
        default="route",
        help="what the biases are for; default: route",
    )
    added.add_argument(
        "--decision",
        choices=["greedy", "sampled"],
        default="greedy",
        help="sampled: drawn at temperature 1; default: greedy",
    )
    added.add_argument("--check", metavar="PROFILE", help="other rows to report the rates on")
    added.add_argument("--confidence", type=float, help="certify ceilings and floors, such as 0.95")
    added.add_argument(
        "--certify-on",
        metavar="PROFILE",
        help="the fresh rows of the certificate; default: half of the profile's groups",
    )
    added.add_argument(
        "--recentre",
        metavar="PROFILE",
        help="unlabelled traffic: add the logit bias that its mix of labels asks for",
    )
    added.add_argument("--output", type=Path, help="the policy file to write")
    added.add_argument("--accept-nearest", action="store_true", help="write it if out of reach too")
    added.add_argument("--overwrite", action="store_true", help="replace what is there")
    added.add_argument("--json", action="store_true", help="print JSON")


def _target(options: argparse.Namespace) -> int | None:
    from refusal_tokens.profiles import read_profile, same_model, split_profile
    from refusal_tokens.summary import summarise
    from refusal_tokens.targeting import reached, solve

    if options.output:
        check_new_file(options.output, options.overwrite)
    if options.certify_on and options.confidence is None:
        raise InputError("--certify-on needs --confidence")
    if options.recentre and options.confidence is not None:
        raise InputError("--recentre moves the biases off the setting that --confidence certifies")
    profile = read_profile(options.profile)
    others = {
        name: read_profile(path)
        for name in ("check", "certify_on", "recentre")
        if (path := getattr(options, name))
    }
    for name, other in others.items():
        same_model(profile, other, options.profile, getattr(options, name))
    targets = _targets(options, profile.taxonomy.category_ids)
    solved_on, fresh = profile, others.get("certify_on")
    if fresh is not None:
        _check_fresh(profile, fresh, options)
    if options.confidence is not None and fresh is None:
        solved_on, fresh = split_profile(profile)
    solution = solve(solved_on, targets, rule=options.rule, decision=options.decision)
    certificate = _certificate(options, targets, solution, fresh)
    policy = _policy(options, profile, targets, solution, certificate, others.get("recentre"))
    setting = policy.knobs(profile.taxonomy)
    # Of the policy itself, which a certificate or a new mix may have moved off the solution.
    measured = {f"reached on {len(solved_on)} prompts": solved_on}
    if "check" in others:
        measured[f"on {options.check}"] = others["check"]
    rates, *checked = [reached(own, targets, setting) for own in measured.values()]
    done = solution.feasible and (certificate is None or certificate.certified)
    written = options.output if done or options.accept_nearest else None
    if written:
        from refusal_tokens.policy import save_policy

        save_policy(written, policy)
    if options.json:
        lists = {"reached": rates, "checked": checked[0] if checked else ()}
        records = {name: [asdict(entry) for entry in own] for name, own in lists.items()}
        print(json.dumps(policy.to_dict() | records, indent=2))
        return None if done else 1
    columns = {
        head: (own_rates, summarise(own, setting))
        for (head, own), own_rates in zip(measured.items(), [rates, *checked], strict=True)
    }
    print(_table(columns, policy))
    if options.recentre:
        what = "what is asked holds" if solution.feasible else "the reasons below are"
        print(
            f"\nThe biases are moved for the mix of {options.recentre}. On {options.profile}, of "
            f"another mix, {what} for the setting before the move."
        )
    if not solution.feasible:
        print(_out_of_reach(options, solved_on, targets, solution))
    if certificate is not None:
        print(f"\n{certificate.statement}")
    if written:
        following = ["generate", "RUN", "--policy", written, "PROMPT"]
        print("\n" + next_line("refusal-tokens", *following))
    elif options.output:
        print(f"\n{options.output} was not written; --accept-nearest writes this setting")
    return None if done else 1


def _check_fresh(profile: Profile, fresh: Profile, options: argparse.Namespace) -> None:
    """A certificate holds for rows that the solver did not see."""
    seen = {*profile.columns["prompt_sha256"]}
    shared = sum(prompt in seen for prompt in fresh.columns["prompt_sha256"])
    if shared:
        raise InputError(
            f"--certify-on {options.certify_on}: {shared} of its {len(fresh)} prompts are in "
            f"{options.profile}, on which the knobs are solved; give other prompts, or leave the "
            "option out and half of the profile is kept back for the certificate"
        )


def _targets(options: argparse.Namespace, categories: tuple[str, ...]) -> Targets:
    from refusal_tokens.targets import Targets, preset

    base = preset(options.preset, categories) if options.preset else Targets()
    pooled = [value for value in options.max_over_refusal if "=" not in value]
    if len(pooled) > 1:
        raise InputError(f"--max-over-refusal: {' and '.join(pooled)}: one ceiling is allowed")
    named = [value for value in options.max_over_refusal if "=" in value]
    rates, floors = _numbers(options.rate, "--rate"), _numbers(options.min_rate, "--min-rate")
    kept = {c: rate for c, rate in base.min_rates.items() if c not in rates}
    return replace(
        base,
        # With ceilings alone the least over-refusal would be to refuse nothing at all.
        fewest_misses=base.fewest_misses
        or (options.preset is None and not rates and not floors and bool(options.max_over_refusal)),
        rates=rates,
        min_rates={**kept, **floors},
        max_over_refusal=_number(pooled[0], "--max-over-refusal")
        if pooled
        else base.max_over_refusal,
        max_category_over_refusal=_numbers(named, "--max-over-refusal"),
    )


def _numbers(values: Sequence[str], option: str) -> dict[str, float]:
    return {name: _number(text, option) for name, text in pairs(values, option).items()}


def _number(text: str, option: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise InputError(f"{option}: found {text!r}; allowed: a number from 0 to 1") from None


def _certificate(
    options: argparse.Namespace, targets: Targets, solution: Solution, fresh: Profile | None
) -> Certificate | None:
    if options.confidence is None or fresh is None:
        return None
    from refusal_tokens.certificates import certify
    from refusal_tokens.targets import free_knobs

    return certify(fresh, targets, solution, free_knobs(fresh, targets), options.confidence)


def _policy(
    options: argparse.Namespace,
    profile: Profile,
    targets: Targets,
    solution: Solution,
    certificate: Certificate | None,
    traffic: Profile | None,
) -> Policy:
    from refusal_tokens.policy import Policy
    from refusal_tokens.recentring import recentre

    bias = dict(solution.bias)
    if certificate is not None and certificate.bias is not None:
        bias = dict(certificate.bias)
    mix = None
    if traffic is not None:
        before, after, shift = recentre(profile, traffic)
        for knob, change in zip(profile.taxonomy.knobs, shift, strict=True):
            bias[knob] = bias.get(knob, 0.0) + float(change)
        tokens = profile.taxonomy.tokens
        mix = {t: [float(a), float(b)] for t, a, b in zip(tokens, before, after, strict=True)}
    return Policy(
        rule=options.rule,
        bias=bias,
        temperature=0.0 if options.decision == "greedy" else 1.0,
        model_fingerprint=profile.metadata.get("model_fingerprint"),
        taxonomy_hash=profile.taxonomy.hash,
        provenance={
            "asked": targets.to_dict(),
            "solution": solution.to_dict(),
            "certificate": certificate.to_dict() if certificate else None,
            "profile_hash": profile.data_hash,
            "prompts": len(profile),
            "mix_of_labels_before_and_after": mix,
        },
    )


def _table(columns: Mapping[str, tuple[Sequence[Reached], Summary]], policy: Policy) -> str:
    """Targets, then every refusal rate and over-refusal, one column a profile."""
    signs = {"equal": "=", "at_least": ">=", "at_most": "<="}
    lines = [["asked", *columns]]
    rates, wholes = zip(*columns.values(), strict=True)
    for entries in zip(*rates, strict=True):
        asked = f"{entries[0].name} {signs[entries[0].kind]} {100 * entries[0].asked:g}%"
        lines.append([asked, *(f"{e.rate}{'' if e.met else '  NOT MET'}" for e in entries)])
    for own in zip(*(whole.categories for whole in wholes), strict=True):
        if any(entry.refused.n for entry in own):
            name = f"refused, {own[0].category}"
            lines.append([name, *(str(entry.refused) for entry in own)])
    lines.append(["refused, all refuse rows", *(str(whole.refused) for whole in wholes)])
    over = (str(whole.over_refused) for whole in wholes)
    lines.append(["over-refusal of all respond rows", *over])
    # Adding zero keeps a knob that rounds to zero from having a sign.
    knobs = (f"{knob} {round(value, 2) + 0.0:+.2f}" for knob, value in policy.bias.items())
    lines.append([f"bias, nats, rule {policy.rule}", "  ".join(knobs) or "all at 0"])
    return "\n".join("".join(f"{cell:36}" for cell in line).rstrip() for line in lines)


def _out_of_reach(
    options: argparse.Namespace, profile: Profile, targets: Targets, solution: Solution
) -> str:
    lines = ["", "Out of reach. This is the nearest reachable point, because:"]
    lines += [f"  {reason}" for reason in solution.reasons]
    return "\n".join(lines + _frontier_lines(options, profile, targets))


def _frontier_lines(options: argparse.Namespace, profile: Profile, targets: Targets) -> list[str]:
    from refusal_tokens.targeting import frontier

    if not (targets.rates or targets.min_rates):
        return []
    lines = ["", "What the floors and rates come to under other ceilings on over-refusal:"]
    before = ""
    for ceiling, solution in frontier(
        profile, targets, rule=options.rule, decision=options.decision
    ):
        rates = "  ".join(
            f"{entry.name.split()[-1]} {100 * (entry.rate.value or 0):.1f}%"
            for entry in solution.reached
            if entry.kind != "at_most"
        )
        over = 100 * (solution.over_refusal.value or 0)
        found = f"{rates} at {over:.1f}% over-refusal"
        # A higher ceiling that gains nothing has nothing to say.
        if found != before:
            lines.append(f"  at most {100 * ceiling:g}%: {found}")
        before = found
    return lines
