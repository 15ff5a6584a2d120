"""What the tests of serving share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from conftest import ROOT

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


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that vLLM can serve; the tiny models' heads are too small for it.

    ``REFUSAL_TOKENS_TEST_CHECKPOINT``, or the default run where there is one, or trained here for a
    few steps.
    """
    named = os.environ.get("REFUSAL_TOKENS_TEST_CHECKPOINT")
    usual = ROOT / "runs" / "smollm2-135m-lora-smollm2-135m-instruct"
    if named or usual.is_dir():
        return Path(named or usual)
    from refusal_tokens.cli import main

    folder = tmp_path_factory.mktemp("run") / "short"
    # A high learning rate: after so few steps decisions should not hang on rounding.
    settings = [
        "max_steps=40",
        "learning_rate=2e-3",
        "max_length=96",
        "refusal_tokens.calibration=[]",
    ]
    sets = [word for setting in settings for word in ("--set", setting)]
    recipe = str(ROOT / "recipes" / "smollm2-135m-lora.yaml")
    assert main(["train", recipe, "--output-dir", str(folder), *sets]) == 0
    return folder
