"""The operator's policies at a server: which there are, and what one request may make of them.

Needs no vLLM. The part of the server that admits requests resolves each one to a ``Setting``; the
engine applies settings and reads no policy file, so that a reload can never split a request
between two policies.
"""

from __future__ import annotations

import logging
import math
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from refusal_tokens.checkpoint import CheckpointInfo, load_info
from refusal_tokens.decision import Knobs
from refusal_tokens.errors import InputError, one_message, unknown
from refusal_tokens.policy import Bounds, Policy, is_number, load_policy
from refusal_tokens.taxonomy import Taxonomy

logger = logging.getLogger(__name__)

# The environment is the one thing that every process of a vLLM server shares.
CHECKPOINT_VARIABLE = "REFUSAL_TOKENS_CHECKPOINT"
POLICY_VARIABLE = "REFUSAL_TOKENS_POLICY"
OUT_OF_BOUNDS_VARIABLE = "REFUSAL_TOKENS_OUT_OF_BOUNDS"
OUT_OF_BOUNDS = ("reject", "clamp")

POLICY_KEY = "rt_policy"
BIAS_PREFIX = "rt_bias_"
# Where the admitting side leaves the setting for the engine; never read from a client.
SETTING_KEY = "rt_setting"
DEFAULT = "default"
SECONDS_BETWEEN_LOOKS = 1.0
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


@dataclass(frozen=True)
class Setting:
    """What the engine applies to one request.

    Attributes:
        name: of the policy it came from.
        policy: with the request's knobs and the operator's bounds.
    """

    name: str
    policy: Policy

    def to_wire(self, taxonomy: Taxonomy) -> dict[str, Any]:
        """Return plain values for the way to the engine; a missing floor is None."""
        knobs = self.policy.knobs(taxonomy)
        return {
            "rule": knobs.rule,
            "bias": knobs.bias.tolist(),
            "floor": [value if math.isfinite(value) else None for value in knobs.floor.tolist()],
            "temperature": knobs.temperature,
            "seed": self.policy.seed,
        }


def knobs_from_wire(wire: Mapping[str, Any]) -> tuple[Knobs, int]:
    """Return the knobs and the seed of ``Setting.to_wire``; equal settings give one object."""
    return _knobs(
        wire["rule"],
        tuple(wire["bias"]),
        tuple(wire["floor"]),
        float(wire["temperature"]),
    ), int(wire["seed"])


@lru_cache(maxsize=4096)
def _knobs(
    rule: Any, bias: tuple[float, ...], floor: tuple[float | None, ...], temperature: float
) -> Knobs:
    low = np.array([-np.inf if value is None else value for value in floor], dtype=np.float64)
    return Knobs(rule, np.array(bias, dtype=np.float64), low, temperature)


@dataclass
class PolicyStore:
    """The policies of one server, read again when their files change.

    Attributes:
        info: of the checkpoint that is served.
        paths: policy files, or folders of them; none: the model as it was trained.
        clamp: hold knobs at the nearest bound instead of rejecting the request.
    """

    info: CheckpointInfo
    paths: Sequence[Path] = ()
    clamp: bool = False
    policies: Mapping[str, Policy] = field(init=False)
    default: str = field(init=False)
    _state: Any = field(init=False, repr=False)
    _looked: float = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._state = self._file_state()
        self._looked = time.monotonic()
        self.policies, self.default = self._load()

    def resolve(self, arguments: Mapping[str, Any]) -> Setting:
        """Return the setting of a request.

        Args:
            arguments: the request's ``vllm_xargs``; keys that do not start with ``rt_`` are left
                to others.

        Raises:
            InputError: for an unknown policy, category or key, a value that is no finite number,
                or one out of bounds, naming the bound.
        """
        self.refresh()
        known = [POLICY_KEY, *(BIAS_PREFIX + knob for knob in self.info.taxonomy.knobs)]
        own = [k for k in arguments if k.lower().startswith("rt_") and k != SETTING_KEY]
        faults = [unknown("argument", key, known) for key in own if key not in known]
        name = arguments.get(POLICY_KEY, self.default)
        if not isinstance(name, str) or name not in self.policies:
            faults.append(f"{POLICY_KEY}: {unknown('policy', name, self.policies)}")
        if faults:
            raise one_message(faults, "the request")
        changes = {
            key.removeprefix(BIAS_PREFIX): arguments[key] for key in own if key != POLICY_KEY
        }
        return Setting(name, self._moved(name, changes))

    def _moved(self, name: str, changes: Mapping[str, Any]) -> Policy:
        policy = self.policies[name]
        if not changes:
            return policy
        faults = [
            f"{BIAS_PREFIX}{knob}: found {value!r}; allowed: a finite number of nats"
            for knob, value in changes.items()
            if not is_number(value)
        ]
        if faults:
            raise one_message(faults, "the request")
        broken = {knob: fault for knob, v in changes.items() if (fault := _broken(policy, knob, v))}
        if broken and not self.clamp:
            found = [
                f"{BIAS_PREFIX}{knob}: found {changes[knob]!r}; policy {name!r} {fault}"
                for knob, fault in broken.items()
            ]
            raise one_message(found, "the request")
        # A locked knob stays; others are held at their bound when the policy is applied.
        free = {
            k: float(v) for k, v in changes.items() if not policy.bounds.get(k, Bounds()).locked
        }
        return policy.with_bias(free)

    def refresh(self) -> None:
        """Read the policies again if their files changed; a broken file leaves the old ones."""
        now = time.monotonic()
        if not self.paths or now - self._looked < SECONDS_BETWEEN_LOOKS:
            return
        self._looked = now
        state = self._file_state()
        if state == self._state:
            return
        self._state = state
        try:
            policies, default = self._load()
            if self.default not in policies:
                raise InputError(f"the default policy {self.default!r} is gone")
            self.policies, self.default = policies, default
        except InputError as error:
            logger.error("policies not reloaded, the old ones stay: %s", error)
        else:
            logger.warning("policies reloaded: %s", ", ".join(self.policies))

    def _files(self) -> list[Path]:
        found: list[Path] = []
        for path in self.paths:
            found += sorted(path.glob("*.json")) if path.is_dir() else [path]
        return found

    def _file_state(self) -> list[Any]:
        state: list[Any] = []
        for file in self._files():
            try:
                stat = file.stat()
                state.append((str(file), stat.st_mtime_ns, stat.st_size, stat.st_ino))
            except OSError:
                state.append((str(file), None))
        return state

    def _load(self) -> tuple[dict[str, Policy], str]:
        if not self.paths:
            return {DEFAULT: Policy()}, DEFAULT
        files = self._files()
        if not files:
            raise InputError(f"{self.paths[0]}: no policy (*.json) in this folder")
        policies: dict[str, Policy] = {}
        for file in files:
            name = file.stem
            if not _NAME.fullmatch(name):
                raise InputError(f"{file}: policy name {name!r}; allowed: {_NAME.pattern}")
            if name in policies:
                raise InputError(f"{file}: a second policy named {name!r}; names must differ")
            policies[name] = self._checked(file)
        if DEFAULT in policies:
            return policies, DEFAULT
        if self.paths[0].is_dir() and len(policies) > 1:
            raise InputError(
                f"{self.paths[0]}: {len(policies)} policies and none is the default; name one "
                f"{DEFAULT}.json, or give the files, the default first"
            )
        return policies, next(iter(policies))

    def _checked(self, file: Path) -> Policy:
        policy = load_policy(file, self.info.taxonomy, self.info.model_fingerprint)
        if not policy.masked:
            raise InputError(
                f"{file}: masked is false; a server needs masked policies, because without the "
                "mask the text sampler decides, and clients set the sampler"
            )
        return policy


def _broken(policy: Policy, knob: str, value: float) -> str | None:
    """Return which bound a value breaks, if any."""
    bounds = policy.bounds.get(knob, Bounds())
    if bounds.locked and value != policy.bias.get(knob, 0.0):
        return f"locks {knob} at {policy.bias.get(knob, 0.0):g}"
    if bounds.min_bias is not None and value < bounds.min_bias:
        return f"has min_bias {bounds.min_bias:g} for {knob}"
    if bounds.max_bias is not None and value > bounds.max_bias:
        return f"has max_bias {bounds.max_bias:g} for {knob}"
    return None


def store_from_environment() -> PolicyStore | None:
    """Return the store that the operator's environment names; None where it names no checkpoint.

    Raises:
        InputError: for a broken checkpoint or policy, or an unknown way with knobs out of bounds.
    """
    checkpoint = os.environ.get(CHECKPOINT_VARIABLE)
    if not checkpoint:
        return None
    named = os.environ.get(POLICY_VARIABLE, "")
    action = os.environ.get(OUT_OF_BOUNDS_VARIABLE, OUT_OF_BOUNDS[0])
    if action not in OUT_OF_BOUNDS:
        raise InputError(f"{OUT_OF_BOUNDS_VARIABLE}: {unknown('action', action, OUT_OF_BOUNDS)}")
    paths = [Path(part) for part in named.split(os.pathsep) if part]
    return PolicyStore(load_info(checkpoint), paths, clamp=action == "clamp")


@lru_cache(maxsize=1)
def server_store() -> PolicyStore | None:
    """Return the one store of this process; see ``store_from_environment``."""
    return store_from_environment()
