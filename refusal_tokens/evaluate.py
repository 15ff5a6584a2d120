"""Generate, judge the text, and measure whether it agrees with the token that opened it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tqdm import tqdm
from transformers import LogitsProcessorList

from refusal_tokens.curves import Rate, rate
from refusal_tokens.errors import InputError, unknown
from refusal_tokens.files import atomic_file
from refusal_tokens.judge import judge
from refusal_tokens.policy import Policy
from refusal_tokens.rows import Row
from refusal_tokens.steering import RefusalLogitsProcessor, SteeredModel
from refusal_tokens.taxonomy import RESPOND_TOKEN

JUDGE = "rules-1"


@dataclass(frozen=True)
class Outcome:
    """One generated reply, judged.

    Attributes:
        forced: the control token that was forced; None where the model decided.
        decision: the control token that opened the reply.
        verdict: ``refused``, ``partly``, ``answered`` or ``undecided``.
    """

    id: str
    label: str | None
    category: str | None
    group: str
    forced: str | None
    decision: str
    text: str
    verdict: str
    judge: str = JUDGE

    @property
    def adheres(self) -> bool:
        """Whether the text does what its control token says."""
        return self.verdict == ("answered" if self.decision == RESPOND_TOKEN else "refused")


def forced_outcomes(
    model: SteeredModel,
    rows: Sequence[Row],
    tokens: Sequence[str],
    *,
    max_new_tokens: int = 64,
    batch_size: int = 16,
) -> list[Outcome]:
    """Generate one greedy reply for each row and each forced control token, and judge it.

    Raises:
        InputError: for a token that the taxonomy does not have.
    """
    taxonomy = model.checkpoint.info.taxonomy
    for token in tokens:
        if token not in taxonomy.tokens:
            raise InputError(unknown("control token", token, taxonomy.tokens))
    jobs = [(row, taxonomy.tokens.index(token)) for token in tokens for row in rows]
    outcomes = []
    with tqdm(total=len(jobs), desc="Generating", unit="reply", delay=2) as bar:
        for start in range(0, len(jobs), batch_size):
            batch = jobs[start : start + batch_size]
            texts = _continue_after(model, batch, max_new_tokens)
            for (row, index), text in zip(batch, texts, strict=True):
                token = taxonomy.tokens[index]
                outcomes.append(_outcome(row, token, token, index, text, model))
            bar.update(len(batch))
    return outcomes


def _continue_after(
    model: SteeredModel, batch: Sequence[tuple[Row, int]], max_new_tokens: int
) -> list[str]:
    """Generate past a control token that is already in place."""
    checkpoint = model.checkpoint
    controls = checkpoint.info.control_token_ids
    prompts = [[*checkpoint.encoder.prompt_ids(row.prompt), controls[i]] for row, i in batch]
    processor = RefusalLogitsProcessor(checkpoint.info, Policy())
    inputs = model.inputs(prompts)
    with torch.no_grad():
        output = checkpoint.model.generate(
            **inputs,
            logits_processor=LogitsProcessorList([processor]),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=model.pad_id,
        )
    new = output[:, inputs["input_ids"].shape[1] :].tolist()
    return [text.strip() for text in checkpoint.tokenizer.batch_decode(new, True)]


def _outcome(
    row: Row, forced: str | None, decision: str, index: int, text: str, model: SteeredModel
) -> Outcome:
    knobs = model.checkpoint.info.taxonomy.knobs
    expected = knobs[index - 1] if index else None
    verdict = judge(text, expected)
    return Outcome(row.id, row.label, row.category, row.group, forced, decision, text, verdict)


def adherence(outcomes: Iterable[Outcome]) -> dict[str, Rate]:
    """Return the share of replies whose text agrees with the token, by token."""
    by_token: dict[str, list[bool]] = {}
    for outcome in outcomes:
        by_token.setdefault(outcome.decision, []).append(outcome.adheres)
    return {token: rate(sum(found), len(found)) for token, found in by_token.items()}


def write_outcomes(path: str | Path, outcomes: Sequence[Outcome], metadata: Any) -> None:
    """Write an outcomes file atomically."""
    import json

    table = pa.Table.from_pylist([asdict(outcome) for outcome in outcomes])
    meta = {b"refusal_tokens": json.dumps({"schema_version": 1, **metadata})}
    with atomic_file(path) as temporary:
        pq.write_table(table.replace_schema_metadata(meta), temporary)
