"""Steering in transformers: the knobs applied at the decision position of every reply."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, TextIteratorStreamer

from refusal_tokens.checkpoint import Checkpoint, CheckpointInfo, load_checkpoint
from refusal_tokens.decision import decide, draws
from refusal_tokens.errors import InputError
from refusal_tokens.generation import left_padded, pad_id, turn_ends
from refusal_tokens.policy import Policy
from refusal_tokens.row_checks import Messages
from refusal_tokens.rows import messages_from

Prompt = str | Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class Reply:
    """One reply.

    Attributes:
        text: without control tokens.
        decision: ``respond`` or ``refuse``.
        category: of a refusal; None for a response. Also None where an unmasked policy let the
            reply open with no control token.
        probabilities: control token -> probability under masking, before the knobs.
        control_mass: softmax probability of all control tokens together, unmasked; None where a
            server does not tell.
        policy: the setting that was applied.
        token_ids: of the reply, control token first.
    """

    text: str
    decision: str
    category: str | None
    probabilities: Mapping[str, float]
    control_mass: float | None
    policy: Policy
    token_ids: tuple[int, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {**fields, "policy": self.policy.to_dict(), "token_ids": list(self.token_ids)}


@dataclass
class Observation:
    """What was read at the last decision position.

    Attributes:
        control_logits: (sequences, 1 + categories), nats.
        control_mass: (sequences,).
        decisions: (sequences,), 0 to respond, else the category counted from 1; -1 where an
            unmasked policy leaves the choice to the sampler.
    """

    control_logits: np.ndarray
    control_mass: np.ndarray
    decisions: np.ndarray


class RefusalLogitsProcessor(LogitsProcessor):  # type: ignore[misc]
    """Applies policies at the decision position, whatever the text sampling settings are.

    The decision position is found from the ids: the generation prompt has just ended. Nothing is
    counted, so one processor serves any number of ``generate`` calls, left padding, beams,
    ``num_return_sequences`` and further turns. There, all tokens but the decided control token are
    masked; elsewhere the control tokens are.
    """

    def __init__(
        self,
        info: CheckpointInfo,
        policies: Policy | Sequence[Policy],
        rows: Sequence[int] | None = None,
    ) -> None:
        """Prepare a processor.

        Args:
            info: the checkpoint's.
            policies: one for all rows, or one for each prompt of the batch.
            rows: the prompts' numbers, for sampled decisions; default 0, 1, ...

        Raises:
            InputError: if a policy names a knob that the taxonomy lacks.
        """
        self._policies = [policies] if isinstance(policies, Policy) else list(policies)
        self._settings = [policy.knobs(info.taxonomy) for policy in self._policies]
        self._rows = rows
        self._control = torch.tensor(info.control_token_ids)
        self._opening = torch.tensor(info.generation_prompt_ids)
        self.observed: Observation | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the scores, (sequences, vocabulary), with the policies applied."""
        if self._control.device != scores.device:
            self._control = self._control.to(scores.device)
            self._opening = self._opening.to(scores.device)
        # The control token stands for what it opens; inside a reply it would mean nothing.
        masked = scores.index_fill(1, self._control, -torch.inf)
        width = len(self._opening)
        if input_ids.shape[1] < width:
            return masked
        opening = (input_ids[:, -width:] == self._opening).all(dim=1)
        if not opening.any():
            return masked
        return torch.where(opening[:, None], self._at_decision(scores, bool(opening.all())), masked)

    def _at_decision(self, scores: Tensor, every_row: bool) -> Tensor:
        logits = scores[:, self._control].float()
        total = torch.logsumexp(scores.float(), dim=1)
        mass = (torch.logsumexp(logits, dim=1) - total).exp()
        control_logits = logits.cpu().numpy().astype(np.float64)
        decisions = self._decide(control_logits)
        if every_row:
            self.observed = Observation(control_logits, mass.cpu().numpy(), decisions)
        result = torch.full_like(scores, -torch.inf)
        for row, decision in enumerate(decisions):
            if decision >= 0:
                result[row, self._control[decision]] = 0.0
            else:
                result[row] = scores[row]
                bias = np.concatenate([[0.0], self._setting(row, len(decisions)).bias])
                result[row, self._control] += torch.tensor(bias).to(scores)
        return result

    def _index(self, row: int, sequences: int) -> int:
        """The policy of a sequence: generate expands each prompt into equally many sequences."""
        if sequences % len(self._policies):
            raise ValueError(f"{sequences} sequences for {len(self._policies)} policies")
        return row // (sequences // len(self._policies))

    def _setting(self, row: int, sequences: int) -> Any:
        return self._settings[self._index(row, sequences)]

    def _decide(self, control_logits: np.ndarray) -> np.ndarray:
        n = len(control_logits)
        decisions = np.empty(n, np.int64)
        copies = n // len(self._rows) if self._rows is not None else 1
        for row in range(n):
            index = self._index(row, n)
            policy, setting = self._policies[index], self._settings[index]
            number = self._rows[row // copies] if self._rows is not None else row
            draw = draws(policy.seed, [number], [row % copies]) if setting.temperature else None
            decisions[row] = decide(control_logits[row : row + 1], setting, draw)[0]
            if not policy.masked:
                floor = setting.floor
                held = (control_logits[row, 1:] + floor > control_logits[row, 0]).any()
                decisions[row] = decisions[row] if held else -1
        return decisions


@dataclass(frozen=True)
class SteeredModel:
    """A checkpoint whose replies obey policies.

    >>> model = SteeredModel.from_checkpoint("runs/my-run")  # doctest: +SKIP
    >>> reply = model.generate("How do I pick a lock?", Policy(bias={"safety": 2}))[0]
    ... # doctest: +SKIP
    """

    checkpoint: Checkpoint

    @classmethod
    def from_checkpoint(
        cls, path: str | Path, *, dtype: str = "auto", device: str | None = None
    ) -> SteeredModel:
        """Load a checkpoint or run folder; see ``checkpoint.load_checkpoint``."""
        return cls(load_checkpoint(path, dtype=dtype, device=device))

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        policy: Policy | Sequence[Policy] | None = None,
        *,
        rows: Sequence[int] | None = None,
        **settings: Any,
    ) -> list[Reply]:
        """Reply to one prompt or several.

        Args:
            prompts: a text, a conversation (list of messages), or a list of either.
            policy: one for all prompts, or one each; default: no bias, rule ``route``.
            rows: the prompts' numbers, for sampled decisions; default 0, 1, ...
            settings: of transformers' ``generate``; ``max_new_tokens`` is 256 by default.

        Returns:
            The replies, ``num_return_sequences`` for each prompt, in the order of the prompts.

        Raises:
            InputError: for an empty prompt, roles out of order, or an unknown knob.
        """
        conversations = conversations_from(prompts)
        policies = policies_for(policy, len(conversations))
        numbers = list(rows) if rows is not None else list(range(len(conversations)))
        processor = RefusalLogitsProcessor(self.checkpoint.info, policies, numbers)
        inputs = self.inputs([self.checkpoint.encoder.prompt_ids(c) for c in conversations])
        output = self._generate(inputs, processor, settings)
        width = inputs["input_ids"].shape[1]
        copies = len(output) // len(conversations)
        # With beams the returned sequences are fewer than those that were scored.
        assert processor.observed is not None
        scored = len(processor.observed.control_logits) // len(conversations)
        replies = []
        for row, ids in enumerate(output[:, width:].tolist()):
            prompt, copy = divmod(row, copies)
            source = prompt * scored + (copy if copies == scored else 0)
            replies.append(self._reply(ids, policies[prompt], processor.observed, source))
        return replies

    def stream(
        self, prompt: Prompt, policy: Policy | None = None, **settings: Any
    ) -> Generator[str, None, Reply]:
        """Yield the text of one reply piece by piece; the generator's return value is the Reply."""
        (conversation,) = conversations_from(prompt)
        policies = policies_for(policy, 1)
        processor = RefusalLogitsProcessor(self.checkpoint.info, policies, [0])
        inputs = self.inputs([self.checkpoint.encoder.prompt_ids(conversation)])
        streamer = TextIteratorStreamer(
            self.checkpoint.tokenizer, skip_prompt=True, skip_special_tokens=True
        )
        result: dict[str, Any] = {}

        def work() -> None:
            try:
                result["ids"] = self._generate(inputs, processor, settings | {"streamer": streamer})
            except BaseException as error:  # handed to the reading thread, which raises it
                result["error"] = error
                streamer.end()

        thread = Thread(target=work, daemon=True)
        thread.start()
        yield from (piece for piece in streamer if piece)
        thread.join()
        if "error" in result:
            raise result["error"]
        assert processor.observed is not None
        ids = result["ids"][0, inputs["input_ids"].shape[1] :].tolist()
        return self._reply(ids, policies[0], processor.observed, 0)

    def inputs(self, prompts: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        """Return batched ids and mask, padded on the left: all decision positions fall together."""
        ids, mask = left_padded(prompts, self.pad_id, self.checkpoint.model.device)
        return {"input_ids": ids, "attention_mask": mask}

    @property
    def pad_id(self) -> int:
        """The id that pads batches."""
        return pad_id(self.checkpoint.tokenizer)

    @property
    def ends(self) -> tuple[int, ...]:
        """The ids that end a turn."""
        return turn_ends(self.checkpoint.model)

    def _until_end(self, ids: list[int]) -> list[int]:
        """The ids up to the end of the turn: after it a batch holds padding."""
        last = next((i for i, token in enumerate(ids) if token in self.ends), len(ids))
        return ids[: last + 1]

    def _generate(
        self,
        inputs: Mapping[str, Tensor],
        processor: RefusalLogitsProcessor,
        settings: Mapping[str, Any],
    ) -> Tensor:
        own = {"max_new_tokens": 256, "pad_token_id": self.pad_id, **settings}
        others = own.pop("logits_processor", [])
        processors = LogitsProcessorList([*others, processor])
        generated = self.checkpoint.model.generate(**inputs, logits_processor=processors, **own)
        return cast(Tensor, generated)

    def _reply(self, ids: list[int], policy: Policy, observed: Observation, row: int) -> Reply:
        info = self.checkpoint.info
        controls = list(info.control_token_ids)
        ids = self._until_end(ids)
        opened = controls.index(ids[0]) if ids and ids[0] in controls else None
        logits = observed.control_logits[row]
        shares = np.exp(logits - np.logaddexp.reduce(logits))
        return Reply(
            text=self.checkpoint.tokenizer.decode(ids, skip_special_tokens=True).strip(),
            decision="refuse" if opened else "respond",
            category=info.taxonomy.knobs[opened - 1] if opened else None,
            probabilities=dict(zip(info.taxonomy.tokens, map(float, shares), strict=True)),
            control_mass=float(observed.control_mass[row]),
            policy=policy,
            token_ids=tuple(ids),
        )


def conversations_from(prompts: Prompt | Sequence[Prompt]) -> list[Messages]:
    """Return one conversation a prompt, from one prompt or several.

    Raises:
        InputError: for no prompt, an empty one, or roles out of order.
    """
    if isinstance(prompts, str) or (prompts and isinstance(prompts[0], Mapping)):
        return [messages_from(cast(Prompt, prompts))]
    if not prompts:
        raise InputError("no prompt")
    return [messages_from(cast(Prompt, prompt)) for prompt in prompts]


def policies_for(policy: Policy | Sequence[Policy] | None, n: int) -> list[Policy]:
    """Return one policy a prompt, from none, one for all or one each.

    Raises:
        InputError: for another number of policies than prompts.
    """
    if policy is None or isinstance(policy, Policy):
        return [policy or Policy()] * n
    if len(policy) != n:
        raise InputError(f"{len(policy)} policies for {n} prompts; allowed: one, or one each")
    return list(policy)
