"""A prepared recipe to a merged checkpoint, through TRL's trainer."""

from __future__ import annotations

import contextlib
import gc
import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import BitsAndBytesConfig, PreTrainedModel, ProgressCallback, set_seed
from trl import SFTConfig

from refusal_tokens.base_model import fast_dtype, load_model
from refusal_tokens.checkpoint import CheckpointInfo, save_checkpoint, versions
from refusal_tokens.errors import InputError
from refusal_tokens.examples import IGNORED, Example
from refusal_tokens.files import atomic_folder, clear_write_errors
from refusal_tokens.preparation import Prepared, check_run, claim_run
from refusal_tokens.progress import LogFile, Progress
from refusal_tokens.recipe import Recipe, sft_arguments
from refusal_tokens.rows import data_hash
from refusal_tokens.tokens import (
    fit_vocabulary,
    lift_rows,
    start_rows,
    trainable_token_indices,
)
from refusal_tokens.trainer import RefusalTrainer, causal_lm

SMALL_MODEL = 1_000_000_000


def train(
    prepared: Prepared, folder: Path, *, resume: bool = False, overwrite: bool = False
) -> CheckpointInfo:
    """Train, save the adapter, and write the merged checkpoint to ``folder/model``.

    Args:
        prepared: from ``prepare``.
        folder: the run folder; claimed once the model is loaded and checked.
        resume: go on from the last saved step.
        overwrite: replace the run that is there.

    Returns:
        What ``refusal_tokens.json`` holds.

    Raises:
        InputError: as ``check_run``; for a model that cannot be loaded, with the folder as it was;
            if the loss becomes NaN, or the disk is full.
    """
    recipe = prepared.recipe
    began = time.monotonic()
    check_run(folder, prepared, resume=resume, overwrite=overwrite)
    saved = last_checkpoint(folder / "trainer") if resume else None
    try:
        trainer = build_trainer(prepared, folder, after=step_of(saved) if saved else 0)
    except BaseException:
        # Ctrl-C too: the trainer makes its folder before the model is checked.
        for empty in (folder / "trainer", folder):
            with contextlib.suppress(OSError):
                empty.rmdir()
        raise
    claim_run(folder, prepared, overwrite=overwrite)
    if resume and not saved:
        print("No step was saved before the interruption; starting from the first", flush=True)
    with clear_write_errors(folder / "trainer"):
        result = trainer.train(resume_from_checkpoint=str(saved) if saved else None)
    seconds = time.monotonic() - began
    info = _info(prepared, trainer, result.global_step, seconds)
    if recipe.peft_config is None:
        merged = causal_lm(trainer.model).to(_save_dtype(recipe, causal_lm(trainer.model)))
    else:
        with atomic_folder(folder / "adapter") as temporary:
            trainer.model.save_pretrained(temporary, save_embedding_layers=False)
        del trainer
        gc.collect()
        merged = merge(prepared, folder / "adapter")
    return save_checkpoint(folder / "model", merged, prepared.tokenizer, info)


def last_checkpoint(folder: Path) -> Path | None:
    """Return the trainer's last whole checkpoint; those cut off while written are removed.

    The trainer writes ``trainer_state.json`` last. Folders of other names are left alone.
    """
    named = (path for path in folder.glob("checkpoint-*") if path.name[11:].isdigit())
    found = sorted(named, key=step_of)
    while found:
        try:
            json.loads((found[-1] / "trainer_state.json").read_text("utf-8"))
        except (FileNotFoundError, ValueError):
            shutil.rmtree(found.pop())
        else:
            return found[-1]
    return None


def step_of(checkpoint: Path) -> int:
    """Return the step after which a trainer's checkpoint was saved."""
    return int(checkpoint.name.rpartition("-")[2])


def build_trainer(prepared: Prepared, folder: Path, *, after: int = 0) -> RefusalTrainer:
    """Load the model and build the trainer of a recipe.

    Args:
        prepared: from ``prepare``.
        folder: the run's; the log goes to its ``train.jsonl``.
        after: the step that a resumed run goes on from; the log is kept up to it.
    """
    recipe = prepared.recipe
    config = sft_config(recipe, folder)
    set_seed(config.seed)
    model = load_base(prepared, _training_dtype(recipe, config), quantised=True)
    examples = prepared.examples
    if prepared.control_ids:
        lift_rows(model, prepared.control_ids, _sample_prompts(examples.examples))
    trainer = RefusalTrainer(
        model=model,
        args=config,
        train_dataset=_dataset(examples.examples),
        processing_class=prepared.tokenizer,
        peft_config=_lora(recipe, model, prepared.control_ids),
        callbacks=[LogFile(folder / "train.jsonl", after)],
        control_ids=prepared.control_ids,
        control_share=recipe.options.control_share,
        respond_weight=recipe.options.respond_weight,
        control_smoothing=recipe.options.control_smoothing,
        reply_tokens_per_row=examples.reply_tokens / len(examples.examples),
    )
    trainer.remove_callback(ProgressCallback)
    if not config.disable_tqdm:
        trainer.add_callback(Progress)
    check_head(trainer, examples.examples[:2])
    return trainer


def sft_config(recipe: Recipe, folder: Path) -> SFTConfig:
    """Return the recipe's ``SFTConfig``, with bfloat16 decided for this device if left open."""
    # The template is set on the tokenizer already, before the control tokens are added; the model
    # is loaded here.
    taken = ("chat_template_path", "model_init_kwargs")
    values = {key: value for key, value in recipe.sft.items() if key not in taken}
    dtype = (recipe.sft.get("model_init_kwargs") or {}).get("dtype")
    bf16 = fast_dtype() == torch.bfloat16 if dtype is None else dtype != "float32"
    return SFTConfig(**sft_arguments(values, str(folder / "trainer"), bf16=bf16))


def _training_dtype(recipe: Recipe, config: SFTConfig) -> torch.dtype | str:
    """A frozen base in the dtype of the computation; a trained one in float32."""
    init = recipe.sft.get("model_init_kwargs") or {}
    if init.get("dtype") is not None:
        return str(init["dtype"])
    if recipe.peft_config is None:
        return torch.float32
    return torch.bfloat16 if config.bf16 else torch.float16 if config.fp16 else torch.float32


def load_base(
    prepared: Prepared, dtype: torch.dtype | str, *, quantised: bool = False
) -> PreTrainedModel:
    """Load the base model with the control tokens' rows added and started.

    Args:
        prepared: from ``prepare``.
        dtype: of the weights.
        quantised: apply the recipe's quantisation, as in training; a merge does not.
    """
    init = dict(prepared.recipe.sft.get("model_init_kwargs") or {})
    init.pop("dtype", None)
    if quantised and prepared.recipe.quantization_config:
        init["quantization_config"] = BitsAndBytesConfig(**prepared.recipe.quantization_config)
    model = load_model(prepared.base, dtype=dtype, **init)
    ids, recipe = prepared.control_ids, prepared.recipe
    if ids:
        fit_vocabulary(model, ids)
        seed = recipe.sft.get("seed", SFTConfig.seed)
        start = recipe.options.row_start
        start_rows(model, prepared.tokenizer, ids, recipe.taxonomy.descriptions, start, seed)
    return model


def merge(prepared: Prepared, adapter: Path) -> PreTrainedModel:
    """Merge an adapter into the unquantised base, in the dtype that is saved."""
    model = load_base(prepared, "auto")
    dtype = _save_dtype(prepared.recipe, model)
    if dtype != model.dtype:
        model = load_base(prepared, dtype)
    peft_model = PeftModel.from_pretrained(model, str(adapter))
    return peft_model.merge_and_unload(safe_merge=True)


def _save_dtype(recipe: Recipe, model: PreTrainedModel) -> torch.dtype:
    asked = recipe.options.save_dtype
    if asked != "auto":
        return getattr(torch, asked)  # type: ignore[no-any-return]
    parameters = sum(p.numel() for p in model.parameters())
    return torch.float32 if parameters < SMALL_MODEL else model.dtype


def _lora(recipe: Recipe, model: PreTrainedModel, control_ids: list[int]) -> LoraConfig | None:
    if recipe.peft_config is None:
        return None
    rows = {}
    if control_ids:
        rows = {"trainable_token_indices": trainable_token_indices(model, control_ids)}
    return LoraConfig(**{"task_type": "CAUSAL_LM", **recipe.peft_config, **rows})


def _sample_prompts(examples: Sequence[Example], count: int = 32) -> list[list[int]]:
    """The prompts of examples taken evenly from the whole set."""
    step = max(1, len(examples) // count)
    return [example.input_ids[: example.prompt_length] for example in examples[::step][:count]]


def _dataset(examples: Sequence[Example]) -> Dataset:
    return Dataset.from_dict(
        {
            "input_ids": [example.input_ids for example in examples],
            "labels": [example.labels for example in examples],
            "length": [len(example.input_ids) for example in examples],
        }
    )


@torch.no_grad()
def check_head(trainer: RefusalTrainer, examples: Sequence[Example]) -> None:
    """Assert that the lean forward scores a batch as the model's own forward does.

    Raises:
        InputError: if the model's own logits are not finite.
        AssertionError: for an architecture whose logits it does not reproduce.
    """
    model = trainer.model
    device = next(model.parameters()).device
    batch = trainer.data_collator(
        [{"input_ids": example.input_ids, "labels": example.labels} for example in examples]
    )
    batch = {name: batch[name].to(device) for name in ("input_ids", "attention_mask", "labels")}
    targets = batch["labels"][:, 1:]
    mask = targets != IGNORED
    was_training = model.training
    model.eval()
    weights = torch.ones(int(mask.sum()), device=device)
    lean = model(**batch, label_weights=weights).log_probs
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits.float()
    model.train(was_training)
    plain = logits[:, :-1][mask].log_softmax(dim=-1).gather(1, targets[mask][:, None])[:, 0]
    if not plain.isfinite().all():
        raise InputError(
            f"model {trainer.model.config.name_or_path!r}: its logits are not numbers; the weights "
            "are damaged, or overflow in this dtype"
        )
    gap = (lean - plain).abs().max().item()
    # bfloat16 logits near 20 are 0.1 wide.
    assert gap < 0.5, f"the log-probabilities are off by {gap:.2f} nats"


def _info(
    prepared: Prepared, trainer: RefusalTrainer, steps: int, seconds: float
) -> CheckpointInfo:
    examples = prepared.examples
    return CheckpointInfo(
        taxonomy=prepared.recipe.taxonomy,
        control_token_ids=tuple(prepared.control_ids),
        generation_prompt_ids=prepared.encoder.generation_prompt_ids,
        system_prompt=prepared.recipe.options.system_prompt,
        chat_template_kwargs=dict(prepared.recipe.options.chat_template_kwargs),
        base_model=prepared.recipe.model_name_or_path,
        recipe=prepared.run_key["recipe"],
        data={
            name: {"rows": len(rows), "hash": data_hash(rows)}
            for name, rows in prepared.rows.items()
        },
        versions=versions(),
        training={
            "rows": len(examples.examples),
            "rows dropped as longer than max_length": len(examples.dropped),
            "rows without reply": examples.without_reply,
            "rows without control token": examples.without_token,
            "tokens an epoch": examples.tokens,
            "steps": steps,
            "seconds": round(seconds, 1),
            "device": trainer.args.device.type,
            "dtype": "bfloat16" if trainer.args.bf16 else "float32",
        },
    )
