"""``chat``: a conversation whose knobs can be moved."""

from __future__ import annotations

import argparse
from typing import Any

from refusal_tokens.commands.common import command
from refusal_tokens.commands.steering_options import add_policy, load, policy_of
from refusal_tokens.errors import InputError


def add(commands: Any) -> None:
    """Add the subcommand."""
    added = command(commands, "chat", _chat, "Talk to a model; move its knobs with /bias.")
    added.add_argument("checkpoint", help="a run, or the model in it")
    added.add_argument("--system", help="a system prompt")
    add_policy(added)
    added.add_argument("--max-new-tokens", type=int, default=256, help="default: 256")


def _chat(options: argparse.Namespace) -> None:
    from refusal_tokens.chat_loop import chat_loop

    if options.max_new_tokens < 1:
        raise InputError(f"--max-new-tokens: found {options.max_new_tokens}; allowed: 1 or more")
    policy = policy_of(options)
    model = load(options)
    chat_loop(model, policy, system=options.system, max_new_tokens=options.max_new_tokens)
