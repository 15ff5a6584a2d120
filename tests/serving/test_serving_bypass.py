"""Every bypass attempt against the middleware, with a stub behind it that records what passes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from refusal_tokens.policy import Bounds, Policy, save_policy
from refusal_tokens.serving.middleware import HEADERS, Guard
from refusal_tokens.serving.policies import PolicyStore
from refusal_tokens.serving.requests import CHAT, FIELDS, ROLES
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
            assert answer.status in (400, 404, 413), attempt
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
