"""A completions API on 127.0.0.1, backed by a real model in this process.

It stands for servers that differ in what they take and show; every answer is computed.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch

from refusal_tokens.checkpoint import Checkpoint

STRICT_FIELDS = {
    *("model", "prompt", "n", "max_tokens", "temperature", "top_p", "seed", "stop", "logprobs"),
    *("logit_bias", "presence_penalty", "frequency_penalty"),
}


@dataclass
class Server:
    """What one kind of server does.

    Attributes:
        lists: most log-probabilities it lists; more is HTTP 400. None: as many as asked for.
        names_ids: takes ``logprob_token_ids``.
        shows_bias: its log-probabilities are those after ``logit_bias``.
        form: of the log-probabilities: ``spelled``, ``ids`` (vLLM) or ``content`` (llama.cpp).
        strict: HTTP 400 for fields that OpenAI does not have.
        prompts: ``ids``; ``text`` answers HTTP 422 to ids; ``joined`` counts them as characters.
        busy: how many requests to answer with HTTP 503 first.
        broken: answers what is no log-probability.
    """

    checkpoint: Checkpoint
    lists: int | None = None
    names_ids: bool = False
    shows_bias: bool = False
    form: str = "spelled"
    strict: bool = False
    prompts: str = "ids"
    busy: int = 0
    broken: float | None = None
    url: str = ""
    seen: list[dict[str, Any]] = field(default_factory=list)
    lock: Any = field(default_factory=threading.Lock)

    def answer(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        self.seen.append(body)
        unknown = sorted(set(body) - STRICT_FIELDS)
        if self.strict and unknown:
            return 400, {"error": {"message": f"unrecognized field {unknown[0]}"}}
        if self.prompts == "text":
            return 422, {"detail": "prompt must be a string"}
        if self.lists is not None and (body.get("logprobs") or 0) > self.lists:
            return 400, {"error": {"message": f"logprobs may be {self.lists} at most"}}
        with self.lock, torch.no_grad():
            return 200, self._complete(body)

    def _complete(self, body: dict[str, Any]) -> dict[str, Any]:
        prompt, tokenizer = list(body["prompt"]), self.checkpoint.tokenizer
        bias = {int(k): v for k, v in (body.get("logit_bias") or {}).items()}
        ends = self.checkpoint.model.generation_config.eos_token_id
        ids: list[int] = []
        shown: list[torch.Tensor] = []
        for _ in range(body.get("max_tokens", 16)):
            raw = self.checkpoint.model(torch.tensor([prompt + ids])).logits[0, -1].double()
            biased = raw.clone()
            for token, value in bias.items():
                biased[token] += value
            shown.append(torch.log_softmax(biased if self.shows_bias else raw, dim=0))
            ids.append(self._sample(biased, body))
            if ids[-1] in ends:
                break
        counted = len(json.dumps(prompt)) if self.prompts == "joined" else len(prompt)
        choice: dict[str, Any] = {"text": tokenizer.decode(ids, skip_special_tokens=True)}
        if body.get("logprobs") is not None:
            choice["logprobs"] = self._logprobs(ids, shown, body)
        if body.get("return_token_ids") and self.names_ids:
            choice["token_ids"] = ids
        return {"choices": [choice], "usage": {"prompt_tokens": counted}}

    def _sample(self, logits: torch.Tensor, body: dict[str, Any]) -> int:
        if body.get("temperature") == 0:
            return int(logits.argmax())
        return int(torch.multinomial(torch.softmax(logits, dim=0), 1))

    def _logprobs(
        self, ids: list[int], shown: list[torch.Tensor], body: dict[str, Any]
    ) -> dict[str, Any]:
        named = body.get("logprob_token_ids") if self.names_ids else None
        rows = []
        for values in shown:
            top = named or values.topk(min(body["logprobs"], len(values))).indices.tolist()
            rows.append({token: self.broken or float(values[token]) for token in top})
        if self.form == "content":
            entries = [
                {"id": i, "top_logprobs": [{"id": t, "token": "", "logprob": v} for t, v in r]}
                for i, r in zip(ids, (row.items() for row in rows), strict=True)
            ]
            return {"content": entries}
        spell = self.checkpoint.tokenizer.decode
        as_ids = self.form == "ids" and body.get("return_tokens_as_token_ids")
        return {
            "top_logprobs": [
                {f"token_id:{t}" if as_ids else spell([t]): v for t, v in row.items()}
                for row in rows
            ]
        }


@contextmanager
def running(server: Server) -> Iterator[Server]:
    """Serve on a free port of 127.0.0.1 while the block runs; ``server.url`` is the address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._send(200, {"data": [{"id": "tiny-model"}]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if server.busy:
                server.busy -= 1
                self._send(503, {"error": "loading"})
            else:
                self._send(*server.answer(body))

        def _send(self, status: int, answer: dict[str, Any]) -> None:
            data = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        server.url = f"http://127.0.0.1:{http.server_port}/v1"
        threading.Thread(target=http.serve_forever, daemon=True).start()
        try:
            yield server
        finally:
            http.shutdown()


def vllm_like(checkpoint: Checkpoint) -> Server:
    return Server(checkpoint, lists=20, names_ids=True, form="ids")


def llama_like(checkpoint: Checkpoint) -> Server:
    return Server(checkpoint, form="content")


def openai_like(checkpoint: Checkpoint) -> Server:
    return Server(checkpoint, lists=20, shows_bias=True, strict=True)
