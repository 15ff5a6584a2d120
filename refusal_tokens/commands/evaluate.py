"""``evaluate``: does the text obey the control token, and what did training cost?"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from refusal_tokens.commands.common import add_map, command, data_files, map_of, next_line
from refusal_tokens.commands.curves import listed
from refusal_tokens.commands.steering_options import add_policy, load, policy_of
from refusal_tokens.errors import InputError, unknown
from refusal_tokens.files import check_new_file

if TYPE_CHECKING:
    from refusal_tokens.evaluate import Plan
    from refusal_tokens.rows import Row
    from refusal_tokens.steering import SteeredModel
    from refusal_tokens.taxonomy import Taxonomy


def add(commands: Any) -> None:
    """Add the subcommand."""
    added = command(
        commands,
        "evaluate",
        _evaluate,
        "Generate under the model's own decisions and under each forced control token, and judge "
        "the text.",
    )
    added.add_argument("checkpoint", help="a run, or the model in it")
    added.add_argument("--data", nargs="+", required=True, help="files of rows")
    added.add_argument("--output", type=Path, required=True, help="an outcomes .parquet file")
    add_map(added)
    add_policy(added)
    added.add_argument(
        "--force",
        default="all",
        metavar="all|none|A,B",
        help="control tokens to force, as respond or a category; default: all",
    )
    added.add_argument(
        "--also-respond-to",
        default="",
        metavar="A,B",
        help="measurement only: force <|respond|> on prompts labelled refuse of these categories "
        "too, such as safety, whose replies may be harmful; default: only of incomplete, "
        "indeterminate, humanizing and unsupported",
    )
    added.add_argument(
        "--base",
        default="auto",
        metavar="NAME|none",
        help="the model to compare helpfulness with; default: the one that was tuned",
    )
    added.add_argument("--limit", type=int, default=100, help="prompts, evenly; default 100")
    added.add_argument("--max-new-tokens", type=int, default=64, help="default: 64")
    added.add_argument("--batch-size", type=int, default=48, help="replies at once; default 48")
    added.add_argument("--overwrite", action="store_true", help="replace what is there")
    added.add_argument("--json", action="store_true", help="print JSON")


def _evaluate(options: argparse.Namespace) -> None:
    from refusal_tokens.checkpoint import load_info
    from refusal_tokens.outcomes import SIDECARS, beside
    from refusal_tokens.rows import read_rows

    for file in (options.output, *(beside(options.output, what) for what in SIDECARS)):
        check_new_file(file, options.overwrite)
    for option in ("limit", "max_new_tokens", "batch_size"):
        if getattr(options, option) < 1:
            raise InputError(f"--{option.replace('_', '-')}: allowed: 1 or more")
    taxonomy = load_info(options.checkpoint).taxonomy
    force = _forced(options.force, taxonomy)
    for category in listed(options.also_respond_to):
        if category not in taxonomy.category_ids:
            known = unknown("category", category, taxonomy.category_ids)
            raise InputError(f"--also-respond-to: {known}")
    rows = read_rows(data_files(options.data), taxonomy, row_map=map_of(options.map))
    plan = _plan(options, taxonomy, force)
    _run(options, load(options), rows, plan)


def _forced(text: str, taxonomy: Taxonomy) -> tuple[str, ...]:
    if text in ("all", "none"):
        return taxonomy.tokens if text == "all" else ()
    names = dict(zip(("respond", *taxonomy.knobs), taxonomy.tokens, strict=True))
    for name in listed(text):
        if name not in names:
            raise InputError(f"--force: {unknown('token', name, ['all', 'none', *names])}")
    return tuple(names[name] for name in listed(text))


def _plan(options: argparse.Namespace, taxonomy: Taxonomy, force: tuple[str, ...]) -> Plan:
    from refusal_tokens.evaluate import Plan
    from refusal_tokens.evaluation import HARMLESS

    plan = Plan(
        force=force,
        respond_to=frozenset({*HARMLESS, *listed(options.also_respond_to)}),
        policy=policy_of(options),
        max_new_tokens=options.max_new_tokens,
        batch_size=options.batch_size,
    )
    plan.check(taxonomy)
    return plan


def _run(options: argparse.Namespace, model: SteeredModel, rows: list[Row], plan: Plan) -> None:
    from refusal_tokens.analysis import plain
    from refusal_tokens.evaluation_run import evaluate_model
    from refusal_tokens.evaluation_table import evaluation_table

    name = model.checkpoint.info.base_model if options.base == "auto" else options.base
    base = None if name == "none" else name
    done = evaluate_model(model, rows, plan, options.output, base=base, limit=options.limit)
    if options.json:
        shown = {"report": done.report, "helpfulness": done.helpfulness, "files": done.files}
        print(json.dumps(plain(shown), indent=2))
        return
    profile, outcomes = done.files["profile"], done.files["outcomes"]
    print(f"{outcomes}: {done.report.prompts} prompts, {done.report.replies} replies,", end=" ")
    print(f"judged by {', '.join(done.report.judges)}\n")
    print(evaluation_table(done.report, plan.max_new_tokens, done.helpfulness))
    following = ["curves", profile, "--outcomes", outcomes, "--output", "curves"]
    print("\n" + next_line("refusal-tokens", *following))
