"""A recipe to a run: rows, tokens, TRL's trainer, the merged checkpoint and its profiles."""

from __future__ import annotations

import gc
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import BitsAndBytesConfig, PreTrainedModel, ProgressCallback, set_seed
from transformers import PreTrainedTokenizerFast as Tokenizer
from trl import SFTConfig

from refusal_tokens.base_model import fast_dtype, load_model, load_tokenizer, resolve
from refusal_tokens.chat import ChatEncoder
from refusal_tokens.checkpoint import CheckpointInfo, save_checkpoint, versions
from refusal_tokens.errors import InputError
from refusal_tokens.examples import IGNORED, Example, ExampleSet, build_examples
from refusal_tokens.files import clear_write_errors, read_json, write_json
from refusal_tokens.mixing import Drawn, read_mix
from refusal_tokens.options import SPLITS, RefusalOptions
from refusal_tokens.progress import LogFile, Progress
from refusal_tokens.recipe import Recipe, sft_arguments
from refusal_tokens.rows import Row, data_hash
from refusal_tokens.safeguards import check_answers
from refusal_tokens.tokens import (
    add_control_tokens,
    fit_vocabulary,
    lift_rows,
    start_rows,
    trainable_token_indices,
)
from refusal_tokens.trainer import RefusalTrainer, causal_lm

RUN_FILE = "run.json"
SMALL_MODEL = 1_000_000_000


@dataclass(frozen=True)
class Prepared:
    """Everything that can be known before the model's weights are loaded.

    Attributes:
        rows: split -> rows.
        drawn: what each training source gave.
        base: what ``from_pretrained`` loads.
        tokenizer: with the control tokens added.
        encoder: prompts and replies to ids.
        control_ids: ``<|respond|>`` first.
        examples: of the training rows.
    """

    recipe: Recipe
    rows: Mapping[str, Sequence[Row]]
    drawn: Sequence[Drawn]
    base: str
    tokenizer: Tokenizer
    encoder: ChatEncoder
    control_ids: list[int]
    examples: ExampleSet

    @property
    def run_key(self) -> dict[str, Any]:
        """What makes two runs the same run: recipe, rows, base model."""
        return {
            "recipe": json.loads(json.dumps(self.recipe.to_dict(), default=str)),
            "data": {name: data_hash(rows) for name, rows in self.rows.items()},
            "taxonomy": self.recipe.taxonomy.hash,
        }


def prepare(recipe: Recipe) -> Prepared:
    """Read and check all input of a recipe, without loading the model.

    Raises:
        InputError: for any fault in rows, model name, template or tokens.
    """
    options = recipe.options
    seed = recipe.sft.get("seed", SFTConfig.seed)
    mixes = {
        name: read_mix(sources, recipe.taxonomy, seed=seed, **_drawing(options, name))
        for name in SPLITS
        if (sources := getattr(options, name))
    }
    check_answers(mixes["train"].rows)
    rows = {name: mix.rows for name, mix in mixes.items()}
    base = resolve(recipe.model_name_or_path)
    init = recipe.sft.get("model_init_kwargs") or {}
    passed = {k: init[k] for k in ("revision", "trust_remote_code", "token") if k in init}
    tokenizer = load_tokenizer(base, **passed)
    _set_template(tokenizer, recipe.sft.get("chat_template_path"))
    encoder = ChatEncoder(tokenizer, options.system_prompt, options.chat_template_kwargs)
    control_ids = add_control_tokens(tokenizer, recipe.taxonomy) if options.control_tokens else []
    limit = recipe.sft.get("max_length", SFTConfig.max_length)
    examples = build_examples(
        rows["train"],
        encoder,
        recipe.taxonomy,
        control_ids,
        limit,
        share_without_token=options.share_without_token,
        seed=seed,
    )
    if not examples.examples:
        raise InputError(f"no training rows are left: all are longer than max_length {limit}")
    drawn = mixes["train"].drawn
    return Prepared(recipe, rows, drawn, base, tokenizer, encoder, control_ids, examples)


def _drawing(options: RefusalOptions, split: str) -> dict[str, Any]:
    """What ``read_mix`` leaves out or thins: training rows only; the others are measured whole."""
    if split != "train":
        return {}
    # Without control tokens only replies are trained, and those that fit their prompt.
    with_replies = not (options.rows_without_reply and options.control_tokens)
    fitting = not (options.counterfactual_rows and options.control_tokens)

    def keep(row: Row) -> bool:
        lacks_reply = with_replies and row.response is None
        return not lacks_reply and (row.train_control or not fitting)

    return {
        "contrast_share": options.contrast_share,
        "refusal_share": options.refusal_share,
        "keep": keep,
    }


def _set_template(tokenizer: Tokenizer, path: str | None) -> None:
    """TRL's ``chat_template_path``: a .jinja file, or a model whose template to use."""
    if path is None:
        return
    if path.endswith((".jinja", ".j2")):
        from refusal_tokens.files import read_text

        tokenizer.chat_template = read_text(path)
        return
    source = load_tokenizer(resolve(path))
    if not source.chat_template:
        raise InputError(f"chat_template_path: {path!r} has no chat template")
    tokenizer.chat_template = source.chat_template


def start_run(folder: Path, prepared: Prepared, *, resume: bool, overwrite: bool) -> None:
    """Claim a run folder, so that no run is lost to another.

    Raises:
        InputError: if it holds another run, or there is nothing to resume.
    """
    file = folder / RUN_FILE
    if overwrite and folder.exists():
        if not file.is_file() and any(folder.iterdir()):
            raise InputError(f"{folder}: is no run folder, so --overwrite leaves it alone")
        shutil.rmtree(folder)
    if resume:
        if not file.is_file():
            raise InputError(f"{folder}: no run to resume")
        if read_json(file) != prepared.run_key:
            raise InputError(
                f"{folder}: holds a run of another recipe or other rows; nothing was changed. "
                "Resume with the same ones, or use --overwrite or another --output-dir"
            )
    elif folder.exists() and any(folder.iterdir()):
        raise InputError(
            f"{folder}: holds a run already; use --resume, --overwrite or another --output-dir"
        )
    write_json(file, prepared.run_key)


def train(prepared: Prepared, folder: Path, *, resume: bool = False) -> CheckpointInfo:
    """Train, save the adapter, and write the merged checkpoint to ``folder/model``.

    Args:
        prepared: from ``prepare``.
        folder: the run folder, claimed with ``start_run``.
        resume: go on from the last saved step.

    Returns:
        What ``refusal_tokens.json`` holds.

    Raises:
        InputError: if the loss becomes NaN, or the disk is full.
    """
    recipe = prepared.recipe
    began = time.monotonic()
    trainer = build_trainer(prepared, folder, keep_log=resume)
    saved = sorted((folder / "trainer").glob("checkpoint-*")) if resume else []
    if resume and not saved:
        print("No step was saved before the interruption; starting from the first", flush=True)
    with clear_write_errors(folder / "trainer"):
        result = trainer.train(resume_from_checkpoint=bool(saved) or None)
    seconds = time.monotonic() - began
    info = _info(prepared, trainer, result.global_step, seconds)
    if recipe.peft_config is None:
        merged = causal_lm(trainer.model).to(_save_dtype(recipe, causal_lm(trainer.model)))
    else:
        trainer.model.save_pretrained(folder / "adapter", save_embedding_layers=False)
        del trainer
        gc.collect()
        merged = merge(prepared, folder / "adapter")
    return save_checkpoint(folder / "model", merged, prepared.tokenizer, info)


def build_trainer(prepared: Prepared, folder: Path, *, keep_log: bool = False) -> RefusalTrainer:
    """Load the model and build the trainer of a recipe; its log goes to ``folder/train.jsonl``."""
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
        callbacks=[LogFile(folder / "train.jsonl", keep=keep_log)],
        control_ids=prepared.control_ids,
        control_share=recipe.options.control_share,
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
            "rows without reply": sum(r.response is None for r in prepared.rows["train"]),
            "rows without control token": examples.without_token,
            "tokens an epoch": examples.tokens,
            "steps": steps,
            "seconds": round(seconds, 1),
            "device": trainer.args.device.type,
            "dtype": "bfloat16" if trainer.args.bf16 else "float32",
        },
    )
