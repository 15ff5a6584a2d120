"""What vLLM loads in each of its processes: it makes three names known and starts nothing."""

from __future__ import annotations

NAME = "refusal_tokens"


def register() -> None:
    """Register tokenizer mode, renderer and reasoning parser; each is imported when chosen."""
    from vllm.reasoning import ReasoningParserManager
    from vllm.renderers.registry import RENDERER_REGISTRY
    from vllm.tokenizers.registry import TokenizerRegistry

    # vLLM calls this once a process, and each engine it starts in one process calls it again.
    if NAME in TokenizerRegistry.tokenizers:
        return
    TokenizerRegistry.register(NAME, "vllm.tokenizers.hf", "CachedHfTokenizer")
    RENDERER_REGISTRY.register(NAME, f"{__package__}.renderer", "RefusalTokensRenderer")
    ReasoningParserManager.register_lazy_module(NAME, f"{__package__}.grammar", "AfterControlToken")
