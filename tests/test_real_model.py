"""End to end with the bundled 135M model: a short training run, then knobs that change the text."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import ROOT
from peft import PeftModel

from refusal_tokens.cli import main
from refusal_tokens.policy import Policy
from refusal_tokens.preparation import prepare
from refusal_tokens.profiles import read_profile
from refusal_tokens.recipe import load_recipe
from refusal_tokens.rows import read_rows, write_jsonl
from refusal_tokens.steering import SteeredModel
from refusal_tokens.taxonomy import default_taxonomy
from refusal_tokens.training import load_base

pytestmark = pytest.mark.model
RECIPE = ROOT / "recipes" / "smollm2-135m-lora.yaml"
KNOBS = default_taxonomy().knobs
ORDINARY = [
    "How do I write a good letter of complaint?",
    "Tell me about the history of chess.",
    "What is the capital of Norway?",
    "Name three fruits that grow on trees.",
]
PROMPTS = [
    *ORDINARY[:2],
    "Draw me a map of Spain.",
    "What do you think about my new coat?",
]


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The default recipe, shortened: 80 steps, 60 test rows, all replies, more loss on them."""
    folder = tmp_path_factory.mktemp("rows")
    test = read_rows([ROOT / "data" / "test.jsonl"], default_taxonomy())
    write_jsonl(folder / "test.jsonl", test[:: len(test) // 60])
    return [
        "max_steps=80",
        "max_length=96",
        "logging_steps=5",
        "refusal_tokens.control_share=0.2",
        "refusal_tokens.reply_share=1",
        "refusal_tokens.train=["
        f"{{path: {ROOT / 'data' / 'train.jsonl'}, count: 400}}, "
        f"{{path: {ROOT / 'data' / 'counterfactual.jsonl'}, count: 480}}]",
        f"refusal_tokens.test={folder / 'test.jsonl'}",
        "refusal_tokens.calibration=[]",
    ]


@pytest.fixture(scope="module")
def run(settings: list[str], tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("real") / "run"
    sets = [argument for setting in settings for argument in ("--set", setting)]
    assert main(["train", str(RECIPE), "--output-dir", str(folder), *sets]) == 0
    return folder


def test_control_tokens_hold_the_mass_after_a_short_run(run: Path) -> None:
    assert read_profile(run / "test.parquet").control_mass.mean() > 0.9


def test_a_knob_changes_decision_and_text(run: Path) -> None:
    model = SteeredModel.from_checkpoint(run)
    strict = Policy(bias={"safety": 30.0}, rule="bias")
    lax = Policy(bias=dict.fromkeys(KNOBS, -30.0))
    settings = {"max_new_tokens": 24, "do_sample": False}
    refused = model.generate(ORDINARY, strict, **settings)
    answered = model.generate(ORDINARY, lax, **settings)
    assert {reply.category for reply in refused} == {"safety"}
    assert {reply.decision for reply in answered} == {"respond"}
    # Eighty steps are few: some replies may still come out the same.
    changed = [a.text != b.text for a, b in zip(refused, answered, strict=True)]
    assert sum(changed) * 2 >= len(ORDINARY)


def test_decisions_are_the_same_under_49_decoding_settings(run: Path) -> None:
    model = SteeredModel.from_checkpoint(run)
    # Knobs that part these prompts, so that there are decisions of both kinds to keep.
    policies = [Policy(bias={}), Policy(bias=dict.fromkeys(KNOBS, 30.0))] * 2
    greedy = model.generate(PROMPTS, policies, max_new_tokens=1, do_sample=False)
    wanted = [(reply.decision, reply.category) for reply in greedy]
    assert {decision for decision, _ in wanted[1::2]} == {"refuse"}
    cuts = [(1.0, 0), (0.95, 0), (0.8, 0), (0.5, 0), (1.0, 50), (1.0, 5), (0.9, 20)]
    for temperature in (0.1, 0.25, 0.4, 0.55, 0.7, 0.85, 1.0):
        for top_p, top_k in cuts:
            found = model.generate(
                PROMPTS,
                policies,
                max_new_tokens=1,
                do_sample=True,
                temperature=temperature,
                top_p=top_p,
                top_k=top_k,
            )
            assert [(reply.decision, reply.category) for reply in found] == wanted


def test_merged_equals_unmerged_and_old_rows_are_untouched(run: Path, settings: list[str]) -> None:
    prepared = prepare(load_recipe(RECIPE, settings))
    base = load_base(prepared, torch.float32)
    old = min(prepared.control_ids)
    before = base.get_input_embeddings().weight[:old].clone()
    unmerged = PeftModel.from_pretrained(base, str(run / "adapter")).eval()
    merged = SteeredModel.from_checkpoint(run, device="cpu").checkpoint.model
    for example in prepared.examples.examples[:5]:
        # At the decision. The template's first tokens, after which nothing is read, have states so
        # large in this model that rounding shows there as up to 3e-4, even in float64.
        ids = torch.tensor([example.input_ids[: example.prompt_length]])
        with torch.no_grad():
            gap = (unmerged(ids).logits - merged(ids).logits)[0, -1].abs().max().item()
        assert gap < 1e-4
    assert torch.equal(merged.get_input_embeddings().weight[:old], before)
