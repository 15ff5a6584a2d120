"""The ``refusal_tokens`` section of a recipe: what this package adds to TRL's and PEFT's settings.

What each option is for, and what is known of it, stands in docs/training.md.
"""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from refusal_tokens.errors import unknown
from refusal_tokens.sources import Source, sources_from

SPLITS = ("train", "calibration", "test")
SAVE_DTYPES = ("auto", "float32", "bfloat16", "float16")
ROW_STARTS = ("description", "mean", "random")
CONTROL_SHARE = 0.5


@dataclass(frozen=True)
class RefusalOptions:
    """The ``refusal_tokens`` section.

    Attributes:
        train: training rows: files or Hub data sets, each with its map and its part of the mix.
        calibration: rows for choosing knobs; profiled after training.
        test: rows for reporting; profiled after training.
        contrast_share: near-misses among the training rows with a category, from 0 to below 1;
            None leaves them as they are.
        refusal_share: refuse rows among the training rows, from 0 to below 1; None leaves them.
        counterfactual_rows: False leaves out training rows whose control token is not trained.
        rows_without_reply: False leaves out training rows that train the control token alone.
        reply_share: of the training rows with a reply and a trained control token, the share whose
            reply is trained, from 0 to 1; the others train the control token alone.
        share_without_token: of the training rows whose reply is trained, the share whose reply
            follows the prompt directly, from 0 to below 1.
        control_tokens: False trains replies alone, as plain fine-tuning does.
        taxonomy: None for the default, a YAML file, or a mapping.
        single_token: one refusal token for all categories; None leaves it to the taxonomy.
        row_start: where the new tokens' rows start: ``description``, ``mean`` or ``random``.
        control_share: the control tokens' share of the loss, in (0, 1]; None is the usual mean
            over tokens.
        respond_weight: how many refuse rows' decisions a respond row's counts for in the loss.
        control_smoothing: label smoothing over the control tokens at the decision position, from 0
            to below 1.
        system_prompt: trained with, for conversations that have none; None leaves it to the
            chat template.
        chat_template_kwargs: passed to the chat template.
        save_dtype: of the merged checkpoint; ``auto`` is float32 under 1B parameters, else the
            base model's own.
    """

    train: tuple[Source, ...]
    calibration: tuple[Source, ...] = ()
    test: tuple[Source, ...] = ()
    contrast_share: float | None = None
    refusal_share: float | None = None
    counterfactual_rows: bool = True
    rows_without_reply: bool = True
    reply_share: float = 1.0
    share_without_token: float = 0.0
    control_tokens: bool = True
    taxonomy: str | Mapping[str, Any] | None = None
    single_token: bool | None = None
    row_start: str = "description"
    control_share: float | None = CONTROL_SHARE
    respond_weight: float = 1.0
    control_smoothing: float = 0.0
    system_prompt: str | None = None
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    save_dtype: str = "auto"


# Key -> whether null is allowed, the test of a number, and how to say it.
NUMBERS: dict[str, tuple[bool, Callable[[float], bool], str]] = {
    "contrast_share": (True, lambda x: 0 <= x < 1, "0 to below 1"),
    "refusal_share": (True, lambda x: 0 <= x < 1, "0 to below 1"),
    "reply_share": (False, lambda x: 0 <= x <= 1, "0 to 1"),
    "share_without_token": (False, lambda x: 0 <= x < 1, "0 to below 1"),
    "control_share": (True, lambda x: 0 < x <= 1, "above 0, to 1"),
    "respond_weight": (False, lambda x: 0 < x < math.inf, "above 0"),
    "control_smoothing": (False, lambda x: 0 <= x < 1, "0 to below 1"),
}
CHOICES = {"save_dtype": ("dtype", SAVE_DTYPES), "row_start": ("start", ROW_STARTS)}
TYPES: dict[str, tuple[type | types.UnionType, str]] = {
    "counterfactual_rows": (bool, "true or false"),
    "rows_without_reply": (bool, "true or false"),
    "control_tokens": (bool, "true or false"),
    "system_prompt": (str | None, "text or null"),
    "single_token": (bool | None, "true, false or null"),
    "chat_template_kwargs": (Mapping, "a mapping"),
    "taxonomy": (str | Mapping | None, "a YAML file, a mapping, or null"),
}
# What a model without control tokens has no use for, and the value that says so.
NEED_TOKENS = {
    "control_share": None,
    "control_smoothing": 0.0,
    "reply_share": 1.0,
    "respond_weight": 1.0,
    "share_without_token": 0.0,
    "row_start": "description",
    "single_token": None,
}


def options_from(section: Any, faults: list[str]) -> RefusalOptions | None:
    """Check the section.

    Args:
        section: as the recipe's YAML has it.
        faults: what is wrong is added here, each with its key.

    Returns:
        The options, or None where a fault was found.
    """
    if not isinstance(section, Mapping):
        faults.append("refusal_tokens: the section is missing; it needs at least train")
        return None
    names = [f.name for f in fields(RefusalOptions)]
    found = [unknown("key", key, names) for key in section if key not in names]
    values = {key: value for key, value in section.items() if key in names}
    if values.get("control_tokens") is False:
        values.setdefault("control_share", None)
    found += _value_faults(values)
    found = [f"refusal_tokens.{fault}" for fault in found]
    for key in SPLITS:
        values[key] = sources_from(values.get(key) or (), f"refusal_tokens.{key}", found)
    if not section.get("train"):
        found.append("refusal_tokens.train: missing; name at least one file of rows")
    found += [f"refusal_tokens.{fault}" for fault in _clashes(values, values["train"])]
    faults += found
    return None if found else RefusalOptions(**values)


def _value_faults(values: Mapping[str, Any]) -> list[str]:
    faults = []
    for key, (nullable, fits, allowed) in NUMBERS.items():
        value = values.get(key, 0.5)
        if value is None and nullable:
            continue
        if not (type(value) in (int, float) and fits(value)):
            null = ", or null" if nullable else ""
            faults.append(f"{key}: found {value!r}; allowed: {allowed}{null}")
    for key, (what, names) in CHOICES.items():
        if key in values and values[key] not in names:
            faults.append(f"{key}: {unknown(what, values[key], names)}")
    for key, (kind, allowed) in TYPES.items():
        if key in values and not isinstance(values[key], kind):
            faults.append(f"{key}: found {values[key]!r}; allowed: {allowed}")
    return faults


def _clashes(values: Mapping[str, Any], sources: Sequence[Source]) -> list[str]:
    """Settings that cannot both hold."""
    faults = []
    if values.get("control_tokens") is False:
        faults += [
            f"{key}: found {values[key]!r} with control_tokens false; it needs control tokens"
            for key, without in NEED_TOKENS.items()
            if key in values and values[key] != without
        ]
    if values.get("rows_without_reply") is False and values.get("reply_share", 1) != 1:
        faults.append(
            f"reply_share: found {values['reply_share']!r} with rows_without_reply false; "
            "only 1 leaves every row its reply"
        )
    if values.get("refusal_share") is not None:
        if values.get("contrast_share") is not None:
            faults.append("refusal_share: cannot hold beside contrast_share; leave one out")
        faults += [
            f"refusal_share: cannot hold beside the share of {source.path}; give it a count"
            for source in sources
            if source.share is not None
        ]
    return faults
