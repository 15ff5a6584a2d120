"""Stored control logits against real generation: the same decisions, and how much faster.

    python benchmarks/against_generate.py [--checkpoint runs/NAME] [--data data/test.jsonl]

First, the token that ``generate`` really opens each reply with is held against the NumPy rule on
the same logits: every rule greedily, and sampled decisions at 20 settings, whose refusal rates must
lie within a 99% binomial band. Then the time for 21 settings over 200 prompts: one profile and
NumPy, against the published way of one run a setting (prefill, then 128 tokens), measured on a
smaller draw and scaled; the draw is printed. A small model's replies end sooner than that, so the
ratio is given twice: for 128 tokens each, and for replies that may end.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import binom
from tqdm import tqdm
from transformers import LogitsProcessorList

from refusal_tokens.decision import RULES, decide, probabilities
from refusal_tokens.policy import Policy
from refusal_tokens.prefill import profile_rows
from refusal_tokens.rows import Row, read_rows
from refusal_tokens.steering import RefusalLogitsProcessor, SteeredModel

PROMPTS, SETTINGS, NEW_TOKENS = 200, 21, 128
BATCH = 16


def opened(
    model: SteeredModel, rows: list[Row], policy: Policy, new_tokens: int, at_least: int = 0
) -> Any:
    """The decision that each reply opens with, and the control logits it was taken on."""
    encoder, info = model.checkpoint.encoder, model.checkpoint.info
    decisions, logits = [], []
    for start in range(0, len(rows), BATCH):
        part = rows[start : start + BATCH]
        numbers = list(range(start, start + len(part)))
        processor = RefusalLogitsProcessor(info, [policy] * len(part), numbers)
        inputs = model.inputs([encoder.prompt_ids(row.prompt) for row in part])
        output = model.checkpoint.model.generate(  # type: ignore[operator]
            **inputs,
            logits_processor=LogitsProcessorList([processor]),
            max_new_tokens=new_tokens,
            min_new_tokens=at_least or None,
            do_sample=False,
            pad_token_id=model.pad_id,
        )
        first = output[:, inputs["input_ids"].shape[1]].tolist()
        decisions += [info.control_token_ids.index(token) for token in first]
        assert processor.observed is not None
        logits.append(np.asarray(processor.observed.control_logits))
    return np.array(decisions), np.concatenate(logits)


def same_decisions(model: SteeredModel, rows: list[Row]) -> dict[str, Any]:
    """Greedy: how many differ. Sampled: at how many of 20 settings the rate leaves its band."""
    taxonomy = model.checkpoint.info.taxonomy
    random = np.random.default_rng(0)
    differ = {}
    for rule in RULES:
        bias = {knob: float(random.normal(0, 2)) for knob in taxonomy.knobs}
        policy = Policy(rule=rule, bias=bias)
        decisions, logits = opened(model, rows, policy, 1)
        differ[rule] = int((decisions != decide(logits, policy.knobs(taxonomy))).sum())
    outside = 0
    for number in tqdm(range(20), desc="sampled settings", disable=None):
        policy = Policy(
            rule=RULES[number % 3],
            bias={knob: float(random.normal(0, 2)) for knob in taxonomy.knobs},
            temperature=float(random.uniform(0.5, 2)),
            seed=number,
        )
        decisions, logits = opened(model, rows, policy, 1)
        share = float(1 - probabilities(logits, policy.knobs(taxonomy))[:, 0].mean())
        low, high = binom.interval(0.99, len(rows), share)
        outside += not low <= (decisions > 0).sum() <= high
    return {
        "prompts": len(rows),
        "greedy decisions that differ": differ,
        "sampled settings outside their 99% band, of 20": outside,
    }


def speed(model: SteeredModel, rows: list[Row], draw: int) -> dict[str, Any]:
    """Seconds of both ways, and the ratio."""
    taxonomy = model.checkpoint.info.taxonomy
    rows = rows[:PROMPTS]
    # Neither way pays for the first call of a kernel.
    profile_rows(model.checkpoint, rows[:BATCH], progress=False)
    opened(model, rows[:BATCH], Policy(), 2)
    began = time.perf_counter()
    profile = profile_rows(model.checkpoint, rows, progress=False)
    for value in np.linspace(-10, 10, SETTINGS):
        setting = Policy(bias=dict.fromkeys(taxonomy.knobs, float(value))).knobs(taxonomy)
        decide(profile.control_logits, setting)
    own = time.perf_counter() - began
    sample = rows[:: len(rows) // draw][:draw]
    published = {}
    for name, at_least in (("128 tokens", NEW_TOKENS), ("up to 128 tokens", 0)):
        began = time.perf_counter()
        opened(model, sample, Policy(), NEW_TOKENS, at_least)
        published[name] = (time.perf_counter() - began) / draw * len(rows) * SETTINGS
    return {
        "profile and 21 settings, seconds": own,
        "one run a setting, seconds, scaled": published,
        "measured on prompts x settings": [draw, 1],
        "ratio": {name: seconds / own for name, seconds in published.items()},
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", default="runs/smollm2-135m-lora-smollm2-135m-instruct")
    parser.add_argument("--data", type=Path, default=Path("data/test.jsonl"))
    parser.add_argument("--draw", type=int, default=32)
    parser.add_argument("--dtype", default="auto", help="of the weights; default: as saved")
    options = parser.parse_args()
    torch.manual_seed(0)
    model = SteeredModel.from_checkpoint(options.checkpoint, dtype=options.dtype)
    rows = read_rows([options.data], model.checkpoint.info.taxonomy)
    step = max(1, len(rows) // 300)
    results = {
        "decisions": same_decisions(model, rows[::step][:300]),
        "speed": speed(model, rows[::step], options.draw),
    }
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
