"""Training throughput against plain TRL: the same rows, rank and batch size, each in its process.

    python benchmarks/train_throughput.py [--rows 320] [--json FILE]

Trains one pass over the same rows three times: with plain ``trl.SFTTrainer`` and LoRA as a user
would run it; the same with the allocator variables set; and with this package. Prints
non-padding tokens per second of the training loop, the first two steps left out, and the ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from refusal_tokens.allocator import VARIABLES

ROOT = Path(__file__).resolve().parent.parent
RECIPE = ROOT / "recipes" / "smollm2-135m-lora.yaml"
WARM_UP_STEPS = 2
RUNS = {"peer": False, "peer with allocator variables": True, "refusal_tokens": True}


def rows_with_reply(count: int) -> list[Any]:
    """Take rows with a reply: plain SFT has no use for others."""
    from refusal_tokens.rows import read_rows
    from refusal_tokens.taxonomy import default_taxonomy

    rows = read_rows([ROOT / "data" / "train.jsonl"], default_taxonomy())
    kept = [row for row in rows if row.response is not None]
    step = max(1, len(kept) // count)
    return kept[::step][:count]


def step_timer() -> Any:
    """Return a callback that times the steps after the warm-up."""
    from transformers import TrainerCallback

    class Timer(TrainerCallback):  # type: ignore[misc]
        began = 0.0
        seconds = 0.0

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == WARM_UP_STEPS:
                self.began = time.perf_counter()
            self.seconds = time.perf_counter() - self.began

    return Timer()


def count_tokens(trainer: Any) -> int:
    """Non-padding tokens of the batches after the warm-up, in the order of the run."""
    batches = list(trainer.get_train_dataloader())
    return sum(int(batch["attention_mask"].sum()) for batch in batches[WARM_UP_STEPS:])


def run_peer(count: int) -> Any:
    """Build plain TRL, all at its defaults but for batch size, rank and one pass."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    from refusal_tokens.base_model import resolve
    from refusal_tokens.recipe import load_recipe

    recipe = load_recipe(RECIPE)
    lora = recipe.peft_config or {}
    data = Dataset.from_list(
        [
            {
                "prompt": [dict(message) for message in row.prompt],
                "completion": [{"role": "assistant", "content": row.response}],
            }
            for row in rows_with_reply(count)
        ]
    )
    folder = tempfile.mkdtemp()
    config = SFTConfig(
        output_dir=folder,
        per_device_train_batch_size=recipe.sft["per_device_train_batch_size"],
        num_train_epochs=1,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
    )
    return SFTTrainer(
        model=resolve(recipe.model_name_or_path),
        args=config,
        train_dataset=data,
        peft_config=LoraConfig(
            r=lora["r"],
            lora_alpha=lora["lora_alpha"],
            target_modules=lora["target_modules"],
            task_type="CAUSAL_LM",
        ),
    )


def run_own(count: int) -> Any:
    """Build this package's trainer from the default recipe."""
    from refusal_tokens.preparation import prepare
    from refusal_tokens.recipe import load_recipe
    from refusal_tokens.rows import write_jsonl
    from refusal_tokens.training import build_trainer

    folder = Path(tempfile.mkdtemp())
    write_jsonl(folder / "rows.jsonl", rows_with_reply(count))
    settings = [
        f"refusal_tokens.train={folder / 'rows.jsonl'}",
        "refusal_tokens.calibration=[]",
        "refusal_tokens.test=[]",
        # The peer trains every reply.
        "refusal_tokens.reply_share=1",
        "num_train_epochs=1",
        "save_strategy='no'",
    ]
    return build_trainer(prepare(load_recipe(RECIPE, settings)), folder)


def measure(name: str, count: int) -> dict[str, float]:
    """Train once and return tokens, seconds and tokens per second."""
    trainer = run_own(count) if name == "refusal_tokens" else run_peer(count)
    timer = step_timer()
    trainer.add_callback(timer)
    trainer.train()
    tokens = count_tokens(trainer)
    return {"tokens": tokens, "seconds": timer.seconds, "tokens_per_second": tokens / timer.seconds}


def measure_in_process(name: str, count: int) -> dict[str, float]:
    """Run one measurement in its own process, with or without the allocator variables."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    if RUNS[name]:
        environment |= VARIABLES
    command = [sys.executable, __file__, "--only", name, "--rows", str(count)]
    output = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE)
    return dict(json.loads(output.stdout.decode().splitlines()[-1]))


def main() -> None:
    """Measure all three and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=320)
    parser.add_argument("--only", choices=list(RUNS))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.only:
        print(json.dumps(measure(arguments.only, arguments.rows)))
        return
    results = {name: measure_in_process(name, arguments.rows) for name in RUNS}
    own = results["refusal_tokens"]["tokens_per_second"]
    print(f"{'':32}{'tokens':>8}{'seconds':>9}{'tokens/s':>10}{'ratio':>8}")
    for name, result in results.items():
        ratio = own / result["tokens_per_second"]
        print(
            f"{name:32}{result['tokens']:8.0f}{result['seconds']:9.1f}"
            f"{result['tokens_per_second']:10.0f}{ratio:8.2f}"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
