"""What architectures do after their output matrix: every lean path gives the model's own logits."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import ROOT, tiny_settings
from torch import Tensor

from refusal_tokens.checkpoint import Checkpoint, CheckpointInfo
from refusal_tokens.errors import InputError
from refusal_tokens.examples import IGNORED
from refusal_tokens.head import LogitTransform, logit_transform
from refusal_tokens.likelihood import Answer, likelihoods
from refusal_tokens.partial import Partial
from refusal_tokens.prefill import last_logits
from refusal_tokens.preparation import prepare
from refusal_tokens.recipe import load_recipe
from refusal_tokens.taxonomy import default_taxonomy
from refusal_tokens.tokens import lift_rows
from refusal_tokens.trainer import RefusalTrainer, add_labelled_head, causal_lm
from refusal_tokens.training import build_trainer, check_head

CONTROL_IDS = (33, 31, 38, 30, 35, 36)
# The first ten are the same: enough for their keys and values to be lent.
PROMPTS = [[*range(10, 20), 3], [*range(10, 20), 7, 4, 9, 25]]
SMALL = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MAMBA = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8}
# What sets each apart, and the transform that follows from it.
ARCHITECTURES: dict[str, tuple[dict[str, Any], LogitTransform]] = {
    "Granite": ({"logits_scaling": 4.0}, LogitTransform(0.25)),
    # Of Granite's name, and multiplied by.
    "HyperCLOVAX": ({"logits_scaling": 0.5}, LogitTransform(0.5)),
    "Cohere": ({"logit_scale": 0.5}, LogitTransform(0.5)),
    "FalconH1": ({"lm_head_multiplier": 0.5, **MAMBA}, LogitTransform(0.5)),
    "Gemma2": ({"final_logit_softcapping": 5.0, "head_dim": 8}, LogitTransform(1.0, 5.0)),
    # Neither, but a head with a bias.
    "Phi": ({}, LogitTransform()),
}


@pytest.fixture(scope="module", params=list(ARCHITECTURES))
def architecture(request: pytest.FixtureRequest) -> tuple[Any, LogitTransform]:
    """A tiny random model, and its transform."""
    settings, transform = ARCHITECTURES[request.param]
    config = getattr(transformers, f"{request.param}Config")(**SMALL, **settings)
    torch.manual_seed(0)
    model = getattr(transformers, f"{request.param}ForCausalLM")(config).eval()
    head = model.get_output_embeddings()
    assert (head.bias is not None) == (request.param == "Phi")
    if head.bias is not None:
        torch.nn.init.normal_(head.bias)
    return model, transform


@torch.no_grad()
def own_logits(model: Any, ids: list[int]) -> Tensor:
    """(tokens, vocabulary), from one plain forward of one sequence."""
    logits: Tensor = model(torch.tensor([ids])).logits[0]
    return logits.float()


def checkpoint_of(model: Any) -> Checkpoint:
    info = CheckpointInfo(
        taxonomy=default_taxonomy(),
        control_token_ids=CONTROL_IDS,
        generation_prompt_ids=(19,),
        system_prompt=None,
        chat_template_kwargs={},
        base_model="tiny",
        recipe={},
        data={},
        versions={},
    )
    # Token ids go in: no tokenizer is asked.
    return Checkpoint(Path(), info, model, None)


def test_scores_at_the_decision_are_the_models_own(
    architecture: tuple[Any, LogitTransform],
) -> None:
    model, transform = architecture
    assert logit_transform(model) == transform
    found = last_logits(checkpoint_of(model), PROMPTS)
    wanted = torch.stack([own_logits(model, prompt)[-1] for prompt in PROMPTS])
    # Wide enough for a lost scale or cap to show.
    assert wanted.std() > 0.1
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def test_likelihoods_are_the_models_own(architecture: tuple[Any, LogitTransform]) -> None:
    model, _ = architecture
    answers = {str(i): Answer(tuple(prompt), 9) for i, prompt in enumerate(PROMPTS)}
    found = likelihoods(model, answers, Partial(None, "x"), "answers")
    for i, prompt in enumerate(PROMPTS):
        shares = own_logits(model, prompt).log_softmax(dim=-1)
        wanted = -sum(float(shares[at - 1, prompt[at]]) for at in range(9, len(prompt)))
        assert found[str(i)].nll == pytest.approx(wanted, abs=1e-3)


def test_the_training_loss_is_the_models_own(architecture: tuple[Any, LogitTransform]) -> None:
    model, _ = architecture
    ids = PROMPTS[1]
    wanted = own_logits(model, ids).log_softmax(dim=-1)
    original = model.forward
    try:
        add_labelled_head(model)
        labels = torch.tensor([[IGNORED] * 9 + ids[9:]])
        weights = torch.ones(len(ids) - 9)
        batch = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids))}
        found = model(**batch, labels=labels, label_weights=weights)
    finally:
        model.forward = original
    of_targets = torch.stack([wanted[at - 1, ids[at]] for at in range(9, len(ids))])
    torch.testing.assert_close(found.log_probs, of_targets, atol=1e-4, rtol=1e-4)
    assert float(found.loss.detach()) == pytest.approx(-float(of_targets.sum()), abs=1e-3)


def test_lifted_rows_hold_the_mass_behind_a_scale_a_cap_or_a_bias(
    architecture: tuple[Any, LogitTransform],
) -> None:
    model, _ = architecture
    head = model.get_output_embeddings()
    before = head.weight.detach().clone()

    def mass() -> float:
        last = torch.stack([own_logits(model, prompt)[-1] for prompt in PROMPTS])
        return float(last.softmax(dim=-1)[:, list(CONTROL_IDS)].sum(dim=-1).mean())

    assert mass() < 0.6
    try:
        lift_rows(model, CONTROL_IDS, PROMPTS)
        assert 0.75 < mass() < 0.98
    finally:
        with torch.no_grad():
            head.weight.copy_(before)


def test_a_transform_s_inverse_undoes_it_below_the_cap() -> None:
    logits = torch.linspace(-4, 4, 9)
    for transform in (LogitTransform(0.25), LogitTransform(2.0, 30.0), LogitTransform()):
        torch.testing.assert_close(transform.inverse(transform(logits)), logits)
    # No number gives a logit at the cap: what comes near it is as good.
    assert LogitTransform(1.0, 3.0).inverse(torch.tensor(5.0)).isfinite()


def built(base: Path, rows: Path, folder: Path) -> tuple[RefusalTrainer, list[Any]]:
    """The trainer of the tiny recipe, and two of its examples."""
    prepared = prepare(load_recipe(ROOT / "recipes" / "tiny.yaml", tiny_settings(base, rows)))
    return build_trainer(prepared, folder), prepared.examples.examples[:2]


def test_a_model_whose_logits_are_no_numbers_is_named(
    tiny_base: Callable[[bool], Path], rows_file: Path, tmp_path: Path
) -> None:
    trainer, examples = built(tiny_base(True), rows_file, tmp_path / "run")
    check_head(trainer, examples)
    model = causal_lm(trainer.model)
    model.model.norm.weight.data[0] = float("nan")
    with pytest.raises(
        InputError, match=f"{re.escape(str(tiny_base(True)))}.*logits are not numbers"
    ):
        check_head(trainer, examples)


def test_a_model_that_scores_otherwise_than_its_config_says_is_not_trained(
    tiny_base: Callable[[bool], Path], rows_file: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    base.mkdir()
    for file in tiny_base(True).iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    # A key of Granite's, which Llama's forward pays no heed to.
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "logits_scaling": 0.1}))
    with pytest.raises(AssertionError, match=r"the log-probabilities are off by \d+\.\d\d nats"):
        built(base, rows_file, tmp_path / "run")
