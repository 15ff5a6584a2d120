"""The model card of a checkpoint, filled from its run."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from refusal_tokens.summary import Summary, summary_table

if TYPE_CHECKING:
    from refusal_tokens.checkpoint import CheckpointInfo


def model_card(info: CheckpointInfo, summary: Summary | None) -> str:
    """Return the card as Markdown.

    Args:
        info: the checkpoint's.
        summary: of the test rows at bias 0; None before they were profiled.
    """
    tokens = "\n".join(
        f"| `{token}` | {number} | {description} |"
        for token, number, description in zip(
            info.taxonomy.tokens,
            info.control_token_ids,
            info.taxonomy.descriptions,
            strict=True,
        )
    )
    data = "\n".join(f"| {k} | {v['rows']} | `{v['hash'][:16]}` |" for k, v in info.data.items())
    training = "\n".join(f"- {key}: {value}" for key, value in info.training.items())
    versions = ", ".join(f"{name} {version}" for name, version in info.versions.items())
    return f"""---
base_model: {info.base_model}
library_name: transformers
tags: [refusal-tokens, trl, sft]
---
# {info.base_model} with refusal tokens

Every reply of this model opens with a control token. Biasing the logits of these tokens at the
first position of the reply sets how readily the model declines each kind of request
("Refusal Tokens", Jain et al., arXiv 2412.06748).

| token | id | for |
| --- | --- | --- |
{tokens}

Plain transformers, vLLM and llama.cpp load this folder; without knobs the model decides by itself.

## On its test rows, at bias 0, masked, rule `route`

{_results(summary)}

Rates carry 95% Wilson intervals. They hold for prompts like the test rows.

## Limits

The tokens make refusal adjustable; they do not make a model safe. They say nothing about attacks
on the prompt. A small model's answers can be wrong.

## Training

{training or "- no record"}

| rows | n | hash |
| --- | --- | --- |
{data}

Versions: {versions}. Model fingerprint `{info.model_fingerprint}`.

<details><summary>Recipe</summary>

```json
{json.dumps(info.recipe, indent=2, default=str)}
```

</details>
"""


def _results(summary: Summary | None) -> str:
    return "Not measured." if summary is None else f"```\n{summary_table(summary)}\n```"
