"""TRL's SFTTrainer with a loss that gives the control token its share, and a lean head."""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_outputs import ModelOutput
from trl import SFTTrainer

from refusal_tokens.examples import IGNORED
from refusal_tokens.head import LogitTransform, logit_transform
from refusal_tokens.tokens import make_rows_sparse

# Positions projected to the vocabulary at once: bounds the memory of the logits.
HEAD_CHUNK = 1024


class RefusalTrainer(SFTTrainer):  # type: ignore[misc]
    """Trains control tokens and replies with a fixed share of the loss on the control tokens.

    The loss of a step over R rows, with share s and L reply tokens per row in the data set, is
    ``(s * sum of control nll + (1 - s) / L * sum of reply nll) / R``. Every control token weighs
    the same and every reply token weighs the same, in whatever batch it falls; plain SFT's mean
    over tokens corresponds to s = 1 / (1 + L).
    """

    def __init__(
        self,
        *args: Any,
        control_ids: list[int],
        control_share: float,
        reply_tokens_per_row: float,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        make_rows_sparse(self.model)
        add_labelled_head(causal_lm(self.model))
        self._control_ids = torch.tensor(control_ids)
        self._control_weight = control_share
        self._reply_weight = (1 - control_share) / max(reply_tokens_per_row, 1.0)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the loss of one micro-batch; see the class."""
        labels = inputs["labels"]
        outputs = model(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            labels=labels,
            labelled_head=True,
        )
        targets = labels[:, 1:][labels[:, 1:] != IGNORED]
        is_control = torch.isin(targets, self._control_ids.to(targets.device))
        weights = torch.where(is_control, self._control_weight, self._reply_weight)
        loss = -(weights * outputs.log_probs).sum() / len(labels)
        # With num_items_in_batch the Trainer leaves the division by accumulation steps to us.
        if num_items_in_batch is not None:
            loss = loss / self.current_gradient_accumulation_steps
        self._record(outputs, is_control, inputs["attention_mask"])
        return (loss, outputs) if return_outputs else loss

    def _record(self, outputs: Any, is_control: Tensor, attention_mask: Tensor) -> None:
        metrics = self._metrics["train" if self.model.training else "eval"]
        for name, mask in (("control", is_control), ("reply", ~is_control)):
            if mask.any():
                metrics[f"{name}_nll"].append(-outputs.log_probs[mask].mean().item())
                metrics[f"{name}_accuracy"].append(outputs.is_top1[mask].float().mean().item())
        if self.model.training:
            tokens = self.accelerator.gather_for_metrics(attention_mask.sum()).sum().item()
            self._total_train_tokens += tokens
        metrics["num_tokens"] = [self._total_train_tokens]

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, None, None]:
        """Return the loss of an evaluation batch; the logits are never built whole."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, inputs).detach(), None, None


def causal_lm(model: nn.Module) -> PreTrainedModel:
    """Return the transformers model inside a PEFT wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def add_labelled_head(model: PreTrainedModel) -> None:
    """Let ``model(..., labels=labels, labelled_head=True)`` project labelled positions only.

    It returns ``log_probs`` and ``is_top1``, each (labelled positions,), in the order of
    ``labels[:, 1:]``. TRL's own fused head scores every position where Triton is missing, and
    builds a dense gradient for a head with trained rows.
    """
    original = model.forward
    transform = logit_transform(model)

    def forward(
        self: PreTrainedModel,
        *args: Any,
        labels: Tensor | None = None,
        labelled_head: bool = False,
        **kwargs: Any,
    ) -> Any:
        if not labelled_head:
            return original(*args, labels=labels, **kwargs)
        assert labels is not None
        hidden = self.base_model(*args, use_cache=False, **kwargs).last_hidden_state
        targets = labels[:, 1:]
        mask = targets != IGNORED
        hidden, targets = hidden[:, :-1][mask], targets[mask]
        head = self.get_output_embeddings()
        chunks = zip(hidden.split(HEAD_CHUNK), targets.split(HEAD_CHUNK), strict=True)
        if len(hidden) <= HEAD_CHUNK:
            parts = [_score(head, h, t, transform) for h, t in chunks]
        else:
            parts = [
                checkpoint(_score, head, h, t, transform, use_reentrant=False) for h, t in chunks
            ]
        log_probs, is_top1 = (torch.cat(part) for part in zip(*parts, strict=True))
        return ModelOutput(log_probs=log_probs, is_top1=is_top1)

    model.forward = types.MethodType(forward, model)


def _score(
    head: nn.Module, hidden: Tensor, targets: Tensor, transform: LogitTransform
) -> tuple[Tensor, Tensor]:
    logits = transform(head(hidden).float())
    log_probs = -functional.cross_entropy(logits, targets, reduction="none")
    return log_probs, logits.detach().argmax(dim=-1) == targets
