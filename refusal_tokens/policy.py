"""A policy: one saved setting of the knobs, with the operator's bounds and where it came from."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from refusal_tokens.decision import RULES, Knobs
from refusal_tokens.errors import InputError, one_message, unknown
from refusal_tokens.files import read_json, write_json
from refusal_tokens.taxonomy import Taxonomy

SCHEMA_VERSION = 1
MAX_SEED = 2**32 - 1


@dataclass(frozen=True)
class Bounds:
    """What an operator allows for one category, in nats.

    Attributes:
        min_bias: lowest bias; also a floor: prompts it refuses stay refused whatever other knobs
            say. None: unbounded.
        max_bias: highest bias. None: unbounded.
        locked: the policy's own bias stands; requests may not move it.
    """

    min_bias: float | None = None
    max_bias: float | None = None
    locked: bool = False


@dataclass(frozen=True)
class Policy:
    """A setting of the knobs for one taxonomy.

    Attributes:
        rule: ``route``, ``bias`` or ``threshold``.
        bias: knob -> nats; knobs not named are at 0. Positive refuses more readily.
        temperature: decision temperature; 0 decides greedily.
        seed: for sampled decisions, 0 to ``MAX_SEED``.
        masked: only control tokens may be sampled at the decision position. Unmasked needs the
            ``bias`` rule and temperature 0, and leaves the choice to the text sampler.
        bounds: knob -> bounds.
        model_fingerprint: the model that the policy was made for; None fits every model.
        taxonomy_hash: likewise.
        provenance: what was asked for and reached, hashes, certificate; carried along.
    """

    rule: Literal["route", "bias", "threshold"] = "route"
    bias: Mapping[str, float] = field(default_factory=dict)
    temperature: float = 0.0
    seed: int = 0
    masked: bool = True
    bounds: Mapping[str, Bounds] = field(default_factory=dict)
    model_fingerprint: str | None = None
    taxonomy_hash: str | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        faults = _faults(self)
        if faults:
            raise one_message(faults, "policy")

    def knobs(self, taxonomy: Taxonomy) -> Knobs:
        """Return the arrays that ``decision.decide`` takes, with the bounds applied.

        Raises:
            InputError: if a knob is not in the taxonomy.
        """
        bias = np.zeros(len(taxonomy.knobs))
        floor = np.full(len(taxonomy.knobs), -np.inf)
        for knob, value in self.bias.items():
            bias[taxonomy.knob_index(knob)] = value
        for knob, bounds in self.bounds.items():
            index = taxonomy.knob_index(knob)
            low = -math.inf if bounds.min_bias is None else bounds.min_bias
            high = math.inf if bounds.max_bias is None else bounds.max_bias
            bias[index] = min(max(bias[index], low), high)
            floor[index] = low
        return Knobs(self.rule, bias, floor, self.temperature)

    def with_bias(self, changes: Mapping[str, float]) -> Policy:
        """Return the policy with some knobs moved, as a request may do.

        Values outside the bounds are held at the nearest bound when the policy is applied.

        Raises:
            InputError: if a knob is locked.
        """
        locked = [
            knob
            for knob, value in changes.items()
            if knob in self.bounds
            and self.bounds[knob].locked
            and value != self.bias.get(knob, 0.0)
        ]
        if locked:
            raise InputError(f"the policy locks {', '.join(locked)}; it cannot be changed here")
        return replace(self, bias={**self.bias, **changes})

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {"schema_version": SCHEMA_VERSION, **asdict(self)}


def _faults(policy: Policy) -> list[str]:
    faults = []
    if policy.rule not in RULES:
        faults.append(f"rule: {unknown('rule', policy.rule, RULES)}")
    for knob, value in policy.bias.items():
        if not is_number(value):
            faults.append(f"bias.{knob}: found {value!r}; allowed: a finite number of nats")
    if not is_number(policy.temperature) or policy.temperature < 0:
        faults.append(f"temperature: found {policy.temperature!r}; allowed: 0 (greedy) or above")
    if type(policy.seed) is not int or not 0 <= policy.seed <= MAX_SEED:
        faults.append(f"seed: found {policy.seed!r}; allowed: a whole number from 0 to {MAX_SEED}")
    if not isinstance(policy.masked, bool):
        faults.append(f"masked: found {policy.masked!r}; allowed: true or false")
    elif not policy.masked and (policy.rule != "bias" or policy.temperature != 0):
        faults.append(
            "masked: false works only with rule 'bias' and temperature 0: without a mask the text "
            f"sampler decides; found rule {policy.rule!r}, temperature {policy.temperature!r}"
        )
    for knob, bounds in policy.bounds.items():
        low, high = bounds.min_bias, bounds.max_bias
        if any(v is not None and not is_number(v) for v in (low, high)):
            faults.append(f"bounds.{knob}: min_bias and max_bias must be finite numbers or null")
        elif low is not None and high is not None and low > high:
            faults.append(f"bounds.{knob}: min_bias {low} is above max_bias {high}")
        if not isinstance(bounds.locked, bool):
            faults.append(f"bounds.{knob}.locked: found {bounds.locked!r}; allowed: true or false")
    return faults


def is_number(value: Any) -> bool:
    """Whether it is a finite number; ``math.isfinite`` fails for whole numbers beyond floats."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) <= sys.float_info.max


def policy_from_dict(data: Any, where: str) -> Policy:
    """Build a policy from JSON data.

    Raises:
        InputError: listing every fault.
    """
    if not isinstance(data, Mapping):
        raise InputError(f"{where}: found {type(data).__name__}; allowed: a policy object")
    allowed = ["schema_version", *Policy.__dataclass_fields__]
    faults = [f"{where}: {unknown('key', key, allowed)}" for key in data if key not in allowed]
    if data.get("schema_version") != SCHEMA_VERSION:
        faults.append(
            f"{where}: schema_version: found {data.get('schema_version')!r}; "
            f"allowed: {SCHEMA_VERSION}"
        )
    for key in ("bias", "bounds", "provenance"):
        if not isinstance(data.get(key, {}), Mapping):
            faults.append(f"{where}: {key} must be an object")
    bounds: dict[str, Bounds] = {}
    raw_bounds = data.get("bounds", {})
    for knob, entry in raw_bounds.items() if isinstance(raw_bounds, Mapping) else ():
        fields = list(Bounds.__dataclass_fields__)
        if not isinstance(entry, Mapping) or any(key not in fields for key in entry):
            faults.append(f"{where}: bounds.{knob}: allowed keys: {', '.join(fields)}")
            continue
        bounds[knob] = Bounds(**entry)
    if faults:
        raise one_message(faults, where)
    values: dict[str, Any] = {key: v for key, v in data.items() if key != "schema_version"}
    try:
        return Policy(**{**values, "bounds": bounds})
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def load_policy(path: str | Path, taxonomy: Taxonomy, model_fingerprint: str) -> Policy:
    """Read a policy file and check that it belongs to this model.

    Raises:
        InputError: if it is malformed, or was made for another model or taxonomy (naming both).
    """
    policy = policy_from_dict(read_json(path), str(path))
    for what, found, own in (
        ("model fingerprint", policy.model_fingerprint, model_fingerprint),
        ("taxonomy hash", policy.taxonomy_hash, taxonomy.hash),
    ):
        if found is not None and found != own:
            raise InputError(
                f"{path}: made for another model: {what} {found}; this model has {own}"
            )
    try:
        policy.knobs(taxonomy)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    return policy


def save_policy(path: str | Path, policy: Policy) -> None:
    """Write a policy file atomically."""
    write_json(path, policy.to_dict())
