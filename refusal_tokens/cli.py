"""The command ``refusal-tokens``: one subcommand a stage, each imported only when called."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from refusal_tokens import __version__
from refusal_tokens.errors import InputError

if TYPE_CHECKING:
    from refusal_tokens.policy import Policy
    from refusal_tokens.steering import Reply, SteeredModel


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status.

    0: done. 2: the input was wrong, with one message. 130: interrupted. Anything else raises.
    """
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of a pipe has gone, as with `| head`.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="refusal-tokens",
        description="Train refusal tokens into a language model and dial its refusal rates.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_train(commands)
    _add_data(commands)
    _add_profile(commands)
    _add_generate(commands)
    _add_inspect(commands)
    _add_chat(commands)
    _add_evaluate(commands)
    return parser


def _command(commands: Any, name: str, run: Any, text: str) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    command.set_defaults(run=run)
    return command


# --- train


def _add_train(commands: Any) -> None:
    command = _command(commands, "train", _train, "Train refusal tokens into a base model.")
    command.add_argument("recipe", help="YAML file; see recipes/")
    command.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change a setting, such as learning_rate=1e-4 or refusal_tokens.control_share=0.7",
    )
    command.add_argument("--output-dir", type=Path, help="default: runs/RECIPE-MODEL")
    command.add_argument("--resume", action="store_true", help="go on from the last saved step")
    command.add_argument("--overwrite", action="store_true", help="replace the run that is there")
    command.add_argument(
        "--dry-run", action="store_true", help="print counts, memory, disk, time; train nothing"
    )


def _train(options: argparse.Namespace) -> None:
    _quiet_libraries()
    from refusal_tokens.recipe import load_recipe

    recipe = load_recipe(options.recipe, options.set)
    if not options.dry_run:
        _restart_for_cpu()
    from refusal_tokens.training import prepare, start_run, train

    model_name = Path(recipe.model_name_or_path).name
    folder = options.output_dir or Path("runs") / f"{recipe.name}-{model_name}"
    prepared = prepare(recipe)
    for row in prepared.examples.dropped:
        print(f"warning: row {row!r} is dropped: longer than max_length", file=sys.stderr)
    if options.dry_run:
        from refusal_tokens.estimate import estimate

        print(estimate(prepared, folder))
        return
    start_run(folder, prepared, resume=options.resume, overwrite=options.overwrite)
    train(prepared, folder, resume=options.resume)
    from refusal_tokens.reporting import report_run

    print(report_run(folder, prepared.rows))


def _restart_for_cpu() -> None:
    import torch

    if not torch.accelerator.is_available():
        from refusal_tokens.allocator import restart_with_allocator_settings

        sys.stdout.flush()
        restart_with_allocator_settings()


def _quiet_libraries() -> None:
    """Keep the libraries' notices off the screen; their errors still come through."""
    import logging
    import warnings

    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*save_embedding_layers.*")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from datasets import disable_progress_bars
    from transformers.utils import logging as transformers_logging

    disable_progress_bars()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


# --- data


def _add_data(commands: Any) -> None:
    parser = commands.add_parser("data", help="Check and split rows.")
    stages = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    check = _command(stages, "check", _data_check, "Check files of rows, and their splits.")
    check.add_argument("path", nargs="+", help="files, or a folder with train.jsonl and others")
    _add_taxonomy(check)
    check.add_argument("--json", action="store_true")
    split = _command(stages, "split", _data_split, "Split rows into files, whole groups at a time.")
    split.add_argument("path", nargs="+")
    split.add_argument("--output-dir", type=Path, required=True)
    split.add_argument("--shares", default="train=0.64,calibration=0.18,test=0.18")
    split.add_argument("--overwrite", action="store_true")
    _add_taxonomy(split)


def _add_taxonomy(command: argparse.ArgumentParser) -> None:
    command.add_argument("--taxonomy", help="YAML file; default: the five categories of CoCoNot")
    command.add_argument(
        "--column",
        action="append",
        default=[],
        metavar="FIELD=COLUMN",
        help="the column that holds a row's field, such as prompt=question",
    )


def _taxonomy_of(options: argparse.Namespace) -> Any:
    from refusal_tokens.taxonomy import default_taxonomy, load_taxonomy

    return load_taxonomy(options.taxonomy) if options.taxonomy else default_taxonomy()


def _pairs(values: Sequence[str], option: str) -> dict[str, str]:
    pairs = {}
    for value in values:
        key, equals, text = value.partition("=")
        if not equals or not key or not text:
            raise InputError(f"{option} {value!r}: allowed: name=value")
        if key in pairs:
            raise InputError(f"{option}: {key!r} twice")
        pairs[key] = text
    return pairs


def _data_files(paths: Sequence[str]) -> list[str]:
    files: list[str] = []
    for path in paths:
        if Path(path).is_dir():
            found = sorted(
                str(p) for s in ("jsonl", "parquet", "csv") for p in Path(path).glob(f"*.{s}")
            )
            if not found:
                raise InputError(f"{path}: no .jsonl, .parquet or .csv file in this folder")
            files += found
        else:
            files.append(path)
    return files


def _data_check(options: argparse.Namespace) -> None:
    from refusal_tokens.audit import audit, audit_report
    from refusal_tokens.rows import read_rows

    taxonomy, columns = _taxonomy_of(options), _pairs(options.column, "--column")
    files = _data_files(options.path)
    splits = {Path(f).stem: read_rows([f], taxonomy, columns=columns) for f in files}
    found = audit(splits, taxonomy)
    if options.json:
        counts = {
            name: {f"{label}/{category}": n for (label, category), n in cells.items()}
            for name, cells in found.counts.items()
        }
        result = {"counts": counts, "faults": found.faults, "warnings": found.warnings}
        print(json.dumps(result, indent=2))
    else:
        print(audit_report(found, taxonomy))
    if found.faults:
        raise InputError(f"{len(found.faults)} faults in the rows")
    if not options.json:
        print("\nNext: refusal-tokens train RECIPE --dry-run")


def _data_split(options: argparse.Namespace) -> None:
    from refusal_tokens.rows import read_rows, split_by_group, write_jsonl

    try:
        shares = {k: float(v) for k, v in _pairs(options.shares.split(","), "--shares").items()}
    except ValueError:
        raise InputError(f"--shares {options.shares!r}: allowed: name=number,...") from None
    columns = _pairs(options.column, "--column")
    rows = read_rows(_data_files(options.path), _taxonomy_of(options), columns=columns)
    parts = split_by_group(rows, shares)
    targets = {name: options.output_dir / f"{name}.jsonl" for name in parts}
    for target in targets.values():
        if target.exists() and not options.overwrite:
            raise InputError(f"{target}: exists; use --overwrite or another --output-dir")
    for name, part in parts.items():
        write_jsonl(targets[name], part)
        print(f"{targets[name]}  {len(part)} rows")
    print(f"\nNext: refusal-tokens data check {options.output_dir}")


# --- profile


def _add_profile(commands: Any) -> None:
    command = _command(
        commands, "profile", _profile, "Store the control logits of a model over labelled prompts."
    )
    command.add_argument("checkpoint")
    command.add_argument("--data", nargs="+", required=True, help="files of rows")
    command.add_argument("--output", type=Path, required=True, help="a .parquet file")
    command.add_argument("--temperatures", type=float, nargs="+", default=[1.0])
    command.add_argument("--dtype", default="auto", help="of the weights; default: as saved")
    command.add_argument("--overwrite", action="store_true")
    command.add_argument("--json", action="store_true")
    command.add_argument("--column", action="append", default=[], metavar="FIELD=COLUMN")


def _profile(options: argparse.Namespace) -> None:
    from refusal_tokens.checkpoint import load_info
    from refusal_tokens.curves import summarise, summary_table
    from refusal_tokens.policy import Policy
    from refusal_tokens.profiles import write_profile
    from refusal_tokens.rows import read_rows

    if options.output.exists() and not options.overwrite:
        raise InputError(f"{options.output}: exists; use --overwrite or another --output")
    taxonomy = load_info(options.checkpoint).taxonomy
    columns = _pairs(options.column, "--column")
    rows = read_rows(_data_files(options.data), taxonomy, columns=columns, labelled=False)
    _quiet_libraries()
    from refusal_tokens.checkpoint import load_checkpoint
    from refusal_tokens.prefill import profile_rows

    checkpoint = load_checkpoint(options.checkpoint, dtype=options.dtype)
    profile = profile_rows(checkpoint, rows, temperatures=options.temperatures)
    write_profile(options.output, profile)
    summary = summarise(profile, Policy().knobs(taxonomy))
    if options.json:
        print(json.dumps(summary.to_dict(), indent=2))
    else:
        print(f"{options.output}: {len(profile)} prompts, at bias 0:\n{summary_table(summary)}")


# --- generate, inspect, chat


def _add_policy(command: argparse.ArgumentParser) -> None:
    command.add_argument("--policy", help="a policy file")
    command.add_argument(
        "--bias",
        action="append",
        default=[],
        metavar="CATEGORY=NATS",
        help="such as safety=2 or humanizing=-4; positive refuses more readily",
    )
    command.add_argument("--rule", choices=["route", "bias", "threshold"])
    command.add_argument("--dtype", default="auto", help="of the weights; default: as saved")


def _policy_of(options: argparse.Namespace, model: SteeredModel) -> Policy:
    from dataclasses import replace

    from refusal_tokens.policy import Policy, load_policy

    info = model.checkpoint.info
    policy = Policy()
    if options.policy:
        policy = load_policy(options.policy, info.taxonomy, info.model_fingerprint)
    if options.rule:
        policy = replace(policy, rule=options.rule)
    policy = policy.with_bias(_biases(options.bias))
    policy.knobs(info.taxonomy)
    return policy


def _biases(values: Sequence[str]) -> dict[str, float]:
    try:
        return {knob: float(value) for knob, value in _pairs(values, "--bias").items()}
    except ValueError:
        raise InputError(f"--bias {' '.join(values)}: allowed: category=number") from None


def _load(options: argparse.Namespace) -> SteeredModel:
    _quiet_libraries()
    from refusal_tokens.steering import SteeredModel

    return SteeredModel.from_checkpoint(options.checkpoint, dtype=options.dtype)


def _add_generate(commands: Any) -> None:
    command = _command(commands, "generate", _generate, "Reply to prompts under a policy.")
    command.add_argument("checkpoint", help="a checkpoint or run folder")
    command.add_argument("prompt", nargs="*", help="prompts; default: lines of standard input")
    command.add_argument("--input", help="a file of rows, or a .txt file with one prompt a line")
    command.add_argument("--system", help="a system prompt")
    command.add_argument(
        "--sweep",
        metavar="CATEGORY=NATS,...",
        help="reply to each prompt under several settings of one knob, such as safety=-4,0,4",
    )
    _add_policy(command)
    command.add_argument("--max-new-tokens", type=int, default=256)
    command.add_argument("--temperature", type=float, default=0.0, help="of the text; 0: greedy")
    command.add_argument("--top-p", type=float, default=1.0)
    command.add_argument("--seed", type=int, default=0, help="of the text sampling")
    command.add_argument("--batch-size", type=int, default=8)
    command.add_argument("--json", action="store_true", help="one JSON object a reply")


def _generate(options: argparse.Namespace) -> None:
    from refusal_tokens.checkpoint import load_info
    from refusal_tokens.rows import messages_from

    taxonomy = load_info(options.checkpoint).taxonomy
    settings = _text_settings(options)
    biases = _sweep(options.sweep) or [{}]
    for knob in {knob for bias in biases for knob in bias}:
        taxonomy.knob_index(knob)
    prompts = [messages_from(p, options.system) for p in _prompts(options, taxonomy)]
    if not prompts:
        raise InputError("no prompt; give one as an argument, with --input or on standard input")
    model = _load(options)
    base = _policy_of(options, model)
    policies = [base.with_bias(bias) for bias in biases]
    import torch

    torch.manual_seed(options.seed)
    jobs = [(row, policy) for row in range(len(prompts)) for policy in policies]
    for start in range(0, len(jobs), options.batch_size):
        batch = jobs[start : start + options.batch_size]
        rows = [row for row, _ in batch]
        chosen = [policy for _, policy in batch]
        replies = model.generate([prompts[r] for r in rows], chosen, rows=rows, **settings)
        for row, reply in zip(rows, replies, strict=True):
            _print_reply(prompts[row], reply, options)
    if not options.json:
        print(
            f"\nNext: refusal-tokens inspect {options.checkpoint} PROMPT   (why, and what flips it)"
        )


def _text_settings(options: argparse.Namespace) -> dict[str, Any]:
    checks = {
        "--max-new-tokens": options.max_new_tokens >= 1,
        "--temperature": options.temperature >= 0,
        "--top-p": 0 < options.top_p <= 1,
        "--batch-size": options.batch_size >= 1,
    }
    for name, fits in checks.items():
        if not fits:
            raise InputError(f"{name}: out of range")
    if options.temperature == 0:
        return {"max_new_tokens": options.max_new_tokens, "do_sample": False}
    return {
        "max_new_tokens": options.max_new_tokens,
        "do_sample": True,
        "temperature": options.temperature,
        "top_p": options.top_p,
        "top_k": 0,
    }


def _sweep(text: str | None) -> list[dict[str, float]]:
    if text is None:
        return []
    knob, equals, values = text.partition("=")
    try:
        numbers = [float(value) for value in values.split(",")]
    except ValueError:
        numbers = []
    if not equals or not numbers:
        raise InputError(f"--sweep {text!r}: allowed: category=number,number,...")
    return [{knob: number} for number in numbers]


def _prompts(options: argparse.Namespace, taxonomy: Any) -> list[Any]:
    if options.prompt:
        return list(options.prompt)
    if options.input and not options.input.endswith(".txt"):
        from refusal_tokens.rows import read_rows

        rows = read_rows([options.input], taxonomy, labelled=False)
        return [list(row.prompt) for row in rows]
    if options.input:
        from refusal_tokens.files import read_text

        text = read_text(options.input)
    else:
        if sys.stdin.isatty():
            print("Prompts, one a line; end with Ctrl-D:", file=sys.stderr)
        text = sys.stdin.read()
    return [line for line in text.splitlines() if line.strip()]


def _print_reply(prompt: Any, reply: Reply, options: argparse.Namespace) -> None:
    if options.json:
        record = {"prompt": [dict(m) for m in prompt], **reply.to_dict()}
        print(json.dumps(record, ensure_ascii=False), flush=True)
        return
    knobs = " ".join(f"{k}={v:+g}" for k, v in reply.policy.bias.items()) or "no bias"
    decision = f"{reply.decision}:{reply.category}" if reply.category else reply.decision
    print(f"\n> {prompt[-1]['content']}\n[{knobs}] -> {decision}\n{reply.text}", flush=True)


def _add_inspect(commands: Any) -> None:
    command = _command(
        commands, "inspect", _inspect, "Show why a prompt is refused, and what would flip it."
    )
    command.add_argument("checkpoint")
    command.add_argument("prompt")
    command.add_argument("--system", help="a system prompt")
    _add_policy(command)
    command.add_argument("--json", action="store_true")


def _inspect(options: argparse.Namespace) -> None:
    from refusal_tokens.inspection import inspect_prompt, inspection_report
    from refusal_tokens.rows import messages_from

    messages = messages_from(options.prompt, options.system)
    model = _load(options)
    found = inspect_prompt(model.checkpoint, messages, _policy_of(options, model))
    print(json.dumps(found.to_dict(), indent=2) if options.json else inspection_report(found))


def _add_chat(commands: Any) -> None:
    command = _command(commands, "chat", _chat, "Talk to a model; move its knobs with /bias.")
    command.add_argument("checkpoint")
    command.add_argument("--system", help="a system prompt")
    _add_policy(command)
    command.add_argument("--max-new-tokens", type=int, default=256)


def _chat(options: argparse.Namespace) -> None:
    from refusal_tokens.chat_loop import chat_loop

    model = _load(options)
    policy = _policy_of(options, model)
    chat_loop(model, policy, system=options.system, max_new_tokens=options.max_new_tokens)


# --- evaluate


def _add_evaluate(commands: Any) -> None:
    command = _command(
        commands, "evaluate", _evaluate, "Force each control token and judge the text it opens."
    )
    command.add_argument("checkpoint")
    command.add_argument("--data", nargs="+", required=True, help="files of rows")
    command.add_argument("--output", type=Path, required=True, help="an outcomes .parquet file")
    command.add_argument("--limit", type=int, default=100, help="prompts a token; default 100")
    command.add_argument("--max-new-tokens", type=int, default=64)
    command.add_argument("--dtype", default="auto")
    command.add_argument("--overwrite", action="store_true")
    command.add_argument("--json", action="store_true")


def _evaluate(options: argparse.Namespace) -> None:
    from refusal_tokens.checkpoint import load_info
    from refusal_tokens.rows import read_rows

    if options.output.exists() and not options.overwrite:
        raise InputError(f"{options.output}: exists; use --overwrite or another --output")
    if options.limit < 1:
        raise InputError("--limit: allowed: 1 or more")
    taxonomy = load_info(options.checkpoint).taxonomy
    rows = read_rows(_data_files(options.data), taxonomy)
    model = _load(options)
    from refusal_tokens.reporting import evaluate_adherence

    print(evaluate_adherence(model, rows, options))
