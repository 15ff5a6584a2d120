"""Chat messages to prompt ids inside vLLM: as in training, with user text never a special token.

vLLM renders the chat template to a string and lets the tokenizer find special tokens in all of it,
user text included. Here the package's own encoder makes the ids, so that the same conversation has
the same ids in transformers and in vLLM.
"""

from __future__ import annotations

from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.renderers.chat_utils import parse_chat_messages
from vllm.renderers.hf import HfRenderer
from vllm.renderers.inputs.preprocess import parse_dec_only_prompt
from vllm.utils.async_utils import make_async

from refusal_tokens.checkpoint import load_info
from refusal_tokens.errors import InputError


class RefusalTokensRenderer(HfRenderer):  # type: ignore[misc]
    """Renders text conversations of one checkpoint, up to the decision position."""

    def __init__(self, config: Any, tokenizer: Any) -> None:
        super().__init__(config, tokenizer)
        self._info = load_info(config.model_config.model)
        self._encoder = self._info.encoder(self.get_tokenizer())
        self._render_in_pool = make_async(self.render_messages, executor=self._executor)

    def render_messages(self, messages: list[Any], params: Any) -> tuple[list[Any], Any]:
        """Return the conversation as vLLM reads it, and the prompt.

        Raises:
            VLLMValidationError: for anything that moves the decision position.
        """
        arguments = params.chat_template_kwargs
        faults = _moving_faults(arguments)
        tools = arguments.get("tools")
        conversation, media, _ = parse_chat_messages(
            messages,
            self.model_config,
            # Joined here, as in training: a template that joins the parts could make one special
            # token of two texts that spell none.
            content_format="string",
        )
        if media:
            faults.append("only text messages are served")
        if faults:
            raise VLLMValidationError("; ".join(faults))
        return conversation, parse_dec_only_prompt(self._prompt_ids(conversation, tools))

    async def render_messages_async(
        self, messages: list[Any], params: Any
    ) -> tuple[list[Any], Any]:
        """Do as ``render_messages``, in the renderer's thread pool."""
        found: tuple[list[Any], Any] = await self._render_with_timeout(
            self._render_in_pool(messages, params)
        )
        return found

    def _prompt_ids(self, conversation: list[Any], tools: list[Any] | None) -> list[int]:
        try:
            ids = self._encoder.prompt_ids(conversation, tools)
        except InputError as error:
            raise VLLMValidationError(str(error)) from None
        opening = list(self._info.generation_prompt_ids)
        ends = ids[len(ids) - len(opening) :] == opening
        if not ends or not set(ids).isdisjoint(self._info.control_token_ids):
            raise VLLMValidationError("the messages do not end at a decision position")
        return ids


def _moving_faults(arguments: dict[str, Any]) -> list[str]:
    faults = []
    if not arguments.get("add_generation_prompt", True):
        faults.append("add_generation_prompt must stay true")
    if arguments.get("continue_final_message"):
        faults.append("continue_final_message is not allowed with refusal tokens")
    return faults
