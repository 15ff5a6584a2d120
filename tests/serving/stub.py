"""A server behind the middleware that writes down what reaches it, and calls over ASGI."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

from serving.bypass import Attempt


@dataclass
class Stub:
    """Answers chat requests with what it is told to, as vLLM would write it."""

    events: Sequence[bytes] = ()
    reply: dict[str, Any] = field(default_factory=dict)
    status: int = 200
    seen: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    scopes: list[Any] = field(default_factory=list)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.scopes.append(scope)
        body = (await receive())["body"] if scope["method"] == "POST" else b"{}"
        self.seen.append((scope["path"], json.loads(body or b"{}")))
        kind = b"text/event-stream" if self.events else b"application/json"
        headers = [(b"content-type", kind)]
        await send({"type": "http.response.start", "status": self.status, "headers": headers})
        if not self.events:
            await send({"type": "http.response.body", "body": json.dumps(self.reply).encode()})
            return
        for event in self.events:
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


@dataclass
class Answer:
    """What came back."""

    status: int
    headers: dict[str, str]
    body: bytes
    messages: list[Any]

    @property
    def data(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> str:
        return str(self.data["error"]["message"])


def call(app: Any, attempt: Attempt) -> Answer:
    """Send one request, as an HTTP server would hand it on."""
    path, _, query = attempt.path.partition("#")[0].partition("?")
    scope = {
        "type": "http",
        "method": attempt.method,
        "path": unquote(path),
        "query_string": query.encode(),
        "headers": [(k.lower().encode(), v.encode()) for k, v in attempt.headers],
        "root_path": "",
    }
    sent: list[Any] = []
    waiting = [
        {"type": "http.request", "body": attempt.body[:100], "more_body": True},
        {"type": "http.request", "body": attempt.body[100:], "more_body": False},
    ]

    async def receive() -> Any:
        return waiting.pop(0) if waiting else {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(app(scope, receive, send))
    start = sent[0]
    headers = {k.decode(): v.decode() for k, v in start["headers"]}
    body = b"".join(message.get("body", b"") for message in sent[1:])
    return Answer(start["status"], headers, body, sent)
