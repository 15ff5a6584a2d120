"""Decisions over one batch of logits, in torch: the part of the vLLM plugin that needs no vLLM."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from refusal_tokens.arrays import Floats, Ints
from refusal_tokens.decision import Knobs, decide, draws

# Stands for a logit that is no number, or minus infinity.
LOWEST = -1e9


@dataclass(frozen=True)
class Pending:
    """A request that waits for its decision.

    Attributes:
        knobs: the request's.
        seed: of the policy, for sampled decisions.
        row: number of the prompt, for sampled decisions.
    """

    knobs: Knobs
    seed: int
    row: int


def prompt_row(prompt_ids: Sequence[int]) -> int:
    """Return a number below 2**32 for a prompt.

    Sampled decisions draw from it, so that one prompt always gets one decision under one policy:
    a client cannot ask again, or send another seed, until it likes the answer.
    """
    data = np.asarray(prompt_ids, dtype=np.uint32).tobytes()
    return int.from_bytes(hashlib.blake2b(data, digest_size=4).digest(), "little")


def steer(logits: Tensor, control: Tensor, pending: Sequence[tuple[int, Pending]]) -> Tensor:
    """Apply decisions in place.

    Args:
        logits: (rows, vocabulary), nats.
        control: (1 + categories,), ids of the control tokens, respond first, on the same device.
        pending: row -> what decides there. In these rows only the decided control token stays
            finite; in all others the control tokens are masked.

    Returns:
        The same tensor.
    """
    if not pending:
        return logits.index_fill_(1, control, -torch.inf)
    rows = torch.tensor([row for row, _ in pending], device=logits.device)
    found = logits[rows[:, None], control[None, :]].float().cpu().numpy()
    chosen = decisions(found, [who for _, who in pending])
    logits.index_fill_(1, control, -torch.inf)
    logits.index_fill_(0, rows, -torch.inf)
    tokens = control[torch.from_numpy(chosen).to(control.device)]
    logits[rows, tokens] = 0.0
    return logits


def decisions(control_logits: np.ndarray, pending: Sequence[Pending]) -> Ints:
    """Decide for each row under its own knobs; equal knobs are decided together.

    Args:
        control_logits: (rows, 1 + categories), nats, respond first.
        pending: one for each row.

    Returns:
        (rows,), 0 to respond, else the category counted from 1.
    """
    logits = usable(control_logits)
    groups: dict[int, list[int]] = {}
    for index, who in enumerate(pending):
        groups.setdefault(id(who.knobs), []).append(index)
    result = np.zeros(len(pending), np.int64)
    for rows in groups.values():
        setting = pending[rows[0]].knobs
        chance = None
        if setting.temperature:
            chance = np.concatenate([draws(pending[i].seed, [pending[i].row]) for i in rows])
        result[rows] = decide(logits[rows], setting, chance)
    return result


def usable(control_logits: np.ndarray) -> Floats:
    """Return finite logits; a row with one that is not refuses.

    An overflow in the model must not stop the server, and it must not count as leave to respond.
    """
    logits = np.asarray(control_logits, dtype=np.float64)
    broken = ~np.isfinite(logits).all(axis=1)
    if broken.any():
        logits = np.nan_to_num(logits, nan=LOWEST, posinf=-LOWEST, neginf=LOWEST)
        logits[broken, 0] = 2 * LOWEST
    return logits
