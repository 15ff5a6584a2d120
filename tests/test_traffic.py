"""Traffic: shares without labels, and how far prompts have drifted from others."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from planted import normal_profile
from test_profiles import TWO, profile_of

from refusal_tokens.cli import main
from refusal_tokens.decision import knobs
from refusal_tokens.errors import InputError
from refusal_tokens.policy import Policy
from refusal_tokens.profiles import Profile, read_profile, write_profile
from refusal_tokens.rates import rate
from refusal_tokens.traffic import difference, drift, shares, traffic_table

PLAIN = Policy().knobs(TWO)


def test_shares_count_decisions_and_not_labels() -> None:
    entries = [("refuse", "a", [0, 3, 1]), ("respond", None, [0, 1, 3]), ("refuse", "b", [0, 1, 3])]
    entries += [("refuse", "a", [9, 3, 1])] * 5
    profile = profile_of(entries, TWO)
    unlabelled = replace(
        profile,
        columns={**profile.columns, "label": np.full(8, None), "category": np.full(8, None)},
    )
    for found in (shares(profile, PLAIN), shares(unlabelled, PLAIN)):
        assert {name: share.count for name, share in found.decisions.items()} == {
            "a": 1,
            "b": 2,
            "respond": 5,
        }
        assert found.refused == rate(3, 8)


def test_shares_of_a_sampled_decision_are_expected_ones() -> None:
    profile = profile_of([("refuse", "a", [0.0, np.log(2), 0.0])] * 4, TWO)
    found = shares(profile, knobs("bias", [0, 0], temperature=1.0))
    assert [share.value for share in found.decisions.values()] == pytest.approx([0.5, 0.25, 0.25])
    assert found.refused.value == pytest.approx(0.75)


def test_no_prompts_have_no_shares() -> None:
    with pytest.raises(InputError, match="no prompts in the profile"):
        shares(normal_profile(4).select(np.zeros(4, dtype=bool)), PLAIN)


def test_the_same_prompts_have_not_drifted() -> None:
    profile = normal_profile(200)
    found = drift(profile, profile, PLAIN)
    assert found.distance == 0
    assert found.p_value == 1
    for name, change in found.differences.items():
        assert change.value == 0, name
        assert change.low < 0 < change.high, name
    assert "no difference is shown" in traffic_table(shares(profile, PLAIN), found)


def moved(profile: Profile, by: float) -> Profile:
    return replace(profile, control_logits=profile.control_logits + np.float32([0, by, by]))


@pytest.mark.parametrize("by", [-1.0, 1.0])
def test_planted_drift_is_found_and_has_its_sign(by: float) -> None:
    old, new = normal_profile(400, seed=1), moved(normal_profile(400, seed=2), by)
    found = drift(new, old, PLAIN)
    assert found.p_value < 1e-4
    change = found.differences["refused"]
    assert np.sign([change.low, change.value, change.high]).tolist() == [np.sign(by)] * 3
    table = traffic_table(shares(new, PLAIN), found)
    assert "the two sets of prompts differ" in table
    assert f"{change}" in table


def test_drift_of_like_prompts_is_rarely_claimed() -> None:
    claimed = [
        drift(normal_profile(120, seed=2 * i), normal_profile(120, seed=2 * i + 1), PLAIN).p_value
        < 0.05
        for i in range(60)
    ]
    # 5% of 60 is 3; 10 or more would come once in a thousand times.
    assert sum(claimed) < 10


def test_intervals_of_differences_cover() -> None:
    random = np.random.default_rng(5)
    hits = 0
    for _ in range(1000):
        a, b = random.binomial(60, 0.3), random.binomial(90, 0.1)
        change = difference(rate(int(a), 60), rate(int(b), 90))
        hits += change.low <= 0.2 <= change.high
    assert 930 <= hits <= 980


@pytest.fixture
def unlabelled(tmp_path: Path, rows_file: Path) -> Path:
    path = tmp_path / "traffic.jsonl"
    rows = [json.loads(line) for line in rows_file.read_text("utf-8").splitlines()]
    kept = [{"id": row["id"], "prompt": row["prompt"], "label": None} for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in kept), "utf-8")
    return path


def test_the_command_shows_shares_and_drift_and_keeps_the_profile(
    tiny_run: Path, unlabelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    against, kept = tiny_run / "test.parquet", tmp_path / "kept.parquet"
    words = ["traffic", str(tiny_run), "--data", str(unlabelled), "--against", str(against)]
    words += ["--bias", "safety=3"]
    assert main([*words, "--output", str(kept)]) == 0
    screen = capsys.readouterr().out
    assert "difference" in screen
    assert f"Next: refusal-tokens target {against} --preset balanced --recentre {kept}" in screen
    assert main([*words, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    profile = read_profile(kept)
    setting = Policy(bias={"safety": 3.0}).knobs(profile.taxonomy)
    expected = shares(profile, setting)
    assert printed["traffic"]["refused"]["count"] == expected.refused.count
    assert printed["traffic"]["refused"]["n"] == len(profile)
    # The same prompts under the same model: what the labels said plays no part. Twelve prompts lie
    # as close together as rounding, and change places with it: the distance is not quite 0.
    trained = read_profile(against)
    np.testing.assert_allclose(profile.control_logits, trained.control_logits, atol=0.05)
    found = drift(profile, trained, setting)
    assert printed["drift"]["distance"] == found.distance
    assert printed["drift"]["p_value"] == found.p_value > 0.9
    assert printed["drift"]["differences"]["refused"]["value"] == pytest.approx(0, abs=0.05)


def test_a_profile_of_another_model_is_refused_before_the_work(
    tiny_run: Path, unlabelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    profile = read_profile(tiny_run / "test.parquet")
    other = tmp_path / "other.parquet"
    write_profile(
        other, replace(profile, metadata={**profile.metadata, "model_fingerprint": "f" * 64})
    )
    words = ["traffic", str(tiny_run), "--data", str(unlabelled), "--against", str(other)]
    assert main(words) == 2
    assert f"--against {other} is of another model" in capsys.readouterr().err
