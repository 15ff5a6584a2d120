"""``data check`` and ``data split``: rows before training."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from refusal_tokens.commands.common import add_map, command, data_files, map_of, next_line, pairs
from refusal_tokens.errors import InputError
from refusal_tokens.files import check_new_file


def add(commands: Any) -> None:
    """Add the subcommand."""
    parser = commands.add_parser("data", help="Check and split rows.")
    stages = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    check = command(stages, "check", _data_check, "Check files of rows, and their splits.")
    check.add_argument("path", nargs="+", help="files, or a folder with train.jsonl and others")
    _add_taxonomy(check)
    check.add_argument("--json", action="store_true", help="print JSON")
    split = command(stages, "split", _data_split, "Split rows into files, whole groups at a time.")
    split.add_argument("path", nargs="+", help="files of rows, or folders of them")
    split.add_argument("--output-dir", type=Path, required=True, help="a file for each share")
    split.add_argument(
        "--shares", default="train=0.64,calibration=0.18,test=0.18", help="default: %(default)s"
    )
    split.add_argument("--overwrite", action="store_true", help="replace what is there")
    _add_taxonomy(split)


def _add_taxonomy(command: argparse.ArgumentParser) -> None:
    command.add_argument("--taxonomy", help="YAML file; default: the five categories of CoCoNot")
    add_map(command)


def _taxonomy_of(options: argparse.Namespace) -> Any:
    from refusal_tokens.taxonomy import default_taxonomy, load_taxonomy

    return load_taxonomy(options.taxonomy) if options.taxonomy else default_taxonomy()


def _data_check(options: argparse.Namespace) -> None:
    from refusal_tokens.audit import audit
    from refusal_tokens.audit_report import audit_report
    from refusal_tokens.rows import read_sources
    from refusal_tokens.sources import Source

    taxonomy, row_map = _taxonomy_of(options), map_of(options.map)
    files = data_files(options.path)
    stems = [Path(file).stem for file in files]
    # Files of one name in two folders keep their paths.
    names = [s if stems.count(s) == 1 else str(f) for s, f in zip(stems, files, strict=True)]
    parts = read_sources([Source(str(file), row_map) for file in files], taxonomy)
    splits = {name: part.rows for name, part in zip(names, parts, strict=True)}
    found = audit(splits, taxonomy)
    if options.json:
        print(json.dumps(found.record(), indent=2))
    else:
        print(audit_report(found, taxonomy))
    if found.faults:
        raise InputError(f"{len(found.faults)} faults in the rows")
    if not options.json:
        print("\nNext: refusal-tokens train RECIPE --dry-run")


def _data_split(options: argparse.Namespace) -> None:
    from refusal_tokens.rows import read_rows, split_by_group, write_jsonl

    try:
        shares = {k: float(v) for k, v in pairs(options.shares.split(","), "--shares").items()}
    except ValueError:
        raise InputError(f"--shares {options.shares!r}: allowed: name=number,...") from None
    # Each name becomes that of a file.
    odd = [name for name in shares if not name.replace("-", "").replace("_", "").isalnum()]
    if odd:
        raise InputError(
            f"--shares: found part {odd[0]!r}; allowed: letters, digits, '-' and '_' in a name"
        )
    row_map = map_of(options.map)
    rows = read_rows(data_files(options.path), _taxonomy_of(options), row_map=row_map)
    parts = split_by_group(rows, shares)
    targets = {name: options.output_dir / f"{name}.jsonl" for name in parts}
    for target in targets.values():
        check_new_file(target, options.overwrite, "--output-dir")
    for name, part in parts.items():
        write_jsonl(targets[name], part)
        print(f"{targets[name]}  {len(part)} rows")
    print("\n" + next_line("refusal-tokens", "data", "check", options.output_dir))
