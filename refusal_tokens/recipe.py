"""Recipes: YAML in TRL's and PEFT's own names, checked whole before anything is loaded.

A recipe reads like the call of ``trl.SFTTrainer``: the top level holds ``SFTConfig`` arguments,
``model_name_or_path`` names the model, ``peft_config`` holds ``LoraConfig`` arguments,
``quantization_config`` holds ``BitsAndBytesConfig`` arguments, and ``refusal_tokens`` holds what
this package adds.
"""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from enum import Enum
from pathlib import Path
from typing import Any

from refusal_tokens.errors import InputError, one_message, unknown
from refusal_tokens.files import parse_yaml, read_text
from refusal_tokens.options import SPLITS, RefusalOptions, options_from
from refusal_tokens.sources import category_faults
from refusal_tokens.taxonomy import Taxonomy, default_taxonomy, load_taxonomy, taxonomy_from_dict

SECTIONS = ("model_name_or_path", "peft_config", "quantization_config", "refusal_tokens")

# SFTConfig arguments that would go round the examples or the loss built here.
NO_SECRETS = (
    "the recipe is kept in the run and published with the model; log in with `hf auth login`, or "
    "set HF_TOKEN"
)
NO_EVALUATION = "calibration and test rows are profiled after training, not during it"
REFUSED_SFT = {
    "packing": "examples are not packed: each has its own decision position",
    "padding_free": "batches are grouped by length instead",
    "assistant_only_loss": "labels are built on the control token and the reply",
    "completion_only_loss": "labels are built on the control token and the reply",
    "loss_type": "the loss is the negative log-likelihood, shared by control_share",
    "label_smoothing_factor": "it would smooth replies too; set refusal_tokens.control_smoothing",
    "use_liger_kernel": "it would replace the loss",
    "router_aux_loss_coef": "the loss has no router term",
    "dataset_text_field": "rows have their own format",
    "dataset_kwargs": "rows have their own format",
    "remove_unused_columns": "the trainer sets it",
    "trust_remote_code": "set model_init_kwargs.trust_remote_code if you must",
    "output_dir": "use --output-dir",
    "resume_from_checkpoint": "use --resume",
    "eval_strategy": NO_EVALUATION,
    "do_eval": NO_EVALUATION,
    "load_best_model_at_end": NO_EVALUATION,
    "hub_token": NO_SECRETS,
    "push_to_hub_token": NO_SECRETS,
}
RANGES: dict[str, tuple[float, float]] = {
    "learning_rate": (1e-12, 10.0),
    "num_train_epochs": (1e-6, 1e6),
    "max_steps": (-1, 1e9),
    "per_device_train_batch_size": (1, 1e6),
    "gradient_accumulation_steps": (1, 1e6),
    "max_length": (8, 1e7),
    "weight_decay": (0, 1),
    "warmup_ratio": (0, 1),
    "max_grad_norm": (0, 1e6),
    "seed": (0, 2**32 - 1),
}
LORA_RANGES: dict[str, tuple[float, float]] = {
    "r": (1, 65536),
    "lora_alpha": (1e-6, 1e6),
    "lora_dropout": (0, 0.999),
}


@dataclass(frozen=True)
class Recipe:
    """A whole, checked recipe.

    Attributes:
        name: the file's stem.
        model_name_or_path: bundled name, folder or Hub id.
        sft: ``SFTConfig`` arguments.
        peft_config: ``LoraConfig`` arguments; None trains the whole model.
        quantization_config: ``BitsAndBytesConfig`` arguments, or None.
        options: the ``refusal_tokens`` section.
        taxonomy: as the options name it.
    """

    name: str
    model_name_or_path: str
    sft: Mapping[str, Any]
    peft_config: Mapping[str, Any] | None
    quantization_config: Mapping[str, Any] | None
    options: RefusalOptions
    taxonomy: Taxonomy

    def to_dict(self) -> dict[str, Any]:
        """Return the recipe as plain data: enough to run it again."""
        sources = {key: [s.to_data() for s in getattr(self.options, key)] for key in SPLITS}
        return {
            "model_name_or_path": self.model_name_or_path,
            **self.sft,
            "peft_config": self.peft_config,
            "quantization_config": self.quantization_config,
            "refusal_tokens": asdict(self.options) | sources,
        }


def load_recipe(path: str | Path, changes: Sequence[str] = ()) -> Recipe:
    """Read a recipe and check every key, type and range.

    Args:
        path: the YAML file.
        changes: ``key=value`` settings over it; dots reach into sections, values are YAML.

    Raises:
        InputError: listing every fault with the file, the key and what is allowed.
    """
    data = parse_yaml(read_text(path), str(path))
    if not isinstance(data, dict):
        raise InputError(f"{path}: found {type(data).__name__}; allowed: a mapping of settings")
    for change in changes:
        _apply(data, change)
    return recipe_from_dict(data, Path(path).stem, str(path))


def _apply(data: dict[str, Any], change: str) -> None:
    key, equals, value = change.partition("=")
    if not equals or not key:
        raise InputError(f"--set {change!r}: allowed: key=value, such as learning_rate=1e-4")
    target = data
    *sections, last = key.split(".")
    for section in sections:
        if target.get(section) is None:
            target[section] = {}
        target = target[section]
        if not isinstance(target, dict):
            raise InputError(f"--set {change!r}: {section!r} is no section")
    target[last] = parse_yaml(value, f"--set {key}")


def recipe_from_dict(data: Mapping[str, Any], name: str, where: str) -> Recipe:
    """Check a recipe that is already parsed; see ``load_recipe``."""
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig
    from trl import SFTConfig

    faults: list[str] = []
    top = {key: value for key, value in data.items() if key not in SECTIONS}
    sft = _checked(top, SFTConfig, "", RANGES, faults, also=SECTIONS)
    faults += [f"{key}: cannot be set ({REFUSED_SFT[key]})" for key in top if key in REFUSED_SFT]
    if "token" in (sft.get("model_init_kwargs") or {}):
        faults.append(f"model_init_kwargs.token: cannot be set ({NO_SECRETS})")
    lora = _section(data, "peft_config", LoraConfig, LORA_RANGES, faults)
    quantization = _quantization(data, BitsAndBytesConfig, faults)
    if quantization and not lora:
        faults.append("quantization_config: needs peft_config; quantised weights are not trained")
    model = data.get("model_name_or_path")
    if not isinstance(model, str) or not model:
        faults.append(f"model_name_or_path: found {model!r}; allowed: a model name or folder")
    options = options_from(data.get("refusal_tokens"), faults)
    taxonomy = _taxonomy(options, faults) if options else None
    if options and taxonomy:
        faults += _category_faults(options, taxonomy)
    if not faults:
        faults += _construction_faults(SFTConfig, sft_arguments(sft, "unused", bf16=False), "")
        faults += _construction_faults(LoraConfig, lora or {}, "peft_config: ")
        faults += _reporter_faults(sft)
    if faults or options is None or taxonomy is None:
        raise one_message([f"{where}: {fault}" for fault in faults], where)
    return Recipe(name, str(model), sft, lora, quantization, options, taxonomy)


def sft_arguments(sft: Mapping[str, Any], output_dir: str, *, bf16: bool) -> dict[str, Any]:
    """Return ``SFTConfig`` arguments with what a recipe leaves to the machine filled in.

    Args:
        sft: the recipe's.
        output_dir: for the trainer's own checkpoints.
        bf16: taken where the recipe sets neither ``bf16`` nor ``fp16``.
    """
    import torch

    filled = {**sft, "output_dir": output_dir}
    filled.setdefault("use_cpu", not torch.accelerator.is_available())
    # transformers shows no bar while its notices are silenced, unless told to.
    filled.setdefault("disable_tqdm", False)
    if not sft.get("fp16"):
        filled.setdefault("bf16", bf16)
    return filled


def _section(
    data: Mapping[str, Any],
    key: str,
    kind: type,
    ranges: Mapping[str, tuple[float, float]],
    faults: list[str],
) -> dict[str, Any] | None:
    value = data.get(key)
    if value is None:
        return None
    if not isinstance(value, Mapping):
        faults.append(f"{key}: found {type(value).__name__}; allowed: a section")
        return None
    return _checked(value, kind, f"{key}.", ranges, faults)


def _quantization(data: Mapping[str, Any], kind: type, faults: list[str]) -> dict[str, Any] | None:
    """BitsAndBytesConfig is no dataclass: its constructor's parameters are its arguments."""
    value = data.get("quantization_config")
    if value is None:
        return None
    if not isinstance(value, Mapping):
        faults.append(f"quantization_config: found {type(value).__name__}; allowed: a section")
        return None
    import inspect

    allowed = [name for name in inspect.signature(kind).parameters if name != "kwargs"]
    for key in value:
        if key not in allowed:
            faults.append(f"quantization_config.{unknown('key', key, allowed)}")
    return dict(value)


def _checked(
    values: Mapping[str, Any],
    kind: type,
    prefix: str,
    ranges: Mapping[str, tuple[float, float]],
    faults: list[str],
    also: Sequence[str] = (),
) -> dict[str, Any]:
    hints = typing.get_type_hints(kind)
    names = [f.name for f in fields(kind) if f.init]
    checked = {}
    for key, value in values.items():
        if key not in names:
            faults.append(f"{prefix}{_unknown_key(key, [*also, *names])}")
            continue
        value = _as_meant(value, hints[key])
        if not _fits(value, hints[key]):
            faults.append(f"{prefix}{key}: found {value!r}; allowed: {_type_name(hints[key])}")
        elif key in ranges and value is not None and not _in_range(value, ranges[key]):
            low, high = ranges[key]
            faults.append(f"{prefix}{key}: found {value!r}; allowed: {low:g} to {high:g}")
        checked[key] = value
    return checked


def _unknown_key(key: str, names: Sequence[str]) -> str:
    """The list of SFTConfig's arguments is too long to print; the nearest one is enough."""
    from refusal_tokens.errors import nearest

    return f"{key}: unknown key{nearest(key, names)}"


def _as_meant(value: Any, hint: Any) -> Any:
    """YAML 1.1 reads 1e-4 as text and no as false; they are taken as a number and "no" again."""
    kinds = [k for k in typing.get_args(hint) or (hint,) if isinstance(k, type)]
    enums = [kind for kind in kinds if issubclass(kind, Enum)]
    if value is False and any(member.value == "no" for kind in enums for member in kind):
        return "no"
    if isinstance(value, str) and _fits(0.5, hint) and not _fits(value, hint):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _fits(value: Any, hint: Any) -> bool:
    origin = typing.get_origin(hint)
    if hint is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, option) for option in typing.get_args(hint))
    if origin is typing.Literal:
        return value in typing.get_args(hint)
    if hint is type(None):
        return value is None
    kind = origin or hint
    if not isinstance(kind, type):
        return True
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if kind in (bool, str, list, dict):
        return isinstance(value, kind)
    # Enumerations and config classes take text or mappings; their constructors check them.
    return isinstance(value, str | Mapping | kind)


def _type_name(hint: Any) -> str:
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    names |= {list: "a list", dict: "a mapping", type(None): "null"}
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(_type_name(option) for option in typing.get_args(hint)))
    if typing.get_origin(hint) is typing.Literal:
        return ", ".join(repr(value) for value in typing.get_args(hint))
    kind = typing.get_origin(hint) or hint
    return names.get(kind, getattr(kind, "__name__", str(kind)))


def _in_range(value: Any, bounds: tuple[float, float]) -> bool:
    return not isinstance(value, int | float) or (
        math.isfinite(value) and bounds[0] <= value <= bounds[1]
    )


def _construction_faults(kind: type, values: Mapping[str, Any], prefix: str) -> list[str]:
    try:
        kind(**values)
    except (ValueError, TypeError, KeyError, ImportError) as error:
        return [f"{prefix}{error}"]
    return []


def _reporter_faults(sft: Mapping[str, Any]) -> list[str]:
    """The configuration takes any name; the trainer would stop at a wrong one, rows later."""
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    named = sft.get("report_to") or []
    allowed = ["all", "none", *sorted(INTEGRATION_TO_CALLBACK)]
    names = [named] if isinstance(named, str) else named
    return [f"report_to: {unknown('name', x, allowed)}" for x in names if x not in allowed]


def _category_faults(options: RefusalOptions, taxonomy: Taxonomy) -> list[str]:
    return [
        f"refusal_tokens.{key}, {source.path}: {fault}"
        for key in SPLITS
        for source in getattr(options, key)
        for fault in category_faults(source, taxonomy)
    ]


def _taxonomy(options: RefusalOptions, faults: list[str]) -> Taxonomy | None:
    try:
        if options.taxonomy is None:
            return default_taxonomy(bool(options.single_token))
        if isinstance(options.taxonomy, str):
            return load_taxonomy(options.taxonomy, options.single_token)
        return taxonomy_from_dict(options.taxonomy, "refusal_tokens.taxonomy", options.single_token)
    except InputError as error:
        faults.append(str(error))
        return None
