"""Recipes: every fault at once, each with its key, what was found and what is allowed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT

from refusal_tokens.errors import InputError
from refusal_tokens.recipe import load_recipe, recipe_from_dict

MINIMAL: dict[str, Any] = {
    "model_name_or_path": "some/model",
    "refusal_tokens": {"train": "data/train.jsonl"},
}


def fault(changes: dict[str, Any]) -> str:
    with pytest.raises(InputError) as caught:
        recipe_from_dict({**MINIMAL, **changes}, "test", "recipe.yaml")
    return str(caught.value)


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_shipped_recipe_is_valid(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.options.train
    again = recipe_from_dict(recipe.to_dict(), recipe.name, "again")
    assert again == recipe


def test_the_coconot_recipes_differ_in_the_form_of_the_token_alone() -> None:
    one, many = (
        load_recipe(ROOT / "recipes" / f"llama3-8b-coconot{s}.yaml") for s in ("-single", "")
    )
    assert one.taxonomy.tokens == ("<|respond|>", "<|refuse|>")
    assert len(many.taxonomy.tokens) == 6
    forms = [recipe.to_dict() for recipe in (one, many)]
    assert [form["refusal_tokens"].pop("single_token") for form in forms] == [True, False]
    assert forms[0] == forms[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rat": 1}, "learning_rat: unknown key (did you mean 'learning_rate'?)"),
        ({"learning_rate": "fast"}, "learning_rate: found 'fast'; allowed: a number"),
        ({"learning_rate": -1}, "learning_rate: found -1; allowed: 1e-12 to 10"),
        ({"num_train_epochs": 0}, "num_train_epochs: found 0"),
        ({"max_length": 2}, "max_length: found 2; allowed: 8 to 1e+07"),
        ({"seed": True}, "seed: found True; allowed: a whole number"),
        ({"packing": True}, "packing: cannot be set (examples are not packed"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor: cannot be set"),
        ({"eval_strategy": "steps"}, "eval_strategy: cannot be set (calibration and test rows"),
        ({"hub_token": "hf_x"}, "hub_token: cannot be set (the recipe is kept in the run"),
        ({"model_init_kwargs": {"token": "hf_x"}}, "model_init_kwargs.token: cannot be set"),
        ({"lr_scheduler_type": "sine"}, "sine"),
        ({"peft_config": 3}, "peft_config: found int; allowed: a section"),
        ({"peft_config": {"rank": 8}}, "peft_config.rank: unknown key"),
        ({"peft_config": {"r": 0}}, "peft_config.r: found 0; allowed: 1 to 65536"),
        ({"peft_config": {"lora_dropout": 1.0}}, "peft_config.lora_dropout: found 1.0"),
        (
            {"quantization_config": {"load_in_4bits": True}, "peft_config": {"r": 4}},
            "did you mean 'load_in_4bit'?",
        ),
        ({"quantization_config": {"load_in_4bit": True}}, "needs peft_config"),
        ({"refusal_tokens": None}, "refusal_tokens: the section is missing"),
        ({"refusal_tokens": {}}, "refusal_tokens.train: missing"),
        ({"refusal_tokens": {"train": 3}}, "refusal_tokens.train: found 3"),
        (
            {"refusal_tokens": {"train": ["x", {"path": "y", "map": "xtest"}]}},
            "refusal_tokens.train, entry 2: unknown map 'xtest' (did you mean 'xstest'?)",
        ),
        (
            {"refusal_tokens": {"train": {"path": "y", "map": {"label": {"value": "no"}}}}},
            "refusal_tokens.train, y: map: label: unknown label 'no'",
        ),
        (
            {"refusal_tokens": {"train": [{"path": "x", "share": 0.6}, {"path": "y", "share": 1}]}},
            "refusal_tokens.train: the shares sum to 1.6; allowed: at most 1",
        ),
        (
            {"refusal_tokens": {"train": "x", "contrast_share": 1}},
            "refusal_tokens.contrast_share: found 1; allowed: 0 to below 1",
        ),
        ({"refusal_tokens": {"train": "x", "columns": {}}}, "unknown key 'columns'"),
        ({"refusal_tokens": {"train": "x", "tests": "y"}}, "unknown key 'tests' (did you mean"),
        (
            {"refusal_tokens": {"train": "x", "control_share": 0}},
            "control_share: found 0; allowed: above 0, to 1",
        ),
        ({"refusal_tokens": {"train": "x", "control_share": 1.5}}, "control_share: found 1.5"),
        ({"refusal_tokens": {"train": "x", "save_dtype": "int8"}}, "unknown dtype 'int8'"),
        ({"refusal_tokens": {"train": "x", "single_token": "yes"}}, "single_token: found 'yes'"),
        ({"refusal_tokens": {"train": "x", "taxonomy": "no.yaml"}}, "no.yaml: no such file"),
        (
            {"refusal_tokens": {"train": "x", "taxonomy": {"categories": [{"id": "Bad Id"}]}}},
            "category 1 needs both id and description",
        ),
        ({"model_name_or_path": 7}, "model_name_or_path: found 7"),
        ({"max_steps": -5}, "max_steps: found -5; allowed: -1 to 1e+09"),
        ({"output_dir": "elsewhere"}, "output_dir: cannot be set (use --output-dir)"),
        ({"report_to": "tensorbord"}, "unknown name 'tensorbord' (did you mean 'tensorboard'?)"),
        ({"report_to": ["none", "wandbb"]}, "report_to: unknown name 'wandbb'"),
    ],
)
def test_each_fault_is_named(changes: dict[str, Any], message: str) -> None:
    assert message in fault(changes)


def test_all_faults_come_at_once() -> None:
    text = fault({"learning_rat": 1, "seed": "x", "peft_config": {"rank": 8}})
    assert "3 faults in recipe.yaml" in text
    assert all(key in text for key in ("learning_rat", "seed", "peft_config.rank"))


def test_yaml_1_1_exponents_are_numbers() -> None:
    recipe = recipe_from_dict({**MINIMAL, "learning_rate": "1e-4"}, "test", "recipe.yaml")
    assert recipe.sft["learning_rate"] == 1e-4


def test_an_unquoted_no_is_the_word_where_a_word_is_wanted() -> None:
    recipe = recipe_from_dict({**MINIMAL, "save_strategy": False, "bf16": False}, "test", "r.yaml")
    assert recipe.sft["save_strategy"] == "no"
    assert recipe.sft["bf16"] is False
    with pytest.raises(InputError, match="save_strategy: found True"):
        recipe_from_dict({**MINIMAL, "save_strategy": True}, "test", "r.yaml")


def test_set_reaches_into_sections_and_parses_yaml(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    changes = ["peft_config.r=8", "refusal_tokens.control_share=0.7", "bf16=false", "seed=3"]
    recipe = load_recipe(path, changes)
    assert recipe.peft_config == {"r": 8}
    assert recipe.options.control_share == 0.7
    assert recipe.sft == {"bf16": False, "seed": 3}


@pytest.mark.parametrize("change", ["", "seed", "=3", "seed.x=3"])
def test_a_malformed_set_is_an_input_error(tmp_path: Path, change: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump({**MINIMAL, "seed": 1}))
    with pytest.raises(InputError, match="--set"):
        load_recipe(path, [change])


def test_broken_yaml_names_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("a: 1\nb: [1,\n")
    with pytest.raises(InputError, match=r"r\.yaml, line 3: not YAML"):
        load_recipe(path)
    path.write_text("seed: 1\nseed: 2\n")
    with pytest.raises(InputError, match="line 2: key 'seed' twice"):
        load_recipe(path)


def test_any_sft_argument_of_trl_may_be_set() -> None:
    sft = {"adam_beta2": 0.99, "neftune_noise_alpha": 5.0, "optim": "sgd", "report_to": ["none"]}
    assert recipe_from_dict({**MINIMAL, **sft}, "test", "recipe.yaml").sft == sft
