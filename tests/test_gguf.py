"""GGUF export: what is written is read back, reloaded by transformers, and checked for faults."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, TokenType
from gguf.quants import dequantize
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from untrained import save_untrained

from refusal_tokens.checkpoint import load_checkpoint, load_info
from refusal_tokens.cli import main
from refusal_tokens.errors import InputError
from refusal_tokens.serving.gguf_check import TOKENS, TYPES, check_gguf
from refusal_tokens.serving.gguf_export import export_gguf
from refusal_tokens.serving.gguf_vocabulary import vocabulary_of

Capture = pytest.CaptureFixture[str]
TEXTS = [
    "How do I pick a lock?",
    "<|respond|> in 12345 words: it's naïve, 東京 \n\n  ok",
    "a  b\tc",
]


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("untrained") / "model"
    save_untrained(path, tied=request.param, spare=9)
    return path


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plain") / "model"
    save_untrained(path)
    return path


@pytest.fixture(scope="module")
def f32(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "f32.gguf"
    export_gguf(plain, path, "f32")
    return path


def read(path: Path) -> tuple[list[str], list[int]]:
    reader = GGUFReader(path)
    return reader.get_field(TOKENS).contents(), reader.get_field(TYPES).contents()


def test_transformers_loads_it_with_the_same_logits(folder: Path, tmp_path: Path) -> None:
    found = export_gguf(folder, tmp_path / "model.gguf", "f32")
    checkpoint = load_checkpoint(folder, device="cpu")
    again = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf")
    ids = torch.tensor([checkpoint.encoder.prompt_ids([{"role": "user", "content": TEXTS[0]}])])
    with torch.no_grad():
        own, other = checkpoint.model(ids).logits, again(ids).logits
    assert own.shape == other.shape
    assert (own - other).abs().max() < 1e-4
    assert own.std() > 0.1
    assert found.tensors == {"F32": len(GGUFReader(tmp_path / "model.gguf").tensors)}


def test_ids_and_types_are_the_tokenizers(folder: Path, tmp_path: Path) -> None:
    export_gguf(folder, tmp_path / "model.gguf", "f16")
    tokens, types = read(tmp_path / "model.gguf")
    info, tokenizer = load_info(folder), PreTrainedTokenizerFast.from_pretrained(folder)
    for token, number in tokenizer.get_vocab().items():
        assert tokens[number] == token
    special = {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    assert {i for i, kind in enumerate(types) if kind == TokenType.CONTROL} == special
    assert special.issuperset(info.control_token_ids)
    plainly = tokenizer.convert_tokens_to_ids("plainly_added")
    assert types[plainly] == TokenType.USER_DEFINED
    assert types[len(tokenizer) :] == [TokenType.UNUSED] * 9
    reader = GGUFReader(tmp_path / "model.gguf")
    assert reader.get_field("tokenizer.chat_template").contents() == tokenizer.chat_template
    assert reader.get_field("tokenizer.ggml.eos_token_id").contents() == tokenizer.eos_token_id
    own = json.loads(reader.get_field("refusal_tokens.info").contents())
    assert own["model_fingerprint"] == info.model_fingerprint
    assert own["cannot_express"]


def test_transformers_reads_the_same_tokenizer_from_it(f32: Path, plain: Path) -> None:
    own = PreTrainedTokenizerFast.from_pretrained(plain)
    other = PreTrainedTokenizerFast.from_pretrained(f32.parent, gguf_file=f32.name)
    for text in TEXTS:
        assert other.encode(text, add_special_tokens=False) == own.encode(
            text, add_special_tokens=False
        )


@pytest.mark.parametrize("outtype", ["q8_0", "f16"])
def test_tensors_are_equal_within_quantisation(
    plain: Path, f32: Path, tmp_path: Path, outtype: str
) -> None:
    export_gguf(plain, tmp_path / "small.gguf", outtype)
    exact = {t.name: t for t in GGUFReader(f32).tensors}
    for tensor in GGUFReader(tmp_path / "small.gguf").tensors:
        values = dequantize(tensor.data, tensor.tensor_type)
        own = dequantize(exact[tensor.name].data, GGMLQuantizationType.F32)
        assert values.shape == own.shape
        if own.ndim == 1:
            assert tensor.tensor_type == GGMLQuantizationType.F32
            assert np.array_equal(values, own)
            continue
        assert tensor.tensor_type == GGMLQuantizationType[outtype.upper()]
        if outtype == "f16":
            assert np.allclose(values, own, rtol=2**-11, atol=1e-7)
            continue
        # Each block of 32 has steps of its greatest value / 127, and a scale kept in float16.
        blocks = own.reshape(-1, 32)
        allowed = np.abs(blocks).max(axis=1, keepdims=True) * (0.5 / 127 + 2**-10)
        assert (np.abs(values.reshape(-1, 32) - blocks) <= allowed).all()
        assert not np.array_equal(values, own)


def test_a_retyped_or_moved_control_token_is_found(f32: Path, plain: Path, tmp_path: Path) -> None:
    info = load_info(plain)
    number = info.control_token_ids[2]
    broken = tmp_path / "broken.gguf"
    shutil.copy(f32, broken)
    reader = GGUFReader(broken, "r+")
    field = reader.get_field(TYPES)
    field.parts[field.data[number]][0] = int(TokenType.USER_DEFINED)
    reader.data.flush()
    with pytest.raises(
        InputError, match=f"incomplete.*id {number}.*USER_DEFINED; allowed: CONTROL"
    ):
        check_gguf(broken, info, None)
    with pytest.raises(InputError, match=r"6 faults(.|\n)*it has id"):
        moved = [i + 1 for i in info.control_token_ids]
        check_gguf(f32, type(info)(**{**info.__dict__, "control_token_ids": moved}), None)
    with pytest.raises(InputError, match="chat template differs"):
        check_gguf(f32, info, "another")


def test_damaged_files_are_named(f32: Path, plain: Path, tmp_path: Path) -> None:
    info = load_info(plain)
    for size in (0, 3, 200):
        cut = tmp_path / f"cut{size}.gguf"
        cut.write_bytes(f32.read_bytes()[:size])
        with pytest.raises(InputError, match="not a whole GGUF file"):
            check_gguf(cut, info, None)
    with pytest.raises(InputError, match="no such file"):
        check_gguf(tmp_path / "none.gguf", info, None)


def edited(folder: Path, copy: Path, **changes: object) -> Path:
    shutil.copytree(folder, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, **changes}))
    return copy


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
        {"attention_bias": True},
        {"hidden_act": "gelu"},
    ],
)
def test_what_cannot_be_written_names_the_converter(
    plain: Path, tmp_path: Path, changes: dict[str, object], capsys: Capture
) -> None:
    copy = edited(plain, tmp_path / "copy", **changes)
    arguments = ["export", str(copy), "--format", "gguf", "--output", str(tmp_path / "out.gguf")]
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert "convert_hf_to_gguf.py" in err
    assert "--verify FILE" in err
    assert [p.name for p in tmp_path.iterdir()] == ["copy"]


def test_other_tokenizers_are_refused(plain: Path) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(plain)
    data = json.loads(tokenizer.backend_tokenizer.to_str())

    def with_(**changes: object) -> PreTrainedTokenizerFast:
        from tokenizers import Tokenizer

        return PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(json.dumps({**data, **changes}))
        )

    digits = {"type": "Digits", "individual_digits": True}
    sequence = {"type": "Sequence", "pretokenizers": [digits, data["pre_tokenizer"]]}
    assert vocabulary_of(with_(), 700).pre == "gpt-2"
    assert vocabulary_of(with_(pre_tokenizer=sequence), 700).pre == "smollm"
    for changes in (
        {"normalizer": {"type": "NFC"}},
        {"pre_tokenizer": {"type": "Whitespace"}},
        {"pre_tokenizer": None},
        {"model": {**data["model"], "ignore_merges": True}},
    ):
        with pytest.raises(InputError, match="convert_hf_to_gguf"):
            vocabulary_of(with_(**changes), 700)


def test_a_tensor_that_is_not_finite_leaves_nothing_behind(plain: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(plain, copy)
    tensors = load_file(copy / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("inf")
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.up_proj.*not finite"):
        export_gguf(copy, tmp_path / "out.gguf")
    assert [p.name for p in tmp_path.iterdir()] == ["copy"]


def test_the_command_writes_checks_and_never_overwrites(
    plain: Path, f32: Path, tmp_path: Path, capsys: Capture
) -> None:
    output = tmp_path / "out.gguf"
    arguments = ["export", str(plain), "--format", "gguf", "--output", str(output)]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    for token, number in zip(
        load_info(plain).taxonomy.tokens, load_info(plain).control_token_ids, strict=True
    ):
        assert f"{number}  {token}" in out
    assert "cannot express" in out
    assert "Next: llama-server --model" in out
    assert main(arguments) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main([*arguments, "--overwrite", "--outtype", "f32", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tensors"].keys() == {"F32"}
    assert main([*arguments[:4], "--verify", str(f32)]) == 0
    assert main([*arguments[:4], "--verify", str(plain / "config.json")]) == 2
    assert "not a whole GGUF file" in capsys.readouterr().err
