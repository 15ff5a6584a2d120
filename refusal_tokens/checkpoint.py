"""Checkpoints: a folder that plain transformers loads, plus ``refusal_tokens.json``."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerFast as Tokenizer

from refusal_tokens import __version__
from refusal_tokens.base_model import load_model, load_tokenizer
from refusal_tokens.chat import ChatEncoder, control_ids
from refusal_tokens.errors import InputError, one_message
from refusal_tokens.files import atomic_folder, file_sha256, read_json, write_json
from refusal_tokens.taxonomy import Taxonomy, taxonomy_from_dict

SCHEMA_VERSION = 1
INFO_FILE = "refusal_tokens.json"
# What a model trained without control tokens carries in its place: where it came from.
PLAIN_INFO_FILE = "training.json"
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "tokenizers")


@dataclass(frozen=True)
class CheckpointInfo:
    """What ``refusal_tokens.json`` holds: all that is needed to use and reproduce a checkpoint.

    Attributes:
        taxonomy: the categories and tokens.
        control_token_ids: ``<|respond|>`` first.
        generation_prompt_ids: the ids that end every prompt; the decision position follows.
        system_prompt: trained with; None leaves it to the chat template.
        chat_template_kwargs: passed to the chat template.
        base_model: the name in the recipe.
        recipe: the whole recipe.
        data: split -> {hash, rows}.
        versions: package -> version.
        model_fingerprint: over tensors, tokenizer and chat template.
        training: what the run counted: rows, tokens, dropped rows, steps, seconds.
    """

    taxonomy: Taxonomy
    control_token_ids: tuple[int, ...]
    generation_prompt_ids: tuple[int, ...]
    system_prompt: str | None
    chat_template_kwargs: Mapping[str, Any]
    base_model: str
    recipe: Mapping[str, Any]
    data: Mapping[str, Mapping[str, Any]]
    versions: Mapping[str, str]
    model_fingerprint: str = ""
    training: Mapping[str, Any] = field(default_factory=dict)

    def encoder(self, tokenizer: Tokenizer) -> ChatEncoder:
        """How prompts become ids, with the checkpoint's own tokenizer."""
        return ChatEncoder(tokenizer, self.system_prompt, self.chat_template_kwargs)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {
            "schema_version": SCHEMA_VERSION,
            **fields,
            "taxonomy": self.taxonomy.to_dict(),
            "control_token_ids": list(self.control_token_ids),
            "generation_prompt_ids": list(self.generation_prompt_ids),
        }


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint."""

    path: Path
    info: CheckpointInfo
    model: PreTrainedModel
    tokenizer: Tokenizer

    @property
    def encoder(self) -> ChatEncoder:
        """How prompts become ids: with the system prompt and template settings trained with."""
        return self.info.encoder(self.tokenizer)


def versions() -> dict[str, str]:
    """Return the versions of this package, Python and the packages that shape a result."""
    found = {name: metadata.version(name) for name in PACKAGES}
    return {"refusal_tokens": __version__, "python": platform.python_version(), **found}


def fingerprint(folder: Path) -> str:
    """Return one hash over a folder's tensors, tokenizer and chat template."""
    digest = hashlib.sha256()
    names = [*sorted(p.name for p in folder.glob("*.safetensors")), "tokenizer.json"]
    names += [n for n in ("chat_template.jinja",) if (folder / n).is_file()]
    for name in names:
        digest.update(f"{name}\0{file_sha256(folder / name)}\n".encode())
    return digest.hexdigest()


def save_checkpoint(
    folder: Path, model: PreTrainedModel, tokenizer: Tokenizer, info: CheckpointInfo
) -> CheckpointInfo:
    """Write model, tokenizer, ``refusal_tokens.json`` and the model card; nothing half-written.

    A model without control tokens gets ``training.json`` instead, and no card: it is a plain
    transformers folder, which no command takes for a checkpoint.

    Returns:
        The info with the model's fingerprint.
    """
    from refusal_tokens.model_card import model_card

    # Generation must stop where the training replies end.
    end = info.encoder(tokenizer).reply_ids("x")[-1]
    stops = model.generation_config.eos_token_id
    stops = [] if stops is None else [stops] if isinstance(stops, int) else list(stops)
    model.generation_config.eos_token_id = list(dict.fromkeys([end, *stops]))
    with atomic_folder(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        info = replace(info, model_fingerprint=fingerprint(temporary))
        if info.control_token_ids:
            write_json(temporary / INFO_FILE, info.to_dict())
            (temporary / "README.md").write_text(model_card(info, None), encoding="utf-8")
        else:
            write_json(temporary / PLAIN_INFO_FILE, info.to_dict())
    return info


def find_checkpoint(path: str | Path) -> Path:
    """Return the checkpoint folder for a checkpoint or a run folder.

    Raises:
        InputError: if there is none.
    """
    folder = Path(path).expanduser()
    for candidate in (folder, folder / "model"):
        if (candidate / INFO_FILE).is_file():
            return candidate
    if not folder.is_dir():
        runs = sorted(p.parent.parent for p in Path("runs").glob(f"*/model/{INFO_FILE}"))
        known = f"; runs here: {', '.join(map(str, runs))}" if runs else "; run: make train"
        raise InputError(f"{path}: no such checkpoint{known}")
    raise InputError(
        f"{path}: no {INFO_FILE} in it, so the model has no refusal tokens; train it first"
    )


def load_info(path: str | Path) -> CheckpointInfo:
    """Read ``refusal_tokens.json`` of a checkpoint or run folder, without loading the model.

    Raises:
        InputError: if it is missing, malformed or of another schema version.
    """
    file = find_checkpoint(path) / INFO_FILE
    data = read_json(file)
    if not isinstance(data, dict) or data.get("schema_version") != SCHEMA_VERSION:
        found = data.get("schema_version") if isinstance(data, dict) else type(data).__name__
        raise InputError(f"{file}: schema version {found!r}; this version reads {SCHEMA_VERSION}")
    names = list(CheckpointInfo.__dataclass_fields__)
    missing = [f"{file}: key {name!r} is missing" for name in names if name not in data]
    if missing:
        raise one_message(missing, str(file))
    values = {name: data[name] for name in names}
    values["taxonomy"] = taxonomy_from_dict(data["taxonomy"], str(file))
    for name in ("control_token_ids", "generation_prompt_ids"):
        ids = data[name]
        if not isinstance(ids, list) or not all(type(token) is int for token in ids):
            raise InputError(f"{file}: {name}: found {ids!r}; allowed: a list of whole numbers")
        values[name] = tuple(ids)
    return CheckpointInfo(**values)


def load_tokenizer_of(path: str | Path) -> tuple[CheckpointInfo, Tokenizer]:
    """Load what a checkpoint or run folder holds besides the model.

    Raises:
        InputError: if it is missing or damaged, or its tokenizer does not carry its taxonomy.
    """
    info, folder = load_info(path), find_checkpoint(path)
    tokenizer = load_tokenizer(str(folder))
    found = control_ids(tokenizer, info.taxonomy.tokens)
    if found != list(info.control_token_ids):
        raise InputError(
            f"{folder}: {INFO_FILE} says control token ids {list(info.control_token_ids)}, the "
            f"tokenizer says {found}: the folder was changed since training"
        )
    return info, tokenizer


def load_checkpoint(
    path: str | Path, *, dtype: str | torch.dtype = "auto", device: str | None = None
) -> Checkpoint:
    """Load a checkpoint or run folder.

    Args:
        path: the folder.
        dtype: of the weights; ``auto`` as they were saved.
        device: ``cpu``, ``cuda``...; None takes the accelerator where there is one.

    Raises:
        InputError: if it is missing or damaged, or its tokenizer does not carry its taxonomy.
    """
    info, tokenizer = load_tokenizer_of(path)
    folder = find_checkpoint(path)
    model = load_model(str(folder), dtype=dtype)
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    model.to(place).eval()
    return Checkpoint(folder, info, model, tokenizer)


def info_summary(info: CheckpointInfo) -> dict[str, Any]:
    """Return the parts of a checkpoint's info that a profile carries."""
    return {
        "model_fingerprint": info.model_fingerprint,
        "base_model": info.base_model,
        "system_prompt": info.system_prompt,
        "chat_template_kwargs": dict(info.chat_template_kwargs),
        "versions": dict(info.versions),
        "taxonomy_hash": info.taxonomy.hash,
    }
