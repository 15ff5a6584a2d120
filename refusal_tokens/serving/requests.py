"""What a client may ask of the server: an allow-list of routes and of request fields.

Needs no vLLM. vLLM's request models take fields that they do not name, and new versions bring new
ones, so that a list of what is forbidden would never be complete. What is not allowed here is
refused with the field's name; what is allowed is checked for its type and written anew, so that
the server reads exactly what was checked.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from refusal_tokens.errors import InputError, one_message, unknown
from refusal_tokens.files import unique_keys
from refusal_tokens.policy import is_number
from refusal_tokens.serving.policies import BIAS_PREFIX, POLICY_KEY

CHAT = "/v1/chat/completions"
ROUTES = frozenset(
    {
        ("POST", CHAT),
        ("GET", "/v1/models"),
        ("GET", "/health"),
        ("GET", "/version"),
        ("GET", "/metrics"),
    }
)
MAX_BODY_BYTES = 4 * 2**20
MAX_DEPTH = 32
# Each fault costs a search for the nearest name, and a body can hold half a million of them.
MAX_FAULTS = 10
# The taxonomy's categories are fewer.
MAX_ARGUMENTS = 100
PROBABILITIES_KEY = "rt_probabilities"
ROLES = ("system", "user", "assistant", "tool")
_TOKEN_ID = re.compile(r"0|[1-9][0-9]{0,9}")
# A check returns what is wrong with a value, or None.
Check = Callable[[Any], str | None]


def parse_body(body: bytes) -> dict[str, Any]:
    """Parse a request body strictly.

    Raises:
        InputError: if it is no JSON object, repeats a key, nests too deeply, or holds numbers or
            text that JSON cannot.
    """
    try:
        data = json.loads(
            body.decode("utf-8"),
            object_pairs_hook=unique_keys("the request"),
            parse_constant=_no_constant,
        )
    except (ValueError, RecursionError) as error:
        raise InputError(f"the request body is not JSON: {error}") from None
    if not isinstance(data, dict):
        raise InputError(f"the request body: found {type(data).__name__}; allowed: an object")
    fault = _plain_fault(data, 0)
    if fault:
        raise InputError(f"the request body {fault}")
    return data


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def _plain_fault(value: Any, depth: int) -> str | None:
    if depth > MAX_DEPTH:
        return f"nests deeper than {MAX_DEPTH} levels"
    if isinstance(value, float) and not math.isfinite(value):
        return "holds a number that is not finite"
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            return "holds half of a surrogate pair"
    children: list[Any] = []
    if isinstance(value, dict):
        children = [*value, *value.values()]
    elif isinstance(value, list):
        children = value
    return next((f for child in children if (f := _plain_fault(child, depth + 1))), None)


def checked(data: Mapping[str, Any], control_ids: frozenset[int]) -> dict[str, Any]:
    """Return a chat request with what is allowed; fields set to null are left out.

    Args:
        data: the parsed body.
        control_ids: ids of the control tokens.

    Raises:
        InputError: naming the fields that are unknown, not allowed or of the wrong form,
            ``MAX_FAULTS`` at most.
    """
    faults: list[str] = []
    kept = {key: value for key, value in data.items() if value is not None}
    for key, value in kept.items():
        if len(faults) == MAX_FAULTS:
            break
        if key not in FIELDS:
            faults.append(unknown("field", key[:80], FIELDS))
        elif fault := FIELDS[key](value):
            faults.append(f"{key}: {fault}")
    if "messages" not in kept:
        faults.append("messages: missing")
    if not faults:
        faults += _together_faults(kept, control_ids)
    if faults:
        raise one_message(faults, "the request")
    return {**kept, "messages": [_without_nulls(m) for m in kept["messages"]]}


def _without_nulls(message: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in message.items() if value is not None}


def _together_faults(data: Mapping[str, Any], control_ids: frozenset[int]) -> list[str]:
    faults = []
    touched = sorted(control_ids.intersection(int(key) for key in data.get("logit_bias", ())))
    if touched:
        faults.append(f"logit_bias: names control token {touched[0]}; use vllm_xargs rt_bias_...")
    if data.get("stop") and data.get("tools") and data.get("tool_choice") != "none":
        # Tool parsers see special tokens: stop strings would act on the control token's spelling,
        # and in a stream hold it back until it can no longer be told from the text.
        faults.append("stop: not together with tools that may be called")
    if data.get("vllm_xargs", {}).get(PROBABILITIES_KEY) and data.get("logprobs"):
        faults.append(f"{PROBABILITIES_KEY}: not together with logprobs; ask for one of the two")
    return faults


def _of(kind: type, words: str) -> Check:
    def check(value: Any) -> str | None:
        return None if type(value) is kind else f"found {value!r:.80}; allowed: {words}"

    return check


def _number(low: float, high: float) -> Check:
    def check(value: Any) -> str | None:
        if is_number(value) and low <= value <= high:
            return None
        return f"found {value!r:.80}; allowed: a number from {low:g} to {high:g}"

    return check


def _whole(low: int, high: int) -> Check:
    def check(value: Any) -> str | None:
        if type(value) is int and low <= value <= high:
            return None
        return f"found {value!r:.80}; allowed: a whole number from {low} to {high}"

    return check


def _stop(value: Any) -> str | None:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) and text for text in texts):
        return f"found {value!r:.80}; allowed: a text or a list of texts, none empty"
    return None if len(texts) <= 16 else f"found {len(texts)} texts; allowed: 16"


def _logit_bias(value: Any) -> str | None:
    if not isinstance(value, dict):
        return f"found {type(value).__name__}; allowed: an object of token ids and numbers"
    for key, bias in value.items():
        if not _TOKEN_ID.fullmatch(key) or not is_number(bias) or abs(bias) > 100:
            return (
                f"found {key[:80]!r}: {bias!r:.40}; allowed: a token id and a number, -100 to 100"
            )
    return None


def _xargs(value: Any) -> str | None:
    if not isinstance(value, dict):
        return f"found {type(value).__name__}; allowed: an object"
    named = (POLICY_KEY, PROBABILITIES_KEY)
    foreign = [key for key in value if key not in named and not key.startswith(BIAS_PREFIX)]
    if foreign:
        return unknown("argument", foreign[0][:80], (*named, f"{BIAS_PREFIX}CATEGORY"))
    if len(value) > MAX_ARGUMENTS:
        return f"found {len(value)} arguments; allowed: {MAX_ARGUMENTS}"
    if long := [key for key in value if len(key) > 80]:
        return f"found {long[0][:80]!r}...; allowed: names of up to 80 characters"
    found = value.get(PROBABILITIES_KEY, False)
    return (
        None if found in (0, 1) else f"{PROBABILITIES_KEY}: found {found!r}; allowed: true, false"
    )


def _object_of(allowed: Mapping[str, Check], required: tuple[str, ...] = ()) -> Check:
    def check(value: Any) -> str | None:
        if not isinstance(value, dict):
            return f"found {type(value).__name__}; allowed: an object"
        for key, item in value.items():
            if key not in allowed:
                return unknown("key", key[:80], allowed)
            fault = allowed[key](item) if item is not None else None
            if fault:
                return f"{key}: {fault}"
        missing = [key for key in required if value.get(key) is None]
        return f"{missing[0]}: missing" if missing else None

    return check


def _one_of(*allowed: str) -> Check:
    def check(value: Any) -> str | None:
        return None if value in allowed else f"found {value!r:.80}; allowed: {', '.join(allowed)}"

    return check


def _list_of(check_item: Check, longest: int) -> Check:
    def check(value: Any) -> str | None:
        if not isinstance(value, list) or not 1 <= len(value) <= longest:
            return f"allowed: a list of 1 to {longest}"
        faults = (f"{i}: {fault}" for i, item in enumerate(value) if (fault := check_item(item)))
        return next(faults, None)

    return check


def _arguments(value: Any) -> str | None:
    """Check what vLLM parses once more, and guards only against text that is not JSON at all."""
    if not isinstance(value, str):
        return f"found {value!r:.80}; allowed: a text"
    try:
        fault = _plain_fault(json.loads(value), 0)
    except json.JSONDecodeError:
        return None
    except (ValueError, RecursionError) as error:
        fault = f"cannot be read: {error}"
    return fault and f"the JSON in it {fault}"


_TEXT = _of(str, "a text")
_FLAG = _of(bool, "true or false")
_NAME = _of(str, "a name")
_OBJECT = _of(dict, "an object")
_CALL = _object_of(
    {
        "id": _TEXT,
        "type": _one_of("function"),
        "index": _whole(0, 10_000),
        "function": _object_of({"name": _NAME, "arguments": _arguments}, ("name", "arguments")),
    },
    ("id", "function"),
)
_FUNCTION = {"name": _NAME, "description": _TEXT, "parameters": _OBJECT, "strict": _FLAG}
_TOOL = _object_of(
    {"type": _one_of("function"), "function": _object_of(_FUNCTION, ("name",))},
    ("type", "function"),
)
_PART = _object_of({"type": _one_of("text"), "text": _TEXT}, ("type", "text"))


def _content(value: Any) -> str | None:
    if isinstance(value, str):
        return None
    return _list_of(_PART, 1_000)(value) and f"{_list_of(_PART, 1_000)(value)}, or a text"


# A stock client sends a reply back as it came, with fields that are null.
_MESSAGE = {
    "role": _one_of(*ROLES),
    "content": _content,
    "name": _NAME,
    "tool_call_id": _TEXT,
    "tool_calls": _list_of(_CALL, 1_000),
}
_NULL_ONLY = dict.fromkeys(
    ("refusal", "annotations", "audio", "function_call", "reasoning"), lambda _: "allowed: null"
)
_message = _object_of({**_MESSAGE, **_NULL_ONLY}, ("role",))


def _messages(value: Any) -> str | None:
    fault = _list_of(_message, 10_000)(value)
    if fault:
        return fault
    for number, message in enumerate(value):
        role = message["role"]
        if message.get("tool_calls") is not None and role != "assistant":
            return f"{number}: tool_calls: allowed in assistant messages"
        if message.get("content") is None and not message.get("tool_calls"):
            return f"{number}: content: missing"
    if value[-1]["role"] not in ("user", "tool"):
        return f"the last has role {value[-1]['role']!r}; allowed: user, tool"
    return None


def _response_format(value: Any) -> str | None:
    schema = _object_of(
        {"name": _NAME, "description": _TEXT, "schema": _OBJECT, "strict": _FLAG},
        ("name", "schema"),
    )
    kinds = _one_of("text", "json_object", "json_schema")
    fault = _object_of({"type": kinds, "json_schema": schema}, ("type",))(value)
    if not fault and (value["type"] == "json_schema") != (value.get("json_schema") is not None):
        return "json_schema: goes with type json_schema"
    return fault


def _tool_choice(value: Any) -> str | None:
    if isinstance(value, str):
        return _one_of("none", "auto", "required")(value)
    function = _object_of({"name": _NAME}, ("name",))
    shape = {"type": _one_of("function"), "function": function}
    return _object_of(shape, ("type", "function"))(value)


FIELDS: dict[str, Check] = {
    "messages": _messages,
    "model": _NAME,
    "frequency_penalty": _number(-2, 2),
    "presence_penalty": _number(-2, 2),
    "repetition_penalty": _number(0.1, 10),
    "temperature": _number(0, 2),
    "top_p": _number(0, 1),
    "top_k": _whole(-1, 2**31 - 1),
    "min_p": _number(0, 1),
    "logit_bias": _logit_bias,
    "logprobs": _FLAG,
    "top_logprobs": _whole(0, 20),
    "max_tokens": _whole(1, 2**31 - 1),
    "max_completion_tokens": _whole(1, 2**31 - 1),
    "n": _whole(1, 128),
    "seed": _whole(-(2**63), 2**63 - 1),
    "stop": _stop,
    "stream": _FLAG,
    "stream_options": _object_of({"include_usage": _FLAG, "continuous_usage_stats": _FLAG}),
    "response_format": _response_format,
    "tools": _list_of(_TOOL, 128),
    "tool_choice": _tool_choice,
    "parallel_tool_calls": _FLAG,
    "user": _TEXT,
    "vllm_xargs": _xargs,
}
