"""``generate``: replies under a policy."""

from __future__ import annotations

import argparse
import json
import math
import sys
from typing import TYPE_CHECKING, Any

from refusal_tokens.commands.common import command, next_line
from refusal_tokens.commands.steering_options import add_policy, load, policy_of
from refusal_tokens.errors import InputError

if TYPE_CHECKING:
    from refusal_tokens.steering import Reply


def add(commands: Any) -> None:
    """Add the subcommand."""
    added = command(commands, "generate", _generate, "Reply to prompts under a policy.")
    added.add_argument("checkpoint", help="a checkpoint or run folder")
    added.add_argument("prompt", nargs="*", help="prompts; default: lines of standard input")
    added.add_argument("--input", help="a file of rows, or a .txt file with one prompt a line")
    added.add_argument("--system", help="a system prompt")
    added.add_argument(
        "--sweep",
        metavar="CATEGORY=NATS,...",
        help="reply to each prompt under several settings of one knob, such as safety=-4,0,4",
    )
    add_policy(added)
    added.add_argument("--max-new-tokens", type=int, default=256, help="default: 256")
    added.add_argument("--temperature", type=float, default=0.0, help="of the text; 0: greedy")
    added.add_argument("--top-p", type=float, default=1.0, help="of the text sampling; default: 1")
    added.add_argument("--seed", type=int, default=0, help="of the text sampling")
    added.add_argument("--batch-size", type=int, default=8, help="replies at once; default: 8")
    added.add_argument("--json", action="store_true", help="one JSON object a reply")


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
    base = policy_of(options)
    policies = [base.with_bias(bias) for bias in biases]
    for policy in policies:
        policy.knobs(taxonomy)
    model = load(options)
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
        following = next_line("refusal-tokens", "inspect", options.checkpoint, "PROMPT")
        print(f"\n{following}   (why, and what flips it)")


def _text_settings(options: argparse.Namespace) -> dict[str, Any]:
    checks = {
        "max_new_tokens": (options.max_new_tokens >= 1, "1 or more"),
        "temperature": (0 <= options.temperature < math.inf, "0 or more"),
        "seed": (0 <= options.seed < 2**63, "0 to below 2**63"),
        "top_p": (0 < options.top_p <= 1, "above 0, to 1"),
        "batch_size": (options.batch_size >= 1, "1 or more"),
    }
    for name, (fits, allowed) in checks.items():
        if not fits:
            found = getattr(options, name)
            raise InputError(f"--{name.replace('_', '-')}: found {found}; allowed: {allowed}")
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
    if options.prompt and options.input:
        raise InputError("prompts as arguments and --input: give one of the two")
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
        try:
            text = sys.stdin.read()
        except UnicodeDecodeError as error:
            raise InputError(f"standard input: not UTF-8 (byte {error.start})") from None
    return [line for line in text.splitlines() if line.strip()]


def _print_reply(prompt: Any, reply: Reply, options: argparse.Namespace) -> None:
    if options.json:
        record = {"prompt": [dict(m) for m in prompt], **reply.to_dict()}
        print(json.dumps(record, ensure_ascii=False), flush=True)
        return
    knobs = " ".join(f"{k}={v:+g}" for k, v in reply.policy.bias.items()) or "no bias"
    decision = f"{reply.decision}:{reply.category}" if reply.category else reply.decision
    print(f"\n> {prompt[-1]['content']}\n[{knobs}] -> {decision}\n{reply.text}", flush=True)
