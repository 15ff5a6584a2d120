"""Chat messages to token ids: user text can never become a special token.

For text that spells no special token the ids are exactly those of ``apply_chat_template``. A
spelling such as ``<|respond|>`` or ``<|im_end|>`` inside a message is encoded as plain text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerFast

from refusal_tokens.errors import InputError

# Private-use characters that enclose a special token's spelling while the template is rendered.
# They, and text that already holds them, never reach the model: see `_guarded`.
_OPEN, _BREAK, _CLOSE = "\ue0f0", "\ue0f1", "\ue0f2"
_GUARDED = re.compile(f"{_OPEN}(.*?){_CLOSE}", re.DOTALL)
_MARKER = "\ue0f3"


@dataclass(frozen=True)
class ChatEncoder:
    """Encodes prompts and replies for one tokenizer and chat template.

    Attributes:
        tokenizer: a fast tokenizer with a chat template.
        system_prompt: put before conversations that have none; None leaves it to the template.
        template_kwargs: passed to the template, for example ``{"enable_thinking": False}``.
    """

    tokenizer: PreTrainedTokenizerFast
    system_prompt: str | None = None
    template_kwargs: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if not getattr(self.tokenizer, "is_fast", False):
            raise InputError("the model needs a fast tokenizer (tokenizer.json)")
        if not self.tokenizer.chat_template:
            raise InputError(
                "the model has no chat template; set chat_template_path in the recipe to a .jinja "
                "file or to a model whose template to use"
            )

    def prompt_ids(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[int]:
        """Return the ids of a conversation, and the tools it may use, up to the decision position.

        All text in messages and tools counts as user text, the keys inside them included.
        """
        guarded = [{key: self._guard(value) for key, value in m.items()} for m in messages]
        return self._encode_rendered(self._render(guarded, True, self._guard(tools)))

    def reply_ids(self, response: str) -> list[int]:
        """Return the ids that follow the control token: the reply and the end of the turn."""
        lead, tail = self._reply_frame
        return [*self.encode_text(lead + response), *tail]

    def encode_text(self, text: str) -> list[int]:
        """Encode text as plain text, whatever special tokens it spells."""
        return list(
            self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        )

    @cached_property
    def generation_prompt_ids(self) -> tuple[int, ...]:
        """The ids between the end of the user's text and the decision position.

        Counted from the first special token after the text, so that user text cannot merge into
        them.
        """
        rendered = self._render([{"role": "user", "content": _MARKER}], True)
        ids = self._encode_rendered(rendered.rpartition(_MARKER)[2])
        special = [i for i, token in enumerate(ids) if token in self._special_ids]
        return tuple(ids[special[0] :] if special else ids)

    @cached_property
    def template_head(self) -> tuple[int, ...]:
        """The ids that two conversations of one user turn, alike in nothing, both begin with."""
        two = [self.prompt_ids([{"role": "user", "content": text}]) for text in ("a", "7 b")]
        shared = 0
        for one, other in zip(*two, strict=False):
            if one != other:
                break
            shared += 1
        return tuple(two[0][:shared])

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        added = self.tokenizer.added_tokens_decoder
        return frozenset(i for i, token in added.items() if token.special)

    def _render(
        self,
        messages: Sequence[Mapping[str, Any]],
        generation_prompt: bool,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        if self.system_prompt is not None and messages[0]["role"] != "system":
            guarded = self._guarded(self.system_prompt)
            messages = [{"role": "system", "content": guarded}, *messages]
        try:
            rendered = self.tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tools=tools,
                tokenize=False,
                add_generation_prompt=generation_prompt,
                **(self.template_kwargs or {}),
            )
        except Exception as error:
            # Templates raise their own errors, for example for a system role they do not know.
            raise InputError(f"the chat template refused the messages: {error}") from error
        return str(rendered)

    def _guard(self, value: Any) -> Any:
        """Guard every text in messages or tools, however deep."""
        if isinstance(value, str):
            return self._guarded(value)
        if isinstance(value, Mapping):
            return {self._guarded(str(key)): self._guard(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self._guard(item) for item in value]
        return value

    def _guarded(self, text: str) -> str:
        """Enclose each special token's spelling, as the tokenizer itself finds it."""
        text = re.sub(f"[{_OPEN}{_BREAK}{_CLOSE}]", "\ufffd", text)
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        pieces, end = [], 0
        pairs = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
        for start, stop in (offset for token, offset in pairs if token in self._special_ids):
            if stop <= max(start, end):
                continue
            start = max(start, end)
            pieces += [text[end:start], _OPEN, text[start], _BREAK, text[start + 1 : stop], _CLOSE]
            end = stop
        return "".join([*pieces, text[end:]])

    def _encode_rendered(self, rendered: str) -> list[int]:
        ids: list[int] = []
        for number, part in enumerate(_GUARDED.split(rendered)):
            if number % 2:
                ids += self.encode_text(part.replace(_BREAK, ""))
            elif part:
                ids += self.tokenizer.encode(part, add_special_tokens=False)
        return ids

    @cached_property
    def _reply_frame(self) -> tuple[str, tuple[int, ...]]:
        """What the template puts between generation prompt and reply, and the end of the turn."""
        user = {"role": "user", "content": "x"}
        prompt = self._render([user], True)
        full = self._render([user, {"role": "assistant", "content": _MARKER}], False)
        before, found, after = full.rpartition(_MARKER)
        if not found:
            raise InputError("the chat template drops the assistant's reply")
        # A template whose generation prompt is no prefix of the full form: the reply follows the
        # generation prompt directly, as it will when served.
        lead = before[len(prompt) :] if before.startswith(prompt) else ""
        if lead.strip():
            raise InputError(
                f"the chat template opens every reply with {lead.strip()!r}, which is not in its "
                "generation prompt; set refusal_tokens.chat_template_kwargs so that it is, for "
                "example {enable_thinking: false}"
            )
        return lead, self._end_of_turn(after)

    def _end_of_turn(self, after: str) -> tuple[int, ...]:
        ids = self._encode_rendered(after)
        special = [i for i, token in enumerate(ids) if token in self._special_ids]
        if special:
            return tuple(ids[: special[0] + 1])
        if self.tokenizer.eos_token_id is None:
            raise InputError("the chat template ends no turn and the tokenizer has no eos token")
        return (*ids, self.tokenizer.eos_token_id)


def control_ids(tokenizer: PreTrainedTokenizerFast, tokens: Sequence[str]) -> list[int]:
    """Return the ids of the control tokens.

    Raises:
        InputError: if one is not a special token of this tokenizer.
    """
    special = {t.content: i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    missing = [token for token in tokens if token not in special]
    if missing:
        raise InputError(f"the tokenizer has no control token {missing[0]}; was the model trained?")
    return [special[token] for token in tokens]
