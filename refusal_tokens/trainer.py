"""TRL's SFTTrainer with a loss that gives the control token its share, and a lean head."""

from __future__ import annotations

import types
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset, Sampler
from transformers import PreTrainedModel
from transformers.modeling_outputs import ModelOutput
from transformers.trainer_pt_utils import LengthGroupedSampler
from trl import SFTTrainer

from refusal_tokens.batch_order import ShuffledBatches
from refusal_tokens.errors import InputError
from refusal_tokens.examples import IGNORED
from refusal_tokens.head import LogitTransform, logit_transform
from refusal_tokens.shared_prefix import hidden_states
from refusal_tokens.tokens import make_rows_sparse

# Positions projected to the vocabulary at once: their logits stay in the processor's cache.
HEAD_CHUNK = 128


@dataclass(frozen=True)
class Smoothing:
    """Label smoothing over the control tokens, where the target is one of them.

    Attributes:
        ids: (1 + categories,), of the control tokens.
        share: of the target's probability that is spread evenly over all of them.
    """

    ids: Tensor
    share: float

    def added_nll(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return what smoothing adds to each negative log-likelihood, (positions,).

        ``(1 - e) * nll(t) + e * mean of nll(k)`` less ``nll(t)``; the normaliser cancels, which
        leaves ``e * (logit of t - mean of the control logits)``.

        Args:
            logits: (positions, vocabulary).
            targets: (positions,), token ids; those that are no control token get 0.
        """
        ids = self.ids.to(logits.device)
        own = logits.gather(1, targets[:, None])[:, 0]
        return self.share * torch.isin(targets, ids) * (own - logits[:, ids].mean(dim=1))


class RefusalTrainer(SFTTrainer):  # type: ignore[misc]
    """Trains control tokens and replies with a fixed share of the loss on the control tokens.

    The loss of a step over R rows, with share s and L reply tokens per row in the data set, is
    ``(s * sum of control nll + (1 - s) / L * sum of reply nll) / R``. The nll of a respond
    token is counted respond_weight times: with enough data that moves the log-odds of responding
    by its logarithm (prior shift, Saerens et al. 2002). Otherwise every control token weighs the
    same and every reply token weighs the same, in whatever batch it falls; plain SFT's mean over
    tokens corresponds to s = 1 / (1 + L), which a share of None stands for.

    With smoothing e, a control token's nll is ``(1 - e) * nll + e * mean nll of all control
    tokens`` (label smoothing, Szegedy et al. 2016, over the control tokens alone).
    """

    def __init__(
        self,
        *args: Any,
        control_ids: list[int],
        control_share: float | None,
        reply_tokens_per_row: float,
        respond_weight: float = 1.0,
        control_smoothing: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._control_ids = torch.tensor(control_ids, dtype=torch.long)
        make_rows_sparse(self.model)
        smoothing = Smoothing(self._control_ids, control_smoothing) if control_smoothing else None
        add_labelled_head(causal_lm(self.model), smoothing)
        share = control_share if control_ids else 0.0
        self._control_weight, self._reply_weight = loss_weights(share, reply_tokens_per_row)
        self._respond_weight = respond_weight

    def _get_train_sampler(self, train_dataset: Dataset[Any] | None = None) -> Sampler[int] | None:
        sampler: Sampler[int] | None = super()._get_train_sampler(train_dataset)
        if not isinstance(sampler, LengthGroupedSampler):
            return sampler
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return ShuffledBatches(sampler.lengths, sampler.batch_size, seed)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the loss of one micro-batch; see the class."""
        labels = inputs["labels"]
        targets = labels[:, 1:][labels[:, 1:] != IGNORED]
        is_control = torch.isin(targets, self._control_ids.to(targets.device))
        weights = torch.where(is_control, self._control_weight, self._reply_weight) / len(labels)
        weights = torch.where(self._is_respond(targets), self._respond_weight * weights, weights)
        outputs = model(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            labels=labels,
            label_weights=weights,
        )
        loss = outputs.loss
        # With num_items_in_batch the Trainer leaves the division by accumulation steps to us.
        if num_items_in_batch is not None:
            loss = loss / self.current_gradient_accumulation_steps
        self._check_finite(loss)
        self._record(outputs, is_control, inputs["attention_mask"])
        return (loss, outputs) if return_outputs else loss

    def _is_respond(self, targets: Tensor) -> Tensor:
        return torch.isin(targets, self._control_ids[:1].to(targets.device))

    def _check_finite(self, loss: Tensor) -> None:
        if not torch.isfinite(loss):
            raise InputError(
                f"the loss is {loss.item()} after step {self.state.global_step}; lower "
                f"learning_rate (it is {self.args.learning_rate:g}) or max_grad_norm. Steps saved "
                f"before it are in {self.args.output_dir}"
            )

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


def loss_weights(control_share: float | None, reply_tokens_per_row: float) -> tuple[float, float]:
    """Return the weight of a control token's and of a reply token's log-likelihood.

    Args:
        control_share: of the loss; None weighs every token the same.
        reply_tokens_per_row: over the whole data set.

    >>> loss_weights(0.5, 50), loss_weights(None, 49)
    ((0.5, 0.01), (0.02, 0.02))
    """
    reply_tokens = max(reply_tokens_per_row, 1.0)
    if control_share is None:
        return 1 / (1 + reply_tokens), 1 / (1 + reply_tokens)
    return control_share, (1 - control_share) / reply_tokens


def causal_lm(model: nn.Module) -> PreTrainedModel:
    """Return the transformers model inside a PEFT wrapper, or the model itself."""
    base: PreTrainedModel = model.get_base_model() if isinstance(model, PeftModel) else model
    return base


def add_labelled_head(model: PreTrainedModel, smoothing: Smoothing | None = None) -> None:
    """Let ``model(..., labels=labels, label_weights=weights)`` project labelled positions only.

    ``weights`` is (labelled positions,), in the order of ``labels[:, 1:]``. The result holds
    ``loss``, the weighted sum of negative log-likelihoods, and, without gradient, ``log_probs`` and
    ``is_top1``, each (labelled positions,). TRL's own fused head scores every position where
    Triton is missing, and builds a dense gradient for a head with trained rows.
    """
    original = model.forward
    transform = logit_transform(model)

    def forward(
        self: PreTrainedModel,
        *args: Any,
        labels: Tensor | None = None,
        label_weights: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        if label_weights is None:
            return original(*args, labels=labels, **kwargs)
        assert labels is not None
        ids, attention = kwargs["input_ids"], kwargs.get("attention_mask")
        attention = torch.ones_like(ids) if attention is None else attention
        hidden = hidden_states(self.base_model, ids, attention)
        mask = labels[:, 1:] != IGNORED
        loss, log_probs, is_top1 = weighted_nll(
            self.get_output_embeddings(),
            transform,
            hidden[:, :-1][mask],
            labels[:, 1:][mask],
            label_weights,
            smoothing,
        )
        return ModelOutput(loss=loss, log_probs=log_probs, is_top1=is_top1)

    model.forward = types.MethodType(forward, model)


def weighted_nll(
    head: nn.Module,
    transform: LogitTransform,
    hidden: Tensor,
    targets: Tensor,
    weights: Tensor,
    smoothing: Smoothing | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the weighted negative log-likelihood of targets, a few positions at a time.

    The gradient of a chunk is taken while its logits are at hand, so neither the logits of all
    positions nor a second projection is needed.

    Args:
        head: hidden states to logits.
        transform: applied to the logits.
        hidden: (positions, width).
        targets: (positions,), token ids.
        weights: (positions,).
        smoothing: added to the loss; the log-probabilities returned stay those of the targets.

    Returns:
        The loss, and without gradient the log-probabilities and whether each target is the most
        likely token, both (positions,).
    """
    parameters = [p for p in head.parameters() if p.requires_grad]
    results: tuple[Tensor, Tensor, Tensor] = _WeightedNLL.apply(  # type: ignore[no-untyped-call]
        head, transform, hidden, targets, weights, smoothing, *parameters
    )
    return results


class _WeightedNLL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        head: nn.Module,
        transform: LogitTransform,
        hidden: Tensor,
        targets: Tensor,
        weights: Tensor,
        smoothing: Smoothing | None,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        wants_grad = any(ctx.needs_input_grad)
        gradient = torch.zeros_like(hidden)
        sums = [torch.zeros_like(p) for p in parameters]
        total = hidden.new_zeros((), dtype=torch.float32)
        log_probs = hidden.new_empty(len(hidden), dtype=torch.float32)
        is_top1 = hidden.new_empty(len(hidden), dtype=torch.bool)
        for start in range(0, len(hidden), HEAD_CHUNK):
            part = slice(start, start + HEAD_CHUNK)
            with torch.set_grad_enabled(wants_grad):
                chunk = hidden[part].detach().requires_grad_(wants_grad)
                logits = transform(head(chunk).float())
                nll = functional.cross_entropy(logits, targets[part], reduction="none")
                added = smoothing.added_nll(logits, targets[part]) if smoothing else 0.0
                loss = (weights[part] * (nll + added)).sum()
            log_probs[part] = -nll.detach()
            is_top1[part] = logits.detach().argmax(dim=-1) == targets[part]
            total += loss.detach()
            if wants_grad:
                gradient[part], *own = torch.autograd.grad(loss, [chunk, *parameters])
                for summed, new in zip(sums, own, strict=True):
                    summed += new
        ctx.save_for_backward(gradient, *sums)
        ctx.mark_non_differentiable(log_probs, is_top1)
        return total, log_probs, is_top1

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
        gradient, *sums = ctx.saved_tensors
        scaled = [grad.to(s.dtype) * s for s in sums]
        return None, None, grad.to(gradient.dtype) * gradient, None, None, None, *scaled
