"""What steering costs in ``generate``: 64 new tokens with and without, in turn.

    python benchmarks/steering_overhead.py [--checkpoint runs/NAME] [--rounds 10]

Both runs continue the same ids past the same control token, so that they do the same work; the
steered one carries the processor at every step. Prints the median of the paired ratios.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
from transformers import LogitsProcessorList

from refusal_tokens.checkpoint import find_checkpoint
from refusal_tokens.errors import InputError
from refusal_tokens.policy import Policy
from refusal_tokens.steering import RefusalLogitsProcessor, SteeredModel

PROMPTS = ["Describe how a bicycle stays upright.", "Write a short note to thank a neighbour."] * 4
NEW_TOKENS = 64


def seconds(model: SteeredModel, steered: bool) -> float:
    """Time one batched call of exactly ``NEW_TOKENS`` tokens."""
    checkpoint = model.checkpoint
    encoder = checkpoint.encoder
    prompts = [encoder.prompt_ids([{"role": "user", "content": text}]) for text in PROMPTS]
    processors = LogitsProcessorList()
    if steered:
        policy = Policy(bias=dict.fromkeys(checkpoint.info.taxonomy.knobs, -50.0))
        processors.append(RefusalLogitsProcessor(checkpoint.info, policy))
    began = time.perf_counter()
    checkpoint.model.generate(  # type: ignore[operator]
        **model.inputs(prompts),
        logits_processor=processors,
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
        pad_token_id=model.pad_id,
    )
    return time.perf_counter() - began


def main() -> None:
    """Measure in turn and print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", default="runs/smollm2-135m-lora-smollm2-135m-instruct")
    parser.add_argument("--rounds", type=int, default=10)
    arguments = parser.parse_args()
    try:
        find_checkpoint(Path(arguments.checkpoint))
    except InputError as error:
        raise SystemExit(f"error: {error}") from None
    torch.manual_seed(0)
    model = SteeredModel.from_checkpoint(arguments.checkpoint)
    seconds(model, True)
    pairs = [(seconds(model, True), seconds(model, False)) for _ in range(arguments.rounds)]
    ratios = [steered / plain for steered, plain in pairs]
    print(f"steered / unsteered, {NEW_TOKENS} new tokens, {len(PROMPTS)} prompts a batch:")
    print(
        f"median {statistics.median(ratios):.4f}, from {min(ratios):.4f} to {max(ratios):.4f}, "
        f"{len(ratios)} pairs; unsteered {statistics.median(p for _, p in pairs):.2f} s"
    )


if __name__ == "__main__":
    main()
