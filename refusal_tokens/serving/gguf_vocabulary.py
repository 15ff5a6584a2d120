"""A tokenizer as the vocabulary of a GGUF file: strings, types and merges by id."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gguf import TokenType
from transformers import PreTrainedTokenizerFast as Tokenizer

from refusal_tokens.errors import InputError

CONVERTER = (
    "llama.cpp's convert_hf_to_gguf.py writes it; then check the control tokens' ids and types "
    "with: refusal-tokens export CHECKPOINT --format gguf --verify FILE"
)
# How Llama 3 splits text before its merges.
_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Vocabulary:
    """What llama.cpp needs to tokenise as the checkpoint does.

    Attributes:
        tokens: the string of each id, in the byte-level alphabet.
        types: llama.cpp's type of each id; special tokens are ``CONTROL``.
        merges: the byte-pair merges, best first.
        pre: llama.cpp's name for how text is split before the merges.
        add_bos: whether plain text is opened with the beginning-of-sequence token.
    """

    tokens: list[str]
    types: list[TokenType]
    merges: list[str]
    pre: str
    add_bos: bool


def vocabulary_of(tokenizer: Tokenizer, rows: int) -> Vocabulary:
    """Return a tokenizer's vocabulary, filled up with unused entries to the embedding's rows.

    Raises:
        InputError: if it is not a byte-level BPE that llama.cpp knows by name.
    """
    data = json.loads(tokenizer.backend_tokenizer.to_str())
    model = data["model"]
    pre = _split_name(data)
    tokens = [f"[PAD{i}]" for i in range(rows)]
    types = [TokenType.UNUSED] * rows
    for token, number in model["vocab"].items():
        tokens[number], types[number] = token, TokenType.NORMAL
    for number, added in tokenizer.added_tokens_decoder.items():
        tokens[number] = added.content
        # llama.cpp finds user-defined tokens in any text, special ones only where it is told to.
        types[number] = TokenType.CONTROL if added.special else TokenType.USER_DEFINED
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    bos = tokenizer.bos_token_id
    opens = bos is not None and tokenizer("x")["input_ids"][:1] == [bos]
    return Vocabulary(tokens, types, merges, pre, opens)


def _split_name(data: Mapping[str, Any]) -> str:
    """Name the way text is split, as llama.cpp does."""
    model = data["model"]
    if model["type"] != "BPE" or model.get("byte_fallback") or data.get("normalizer"):
        raise InputError(f"the tokenizer is no plain byte-level BPE; {CONVERTER}")
    steps = _steps(data.get("pre_tokenizer"))
    split = {"type": "Split", "pattern": {"Regex": _LLAMA_3}, "behavior": "Isolated"}
    known = {
        ("gpt-2", False): [_byte_level(True)],
        ("smollm", False): [{"type": "Digits", "individual_digits": True}, _byte_level(True)],
        ("llama-bpe", True): [{**split, "invert": False}, _byte_level(False)],
    }
    for (name, ignores_merges), expected in known.items():
        if steps == expected and bool(model.get("ignore_merges")) == ignores_merges:
            return name
    raise InputError(
        f"the tokenizer splits text in a way that this exporter does not know; {CONVERTER}"
    )


def _steps(pre_tokenizer: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    if pre_tokenizer is None:
        return []
    if pre_tokenizer["type"] == "Sequence":
        return [step for part in pre_tokenizer["pretokenizers"] for step in _steps(part)]
    # Offsets play no part in ids.
    return [{key: value for key, value in pre_tokenizer.items() if key != "trim_offsets"}]


def _byte_level(splits: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "use_regex": splits}
