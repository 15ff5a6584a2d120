"""``traffic``: what a model does with unlabelled prompts, and whether they have drifted."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from refusal_tokens.commands.common import (
    add_map,
    command,
    data_files,
    map_of,
    next_line,
    quiet_libraries,
    warn_of_spellings,
)
from refusal_tokens.commands.profile import profile_here
from refusal_tokens.commands.steering_options import add_policy, policy_of
from refusal_tokens.files import check_new_file


def add(commands: Any) -> None:
    """Add the subcommand."""
    added = command(
        commands,
        "traffic",
        _traffic,
        "Show how much of unlabelled prompts is refused, by category, and whether they differ from "
        "those of a profile.",
    )
    added.add_argument("checkpoint", help="a run, or the model in it")
    added.add_argument(
        "--data", nargs="+", required=True, help="files of rows; labels are not used"
    )
    added.add_argument("--against", metavar="PROFILE", help="of the same model, to compare with")
    added.add_argument(
        "--output", type=Path, help="keep the profile of the prompts, a .parquet file"
    )
    added.add_argument("--overwrite", action="store_true", help="replace what is there")
    add_policy(added)
    added.add_argument("--json", action="store_true", help="print JSON")
    add_map(added)


def _traffic(options: argparse.Namespace) -> None:
    from refusal_tokens.checkpoint import load_info
    from refusal_tokens.profiles import check_model, read_profile, write_profile
    from refusal_tokens.rows import read_rows
    from refusal_tokens.traffic import drift, shares, traffic_record, traffic_table

    if options.output:
        check_new_file(options.output, options.overwrite)
    against = read_profile(options.against) if options.against else None
    policy = policy_of(options)
    info = load_info(options.checkpoint)
    if against is not None:
        where = f"--against {options.against}"
        check_model(against, info.model_fingerprint, info.taxonomy, where)
    row_map = map_of(options.map)
    rows = read_rows(data_files(options.data), info.taxonomy, row_map=row_map, labelled=False)
    warn_of_spellings(rows, info.taxonomy.tokens)
    quiet_libraries()
    profile = profile_here(options.checkpoint, rows, dtype=options.dtype, output=options.output)
    if profile is None:
        return
    if options.output:
        write_profile(options.output, profile)
    setting = policy.knobs(info.taxonomy)
    now = shares(profile, setting)
    found = drift(profile, against, setting) if against is not None else None
    if options.json:
        print(json.dumps(traffic_record(now, found), indent=2))
        return
    print(traffic_table(now, found))
    kept = options.output or "TRAFFIC.parquet"
    following = ["target", options.against or "PROFILE", "--preset", "balanced", "--recentre", kept]
    print("\n" + next_line("refusal-tokens", *following, "--output", "policy.json"))
