"""An OpenAI-compatible completions route over HTTP, and what its answers say of tokens."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from http.client import HTTPException
from typing import Any

from refusal_tokens.errors import InputError, unknown

# Answers of an overloaded or restarting server; the same request may fare better in a moment.
BUSY = (429, 502, 503, 504)
WAITS = (0.5, 1.0, 2.0)
ID_PREFIX = "token_id:"


class ServerError(Exception):
    """The server failed, or refused a request; ``status`` is HTTP's, None without an answer."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Completions:
    """The completions route of one server.

    Attributes:
        url: the API's address, such as ``http://127.0.0.1:8000/v1``.
        model: the name it serves the model under.
        api_key: sent as a bearer token; None sends none.
        timeout: seconds to wait for one answer.
    """

    url: str
    model: str
    api_key: str | None = field(default=None, repr=False)
    timeout: float = 120.0

    def complete(self, prompt: Sequence[int], **fields: Any) -> dict[str, Any]:
        """Send one prompt as token ids; return the answer's JSON, with at least one choice.

        Raises:
            ServerError: if the server fails or refuses.
        """
        body = {"model": self.model, "prompt": list(prompt), "n": 1, **fields}
        answer = _request(f"{self.url}/completions", self.api_key, self.timeout, body)
        if not isinstance(answer.get("choices"), list) or not answer["choices"]:
            raise ServerError(f"{self.url}/completions: the answer has no choices")
        return answer


def open_route(
    url: str, model: str | None = None, api_key: str | None = None, timeout: float = 120.0
) -> Completions:
    """Return the route of a server, asking for the model's name where none is given.

    Raises:
        InputError: if the server cannot be reached, or serves no such model.
    """
    url = url.rstrip("/")
    try:
        listed = _request(f"{url}/models", api_key, timeout)
    except ServerError as error:
        hint = "" if url.endswith("/v1") else "; the address usually ends in /v1"
        raise InputError(f"{error}{hint}") from None
    names = [str(entry.get("id")) for entry in listed.get("data", [])]
    if model is None and len(names) != 1:
        raise InputError(f"{url}: serves {len(names)} models; name one of: {', '.join(names)}")
    if model is not None and model not in names:
        raise InputError(f"{url}: {unknown('model', model, names)}")
    return Completions(url, model or names[0], api_key, timeout)


def _request(
    url: str, api_key: str | None, timeout: float, body: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Send a request, again where the server is busy; return the JSON object it answers with."""
    headers = {"Content-Type": "application/json"}
    if api_key is not None:
        headers["Authorization"] = f"Bearer {api_key}"
    data = None if body is None else json.dumps(body).encode()
    for wait in (*WAITS, None):
        try:
            request = urllib.request.Request(url, data, headers)
            with urllib.request.urlopen(request, timeout=timeout) as answer:
                return _object(url, answer.read())
        except urllib.error.HTTPError as error:
            if error.code not in BUSY or wait is None:
                reason = _reason(error.read()) or str(error.reason)
                raise ServerError(f"{url}: HTTP {error.code}: {reason}", error.code) from None
        except (OSError, HTTPException, ValueError) as error:
            # A server that refuses the connection is not there; one that drops it may be busy.
            reason = str(getattr(error, "reason", error))
            dropped = isinstance(error, HTTPException | ConnectionResetError)
            if not dropped or wait is None:
                raise ServerError(f"{url}: cannot be reached ({reason})") from None
        time.sleep(wait)
    raise AssertionError("the last attempt returns or raises")


def _object(url: str, data: bytes) -> dict[str, Any]:
    try:
        found = json.loads(data)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ServerError(f"{url}: the answer is no JSON object")
    return found


def _reason(data: bytes) -> str:
    """The message in an error answer, whichever of the usual places it is in."""
    try:
        found = json.loads(data)
    except ValueError:
        return data.decode("utf-8", "replace").strip()[:300]
    for key in ("error", "message", "detail"):
        found = found.get(key, found) if isinstance(found, dict) else found
    return str(found)[:300]


def listed_logprobs(answer: Mapping[str, Any]) -> dict[int | str, float]:
    """Return the log-probabilities listed for the first token of an answer, nats.

    Keys are token ids where the server tells them, else the tokens' spellings. Two forms are read:
    OpenAI's ``top_logprobs`` (spellings, or vLLM's ``token_id:N``), and llama.cpp's ``content``
    (entries with ``id``).
    """
    found = answer["choices"][0].get("logprobs") or {}
    if found.get("top_logprobs"):
        entries = found["top_logprobs"][0] or {}
        return {_key(token): float(value) for token, value in entries.items()}
    content = found.get("content") or [{}]
    listed = content[0].get("top_logprobs") or []
    return {_id_or_token(entry): float(entry["logprob"]) for entry in listed}


def reply_ids(answer: Mapping[str, Any]) -> list[int] | None:
    """Return the ids of an answer's tokens, or None where the server does not tell them."""
    choice = answer["choices"][0]
    if isinstance(choice.get("token_ids"), list):
        return list(choice["token_ids"])
    content = (choice.get("logprobs") or {}).get("content")
    if isinstance(content, list) and all("id" in entry for entry in content):
        return [int(entry["id"]) for entry in content]
    return None


def _key(token: str) -> int | str:
    number = token.removeprefix(ID_PREFIX)
    return int(number) if number != token and number.isdigit() else token


def _id_or_token(entry: Mapping[str, Any]) -> int | str:
    return int(entry["id"]) if "id" in entry else str(entry["token"])
