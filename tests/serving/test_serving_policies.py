"""The operator's policies: what a request may make of them, and reloads."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

import refusal_tokens.serving.policies as policies
from refusal_tokens.errors import InputError
from refusal_tokens.policy import Bounds, Policy, save_policy
from refusal_tokens.serving.policies import PolicyStore, knobs_from_wire

BOUNDED = Policy(
    bias={"safety": 1.0},
    bounds={"safety": Bounds(0.0, 3.0), "humanizing": Bounds(locked=True)},
)


@pytest.fixture
def store(info, tmp_path: Path) -> PolicyStore:  # type: ignore[no-untyped-def]
    save_policy(tmp_path / "default.json", BOUNDED)
    save_policy(tmp_path / "lax.json", Policy(bias={"safety": -5.0}))
    return PolicyStore(info, [tmp_path])


def bias_of(store: PolicyStore, **arguments: object) -> list[float]:
    setting = store.resolve(arguments)
    return setting.policy.knobs(store.info.taxonomy).bias.tolist()


def test_a_request_without_arguments_gets_the_default(store: PolicyStore) -> None:
    assert store.resolve({}).name == "default"
    assert bias_of(store) == [1.0, 0, 0, 0, 0]


def test_policy_and_knobs_are_applied(store: PolicyStore) -> None:
    assert bias_of(store, rt_policy="lax") == [-5.0, 0, 0, 0, 0]
    assert bias_of(store, rt_bias_safety=2, rt_bias_incomplete=-1.5) == [2.0, -1.5, 0, 0, 0]
    # Knobs of one request leave no trace in the next.
    assert bias_of(store) == [1.0, 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rt_policy": "laxx"}, "unknown policy 'laxx' (did you mean 'lax'?)"),
        ({"rt_policy": ["lax"]}, "unknown policy"),
        ({"rt_policy": "../lax"}, "unknown policy"),
        ({"rt_bias_safty": 1}, "did you mean 'rt_bias_safety'?"),
        ({"RT_BIAS_safety": 1}, "unknown argument"),
        ({"rt_bias_safety": "1"}, "allowed: a finite number of nats"),
        ({"rt_bias_safety": True}, "allowed: a finite number of nats"),
        ({"rt_bias_safety": [1]}, "allowed: a finite number of nats"),
        ({"rt_bias_safety": math.inf}, "allowed: a finite number of nats"),
        ({"rt_bias_safety": math.nan}, "allowed: a finite number of nats"),
        ({"rt_bias_safety": 10**400}, "allowed: a finite number of nats"),
        ({"rt_bias_safety": -0.5}, "policy 'default' has min_bias 0 for safety"),
        ({"rt_bias_safety": 3.5}, "policy 'default' has max_bias 3 for safety"),
        ({"rt_bias_humanizing": -4}, "policy 'default' locks humanizing at 0"),
    ],
)
def test_what_is_not_allowed_is_named(
    store: PolicyStore, arguments: dict[str, object], message: str
) -> None:
    with pytest.raises(InputError, match=".*") as caught:
        store.resolve(arguments)
    assert message in str(caught.value)


def test_a_setting_of_the_engine_is_never_read_from_a_client(store: PolicyStore) -> None:
    forged = {"rule": "route", "bias": [-99.0] * 5, "floor": [None] * 5}
    assert bias_of(store, rt_setting=forged) == [1.0, 0, 0, 0, 0]


def test_the_operator_may_choose_to_clamp(info, store: PolicyStore) -> None:  # type: ignore[no-untyped-def]
    clamping = PolicyStore(info, store.paths, clamp=True)
    assert bias_of(clamping, rt_bias_safety=-9.0, rt_bias_humanizing=-9.0) == [0.0, 0, 0, 0, 0]
    assert bias_of(clamping, rt_bias_safety=9.0) == [3.0, 0, 0, 0, 0]


def test_the_way_to_the_engine_loses_nothing(store: PolicyStore) -> None:
    setting = store.resolve({"rt_bias_safety": 2.0})
    # As JSON: what crosses must be plain.
    wire = json.loads(json.dumps(setting.to_wire(store.info.taxonomy), allow_nan=False))
    knobs, seed = knobs_from_wire(wire)
    wanted = setting.policy.knobs(store.info.taxonomy)
    assert (knobs.rule, knobs.temperature, seed) == (wanted.rule, 0.0, 0)
    np.testing.assert_array_equal(knobs.bias, wanted.bias)
    np.testing.assert_array_equal(knobs.floor, wanted.floor)
    assert knobs_from_wire(wire)[0] is knobs


def test_start_is_refused(info, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    def refused(message: str, *names: str) -> None:
        with pytest.raises(InputError) as caught:
            PolicyStore(info, [tmp_path / name for name in names])
        assert message in str(caught.value)

    refused("no such file", "absent.json")
    (tmp_path / "broken.json").write_text("{")
    refused("not JSON", "broken.json")
    save_policy(tmp_path / "foreign.json", Policy(model_fingerprint="another"))
    refused("made for another model", "foreign.json")
    save_policy(tmp_path / "unknown.json", Policy(bias={"weather": 1.0}))
    refused("unknown category 'weather'", "unknown.json")
    save_policy(tmp_path / "open.json", Policy(rule="bias", masked=False))
    refused("masked is false", "open.json")
    (tmp_path / "empty").mkdir()
    refused("no policy (*.json) in this folder", "empty")
    for name in ("one", "two"):
        save_policy(tmp_path / "pair" / f"{name}.json", Policy())
    refused("none is the default", "pair")
    save_policy(tmp_path / "again" / "one.json", Policy())
    refused("a second policy named 'one'", "again/one.json", "pair/one.json")
    files = PolicyStore(info, [tmp_path / "pair" / f"{name}.json" for name in ("two", "one")])
    assert files.default == "two"


def test_reload_keeps_the_old_policies_when_a_file_breaks(
    store: PolicyStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(policies, "SECONDS_BETWEEN_LOOKS", 0.0)
    file = store.paths[0] / "lax.json"
    file.write_text("{")
    assert bias_of(store, rt_policy="lax") == [-5.0, 0, 0, 0, 0]
    assert "the old ones stay" in caplog.text
    assert "lax.json" in caplog.text
    file.unlink()
    save_policy(file, Policy(bias={"safety": -2.0}))
    assert bias_of(store, rt_policy="lax") == [-2.0, 0, 0, 0, 0]
    save_policy(store.paths[0] / "third.json", Policy(bias={"incomplete": 1.0}))
    assert bias_of(store, rt_policy="third") == [0, 1.0, 0, 0, 0]


def test_a_default_that_is_gone_is_not_replaced(
    store: PolicyStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # As while an editor saves: the one file that is left, the lax one, is not the default.
    monkeypatch.setattr(policies, "SECONDS_BETWEEN_LOOKS", 0.0)
    (store.paths[0] / "default.json").unlink()
    assert store.resolve({}).name == "default"
    assert bias_of(store) == [1.0, 0, 0, 0, 0]
    assert "the default policy 'default' is gone" in caplog.text
    save_policy(store.paths[0] / "default.json", Policy(bias={"safety": 2.0}))
    assert bias_of(store) == [2.0, 0, 0, 0, 0]


@pytest.mark.parametrize("text", ["[" * 100_000, '{"seed": ' + "9" * 5_000 + "}"])
def test_files_beyond_what_python_reads_leave_the_old_policies(
    text: str,
    store: PolicyStore,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(policies, "SECONDS_BETWEEN_LOOKS", 0.0)
    (store.paths[0] / "lax.json").write_text(text)
    assert bias_of(store, rt_policy="lax") == [-5.0, 0, 0, 0, 0]
    assert "not JSON that can be read" in caplog.text
