"""The vLLM logits processor, for both of vLLM's interfaces, over ``steer``.

Pass it with ``--logits-processors refusal_tokens.serving.processor:RefusalTokens``; the command
``refusal-tokens serve`` does, with all that belongs to it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from vllm.sampling_params import SamplingParams
from vllm.v1.sample.logits_processor import LogitsProcessor as V1Processor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor as V2Processor

from refusal_tokens.checkpoint import INFO_FILE, find_checkpoint, load_info
from refusal_tokens.errors import InputError, one_message
from refusal_tokens.serving.plugin import NAME
from refusal_tokens.serving.policies import (
    CHECKPOINT_VARIABLE,
    SETTING_KEY,
    knobs_from_wire,
    server_store,
)
from refusal_tokens.serving.steer import Pending, prompt_row, steer


class RefusalTokens(V1Processor, V2Processor):  # type: ignore[misc]
    """Applies each request's policy at its first position and masks control tokens elsewhere.

    For a model without ``refusal_tokens.json`` it does nothing.
    """

    def __init__(self, vllm_config: Any, *interface: Any) -> None:
        """Prepare: vLLM passes ``(device, is_pin_memory)`` to V1 and the request state to V2."""
        # Of V2 only: what vLLM knows of each slot.
        self._state: Any = interface[0] if len(interface) == 1 else None
        device = interface[0].device if self._state is not None else interface[0]
        self._control = _control_tokens(vllm_config, device)
        # V1: row of the batch -> (request, its output so far). V2: slot -> request.
        self._waiting: dict[int, Any] = {}

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Check a request as it is admitted, and leave its setting for the engine.

        Raises:
            ValueError: for parameters that reach into the decision, or knobs that are not allowed.
        """
        store = server_store()
        if store is None:
            return
        faults = _reaching_faults(sampling_params, set(store.info.control_token_ids))
        try:
            if faults:
                raise one_message(faults, "the request")
            arguments = sampling_params.extra_args or {}
            wire = store.resolve(arguments).to_wire(store.info.taxonomy)
        except InputError as error:
            raise ValueError(str(error)) from None
        sampling_params.extra_args = {**arguments, SETTING_KEY: wire}

    def is_argmax_invariant(self) -> bool:
        """Return that greedy choices change."""
        return False

    # V1 -----------------------------------------------------------------------------------------

    def update_state(self, batch_update: Any) -> None:
        """Follow requests through the batch; those that have their control token are let go."""
        if self._control is None:
            return
        process_dict_updates(self._waiting, batch_update, _new_request)
        for index in [index for index, (_, output) in self._waiting.items() if output]:
            del self._waiting[index]

    # V2 -----------------------------------------------------------------------------------------

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        """Take over a slot; the prompt is read when the decision is due."""
        if self._control is None:
            return False
        self._waiting[req_idx] = sampling_params
        return True

    # Both ---------------------------------------------------------------------------------------

    def apply(self, logits: Tensor, ctx: Any = None) -> Tensor:
        """Apply to (rows, vocabulary); V2 passes the layout of its batch."""
        if self._control is None:
            return logits
        if ctx is None:
            return steer(logits, self._control, [(i, who) for i, (who, _) in self._waiting.items()])
        return steer(logits, self._control, self._due(ctx))

    def _due(self, ctx: Any) -> list[tuple[int, Pending]]:
        """Return the rows of a V2 batch that stand at the last token of their prompt."""
        lengths = self._state.prompt_len.np
        slots = [
            int(slot)
            for slot, seen in zip(ctx.idx_mapping_np, ctx.seq_lens_upper_bound_np, strict=True)
            if int(slot) in self._waiting and seen >= lengths[slot]
        ]
        if not slots:
            return []
        due = []
        places = zip(ctx.expanded_idx_mapping.tolist(), ctx.pos.tolist(), strict=True)
        for row, (slot, position) in enumerate(places):
            if slot in slots and position == lengths[slot] - 1:
                due.append((row, self._pending(slot)))
        # A slot that was resumed past its first position has its control token already.
        for slot in slots:
            del self._waiting[slot]
        return due

    def _pending(self, slot: int) -> Pending:
        def prompt_ids() -> list[int]:
            length = int(self._state.prompt_len.np[slot])
            found: list[int] = self._state.all_token_ids.gpu[slot, :length].tolist()
            return found

        return _pending(self._waiting[slot], prompt_ids)


def _new_request(
    params: SamplingParams, prompt_ids: list[int] | None, output_ids: list[int]
) -> tuple[Pending, list[int]] | None:
    """Return what V1 keeps for a request; None for one resumed after its decision."""
    return None if output_ids else (_pending(params, lambda: prompt_ids or []), output_ids)


def _pending(params: SamplingParams, prompt_ids: Callable[[], list[int]]) -> Pending:
    """Return how a request decides; its prompt matters to sampled decisions alone."""
    knobs, seed = knobs_from_wire(_wire(params))
    row = prompt_row(prompt_ids()) if knobs.temperature else 0
    return Pending(knobs, seed, row)


def _wire(params: SamplingParams) -> Mapping[str, Any]:
    """Return the setting left by ``validate_params``; the default policy where none was left."""
    found = (params.extra_args or {}).get(SETTING_KEY)
    if isinstance(found, Mapping):
        return found
    store = server_store()
    assert store is not None
    return store.resolve({}).to_wire(store.info.taxonomy)


def _control_tokens(vllm_config: Any, device: Any) -> Tensor | None:
    """Return the control ids on the device; None for a model that has none.

    Raises:
        InputError: if the model has refusal tokens and the server is not set up for them.
    """
    store, model = server_store(), str(vllm_config.model_config.model)
    try:
        folder = find_checkpoint(model)
    except InputError:
        if store is not None:
            raise InputError(f"{model}: has no {INFO_FILE}; {CHECKPOINT_VARIABLE} is set") from None
        return None
    info = load_info(folder)
    if store is None or store.info.model_fingerprint != info.model_fingerprint:
        raise InputError(
            f"{folder} has refusal tokens and {CHECKPOINT_VARIABLE} does not name it; start the "
            "server with: refusal-tokens serve CHECKPOINT"
        )
    # Without these the prompt's control-token spellings are not plain text, and a grammar masks
    # the decision.
    wanted = {
        "--tokenizer-mode": vllm_config.model_config.tokenizer_mode,
        "--reasoning-parser": vllm_config.structured_outputs_config.reasoning_parser,
    }
    missing = [f"{option} {NAME}" for option, value in wanted.items() if value != NAME]
    if missing:
        raise InputError(f"vLLM must be started with {' '.join(missing)}; refusal-tokens serve is")
    return torch.tensor(info.control_token_ids, device=device)


def _reaching_faults(params: SamplingParams, control: set[int]) -> list[str]:
    """Return the parameters that would act on control tokens before or after the decision."""
    faults = []
    for name in ("logit_bias", "stop_token_ids"):
        touched = sorted(control.intersection(getattr(params, name) or ()))
        if touched:
            faults.append(f"{name}: names control token {touched[0]}; control tokens are not open")
    for name in ("allowed_token_ids", "bad_words", "thinking_token_budget"):
        if getattr(params, name, None):
            faults.append(f"{name}: not allowed with refusal tokens: it can mask the decision")
    return faults
