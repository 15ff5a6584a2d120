"""A checkpoint as one GGUF file for llama.cpp, control tokens marked special.

For the llama architecture (SmolLM2, Llama 3 without stretched positions); llama.cpp's own converter
writes others.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from gguf import (
    GGML_QUANT_VERSION,
    MODEL_ARCH,
    GGMLQuantizationType,
    GGUFWriter,
    LlamaFileType,
    TensorNameMap,
    get_tensor_name_map,
)
from gguf.quants import quant_shape_to_byte_shape, quantize
from safetensors import safe_open
from tqdm import tqdm
from transformers import AutoConfig, PretrainedConfig
from transformers import PreTrainedTokenizerFast as Tokenizer

from refusal_tokens.checkpoint import CheckpointInfo, find_checkpoint, load_tokenizer_of
from refusal_tokens.errors import InputError, unknown
from refusal_tokens.files import atomic_file
from refusal_tokens.serving.gguf_check import GgufSummary, check_gguf
from refusal_tokens.serving.gguf_vocabulary import CONVERTER, vocabulary_of

OUTTYPES = {
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "f32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
}
LIMITS = (
    "policy: the file holds weights and vocabulary; biases, rule and bounds stay with the client "
    "(refusal_tokens.serving.client) or a logit-bias export",
    "masking: llama.cpp may open a reply with any token; the client sends the control token",
    "user text: llama.cpp's text and chat routes turn a typed control token into the real one; "
    "send token ids, as the client does",
)


def export_gguf(path: str | Path, output: str | Path, outtype: str = "q8_0") -> GgufSummary:
    """Write a checkpoint as a GGUF file; the file is checked before it is moved into place.

    Args:
        path: checkpoint or run folder.
        output: the file; replaced if it exists.
        outtype: of the matrices: ``q8_0``, ``f16`` or ``f32``; vectors are kept in float32.

    Raises:
        InputError: for another architecture or tokenizer than this exporter knows, tensors that
            are missing or not finite, an unknown ``outtype``.
    """
    if outtype not in OUTTYPES:
        raise InputError(unknown("outtype", outtype, OUTTYPES))
    info, tokenizer = load_tokenizer_of(path)
    folder = find_checkpoint(path)
    config = _config(folder)
    tensors = _Tensors(folder, config)
    kind, file_type = OUTTYPES[outtype]
    with atomic_file(output) as temporary:
        writer = GGUFWriter(temporary, "llama")
        _add_model(writer, config, file_type)
        _add_vocabulary(writer, info, tokenizer, tensors.rows)
        tensors.write(writer, temporary, kind)
        writer.close()
        found = check_gguf(temporary, info, str(tokenizer.chat_template))
    return GgufSummary(**{**found.to_dict(), "path": str(output)})


def _config(folder: Path) -> PretrainedConfig:
    """Read the model's configuration, refusing what the llama architecture cannot say."""
    config = AutoConfig.from_pretrained(str(folder))
    if config.model_type != "llama":
        raise InputError(
            f"{folder}: architecture {config.model_type!r}; this exporter writes llama alone. "
            f"{CONVERTER}"
        )
    rope = (config.rope_parameters or {}).get("rope_type", "default")
    unusual = {
        "rope_type": rope != "default" and rope,
        "hidden_act": config.hidden_act != "silu" and config.hidden_act,
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
    }
    for key, value in unusual.items():
        if value:
            raise InputError(f"{folder}: config.json: {key} {value!r} is not written; {CONVERTER}")
    return config


def _add_model(writer: GGUFWriter, config: PretrainedConfig, file_type: LlamaFileType) -> None:
    writer.add_name(str(config.name_or_path).rpartition("/")[2] or "model")
    writer.add_file_type(file_type)
    writer.add_quantization_version(GGML_QUANT_VERSION)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def _add_vocabulary(
    writer: GGUFWriter, info: CheckpointInfo, tokenizer: Tokenizer, rows: int
) -> None:
    words = vocabulary_of(tokenizer, rows)
    end = info.encoder(tokenizer).reply_ids("x")[-1]
    ids = {
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id if tokenizer.eos_token_id is not None else end,
        "eot": end,
        "pad": tokenizer.pad_token_id,
    }
    writer.add_vocab_size(rows)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(words.pre)
    writer.add_token_list(words.tokens)
    writer.add_token_types(words.types)
    writer.add_token_merges(words.merges)
    writer.add_add_bos_token(words.add_bos)
    for name, number in ids.items():
        if number is not None:
            getattr(writer, f"add_{name}_token_id")(number)
    writer.add_chat_template(str(tokenizer.chat_template))
    known = {
        "model_fingerprint": info.model_fingerprint,
        "taxonomy": info.taxonomy.to_dict(),
        "control_token_ids": list(info.control_token_ids),
        "system_prompt": info.system_prompt,
        "cannot_express": list(LIMITS),
    }
    writer.add_string("refusal_tokens.info", json.dumps(known))


@dataclass(frozen=True)
class _Source:
    """One tensor: its name in the GGUF file, and where it is read from."""

    name: str
    file: Path
    key: str
    shape: tuple[int, ...]


class _Tensors:
    """The tensors of a checkpoint, read one at a time."""

    def __init__(self, folder: Path, config: PretrainedConfig) -> None:
        self._config = config
        self._sources = list(_sources(folder, config))
        names = {source.name: source for source in self._sources}
        if "token_embd.weight" not in names:
            raise InputError(f"{folder}: no embedding among the tensors; is the checkpoint whole?")
        self.rows = names["token_embd.weight"].shape[0]

    def write(self, writer: GGUFWriter, file: Path, kind: GGMLQuantizationType) -> None:
        """Write the head of the file, then every tensor."""
        kinds = [_kind_of(source, kind) for source in self._sources]
        for source, own in zip(self._sources, kinds, strict=True):
            _announce(writer, source, own)
        writer.write_header_to_file(file)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        pairs = zip(self._sources, kinds, strict=True)
        for source, own in tqdm(pairs, "tensors", len(kinds), delay=2, leave=False):
            writer.write_tensor_data(quantize(self._read(source), own))

    def _read(self, source: _Source) -> np.ndarray:
        with safe_open(source.file, framework="pt") as opened:
            values = opened.get_tensor(source.key).to(torch.float32).numpy()
        if not np.isfinite(values).all():
            raise InputError(f"{source.file}: tensor {source.key} holds values that are not finite")
        heads = {
            "attn_q.weight": self._config.num_attention_heads,
            "attn_k.weight": self._config.num_key_value_heads,
        }
        kind = source.name.partition(".")[2].partition(".")[2]
        return _interleaved(values, heads[kind]) if kind in heads else values


def _sources(folder: Path, config: PretrainedConfig) -> Iterator[_Source]:
    names: TensorNameMap = get_tensor_name_map(MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for key in list(opened.keys()):
                if key == "lm_head.weight" and config.tie_word_embeddings:
                    continue
                name = names.get_name(key, try_suffixes=(".weight",))
                if name is None:
                    raise InputError(f"{file}: tensor {key} has no place in GGUF; {CONVERTER}")
                yield _Source(name, file, key, tuple(opened.get_slice(key).get_shape()))


def _kind_of(source: _Source, kind: GGMLQuantizationType) -> GGMLQuantizationType:
    """Vectors stay in float32; a width that blocks of 32 do not divide falls back to float16."""
    if len(source.shape) == 1:
        return GGMLQuantizationType.F32
    if kind == GGMLQuantizationType.Q8_0 and source.shape[-1] % 32:
        return GGMLQuantizationType.F16
    return kind


def _announce(writer: GGUFWriter, source: _Source, kind: GGMLQuantizationType) -> None:
    shape, width = source.shape, 4 if kind == GGMLQuantizationType.F32 else 2
    if kind == GGMLQuantizationType.Q8_0:
        shape, width = quant_shape_to_byte_shape(source.shape, kind), 1
    dtype = {4: np.dtype(np.float32), 2: np.dtype(np.float16), 1: np.dtype(np.uint8)}[width]
    size = int(np.prod(shape)) * width
    writer.add_tensor_info(source.name, shape, dtype, size, raw_dtype=kind)


def _interleaved(values: np.ndarray, heads: int) -> np.ndarray:
    """Order a projection's rows as llama.cpp rotates them: pairs side by side, not in halves."""
    halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(values.shape))
