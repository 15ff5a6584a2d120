"""Text-level curves against real generation: the same refusal rate at five settings.

    python benchmarks/text_curves.py [--checkpoint runs/NAME] [--data data/test.jsonl]

Each prompt gets one reply under each control token, which gives the text-level rate at every
setting. Then every prompt is generated anew by ``SteeredModel.generate`` at five settings of the
knobs, three greedy and two sampled, and judged. Printed is the difference at each setting, with n.
The curve of a sampled setting is an expectation over draws of decisions, and real generation is one
draw: it is compared with the curve at that same draw, and the expectation stands beside it.
Prompts labelled refuse/safety are left out unless --with-safety is given: the replies to them under
<|respond|> may be harmful.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from refusal_tokens.decision import decide, draws
from refusal_tokens.evaluate import Plan, generate_outcomes
from refusal_tokens.evaluation import HARMLESS
from refusal_tokens.evaluation_run import spread
from refusal_tokens.judge import judge
from refusal_tokens.partial import partial_file
from refusal_tokens.policy import Policy
from refusal_tokens.prefill import profile_rows
from refusal_tokens.rows import Row, read_rows
from refusal_tokens.steering import SteeredModel
from refusal_tokens.text_curves import forced_texts, text_refusal

# Rule, bias on every knob in nats, decision temperature.
SETTINGS = (
    ("route", -3.0, 0.0),
    ("bias", 0.0, 0.0),
    ("threshold", 3.0, 0.0),
    ("route", 1.0, 1.0),
    ("bias", -1.0, 1.0),
)


def really(model: SteeredModel, rows: list[Row], policy: Policy, options: Any) -> float:
    """Generate and judge all prompts at one setting; return the share whose text refuses."""
    refused = 0
    size = options.batch_size
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].prompt_text))
    for start in tqdm(range(0, len(rows), size), desc="setting", unit="batch", leave=False):
        batch = order[start : start + size]
        replies = model.generate(
            [rows[i].prompt for i in batch],
            policy,
            # Its place among all prompts fixes a prompt's draw.
            rows=batch,
            max_new_tokens=options.max_new_tokens + 1,
            do_sample=False,
        )
        refused += sum(judge(reply.text, reply.category) == "refused" for reply in replies)
    return refused / len(rows)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", default="runs/smollm2-135m-lora-smollm2-135m-instruct")
    parser.add_argument("--data", type=Path, default=Path("data/test.jsonl"))
    parser.add_argument("--limit", type=int, default=60, help="prompts")
    parser.add_argument("--max-new-tokens", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=48)
    parser.add_argument("--dtype", default="auto", help="of the weights; default: as saved")
    parser.add_argument("--with-safety", action="store_true", help="replies may be harmful")
    parser.add_argument("--partial", type=Path, help="a file to keep finished replies in")
    options = parser.parse_args()
    model = SteeredModel.from_checkpoint(options.checkpoint, dtype=options.dtype)
    taxonomy = model.checkpoint.info.taxonomy
    allowed = {*HARMLESS, *(taxonomy.category_ids if options.with_safety else ())}
    every = read_rows([options.data], taxonomy)
    rows = spread(
        [r for r in every if r.label == "respond" or r.category in allowed], options.limit
    )
    profile = profile_rows(model.checkpoint, rows)
    plan = Plan(
        force=taxonomy.tokens,
        respond_to=frozenset(allowed),
        max_new_tokens=options.max_new_tokens,
        batch_size=options.batch_size,
    )
    work = [profile.metadata["model_fingerprint"], profile.metadata["data_hash"], options.dtype]
    with partial_file(options.partial, [*work, options.max_new_tokens]) as kept:
        outcomes = generate_outcomes(model, rows, profile, plan, kept)
    texts = forced_texts(profile, outcomes, profile.metadata, "profile and replies")
    lines = []
    for number, (rule, bias, temperature) in enumerate(SETTINGS):
        policy = Policy(
            rule=rule,
            bias=dict.fromkeys(taxonomy.knobs, bias),
            temperature=temperature,
            seed=number,
        )
        setting = policy.knobs(taxonomy)
        random = draws(policy.seed, range(len(rows))) if temperature else None
        decisions = decide(profile.control_logits, setting, random)
        curve = float(texts.refuses[np.arange(len(rows)), decisions].mean())
        real = really(model, rows, policy, options)
        lines.append(
            {
                "rule": rule,
                "bias": bias,
                "temperature": temperature,
                "text curve": curve,
                "generated": real,
                "gap, points": 100 * abs(curve - real),
                "expected": float(text_refusal(texts, setting).mean()),
                "n": len(rows),
            }
        )
        print(json.dumps(lines[-1]), flush=True)
    gaps = {kind: [x["gap, points"] for x in lines if bool(x["temperature"]) == kind] for kind in
            (False, True)}  # fmt: skip
    found = {"largest gap, greedy": np.max(gaps[False]), "largest gap, sampled": np.max(gaps[True])}
    print(json.dumps({**found, "n": len(rows), "settings": len(SETTINGS)}, indent=2))


if __name__ == "__main__":
    main()
