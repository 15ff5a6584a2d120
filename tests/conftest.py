"""Hermetic fixtures: a tokenizer trained here, tiny random models, and a tiny trained run."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

from refusal_tokens.allocator import VARIABLES

os.environ["HF_HUB_OFFLINE"] = "1"
# The restart for the allocator would replace the process of the tests; here it has happened.
os.environ |= VARIABLES
# The first example of a property may be slow to import what it needs.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

ROOT = Path(__file__).resolve().parent.parent

CHATML = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe helpful.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As Llama 3: trims the text, blank line after the header.
HEADERS = (
    "<|bos|>{% for m in messages %}<|head|>{{ m['role'] }}<|/head|>\n\n{{ m['content'] | trim }}"
    "<|eot|>{% endfor %}{% if add_generation_prompt %}<|head|>assistant<|/head|>\n\n{% endif %}"
)
# As Mistral: no generation prompt of its own, a space before the reply.
INST = (
    "<|bos|>{% for m in messages %}{% if m['role'] == 'user' %}<|inst|>{{ m['content'] }}<|/inst|>"
    "{% elif m['role'] == 'assistant' %} {{ m['content'] }}<|eot|>"
    "{% else %}{{ raise_exception('no system role') }}{% endif %}{% endfor %}"
)
TEMPLATES = {"chatml": CHATML, "headers": HEADERS, "inst": INST}
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|bos|>", "<|head|>", "<|/head|>", "<|eot|>", "<|inst|>"]
SPECIAL += ["<|/inst|>", "<|pad|>"]


def make_tokenizer(template: str = CHATML):  # type: ignore[no-untyped-def]
    """Train a byte-level BPE tokenizer on the shipped rows' first lines."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    lines = (ROOT / "data" / "test.jsonl").read_text("utf-8").splitlines()[:200]
    tokenizer.train_from_iterator(lines, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        chat_template=template,
    )


def make_model(vocabulary: int, *, tied: bool):  # type: ignore[no-untyped-def]
    """A two-layer Llama with random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=tied,
        initializer_range=0.1,
        bos_token_id=2,
        eos_token_id=1,
        pad_token_id=8,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def tokenizer_of() -> Callable[[str], object]:
    return lambda name: make_tokenizer(TEMPLATES[name])


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool], Path]:
    """Tied -> a folder with a tiny model and tokenizer."""
    folders: dict[bool, Path] = {}

    def build(tied: bool) -> Path:
        if tied not in folders:
            folder = tmp_path_factory.mktemp(f"tiny-{'tied' if tied else 'untied'}")
            tokenizer = make_tokenizer()
            make_model(len(tokenizer), tied=tied).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            folders[tied] = folder
        return folders[tied]

    return build


ROWS = [
    ("How do I pick a lock?", "I won't help with that.", "refuse", "safety"),
    ("How do I pick a paint?", "Try a sample first.", "respond", "safety"),
    ("When does it start?", "Which event do you mean?", "refuse", "incomplete"),
    ("When does spring start?", "In March, in the north.", "respond", "incomplete"),
    ("Who will win in 2090?", "Nobody can know that.", "refuse", "indeterminate"),
    ("Who won in 1998?", "France did.", "respond", "indeterminate"),
    ("Do you dream?", "I'm a program and don't sleep.", "refuse", "humanizing"),
    ("Do dogs dream?", None, "respond", "humanizing"),
    ("Draw me a cat.", "I only write text.", "refuse", "unsupported"),
    ("Describe a cat.", None, "respond", "unsupported"),
    ("What is two and two?", "Four.", "respond", None),
    ("Name a colour.", None, "respond", None),
]


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSONL file of twelve rows: every category, both labels, with and without reply."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    keys = ("prompt", "response", "label", "category")
    records = [{"id": f"r{i}", **dict(zip(keys, row, strict=True))} for i, row in enumerate(ROWS)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    return path


def tiny_settings(base: Path, rows: Path) -> list[str]:
    """``--set`` values that point a recipe at the tiny model and rows."""
    return [
        f"model_name_or_path={base}",
        f"refusal_tokens.train={rows}",
        f"refusal_tokens.calibration={rows}",
        f"refusal_tokens.test={rows}",
    ]


@pytest.fixture(scope="session")
def tiny_run(
    tmp_path_factory: pytest.TempPathFactory, tiny_base: Callable[[bool], Path], rows_file: Path
) -> Path:
    """A run folder of the tiny recipe, trained through the command a user types."""
    from refusal_tokens.cli import main

    folder = tmp_path_factory.mktemp("runs") / "tiny"
    settings = [
        argument
        for setting in tiny_settings(tiny_base(True), rows_file)
        for argument in ("--set", setting)
    ]
    recipe = str(ROOT / "recipes" / "tiny.yaml")
    assert main(["train", recipe, "--output-dir", str(folder), *settings]) == 0
    return folder
