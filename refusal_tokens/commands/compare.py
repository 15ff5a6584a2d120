"""``compare``: models on the same prompts, side by side and tested in pairs."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from itertools import combinations
from typing import TYPE_CHECKING, Any

from refusal_tokens.commands.common import command, names_of, next_line
from refusal_tokens.commands.curves import listed, report_options
from refusal_tokens.errors import InputError

if TYPE_CHECKING:
    from refusal_tokens.page import Report


def add(commands: Any) -> None:
    """Add the subcommand."""
    added = command(
        commands, "compare", _compare, "Compare models on the same prompts: a page with tests."
    )
    added.add_argument(
        "files", nargs="+", metavar="FILE", help="profiles, or outcomes of models without tokens"
    )
    report_options(added)
    added.add_argument("--names", default="", metavar="A,B", help="of the models, in order")


def _compare(options: argparse.Namespace) -> None:
    from refusal_tokens.analysis import plain
    from refusal_tokens.decision import knobs
    from refusal_tokens.outcomes import holds_outcomes, read_outcomes
    from refusal_tokens.profiles import read_profile
    from refusal_tokens.report import build_report, check_output, write_report

    names = _names(options)
    check_output(options.output, options.overwrite)
    profiles, outcomes = {}, {}
    ids: dict[str, frozenset[str]] = {}
    hashes: dict[str, str | None] = {}
    for name, path in zip(names, options.files, strict=True):
        if holds_outcomes(path):
            outcomes[name], metadata = read_outcomes(path)
            ids[name] = frozenset(outcome.id for outcome in outcomes[name])
        else:
            profiles[name] = read_profile(path)
            ids[name], metadata = frozenset(profiles[name].columns["id"]), profiles[name].metadata
        hashes[name] = metadata.get("data_hash")
    # Outcomes are matched by id: equal ids have to be of equal rows. Profiles carry their prompts.
    for a, b in combinations(names, 2):
        if (a in outcomes or b in outcomes) and ids[a] == ids[b]:
            _check_hashes(a, b, hashes)
    setting = None
    for profile in profiles.values():
        setting = knobs(options.rule or "route", [0.0] * len(profile.taxonomy.knobs))
    categories = listed(options.categories)
    report = build_report(profiles, setting, outcomes, categories=categories)
    write_report(options.output, report, f"{len(names)} models on the same prompts")
    if options.json:
        print(json.dumps(plain({"output": str(options.output), "tests": report.tests}), indent=2))
    else:
        print(_screen(report, options))


def _check_hashes(a: str, b: str, hashes: Mapping[str, str | None]) -> None:
    """Refuse two files of the same ids and other rows; one that states no hash is believed."""
    if None not in (hashes[a], hashes[b]) and hashes[a] != hashes[b]:
        raise InputError(
            f"{a} and {b}: the same ids, and other rows (data hashes {hashes[a]} and {hashes[b]})"
        )


def _names(options: argparse.Namespace) -> list[str]:
    if len(options.files) < 2:
        raise InputError(f"compare needs two files or more; found {options.files[0]}")
    names = listed(options.names) or names_of(options.files)
    if len(names) != len(options.files):
        raise InputError(f"--names: {len(names)} names for {len(options.files)} files")
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise InputError(f"{', '.join(sorted(twice))} twice; give each file its own with --names")
    return names


def _screen(report: Report, options: argparse.Namespace) -> str:
    from refusal_tokens.report_lines import model_lines, test_lines

    lines = [*model_lines(report), "", *test_lines(report)]
    lines += ["", f"Page, figures and numbers: {options.output}/index.html", ""]
    if report.analyses:
        following = ["target", "FILE", "--preset", "balanced", "--output", "policy.json"]
    else:
        following = ["profile", "CHECKPOINT", "--data", "FILE", "--output", "P.parquet"]
    return "\n".join([*lines, next_line("refusal-tokens", *following)])
