"""``serve``: a vLLM server whose clients can move the knobs within the operator's bounds."""

from __future__ import annotations

import argparse
from typing import Any

from refusal_tokens.commands.common import command


def add(commands: Any) -> None:
    """Add the subcommand."""
    added = command(
        commands, "serve", _serve, "Serve a checkpoint with vLLM, its knobs set for each request."
    )
    added.add_argument("checkpoint", help="a checkpoint or run folder")
    added.add_argument(
        "--policy",
        nargs="+",
        action="extend",
        default=[],
        metavar="FILE|FOLDER",
        help="policy files or a folder; the default is default.json, or else the first file; files "
        "that change are read again",
    )
    added.add_argument(
        "--host", default="127.0.0.1", help="default: %(default)s, this machine only"
    )
    added.add_argument("--port", type=int, default=8000, help="default: 8000")
    added.add_argument(
        "--out-of-bounds",
        choices=["reject", "clamp"],
        default="reject",
        help="knobs beyond a policy's bounds: HTTP 400 (default), or the nearest bound",
    )
    added.add_argument(
        "--vllm",
        default="",
        metavar="OPTIONS",
        help="further options of vLLM, such as --vllm='--max-model-len 4096 --dtype bfloat16'",
    )
    added.add_argument("--dry-run", action="store_true", help="check all, print the command, stop")


def _serve(options: argparse.Namespace) -> None:
    import os
    import shlex
    import sys
    from pathlib import Path

    from refusal_tokens.serving.launch import Server, examples

    server = Server(
        Path(options.checkpoint),
        [Path(path) for path in options.policy],
        options.host,
        options.port,
        options.out_of_bounds == "clamp",
        options.vllm,
    )
    store = server.check()
    print(f"Policies: {', '.join(store.policies)}; where a request names none: {store.default}")
    if options.dry_run:
        settings = [f"{name}={shlex.quote(value)}" for name, value in server.environment().items()]
        print(f"\n{' '.join(settings)} {shlex.join(server.command())}\n")
        return
    print(f"Address: {server.url}  (ready when vLLM says: Application startup complete)\n")
    print(examples(server, store), flush=True)
    sys.stdout.flush()
    os.execve(sys.executable, server.command(), {**os.environ, **server.environment()})
