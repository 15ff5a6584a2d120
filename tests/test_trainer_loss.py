"""The trainer's loss on a real batch, against the formula by the model's plain forward."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, tiny_settings
from torch import Tensor

from refusal_tokens.examples import IGNORED
from refusal_tokens.preparation import prepare
from refusal_tokens.recipe import load_recipe
from refusal_tokens.trainer import RefusalTrainer
from refusal_tokens.training import build_trainer

SHARE = 0.6
RESPOND_WEIGHT = 1.5


@pytest.fixture(scope="module")
def trainer(
    tiny_base: Callable[[bool], Path], rows_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> RefusalTrainer:
    settings = [
        *tiny_settings(tiny_base(True), rows_file),
        *("bf16=false", f"refusal_tokens.control_share={SHARE}"),
        f"refusal_tokens.respond_weight={RESPOND_WEIGHT}",
    ]
    recipe = load_recipe(ROOT / "recipes" / "tiny.yaml", settings)
    return build_trainer(prepare(recipe), tmp_path_factory.mktemp("loss") / "run")


@pytest.fixture(scope="module")
def batch(trainer: RefusalTrainer) -> dict[str, Any]:
    """Rows with replies of several lengths, and without."""
    dataset = trainer.train_dataset
    found = [{k: row[k] for k in ("input_ids", "labels")} for row in dataset]
    lengths = {sum(label != IGNORED for label in row["labels"]) for row in found}
    assert len(lengths) > 2
    assert 1 in lengths
    trained: dict[str, Any] = trainer.data_collator(found)
    return trained


@torch.no_grad()
def expected(trainer: RefusalTrainer, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Negative log-likelihoods of the control tokens and of the reply tokens of a batch."""
    model = trainer.model.eval()
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits.float()
    targets = batch["labels"][:, 1:]
    labelled = targets != IGNORED
    nll = -logits[:, :-1].log_softmax(-1)[labelled].gather(1, targets[labelled][:, None])[:, 0]
    is_control = torch.isin(targets[labelled], trainer._control_ids)
    return nll[is_control], nll[~is_control]


def test_the_loss_is_the_stated_share_a_row(trainer: RefusalTrainer, batch: dict[str, Any]) -> None:
    control, reply = expected(trainer, batch)
    rows = len(batch["labels"])
    # The batch is the whole data set, so its reply tokens a row are the data set's.
    per_row = len(reply) / rows
    assert len(control) == rows
    tokens = batch["labels"][torch.isin(batch["labels"], trainer._control_ids)]
    is_respond = tokens == trainer._control_ids[0]
    assert 0 < is_respond.sum() < rows
    decisions = control[~is_respond].sum() + RESPOND_WEIGHT * control[is_respond].sum()
    wanted = (SHARE * decisions + (1 - SHARE) / per_row * reply.sum()) / rows
    found = trainer.compute_loss(trainer.model.eval(), batch)
    assert found.item() == pytest.approx(wanted.item(), rel=1e-4)
    # The two parts are unlike, so that the shares cannot be swapped unseen.
    assert abs(control.mean() - reply.mean()) > 0.05


def test_every_micro_batch_of_a_step_has_its_part(
    trainer: RefusalTrainer, batch: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = trainer.model.eval()
    alone = trainer.compute_loss(model, batch)
    monkeypatch.setattr(trainer, "current_gradient_accumulation_steps", 4, raising=False)
    # The Trainer hands the count over where it leaves the division to the loss.
    whole = trainer.compute_loss(model, batch, num_items_in_batch=torch.tensor(9))
    assert whole.item() == pytest.approx(alone.item() / 4, rel=1e-5)
    assert trainer.compute_loss(model, batch).item() == pytest.approx(alone.item(), rel=1e-5)


def test_what_is_logged_is_the_mean_of_each_kind(
    trainer: RefusalTrainer, batch: dict[str, Any]
) -> None:
    control, reply = expected(trainer, batch)
    trainer._metrics["eval"].clear()
    trainer.compute_loss(trainer.model.eval(), batch)
    logged = trainer._metrics["eval"]
    assert logged["control_nll"] == pytest.approx([control.mean().item()], rel=1e-4)
    assert logged["reply_nll"] == pytest.approx([reply.mean().item()], rel=1e-4)
