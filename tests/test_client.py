"""The client against servers of several kinds, each backed by a real tiny model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from completions_server import Server, llama_like, openai_like, running, vllm_like
from untrained import save_untrained

from refusal_tokens.errors import InputError
from refusal_tokens.policy import Bounds, Policy
from refusal_tokens.prefill import last_logits
from refusal_tokens.serving import client as client_module
from refusal_tokens.serving.client import SteeredClient
from refusal_tokens.serving.completions import ServerError
from refusal_tokens.steering import SteeredModel
from refusal_tokens.taxonomy import default_taxonomy

PROMPTS = ["Hi", "How do I pick a lock?", "What is two and two? Say it in words.", "Draw."]
KNOBS = default_taxonomy().knobs
POLICIES = [
    Policy(),
    Policy(rule="bias", bias={"safety": 1.5, "humanizing": -2.0}),
    Policy(rule="threshold", bias=dict.fromkeys(KNOBS, 1.0)),
    Policy(bias=dict.fromkeys(KNOBS, -1.0)),
]
KINDS: dict[str, Callable[..., Server]] = {
    "token_ids": vllm_like,
    "listing": llama_like,
    "bias": openai_like,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("untrained") / "model"
    save_untrained(path)
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> SteeredModel:
    return SteeredModel.from_checkpoint(folder, device="cpu")


@pytest.fixture(scope="module", params=list(KINDS))
def server(request: pytest.FixtureRequest, model: SteeredModel) -> Iterator[Server]:
    with running(KINDS[request.param](model.checkpoint)) as started:
        yield started


@pytest.fixture(scope="module")
def client(server: Server, folder: Path) -> SteeredClient:
    return SteeredClient.connect(server.url, folder)


def test_each_kind_of_server_is_read_in_its_own_way(
    client: SteeredClient, server: Server, model: SteeredModel
) -> None:
    kind = client.capabilities.reading
    assert server.checkpoint is model.checkpoint
    assert KINDS[kind](model.checkpoint).form == server.form
    assert client.capabilities.seals
    everything = len(model.checkpoint.tokenizer)
    assert client.capabilities.listed == (everything if kind == "listing" else 20)


@pytest.mark.parametrize("policy", POLICIES)
def test_replies_are_those_of_the_model_itself(
    client: SteeredClient, model: SteeredModel, policy: Policy
) -> None:
    replies = client.generate(PROMPTS, policy, max_tokens=5)
    for prompt, reply in zip(PROMPTS, replies, strict=True):
        own = model.generate(prompt, policy, max_new_tokens=6, do_sample=False)[0]
        assert (reply.text, reply.decision, reply.category) == (
            own.text,
            own.decision,
            own.category,
        )
        assert reply.probabilities == pytest.approx(own.probabilities, abs=1e-5)
        assert reply.policy == policy
        if client.capabilities.reading == "bias":
            assert reply.control_mass is None
            assert reply.token_ids == own.token_ids[:1]
        else:
            assert reply.control_mass == pytest.approx(own.control_mass, abs=1e-5)
            assert reply.token_ids == own.token_ids


def test_replies_that_end_before_their_limit_are_those_of_the_model_in_a_batch(
    client: SteeredClient, model: SteeredModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"max_new_tokens": 6, "do_sample": False}
    whole = [reply.token_ids for reply in model.generate(PROMPTS, **settings)]
    # The third token of some reply that is not in every other.
    end = next(
        ids[2]
        for ids in whole
        if ids[2] not in ids[:2] and any(ids[2] not in other for other in whole)
    )
    monkeypatch.setattr(model.checkpoint.model.generation_config, "eos_token_id", [end])
    expected = [ids[: ids.index(end) + 1] if end in ids else ids for ids in whole]
    assert {3, 6} <= {len(ids) for ids in expected}
    own = model.generate(PROMPTS, **settings)
    assert [reply.token_ids for reply in own] == expected
    replies = client.generate(PROMPTS, max_tokens=5)
    assert [reply.text for reply in replies] == [reply.text for reply in own]
    if client.capabilities.reading != "bias":
        assert [reply.token_ids for reply in replies] == expected


def test_typed_control_tokens_are_sent_as_plain_text(
    client: SteeredClient, server: Server, model: SteeredModel
) -> None:
    controls = set(model.checkpoint.info.control_token_ids)
    texts = [f"Answer this {token} now" for token in model.checkpoint.info.taxonomy.tokens]
    begun = len(server.seen)
    client.generate(texts, POLICIES[1], max_tokens=2)
    prompts = [body["prompt"] for body in server.seen[begun:]]
    assert {len(controls.intersection(prompt)) for prompt in prompts} == {0, 1}
    assert not any(controls.intersection(prompt[:-1]) for prompt in prompts)


def test_replies_hold_no_further_control_token(client: SteeredClient, server: Server) -> None:
    begun = len(server.seen)
    client.generate("Hi", max_tokens=3)
    bias = server.seen[-1]["logit_bias"]
    assert len(server.seen) > begun
    assert bias == {str(number): -100.0 for number in client.info.control_token_ids}


def test_sampled_decisions_depend_on_seed_and_row_alone(
    client: SteeredClient, model: SteeredModel
) -> None:
    policy = Policy(temperature=2.0, seed=5)
    prompts = [PROMPTS[0]] * 12
    chosen = [d.index for d in client.decide(prompts, policy)]
    assert len(set(chosen)) > 1
    assert chosen == [d.index for d in client.decide(prompts, policy, concurrency=1)]
    backwards = client.decide(prompts, policy, rows=range(11, -1, -1))
    assert chosen == [d.index for d in backwards][::-1]
    own = model.generate(prompts, policy, max_new_tokens=1)
    categories = [None, *KNOBS]
    assert [categories[index] for index in chosen] == [reply.category for reply in own]


def test_a_floor_holds_whatever_other_knobs_say(client: SteeredClient) -> None:
    low = dict.fromkeys(KNOBS, -50.0)
    assert client.decide("Hi", Policy(bias=low))[0].index == 0
    held = Policy(bias=low, bounds={"safety": Bounds(min_bias=40.0)})
    assert client.decide("Hi", held)[0].index == 1
    with pytest.raises(InputError, match="locks safety"):
        replace(held, bounds={"safety": Bounds(locked=True)}).with_bias({"safety": 1.0})


def test_conversations_and_a_policy_each(client: SteeredClient) -> None:
    chat = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "Bye"},
    ]
    strict = Policy(rule="bias", bias={"unsupported": 60.0})
    lax = Policy(bias=dict.fromkeys(KNOBS, -60.0))
    replies = client.generate([chat, "Hi"], [strict, lax], max_tokens=1)
    assert [reply.category for reply in replies] == ["unsupported", None]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": [], "policy": None}, "no prompt"),
        ({"prompts": "Hi", "policy": [Policy(), Policy()]}, "2 policies for 1 prompts"),
        ({"prompts": "Hi", "policy": Policy(bias={"safty": 1.0})}, "did you mean 'safety'"),
        ({"prompts": "Hi", "policy": Policy(rule="bias", masked=False)}, "unmasked"),
        ({"prompts": "Hi", "max_token": 3}, "did you mean 'max_tokens'"),
        ({"prompts": "Hi", "logit_bias": {"1": 100}}, "unknown setting 'logit_bias'"),
        ({"prompts": "Hi", "concurrency": 0}, "concurrency 0"),
    ],
)
def test_wrong_calls_are_told_before_anything_is_sent(
    client: SteeredClient, server: Server, arguments: dict[str, object], message: str
) -> None:
    begun = len(server.seen)
    with pytest.raises(InputError, match=message):
        client.generate(**arguments)  # type: ignore[arg-type]
    assert len(server.seen) == begun


def test_the_list_grows_until_the_control_tokens_are_in_it(
    folder: Path, model: SteeredModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "FIRST_LISTING", 1)
    monkeypatch.setattr(client_module, "GROWTH", 2)
    with running(llama_like(model.checkpoint)) as server:
        client = SteeredClient.connect(server.url, folder)
        begun = len(server.seen)
        found = client.decide("Hi")[0]
        asked = [body["logprobs"] for body in server.seen[begun:]]
    prompt = client.encoder.prompt_ids([{"role": "user", "content": "Hi"}])
    logits = last_logits(model.checkpoint, [prompt])[0]
    worst = logits[list(client.info.control_token_ids)].min()
    needed = int((logits >= worst).sum())
    assert needed > 1
    assert asked[-2] < needed <= asked[-1]
    assert asked[:3] == [1, 2, 4]
    own = model.generate("Hi", max_new_tokens=1)[0]
    shares = np.exp(found.control_logits - np.logaddexp.reduce(found.control_logits))
    assert shares == pytest.approx(list(own.probabilities.values()), abs=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lists": 5}, "lists 5 log-probabilities at most.* 6 control tokens"),
        ({"lists": 20}, "lists 20 log-probabilities at most"),
        ({"lists": 5, "shows_bias": True}, "lists 5 log-probabilities at most"),
        ({"lists": 0}, "lists 0 log-probabilities at most"),
        ({"lists": 20, "strict": True}, "does not show logit_bias"),
        ({"prompts": "text"}, "HTTP 422: prompt must be a string; a prompt of token ids is needed"),
        ({"prompts": "joined"}, "does not take them as they are"),
    ],
)
def test_servers_that_cannot_be_steered_are_refused_with_the_reason(
    folder: Path, model: SteeredModel, changes: dict[str, object], message: str
) -> None:
    with (
        running(Server(model.checkpoint, **changes)) as server,  # type: ignore[arg-type]
        pytest.raises(InputError, match=message),
    ):
        SteeredClient.connect(server.url, folder)


def test_a_wrong_address_or_model_is_named(folder: Path, model: SteeredModel) -> None:
    with running(vllm_like(model.checkpoint)) as server:
        with pytest.raises(InputError, match="did you mean 'tiny-model'"):
            SteeredClient.connect(server.url, folder, model="tinymodel")
        gone = server.url
    with pytest.raises(InputError, match="cannot be reached"):
        SteeredClient.connect(gone, folder)


def test_a_busy_server_is_asked_again(
    folder: Path, model: SteeredModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("refusal_tokens.serving.completions.WAITS", (0.01, 0.01, 0.01))
    with running(vllm_like(model.checkpoint)) as server:
        client = SteeredClient.connect(server.url, folder)
        server.busy = 3
        assert client.decide("Hi")[0].control_logits.shape == (6,)
        server.busy = 4
        with pytest.raises(ServerError, match="HTTP 503: loading"):
            client.decide("Hi", concurrency=1)


def test_numbers_that_are_no_log_probabilities_decide_nothing(
    folder: Path, model: SteeredModel
) -> None:
    with running(vllm_like(model.checkpoint)) as server:
        client = SteeredClient.connect(server.url, folder)
        server.broken = float("nan")
        with pytest.raises(ServerError, match="not finite"):
            client.decide("Hi")
