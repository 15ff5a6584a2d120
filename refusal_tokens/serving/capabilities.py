"""What a server can do, found out by asking it: how the control tokens can be read there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from refusal_tokens.errors import InputError
from refusal_tokens.serving.completions import (
    Completions,
    ServerError,
    listed_logprobs,
    reply_ids,
)

# The strongest bias that OpenAI's API takes: puts the control tokens first, or out of the way.
BIAS = 100.0
Reading = Literal["token_ids", "listing", "bias"]


@dataclass(frozen=True)
class ControlTokens:
    """The control tokens as a server may name them: ``<|respond|>`` first."""

    tokens: tuple[str, ...]
    ids: tuple[int, ...]

    def read(self, answer: Mapping[str, Any]) -> np.ndarray | None:
        """Return their log-probabilities, (1 + categories,), nats; None where one is not listed."""
        listed = listed_logprobs(answer)
        pairs = zip(self.ids, self.tokens, strict=True)
        values = [listed.get(number, listed.get(token)) for number, token in pairs]
        return None if None in values else np.array(values, dtype=np.float64)

    def bias(self, value: float) -> dict[str, float]:
        """Return the ``logit_bias`` that moves them all alike. Integer ids: spellings get split."""
        return {str(number): value for number in self.ids}


@dataclass(frozen=True)
class Capabilities:
    """How one server is used.

    Attributes:
        reading: how the control tokens' log-probabilities are read. ``token_ids``: the server
            returns those of named ids (vLLM's ``logprob_token_ids``). ``listing``: it lists as
            many as asked for, so that the list can grow until they are in it (llama.cpp).
            ``bias``: an equal ``logit_bias`` on all of them makes them the top ones and leaves
            their differences as they are.
        listed: how many log-probabilities it lists at most, as far as was asked.
        seals: whether it takes a ``logit_bias`` that keeps control tokens out of replies.
        reply_fields: what to send for the reply's token ids; empty where it tells none.
    """

    reading: Reading
    listed: int
    seals: bool
    reply_fields: Mapping[str, Any]


def probe(
    route: Completions, prompt: Sequence[int], control: ControlTokens, vocabulary: int
) -> Capabilities:
    """Find out how a server can be steered, with a handful of one-token requests.

    Args:
        route: the server's.
        prompt: token ids of any prompt, up to the decision position.
        control: the control tokens.
        vocabulary: number of token ids.

    Raises:
        InputError: if it takes no token ids as a prompt, or does not show the control tokens'
            log-probabilities at every prompt.
    """
    _check_ids_are_taken(route, prompt)
    # Past the decision control tokens are unlikely: what lists them here lists them everywhere.
    later = [*prompt, control.ids[0]]
    listed = _most_listed(route, later, vocabulary)
    reading = _reading(route, later, control, listed >= vocabulary)
    if reading is None:
        raise InputError(
            f"{route.url}: lists {listed} log-probabilities at most, takes no logprob_token_ids "
            "and does not show logit_bias in its log-probabilities, so that the "
            f"{len(control.ids)} control tokens cannot be read at every prompt"
        )
    seals = _answer(route, prompt, logit_bias=control.bias(-BIAS)) is not None
    return Capabilities(reading, listed, seals, _reply_fields(route, prompt))


def reading_fields(reading: Reading, control: ControlTokens, listed: int) -> dict[str, Any]:
    """Return the request fields that read the control tokens' log-probabilities."""
    # Untouched by the sampler: some servers show log-probabilities after temperature and top-p.
    fields: dict[str, Any] = {"max_tokens": 1, "temperature": 1.0, "top_p": 1.0}
    if reading == "token_ids":
        plain = {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
        named = {"logprob_token_ids": list(control.ids), "return_tokens_as_token_ids": True}
        return {**fields, **plain, **named, "logprobs": 1}
    if reading == "bias":
        return {**fields, "logprobs": len(control.ids), "logit_bias": control.bias(BIAS)}
    return {**fields, "logprobs": listed}


def _check_ids_are_taken(route: Completions, prompt: Sequence[int]) -> None:
    why = "user text could become a control token in a prompt sent as text"
    try:
        answer = route.complete(prompt, max_tokens=1)
    except ServerError as error:
        raise InputError(f"{error}; a prompt of token ids is needed: {why}") from None
    counted = (answer.get("usage") or {}).get("prompt_tokens")
    if counted != len(prompt):
        raise InputError(
            f"{route.url}: counts {counted} tokens in a prompt of {len(prompt)} token ids, so it "
            f"does not take them as they are: {why}"
        )


def _most_listed(route: Completions, prompt: Sequence[int], vocabulary: int) -> int:
    """How many log-probabilities the server lists: all, OpenAI's and vLLM's usual limits, or 1."""
    for wanted in (vocabulary, 20, 5, 1):
        answer = _answer(route, prompt, logprobs=wanted)
        found = 0 if answer is None else len(listed_logprobs(answer))
        # Tokens that are spelled alike, such as parts of characters, fall together in the answer;
        # a server that cuts the list short by itself leaves far more out.
        if found:
            return wanted if 2 * found > wanted else found
    return 0


def _reading(
    route: Completions, prompt: Sequence[int], control: ControlTokens, lists_all: bool
) -> Reading | None:
    answer = _answer(route, prompt, **reading_fields("token_ids", control, 1))
    if answer is not None and control.read(answer) is not None:
        return "token_ids"
    if lists_all:
        return "listing"
    answer = _answer(route, prompt, **reading_fields("bias", control, 1))
    values = None if answer is None else control.read(answer)
    # Where the bias shows, nothing else has any probability left.
    if values is not None and np.exp(values).sum() > 0.999:
        return "bias"
    return None


def _reply_fields(route: Completions, prompt: Sequence[int]) -> Mapping[str, Any]:
    for fields in ({"return_token_ids": True}, {"logprobs": 1}):
        answer = _answer(route, prompt, **fields)
        if answer is not None and reply_ids(answer) is not None:
            return fields
    return {}


def _answer(route: Completions, prompt: Sequence[int], **fields: Any) -> dict[str, Any] | None:
    """Ask for one token; None where the server refuses the fields."""
    try:
        return route.complete(prompt, **{"max_tokens": 1, **fields})
    except ServerError as error:
        if error.status is None or error.status == 401:
            raise InputError(str(error)) from None
        return None
