"""Training through the command a user types, on a tiny model: every recipe, resume, refusals."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ROOT, tiny_settings
from transformers import AutoModelForCausalLM, AutoTokenizer

from refusal_tokens.checkpoint import fingerprint, load_info
from refusal_tokens.cli import main
from refusal_tokens.preparation import claim_run, prepare
from refusal_tokens.profiles import read_profile
from refusal_tokens.progress import LogFile
from refusal_tokens.recipe import load_recipe

Capture = pytest.CaptureFixture[str]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
# What makes a recipe of any size run in seconds here.
SHORTENED = [
    "max_steps=2",
    "per_device_train_batch_size=2",
    "gradient_accumulation_steps=2",
    "save_steps=1",
    "logging_steps=1",
    "chat_template_path=null",
    "optim=adamw_torch",
]


def run(recipe: str | Path, folder: Path, settings: list[str], *flags: str) -> int:
    sets = [argument for setting in settings for argument in ("--set", setting)]
    return main(["train", str(recipe), "--output-dir", str(folder), *sets, *flags])


def test_all_recipes_are_found() -> None:
    assert len(RECIPES) == 8


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_trains_a_tiny_model(
    recipe: Path, tiny_run: Path, tiny_base: Callable[[bool], Path], rows_file: Path, tmp_path: Path
) -> None:
    settings = [*tiny_settings(tiny_base(False), rows_file), *SHORTENED]
    assert run(recipe, tmp_path / "run", settings) == 0
    if recipe.stem == "baseline-no-token":
        # A plain folder: it says where it came from, and has no profile.
        training = json.loads((tmp_path / "run" / "model" / "training.json").read_text())
        assert training["training"]["steps"] == 2
        # Two refuse rows beside the four respond rows with a reply: a third.
        assert training["training"]["rows"] == 6
        return
    info = load_info(tmp_path / "run")
    assert info.training["steps"] == 2
    assert len(read_profile(tmp_path / "run" / "test.parquet")) == 12


def test_a_run_folder_holds_what_it_should(tiny_run: Path) -> None:
    names = {path.name for path in tiny_run.iterdir()}
    assert {"model", "adapter", "train.jsonl", "run.json"} <= names
    assert {"calibration.parquet", "test.parquet"} <= names
    model = {path.name for path in (tiny_run / "model").iterdir()}
    assert {"model.safetensors", "tokenizer.json", "refusal_tokens.json", "README.md"} <= model
    assert not [name for name in model if name.endswith((".bin", ".pkl", ".pt"))]


def test_every_logged_step_carries_both_losses(tiny_run: Path) -> None:
    entries = [json.loads(line) for line in (tiny_run / "train.jsonl").read_text().splitlines()]
    steps = [entry for entry in entries if "control_nll" in entry]
    assert [entry["step"] for entry in steps] == [1, 2, 3, 4, 5]


def test_plain_transformers_loads_the_checkpoint(tiny_run: Path) -> None:
    folder = tiny_run / "model"
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    info = load_info(tiny_run)
    assert model.dtype == torch.float32
    assert tokenizer.convert_tokens_to_ids(list(info.taxonomy.tokens)) == list(
        info.control_token_ids
    )
    assert fingerprint(folder) == info.model_fingerprint
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end in model.generation_config.eos_token_id


def test_the_card_holds_the_measured_rates(tiny_run: Path) -> None:
    card = (tiny_run / "model" / "README.md").read_text("utf-8")
    assert "Not measured" not in card
    assert "n=12" in card


def test_old_rows_are_bitwise_unchanged(tiny_run: Path, tiny_base: Callable[[bool], Path]) -> None:
    before = AutoModelForCausalLM.from_pretrained(tiny_base(True)).get_input_embeddings().weight
    after = AutoModelForCausalLM.from_pretrained(tiny_run / "model").get_input_embeddings().weight
    assert torch.equal(after[: len(before)], before)
    assert len(after) == len(before) + 6


def test_another_run_s_folder_is_left_alone(
    tiny_run: Path,
    tiny_base: Callable[[bool], Path],
    rows_file: Path,
    capsys: Capture,
) -> None:
    before = fingerprint(tiny_run / "model")
    settings = tiny_settings(tiny_base(True), rows_file)
    for flags in ([], ["--dry-run"]):
        assert run(ROOT / "recipes" / "tiny.yaml", tiny_run, settings, *flags) == 2
        assert "holds a run already" in capsys.readouterr().err
    assert run(ROOT / "recipes" / "tiny.yaml", tiny_run, settings, "--resume", "--overwrite") == 2
    assert "give one" in capsys.readouterr().err
    other = [*settings, "learning_rate=0.5"]
    assert run(ROOT / "recipes" / "tiny.yaml", tiny_run, other, "--resume") == 2
    assert "another recipe" in capsys.readouterr().err
    assert fingerprint(tiny_run / "model") == before


def test_a_run_is_not_resumed_with_a_changed_row(
    tiny_base: Callable[[bool], Path], rows_file: Path, tmp_path: Path, capsys: Capture
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(rows_file.read_bytes())
    settings = [*tiny_settings(tiny_base(True), path), "max_steps=1", "save_steps=1"]
    settings += ["refusal_tokens.calibration=[]", "refusal_tokens.test=[]"]
    recipe, folder = ROOT / "recipes" / "tiny.yaml", tmp_path / "run"
    assert run(recipe, folder, settings) == 0
    path.write_text(path.read_text().replace("France did.", "Brazil did."))
    assert run(recipe, folder, settings, "--resume") == 2
    assert "other rows" in capsys.readouterr().err


def test_a_run_that_saved_no_step_starts_from_the_first(
    tiny_base: Callable[[bool], Path], rows_file: Path, tmp_path: Path, capsys: Capture
) -> None:
    settings = [*tiny_settings(tiny_base(True), rows_file), "max_steps=1", "save_steps=1"]
    settings += ["refusal_tokens.calibration=[]", "refusal_tokens.test=[]"]
    recipe, folder = ROOT / "recipes" / "tiny.yaml", tmp_path / "run"
    assert run(recipe, folder, settings, "--resume") == 2
    assert "no run to resume" in capsys.readouterr().err
    (folder / "trainer").mkdir(parents=True)
    claim_run(folder, prepare(load_recipe(recipe, settings)), overwrite=False)
    assert run(recipe, folder, settings, "--resume") == 0
    assert "No step was saved" in capsys.readouterr().out
    assert load_info(folder).training["steps"] == 1


def test_overwrite_leaves_nothing_of_the_old_run(
    tiny_base: Callable[[bool], Path], rows_file: Path, tmp_path: Path
) -> None:
    settings = [*tiny_settings(tiny_base(True), rows_file), "max_steps=2", "save_steps=2"]
    settings += ["refusal_tokens.calibration=[]"]
    recipe, folder = ROOT / "recipes" / "tiny.yaml", tmp_path / "run"
    assert run(recipe, folder, settings) == 0
    settings += ["max_steps=1", "save_steps=1", "refusal_tokens.test=[]"]
    assert run(recipe, folder, settings, "--overwrite") == 0
    assert [path.name for path in (folder / "trainer").glob("checkpoint-*")] == ["checkpoint-1"]
    assert not (folder / "test.parquet").exists()
    steps = {json.loads(line)["step"] for line in (folder / "train.jsonl").read_text().splitlines()}
    assert steps == {1}
    assert load_info(folder).training["steps"] == 1


def test_a_folder_of_other_files_is_no_place_for_a_run(
    tiny_base: Callable[[bool], Path], rows_file: Path, tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    settings = tiny_settings(tiny_base(True), rows_file)
    assert run(ROOT / "recipes" / "tiny.yaml", tmp_path, settings) == 2
    assert "holds other files" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_overwrite_spares_a_folder_that_is_no_run(
    tiny_run: Path, tiny_base: Callable[[bool], Path], rows_file: Path, tmp_path: Path
) -> None:
    thesis = tmp_path / "thesis.txt"
    thesis.write_text("precious")
    settings = tiny_settings(tiny_base(True), rows_file)
    for place in (tmp_path, thesis):
        assert run(ROOT / "recipes" / "tiny.yaml", place, settings, "--overwrite") == 2
        assert thesis.read_text() == "precious"


def test_a_killed_run_resumes_to_the_same_weights(
    tiny_run: Path, tiny_base: Callable[[bool], Path], rows_file: Path, tmp_path: Path
) -> None:
    settings = [
        *tiny_settings(tiny_base(True), rows_file),
        *("max_steps=60", "save_steps=10", "refusal_tokens.calibration=[]", "bf16=false"),
    ]
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    assert run(ROOT / "recipes" / "tiny.yaml", straight, settings) == 0

    sets = [argument for setting in settings for argument in ("--set", setting)]
    command = [sys.executable, "-m", "refusal_tokens.cli", "train", "recipes/tiny.yaml"]
    command += ["--output-dir", str(broken), *sets]
    said = tmp_path / "said.txt"
    with said.open("w") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output)
    try:
        deadline = time.monotonic() + 120
        while not (broken / "trainer" / "checkpoint-20" / "trainer_state.json").exists():
            assert time.monotonic() < deadline
            assert process.poll() is None, said.read_text()
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (broken / "model").exists()
    # As if the kill had come while the next checkpoint was written.
    cut_off = broken / "trainer" / "checkpoint-55"
    cut_off.mkdir()
    (cut_off / "trainer_state.json").write_text('{"global_step":')

    assert run(ROOT / "recipes" / "tiny.yaml", broken, settings, "--resume") == 0
    assert not cut_off.exists()
    steps = [json.loads(line)["step"] for line in (broken / "train.jsonl").read_text().splitlines()]
    assert (min(steps), max(steps)) == (1, 60)
    # Only the summary at the end shares its step with another entry.
    assert steps == sorted(steps)
    assert len(set(steps)) >= len(steps) - 1
    a = AutoModelForCausalLM.from_pretrained(straight / "model").state_dict()
    b = AutoModelForCausalLM.from_pretrained(broken / "model").state_dict()
    gaps = {name: (a[name] - b[name]).abs().max().item() for name in a}
    assert max(gaps.values()) < 1e-5, max(gaps, key=lambda name: gaps[name])


def test_a_loss_that_is_no_number_stops_with_advice(
    tiny_run: Path,
    tiny_base: Callable[[bool], Path],
    rows_file: Path,
    tmp_path: Path,
    capsys: Capture,
) -> None:
    # Adam divides 0 by 0 where a gradient is 0, as LoRA's first matrix has it at the first step.
    settings = [*tiny_settings(tiny_base(True), rows_file), "adam_epsilon=0.0"]
    assert run(ROOT / "recipes" / "tiny.yaml", tmp_path / "run", settings) == 2
    assert "lower learning_rate" in capsys.readouterr().err
    assert not (tmp_path / "run" / "model").exists()


def test_damaged_weights_are_named_before_training(
    tiny_run: Path,
    tiny_base: Callable[[bool], Path],
    rows_file: Path,
    tmp_path: Path,
    capsys: Capture,
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_base(True))
    model.model.norm.weight.data[0] = float("nan")
    model.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(tiny_base(True)).save_pretrained(tmp_path / "base")
    settings = tiny_settings(tmp_path / "base", rows_file)
    assert run(ROOT / "recipes" / "tiny.yaml", tmp_path / "run", settings) == 2
    assert "logits are not numbers" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_dry_run_prints_and_leaves_nothing(
    tiny_base: Callable[[bool], Path],
    rows_file: Path,
    tmp_path: Path,
    capsys: Capture,
) -> None:
    settings = tiny_settings(tiny_base(True), rows_file)
    assert run(ROOT / "recipes" / "tiny.yaml", tmp_path / "run", settings, "--dry-run") == 0
    output = capsys.readouterr().out
    assert "rows     12 (3 without reply" in output
    assert "5 steps" in output
    assert not (tmp_path / "run").exists()


def test_prompts_that_are_both_trained_on_and_measured_are_counted(
    tiny_base: Callable[[bool], Path], rows_file: Path, tmp_path: Path, capsys: Capture
) -> None:
    path = tmp_path / "test.jsonl"
    fresh = {"id": "new", "prompt": "Is this new?", "label": "respond"}
    first = rows_file.read_text().splitlines()[0].replace('"r0"', '"again"')
    path.write_text(json.dumps(fresh) + "\n" + first + "\n")
    settings = [*tiny_settings(tiny_base(True), rows_file), f"refusal_tokens.test={path}"]
    settings += ["refusal_tokens.calibration=[]"]
    assert run(ROOT / "recipes" / "tiny.yaml", tmp_path / "run", settings, "--dry-run") == 0
    said = capsys.readouterr().err
    assert "warning: 1 of 2 test prompts are trained on" in said
    assert "row 'again'" in said
    assert "calibration prompts" not in said


def test_too_long_rows_are_dropped_and_named(
    tiny_base: Callable[[bool], Path],
    rows_file: Path,
    tmp_path: Path,
    capsys: Capture,
) -> None:
    prompt = "<|respond|> " + "word " * 400
    long = {"id": "long", "prompt": prompt, "label": "respond", "response": "Yes."}
    path = tmp_path / "rows.jsonl"
    path.write_text(rows_file.read_text() + json.dumps(long) + "\n")
    settings = tiny_settings(tiny_base(True), path)
    assert run(ROOT / "recipes" / "tiny.yaml", tmp_path / "run", settings, "--dry-run") == 0
    captured = capsys.readouterr()
    assert "row 'long' is dropped" in captured.err
    assert "warning: 3 prompts spell a control token" in captured.err
    assert "1 dropped" in captured.out


def test_a_resumed_log_drops_what_will_come_again(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text(
        "".join(json.dumps({"step": s, "loss": 1.0}) + "\n" for s in (10, 20, 30)) + '{"st'
    )
    log = LogFile(path, after=20)
    assert path.read_text().endswith('{"st')
    log.on_train_begin(None, None, None)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [10, 20]
    LogFile(path, after=0).on_train_begin(None, None, None)
    assert path.read_text() == ""


def test_several_processes_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run(ROOT / "recipes" / "tiny.yaml", tmp_path / "run", []) == 2
    assert "train runs in one process" in capsys.readouterr().err


def test_what_is_profiled_after_training_has_to_fit_the_model(
    tiny_base: Callable[[bool], Path], rows_file: Path, tmp_path: Path, capsys: Capture
) -> None:
    config = AutoModelForCausalLM.from_pretrained(tiny_base(True)).config
    long = {"id": "long", "prompt": "word " * config.max_position_embeddings, "label": "respond"}
    path = tmp_path / "test.jsonl"
    path.write_text(json.dumps(long | {"response": None}) + "\n")
    settings = [*tiny_settings(tiny_base(True), rows_file), f"refusal_tokens.test={path}"]
    assert run(ROOT / "recipes" / "tiny.yaml", tmp_path / "run", settings) == 2
    assert f"the model takes {config.max_position_embeddings}" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_misspelt_model_argument_is_named(
    tiny_base: Callable[[bool], Path], rows_file: Path, tmp_path: Path, capsys: Capture
) -> None:
    settings = [*tiny_settings(tiny_base(True), rows_file), "model_init_kwargs.atn_impl=eager"]
    assert run(ROOT / "recipes" / "tiny.yaml", tmp_path / "run", settings) == 2
    assert "model_init_kwargs: " in (said := capsys.readouterr().err)
    assert "'atn_impl'" in said
    assert not (tmp_path / "run").exists()
    # Nor is a run lost to it that was to be replaced.
    old = tmp_path / "old"
    old.mkdir()
    for name in ("run.json", "train.jsonl"):
        (old / name).write_text("{}")
    assert run(ROOT / "recipes" / "tiny.yaml", old, settings, "--overwrite") == 2
    assert sorted(path.name for path in old.iterdir()) == ["run.json", "train.jsonl"]
