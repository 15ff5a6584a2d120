"""``train``: a recipe to a run."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from refusal_tokens.commands.common import (
    command,
    quiet_libraries,
    warn_of_rows,
    warn_of_spellings,
)
from refusal_tokens.errors import InputError
from refusal_tokens.options import SPLITS

if TYPE_CHECKING:
    from refusal_tokens.rows import Row


def add(commands: Any) -> None:
    """Add the subcommand."""
    added = command(commands, "train", _train, "Train refusal tokens into a base model.")
    added.add_argument("recipe", help="YAML file; see recipes/")
    added.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change a setting, such as learning_rate=1e-4 or refusal_tokens.control_share=0.7",
    )
    added.add_argument("--output-dir", type=Path, help="default: runs/RECIPE-MODEL")
    added.add_argument("--resume", action="store_true", help="go on from the last saved step")
    added.add_argument("--overwrite", action="store_true", help="replace the run that is there")
    added.add_argument(
        "--dry-run", action="store_true", help="print counts, memory, disk, time; train nothing"
    )


def _train(options: argparse.Namespace) -> None:
    quiet_libraries()
    from refusal_tokens.recipe import load_recipe

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError(
            "train runs in one process; start it without accelerate launch or torchrun"
        )
    recipe = load_recipe(options.recipe, options.set)
    if not options.dry_run:
        _restart_for_cpu()
    from refusal_tokens.preparation import check_run, prepare
    from refusal_tokens.training import train

    model_name = Path(recipe.model_name_or_path).name
    folder = options.output_dir or Path("runs") / f"{recipe.name}-{model_name}"
    prepared = prepare(recipe)
    for row in prepared.examples.dropped:
        print(f"warning: row {row!r} is dropped: longer than max_length", file=sys.stderr)
    warn_of_spellings(
        [row for rows in prepared.rows.values() for row in rows], recipe.taxonomy.tokens
    )
    for split in SPLITS[1:]:
        _warn_of_trained(split, prepared.rows["train"], prepared.rows.get(split, ()))
    where = {"resume": options.resume, "overwrite": options.overwrite}
    if not options.dry_run:
        # Before the estimate, which takes a while; a dry run prints that too.
        check_run(folder, prepared, **where)
    from refusal_tokens.estimate import check_disk, estimate

    if len(prepared.drawn) > 1 or any(d.skipped or d.left_out for d in prepared.drawn):
        print("\n".join(f"mix      {drawn}" for drawn in prepared.drawn))
    expected = estimate(prepared, folder)
    print(f"{expected}\nrun      {folder}", flush=True)
    check_disk(expected, folder)
    if options.dry_run:
        check_run(folder, prepared, **where)
        return
    try:
        train(prepared, folder, **where)
    except KeyboardInterrupt:
        print(f"\nstopped; the same command with --resume goes on in {folder}", file=sys.stderr)
        raise
    from refusal_tokens.reporting import report_run

    print(report_run(folder, prepared.rows))


def _warn_of_trained(split: str, train: Sequence[Row], measured: Sequence[Row]) -> None:
    from refusal_tokens.safeguards import trained_prompts

    warn_of_rows(
        trained_prompts(train, measured),
        f"of {len(measured)} {split} prompts are trained on, so what is measured on them says "
        "too much",
    )


def _restart_for_cpu() -> None:
    import torch

    if not torch.accelerator.is_available():
        from refusal_tokens.allocator import restart_with_allocator_settings

        sys.stdout.flush()
        restart_with_allocator_settings()
