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
        scale: factor (Cohere, Granite, Falcon-H1, HyperCLOVA X); 1 for most.
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

    def inverse(self, logits: Tensor) -> Tensor:
        """Return what the output matrix has to give for these logits; below the cap at most."""
        if self.softcap is not None:
            share = (logits / self.softcap).clamp(-0.999, 0.999)
            logits = self.softcap * torch.atanh(share)
        return logits / self.scale


def logit_transform(model: PreTrainedModel) -> LogitTransform:
    """Read the transform from a model's config."""
    config = model.config.get_text_config()
    softcap = getattr(config, "final_logit_softcapping", None)
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        value = getattr(config, name, None)
        if value is not None:
            return LogitTransform(float(value), softcap)
    scaling = getattr(config, "logits_scaling", None)
    if scaling is None:
        return LogitTransform(softcap=softcap)
    # Granite's key, by which the one family multiplies and all others divide.
    multiplies = config.model_type.startswith("hyperclovax")
    return LogitTransform(float(scaling) if multiplies else 1.0 / scaling, softcap)
