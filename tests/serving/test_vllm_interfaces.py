"""The processor through vLLM's two interfaces, with fakes of the state that V2 keeps for it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("vllm")

from vllm import SamplingParams
from vllm.v1.sample.logits_processor import (
    BatchUpdate,
    MoveDirectionality,
    _load_logitsprocs_by_fqcns,
)
from vllm.v1.worker.gpu.sample.logits_processor.interface import (
    LogitsContext,
    LogitsProcRequestState,
)
from vllm.v1.worker.gpu.sample.logits_processor.loader import _load_v2_logitsprocs_by_fqcns

import refusal_tokens.serving.policies as policies
from refusal_tokens.checkpoint import CheckpointInfo, load_info
from refusal_tokens.decision import decide
from refusal_tokens.errors import InputError
from refusal_tokens.policy import Bounds, Policy, save_policy
from refusal_tokens.serving.policies import PolicyStore, server_store, store_from_environment
from refusal_tokens.serving.processor import RefusalTokens

NAME = "refusal_tokens.serving.processor:RefusalTokens"
VOCABULARY = 1_000


@pytest.fixture
def store(tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PolicyStore:
    save_policy(tmp_path / "default.json", Policy(bounds={"safety": Bounds(min_bias=-3.0)}))
    save_policy(tmp_path / "strict.json", Policy(bias={"safety": 40.0}, rule="bias"))
    monkeypatch.setenv("REFUSAL_TOKENS_CHECKPOINT", str(tiny_run / "model"))
    monkeypatch.setenv("REFUSAL_TOKENS_POLICY", str(tmp_path))
    server_store.cache_clear()
    found = server_store()
    assert found is not None
    yield found
    server_store.cache_clear()


def config(model: Path, **changes: str) -> Any:
    names = {"tokenizer_mode": "refusal_tokens", "reasoning_parser": "refusal_tokens", **changes}
    return SimpleNamespace(
        model_config=SimpleNamespace(model=str(model), tokenizer_mode=names["tokenizer_mode"]),
        structured_outputs_config=SimpleNamespace(reasoning_parser=names["reasoning_parser"]),
    )


@pytest.fixture
def v1(store: PolicyStore, tiny_run: Path) -> RefusalTokens:
    return RefusalTokens(config(tiny_run / "model"), torch.device("cpu"), False)


def params(**fields: Any) -> SamplingParams:
    found = SamplingParams(**fields)
    RefusalTokens.validate_params(found)
    return found


def wanted(store: PolicyStore, row: torch.Tensor, arguments: dict[str, Any]) -> int:
    setting = store.resolve(arguments).policy.knobs(store.info.taxonomy)
    control = list(store.info.control_token_ids)
    return control[decide(row[control].numpy()[None], setting)[0]]


def left(row: torch.Tensor) -> list[int]:
    return torch.isfinite(row).nonzero().flatten().tolist()


def test_one_class_loads_through_both_loaders() -> None:
    assert _load_logitsprocs_by_fqcns([NAME]) == [RefusalTokens]
    assert _load_v2_logitsprocs_by_fqcns([NAME]) == [RefusalTokens]


def test_v1_decides_once_and_follows_the_batch(v1: RefusalTokens, store: PolicyStore) -> None:
    arguments = [{"rt_policy": "strict"}, {}, {"rt_bias_humanizing": 30.0}]
    outputs: list[list[int]] = [[], [], []]
    added = [(i, params(extra_args=a), [1, 2], outputs[i]) for i, a in enumerate(arguments)]
    v1.update_state(BatchUpdate(batch_size=3, removed=[], added=added, moved=[]))
    logits = torch.randn(3, VOCABULARY)
    before = logits.clone()
    # Twice: a chunked prefill samples for chunks too, and throws the result away.
    for _ in range(2):
        logits = v1.apply(before.clone())
        for row in range(3):
            assert left(logits[row]) == [wanted(store, before[row], arguments[row])]
    # The first has its token; the others swap places; a fourth comes back from preemption.
    outputs[0].append(left(logits[0])[0])
    resumed = (3, params(extra_args={}), [1, 2], [5, 6])
    v1.update_state(
        BatchUpdate(4, removed=[], added=[resumed], moved=[(1, 2, MoveDirectionality.SWAP)])
    )
    before = torch.randn(4, VOCABULARY)
    logits = v1.apply(before.clone())
    control = set(store.info.control_token_ids)
    for row in (0, 3):
        assert set(left(logits[row])) == set(range(VOCABULARY)) - control
    assert left(logits[1]) == [wanted(store, before[1], arguments[2])]
    assert left(logits[2]) == [wanted(store, before[2], arguments[1])]
    v1.update_state(BatchUpdate(0, removed=[0, 1, 2, 3], added=[], moved=[]))
    assert not v1.apply(torch.zeros(1, VOCABULARY))[0].isfinite()[list(control)].any()


def v2_state(prompts: dict[int, list[int]]) -> LogitsProcRequestState:
    """Slots as vLLM's model runner keeps them, on the CPU."""
    ids = torch.zeros(8, 32, dtype=torch.int32)
    lengths = np.zeros(8, np.int32)
    for slot, prompt in prompts.items():
        ids[slot, : len(prompt)] = torch.tensor(prompt, dtype=torch.int32)
        lengths[slot] = len(prompt)
    return LogitsProcRequestState(
        device=torch.device("cpu"),
        max_num_reqs=8,
        vocab_size=VOCABULARY,
        all_token_ids=SimpleNamespace(gpu=ids),
        prompt_len=SimpleNamespace(np=lengths),
        prefill_len=SimpleNamespace(np=lengths),
        total_len=SimpleNamespace(gpu=torch.tensor(lengths)),
    )


def layout(slots: list[int], positions: list[int], rows: list[int] | None = None) -> LogitsContext:
    """A batch: one row a slot, or ``rows`` rows each where tokens were drafted."""
    counts = rows or [1] * len(slots)
    expanded = [s for s, n in zip(slots, counts, strict=True) for _ in range(n)]
    pos = [p + i for p, n in zip(positions, counts, strict=True) for i in range(n)]
    local = [i for n in counts for i in range(n)]
    seen = [p + n for p, n in zip(positions, counts, strict=True)]
    return LogitsContext(
        expanded_idx_mapping=torch.tensor(expanded),
        idx_mapping=torch.tensor(slots),
        idx_mapping_np=np.array(slots),
        expanded_local_pos=torch.tensor(local),
        input_ids=torch.zeros(len(expanded), dtype=torch.int32),
        pos=torch.tensor(pos),
        seq_lens_upper_bound_np=np.array(seen),
    )


def test_v2_decides_at_the_end_of_each_prompt(store: PolicyStore, tiny_run: Path) -> None:
    state = v2_state({5: [1, 2, 3], 2: [4, 5, 6, 7, 8], 6: [1]})
    v2 = RefusalTokens(config(tiny_run / "model"), state)
    arguments = {5: {"rt_policy": "strict"}, 2: {}, 6: {"rt_bias_humanizing": 30.0}}
    for slot, given in arguments.items():
        assert v2.add_request(slot, params(extra_args=given))
    v2.apply_staged_writes()
    control = set(store.info.control_token_ids)
    others = set(range(VOCABULARY)) - control
    # Slot 2 is still within its prompt: its row is masked only, and thrown away.
    before = torch.randn(3, VOCABULARY)
    after = v2.apply(before.clone(), layout([5, 2, 6], [2, 1, 0]))
    assert left(after[0]) == [wanted(store, before[0], arguments[5])]
    assert set(left(after[1])) == others
    assert left(after[2]) == [wanted(store, before[2], arguments[6])]
    # Drafted tokens after the decision: only the row at the prompt's end is decided.
    before = torch.randn(5, VOCABULARY)
    after = v2.apply(before.clone(), layout([6, 2], [1, 4], [2, 3]))
    assert left(after[2]) == [wanted(store, before[2], arguments[2])]
    assert all(set(left(after[row])) == others for row in (0, 1, 3, 4))
    # The slot's next request, resumed after preemption: nothing is decided again.
    assert v2.add_request(2, params(extra_args={}))
    after = v2.apply(torch.zeros(1, VOCABULARY), layout([2], [7]))
    assert set(left(after[0])) == others


def test_v2_and_v1_sample_alike(
    store: PolicyStore, tiny_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(policies, "SECONDS_BETWEEN_LOOKS", 0.0)
    save_policy(store.paths[0] / "sampled.json", Policy(temperature=3.0, seed=5))
    prompts = {slot: [slot, 7, 9] for slot in range(8)}
    own = params(extra_args={"rt_policy": "sampled"})
    before = torch.randn(8, VOCABULARY)
    v1 = RefusalTokens(config(tiny_run / "model"), "cpu", False)
    added = [(slot, own, prompt, []) for slot, prompt in prompts.items()]
    v1.update_state(BatchUpdate(8, removed=[], added=added, moved=[]))
    first = v1.apply(before.clone())
    v2 = RefusalTokens(config(tiny_run / "model"), v2_state(prompts))
    for slot in prompts:
        v2.add_request(slot, own)
    backwards = list(prompts)[::-1]
    second = v2.apply(before.flip(0), layout(backwards, [2] * 8))
    assert torch.equal(first, second.flip(0))
    assert len({left(row)[0] for row in first}) > 1


def test_a_model_without_refusal_tokens_is_left_alone(
    tiny_base: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("REFUSAL_TOKENS_CHECKPOINT", raising=False)
    server_store.cache_clear()
    inert = RefusalTokens(config(tiny_base(True), tokenizer_mode="auto"), "cpu", False)
    inert.update_state(
        BatchUpdate(1, removed=[], added=[(0, params(logit_bias={3: 1.0}), [1], [])], moved=[])
    )
    logits = torch.randn(2, VOCABULARY)
    assert inert.apply(logits.clone()).equal(logits)
    v2 = RefusalTokens(config(tiny_base(True)), v2_state({0: [1]}))
    assert not v2.add_request(0, params())
    assert v2.apply(logits.clone(), layout([0], [0])).equal(logits)


def test_start_is_refused_where_the_decision_would_not_hold(
    store: PolicyStore, tiny_run: Path, tiny_base: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_run / "model"
    with pytest.raises(InputError, match="--tokenizer-mode refusal_tokens"):
        RefusalTokens(config(model, tokenizer_mode="auto"), "cpu", False)
    with pytest.raises(InputError, match="--reasoning-parser refusal_tokens"):
        RefusalTokens(config(model, reasoning_parser=""), "cpu", False)
    with pytest.raises(InputError, match=r"has no refusal_tokens\.json"):
        RefusalTokens(config(tiny_base(True)), "cpu", False)
    monkeypatch.delenv("REFUSAL_TOKENS_CHECKPOINT")
    server_store.cache_clear()
    with pytest.raises(InputError, match="start the server with: refusal-tokens serve"):
        RefusalTokens(config(model), "cpu", False)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"allowed_token_ids": [5]}, "allowed_token_ids"),
        ({"bad_words": ["no"]}, "bad_words"),
        ({"extra_args": {"rt_policy": "none"}}, "unknown policy"),
        ({"extra_args": {"rt_bias_safety": -3.5}}, "min_bias -3"),
        ({"extra_args": {"rt_bias_safety": float("nan")}}, "a finite number"),
        ({"extra_args": {"rt_bias": 1}}, "unknown argument"),
    ],
)
def test_requests_that_reach_into_the_decision_are_refused(
    store: PolicyStore, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        params(**fields)


@pytest.mark.parametrize("name", ["logit_bias", "stop_token_ids"])
def test_control_tokens_are_not_open_to_parameters(store: PolicyStore, name: str) -> None:
    for token in store.info.control_token_ids:
        value: Any = {token: 5.0, 1: 1.0} if name == "logit_bias" else [1, token]
        with pytest.raises(ValueError, match=f"{name}: names control token {token}"):
            params(**{name: value})


def test_a_forged_setting_is_replaced(store: PolicyStore) -> None:
    forged = {"rule": "route", "bias": [-99.0] * 5, "floor": [None] * 5}
    found = params(extra_args={"rt_setting": forged, "other": 1})
    assert found.extra_args is not None
    assert found.extra_args["rt_setting"] == store.resolve({}).to_wire(store.info.taxonomy)
    assert found.extra_args["other"] == 1


def test_the_environment_names_checkpoint_and_policies(
    store: PolicyStore, tiny_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info: CheckpointInfo = load_info(tiny_run)
    assert store.info.model_fingerprint == info.model_fingerprint
    monkeypatch.setenv("REFUSAL_TOKENS_OUT_OF_BOUNDS", "ignore")
    with pytest.raises(InputError, match="unknown action 'ignore'"):
        store_from_environment()
