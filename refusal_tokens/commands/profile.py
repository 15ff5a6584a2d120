"""``profile``: the control logits of a model over labelled prompts."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from refusal_tokens.commands.common import (
    add_map,
    command,
    data_files,
    map_of,
    next_line,
    quiet_libraries,
    warn_of_spellings,
)
from refusal_tokens.errors import InputError
from refusal_tokens.files import check_new_file

if TYPE_CHECKING:
    from refusal_tokens.profiles import Profile
    from refusal_tokens.rows import Row


def add(commands: Any) -> None:
    """Add the subcommand."""
    added = command(
        commands, "profile", _profile, "Store the control logits of a model over labelled prompts."
    )
    added.add_argument("checkpoint", help="a run, or the model in it")
    added.add_argument("--data", nargs="+", required=True, help="files of rows")
    added.add_argument("--output", type=Path, required=True, help="a .parquet file")
    added.add_argument(
        "--temperatures",
        type=float,
        nargs="+",
        default=[1.0],
        help="to store the rest of the vocabulary at, beside 1",
    )
    added.add_argument(
        "--engine",
        choices=["transformers", "vllm"],
        default="transformers",
        help="default: transformers",
    )
    added.add_argument("--dtype", default="auto", help="of the weights; default: as saved")
    added.add_argument("--overwrite", action="store_true", help="replace what is there")
    added.add_argument("--json", action="store_true", help="print JSON")
    add_map(added)


def _profile(options: argparse.Namespace) -> None:
    from refusal_tokens.checkpoint import load_info
    from refusal_tokens.policy import Policy
    from refusal_tokens.profiles import write_profile
    from refusal_tokens.rows import read_rows
    from refusal_tokens.summary import summarise, summary_table

    check_new_file(options.output, options.overwrite)
    taxonomy = load_info(options.checkpoint).taxonomy
    row_map = map_of(options.map)
    rows = read_rows(data_files(options.data), taxonomy, row_map=row_map, labelled=False)
    warn_of_spellings(rows, taxonomy.tokens)
    quiet_libraries()
    profile = _profiled(options, rows)
    if profile is None:
        return
    write_profile(options.output, profile)
    summary = summarise(profile, Policy().knobs(taxonomy))
    if options.json:
        print(json.dumps(summary.to_dict(), indent=2))
    else:
        print(f"{options.output}: {len(profile)} prompts, at bias 0:\n{summary_table(summary)}")
        following = ["curves", options.output, "--output", "DIR"]
        print("\n" + next_line("refusal-tokens", *following))


def _profiled(options: argparse.Namespace, rows: Sequence[Row]) -> Profile | None:
    if options.engine == "vllm":
        return _with_vllm(options, rows)
    return profile_here(
        options.checkpoint,
        rows,
        dtype=options.dtype,
        output=options.output,
        temperatures=options.temperatures,
    )


def _with_vllm(options: argparse.Namespace, rows: Sequence[Row]) -> Profile:
    if options.temperatures != [1.0]:
        raise InputError(
            f"--temperatures {' '.join(map(str, options.temperatures))}: vLLM's log-probabilities "
            "are at temperature 1 alone; use --engine transformers for others"
        )
    from refusal_tokens.vllm_prefill import profile_rows_vllm

    return profile_rows_vllm(options.checkpoint, rows, dtype=options.dtype)


def profile_here(
    checkpoint: str,
    rows: Sequence[Row],
    *,
    dtype: str,
    output: Path | None,
    temperatures: Sequence[float] = (1.0,),
) -> Profile | None:
    """Profile rows with transformers; what is finished is kept beside the output for a resumption.

    Returns:
        The profile, in the first process alone where several share the work.
    """
    from accelerate import PartialState

    from refusal_tokens.checkpoint import load_checkpoint
    from refusal_tokens.prefill import profile_rows

    state = PartialState()
    device = str(state.device) if state.num_processes > 1 else None
    loaded = load_checkpoint(checkpoint, dtype=dtype, device=device)
    partial = output.with_name(f".{output.name}.partial") if output else None
    profile = profile_rows(loaded, rows, temperatures=temperatures, partial=partial)
    return profile if state.is_main_process else None
