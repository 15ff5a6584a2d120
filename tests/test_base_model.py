"""The bundled base model as it is unpacked."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from refusal_tokens.base_model import BUNDLED, BUNDLED_PACKAGE, load_tokenizer, resolve


@pytest.mark.model
def test_the_bundled_template_lacks_the_default_system_message_and_nothing_else() -> None:
    spec = importlib.util.find_spec(BUNDLED_PACKAGE)
    assert spec
    assert spec.submodule_search_locations
    package = Path(spec.submodule_search_locations[0])
    gguf = next(package.glob("*.gguf"))
    own = AutoTokenizer.from_pretrained(package, gguf_file=gguf.name)
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello <b>there</b>\n"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "Bye."},
    ]

    def rendered(tokenizer: Any, messages: list[dict[str, str]]) -> str:
        return str(
            tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        )

    bundled = load_tokenizer(resolve(BUNDLED))
    assert rendered(bundled, turns) == rendered(own, turns)
    plain = rendered(bundled, turns[1:])
    assert plain.startswith("<|im_start|>user")
    assert rendered(own, turns[1:]).endswith(f"<|im_end|>\n{plain}")
