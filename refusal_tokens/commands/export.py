"""``export``: a checkpoint or a policy in the form that other programs read."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from refusal_tokens.commands.common import command, next_line, quiet_libraries
from refusal_tokens.errors import InputError, unknown
from refusal_tokens.files import check_new_file

# Format -> the options that it takes besides --output.
FORMATS = {
    "gguf": ("outtype", "verify"),
    "logit-bias": ("policy", "profile"),
    "generation-config": ("policy", "profile"),
}


def add(commands: Any) -> None:
    """Add the subcommand."""
    added = command(
        commands, "export", _export, "Write a checkpoint or policy in the form other servers read."
    )
    added.add_argument("checkpoint", help="a checkpoint or run folder")
    added.add_argument("--format", required=True, help=", ".join(FORMATS))
    added.add_argument("--output", type=Path, help="the file to write")
    added.add_argument("--policy", help="a policy file of rule bias (logit-bias, ...-config)")
    added.add_argument("--profile", help="a profile of the model, for the rates that this gives")
    added.add_argument("--outtype", help="gguf: q8_0 (default), f16 or f32")
    added.add_argument("--verify", metavar="FILE", help="gguf: check this file, write none")
    added.add_argument("--overwrite", action="store_true", help="replace what is there")
    added.add_argument("--json", action="store_true", help="print JSON")


def _export(options: argparse.Namespace) -> None:
    if options.format not in FORMATS:
        raise InputError(f"--format: {unknown('format', options.format, FORMATS)}")
    for name in sorted({name for names in FORMATS.values() for name in names}):
        if getattr(options, name) is not None and name not in FORMATS[options.format]:
            raise InputError(f"--{name}: does not go with --format {options.format}")
    if options.output is None and options.verify is None:
        raise InputError("--output: missing; the file to write is needed")
    if options.output is not None:
        check_new_file(options.output, options.overwrite)
    quiet_libraries()
    report = _gguf(options) if options.format == "gguf" else _biases(options)
    if options.json:
        print(json.dumps(report, indent=2))


def _gguf(options: argparse.Namespace) -> dict[str, Any]:
    from refusal_tokens.checkpoint import load_tokenizer_of
    from refusal_tokens.serving.gguf_check import check_gguf
    from refusal_tokens.serving.gguf_export import LIMITS, export_gguf

    if options.verify is not None and (options.output or options.outtype):
        raise InputError("--verify checks a file and writes none; leave out --output and --outtype")
    if options.verify is not None:
        info, tokenizer = load_tokenizer_of(options.checkpoint)
        found = check_gguf(options.verify, info, str(tokenizer.chat_template))
    else:
        found = export_gguf(options.checkpoint, options.output, options.outtype or "q8_0")
    if not options.json:
        tensors = ", ".join(f"{n} {kind}" for kind, n in found.tensors.items())
        print(f"{found.path}: {found.bytes / 1e6:.0f} MB, {found.architecture}, tensors {tensors}")
        print(f"checked: chat template, {found.vocabulary} tokens, control tokens as special ones:")
        print("\n".join(f"  {number}  {token}" for token, number in found.control_tokens.items()))
        _print_limits(LIMITS)
        server = ["llama-server", "--model", found.path, "--host", "127.0.0.1", "--port", "8080"]
        print("\n" + next_line(*server))
    return {**found.to_dict(), "cannot_express": list(LIMITS)}


def _biases(options: argparse.Namespace) -> dict[str, Any]:
    from refusal_tokens.checkpoint import find_checkpoint, load_info
    from refusal_tokens.files import read_json, write_json
    from refusal_tokens.policy import load_policy
    from refusal_tokens.profiles import read_profile
    from refusal_tokens.serving.bias_export import (
        LIMITS,
        generation_config_json,
        logit_bias_json,
        stock_rates,
        token_biases,
    )

    info = load_info(options.checkpoint)
    if options.policy is None:
        raise InputError(f"--format {options.format} needs --policy, a policy file of rule bias")
    policy = load_policy(options.policy, info.taxonomy, info.model_fingerprint)
    biases = token_biases(policy, info)
    profile = read_profile(options.profile) if options.profile else None
    rates = stock_rates(profile, biases, info) if profile else None
    if options.format == "logit-bias":
        report = logit_bias_json(policy, info, biases, rates)
    else:
        file = find_checkpoint(options.checkpoint) / "generation_config.json"
        own = read_json(file) if file.is_file() else {}
        report = generation_config_json(policy, info, biases, rates, own)
    write_json(options.output, report)
    if not options.json:
        print(f"{options.output}: biases on control tokens, nats, at most 0")
        for number, token in zip(info.control_token_ids, info.taxonomy.tokens, strict=True):
            print(f"  {number}  {token:26}{biases[number]:+.3f}")
        print("\nOn a stock server at temperature 0, 95% intervals:" if rates else "")
        print(rates or "Rates: name a profile of this model with --profile.")
        _print_limits(LIMITS)
        print(f"\nNext: {_next(options)}")
    return report


def _next(options: argparse.Namespace) -> str:
    if options.format == "logit-bias":
        return f"send the value of 'logit_bias' in {options.output} with every request"
    return f"copy {options.output} over generation_config.json in the model's folder"


def _print_limits(limits: tuple[str, ...]) -> None:
    print("\nWhat this form cannot express:")
    print("\n".join(f"  {limit}" for limit in limits))
