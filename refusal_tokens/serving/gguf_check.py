"""Checks of a GGUF file against the checkpoint it was made from, whoever wrote it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gguf import GGUFReader, TokenType

from refusal_tokens.checkpoint import CheckpointInfo
from refusal_tokens.errors import InputError, one_message

TOKENS, TYPES = "tokenizer.ggml.tokens", "tokenizer.ggml.token_type"
TEMPLATE = "tokenizer.chat_template"


@dataclass(frozen=True)
class GgufSummary:
    """What a checked file holds.

    Attributes:
        path: the file.
        architecture: llama.cpp's name of it.
        bytes: its size.
        vocabulary: number of token ids.
        control_tokens: control token -> id; all of type ``CONTROL``.
        tensors: type of tensor data -> number of tensors.
    """

    path: str
    architecture: str
    bytes: int
    vocabulary: int
    control_tokens: dict[str, int]
    tensors: dict[str, int]

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return asdict(self)


def check_gguf(path: str | Path, info: CheckpointInfo, chat_template: str | None) -> GgufSummary:
    """Check a GGUF file's control tokens and chat template.

    Args:
        path: the file.
        info: of the checkpoint it should stand for.
        chat_template: the checkpoint's; None leaves the file's template unchecked.

    Raises:
        InputError: listing every fault: a control token that is missing, has another id or is not
            of type ``CONTROL`` (llama.cpp would find it in users' text); another chat template;
            fewer embedding rows than ids.
    """
    reader = _open(path)
    tokens, types = _field(reader, TOKENS, path), _field(reader, TYPES, path)
    faults = []
    for token, number in zip(info.taxonomy.tokens, info.control_token_ids, strict=True):
        faults += _token_faults(token, number, tokens, types)
    if chat_template is not None and _optional(reader, TEMPLATE) != chat_template:
        faults.append("the chat template differs from the checkpoint's")
    shapes = {tensor.name: tensor.shape for tensor in reader.tensors}
    rows = int(shapes["token_embd.weight"][-1]) if "token_embd.weight" in shapes else 0
    if rows < len(tokens):
        faults.append(f"the embedding has {rows} rows for {len(tokens)} tokens")
    if faults:
        raise one_message([f"{path}: {fault}" for fault in faults], str(path))
    kinds = [tensor.tensor_type.name for tensor in reader.tensors]
    return GgufSummary(
        path=str(path),
        architecture=str(_field(reader, "general.architecture", path)),
        bytes=Path(path).stat().st_size,
        vocabulary=len(tokens),
        control_tokens=dict(zip(info.taxonomy.tokens, info.control_token_ids, strict=True)),
        tensors={kind: kinds.count(kind) for kind in sorted(set(kinds))},
    )


def _token_faults(
    token: str, number: int, tokens: Sequence[str], types: Sequence[int]
) -> list[str]:
    found = tokens[number] if number < len(tokens) else None
    if found != token:
        place = f"; it has id {tokens.index(token)}" if token in tokens else ""
        return [f"id {number}: found {found!r}; the checkpoint has {token!r} there{place}"]
    if types[number] != TokenType.CONTROL:
        return [
            f"{token} (id {number}) is of type {TokenType(types[number]).name}; allowed: CONTROL, "
            "since llama.cpp finds tokens of other types in users' text"
        ]
    return []


def _open(path: str | Path) -> GGUFReader:
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file")
    try:
        return GGUFReader(path)
    except (ValueError, IndexError, OSError, KeyError) as error:
        raise InputError(f"{path}: not a whole GGUF file ({error})") from None


def _optional(reader: GGUFReader, key: str) -> Any:
    field = reader.get_field(key)
    return None if field is None else field.contents()


def _field(reader: GGUFReader, key: str, path: str | Path) -> Any:
    value = _optional(reader, key)
    if value is None:
        raise InputError(f"{path}: key {key!r} is missing; a model with its vocabulary is needed")
    return value
