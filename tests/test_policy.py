"""The policy file: round trip, bounds, locks, and what hand-edited nonsense is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refusal_tokens.decision import decide
from refusal_tokens.errors import InputError
from refusal_tokens.policy import Bounds, Policy, load_policy, policy_from_dict, save_policy
from refusal_tokens.taxonomy import Category, Taxonomy, default_taxonomy

TAXONOMY = default_taxonomy()
NATS = st.floats(-30, 30)


@st.composite
def bounds(draw: st.DrawFn) -> Bounds:
    low, high = sorted((draw(NATS), draw(NATS)))
    held = st.sampled_from([(low, high), (None, high), (low, None), (None, None)])
    return Bounds(*draw(held), locked=draw(st.booleans()))


@st.composite
def policies(draw: st.DrawFn) -> Policy:
    knobs = st.sampled_from(TAXONOMY.knobs)
    return Policy(
        rule=draw(st.sampled_from(["route", "bias", "threshold"])),
        bias=draw(st.dictionaries(knobs, NATS)),
        temperature=draw(st.floats(0, 5)),
        seed=draw(st.integers(0, 2**32 - 1)),
        bounds=draw(st.dictionaries(knobs, bounds())),
        model_fingerprint="model-a",
        taxonomy_hash=TAXONOMY.hash,
        provenance={"asked": {"safety": draw(st.floats(0, 1))}, "note": draw(st.text())},
    )


@settings(max_examples=50)
@given(policies())
def test_a_policy_survives_its_file_form(policy: Policy) -> None:
    assert policy_from_dict(json.loads(json.dumps(policy.to_dict())), "p.json") == policy


def test_a_saved_policy_decides_as_before(tmp_path: Path) -> None:
    policy = Policy("bias", {"humanizing": 1.25}, bounds={"safety": Bounds(-1.0, 2.0, True)})
    save_policy(tmp_path / "p.json", policy)
    loaded = load_policy(tmp_path / "p.json", TAXONOMY, "any model")
    assert loaded == policy
    np.testing.assert_array_equal(loaded.knobs(TAXONOMY).bias, [0, 0, 0, 1.25, 0])
    np.testing.assert_array_equal(loaded.knobs(TAXONOMY).floor, [-1.0] + 4 * [-np.inf])


def test_an_empty_policy_leaves_every_knob_at_zero() -> None:
    found = Policy().knobs(TAXONOMY)
    assert (found.rule, found.temperature) == ("route", 0.0)
    np.testing.assert_array_equal(found.bias, np.zeros(5))
    np.testing.assert_array_equal(found.floor, np.full(5, -np.inf))


@pytest.mark.parametrize(
    ("asked", "limits", "applied"),
    [
        (9.0, Bounds(-1, 3), 3.0),
        (-9.0, Bounds(-1, 3), -1.0),
        (2.0, Bounds(-1, 3), 2.0),
        (-9.0, Bounds(None, 3), -9.0),
        (9.0, Bounds(-1, None), 9.0),
        (None, Bounds(1, 3), 1.0),
        (None, Bounds(-3, -2), -2.0),
    ],
)
def test_a_bias_is_held_at_its_bounds(asked: float | None, limits: Bounds, applied: float) -> None:
    bias = {} if asked is None else {"incomplete": asked}
    policy = Policy(bias=bias, bounds={"incomplete": limits})
    assert policy.knobs(TAXONOMY).bias[1] == applied


def test_a_floor_holds_a_prompt_whatever_a_request_asks() -> None:
    policy = Policy(bounds={"safety": Bounds(min_bias=-0.5)})
    logits = np.array([[0.0, 1.0, 2.0, -9, -9, -9], [0.0, 0.25, 2.0, -9, -9, -9]])
    request = policy.with_bias({"safety": -50.0, "incomplete": -50.0})
    assert decide(logits, policy.knobs(TAXONOMY)).tolist() == [2, 2]
    assert decide(logits, request.knobs(TAXONOMY)).tolist() == [1, 0]


def test_a_request_moves_some_knobs_and_leaves_the_policy_alone() -> None:
    policy = Policy(bias={"safety": 1.0, "incomplete": 2.0})
    assert policy.with_bias({"safety": -3.0}).bias == {"safety": -3.0, "incomplete": 2.0}
    assert policy.bias == {"safety": 1.0, "incomplete": 2.0}


def test_a_locked_knob_cannot_be_moved() -> None:
    policy = Policy(
        bias={"safety": 1.0}, bounds={"safety": Bounds(locked=True), "humanizing": Bounds(-1)}
    )
    with pytest.raises(InputError, match="the policy locks safety; it cannot be changed here"):
        policy.with_bias({"safety": 0.0, "humanizing": 1.0})
    assert policy.with_bias({"safety": 1.0, "humanizing": 1.0}).bias["humanizing"] == 1.0


def test_a_locked_knob_without_a_bias_stands_at_zero() -> None:
    policy = Policy(bounds={"safety": Bounds(locked=True)})
    assert policy.with_bias({"safety": 0.0}).bias == {"safety": 0.0}
    with pytest.raises(InputError, match="the policy locks safety"):
        policy.with_bias({"safety": 0.5})


def test_a_policy_for_another_model_is_refused_naming_both(tmp_path: Path) -> None:
    save_policy(tmp_path / "p.json", Policy(model_fingerprint="aaa111"))
    with pytest.raises(
        InputError, match=r"p\.json: .*model fingerprint aaa111; this model has bbb222"
    ):
        load_policy(tmp_path / "p.json", TAXONOMY, "bbb222")
    assert load_policy(tmp_path / "p.json", TAXONOMY, "aaa111").model_fingerprint == "aaa111"


def test_a_policy_for_another_taxonomy_is_refused_naming_both(tmp_path: Path) -> None:
    other = Taxonomy((Category("legal", "Legal advice."),), "Fine.")
    save_policy(tmp_path / "p.json", Policy(taxonomy_hash=TAXONOMY.hash))
    with pytest.raises(InputError) as caught:
        load_policy(tmp_path / "p.json", other, "m")
    message = str(caught.value)
    assert f"taxonomy hash {TAXONOMY.hash}; this model has {other.hash}" in message


@pytest.mark.parametrize("policy", [Policy(bias={"safty": 1}), Policy(bounds={"safty": Bounds()})])
def test_a_knob_that_the_model_lacks_is_named_with_the_nearest(
    policy: Policy, tmp_path: Path
) -> None:
    save_policy(tmp_path / "p.json", policy)
    with pytest.raises(InputError, match=r"p\.json: .*'safty' \(did you mean 'safety'\?\)"):
        load_policy(tmp_path / "p.json", TAXONOMY, "m")


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        ({"rule": "rout"}, r"rule: unknown rule 'rout' \(did you mean 'route'\?\)"),
        ({"rule": ["route"]}, "rule: "),
        ({"bias": {"safety": "high"}}, "bias.safety: found 'high'"),
        ({"bias": {"safety": True}}, "bias.safety: found True"),
        ({"bias": {"safety": None}}, "bias.safety: found None"),
        ({"bias": {"safety": float("nan")}}, "bias.safety: found nan"),
        ({"bias": {"safety": float("inf")}}, "bias.safety: found inf"),
        ({"bias": [1, 2]}, "bias must be an object"),
        ({"bias": None}, "bias must be an object"),
        ({"temperature": -0.1}, "temperature: found -0.1; allowed: 0"),
        ({"temperature": "warm"}, "temperature: found 'warm'"),
        ({"temperature": float("nan")}, "temperature: found nan"),
        ({"seed": -1}, "seed: found -1"),
        ({"seed": 1.5}, "seed: found 1.5"),
        ({"seed": False}, "seed: found False"),
        ({"masked": "no"}, "masked: found 'no'; allowed: true or false"),
        ({"masked": False}, "masked: false works only with rule 'bias' and temperature 0"),
        ({"masked": False, "rule": "bias", "temperature": 1}, "masked: false works only"),
        ({"bounds": []}, "bounds must be an object"),
        ({"bounds": {"safety": 3}}, "bounds.safety: allowed keys: min_bias, max_bias, locked"),
        ({"bounds": {"safety": {"min": 3}}}, "bounds.safety: allowed keys: min_bias"),
        ({"bounds": {"safety": {"min_bias": "x"}}}, "bounds.safety: min_bias and max_bias must"),
        ({"bounds": {"safety": {"min_bias": 2, "max_bias": 1}}}, "min_bias 2 is above max_bias 1"),
        ({"bounds": {"safety": {"locked": 1}}}, "bounds.safety.locked: found 1"),
        ({"provenance": "me"}, "provenance must be an object"),
        ({"biases": {}}, r"unknown key 'biases' \(did you mean 'bias'\?\)"),
        ({"schema_version": 2}, "schema_version: found 2; allowed: 1"),
        ({"schema_version": None}, "schema_version: found None; allowed: 1"),
    ],
)
def test_hand_edited_nonsense_is_named_by_file_and_key(edit: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=rf"^p\.json: .*{said}"):
        policy_from_dict({"schema_version": 1, **edit}, "p.json")


def test_every_fault_of_a_policy_is_listed_at_once() -> None:
    with pytest.raises(InputError) as caught:
        Policy("rout", {"safety": "x"}, temperature=-1, seed=-1)  # type: ignore[arg-type,dict-item]
    assert str(caught.value).startswith("4 faults in policy:")


def test_a_file_that_is_no_policy_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"p\.json: found list; allowed: a policy object"):
        policy_from_dict([], "p.json")
    with pytest.raises(InputError, match=r"gone\.json: no such file"):
        load_policy(tmp_path / "gone.json", TAXONOMY, "m")
    (tmp_path / "cut.json").write_text('{"schema_version": 1,\n "bias"')
    with pytest.raises(InputError, match=r"cut\.json, line 2: not JSON"):
        load_policy(tmp_path / "cut.json", TAXONOMY, "m")


def test_a_whole_number_beyond_floats_is_refused() -> None:
    with pytest.raises(InputError, match="bias.safety"):
        policy_from_dict({"schema_version": 1, "bias": {"safety": 10**400}}, "p.json")


def test_a_repeated_key_is_refused(tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text('{"schema_version": 1, "bias": {"safety": 9, "safety": -9}}')
    with pytest.raises(InputError, match="twice"):
        load_policy(tmp_path / "p.json", TAXONOMY, "m")


def test_a_seed_that_numpy_would_split_is_refused() -> None:
    assert Policy(seed=2**32 - 1).seed == 2**32 - 1
    with pytest.raises(InputError, match="seed: found 4294967296; allowed: .* to 4294967295"):
        Policy(seed=2**32)
