"""ASGI middleware in front of a vLLM server: checks each request, and completes each reply.

Pass it with ``--middleware refusal_tokens.serving.middleware.Guard``; ``refusal-tokens serve``
does. It runs before the server's own authentication, which still applies to what it lets through.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

from refusal_tokens.errors import InputError
from refusal_tokens.serving.metrics import decision_counter
from refusal_tokens.serving.policies import POLICY_KEY, PolicyStore, server_store
from refusal_tokens.serving.replies import END, Record, ReplyFilter, dump
from refusal_tokens.serving.requests import (
    CHAT,
    MAX_BODY_BYTES,
    PROBABILITIES_KEY,
    ROUTES,
    checked,
    parse_body,
)

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]
# vLLM acts on some headers (a rank, a session); what is not named here is dropped.
HEADERS = (b"host", b"authorization", b"user-agent", b"accept", b"connection", b"x-request-id")


class Guard:
    """Lets through the routes and fields of ``requests``, with the knobs that the policy allows."""

    def __init__(
        self, app: App, store: PolicyStore | None = None, record: Record | None = None
    ) -> None:
        """Wrap an application.

        Args:
            app: the server.
            store: default: what the environment names.
            record: called with category and policy of each decision; default: the Prometheus
                counter.

        Raises:
            InputError: if there is no store, or a policy is broken: the server does not start.
        """
        found = store or server_store()
        if found is None:
            raise InputError("no checkpoint named; start the server with: refusal-tokens serve")
        self._app, self._store = app, found
        self._record = record or decision_counter()
        self._control = frozenset(found.info.control_token_ids)

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        method, path = scope["method"], scope["path"]
        if (method, path) not in ROUTES or scope.get("root_path"):
            await _refuse(send, 404, f"{method} {path}: this server has {_routes()}")
            return
        asked = scope["headers"]
        headers = [(name, value) for name, value in asked if name in HEADERS]
        scope = {**scope, "query_string": b"", "headers": headers}
        if path == CHAT:
            await self._chat(scope, asked, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _chat(
        self,
        scope: MutableMapping[str, Any],
        asked: Iterable[tuple[bytes, bytes]],
        receive: Receive,
        send: Send,
    ) -> None:
        kind = dict(asked).get(b"content-type", b"").decode("latin-1")
        if kind.partition(";")[0].strip().lower() != "application/json":
            # Browsers let any web page send other types to this address without asking first.
            await _refuse(send, 415, f"content-type: found {kind!r}; allowed: application/json")
            return
        body = await _read(receive)
        if body is None:
            await _refuse(send, 413, f"the request body is longer than {MAX_BODY_BYTES} bytes")
            return
        try:
            data, replies = self._admitted(body)
        except InputError as error:
            await _refuse(send, 400, str(error))
            return
        payload = dump(data)
        scope["headers"] += [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(payload)).encode()),
        ]
        await self._app(scope, _replay(payload, receive), _Rewriter(replies, send))

    def _admitted(self, body: bytes) -> tuple[dict[str, Any], ReplyFilter]:
        """Return what vLLM is asked, and what is done with its reply.

        Raises:
            InputError: for whatever is not allowed.
        """
        data = checked(parse_body(body), self._control)
        arguments = data.pop("vllm_xargs", {})
        wants = bool(arguments.pop(PROBABILITIES_KEY, False))
        setting = self._store.resolve(arguments)
        data["return_token_ids"] = True
        # Named even where the client named none: a reload may bring another default before the
        # engine looks, and the reply says this one.
        data["vllm_xargs"] = {**arguments, POLICY_KEY: setting.name}
        if wants:
            data |= {
                "logprobs": True,
                "logprob_token_ids": list(self._store.info.control_token_ids),
            }
        forced = data.get("tool_choice") not in (None, "none", "auto")
        return data, ReplyFilter(self._store.info, setting.name, wants, forced, self._record)


class _Rewriter:
    """A ``send`` that rewrites JSON replies whole and streams event by event."""

    def __init__(self, replies: ReplyFilter, send: Send) -> None:
        self._replies, self._send = replies, send
        self._start: Message = {}
        self._buffer = b""

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._start = message
            return
        if message["type"] != "http.response.body":
            await self._send(message)
            return
        more = message.get("more_body", False)
        self._buffer += message.get("body", b"")
        kind = dict(self._start["headers"]).get(b"content-type", b"")
        if self._start["status"] == 200 and kind.startswith(b"text/event-stream"):
            await self._events(more)
        elif not more:
            await self._whole(kind)

    async def _events(self, more: bool) -> None:
        *events, self._buffer = self._buffer.split(END)
        if not more and self._buffer:
            events.append(self._buffer)
        body = b"".join(map(self._replies.event, events))
        if self._start.pop("type", None):
            await self._send({**self._start, "type": "http.response.start"})
        if body or not more:
            await self._send({"type": "http.response.body", "body": body, "more_body": more})

    async def _whole(self, kind: bytes) -> None:
        body = self._buffer
        if self._start["status"] == 200 and kind.startswith(b"application/json"):
            body = dump(self._replies.reply(json.loads(body)))
        headers = [(k, v) for k, v in self._start["headers"] if k.lower() != b"content-length"]
        headers.append((b"content-length", str(len(body)).encode()))
        await self._send({**self._start, "headers": headers})
        await self._send({"type": "http.response.body", "body": body})


async def _read(receive: Receive) -> bytes | None:
    """Return the request body; None if it is too long."""
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return bytes(body)
        body += message.get("body", b"")
        if len(body) > MAX_BODY_BYTES:
            return None
        if not message.get("more_body"):
            return bytes(body)


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return a ``receive`` that gives the body once, then what the client does next."""
    waiting = [body]

    async def give() -> Message:
        if waiting:
            return {"type": "http.request", "body": waiting.pop(), "more_body": False}
        return await receive()

    return give


async def _refuse(send: Send, status: int, text: str) -> None:
    kind = "invalid_request_error"
    body = dump({"error": {"message": text, "type": kind, "param": None, "code": status}})
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _routes() -> str:
    return ", ".join(sorted(f"{method} {path}" for method, path in ROUTES))
