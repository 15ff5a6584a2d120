"""What the tests of serving share."""

from __future__ import annotations

import pytest

from refusal_tokens.checkpoint import CheckpointInfo
from refusal_tokens.taxonomy import default_taxonomy
from serving.planted_ids import CONTROL_IDS


@pytest.fixture(scope="session")
def info() -> CheckpointInfo:
    """What a checkpoint with the default taxonomy says of itself."""
    return CheckpointInfo(
        taxonomy=default_taxonomy(),
        control_token_ids=CONTROL_IDS,
        generation_prompt_ids=(1, 2),
        system_prompt=None,
        chat_template_kwargs={},
        base_model="a model",
        recipe={},
        data={},
        versions={},
        model_fingerprint="f" * 64,
    )
