"""What a training run will take: rows, tokens, memory, disk and time, before it starts."""

from __future__ import annotations

import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import init_empty_weights
from transformers import AutoModelForCausalLM
from trl import SFTConfig

from refusal_tokens.base_model import fast_dtype
from refusal_tokens.errors import InputError
from refusal_tokens.preparation import Prepared, loading

# Operations per second and core: a round figure for bfloat16 on AVX-512, halved for float32. The
# estimate states its own uncertainty.
FLOPS_PER_CORE = 1.0e11


@dataclass(frozen=True)
class Estimate:
    """An estimate; sizes in GiB, time in minutes.

    Attributes:
        parameters: of the base model.
        memory: weights, optimizer state and the activations of one batch.
        disk: merged model, adapter and one trainer checkpoint.
        minutes: of the training loop; None on an accelerator, where it depends too much on it.
    """

    rows: int
    rows_without_reply: int
    dropped: int
    tokens: int
    steps: int
    parameters: int
    memory: float
    disk: float
    disk_free: float
    minutes: float | None

    def __str__(self) -> str:
        time = "not estimated on an accelerator"
        if self.minutes is not None:
            time = f"about {self.minutes:.0f} minutes, give or take half"
        return "\n".join(
            [
                f"rows     {self.rows} ({self.rows_without_reply} without reply, "
                f"{self.dropped} dropped as longer than max_length)",
                f"tokens   {self.tokens} an epoch; {self.steps} steps",
                f"model    {self.parameters / 1e6:.0f}M parameters",
                f"memory   about {self.memory:.1f} GiB",
                f"disk     about {self.disk:.1f} GiB; {self.disk_free:.1f} GiB free",
                f"time     {time}",
            ]
        )


def estimate(prepared: Prepared, folder: Path) -> Estimate:
    """Estimate a run from its recipe and rows; the weights are not loaded."""
    sft, examples = prepared.recipe.sft, prepared.examples
    config = prepared.config
    remote = loading(prepared.recipe).get("trust_remote_code", False)
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=remote)
    model.tie_weights()
    parameters = sum(p.numel() for p in model.parameters())
    batch = sft.get("per_device_train_batch_size", 8)
    per_step = batch * sft.get("gradient_accumulation_steps", 1)
    epochs = sft.get("num_train_epochs", SFTConfig.num_train_epochs)
    steps = math.ceil(math.ceil(len(examples.examples) / per_step) * epochs)
    if sft.get("max_steps", -1) > 0:
        steps = sft["max_steps"]
    lora = prepared.recipe.peft_config is not None
    return Estimate(
        rows=len(examples.examples),
        rows_without_reply=examples.without_reply,
        dropped=len(examples.dropped),
        tokens=examples.tokens,
        steps=steps,
        parameters=parameters,
        memory=_memory(prepared, parameters, batch, config, lora) / 2**30,
        disk=_disk(parameters, lora) / 2**30,
        disk_free=shutil.disk_usage(_existing(folder)).free / 2**30,
        minutes=_minutes(prepared, parameters, config, steps * per_step, lora),
    )


def check_disk(expected: Estimate, folder: Path) -> None:
    """Refuse a run that would fill the disk.

    Raises:
        InputError: with what is needed and what is free.
    """
    if expected.disk > expected.disk_free:
        raise InputError(
            f"{folder}: the run needs about {expected.disk:.1f} GiB on the disk; "
            f"{expected.disk_free:.1f} GiB are free"
        )


def _memory(prepared: Prepared, parameters: int, batch: int, config: object, lora: bool) -> float:
    weight = 4.0
    if lora:
        weight = 0.6 if prepared.recipe.quantization_config else 2.0
    trained = parameters * 0.04 if lora else parameters
    width = getattr(config, "hidden_size", 1024)
    layers = getattr(config, "num_hidden_layers", 24)
    longest = max(len(example.input_ids) for example in prepared.examples.examples)
    kept = 4 if prepared.recipe.sft.get("gradient_checkpointing", True) else 40
    activations = batch * longest * width * layers * kept * 2
    # Gradient and two AdamW moments in float32, and the Python process with its libraries.
    return parameters * weight + trained * 16 + activations + 0.7 * 2**30


def _disk(parameters: int, lora: bool) -> float:
    saved = 4 if parameters < 1e9 else 2
    trainer = parameters * 0.5 if lora else parameters * 12
    return parameters * saved + trainer


def _minutes(
    prepared: Prepared, parameters: int, config: object, rows: int, lora: bool
) -> float | None:
    if torch.accelerator.is_available():
        return None
    examples = prepared.examples
    embedding = getattr(config, "vocab_size", 0) * getattr(config, "hidden_size", 0)
    tokens = rows * examples.tokens / len(examples.examples)
    # Forward, and backward to the activations; a trained weight needs its own gradient too.
    flops = tokens * (parameters - embedding) * 2 * (2 if lora else 3)
    rate = FLOPS_PER_CORE * (os.cpu_count() or 1)
    if fast_dtype() != torch.bfloat16 or not lora:
        rate /= 2
    return flops / rate / 60 + 1


def _existing(folder: Path) -> Path:
    while not folder.exists():
        folder = folder.parent
    return folder
