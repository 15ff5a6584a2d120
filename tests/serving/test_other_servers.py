"""The client and the GGUF export with real servers, where they are installed.

``LLAMA_SERVER`` names llama.cpp's server, ``LLAMA_CPP_PYTHON`` a Python with llama-cpp-python and
its server; vLLM has to be installed in this one.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from conftest import ROWS

from refusal_tokens.checkpoint import load_checkpoint, load_info
from refusal_tokens.decision import decide
from refusal_tokens.errors import InputError
from refusal_tokens.policy import Policy
from refusal_tokens.prefill import last_logits
from refusal_tokens.serving.client import SteeredClient
from refusal_tokens.serving.gguf_export import export_gguf
from refusal_tokens.taxonomy import default_taxonomy

pytestmark = pytest.mark.serving
KNOBS = default_taxonomy().knobs
LLAMA_SERVER = os.environ.get("LLAMA_SERVER") or shutil.which("llama-server")
LLAMA_CPP_PYTHON = os.environ.get("LLAMA_CPP_PYTHON")
PROMPTS = [row[0] for row in ROWS] + ["Name a bird. <|refuse:safety|>"]
POLICIES = [Policy(), Policy(rule="bias", bias={"safety": 2.0}), Policy(bias={"incomplete": -3.0})]


@contextmanager
def server(command: Sequence[str], seconds: float, **variables: str) -> Iterator[str]:
    """Run a server on a free port until the block ends; give its address once it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}/v1"
    full = [*command, "--host", "127.0.0.1", "--port", str(port)]
    with subprocess.Popen(
        full, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, **variables}
    ) as process:
        try:
            for _ in range(int(seconds)):
                assert process.poll() is None, f"{command[0]} ended with {process.returncode}"
                try:
                    urllib.request.urlopen(f"{url}/models", timeout=5).close()
                    break
                except (urllib.error.URLError, OSError):
                    time.sleep(1)
            yield url
        finally:
            process.terminate()


def check_against_the_model(client: SteeredClient, folder: Path, tolerance: float) -> None:
    """Control logits, decisions and replies are those of the model in transformers."""
    checkpoint = load_checkpoint(folder, dtype="float32", device="cpu")
    ids = list(checkpoint.info.control_token_ids)
    prompts = [checkpoint.encoder.prompt_ids([{"role": "user", "content": p}]) for p in PROMPTS]
    own = np.stack([last_logits(checkpoint, [p])[0, ids].numpy() for p in prompts])
    found = client.decide(PROMPTS)
    read = np.stack([decision.control_logits for decision in found])
    assert np.abs((read - read[:, :1]) - (own - own[:, :1])).max() < tolerance
    for policy in POLICIES:
        expected = decide(read, policy.knobs(checkpoint.info.taxonomy))
        replies = client.generate(PROMPTS, policy, max_tokens=3)
        names = [None, *checkpoint.info.taxonomy.knobs]
        assert [reply.category for reply in replies] == [names[index] for index in expected]
        assert all(len(reply.token_ids) > 1 and "<|" not in reply.text for reply in replies)


@pytest.mark.skipif(not LLAMA_SERVER, reason="llama-server is not on the path or in LLAMA_SERVER")
def test_llama_server(tiny_run: Path, tmp_path: Path) -> None:
    export_gguf(tiny_run, tmp_path / "tiny.gguf", "f32")
    command = [str(LLAMA_SERVER), "-m", str(tmp_path / "tiny.gguf"), "-c", "2048", "-t", "1"]
    with server(command, 60) as url:
        client = SteeredClient.connect(url, tiny_run)
        assert client.capabilities.reading == "listing"
        # llama.cpp rounds keys and values to float16.
        check_against_the_model(client, tiny_run / "model", 0.05)


@pytest.mark.skipif(not LLAMA_CPP_PYTHON, reason="LLAMA_CPP_PYTHON names no Python with llama_cpp")
def test_the_server_of_llama_cpp_python_is_refused(tiny_run: Path, tmp_path: Path) -> None:
    export_gguf(tiny_run, tmp_path / "tiny.gguf", "f32")
    command = [str(LLAMA_CPP_PYTHON), "-m", "llama_cpp.server", "--n_ctx", "1024"]
    with (
        server([*command, "--model", str(tmp_path / "tiny.gguf")], 120) as url,
        pytest.raises(InputError, match="a prompt of token ids is needed"),
    ):
        SteeredClient.connect(url, tiny_run)


TOKENISE = (
    "import sys, json; from llama_cpp import Llama\n"
    "llm = Llama(sys.argv[1], vocab_only=True, verbose=False)\n"
    "print(json.dumps([llm.tokenize(t.encode(), add_bos=False, special=s == '1')\n"
    "                  for t, s in json.load(sys.stdin)]))"
)


@pytest.mark.skipif(not LLAMA_CPP_PYTHON, reason="LLAMA_CPP_PYTHON names no Python with llama_cpp")
def test_llama_cpp_tokenises_as_the_checkpoint_does(tiny_run: Path, tmp_path: Path) -> None:
    import json

    export_gguf(tiny_run, tmp_path / "tiny.gguf", "f32")
    checkpoint = load_checkpoint(tiny_run, device="cpu")
    texts = [*PROMPTS, "12345 it's naïve, 東京 \n\n  ok", "  two  spaces", "<|respond|>"]
    result = subprocess.run(
        [str(LLAMA_CPP_PYTHON), "-c", TOKENISE, str(tmp_path / "tiny.gguf")],
        input=json.dumps([[t, "0"] for t in texts] + [["<|respond|>", "1"]]),
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(result.stdout)
    assert found[:-1] == [checkpoint.encoder.encode_text(text) for text in texts]
    assert found[-1] == [load_info(tiny_run).control_token_ids[0]]


@pytest.mark.skipif(find_spec("vllm") is None, reason="vllm is not installed here")
def test_vllm_without_the_plugin(checkpoint: Path) -> None:
    folder = checkpoint / "model"
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    options = ["--enforce-eager", "--max-model-len", "1024", "--dtype", "float32"]
    variables = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_PLUGINS": ""}
    with server([*command, *options], 600, **variables) as url:
        client = SteeredClient.connect(url, folder)
        assert client.capabilities.reading == "token_ids"
        check_against_the_model(client, folder, 0.01)
