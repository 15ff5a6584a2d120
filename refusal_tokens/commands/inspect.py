"""``inspect``: why a prompt is refused, and what would flip it."""

from __future__ import annotations

import argparse
import json
from typing import Any

from refusal_tokens.commands.common import command
from refusal_tokens.commands.steering_options import add_policy, load, policy_of


def add(commands: Any) -> None:
    """Add the subcommand."""
    added = command(
        commands, "inspect", _inspect, "Show why a prompt is refused, and what would flip it."
    )
    added.add_argument("checkpoint", help="a run, or the model in it")
    added.add_argument("prompt", help="one user turn")
    added.add_argument("--system", help="a system prompt")
    add_policy(added)
    added.add_argument("--json", action="store_true", help="print JSON")


def _inspect(options: argparse.Namespace) -> None:
    from refusal_tokens.inspection import inspect_prompt, inspection_report
    from refusal_tokens.rows import messages_from

    messages = messages_from(options.prompt, options.system)
    policy = policy_of(options)
    found = inspect_prompt(load(options).checkpoint, messages, policy)
    print(json.dumps(found.to_dict(), indent=2) if options.json else inspection_report(found))
