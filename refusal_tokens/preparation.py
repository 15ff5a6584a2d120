"""A recipe's input, read and checked before any weights load, and the run folder it claims."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig
from transformers import PreTrainedTokenizerFast as Tokenizer
from trl import SFTConfig

from refusal_tokens.base_model import load_config, load_tokenizer, resolve
from refusal_tokens.chat import ChatEncoder
from refusal_tokens.errors import InputError
from refusal_tokens.examples import ExampleSet, build_examples
from refusal_tokens.files import read_json, read_text, write_json
from refusal_tokens.mixing import Drawn, read_mix
from refusal_tokens.options import SPLITS, RefusalOptions
from refusal_tokens.prefill import check_lengths, context_limit
from refusal_tokens.recipe import Recipe
from refusal_tokens.rows import Row, check_hub_columns, data_hash
from refusal_tokens.safeguards import check_answers
from refusal_tokens.tokens import add_control_tokens

RUN_FILE = "run.json"


@dataclass(frozen=True)
class Prepared:
    """Everything that can be known before the model's weights are loaded.

    Attributes:
        rows: split -> rows.
        drawn: what each training source gave.
        base: what ``from_pretrained`` loads.
        config: the base model's.
        tokenizer: with the control tokens added.
        encoder: prompts and replies to ids.
        control_ids: ``<|respond|>`` first.
        examples: of the training rows.
    """

    recipe: Recipe
    rows: Mapping[str, Sequence[Row]]
    drawn: Sequence[Drawn]
    base: str
    config: PretrainedConfig
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
    base = resolve(recipe.model_name_or_path)
    config = load_config(base, **loading(recipe))
    tokenizer = load_tokenizer(base, **loading(recipe))
    _set_template(tokenizer, recipe.sft.get("chat_template_path"))
    # Before anything is encoded: text that spells a token that is not there yet is not guarded.
    control_ids = add_control_tokens(tokenizer, recipe.taxonomy) if options.control_tokens else []
    encoder = ChatEncoder(tokenizer, options.system_prompt, options.chat_template_kwargs)
    # What a Hub set says of itself is looked at for all of them before the first is downloaded.
    check_hub_columns([source for name in SPLITS for source in getattr(options, name)])
    mixes = {
        name: read_mix(sources, recipe.taxonomy, seed=seed, **_drawing(options, name))
        for name in SPLITS
        if (sources := getattr(options, name))
    }
    check_answers(mixes["train"].rows, mixes["train"].found)
    rows = {name: mix.rows for name, mix in mixes.items()}
    _check_context([row for name in SPLITS[1:] for row in rows.get(name, ())], encoder, config)
    limit = recipe.sft.get("max_length", SFTConfig.max_length)
    examples = build_examples(
        rows["train"],
        encoder,
        recipe.taxonomy,
        control_ids,
        limit,
        reply_share=options.reply_share,
        share_without_token=options.share_without_token,
        seed=seed,
    )
    if not examples.examples:
        raise InputError(f"no training rows are left: all are longer than max_length {limit}")
    drawn = mixes["train"].drawn
    return Prepared(recipe, rows, drawn, base, config, tokenizer, encoder, control_ids, examples)


def _check_context(rows: Sequence[Row], encoder: ChatEncoder, config: PretrainedConfig) -> None:
    """Check that prompts which are profiled after training fit the model; training drops such rows.

    A token is a byte or more, and a template adds a few to each turn: only prompts that long are
    encoded.
    """
    limit = context_limit(config)
    before = len((encoder.system_prompt or "").encode())
    sizes = [before + len(row.prompt_text.encode()) for row in rows]
    suspected = [r for r, size in zip(rows, sizes, strict=True) if limit and 2 * size > limit]
    check_lengths(limit, suspected, [encoder.prompt_ids(row.prompt) for row in suspected])


def loading(recipe: Recipe) -> dict[str, Any]:
    """Return what tokenizer, configuration and weights are all loaded with."""
    init = recipe.sft.get("model_init_kwargs") or {}
    return {key: init[key] for key in ("revision", "trust_remote_code") if key in init}


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
        tokenizer.chat_template = read_text(path)
        return
    source = load_tokenizer(resolve(path))
    if not source.chat_template:
        raise InputError(f"chat_template_path: {path!r} has no chat template")
    tokenizer.chat_template = source.chat_template


def check_run(folder: Path, prepared: Prepared, *, resume: bool, overwrite: bool) -> None:
    """Check that a run may go into a folder, so that no run is lost to another.

    Raises:
        InputError: if it holds another run or something else, or there is nothing to resume.
    """
    if resume and overwrite:
        raise InputError("--resume goes on with a run and --overwrite replaces it; give one")
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: is a file; a folder is needed")
    file = folder / RUN_FILE
    used = folder.exists() and any(folder.iterdir())
    if overwrite and used and not file.is_file():
        raise InputError(f"{folder}: is no run folder, so --overwrite leaves it alone")
    if resume and not file.is_file():
        raise InputError(f"{folder}: no run to resume")
    if resume and read_json(file) != prepared.run_key:
        raise InputError(
            f"{folder}: holds a run of another recipe or other rows; nothing was changed. "
            "Resume with the same ones, or use --overwrite or another --output-dir"
        )
    if used and not file.is_file():
        raise InputError(f"{folder}: holds other files; use another --output-dir")
    if used and not resume and not overwrite:
        raise InputError(
            f"{folder}: holds a run already; use --resume, --overwrite or another --output-dir"
        )


def claim_run(folder: Path, prepared: Prepared, *, overwrite: bool) -> None:
    """Write down whose run a folder holds, after ``check_run``; what was there is gone then."""
    if overwrite and folder.exists():
        shutil.rmtree(folder)
    write_json(folder / RUN_FILE, prepared.run_key)
