"""The options that load a model and set its policy, for subcommands that steer."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from refusal_tokens.commands.common import pairs, quiet_libraries
from refusal_tokens.errors import InputError

if TYPE_CHECKING:
    from refusal_tokens.policy import Policy
    from refusal_tokens.steering import SteeredModel


def add_policy(command: argparse.ArgumentParser) -> None:
    """Add ``--policy``, ``--bias``, ``--rule`` and ``--dtype``."""
    command.add_argument("--policy", help="a policy file")
    command.add_argument(
        "--bias",
        action="append",
        default=[],
        metavar="CATEGORY=NATS",
        help="such as safety=2 or humanizing=-4; positive refuses more readily",
    )
    command.add_argument(
        "--rule", choices=["route", "bias", "threshold"], help="default: the policy's"
    )
    command.add_argument("--dtype", default="auto", help="of the weights; default: as saved")


def policy_of(options: argparse.Namespace) -> Policy:
    """Return the policy that the options ask for, checked before any weights are loaded.

    Raises:
        InputError: for an unknown or locked knob, or a policy of another model.
    """
    from dataclasses import replace

    from refusal_tokens.checkpoint import load_info
    from refusal_tokens.policy import Policy, load_policy

    info = load_info(options.checkpoint)
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
        return {knob: float(value) for knob, value in pairs(values, "--bias").items()}
    except ValueError:
        raise InputError(f"--bias {' '.join(values)}: allowed: category=number") from None


def load(options: argparse.Namespace) -> SteeredModel:
    """Load the checkpoint that the options name."""
    quiet_libraries()
    from refusal_tokens.steering import SteeredModel

    return SteeredModel.from_checkpoint(options.checkpoint, dtype=options.dtype)
