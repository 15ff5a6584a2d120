"""``export`` of token biases: what stock programs do with them, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from completions_server import Server, running
from conftest import ROWS
from hypothesis import given
from hypothesis import strategies as st
from test_profiles import TWO
from transformers import GenerationConfig

from refusal_tokens.checkpoint import Checkpoint, CheckpointInfo, load_checkpoint
from refusal_tokens.cli import main
from refusal_tokens.policy import Bounds, Policy, save_policy
from refusal_tokens.prefill import last_logits, profile_rows
from refusal_tokens.profiles import Profile, write_profile
from refusal_tokens.rows import read_rows
from refusal_tokens.serving.bias_export import stock_rates, token_biases
from refusal_tokens.serving.completions import open_route
from refusal_tokens.taxonomy import Taxonomy, default_taxonomy

Capture = pytest.CaptureFixture[str]
KNOBS = default_taxonomy().knobs
IDS = tuple(range(100, 106))


@pytest.fixture(scope="module")
def folder(tiny_run: Path) -> Path:
    """Trained a little, so that some replies open with control tokens and some do not."""
    return tiny_run / "model"


@pytest.fixture(scope="module")
def checkpoint(folder: Path) -> Checkpoint:
    return load_checkpoint(folder, device="cpu")


@pytest.fixture(scope="module")
def profile(checkpoint: Checkpoint, rows_file: Path) -> Profile:
    return profile_rows(checkpoint, read_rows([rows_file], default_taxonomy()))


@pytest.fixture
def policy(tmp_path: Path, checkpoint: Checkpoint) -> Path:
    path = tmp_path / "policy.json"
    bias = {"safety": 3.0, "humanizing": -4.0}
    made = Policy(
        rule="bias",
        bias=bias,
        model_fingerprint=checkpoint.info.model_fingerprint,
        taxonomy_hash=checkpoint.info.taxonomy.hash,
    )
    save_policy(path, made)
    return path


def info_of(taxonomy: Taxonomy) -> CheckpointInfo:
    ids = IDS[: len(taxonomy.tokens)]
    return CheckpointInfo(taxonomy, ids, (1,), None, {}, "", {}, {}, {})


@given(st.dictionaries(st.sampled_from(KNOBS), st.floats(-40, 40)), st.floats(-10, 10))
def test_biases_keep_their_differences_and_raise_no_token(
    bias: Mapping[str, float], low: float
) -> None:
    made = Policy(rule="bias", bias=bias, bounds={"safety": Bounds(min_bias=low)})
    values = token_biases(made, info_of(default_taxonomy()))
    assert list(values) == list(IDS)
    assert max(values.values()) == 0.0
    knobs = made.knobs(default_taxonomy())
    assert knobs.bias[0] >= low
    gaps = [values[number] - values[IDS[0]] for number in IDS[1:]]
    assert gaps == pytest.approx(list(knobs.bias), abs=1e-9)


def test_one_category_makes_every_rule_a_bias() -> None:
    single = Taxonomy(TWO.categories, TWO.respond_description, single_token=True)
    values = token_biases(Policy(bias={"refuse": 2.0}), info_of(single))
    assert values == {100: -2.0, 101: 0.0}


def test_rates_on_planted_logits() -> None:
    """Two categories; biases a +2, b 0 become respond -2, a 0, b -2."""
    logits = np.array([[0, 1, 0], [9, 5, 8], [9, 8, 3], [0, 0, 3], [1, 1, 1.0]], np.float32)
    rest = np.array([0, 0, 0, 2, 9], np.float32)
    columns = {
        "label": np.array(["refuse", "refuse", "respond", "refuse", "respond"], dtype=object),
        "category": np.array(["a", "b", "a", "b", None], dtype=object),
    }
    info = info_of(TWO)
    planted = Profile(
        columns, logits, rest, {1.0: rest}, np.ones(5, np.int64), TWO, {"model_fingerprint": ""}
    )
    biases = token_biases(Policy(rule="bias", bias={"a": 2.0}), info)
    assert biases == {100: -2.0, 101: 0.0, 102: -2.0}
    rates = stock_rates(planted, biases, info)
    # Row by row: refused as a; respond; refused as a; the rest (2) is above b (1); the rest again.
    assert (rates.refused.count, rates.refused.n) == (1, 3)
    assert (rates.over_refused.count, rates.over_refused.n) == (1, 2)
    assert (rates.no_control_token.count, rates.no_control_token.n) == (2, 5)
    assert {name: (r.count, r.n) for name, r in rates.categories.items()} == {
        "a": (1, 1),
        "b": (0, 2),
    }


def test_a_stock_server_gives_the_rates_that_are_stated(
    folder: Path, checkpoint: Checkpoint, profile: Profile, policy: Path, tmp_path: Path
) -> None:
    written = tmp_path / "p.parquet"
    write_profile(written, profile)
    output = tmp_path / "bias.json"
    arguments = ["export", str(folder), "--format", "logit-bias", "--policy", str(policy)]
    assert main([*arguments, "--profile", str(written), "--output", str(output)]) == 0
    found = json.loads(output.read_text())
    controls = list(checkpoint.info.control_token_ids)
    assert [int(key) for key in found["logit_bias"]] == controls
    assert found["shift"] == -3.0
    assert any(limit.startswith("masking") for limit in found["cannot_express"])
    opened = []
    with running(Server(checkpoint, names_ids=True)) as server:
        route = open_route(server.url)
        for prompt, *_ in ROWS:
            ids = checkpoint.encoder.prompt_ids([{"role": "user", "content": prompt}])
            fields = {"logit_bias": found["logit_bias"], "return_token_ids": True}
            answer = route.complete(ids, max_tokens=1, temperature=0, **fields)
            opened.append(answer["choices"][0]["token_ids"][0])
    refuse = [
        token in controls[1:] for token, row in zip(opened, ROWS, strict=True) if row[2] == "refuse"
    ]
    assert any(token in controls for token in opened)
    assert found["rates"]["refused"]["count"] == sum(refuse)
    assert found["rates"]["no_control_token"]["count"] == sum(t not in controls for t in opened)
    assert found["rates"]["no_control_token"]["n"] == len(ROWS)


def test_transformers_obeys_the_generation_config(
    folder: Path, checkpoint: Checkpoint, policy: Path, tmp_path: Path, capsys: Capture
) -> None:
    output = tmp_path / "generation_config.json"
    arguments = ["export", str(folder), "--format", "generation-config", "--policy", str(policy)]
    assert main([*arguments, "--output", str(output)]) == 0
    assert "cannot express" in capsys.readouterr().out
    config = GenerationConfig.from_pretrained(tmp_path)
    assert config.eos_token_id == checkpoint.model.generation_config.eos_token_id
    biases = token_biases(
        Policy(rule="bias", bias={"safety": 3.0, "humanizing": -4.0}), checkpoint.info
    )
    for prompt, *_ in ROWS[:4]:
        ids = checkpoint.encoder.prompt_ids([{"role": "user", "content": prompt}])
        logits = last_logits(checkpoint, [ids])[0].clone()
        for number, value in biases.items():
            logits[number] += value
        out = checkpoint.model.generate(
            torch.tensor([ids]), generation_config=config, max_new_tokens=1, do_sample=False
        )
        assert int(out[0, -1]) == int(logits.argmax())


def test_what_cannot_be_said_or_does_not_fit_is_refused(
    folder: Path, checkpoint: Checkpoint, profile: Profile, tmp_path: Path, capsys: Capture
) -> None:
    made = Policy(rule="bias", bias={"safety": 1.0})
    policies = {
        "good": made,
        "route": replace(made, rule="route"),
        "threshold": replace(made, rule="threshold"),
        "sampled": replace(made, temperature=1.0),
        "far": replace(made, bias={"safety": 120.0}),
        "other": replace(made, model_fingerprint="abc"),
    }
    for name, each in policies.items():
        save_policy(tmp_path / f"{name}.json", each)
    text = (tmp_path / "good.json").read_text()
    (tmp_path / "nan.json").write_text(text.replace("1.0", "NaN"))
    metadata = {**profile.metadata, "model_fingerprint": "abc"}
    write_profile(tmp_path / "other.parquet", replace(profile, metadata=metadata))
    output = tmp_path / "out.json"
    good = ["--policy", str(tmp_path / "good.json")]
    cases = [
        (["--policy", str(tmp_path / "route.json")], "--rule bias"),
        (["--policy", str(tmp_path / "threshold.json")], "rule 'threshold'"),
        (["--policy", str(tmp_path / "sampled.json")], "temperature 1.0"),
        (["--policy", str(tmp_path / "far.json")], "120.0 nats apart"),
        (["--policy", str(tmp_path / "other.json")], "made for another model"),
        (["--policy", str(tmp_path / "nan.json")], "bias.safety: found nan"),
        (["--policy", str(tmp_path / "none.json")], "no such file"),
        ([], "needs --policy"),
        ([*good, "--profile", str(tmp_path / "other.parquet")], "profile is of another model"),
        ([*good, "--outtype", "f16"], "does not go with --format logit-bias"),
    ]
    for extra, message in cases:
        arguments = ["export", str(folder), "--format", "logit-bias", "--output", str(output)]
        assert main([*arguments, *extra]) == 2
        assert message in capsys.readouterr().err
        assert not output.exists()
    for arguments, message in (
        ([str(folder), "--format", "gguff", "--output", str(output)], "did you mean 'gguf'"),
        ([str(folder), "--format", "logit-bias", *good], "--output: missing"),
        ([str(folder), "--format", "gguf", *good, "--output", str(output)], "--policy: does not"),
        ([str(tmp_path / "x"), "--format", "gguf", "--output", str(output)], "no such checkpoint"),
        ([str(folder), "--format", "gguf", "--output", str(tmp_path)], "is a folder"),
        (
            [str(folder), "--format", "gguf", "--outtype", "q4", "--output", str(output)],
            "unknown outtype 'q4'",
        ),
    ):
        assert main(["export", *arguments]) == 2
        assert message in capsys.readouterr().err
        assert not output.exists()
