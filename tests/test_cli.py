"""The command as a user types it: every wrong input gives one message and exit status 2."""

from __future__ import annotations

import argparse
import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT, tiny_settings

from refusal_tokens.cli import _parser, main
from refusal_tokens.policy import Bounds, Policy, save_policy
from refusal_tokens.taxonomy import default_taxonomy

Capture = pytest.CaptureFixture[str]


def ok(arguments: list[str], capsys: Capture) -> str:
    assert main(arguments) == 0
    return capsys.readouterr().out


def refused(arguments: list[str], capsys: Capture) -> str:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert "Traceback" not in captured.err
    return captured.err


def test_generate_shows_a_knob_changing_the_decision(tiny_run: Path, capsys: Capture) -> None:
    arguments = ["generate", str(tiny_run), "Hello", "--max-new-tokens", "4"]
    low = ok([*arguments, "--bias", "safety=-60", "--bias", "incomplete=60"], capsys)
    high = ok([*arguments, "--rule", "bias", "--bias", "safety=60"], capsys)
    assert "-> refuse:safety" in high
    assert "-> refuse:safety" not in low


def test_prompts_may_follow_the_options(tiny_run: Path, capsys: Capture) -> None:
    options = ["--max-new-tokens", "2", "--json"]
    after = ok(["generate", str(tiny_run), *options, "One", "Two"], capsys)
    around = ok(["generate", str(tiny_run), "One", *options, "Two"], capsys)
    assert after == around
    assert len(after.splitlines()) == 2
    with pytest.raises(SystemExit) as caught:
        main(["generate", str(tiny_run), "One", "--frobnicate"])
    assert caught.value.code == 2


def test_a_sweep_replies_once_for_each_setting(tiny_run: Path, capsys: Capture) -> None:
    arguments = ["generate", str(tiny_run), "Hi", "Bye", "--sweep", "safety=-60,0,60"]
    out = ok([*arguments, "--rule", "bias", "--max-new-tokens", "3", "--json"], capsys)
    replies = [json.loads(line) for line in out.splitlines()]
    assert [r["policy"]["bias"]["safety"] for r in replies] == [-60, 0, 60] * 2
    assert [r["category"] for r in replies[2::3]] == ["safety", "safety"]
    keys = {"prompt", "text", "decision", "category", "probabilities", "control_mass"}
    assert all(keys | {"policy", "token_ids"} == set(reply) for reply in replies)


def test_prompts_come_from_a_file_or_standard_input(
    tiny_run: Path,
    rows_file: Path,
    tmp_path: Path,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    short = ["--max-new-tokens", "2", "--json"]
    out = ok(["generate", str(tiny_run), "--input", str(rows_file), *short], capsys)
    assert len(out.splitlines()) == 12
    text = tmp_path / "prompts.txt"
    text.write_text("One\n\nTwo\n")
    out = ok(["generate", str(tiny_run), "--input", str(text), *short], capsys)
    assert len(out.splitlines()) == 2
    monkeypatch.setattr("sys.stdin", io.StringIO("Three\n"))
    out = ok(["generate", str(tiny_run), *short], capsys)
    assert json.loads(out)["prompt"][0]["content"] == "Three"


def test_a_system_prompt_reaches_the_model(tiny_run: Path, capsys: Capture) -> None:
    arguments = ["generate", str(tiny_run), "Hi", "--json", "--max-new-tokens", "2"]
    plain = json.loads(ok(arguments, capsys))
    system = json.loads(ok([*arguments, "--system", "Talk like a pirate."], capsys))
    assert system["prompt"][0]["role"] == "system"
    assert system["probabilities"] != plain["probabilities"]


def test_inspect_names_a_knob_that_really_flips(tiny_run: Path, capsys: Capture) -> None:
    found = json.loads(ok(["inspect", str(tiny_run), "Hello", "--json"], capsys))
    change = found["changes"][0]
    beyond = change["bias"] + (0.01 if change["bias"] >= change["now"] else -0.01)
    short_of = change["bias"] - (0.01 if change["bias"] >= change["now"] else -0.01)
    for value, decision in ((beyond, change["decision"]), (short_of, found["decision"])):
        bias = f"{change['knob']}={value}"
        moved = ok(["inspect", str(tiny_run), "Hello", "--json", "--bias", bias], capsys)
        assert json.loads(moved)["decision"] == decision
    assert "control tokens together" in ok(["inspect", str(tiny_run), "Hello"], capsys)


def test_profile_writes_a_file_and_keeps_it(
    tiny_run: Path, rows_file: Path, tmp_path: Path, capsys: Capture
) -> None:
    output = tmp_path / "p.parquet"
    arguments = ["profile", str(tiny_run), "--data", str(rows_file), "--output", str(output)]
    assert "12 prompts" in ok(arguments, capsys)
    before = output.read_bytes()
    assert "exists; use --overwrite" in refused(arguments, capsys)
    assert output.read_bytes() == before


def test_evaluate_forces_every_token(
    tiny_run: Path, rows_file: Path, tmp_path: Path, capsys: Capture
) -> None:
    output = tmp_path / "o.parquet"
    arguments = ["evaluate", str(tiny_run), "--data", str(rows_file), "--output", str(output)]
    out = ok([*arguments, "--max-new-tokens", "3", "--json"], capsys)
    found = json.loads(out)["report"]
    n = {
        (line["token"], line["prompts"]): line["preferred"]["n"] + line["not_preferred"]["n"]
        for line in found["adherence"]
    }
    asked = "refuse incomplete, indeterminate, humanizing, unsupported"
    assert n == {
        **{(f"<|refuse:{c}|>", "all kinds"): 12 for c in default_taxonomy().knobs},
        ("all refusal tokens", "all kinds"): 60,
        ("<|respond|>", "respond"): 7,
        ("<|respond|>", asked): 4,
        ("<|respond|>", "refuse safety"): 0,
    }
    assert (found["prompts"], found["replies"]) == (12, 12 + 60 + 11)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "o.base.parquet",
        "o.parquet",
        "o.profile.parquet",
    ]


def test_chat_moves_knobs_between_turns(
    tiny_run: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = ["Hello", "/bias safety 80", "/retry", "/show", "/bias nope 1", "/what", "/quit"]
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    arguments = ["chat", str(tiny_run), "--rule", "bias", "--bias", "safety=-80"]
    out = ok([*arguments, "--max-new-tokens", "3"], capsys)
    first, second = out.split("safety +80", 1)
    assert "[safety]" not in first
    assert "[safety]" in second
    assert "unknown category 'nope'" in second
    assert "unknown command /what" in second


def test_a_policy_file_is_obeyed_and_bound_to_its_model(
    tiny_run: Path, tmp_path: Path, capsys: Capture
) -> None:
    path = tmp_path / "policy.json"
    arguments = ["generate", str(tiny_run), "Hi", "--policy", str(path), "--max-new-tokens", "2"]
    policy = Policy(rule="bias", bias={"safety": 60.0}, bounds={"safety": Bounds(locked=True)})
    save_policy(path, policy)
    assert "refuse:safety" in ok(arguments, capsys)
    assert "locks safety" in refused([*arguments, "--bias", "safety=0"], capsys)
    save_policy(path, Policy(model_fingerprint="0123"))
    message = refused(arguments, capsys)
    assert "fingerprint 0123" in message
    assert "this model has" in message


def test_data_split_makes_files_that_pass_the_check(
    rows_file: Path, tmp_path: Path, capsys: Capture
) -> None:
    folder = str(tmp_path / "out")
    split = ["data", "split", str(rows_file), "--output-dir", folder, "--shares", "a=0.5,b=0.5"]
    ok(split, capsys)
    out = ok(["data", "check", folder], capsys)
    assert "FAULT" not in out
    assert "exists" in refused(split, capsys)


ROW = {"id": "a", "prompt": "Hi", "label": "respond"}
BAD_ROWS = {
    "unknown category": ({**ROW, "category": "safty"}, "did you mean 'safety'"),
    "refuse without category": ({**ROW, "label": "refuse"}, "'category' is null on a refuse row"),
    "empty prompt": ({**ROW, "prompt": " "}, "'prompt' is empty"),
    "control token in a reply": ({**ROW, "response": "<|respond|>Hi"}, "control token <|respond|>"),
    "unknown key": ({**ROW, "respons": "Hi"}, "did you mean 'response'"),
}


@pytest.mark.parametrize("case", list(BAD_ROWS))
def test_bad_rows_stop_training_before_anything_is_written(
    case: str, tiny_base: Callable[[bool], Path], tmp_path: Path, capsys: Capture
) -> None:
    record, message = BAD_ROWS[case]
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(record) + "\n")
    sets = [a for s in tiny_settings(tiny_base(True), path) for a in ("--set", s)]
    output = tmp_path / "run"
    recipe = str(ROOT / "recipes" / "tiny.yaml")
    text = refused(["train", recipe, "--output-dir", str(output), *sets], capsys)
    assert message in text
    assert "rows.jsonl, line 1" in text
    assert not output.exists()


def test_a_control_token_in_a_prompt_is_a_warning_only(tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({**ROW, "prompt": "What is <|respond|>?"}) + "\n")
    assert "spells a special token" in ok(["data", "check", str(path)], capsys)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "nowhere.yaml"], "nowhere.yaml: no such file"),
        (["train", "recipes/tiny.yaml", "--set", "model_name_or_path=./no"], "no such folder"),
        (
            ["train", "recipes/tiny.yaml", "--set", "model_name_or_path=smollm2-135m"],
            "did you mean",
        ),
        (["data", "check", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["data", "check", "README.md"], "unknown kind of file"),
        (["data", "check", "tests"], "no .jsonl, .parquet or .csv file"),
        (["data", "check", "data", "--map", "{propmt: q}"], "did you mean 'prompt'"),
        (["data", "check", "data", "--map", "xtest"], "did you mean 'xstest'"),
        (["generate", "nowhere", "Hi"], "nowhere: no such checkpoint"),
        (["generate", "tests", "Hi"], "no refusal_tokens.json"),
        (["inspect", "nowhere", "Hi"], "no such checkpoint"),
        (["profile", "nowhere", "--data", "x", "--output", "y.parquet"], "no such checkpoint"),
        (
            ["profile", "nowhere", "--data", "x", "--output", "tests", "--overwrite"],
            "tests: is a folder; a file is needed",
        ),
        (["profile", "nowhere", "--data", "x", "--output", "y" * 300], "cannot be written"),
        (["profile", "nowhere", "--data", "x", "--output", "Makefile/y"], "cannot be written"),
    ],
)
def test_wrong_paths_are_named(
    arguments: list[str], message: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    assert message in refused(arguments, capsys)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bias", "safty=1"], "did you mean 'safety'"),
        (["--bias", "safety"], "allowed: name=value"),
        (["--bias", "safety=much"], "allowed: category=number"),
        (["--bias", "safety=nan"], "finite"),
        (["--sweep", "safety=1,x"], "allowed: category=number,number"),
        (["--sweep", "safty=1"], "did you mean 'safety'"),
        (["--policy", "nowhere.json"], "no such file"),
        (["--max-new-tokens", "0"], "--max-new-tokens"),
        (["--temperature", "-1"], "--temperature"),
        (["--input", "rows.jsonl"], "prompts as arguments and --input: give one"),
    ],
)
def test_wrong_knobs_are_named(
    tiny_run: Path, arguments: list[str], message: str, capsys: Capture
) -> None:
    assert message in refused(["generate", str(tiny_run), "Hi", *arguments], capsys)


def test_a_checkpoint_that_was_changed_is_refused(
    tiny_run: Path, tmp_path: Path, capsys: Capture
) -> None:
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(tiny_run / "model", folder)
    info = folder / "refusal_tokens.json"
    text = info.read_text()
    info.write_text(text.replace('"safety"', '"danger"').replace("refuse:safety", "refuse:danger"))
    assert "no control token <|refuse:danger|>" in refused(["inspect", str(folder), "Hi"], capsys)
    info.write_text(text[: len(text) // 2])
    assert "not JSON" in refused(["inspect", str(folder), "Hi"], capsys)
    info.write_text(json.dumps({**json.loads(text), "control_token_ids": 5}))
    assert "control_token_ids: found 5; allowed: a list" in refused(
        ["inspect", str(folder), "Hi"], capsys
    )
    info.write_text(text)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "could not be loaded" in refused(["inspect", str(folder), "Hi"], capsys)


def test_a_model_without_chat_template_says_what_to_do(
    tiny_base: Callable[[bool], Path], rows_file: Path, tmp_path: Path, capsys: Capture
) -> None:
    import shutil

    folder = tmp_path / "base"
    shutil.copytree(tiny_base(True), folder)
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    sets = [a for s in tiny_settings(folder, rows_file) for a in ("--set", s)]
    arguments = ["train", str(ROOT / "recipes" / "tiny.yaml"), "--dry-run", *sets]
    assert "set chat_template_path" in refused(arguments, capsys)
    given = tmp_path / "t.jinja"
    given.write_text(template)
    assert "rows" in ok([*arguments, "--set", f"chat_template_path={given}"], capsys)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--engine vllm: vLLM cannot be imported"),
        (["--temperatures", "0.5"], "vLLM's log-probabilities are at temperature 1 alone"),
    ],
)
def test_the_vllm_engine_says_what_it_needs(
    tiny_run: Path,
    rows_file: Path,
    tmp_path: Path,
    arguments: list[str],
    message: str,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    output = tmp_path / "p.parquet"
    command = ["profile", str(tiny_run), "--data", str(rows_file), "--output", str(output)]
    assert message in refused([*command, "--engine", "vllm", *arguments], capsys)
    assert not output.exists()


@pytest.mark.parametrize("name", ["a/b", "../c", " test", ""])
def test_a_part_s_name_is_no_path(name: str, tmp_path: Path, capsys: Capture) -> None:
    shares = f"train=0.5,{name}=0.5"
    output = tmp_path / "parts"
    message = refused(
        ["data", "split", "data/test.jsonl", "--shares", shares, "--output-dir", str(output)],
        capsys,
    )
    assert "--shares" in message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments",
    [["--bias", "safty=1"], ["--policy", "gone.json"], ["--seed", "-1"], ["--temperature", "inf"]],
)
def test_options_are_checked_before_weights_are_loaded(
    arguments: list[str], tiny_run: Path, tmp_path: Path, capsys: Capture
) -> None:
    # A checkpoint that says what it is, and has no weights.
    folder = tmp_path / "run"
    shutil.copytree(tiny_run, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    message = refused(["generate", str(folder), "Hi", *arguments], capsys)
    assert arguments[1].partition("=")[0] in message


def test_every_option_has_a_help_text() -> None:
    def silent(parser: argparse.ArgumentParser) -> list[str]:
        found = []
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                found += [fault for stage in action.choices.values() for fault in silent(stage)]
            elif not action.help:
                found.append(f"{parser.prog} {action.option_strings or action.dest}")
        return found

    assert not silent(_parser())
