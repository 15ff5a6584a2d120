"""What 1,000 knob settings of every curve cost over 5,000 stored prompts.

    python benchmarks/curves.py [--prompts 5000] [--points 200]

Control curves of five knobs, 200 bias values each, then trade-off, leakage, confusion and
reliability before and after temperature scaling, for each rule, greedy and sampled. Prints
seconds and the peak of the process's memory, imports included. The profile is synthetic.
"""

from __future__ import annotations

import argparse
import resource
import time

import numpy as np

from refusal_tokens.curves import control_curve
from refusal_tokens.decision import RULES, Knobs, knobs
from refusal_tokens.leakage import confusion, leakage
from refusal_tokens.profiles import TEXT_COLUMNS, Profile
from refusal_tokens.reliability import cross_fitted_temperatures, reliability
from refusal_tokens.taxonomy import default_taxonomy
from refusal_tokens.tradeoff import trade_off


def synthetic(prompts: int, seed: int = 0) -> Profile:
    """Half refuse rows, half respond rows, in groups of four, logits normal around the label."""
    taxonomy = default_taxonomy()
    random = np.random.default_rng(seed)
    category = random.integers(len(taxonomy.category_ids), size=prompts)
    refuse = random.random(prompts) < 0.5
    logits = random.normal(0, 2, size=(prompts, len(taxonomy.tokens)))
    logits[np.arange(prompts), np.where(refuse, category + 1, 0)] += 4
    columns = {name: np.full(prompts, None, dtype=object) for name in TEXT_COLUMNS}
    columns["id"] = np.array([f"r{i}" for i in range(prompts)], dtype=object)
    columns["prompt_sha256"] = columns["id"]
    columns["group"] = np.array([f"g{i // 4}" for i in range(prompts)], dtype=object)
    columns["label"] = np.where(refuse, "refuse", "respond").astype(object)
    columns["category"] = np.array(taxonomy.category_ids, dtype=object)[category]
    return Profile(
        columns=columns,
        control_logits=logits.astype(np.float32),
        rest_max=np.full(prompts, -9.0, np.float32),
        rest_logsumexp={1.0: np.full(prompts, -5.0, np.float32)},
        prompt_tokens=np.full(prompts, 20),
        taxonomy=taxonomy,
        metadata={},
    )


def all_curves(profile: Profile, setting: Knobs, points: int) -> None:
    """Everything that the page of one profile shows, but for the drawing."""
    bias = np.linspace(-15, 15, points)
    for knob in profile.taxonomy.knobs:
        control_curve(profile, knob, setting, bias)
    trade_off(profile, setting)
    leakage(profile, setting)
    confusion(profile, setting)
    reliability(profile)
    reliability(profile, cross_fitted_temperatures(profile))


def main() -> None:
    """Measure each rule, greedy and sampled, on a profile that has not been asked before."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=5000)
    parser.add_argument("--points", type=int, default=200)
    options = parser.parse_args()
    print(f"{5 * options.points:,} settings of every curve over {options.prompts:,} prompts")
    for rule in RULES:
        for name, temperature in (("greedy", 0.0), ("sampled", 1.0)):
            profile = synthetic(options.prompts)
            began = time.perf_counter()
            all_curves(profile, knobs(rule, np.zeros(5), temperature), options.points)
            print(f"{rule:10}{name:8}{time.perf_counter() - began:6.2f} s")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"peak memory {peak:.0f} MB")


if __name__ == "__main__":
    main()
