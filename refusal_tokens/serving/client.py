"""Steering through any OpenAI-compatible server: read one token, decide here, then generate.

The server holds the trained weights and knows nothing of policies. Each reply takes two requests:
one of a single token whose log-probabilities give the control logits, and one that goes on from the
prompt and the control token that the policy decides for. Prompts are token ids, made with the
checkpoint's own tokenizer, so that user text never becomes a control token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from tqdm import tqdm

from refusal_tokens.chat import ChatEncoder
from refusal_tokens.checkpoint import CheckpointInfo, load_tokenizer_of
from refusal_tokens.decision import decide, draws
from refusal_tokens.errors import InputError, unknown
from refusal_tokens.policy import Policy
from refusal_tokens.serving.capabilities import (
    BIAS,
    Capabilities,
    ControlTokens,
    probe,
    reading_fields,
)
from refusal_tokens.serving.completions import Completions, ServerError, open_route, reply_ids
from refusal_tokens.steering import Prompt, Reply, conversations_from, policies_for

# How the list of log-probabilities grows until the control tokens are in it.
FIRST_LISTING, GROWTH = 64, 16
# What a caller may set of the text; everything else is the client's own.
TEXT_SETTINGS = (
    "max_tokens",
    "temperature",
    "top_p",
    "seed",
    "stop",
    "presence_penalty",
    "frequency_penalty",
)
T = TypeVar("T")


@dataclass(frozen=True)
class Decision:
    """What was decided for one prompt.

    Attributes:
        index: 0 to respond, else the category counted from 1.
        control_logits: (1 + categories,), nats, up to one number that no decision depends on.
        control_mass: softmax probability of all control tokens together, unmasked; None where the
            server does not tell.
    """

    index: int
    control_logits: np.ndarray
    control_mass: float | None


@dataclass(frozen=True)
class _Job:
    """One prompt: its token ids up to the decision position, its policy and its number."""

    prompt: list[int]
    policy: Policy
    row: int


@dataclass(frozen=True)
class SteeredClient:
    """A served checkpoint whose replies obey policies; the counterpart of ``SteeredModel``.

    >>> client = SteeredClient.connect("http://127.0.0.1:8000/v1", "runs/my-run")
    ... # doctest: +SKIP
    >>> reply = client.generate("How do I pick a lock?", Policy(bias={"safety": 2}))[0]
    ... # doctest: +SKIP
    """

    route: Completions
    info: CheckpointInfo
    encoder: ChatEncoder
    capabilities: Capabilities

    @classmethod
    def connect(
        cls,
        url: str,
        checkpoint: str | Path,
        *,
        model: str | None = None,
        api_key: str | None = None,
        timeout: float = 120.0,
    ) -> SteeredClient:
        """Connect to a server and find out how it can be steered.

        Args:
            url: the API's address, such as ``http://127.0.0.1:8000/v1``.
            checkpoint: checkpoint or run folder, for its tokenizer and taxonomy; no weights needed.
            model: the served name; None takes the only one.
            api_key: sent as a bearer token.
            timeout: seconds to wait for one answer.

        Raises:
            InputError: if the server cannot be reached, serves no such model, takes no token ids as
                a prompt, or returns too few log-probabilities for the taxonomy.
        """
        info, tokenizer = load_tokenizer_of(checkpoint)
        encoder = info.encoder(tokenizer)
        route = open_route(url, model, api_key, timeout)
        prompt = encoder.prompt_ids([{"role": "user", "content": "Hello"}])
        found = probe(route, prompt, _control(info), len(tokenizer))
        return cls(route, info, encoder, found)

    def decide(
        self,
        prompts: Prompt | Sequence[Prompt],
        policy: Policy | Sequence[Policy] | None = None,
        *,
        rows: Sequence[int] | None = None,
        concurrency: int = 8,
    ) -> list[Decision]:
        """Read the control logits of prompts and decide, without generating; see ``generate``."""
        jobs = self._jobs(prompts, policy, rows)
        return _map(self._decide, jobs, concurrency)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        policy: Policy | Sequence[Policy] | None = None,
        *,
        rows: Sequence[int] | None = None,
        concurrency: int = 8,
        **settings: Any,
    ) -> list[Reply]:
        """Reply to one prompt or several.

        Args:
            prompts: a text, a conversation (list of messages), or a list of either.
            policy: one for all prompts, or one each; default: no bias, rule ``route``.
            rows: the prompts' numbers, for sampled decisions; default 0, 1, ...
            concurrency: how many prompts are under way at a time.
            settings: of the text: ``max_tokens`` (256 by default), ``temperature`` (0), ``top_p``,
                ``seed``, ``stop``, ``presence_penalty``, ``frequency_penalty``.

        Returns:
            The replies, in the order of the prompts. ``token_ids`` holds the control token alone
            where the server does not tell ids.

        Raises:
            InputError: for an empty prompt, roles out of order, an unknown knob or setting, or an
                unmasked policy.
            ServerError: if the server fails; nothing is returned then.
        """
        for name in settings:
            if name not in TEXT_SETTINGS:
                raise InputError(unknown("setting", name, TEXT_SETTINGS))
        jobs = self._jobs(prompts, policy, rows)
        text = {"max_tokens": 256, "temperature": 0.0, **settings}
        return _map(lambda job: self._reply(job, text), jobs, concurrency)

    def _jobs(
        self,
        prompts: Prompt | Sequence[Prompt],
        policy: Policy | Sequence[Policy] | None,
        rows: Sequence[int] | None,
    ) -> list[_Job]:
        """Check everything before the first request."""
        conversations = conversations_from(prompts)
        policies = policies_for(policy, len(conversations))
        for each in policies:
            each.knobs(self.info.taxonomy)
            if not each.masked:
                raise InputError(
                    "an unmasked policy leaves the opening token to the server's sampler; "
                    "allowed here: masked"
                )
        numbers = range(len(conversations)) if rows is None else rows
        ids = [self.encoder.prompt_ids(messages) for messages in conversations]
        return [_Job(*job) for job in zip(ids, policies, numbers, strict=True)]

    def _decide(self, job: _Job) -> Decision:
        values = self._read(job.prompt)
        setting = job.policy.knobs(self.info.taxonomy)
        draw = draws(job.policy.seed, [job.row]) if setting.temperature else None
        total = float(np.exp(np.logaddexp.reduce(values)))
        # A biased reading says nothing of the rest, nor do raw logits in place of
        # log-probabilities.
        known = self.capabilities.reading != "bias" and total < 1.001
        index = int(decide(values[None, :], setting, draw)[0])
        return Decision(index, values, min(total, 1.0) if known else None)

    def _read(self, prompt: Sequence[int]) -> np.ndarray:
        """Return the control tokens' log-probabilities, (1 + categories,), nats."""
        control, reading = _control(self.info), self.capabilities.reading
        most = self.capabilities.listed
        listed = min(FIRST_LISTING, most)
        while True:
            answer = self.route.complete(prompt, **reading_fields(reading, control, listed))
            values = control.read(answer)
            if values is not None:
                break
            if reading != "listing" or listed >= most:
                raise ServerError(f"{self.route.url}: an answer lacks control tokens")
            listed = min(listed * GROWTH, most)
        if not np.isfinite(values).all():
            raise ServerError(f"{self.route.url}: log-probabilities that are not finite: {values}")
        return values

    def _reply(self, job: _Job, text: Mapping[str, Any]) -> Reply:
        found = self._decide(job)
        control = _control(self.info)
        opening = control.ids[found.index]
        # The control token stands for what it opens; inside a reply it would mean nothing.
        seal = {"logit_bias": control.bias(-BIAS)} if self.capabilities.seals else {}
        fields = {**self.capabilities.reply_fields, **seal, **text}
        answer = self.route.complete([*job.prompt, opening], **fields)
        shares = np.exp(found.control_logits - np.logaddexp.reduce(found.control_logits))
        return Reply(
            text=str(answer["choices"][0].get("text") or "").strip(),
            decision="refuse" if found.index else "respond",
            category=self.info.taxonomy.knobs[found.index - 1] if found.index else None,
            probabilities=dict(zip(control.tokens, map(float, shares), strict=True)),
            control_mass=found.control_mass,
            policy=job.policy,
            token_ids=(opening, *(reply_ids(answer) or ())),
        )


def _control(info: CheckpointInfo) -> ControlTokens:
    return ControlTokens(info.taxonomy.tokens, info.control_token_ids)


def _map(work: Callable[[Any], T], jobs: Sequence[Any], concurrency: int) -> list[T]:
    """Do the jobs some at a time, in order; at the first failure the rest are not started."""
    if concurrency < 1:
        raise InputError(f"concurrency {concurrency}; allowed: 1 or more")
    with ThreadPoolExecutor(concurrency) as pool:
        futures = [pool.submit(work, job) for job in jobs]
        try:
            return [future.result() for future in tqdm(futures, "prompts", delay=2, leave=False)]
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
