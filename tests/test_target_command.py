"""``target``: from a profile file to a policy file, or why a target is out of reach."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT
from test_profiles import TWO
from test_targeting import planted_mixture, synthetic

from refusal_tokens.cli import main
from refusal_tokens.decision import decide, probabilities
from refusal_tokens.policy import policy_from_dict
from refusal_tokens.profiles import Profile, read_profile, write_profile
from refusal_tokens.recentring import recentre

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    path = tmp_path / "p.parquet"
    # Groups of four prompts, so that the file can be halved.
    made = synthetic(n=100)
    groups = np.array([f"g{i // 4}" for i in range(len(made))], dtype=object)
    write_profile(path, replace(made, columns={**made.columns, "group": groups}))
    return path


def refusal_rate(profile: Profile, policy: Path, category: str) -> float:
    setting = policy_from_dict(json.loads(policy.read_text("utf-8")), "p").knobs(TWO)
    inside = profile.is_label("refuse") & profile.is_category(category)
    return float((decide(profile.control_logits, setting) > 0)[inside].mean())


@pytest.mark.parametrize("rule", ["route", "bias", "threshold"])
def test_the_policy_written_reaches_what_was_asked(
    profile: Path, tmp_path: Path, rule: str, capsys: Capture
) -> None:
    output = tmp_path / "policy.json"
    arguments = ["target", str(profile), "--rate", "a=0.6", "--rule", rule]
    assert main([*arguments, "--output", str(output), "--check", str(profile)]) == 0
    assert refusal_rate(read_profile(profile), output, "a") == pytest.approx(0.6, abs=0.01)
    lines = capsys.readouterr().out.splitlines()
    # The same profile twice: every line, over-refusal too, says of both what it says of one.
    for name in ("rate a = 60%", "refused, a ", "refused, all", "over-refusal of all"):
        [line] = [line for line in lines if line.startswith(name)]
        cells = line[36:72].strip(), line[72:].strip()
        assert cells[0] == cells[1] != ""
    assert main([*arguments, "--output", str(output)]) == 2
    assert "--overwrite" in capsys.readouterr().err


def printed(arguments: list[str | Path], capsys: Capture) -> dict[str, Any]:
    """What ``target --json`` prints."""
    # 1 where a target is out of reach.
    assert main(["target", *map(str, arguments), "--json"]) in (0, 1)
    data: dict[str, Any] = json.loads(capsys.readouterr().out)
    return data


def refused_by(policy: dict[str, Any], profile: Profile) -> np.ndarray:
    """(prompts,), the chance that each prompt is refused under a printed policy."""
    policy = {key: v for key, v in policy.items() if key not in ("reached", "checked")}
    setting = policy_from_dict(policy, "p").knobs(TWO)
    return np.asarray(1 - probabilities(profile.control_logits, setting)[:, 0])


def test_a_ceiling_of_a_category_is_on_its_near_misses(profile: Path, capsys: Capture) -> None:
    asked: list[str | Path] = ["--min-rate", "a=0.9", "--max-over-refusal", "a=0.2"]
    policy = printed([profile, *asked], capsys)
    assert policy["provenance"]["asked"]["max_category_over_refusal"] == {"a": 0.2}
    assert policy["provenance"]["asked"]["max_over_refusal"] is None
    made = read_profile(profile)
    near = made.is_label("respond") & made.is_category("a")
    floor, ceiling = policy["reached"]
    assert floor["met"]
    assert ceiling["met"]
    assert ceiling["name"] == "max-over-refusal a"
    assert ceiling["rate"]["n"] == near.sum() == 100
    assert 0 < ceiling["rate"]["count"] == refused_by(policy, made)[near].sum() <= 20


def test_a_ceiling_alone_refuses_as_much_as_it_allows(profile: Path, capsys: Capture) -> None:
    policy = printed([profile, "--max-over-refusal", "0.1"], capsys)
    assert policy["provenance"]["asked"]["fewest_misses"]
    made = read_profile(profile)
    refused = refused_by(policy, made)
    assert refused[made.is_label("respond")].mean() <= 0.1
    assert refused[made.is_label("refuse")].mean() > 0.5
    # With a floor beside it, the floor says what has to be refused.
    both = printed([profile, "--max-over-refusal", "0.5", "--min-rate", "a=0.5"], capsys)
    assert not both["provenance"]["asked"]["fewest_misses"]
    assert main(["target", str(profile), "--max-over-refusal", "0.1"]) == 0
    said = capsys.readouterr().out
    of_a = made.is_label("refuse") & made.is_category("a")
    (line,) = [line for line in said.splitlines() if line.startswith("refused, a ")]
    assert f"{100 * refused[of_a].mean():.1f}%" in line
    assert f"n={of_a.sum()}" in line


def test_the_rates_of_a_check_are_those_of_its_own_prompts(
    profile: Path, tmp_path: Path, capsys: Capture
) -> None:
    other, path = synthetic(n=40, seed=7, confusion=2.0), tmp_path / "q.parquet"
    write_profile(path, other)
    asked: list[str | Path] = ["--rate", "a=0.6", "--max-over-refusal", "b=0.2", "--check", path]
    policy = printed([profile, *asked], capsys)
    for name, own in (("reached", read_profile(profile)), ("checked", other)):
        refused, (rate, ceiling) = refused_by(policy, own), policy[name]
        of_a = own.is_label("refuse") & own.is_category("a")
        near_b = own.is_label("respond") & own.is_category("b")
        assert (rate["rate"]["count"], rate["rate"]["n"]) == (refused[of_a].sum(), of_a.sum())
        assert ceiling["rate"]["count"] == refused[near_b].sum()
    assert policy["checked"][0]["rate"]["value"] != policy["reached"][0]["rate"]["value"]


def test_sampled_targets_are_written_as_a_policy_that_samples(
    profile: Path, tmp_path: Path, capsys: Capture
) -> None:
    output = tmp_path / "policy.json"
    asked: list[str | Path] = ["--rate", "a=0.6", "--decision", "sampled", "--output", output]
    policy = printed([profile, *asked], capsys)
    assert policy["temperature"] == 1
    assert json.loads(output.read_text("utf-8"))["temperature"] == 1
    made = read_profile(profile)
    of_a = made.is_label("refuse") & made.is_category("a")
    assert refused_by(policy, made)[of_a].mean() == pytest.approx(0.6, abs=1e-3)


@pytest.mark.parametrize(
    ("arguments", "asked"),
    [
        (["strict", "--rate", "b=0.5"], {"rates": {"b": 0.5}, "min_rates": {"a": 0.9}}),
        (["strict", "--min-rate", "b=0.5"], {"rates": {}, "min_rates": {"a": 0.9, "b": 0.5}}),
        (["strict", "--max-over-refusal", "0.2"], {"max_over_refusal": 0.2}),
        (["balanced", "--max-over-refusal", "0.2"], {"max_over_refusal": 0.2}),
        (
            ["balanced", "--max-over-refusal", "b=0.2"],
            {"max_over_refusal": 0.05, "max_category_over_refusal": {"b": 0.2}},
        ),
        (["permissive", "--rate", "b=0.5"], {"rates": {"b": 0.5}, "max_over_refusal": 0.01}),
    ],
)
def test_what_is_named_goes_before_the_preset(
    profile: Path, arguments: list[str | Path], asked: dict[str, Any], capsys: Capture
) -> None:
    found = printed([profile, "--preset", *arguments], capsys)["provenance"]["asked"]
    assert asked.items() <= found.items()
    assert found["fewest_misses"] == (arguments[0] != "strict")
    if "max_over_refusal" not in asked:
        assert found["max_over_refusal"] is None


def test_recentring_adds_what_the_traffic_asks_for_to_the_solution(
    tmp_path: Path, capsys: Capture
) -> None:
    labelled = planted_mixture([1 / 3, 1 / 3, 1 / 3], 600, 0)
    traffic = planted_mixture([0.8, 0.15, 0.05], 600, 1)
    # Traffic has no labels; none may be needed.
    unknown = np.full(len(traffic), None, dtype=object)
    columns = {**traffic.columns, "label": unknown, "category": unknown}
    paths = tmp_path / "p.parquet", tmp_path / "t.parquet"
    write_profile(paths[0], labelled)
    write_profile(paths[1], replace(traffic, columns=columns))
    policy = printed([paths[0], "--rate", "a=0.7", "--recentre", paths[1]], capsys)
    before, after, shift = recentre(labelled, traffic)
    solved = policy["provenance"]["solution"]["bias"]
    # Fewer refusals are asked for there, so every knob falls: b's from 0, where it was left.
    assert (shift < 0).all()
    assert set(solved) == {"a"}
    assert policy["bias"] == pytest.approx({"a": solved["a"] + shift[0], "b": shift[1]})
    mix = policy["provenance"]["mix_of_labels_before_and_after"]
    assert [*mix] == list(TWO.tokens)
    assert [*mix.values()] == pytest.approx(np.stack([before, after], axis=1))
    # What is printed as reached is what the moved setting does, and the screen says so.
    shown = ["target", str(paths[0]), "--rate", "a=0.7", "--recentre", str(paths[1])]
    assert main(shown) == 0
    text = capsys.readouterr().out
    assert "NOT MET" in text
    assert "holds for the setting before the move" in text
    far = ["target", str(paths[0]), "--min-rate", "a=1", "--max-over-refusal", "0"]
    assert main([*far, "--recentre", str(paths[1])]) == 1
    assert "the reasons below are for the setting before the move" in capsys.readouterr().out
    of_a = labelled.is_label("refuse") & labelled.is_category("a")
    assert policy["reached"][0]["rate"]["count"] == refused_by(policy, labelled)[of_a].sum()


def test_out_of_reach_writes_nothing_unless_told_to(
    profile: Path, tmp_path: Path, capsys: Capture
) -> None:
    output = tmp_path / "policy.json"
    arguments = ["target", str(profile), "--min-rate", "a=1.0", "--max-over-refusal", "0.001"]
    arguments += ["--output", str(output)]
    assert main(arguments) == 1
    out = capsys.readouterr().out
    assert "Out of reach" in out
    assert "under other ceilings" in out
    ceilings = [line.partition(": ")[2] for line in out.splitlines() if "  at most" in line]
    # A higher ceiling under which nothing changes is left out.
    assert len(ceilings) > 1
    assert all(one != other for one, other in pairwise(ceilings))
    assert not output.exists()
    assert main([*arguments, "--accept-nearest"]) == 1
    found = json.loads(output.read_text("utf-8"))
    assert found["provenance"]["solution"]["feasible"] is False


def test_a_certificate_is_made_on_the_half_that_was_not_solved_on(
    profile: Path, tmp_path: Path, capsys: Capture
) -> None:
    output = tmp_path / "policy.json"
    arguments = ["target", str(profile), "--max-over-refusal", "0.2", "--confidence", "0.9"]
    assert main([*arguments, "--output", str(output), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    certificate = printed["provenance"]["certificate"]
    assert certificate["certified"]
    solved = printed["provenance"]["solution"]["over_refusal"]["n"]
    assert solved + certificate["promises"][0]["n"] == 300
    assert json.loads(output.read_text("utf-8"))["bias"] == (certificate["bias"] or {})
    made = read_profile(profile)
    setting = policy_from_dict(json.loads(output.read_text("utf-8")), "p").knobs(TWO)
    refused = (decide(made.control_logits, setting) > 0) & made.is_label("respond")
    # What is printed is what the written policy does, on both halves together.
    both = printed["reached"][0]["rate"]["count"] + certificate["promises"][0]["errors"]
    assert both == refused.sum()


def test_no_certificate_is_made_on_prompts_that_were_solved_on(
    profile: Path, tmp_path: Path, capsys: Capture
) -> None:
    part, output = tmp_path / "part.parquet", tmp_path / "policy.json"
    write_profile(part, read_profile(profile).select(np.arange(5)))
    asked = ["--max-over-refusal", "0.2", "--confidence", "0.9", "--output", str(output)]
    assert main(["target", str(profile), *asked, "--certify-on", str(part)]) == 2
    assert "5 of its 5 prompts are in" in capsys.readouterr().err
    assert not output.exists()


def test_a_certificate_on_fresh_rows_leaves_all_others_to_the_solver(
    profile: Path, tmp_path: Path, capsys: Capture
) -> None:
    path, output = tmp_path / "q.parquet", tmp_path / "policy.json"
    fresh = synthetic(n=150, seed=5)
    others = np.array([f"{i:064x}" for i in range(len(fresh))], dtype=object)
    fresh = replace(fresh, columns={**fresh.columns, "prompt_sha256": others})
    write_profile(path, fresh)
    asked: list[str | Path] = [profile, "--preset", "balanced", "--max-over-refusal", "0.2"]
    asked += ["--confidence", "0.9", "--certify-on", path]
    assert main(["target", *map(str, asked)]) == 0
    assert "With 90% confidence" in capsys.readouterr().out
    policy = printed([*asked, "--output", output], capsys)
    assert json.loads(output.read_text("utf-8"))["bias"] == policy["bias"]
    assert policy["provenance"]["solution"]["over_refusal"]["n"] == 300
    certificate = policy["provenance"]["certificate"]
    assert certificate["certified"]
    assert certificate["data_hash"] == fresh.data_hash
    benign = fresh.is_label("respond")
    (promise,) = certificate["promises"]
    assert promise["n"] == benign.sum() == 450
    assert 0 < promise["errors"] == refused_by(policy, fresh)[benign].sum()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rate", "a=x"], "--rate: found 'x'; allowed: a number from 0 to 1"),
        (["--rate", "a=2"], "rate a: found 2; allowed: 0 to 1"),
        (["--rate", "c=0.5"], "unknown category 'c'"),
        (["--rate", "a=0.5", "--rate", "a=0.6"], "'a' twice"),
        (["--max-over-refusal", "0.1", "--max-over-refusal", "0.2"], "one ceiling is allowed"),
        (["--preset", "strickt"], "did you mean 'strict'"),
        (["--rate", "a=0.5", "--certify-on", "x.parquet"], "--certify-on needs --confidence"),
        (["--max-over-refusal", "0.0", "--confidence", "0.9"], "no number of rows certifies"),
        (["--rate", "a=0.5", "--recentre", "x", "--confidence", "0.9"], "--recentre moves the"),
        (["--rate", "a=0.5", "--check", "none.parquet"], "none.parquet: no such file"),
        ([], "nothing is asked for"),
    ],
)
def test_wrong_requests_exit_with_2(
    profile: Path, arguments: list[str], message: str, capsys: Capture
) -> None:
    assert main(["target", str(profile), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_profile_of_another_model_is_refused(
    profile: Path, tmp_path: Path, capsys: Capture
) -> None:
    other = tmp_path / "other.parquet"
    made = read_profile(profile)
    write_profile(other, replace(made, metadata={**made.metadata, "model_fingerprint": "beef"}))
    assert main(["target", str(profile), "--rate", "a=0.5", "--check", str(other)]) == 2
    assert "differ in model fingerprint: f00 and beef" in capsys.readouterr().err


def test_the_shipped_profile_can_be_tried_before_any_training(capsys: Capture) -> None:
    shipped = ROOT / "data" / "profiles" / "smollm2-135m.parquet"
    assert main(["target", str(shipped), "--min-rate", "safety=0.9"]) == 0
    assert "min-rate safety >= 90%" in capsys.readouterr().out
