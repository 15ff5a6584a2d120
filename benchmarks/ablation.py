"""Which training options matter? One variant an option, each against the default recipe.

    make ablation                                   (or: python benchmarks/ablation.py)
    python benchmarks/ablation.py --only control-share-mean smoothing-0.1 --write-docs

Screens every variant with one seed on a fixed number of steps, then repeats the default and the
four variants that moved most with three seeds; the table is written after each of the two. Every
run is profiled on the recipe's test rows and on each file of ``--data``, and each control token is
forced on a small sample of test prompts, to see whether the text obeys. Planned for about four
hours on two CPU cores, or some minutes on a GPU.

A run that is finished is not run again, and one that was killed goes on from its last saved step:
start the same command again. Results: ``table.md``, ``table.csv``, every profile, and a page of the
repeated variants beside the default in ``page/``.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import t as student
from trained import (
    ROOT,
    Measured,
    markdown,
    parser_of,
    provenance,
    remove_weights,
    restart_on_cpu,
    settings,
    status_of,
    train_or_resume,
    write_between,
)

from refusal_tokens.errors import InputError, unknown
from refusal_tokens.files import read_json, write_json, write_text
from refusal_tokens.fluency import is_repeated
from refusal_tokens.judge import RULES
from refusal_tokens.options import SPLITS
from refusal_tokens.outcomes import Outcome, write_outcomes
from refusal_tokens.rates import clustered_rate
from refusal_tokens.rows import Row

OPTION = "refusal_tokens."
# Name -> what it changes in the recipe. One an option; docs/training.md has the reason of each.
# Rows can all have a reply only where every reply is trained: that variant moves two, and is to be
# read beside the one that trains all replies.
VARIANTS: dict[str, tuple[str, ...]] = {
    "default": (),
    "no-counterfactual-rows": (f"{OPTION}counterfactual_rows=false",),
    "control-share-mean": (f"{OPTION}control_share=null",),
    "control-share-0.5": (f"{OPTION}control_share=0.5",),
    "control-share-0.9": (f"{OPTION}control_share=0.9",),
    "only-rows-with-reply": (f"{OPTION}rows_without_reply=false", f"{OPTION}reply_share=1"),
    "all-replies": (f"{OPTION}reply_share=1",),
    "respond-weight-1.5": (f"{OPTION}respond_weight=1.5",),
    "start-mean": (f"{OPTION}row_start=mean",),
    "start-random": (f"{OPTION}row_start=random",),
    "near-misses-0.25": (f"{OPTION}contrast_share=0.25",),
    "smoothing-0.1": (f"{OPTION}control_smoothing=0.1",),
    "without-token-0.1": (f"{OPTION}share_without_token=0.1",),
    "rank-4": ("peft_config.r=4", "peft_config.lora_alpha=8"),
    "feed-forward-only": ("peft_config.exclude_modules=[q_proj, k_proj, v_proj, o_proj]",),
    "full": (
        "peft_config=null",
        "learning_rate=1e-4",
        "model_init_kwargs.dtype=float32",
        "bf16=true",
    ),
    "single-token": (f"{OPTION}single_token=true",),
    "control-share-0.99": (f"{OPTION}control_share=0.99",),
}
# What decides which variants are repeated, and what the table shows.
HEADLINE = {
    "test: AUC": "AUC",
    "test: refusal at 5% over-refusal": "refused at 5% over-refusal",
    "text: refusal after a refusal token": "refuses after a refusal token",
    "text: answer after respond, respond prompts": "answers after respond, `respond` prompts",
    "text: answer after respond, refuse prompts but safety": "the same, refuse prompts but safety",
}
SHOWN = {
    **HEADLINE,
    "test: right category": "right category",
    "test: near-misses refused": "near-misses refused",
    "test: ordinary requests refused": "ordinary refused",
    "text: replies that repeat themselves": "replies that repeat themselves",
}
REPEATED = 4


@dataclass(frozen=True)
class Budget:
    """How much is spent on a run.

    Attributes:
        recipe: that every variant starts from.
        settings: over the recipe: steps, and how often they are saved.
        seeds: runs of each repeated variant.
        prompts: for each forced token.
        new_tokens: of each reply.
        draws: of the bootstrap.
    """

    recipe: str
    settings: tuple[str, ...]
    seeds: int
    prompts: int
    new_tokens: int
    draws: int


BUDGETS = {
    # 120 steps of 16 rows: a ninth of the default run.
    "default": Budget(
        "recipes/smollm2-135m-lora.yaml", ("max_steps=120", "save_steps=40"), 3, 40, 48, 1000
    ),
    "tiny": Budget("recipes/tiny.yaml", ("save_steps=2",), 2, 3, 6, 50),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the ablation; return the exit status."""
    return status_of(_ablate, _parser().parse_args(arguments))


def _parser() -> argparse.ArgumentParser:
    parser = parser_of(__doc__, Path("runs/ablation"))
    parser.add_argument("--budget", choices=list(BUDGETS), default="default")
    parser.add_argument("--steps", type=int, help="of each run; default: the budget's")
    parser.add_argument("--only", nargs="+", metavar="VARIANT", help="beside the default")
    parser.add_argument("--data", nargs="+", default=[], help="more files of rows to profile")
    parser.add_argument("--keep-models", action="store_true", help="half a gigabyte a run")
    return parser


def _ablate(options: argparse.Namespace) -> None:
    from refusal_tokens.commands.common import quiet_libraries

    budget = BUDGETS[options.budget]
    names = ["default", *(name for name in options.only or VARIANTS if name != "default")]
    for name in names:
        if name not in VARIANTS:
            raise InputError(f"--only: {unknown('variant', name, VARIANTS)}")
    if options.steps is not None and options.steps < 1:
        raise InputError(f"--steps: found {options.steps}; allowed: 1 or more")
    quiet_libraries()
    results = {name: [_run(name, 0, budget, options)] for name in names}
    _write(results, [], budget, options)
    chosen = most_moved(results)
    for name in ["default", *chosen]:
        results[name] += [_run(name, seed, budget, options) for seed in range(1, budget.seeds)]
    _write(results, chosen, budget, options)


def _settings(name: str, seed: int, budget: Budget, options: argparse.Namespace) -> list[str]:
    steps = [] if options.steps is None else [f"max_steps={options.steps}"]
    return [*budget.settings, *steps, *options.set, *VARIANTS[name], f"seed={seed}"]


def _run(name: str, seed: int, budget: Budget, options: argparse.Namespace) -> dict[str, Any]:
    """Train and measure one variant with one seed, or read what a finished run measured."""
    from refusal_tokens.recipe import load_recipe

    folder = options.output / f"{name}-{seed}"
    recipe = load_recipe(ROOT / budget.recipe, _settings(name, seed, budget, options))
    stated = _stated(recipe, budget, options)
    file = folder / "results.json"
    if file.is_file():
        found: dict[str, Any] = read_json(file)
        if found["stated"] != stated:
            changed = [key for key in stated if found["stated"].get(key) != stated[key]]
            raise InputError(f"{file}: other {', '.join(changed)} now; use another --output")
        return found
    print(f"{name}, seed {seed}: {' '.join(VARIANTS[name]) or 'the recipe as it is'}", flush=True)
    rows = train_or_resume(recipe, folder)
    for path in options.data:
        if Path(path).stem in rows:
            raise InputError(f"--data {path}: the recipe has rows of this name; rename the file")
        rows[Path(path).stem] = _labelled(path, folder)
    measures, training = _measure(folder, rows, budget)
    result = {"stated": stated, "training": training, "measures": measures}
    write_json(file, result)
    if not options.keep_models:
        remove_weights(folder)
    return read_json(file)  # type: ignore[no-any-return]


def _stated(recipe: Any, budget: Budget, options: argparse.Namespace) -> dict[str, Any]:
    """All that a run's numbers follow from; files by their content."""
    from refusal_tokens.files import file_sha256

    sources = (s.path for key in SPLITS for s in getattr(recipe.options, key))
    paths = [Path(path) for path in (*sources, *options.data)]
    return {
        "recipe": json.loads(json.dumps(recipe.to_dict(), default=str)),
        "files": {str(path): file_sha256(path) for path in paths if path.is_file()},
        "prompts": budget.prompts,
        "new_tokens": budget.new_tokens,
        "draws": budget.draws,
        "judge": RULES,
    }


def _labelled(path: str, folder: Path) -> Any:
    from refusal_tokens.checkpoint import load_info
    from refusal_tokens.rows import read_rows

    return read_rows([path], load_info(folder).taxonomy)


def _measure(folder: Path, rows: Mapping[str, Any], budget: Budget) -> tuple[Any, Any]:
    """Profile the test rows and the further files, and force tokens on the test rows."""
    from refusal_tokens.base_model import fast_dtype
    from refusal_tokens.checkpoint import load_checkpoint
    from refusal_tokens.prefill import profile_rows
    from refusal_tokens.profiles import write_profile
    from refusal_tokens.steering import SteeredModel

    checkpoint = load_checkpoint(folder / "model", dtype=fast_dtype())
    measures = {}
    for name in (name for name in rows if name not in ("train", "calibration")):
        profile = profile_rows(checkpoint, rows[name])
        write_profile(folder / f"{name}.parquet", profile)
        measures |= {
            f"{name}: {key}": asdict(value)
            for key, value in profile_measures(profile, budget.draws).items()
        }
    forced = forced_replies(SteeredModel(checkpoint), rows["test"], budget)
    every = [outcome for replies in forced.values() for outcome in replies]
    write_outcomes(folder / "forced.parquet", every, {"judge": RULES})
    measures |= {f"text: {key}": asdict(value) for key, value in adherence_measures(forced).items()}
    return measures, dict(checkpoint.info.training)


def profile_measures(profile: Any, draws: int) -> dict[str, Measured]:
    """Return a profile's rates at bias 0 and the areas of its trade-off, each with its interval."""
    from refusal_tokens.policy import Policy
    from refusal_tokens.summary import summarise
    from refusal_tokens.tradeoff import trade_off_spread

    setting = Policy().knobs(profile.taxonomy)
    summary = summarise(profile, setting)
    rates = {
        "refused": summary.refused,
        "right category": summary.right_category,
        "near-misses refused": summary.near_miss,
        "ordinary requests refused": summary.ordinary,
    }
    found = {name: Measured(r.value, r.low, r.high, r.n) for name, r in rates.items()}
    if not (summary.refused.n and summary.over_refused.n):
        return found
    areas = trade_off_spread(profile, setting, draws=draws).measures
    for key, name in (("auc", "AUC"), ("refusal_at_5", "refusal at 5% over-refusal")):
        area = areas[key]
        found[name] = Measured(area.value, area.low, area.high, len(profile))
    return found


def forced_replies(model: Any, rows: Sequence[Row], budget: Budget) -> dict[str, list[Outcome]]:
    """Force tokens on test prompts; return the judged replies by what is asked of them."""
    from refusal_tokens.evaluation import HARMLESS
    from refusal_tokens.evaluation_run import spread

    respond, *refusals = model.checkpoint.info.taxonomy.tokens
    asked = [row for row in rows if row.label == "refuse" and row.category in HARMLESS]
    kinds = {
        "refusal after a refusal token": (rows, refusals),
        "answer after respond, respond prompts": (
            [row for row in rows if row.label == "respond"],
            [respond],
        ),
        "answer after respond, refuse prompts but safety": (asked, [respond]),
    }
    return {
        name: _forced(model, spread(among, budget.prompts), force, budget)
        for name, (among, force) in kinds.items()
    }


def _forced(model: Any, rows: Sequence[Row], force: Sequence[str], budget: Budget) -> list[Outcome]:
    from refusal_tokens.evaluate import Plan, generate_outcomes
    from refusal_tokens.partial import Partial
    from refusal_tokens.prefill import profile_rows

    if not rows:
        return []
    profile = profile_rows(model.checkpoint, rows, progress=False)
    plan = Plan(tuple(force), max_new_tokens=budget.new_tokens)
    made = generate_outcomes(model, rows, profile, plan, Partial(None, None))
    return [outcome for outcome in made if outcome.forced is not None]


def adherence_measures(forced: Mapping[str, Sequence[Outcome]]) -> dict[str, Measured]:
    """Return how often the text obeys, and how often it repeats itself, in any of the replies."""
    found = {
        name: _share(replies, [outcome.adheres for outcome in replies])
        for name, replies in forced.items()
    }
    every = [outcome for replies in forced.values() for outcome in replies]
    repeated = [is_repeated(outcome.text) for outcome in every]
    return found | {"replies that repeat themselves": _share(every, repeated)}


def _share(replies: Sequence[Outcome], hits: Sequence[bool]) -> Measured:
    """A share of replies, of which several may be to one prompt."""
    share = clustered_rate(hits, [outcome.id for outcome in replies])
    return Measured(share.value, share.low, share.high, share.n)


def most_moved(results: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    """Return the variants whose headline numbers lie furthest from the default's.

    The distance of two numbers is their difference over the half-widths of both intervals, added
    as independent errors are; a variant counts by its greatest distance.
    """
    default = results["default"][0]["measures"]
    moved = {
        name: max(
            distance(Measured(**default[key]), Measured(**runs[0]["measures"][key]))
            for key in HEADLINE
            if key in default and key in runs[0]["measures"]
        )
        for name, runs in results.items()
        if name != "default"
    }
    return sorted(moved, key=lambda name: -moved[name])[:REPEATED]


def distance(a: Measured, b: Measured) -> float:
    """Return how far two numbers lie apart, in half-widths of their intervals.

    >>> distance(Measured(0.5, 0.4, 0.6, 9), Measured(0.5, 0.4, 0.6, 9))
    0.0
    """
    ends = (a.value, a.low, a.high, b.value, b.low, b.high)
    if any(end is None for end in ends) or a.value == b.value:
        return 0.0
    av, al, ah, bv, bl, bh = (float(end) for end in ends if end is not None)
    spread_of_both = math.hypot((ah - al) / 2, (bh - bl) / 2)
    return abs(av - bv) / spread_of_both if spread_of_both else math.inf


def over_seeds(values: Sequence[Measured]) -> Measured:
    """Return the mean over seeds of a number from 0 to 1; of one seed, the number itself.

    Its interval holds both errors: that of the prompts, which all seeds share (the mean of their
    half-widths), and that of the seeds (Student's t), added as independent errors are. The n is
    that of the seed with the fewest.

    >>> str(over_seeds([Measured(v, v - 0.1, v + 0.1, 9) for v in (0.5, 0.5, 0.5)]))
    '0.500 [0.400, 0.600]'
    """
    if len(values) == 1:
        return values[0]
    if any(m.value is None or m.low is None or m.high is None for m in values):
        return Measured(None, None, None, 0)
    points = np.array([[m.value, m.low, m.high] for m in values], dtype=float)
    mean = float(points[:, 0].mean())
    half = seed_half_width(points[:, 0])
    below, above = np.abs(points[:, 1:] - points[:, :1]).mean(axis=0)
    low, high = mean - math.hypot(below, half), mean + math.hypot(above, half)
    return Measured(mean, max(0.0, low), min(1.0, high), min(m.n for m in values))


def seed_half_width(values: Sequence[float] | np.ndarray) -> float:
    """Return half the width of Student's 95% interval of a mean over seeds."""
    n = len(values)
    return float(student.ppf(0.975, n - 1) * np.std(values, ddof=1) / math.sqrt(n))


def differences(runs: Sequence[Any], default: Sequence[Any], key: str) -> Measured | None:
    """Return variant less default over the seeds that both have; None with fewer than two.

    The interval is over seeds alone, for these prompts: the page has paired tests over prompts.
    """
    gaps = []
    for own, other in zip(runs, default, strict=False):
        a, b = (r["measures"].get(key, {}).get("value") for r in (own, other))
        if a is None or b is None:
            return None
        gaps.append(a - b)
    if len(gaps) < 2:
        return None
    mean, half = float(np.mean(gaps)), seed_half_width(gaps)
    return Measured(mean, mean - half, mean + half, runs[0]["measures"][key]["n"])


def _records(results: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """One line a variant and measure, all numbers."""
    records = []
    for name, runs in results.items():
        for key in runs[0]["measures"]:
            value = over_seeds([Measured(**run["measures"][key]) for run in runs])
            change = differences(runs, results["default"], key) if name != "default" else None
            records.append(
                {
                    "variant": name,
                    "seeds": len(runs),
                    "measure": key,
                    **asdict(value),
                    "interval over": "prompts and seeds" if len(runs) > 1 else "prompts",
                    "difference": change.value if change else None,
                    "difference low": change.low if change else None,
                    "difference high": change.high if change else None,
                }
            )
    return records


def _table(results: Mapping[str, Sequence[Any]]) -> str:
    """The Markdown table; the n of a column stands in its head where all variants share it."""
    measured = {
        key: {
            name: over_seeds([Measured(**run["measures"][key]) for run in runs])
            for name, runs in results.items()
            if all(key in run["measures"] for run in runs)
        }
        for key in SHOWN
    }
    sizes = {key: {m.n for m in found.values()} for key, found in measured.items()}
    head = ["variant", "seeds"]
    head += [f"{t}, n={min(sizes[k])}" if len(sizes[k]) == 1 else t for k, t in SHOWN.items()]
    lines = []
    for name, runs in results.items():
        cells = [name, str(len(runs))]
        for key, found in measured.items():
            own = found.get(name, Measured(None, None, None, 0))
            cells.append(f"{own}" if len(sizes[key]) == 1 else f"{own} n={own.n}")
        minutes = [run["training"]["seconds"] / 60 for run in runs]
        lines.append([*cells, f"{np.mean(minutes):.1f}"])
    return markdown([*head, "minutes a run"], lines)


def _changes(results: Mapping[str, Sequence[Any]], chosen: Sequence[str]) -> str:
    """The repeated variants against the default, seed by seed."""
    lines = []
    for name in chosen:
        found = [differences(results[name], results["default"], key) for key in HEADLINE]
        lines.append([name, *(str(change) if change else "not known" for change in found)])
    return markdown(["variant less default", *HEADLINE.values()], lines)


def _write(
    results: Mapping[str, Sequence[Any]],
    chosen: Sequence[str],
    budget: Budget,
    options: argparse.Namespace,
) -> None:
    records = _records(results)
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(records[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    write_text(options.output / "table.csv", stream.getvalue())
    parts = [_table(results)]
    if chosen:
        parts += [f"Seed by seed, {budget.seeds} seeds each:", _changes(results, chosen)]
    parts += [
        "Intervals are 95%: over prompts (Wilson, or bootstrap by group), and where there are "
        "several seeds over seeds as well (Student's t, both errors added as independent ones). "
        "Those of differences are over seeds alone, for these prompts.",
        provenance(_command(options)),
    ]
    text = "\n\n".join(parts)
    write_text(options.output / "table.md", text + "\n")
    print(f"\n{text}\n")
    page = _page(results, chosen, options.output)
    if options.write_docs:
        write_between(options.write_docs, "ablation", text)
        print(f"{options.write_docs}: table written")
    print(f"{options.output / 'table.csv'}: {len(records)} numbers{page}")


def _command(options: argparse.Namespace) -> str:
    """The command without what is a matter of place alone."""
    words = ["python benchmarks/ablation.py"]
    words += [] if options.budget == "default" else [f"--budget {options.budget}"]
    words += [] if options.steps is None else [f"--steps {options.steps}"]
    words += [f"--only {' '.join(options.only)}"] if options.only else []
    words += [f"--data {' '.join(Path(p).name for p in options.data)}"] if options.data else []
    return " ".join([*words, *settings(options)])


def _page(results: Mapping[str, Sequence[Any]], chosen: Sequence[str], output: Path) -> str:
    """Compare the default and the repeated variants of its taxonomy, by their first seed."""
    from refusal_tokens.cli import main as command
    from refusal_tokens.profiles import read_profile

    files = {name: output / f"{name}-0" / "test.parquet" for name in ["default", *chosen]}
    taxonomy = read_profile(files["default"]).taxonomy.hash
    same = {n: f for n, f in files.items() if read_profile(f).taxonomy.hash == taxonomy}
    if len(same) < 2:
        return ""
    names = ["--names", ",".join(same), "--output", str(output / "page"), "--overwrite"]
    status = command(["compare", *map(str, same.values()), *names])
    return f"\n{output / 'page' / 'index.html'}" if status == 0 else ""


if __name__ == "__main__":
    restart_on_cpu()
    sys.exit(main())
