"""From hidden states to logits: what an architecture does after its output matrix."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel


@dataclass(frozen=True)
class LogitTransform:
    """Scale and soft cap that an architecture applies to its logits.

    Attributes:
        scale: factor (Cohere, Granite, Falcon-H1); 1 for most.
        softcap: ``cap * tanh(x / cap)`` (Gemma 2), or None.
    """

    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        """Return the logits as the model's own forward would give them."""
        logits = logits * self.scale if self.scale != 1.0 else logits
        if self.softcap is None:
            return logits
        return self.softcap * torch.tanh(logits / self.softcap)


def logit_transform(model: PreTrainedModel) -> LogitTransform:
    """Read the transform from a model's config."""
    config = model.config.get_text_config()
    softcap = getattr(config, "final_logit_softcapping", None)
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        value = getattr(config, name, None)
        if value is not None:
            return LogitTransform(float(value), softcap)
    divisor = getattr(config, "logits_scaling", None)
    return LogitTransform(1.0 if divisor is None else 1.0 / divisor, softcap)
