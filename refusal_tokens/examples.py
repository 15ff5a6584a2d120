"""Rows to training examples: prompt, control token, reply, and labels on the last two."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from refusal_tokens.chat import ChatEncoder
from refusal_tokens.rows import Row
from refusal_tokens.taxonomy import Taxonomy

IGNORED = -100


@dataclass(frozen=True)
class Example:
    """One training example.

    Attributes:
        input_ids: prompt, control token, reply, end of turn.
        labels: the same length; ``IGNORED`` on the prompt (and on the control token where the row
            masks it).
        prompt_length: the decision position: ``input_ids[prompt_length]`` is the control token.
    """

    input_ids: list[int]
    labels: list[int]
    prompt_length: int


@dataclass(frozen=True)
class ExampleSet:
    """Examples with their counts.

    Attributes:
        examples: in the order of the rows that were kept.
        dropped: ids of rows longer than ``max_length``.
        control_tokens: labels on control tokens.
        reply_tokens: labels on reply tokens.
        tokens: all tokens, prompts included.
    """

    examples: tuple[Example, ...]
    dropped: tuple[str, ...]
    control_tokens: int
    reply_tokens: int
    tokens: int


def build_example(
    row: Row, encoder: ChatEncoder, taxonomy: Taxonomy, control_ids: Sequence[int]
) -> Example:
    """Build one example and assert where its decision position is.

    Raises:
        AssertionError: if the control token would not stand right after the generation prompt, or
            elsewhere too.
    """
    prompt = encoder.prompt_ids(row.prompt)
    control = control_ids[taxonomy.token_index(row.label or "", row.category)]
    reply = encoder.reply_ids(row.response) if row.response is not None else []
    expected = list(encoder.generation_prompt_ids)
    if expected and prompt[-len(expected) :] != expected:
        raise AssertionError(f"row {row.id!r}: the prompt does not end in the generation prompt")
    if set(control_ids) & {*prompt, *reply}:
        raise AssertionError(f"row {row.id!r}: a control token outside the decision position")
    return Example(
        input_ids=[*prompt, control, *reply],
        labels=[IGNORED] * len(prompt) + [control if row.train_control else IGNORED, *reply],
        prompt_length=len(prompt),
    )


def build_examples(
    rows: Sequence[Row],
    encoder: ChatEncoder,
    taxonomy: Taxonomy,
    control_ids: Sequence[int],
    max_length: int | None,
) -> ExampleSet:
    """Build the examples of a data set; rows longer than ``max_length`` are dropped and counted."""
    kept, dropped = [], []
    for row in rows:
        example = build_example(row, encoder, taxonomy, control_ids)
        if max_length is not None and len(example.input_ids) > max_length:
            dropped.append(row.id)
        elif any(label != IGNORED for label in example.labels):
            kept.append(example)
        else:
            dropped.append(row.id)
    controls = set(control_ids)
    labels = [label for example in kept for label in example.labels if label != IGNORED]
    n_control = sum(label in controls for label in labels)
    return ExampleSet(
        examples=tuple(kept),
        dropped=tuple(dropped),
        control_tokens=n_control,
        reply_tokens=len(labels) - n_control,
        tokens=sum(len(example.input_ids) for example in kept),
    )
