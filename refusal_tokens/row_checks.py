"""Checks of single records: what a row's fields may hold, each fault in one line."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from refusal_tokens.errors import unknown
from refusal_tokens.maps import FIELDS, LABELS
from refusal_tokens.taxonomy import HARMFUL, RESPOND, Taxonomy

Messages = tuple[Mapping[str, str], ...]
REQUIRED = ("id", "prompt", "label")
ROLES = ("system", "user", "assistant")
# Half of a surrogate pair: JSON can spell one, UTF-8 cannot.
_HALF_CHARACTER = re.compile("[\ud800-\udfff]")
_BROKEN = "holds half of a surrogate pair; allowed: text with a UTF-8 form"


def record_faults(record: Mapping[str, Any], taxonomy: Taxonomy, labelled: bool) -> list[str]:
    """Return what is wrong with a record under the names of row fields.

    Args:
        record: field -> value.
        taxonomy: the categories it may carry.
        labelled: False admits a null label.
    """
    faults = [unknown("key", key, FIELDS) for key in record if key not in FIELDS]
    faults += [f"key {key!r} is missing" for key in REQUIRED if key not in record]
    if faults:
        return faults
    faults = checked_messages(record["prompt"])[1]
    faults += _text_faults(record) + _label_faults(record, taxonomy, labelled)
    faults += _control_faults(record)
    return faults + _token_faults(record.get("response"), taxonomy)


def as_flag(value: Any) -> Any:
    """Read a flag that is spelled out, as CSV must; other values stay as they are."""
    spelled = {"true": True, "false": False}
    return spelled.get(value.lower(), value) if isinstance(value, str) else value


def _text_faults(record: Mapping[str, Any]) -> list[str]:
    faults = []
    for field in ("id", "response", "category", "group", "subcategory", "source"):
        value = record.get(field)
        if value is None and field != "id":
            continue
        if not isinstance(value, str):
            faults.append(f"key {field!r}: found {type(value).__name__} {value!r}; allowed: text")
        elif not value.strip():
            null = "" if field == "id" else ", or null"
            faults.append(f"key {field!r} is empty; allowed: text{null}")
        elif _HALF_CHARACTER.search(value):
            faults.append(f"key {field!r} {_BROKEN}")
    return faults


def _control_faults(record: Mapping[str, Any]) -> list[str]:
    control = as_flag(record.get("train_control"))
    if control is not None and not isinstance(control, bool):
        return [f"key 'train_control': found {control!r}; allowed: true or false"]
    if control is False and (record["label"], record.get("category")) == (RESPOND, HARMFUL):
        # Its prompt asks for another token than it opens with: for this category, for a refusal.
        return [
            f"key 'train_control' is false on a respond row of category {HARMFUL!r}: it would "
            "train an answer to a harmful request; allowed: another category, or a refusal"
        ]
    return []


def _label_faults(record: Mapping[str, Any], taxonomy: Taxonomy, labelled: bool) -> list[str]:
    label, category = record["label"], record.get("category")
    faults = []
    if label is None and labelled:
        faults.append(f"key 'label' is null; allowed: {', '.join(LABELS)}")
    elif label is not None and label not in LABELS:
        faults.append(f"key 'label': {unknown('label', label, LABELS)}")
    if category is not None and category not in taxonomy.category_ids:
        faults.append(f"key 'category': {unknown('category', category, taxonomy.category_ids)}")
    if label == "refuse" and category is None:
        faults.append(
            f"key 'category' is null on a refuse row; allowed: {', '.join(taxonomy.category_ids)}"
        )
    return faults


def _token_faults(response: Any, taxonomy: Taxonomy) -> list[str]:
    if not isinstance(response, str):
        return []
    return [
        f"key 'response' contains the control token {token}; replies are text, and the token is "
        "added in training"
        for token in taxonomy.tokens
        if token in response
    ]


def checked_messages(prompt: Any) -> tuple[Messages, list[str]]:
    """Give a prompt its one form, a tuple of role and content, and return its faults beside it."""
    if isinstance(prompt, str):
        if not prompt.strip():
            return (), ["key 'prompt' is empty"]
        if _HALF_CHARACTER.search(prompt):
            return (), [f"key 'prompt' {_BROKEN}"]
        return ({"role": "user", "content": prompt},), []
    if not isinstance(prompt, list | tuple) or not prompt:
        found = type(prompt).__name__
        return (), [f"key 'prompt': found {found}; allowed: text, or a list of chat messages"]
    faults = []
    for number, message in enumerate(prompt, 1):
        place = f"key 'prompt', message {number}"
        if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
            faults.append(f"{place}: allowed: an object with exactly role and content")
        elif message["role"] not in ROLES:
            faults.append(f"{place}: {unknown('role', message['role'], ROLES)}")
        elif not isinstance(message["content"], str) or not message["content"].strip():
            faults.append(f"{place}: content is empty or not text")
        elif _HALF_CHARACTER.search(message["content"]):
            faults.append(f"{place}: content {_BROKEN}")
    if faults:
        return (), faults
    order = [message["role"] for message in prompt]
    turns = order[1:] if order[0] == "system" else order
    if turns != ["user", "assistant"] * (len(turns) // 2) + ["user"]:
        return (), [
            f"key 'prompt': found the roles {', '.join(order)}; allowed: at most one system "
            "message first, then user and assistant in turn, ending with user"
        ]
    return tuple({"role": m["role"], "content": m["content"]} for m in prompt), []
