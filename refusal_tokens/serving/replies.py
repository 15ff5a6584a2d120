"""What clients see: the decision beside each choice, and no trace of control tokens.

Needs no vLLM. The middleware asks vLLM for the token ids of each reply; the first one is the
decision.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from refusal_tokens.checkpoint import CheckpointInfo

FIELD = "refusal_tokens"
# Asked of vLLM by the middleware, not by clients.
ADDED_FIELDS = ("prompt_token_ids", "prompt_text")
END = b"\n\n"
Record = Callable[[str, str], None]


@dataclass
class ReplyFilter:
    """Rewrites the replies to one request.

    Attributes:
        info: of the checkpoint.
        policy: name of the policy that was applied.
        probabilities: the client asked for the control probabilities.
        forced_tool: the client forced a tool call.
        record: called once a choice with category (``respond`` for a response) and policy.
    """

    info: CheckpointInfo
    policy: str
    probabilities: bool
    forced_tool: bool
    record: Record
    _seen: dict[int, str | None] = field(default_factory=dict)

    def reply(self, data: dict[str, Any]) -> dict[str, Any]:
        """Rewrite a whole response, or one chunk of a stream, in place."""
        for name in ADDED_FIELDS:
            data.pop(name, None)
        for choice in data.get("choices", ()):
            self._choice(choice)
        return data

    def event(self, event: bytes) -> bytes:
        """Rewrite one server-sent event, with the empty line that ends it.

        Events that say nothing, which vLLM sends only because it was asked for token ids, go.
        """
        prefix, _, payload = event.partition(b"data: ")
        if prefix or not payload.startswith(b"{"):
            return event + END
        data = self.reply(json.loads(payload))
        says = data.get("usage") or not data.get("choices") or any(map(_says, data["choices"]))
        return b"data: " + dump(data) + END if says else b""

    def _choice(self, choice: dict[str, Any]) -> None:
        ids, index = choice.pop("token_ids", None) or [], choice.get("index", 0)
        if ids and index not in self._seen:
            choice[FIELD] = self._decision(ids[0], choice)
            self._seen[index] = choice[FIELD]["decision"]
            self.record(choice[FIELD]["category"] or str(self._seen[index]), self.policy)
        if choice.get("logprobs"):
            choice["logprobs"] = None if self.probabilities else self._hidden(choice, ids)
        if self._seen.get(index) == "refuse" and self.forced_tool and "message" in choice:
            _plain_refusal(choice)
        for part in ("message", "delta"):
            choice.get(part, {}).pop("reasoning", None)

    def _decision(self, token: int, choice: Mapping[str, Any]) -> dict[str, Any]:
        control = list(self.info.control_token_ids)
        chosen = control.index(token) if token in control else None
        found: dict[str, Any] = {
            "decision": None if chosen is None else "refuse" if chosen else "respond",
            "category": self.info.taxonomy.knobs[chosen - 1] if chosen else None,
            "policy": self.policy,
        }
        if self.probabilities:
            found |= self._shares(choice)
        return found

    def _shares(self, choice: Mapping[str, Any]) -> dict[str, Any]:
        """Return the softmax over the control tokens, before any knob, and their mass."""
        entries = choice["logprobs"]["content"][0]["top_logprobs"]
        found = {entry["token"]: entry["logprob"] for entry in entries}
        tokens = self.info.taxonomy.tokens
        logprobs = np.array([found[token] for token in tokens], dtype=np.float64)
        total = np.logaddexp.reduce(logprobs)
        shares = dict(zip(tokens, np.exp(logprobs - total).tolist(), strict=True))
        return {"probabilities": shares, "control_mass": float(np.exp(total))}

    def _hidden(self, choice: Mapping[str, Any], ids: list[int]) -> dict[str, Any]:
        """Return the log-probabilities of the text alone."""
        tokens = set(self.info.taxonomy.tokens)
        entries = choice["logprobs"].get("content") or []
        kept = [entry for entry in entries if entry["token"] not in tokens]
        for entry in kept:
            others = entry.get("top_logprobs") or []
            entry["top_logprobs"] = [other for other in others if other["token"] not in tokens]
        return {**choice["logprobs"], "content": kept}


def _says(choice: Mapping[str, Any]) -> bool:
    return (
        bool(choice.get("delta") or choice.get("finish_reason") or choice.get("logprobs"))
        or FIELD in choice
    )


def _plain_refusal(choice: dict[str, Any]) -> None:
    """Give a refusal to a request that forces a tool as text: vLLM took it for the tool's call."""
    message = choice["message"]
    message["content"] = message.get("reasoning") or message.get("content")
    message.pop("tool_calls", None)
    if choice.get("finish_reason") == "tool_calls":
        choice["finish_reason"] = "stop"


def dump(data: Any) -> bytes:
    """Return compact JSON."""
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
