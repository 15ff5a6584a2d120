"""Rows to training examples: prompt, control token, reply, and labels on the last two."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from refusal_tokens.chat import ChatEncoder
from refusal_tokens.rows import Row, part_of
from refusal_tokens.taxonomy import Taxonomy

IGNORED = -100


@dataclass(frozen=True)
class Example:
    """One training example.

    Attributes:
        input_ids: prompt, control token, reply, end of turn.
        labels: the same length; ``IGNORED`` on the prompt (and on the control token where the row
            masks it).
        prompt_length: the decision position: ``input_ids[prompt_length]`` is the control token, or
            the first token of the reply in an example without.
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
        without_token: examples whose reply follows the prompt directly.
        without_reply: examples that train the control token alone.
        reply_tokens: labels on reply tokens.
        tokens: all tokens, prompts included.
    """

    examples: tuple[Example, ...]
    dropped: tuple[str, ...]
    control_tokens: int
    without_token: int
    without_reply: int
    reply_tokens: int
    tokens: int


def build_example(
    row: Row,
    encoder: ChatEncoder,
    taxonomy: Taxonomy,
    control_ids: Sequence[int],
    *,
    with_token: bool = True,
) -> Example:
    """Build one example and assert where its decision position is.

    Args:
        row: labelled.
        encoder: prompts and replies to ids.
        taxonomy: which token opens the reply.
        control_ids: of the taxonomy's tokens.
        with_token: False lets the reply follow the prompt directly.

    Raises:
        AssertionError: if the control token would not stand right after the generation prompt, or
            elsewhere too.
    """
    prompt = encoder.prompt_ids(row.prompt)
    reply = encoder.reply_ids(row.response) if row.response is not None else []
    expected = list(encoder.generation_prompt_ids)
    if expected and prompt[-len(expected) :] != expected:
        raise AssertionError(f"row {row.id!r}: the prompt does not end in the generation prompt")
    if set(control_ids) & {*prompt, *reply}:
        raise AssertionError(f"row {row.id!r}: a control token outside the decision position")
    opening = []
    if with_token:
        opening = [control_ids[taxonomy.token_index(row.label or "", row.category)]]
    return Example(
        input_ids=[*prompt, *opening, *reply],
        labels=[
            *[IGNORED] * len(prompt),
            *(opening if row.train_control else [IGNORED] * len(opening)),
            *reply,
        ],
        prompt_length=len(prompt),
    )


def opens_plainly(row: Row, share: float, seed: int) -> bool:
    """Whether a row is among the ``share`` whose reply is trained without a control token.

    It depends on the row's id and the seed alone. Rows without reply have nothing else to train,
    and a reply whose token is masked goes against its prompt: neither is ever chosen.
    """
    if not share or row.response is None or not row.train_control:
        return False
    return part_of(row.id, {"plain": share, "opened": 1 - share}, f"token {seed}") == "plain"


def keeps_reply(row: Row, share: float, seed: int) -> bool:
    """Whether a row is among the ``share`` whose reply is trained beside its control token.

    It depends on the row's id and the seed alone. A reply whose token is masked has nothing else to
    train and is always kept.
    """
    if row.response is None or not row.train_control:
        return True
    return part_of(row.id, {"kept": share, "left": 1 - share}, f"reply {seed}") == "kept"


def build_joined(
    asking: Row,
    obeying: Row,
    encoder: ChatEncoder,
    taxonomy: Taxonomy,
    control_ids: Sequence[int],
) -> Example:
    """Build one example of two rows with the same prompt, and so train the prompt's tokens once.

    The decision is trained on the first row's token; the input goes on with the second row's token,
    which goes against the prompt, and with its reply.

    Args:
        asking: without reply.
        obeying: its control token masked.
        encoder: prompts and replies to ids.
        taxonomy: which token opens a reply.
        control_ids: of the taxonomy's tokens.
    """
    example = build_example(obeying, encoder, taxonomy, control_ids)
    labels = list(example.labels)
    labels[example.prompt_length] = control_ids[
        taxonomy.token_index(asking.label or "", asking.category)
    ]
    return replace(example, labels=labels)


def joined_pairs(rows: Sequence[Row]) -> dict[str, Row]:
    """Return, by the id of a row without reply, the counterfactual row that shares its example.

    They belong together where prompt and group are the same; a row is in one pair at most.
    """
    obeying = {_place(row): row for row in rows if not row.train_control}
    return {
        row.id: obeying.pop(place)
        for row in rows
        if row.train_control and row.response is None and (place := _place(row)) in obeying
    }


def _place(row: Row) -> tuple[str, str]:
    return row.group, row.prompt_sha256


def build_examples(
    rows: Sequence[Row],
    encoder: ChatEncoder,
    taxonomy: Taxonomy,
    control_ids: Sequence[int],
    max_length: int | None,
    *,
    reply_share: float = 1.0,
    share_without_token: float = 0.0,
    seed: int = 0,
) -> ExampleSet:
    """Build the examples of a data set; rows longer than ``max_length`` are dropped and counted.

    A row without reply shares one example with a counterfactual row of its prompt and group.

    Args:
        rows: labelled.
        encoder: prompts and replies to ids.
        taxonomy: which token opens a reply.
        control_ids: of the taxonomy's tokens; none for a model without control tokens.
        max_length: in tokens; None keeps all.
        reply_share: see ``keeps_reply``; the other rows train their control token alone.
        share_without_token: see ``opens_plainly``.
        seed: of the choice of those rows.
    """
    if control_ids:
        rows = [r if keeps_reply(r, reply_share, seed) else replace(r, response=None) for r in rows]
    kept, dropped = [], []
    without_token = 0
    joined = joined_pairs(rows) if control_ids else {}
    taken = {row.id for row in joined.values()}
    for row in rows:
        if row.id in taken:
            continue
        with_token = bool(control_ids) and not opens_plainly(row, share_without_token, seed)
        ids = [row.id]
        if row.id in joined:
            example = build_joined(row, joined[row.id], encoder, taxonomy, control_ids)
            ids.append(joined[row.id].id)
        else:
            example = build_example(row, encoder, taxonomy, control_ids, with_token=with_token)
        if max_length is not None and len(example.input_ids) > max_length:
            dropped += ids
        elif any(label != IGNORED for label in example.labels):
            kept.append(example)
            without_token += not with_token
        else:
            dropped += ids
    controls = set(control_ids)
    labels = [label for example in kept for label in example.labels if label != IGNORED]
    n_control = sum(label in controls for label in labels)
    return ExampleSet(
        examples=tuple(kept),
        dropped=tuple(dropped),
        control_tokens=n_control,
        without_token=without_token,
        without_reply=sum(len(e.input_ids) == e.prompt_length + 1 for e in kept),
        reply_tokens=len(labels) - n_control,
        tokens=sum(len(example.input_ids) for example in kept),
    )
