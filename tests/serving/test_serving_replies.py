"""What clients see: decisions added, control tokens gone, everything else as vLLM wrote it."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest

from refusal_tokens.policy import Policy, save_policy
from refusal_tokens.serving.middleware import Guard
from refusal_tokens.serving.policies import PolicyStore
from serving.bypass import Attempt, Target
from serving.planted_ids import CONTROL_IDS
from serving.stub import Answer, Stub, call

TARGET = Target("Do you dream?", CONTROL_IDS)
SAFETY = CONTROL_IDS[1]


@pytest.fixture
def store(info, tmp_path: Path) -> PolicyStore:  # type: ignore[no-untyped-def]
    for name in ("default", "strict"):
        save_policy(tmp_path / f"{name}.json", Policy())
    return PolicyStore(info, [tmp_path])


def entry(token: str, logprob: float, others: list[tuple[str, float]]) -> dict[str, Any]:
    top = [{"token": name, "logprob": value, "bytes": None} for name, value in others]
    return {"token": token, "logprob": logprob, "bytes": None, "top_logprobs": top}


def choice(index: int, first: int, **fields: Any) -> dict[str, Any]:
    return {
        "index": index,
        "message": {"role": "assistant", "content": "No.", "reasoning": None},
        "logprobs": None,
        "finish_reason": "stop",
        "token_ids": [first, 7, 2],
        **fields,
    }


def ask(store: PolicyStore, stub: Stub, **fields: Any) -> tuple[Answer, list[tuple[str, str]]]:
    counted: list[tuple[str, str]] = []
    app = Guard(stub, store, lambda category, policy: counted.append((category, policy)))
    return call(app, TARGET.chat(**fields)), counted


def test_each_choice_carries_its_decision(store: PolicyStore) -> None:
    reply = {
        "id": "a",
        "choices": [choice(0, SAFETY), choice(1, CONTROL_IDS[0])],
        "usage": {"prompt_tokens": 3},
        "prompt_token_ids": [1, 2],
    }
    answer, counted = ask(store, Stub(reply=reply), vllm_xargs={"rt_policy": "strict"})
    found = answer.data
    assert [c["refusal_tokens"] for c in found["choices"]] == [
        {"decision": "refuse", "category": "safety", "policy": "strict"},
        {"decision": "respond", "category": None, "policy": "strict"},
    ]
    assert counted == [("safety", "strict"), ("respond", "strict")]
    assert "token_ids" not in json.dumps(found)
    assert found["choices"][0]["finish_reason"] == "stop"
    assert (found["id"], found["usage"]) == ("a", {"prompt_tokens": 3})
    assert int(answer.headers["content-length"]) == len(answer.body)


def test_probabilities_come_when_asked_for(store: PolicyStore) -> None:
    tokens = store.info.taxonomy.tokens
    shares = [0.1, 0.5, 0.2, 0.05, 0.03, 0.02]
    read = [(t, math.log(p)) for t, p in zip(tokens, shares, strict=True)]
    logprobs = {"content": [entry(tokens[1], math.log(0.5), read)]}
    stub = Stub(reply={"choices": [choice(0, SAFETY, logprobs=logprobs)]})
    answer, _ = ask(store, stub, vllm_xargs={"rt_probabilities": True})
    found = answer.data["choices"][0]
    assert found["refusal_tokens"]["control_mass"] == pytest.approx(0.9)
    wanted = {t: p / 0.9 for t, p in zip(tokens, shares, strict=True)}
    assert found["refusal_tokens"]["probabilities"] == pytest.approx(wanted)
    assert found["logprobs"] is None
    asked = stub.seen[0][1]
    assert asked["logprob_token_ids"] == list(CONTROL_IDS)
    assert asked["vllm_xargs"] == {"rt_policy": "default"}


def test_log_probabilities_are_those_of_the_text(store: PolicyStore) -> None:
    tokens = store.info.taxonomy.tokens
    content = [
        entry(tokens[1], -0.1, [(tokens[1], -0.1), ("No", -3.0)]),
        entry("No", -0.2, [("No", -0.2), (tokens[0], -2.0), ("I", -4.0)]),
    ]
    stub = Stub(reply={"choices": [choice(0, SAFETY, logprobs={"content": content})]})
    answer, _ = ask(store, stub, logprobs=True, top_logprobs=3)
    kept = answer.data["choices"][0]["logprobs"]["content"]
    assert [e["token"] for e in kept] == ["No"]
    assert [e["token"] for e in kept[0]["top_logprobs"]] == ["No", "I"]


def chunk(**fields: Any) -> bytes:
    return b"data: " + json.dumps({"choices": [], **fields}).encode() + b"\n\n"


def delta(index: int, text: str, ids: list[int] | None, **fields: Any) -> bytes:
    part = {"index": index, "delta": {"content": text}, "finish_reason": None, **fields}
    return chunk(choices=[part | ({"token_ids": ids} if ids is not None else {})])


EVENTS = [
    chunk(choices=[{"index": 0, "delta": {"role": "assistant"}}], prompt_token_ids=[1, 2]),
    delta(0, "", [SAFETY]),
    delta(1, "", [CONTROL_IDS[0]]),
    # Said only because token ids were asked for.
    chunk(choices=[{"index": 1, "delta": {}, "finish_reason": None, "token_ids": [4]}]),
    delta(0, 'No, "token_ids": [1]', [7]),
    delta(1, "Yes\u2028é\\n\\n", [8, 9], finish_reason="length"),
    chunk(usage={"total_tokens": 9}),
    b"data: [DONE]\n\n",
]


@pytest.mark.parametrize("size", [1, 7, 100_000])
def test_streams_carry_the_decision_in_the_first_chunk_of_a_choice(
    store: PolicyStore, size: int
) -> None:
    # However the bytes are cut.
    whole = b"".join(EVENTS)
    stub = Stub(events=[whole[i : i + size] for i in range(0, len(whole), size)])
    answer, counted = ask(store, stub, stream=True)
    lines = answer.body.decode().split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    assert len(chunks) == len(EVENTS) - 2
    choices = [c["choices"][0] if c["choices"] else {} for c in chunks]
    found = [c.get("refusal_tokens", {}).get("category", "-") for c in choices]
    assert found == ["-", "safety", None, "-", "-", "-"]
    assert all("token_ids" not in c for c in choices)
    assert "prompt_token_ids" not in chunks[0]
    assert choices[3]["delta"]["content"] == 'No, "token_ids": [1]'
    assert choices[4]["delta"]["content"] == "Yes\u2028é\\n\\n"
    assert choices[4]["finish_reason"] == "length"
    assert chunks[5]["usage"] == {"total_tokens": 9}
    assert counted == [("safety", "default"), ("respond", "default")]


def test_a_refusal_to_a_forced_tool_is_text(store: PolicyStore) -> None:
    message = {
        "role": "assistant",
        "content": "",
        "reasoning": "I can't help.",
        "tool_calls": [{"id": "a", "function": {"name": "f", "arguments": "I can't help."}}],
    }
    tools = [{"type": "function", "function": {"name": "f"}}]
    reply = {"choices": [choice(0, SAFETY, message=message, finish_reason="tool_calls")]}
    answer, _ = ask(store, Stub(reply=reply), tools=tools, tool_choice="required")
    found = answer.data["choices"][0]
    assert found["message"] == {"role": "assistant", "content": "I can't help."}
    assert found["finish_reason"] == "stop"
    granted = copy.deepcopy(reply)
    granted["choices"][0]["token_ids"][0] = CONTROL_IDS[0]
    answer, _ = ask(store, Stub(reply=granted), tools=tools, tool_choice="required")
    found = answer.data["choices"][0]
    assert found["message"]["tool_calls"] == message["tool_calls"]
    assert "reasoning" not in found["message"]


def test_errors_of_the_server_pass_as_they_are(store: PolicyStore) -> None:
    reply = {"error": {"message": "too long", "token_ids": [1]}}
    answer, counted = ask(store, Stub(reply=reply, status=400))
    assert (answer.status, answer.data, counted) == (400, reply, [])


def test_a_stock_client_may_send_a_reply_back(store: PolicyStore) -> None:
    stub = Stub(reply={"choices": []})
    reply = {"role": "assistant", "content": "No.", "refusal": None, "annotations": None}
    reply |= {"audio": None, "function_call": None, "tool_calls": None}
    turns = [{"role": "user", "content": "a"}, reply, {"role": "user", "content": "b"}]
    answer, _ = ask(store, stub, messages=turns)
    assert answer.status == 200
    assert stub.seen[0][1]["messages"][1] == {"role": "assistant", "content": "No."}


def test_refusals_name_the_fault(store: PolicyStore) -> None:
    answer, _ = ask(store, Stub(), continue_final_message=True, temprature=1, top_k="5")
    assert answer.status == 400
    assert "unknown field 'continue_final_message'" in answer.error
    assert "did you mean 'temperature'?" in answer.error
    assert "top_k: found '5'; allowed: a whole number" in answer.error
    app = Guard(Stub(), store, lambda *_: None)
    assert "this server has GET /health" in call(app, Attempt(b"", path="/v1/completions")).error


def test_the_engine_is_told_the_policy_that_the_reply_names(
    store: PolicyStore,
) -> None:
    # Else a reload between the two could put the request under another default.
    stub = Stub(reply={"choices": [choice(0, SAFETY)]})
    answer, _ = ask(store, stub)
    assert stub.seen[0][1]["vllm_xargs"] == {"rt_policy": "default"}
    assert answer.data["choices"][0]["refusal_tokens"]["policy"] == "default"
    ask(store, stub, vllm_xargs={"rt_bias_safety": 1})
    assert stub.seen[1][1]["vllm_xargs"] == {"rt_bias_safety": 1, "rt_policy": "default"}
