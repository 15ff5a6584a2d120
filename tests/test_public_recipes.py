"""The recipes on public sets, through the command: stand-ins for the Hub, and for local copies."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml
from conftest import HEADERS, ROOT
from stand_ins import (
    COCONOT_CONTRAST,
    COCONOT_ORIGINAL,
    COCONOT_PREF,
    RECORDS,
    ULTRACHAT,
    write_hub_set,
)

from refusal_tokens.allocator import VARIABLES
from refusal_tokens.cli import main
from refusal_tokens.preparation import prepare
from refusal_tokens.recipe import load_recipe

Capture = pytest.CaptureFixture[str]
RECIPES = [ROOT / "recipes" / f"llama3-8b-coconot{form}.yaml" for form in ("", "-single")]


@pytest.fixture
def local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_base: Any) -> Path:
    """A working folder in which ``owner/name`` folders stand for the Hub's models and sets."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    for name in ("Meta-Llama-3-8B", "Meta-Llama-3-8B-Instruct"):
        shutil.copytree(tiny_base(False), tmp_path / "meta-llama" / name)
    (tmp_path / "meta-llama" / "Meta-Llama-3-8B" / "chat_template.jinja").unlink()
    instruct = tmp_path / "meta-llama" / "Meta-Llama-3-8B-Instruct"
    (instruct / "chat_template.jinja").write_text(HEADERS)
    write_hub_set(
        tmp_path / "allenai" / "coconot",
        {
            "original": {"train": COCONOT_ORIGINAL, "test": COCONOT_ORIGINAL},
            "contrast": {"test": COCONOT_CONTRAST},
            "pref": {"train": COCONOT_PREF},
        },
    )
    write_hub_set(
        tmp_path / "HuggingFaceH4" / "ultrachat_200k",
        {"default": {"train_sft": ULTRACHAT, "test_sft": ULTRACHAT[:1]}},
    )
    return tmp_path


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_runs_dry_as_it_is_shipped(recipe: Path, local: Path, capsys: Capture) -> None:
    assert main(["train", str(recipe), "--dry-run"]) == 0
    output = capsys.readouterr().out
    assert "mix      ultrachat: 12 of 12 rows\n" in output
    assert "mix      coconot_original: 5 of 5 rows\n" in output
    assert "mix      coconot_pref: 1 of 1 rows\n" in output
    assert "rows     18 (0 without reply" in output


def test_the_recipe_trains_what_it_says(local: Path) -> None:
    prepared = prepare(load_recipe(RECIPES[0]))
    labels = [(row.label, row.category) for row in prepared.rows["train"]]
    refusals = ["safety", "incomplete", "indeterminate", "humanizing", "unsupported"]
    assert labels[:12] == [("respond", None)] * 12
    assert labels[12:] == [*(("refuse", c) for c in refusals), ("respond", "safety")]
    controls = [e.input_ids[e.prompt_length] for e in prepared.examples.examples]
    assert controls == [prepared.control_ids[i] for i in [0] * 12 + [1, 2, 3, 4, 5] + [0]]
    assert [row.label for row in prepared.rows["test"]] == ["refuse"] * 5 + ["respond"] * 2


def test_the_single_form_trains_one_refusal_token(local: Path) -> None:
    prepared = prepare(load_recipe(RECIPES[1]))
    controls = [e.input_ids[e.prompt_length] for e in prepared.examples.examples]
    assert controls == [prepared.control_ids[i] for i in [0] * 12 + [1] * 5 + [0]]


def with_local_files(recipe: Path, folder: Path) -> list[str]:
    """``--set`` values that put local files in the place of a recipe's Hub sets."""
    section = yaml.safe_load(recipe.read_text())["refusal_tokens"]
    settings = []
    for split in ("train", "test"):
        entries = section[split]
        for entry in entries:
            path = folder / f"{entry['map']}.jsonl"
            records = ULTRACHAT if entry["map"] == "ultrachat" else RECORDS[entry["map"]]
            path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
            entry["path"] = str(path)
        settings.append(f"refusal_tokens.{split}={json.dumps(entries)}")
    return settings


@pytest.mark.parametrize(
    ("extra", "mix"),
    [
        ([], [12, 5, 1]),
        (["refusal_tokens.contrast_share=0.5"], [12, 1, 1]),
    ],
)
def test_local_files_of_the_same_columns_work_with_the_same_maps(
    extra: list[str],
    mix: list[int],
    tiny_base: Callable[[bool], Path],
    tmp_path: Path,
    capsys: Capture,
) -> None:
    (tmp_path / "t.jinja").write_text(HEADERS)
    settings = [
        f"model_name_or_path={tiny_base(False)}",
        f"chat_template_path={tmp_path / 't.jinja'}",
        *with_local_files(RECIPES[0], tmp_path),
        *extra,
    ]
    sets = [argument for setting in settings for argument in ("--set", setting)]
    assert main(["train", str(RECIPES[0]), "--dry-run", *sets]) == 0
    output = capsys.readouterr().out
    assert f"rows     {sum(mix)} " in output
    for name, count in zip(("ultrachat", "coconot_original", "coconot_pref"), mix, strict=True):
        assert f"mix      {name}: {count} of " in output


@pytest.mark.parametrize(
    ("train", "said"),
    [
        ([{"path": "u.jsonl", "map": "ultrachat", "count": 99}], "asks for 99 rows; found 12"),
        (
            [{"path": "u.jsonl", "map": "ultrachat", "share": 0.9}, "r.jsonl"],
            "share 0.9 of a mix of 20 rows asks for 18 rows; found 12",
        ),
        ([{"path": "u.jsonl", "map": "coconot_pref"}], "map coconot_pref: no column 'id' to read"),
        ([{"path": "u.jsonl", "map": "ultrachat", "share": 0.9}], "they sum to 0.9; allowed: 1"),
        (["empty.jsonl"], "empty.jsonl: no rows in it"),
    ],
)
def test_faults_stop_the_command_with_status_2_before_any_run_folder(
    train: list[Any],
    said: str,
    tiny_base: Callable[[bool], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    monkeypatch.chdir(tmp_path)
    # The restart for the allocator replaces this process; here it is set to have happened.
    for name, value in VARIABLES.items():
        monkeypatch.setenv(name, value)
    Path("u.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in ULTRACHAT))
    rows = [{"id": f"{i}", "prompt": "Hi", "label": "respond"} for i in range(2)]
    Path("r.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    Path("empty.jsonl").touch()
    settings = [
        f"model_name_or_path={tiny_base(True)}",
        f"refusal_tokens.train={json.dumps(train)}",
    ]
    sets = [argument for setting in settings for argument in ("--set", setting)]
    recipe = str(ROOT / "recipes" / "tiny.yaml")
    assert main(["train", recipe, "--output-dir", "run", *sets]) == 2
    assert said in capsys.readouterr().err
    assert not Path("run").exists()


def test_data_commands_take_a_map(tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text("".join(f"{json.dumps(record)}\n" for record in RECORDS["xstest"]))
    assert main(["data", "check", str(path), "--map", "xstest", "--json"]) == 0
    counts = json.loads(capsys.readouterr().out)["counts"]
    assert counts == {"x": {"respond/safety": 1, "refuse/safety": 1}}
    path.write_text("".join(json.dumps({"q": f"What is {i}?"}) + "\n" for i in range(40)))
    inline = "{prompt: q, label: {value: respond}}"
    arguments = ["data", "split", str(path), "--map", inline, "--output-dir", str(tmp_path / "s")]
    assert main(arguments) == 0
    lines = [(tmp_path / "s" / f"{name}.jsonl").read_text() for name in ("train", "test")]
    assert '"id": "x-0000' in lines[0]
    assert '"label": "respond"' in lines[1]
