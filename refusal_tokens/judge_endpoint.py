"""Requests to an OpenAI-compatible endpoint: retries with back-off, within limits of cost."""

from __future__ import annotations

import email.utils
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from threading import Event, Lock
from typing import Any

from refusal_tokens.errors import InputError

RETRIED = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
LONGEST_WAIT = 300.0


@dataclass(frozen=True)
class Limits:
    """What a run may cost.

    Attributes:
        max_requests: retries count; None: no limit.
        max_tokens: prompt and answer together, as the endpoint counts them; None: no limit.
        concurrency: requests at a time, and so how far ``max_tokens`` can be overshot.
        attempts: tries for one request before giving up.
        timeout: seconds to wait for an answer.
        pause: seconds before the second try, doubled for each one after.
    """

    max_requests: int | None = None
    max_tokens: int | None = None
    concurrency: int = 4
    attempts: int = 5
    timeout: float = 60.0
    pause: float = 1.0


class Endpoint:
    """Posts chat completions from any number of threads.

    Attributes:
        requests: sent so far, retries included.
        tokens: spent so far.
    """

    def __init__(self, url: str, api_key: str | None, limits: Limits) -> None:
        """Prepare a client.

        Args:
            url: the API's base, such as ``http://127.0.0.1:8000/v1``.
            api_key: sent as a bearer token; None sends none.
            limits: of this run.

        Raises:
            InputError: if httpx is missing, or the address or the key is not one.
        """
        try:
            import httpx
        except ImportError:
            raise InputError("the LLM judge needs httpx: pip install 'httpx>=0.27'") from None
        try:
            scheme = httpx.URL(url).scheme
        except httpx.InvalidURL as error:
            raise InputError(f"endpoint {url!r}: not an address ({error})") from None
        if scheme not in ("http", "https"):
            raise InputError(f"endpoint {url!r}: allowed: an http:// or https:// address")
        self._url = url.rstrip("/") + "/chat/completions"
        if api_key and not re.fullmatch(r"[!-~]+", api_key):
            # Not shown: a message may end up in a log.
            raise InputError("the API key has characters that no key has, such as a line break")
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._client = httpx.Client(timeout=limits.timeout, headers=headers)
        self._limits = limits
        self._lock = Lock()
        self._stopped = Event()
        self._reason = ""
        self.requests = 0
        self.tokens = 0

    def stop(self, reason: str) -> None:
        """Make every thread give up at its next wait or request, for the reason first given."""
        with self._lock:
            self._reason = self._reason or reason
        self._stopped.set()

    def post(self, payload: Mapping[str, Any]) -> dict[str, Any]:
        """Return the JSON answer to one chat completion.

        Raises:
            InputError: once the tries or a limit are used up, or on a status that no retry mends;
                from then on, and after ``stop``, for every request.
        """
        try:
            return self._post(payload)
        except InputError as error:
            self.stop(str(error))
            raise

    def _post(self, payload: Mapping[str, Any]) -> dict[str, Any]:
        import httpx

        fault, wait = "", 0.0
        for attempt in range(self._limits.attempts):
            self._wait(wait)
            self._count_request()
            wait = self._limits.pause * 2**attempt
            try:
                response = self._client.post(self._url, json=dict(payload))
            except httpx.TimeoutException:
                fault = f"no answer within {self._limits.timeout:g} s"
            except httpx.RequestError as error:
                fault = str(error) or type(error).__name__
            else:
                if response.is_success:
                    return self._answer(response)
                fault = f"status {response.status_code}: {_excerpt(response.text)}"
                if response.status_code not in RETRIED:
                    raise InputError(f"{self._url}: {fault}")
                asked = _seconds(response.headers.get("retry-after"))
                wait = wait if asked is None else asked
        raise InputError(f"{self._url}: {self._limits.attempts} tries failed, the last: {fault}")

    def _wait(self, seconds: float) -> None:
        if seconds > LONGEST_WAIT:
            raise InputError(f"{self._url}: asks to wait {seconds:.0f} s; run again after that")
        if self._stopped.wait(seconds):
            raise InputError(self._reason)

    def _count_request(self) -> None:
        limits = self._limits
        with self._lock:
            if limits.max_requests is not None and self.requests >= limits.max_requests:
                raise InputError(f"limit of {limits.max_requests} requests reached")
            if limits.max_tokens is not None and self.tokens >= limits.max_tokens:
                raise InputError(
                    f"limit of {limits.max_tokens} tokens reached ({self.tokens} spent)"
                )
            self.requests += 1

    def _answer(self, response: Any) -> dict[str, Any]:
        try:
            answer = response.json()
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise InputError(
                f"{self._url}: not a JSON answer ({_excerpt(response.text)}); is this the base "
                "address of an OpenAI-compatible API, such as http://127.0.0.1:8000/v1?"
            )
        usage = answer.get("usage")
        spent = usage.get("total_tokens") if isinstance(usage, dict) else None
        # A server that does not count: about four characters a token, both ways.
        if not isinstance(spent, int):
            spent = (len(response.request.content) + len(response.content)) // 4
        with self._lock:
            self.tokens += spent
        return answer


def _excerpt(text: str) -> str:
    return " ".join(text.split())[:200] or "empty"


def _seconds(header: str | None) -> float | None:
    """Return what a Retry-After header asks for: seconds, or the time until a date."""
    if header is None:
        return None
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(header).timestamp() - time.time())
    except ValueError:
        return None
