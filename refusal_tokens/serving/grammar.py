"""Where vLLM's grammars begin: after ``<|respond|>``, never at the decision and never on a refusal.

vLLM constrains a reply to JSON or to a tool call from its first token on, unless a reasoning
parser says that reasoning comes first. This one counts the control token as the reasoning. A
refusal is not constrained: it stays readable text, as OpenAI's own refusals are.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from vllm.entrypoints.generate.base.protocol import DeltaMessage
from vllm.reasoning import ReasoningParser

from refusal_tokens.taxonomy import RESPOND_TOKEN

# Tool parsers have vLLM keep special tokens in the text, to see their own; the control token that
# opens the reply is taken off again.
_OPENING = re.compile(r"<\|(respond|refuse(:[a-z][a-z0-9_]{0,31})?)\|>")


class AfterControlToken(ReasoningParser):  # type: ignore[misc]
    """Lets grammars begin after ``<|respond|>`` and passes all text on as content."""

    def __init__(self, tokenizer: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(tokenizer, *args, **kwargs)
        self._respond = self.vocab[RESPOND_TOKEN]

    def is_reasoning_end(self, input_ids: Sequence[int]) -> bool:
        """Return whether the ids hold ``<|respond|>``; no prompt does, see the renderer."""
        return self._respond in input_ids

    def is_reasoning_end_streaming(
        self, input_ids: Sequence[int], delta_ids: Iterable[int]
    ) -> bool:
        """Return whether the newest ids hold ``<|respond|>``."""
        return self._respond in delta_ids

    def extract_content_ids(self, input_ids: list[int]) -> list[int]:
        """Return the ids after the control token."""
        return [token for token in input_ids if token != self._respond]

    def extract_reasoning(self, model_output: str, request: Any) -> tuple[str | None, str | None]:
        """Return the text as content.

        Where the request forces a tool, vLLM turns the content into its arguments or drops it, so
        the text goes along as reasoning too; the middleware puts a refusal back in its place.
        """
        text = _without_opening(model_output)
        forced = bool(request.tools) and request.tool_choice not in (None, "none", "auto")
        return (text if forced else None), text

    def extract_reasoning_streaming(
        self,
        previous_text: str,
        current_text: str,
        delta_text: str,
        previous_token_ids: Sequence[int],
        current_token_ids: Sequence[int],
        delta_token_ids: Sequence[int],
    ) -> DeltaMessage | None:
        """Return the new text as content."""
        text = delta_text if previous_token_ids else _without_opening(delta_text)
        return DeltaMessage(content=text) if text else None


def _without_opening(text: str) -> str:
    found = _OPENING.match(text)
    return text[found.end() :] if found else text
