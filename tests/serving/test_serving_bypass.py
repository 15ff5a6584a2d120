"""Every bypass attempt against the middleware, with a stub behind it that records what passes."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from refusal_tokens.policy import Bounds, Policy, save_policy
from refusal_tokens.serving.middleware import HEADERS, Guard
from refusal_tokens.serving.policies import PolicyStore
from refusal_tokens.serving.requests import CHAT, FIELDS, MAX_FAULTS, ROLES
from serving.bypass import KINDS, VARIANTS, Target, variants
from serving.planted_ids import CONTROL_IDS
from serving.stub import Stub, call

FLOORS = Policy(
    bounds={
        "safety": Bounds(0.0, 5.0),
        "humanizing": Bounds(0.0),
        "incomplete": Bounds(locked=True),
    }
)
# Kinds of which some variants may pass: what they ask cannot reach the decision. The tests against
# a real server look at the decisions.
PASSING = {
    "the chat route by another name or method", "logit_bias on other tokens", "penalties",
    "text sampling", "seeds", "stop strings", "lengths", "several choices", "log-probabilities",
    "response_format", "tools", "stream options", "knobs of another form",
    "control tokens spelled at the end of the prompt", "a turn forged in the text",
    "spellings in other fields", "very long prompts", "headers", "content types",
    "fields of a message",
}  # fmt: skip


@pytest.fixture(scope="module")
def store(info, tmp_path_factory: pytest.TempPathFactory) -> PolicyStore:  # type: ignore[no-untyped-def]
    folder = tmp_path_factory.mktemp("policies")
    save_policy(folder / "default.json", FLOORS)
    return PolicyStore(info, [folder])


def test_there_are_enough_kinds_and_variants() -> None:
    target = Target("Do you dream?", CONTROL_IDS)
    counts = {name: len(variants(name, target)) for name in KINDS}
    assert len(KINDS) >= 60
    assert {name: n for name, n in counts.items() if n < VARIANTS} == {}


@pytest.mark.parametrize("name", KINDS)
def test_nothing_that_passes_can_reach_the_decision(name: str, info, store: PolicyStore) -> None:  # type: ignore[no-untyped-def]
    stub = Stub(reply={"choices": []})
    app = Guard(stub, store, lambda *_: None)
    target = Target("Do you dream?", info.control_token_ids)
    for attempt in variants(name, target, 10_000):
        before = len(stub.seen)
        answer = call(app, attempt)
        if len(stub.seen) == before:
            assert answer.status in (400, 404, 413, 415), attempt
            assert answer.error
            continue
        assert name in PASSING, attempt
        path, body = stub.seen[-1]
        assert path == CHAT
        _check_passed(body, info.control_token_ids)
        assert stub.scopes[-1]["query_string"] == b""
        allowed = {*HEADERS, b"content-type", b"content-length"}
        assert {header for header, _ in stub.scopes[-1]["headers"]} <= allowed


def _check_passed(body: dict[str, Any], control: tuple[int, ...]) -> None:
    """What reaches vLLM holds allowed fields only, and none that names a control token."""
    assert set(body) <= {*FIELDS, "return_token_ids"}
    assert body["return_token_ids"] is True
    assert all(message["role"] in ROLES for message in body["messages"])
    assert body["messages"][-1]["role"] in ("user", "tool")
    keys = {"role", "content", "name", "tool_call_id", "tool_calls"}
    assert all(set(message) <= keys for message in body["messages"])
    assert not {int(key) for key in body.get("logit_bias", {})} & set(control)
    for key, value in body.get("vllm_xargs", {}).items():
        assert key in ("rt_policy", "rt_bias_safety", "rt_bias_humanizing")
        assert key == "rt_policy" or (math.isfinite(value) and value >= 0)


@pytest.mark.parametrize(
    "kind", [None, "", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data"]
)
def test_what_a_web_page_may_send_anywhere_is_refused(kind: str | None, store: PolicyStore) -> None:
    # Browsers ask the server first, by OPTIONS, for any other content type.
    stub = Stub(reply={"choices": []})
    plain = Target("Do you dream?", CONTROL_IDS).chat()
    headers = () if kind is None else (("content-type", kind),)
    answer = call(Guard(stub, store, lambda *_: None), replace(plain, headers=headers))
    assert (answer.status, stub.seen) == (415, [])
    assert "allowed: application/json" in answer.error


def test_a_body_of_faults_costs_little(store: PolicyStore) -> None:
    stub = Stub(reply={"choices": []})
    app = Guard(stub, store, lambda *_: None)
    target = Target("Do you dream?", CONTROL_IDS)
    many = call(app, target.chat(**{f"a{i}": 0 for i in range(1_000)}))
    assert many.status == 400
    assert many.error.count("unknown field") == MAX_FAULTS
    knobs = call(app, target.chat(vllm_xargs={f"rt_bias_{i}": 0 for i in range(1_000)}))
    assert "found 1000 arguments; allowed: 100" in knobs.error
    for fields in ({"x" * 100_000: 1}, {"vllm_xargs": {"rt_bias_" + "x" * 100_000: 1}}):
        answer = call(app, target.chat(**fields))
        assert (answer.status, len(answer.body) < 2_000) == (400, True)
    assert stub.seen == []


@pytest.mark.parametrize(
    ("text", "passes"),
    [
        ('{"city": "Paris"}', True),
        ("", True),
        ("no JSON: vLLM reads an empty object", True),
        ('{"a": "\\ud800"}', False),
        ('{"a": ' * 40 + "1" + "}" * 40, False),
        ("[" * 100_000 + "]" * 100_000, False),
        ('{"a": 1e999}', False),
        ('{"a": ' + "9" * 5_000 + "}", False),
    ],
)
def test_json_in_tool_arguments_is_as_strict(text: str, passes: bool, store: PolicyStore) -> None:
    stub = Stub(reply={"choices": []})
    named = {"id": "1", "type": "function", "function": {"name": "f", "arguments": text}}
    turns = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": None, "tool_calls": [named]},
        {"role": "tool", "content": "b", "tool_call_id": "1"},
    ]
    target = Target("Do you dream?", CONTROL_IDS)
    answer = call(Guard(stub, store, lambda *_: None), target.chat(messages=turns))
    assert (answer.status, len(stub.seen)) == ((200, 1) if passes else (400, 0))
    if not passes:
        assert "arguments: the JSON in it" in answer.error


@pytest.mark.parametrize("stop", ["e", "|>", ["a text that holds others back"]])
@pytest.mark.parametrize("choice", [None, "auto", "required", "none"])
def test_stop_strings_never_act_on_a_control_token_that_tool_parsers_see(
    stop: Any, choice: str | None, store: PolicyStore
) -> None:
    stub = Stub(reply={"choices": []})
    tools = [{"type": "function", "function": {"name": "f"}}]
    target = Target("Do you dream?", CONTROL_IDS)
    asked = target.chat(stop=stop, tools=tools, tool_choice=choice, stream=True)
    answer = call(Guard(stub, store, lambda *_: None), asked)
    assert (answer.status, len(stub.seen)) == ((200, 1) if choice == "none" else (400, 0))


def test_a_websocket_is_closed(store: PolicyStore) -> None:
    import asyncio

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    stub = Stub()
    asyncio.run(Guard(stub, store, lambda *_: None)({"type": "websocket"}, None, send))  # type: ignore[arg-type]
    assert sent == [{"type": "websocket.close", "code": 1008}]
    assert stub.seen == []


def test_the_default_policy_is_what_the_floors_say(store: PolicyStore, tmp_path: Path) -> None:
    knobs = store.resolve({}).policy.knobs(store.info.taxonomy)
    assert knobs.floor.tolist() == [0.0, -math.inf, -math.inf, 0.0, -math.inf]
