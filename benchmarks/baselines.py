"""Refusal rates the old ways, beside one model with control tokens: what each costs and reaches.

    make baselines                                  (or: python benchmarks/baselines.py)
    python benchmarks/baselines.py --run runs/NAME  (a model that is trained already)

Three ways to set how readily a model refuses, on the same prompts:

1. plain fine-tuning without control tokens, one training run for each share of refuse rows
   (``recipes/baseline-no-token.yaml``);
2. a system prompt that asks for strictness, no training (``recipes/prompts/strictness.yaml``);
3. one model with control tokens, whose rates follow from one profile at every setting.

The first two are judged by their text and give one point each. The third gives a curve by token, of
which the table reads the most refusal within each point's over-refusal, and its text at a few
biases. Every model is generated with once; an interrupted run goes on where it was. Results:
``table.md``, an outcomes file a model, and a page in ``page/``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from trained import (
    ROOT,
    markdown,
    parser_of,
    provenance,
    restart_on_cpu,
    settings,
    status_of,
    train_or_resume,
    write_between,
)

from refusal_tokens.errors import InputError, one_message, unknown
from refusal_tokens.files import read_json, read_yaml, write_json, write_text
from refusal_tokens.outcomes import Outcome, read_outcomes, write_outcomes
from refusal_tokens.partial import Partial
from refusal_tokens.rates import Rate, rate

NO_TOKEN = "recipes/baseline-no-token.yaml"
TOKEN = "recipes/smollm2-135m-lora.yaml"
PROMPTS = "recipes/prompts/strictness.yaml"
PROMPT_KEYS = ("model_name_or_path", "system_prompts")
# Of the model with control tokens by text: all knobs together, nats.
BIASES = (-2.0, 0.0, 2.0)


@dataclass(frozen=True)
class Point:
    """One setting of one method.

    Attributes:
        name: of the model and its setting.
        refused: of refuse rows, by text; undecided replies left out.
        over_refused: of respond rows, likewise.
        undecided: replies that the judge could not tell.
        minutes: of training that this setting needed; 0 for none.
    """

    name: str
    refused: Rate
    over_refused: Rate
    undecided: int
    minutes: float


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the comparison; return the exit status."""
    return status_of(_compare, _parser().parse_args(arguments))


def _parser() -> argparse.ArgumentParser:
    parser = parser_of(__doc__, Path("runs/baselines"))
    parser.add_argument("--run", type=Path, help="a run with control tokens; default: trained here")
    parser.add_argument("--shares", default="0.05,0.2,0.4,0.6", help="of refuse rows, one run each")
    parser.add_argument("--prompts", type=Path, default=ROOT / PROMPTS, help="system prompts, YAML")
    parser.add_argument("--data", default="data/test.jsonl", help="rows to compare on")
    parser.add_argument("--limit", type=int, default=400, help="rows taken evenly; default 400")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    return parser


def _compare(options: argparse.Namespace) -> None:
    from refusal_tokens.commands.common import quiet_libraries
    from refusal_tokens.evaluation_run import spread
    from refusal_tokens.rows import read_rows
    from refusal_tokens.taxonomy import default_taxonomy

    quiet_libraries()
    shares = _shares(options.shares)
    base, prompts = read_prompts(options.prompts)
    base = next((s.partition("=")[2] for s in options.set if s.startswith("model_name")), base)
    if options.limit < 2:
        raise InputError(f"--limit: found {options.limit}; allowed: 2 or more")
    rows = spread(read_rows([options.data], default_taxonomy()), options.limit)
    points = [_prompted(base, name, text, rows, options) for name, text in prompts.items()]
    points += [_fine_tuned(share, rows, options) for share in shares]
    run, minutes = _token_model(options)
    profile = _profile(run, rows, options.output)
    steered = _steered(run, rows, profile, minutes, options)
    _write([*points, *steered], {p.name for p in points}, profile, options)


def _shares(text: str) -> list[float]:
    try:
        shares = [float(part) for part in text.split(",")]
    except ValueError:
        shares = [1.0]
    if not all(0 <= share < 1 for share in shares):
        raise InputError(f"--shares {text!r}: allowed: numbers from 0 to below 1, such as 0.1,0.5")
    return shares


def read_prompts(path: Path) -> tuple[str, Mapping[str, str | None]]:
    """Read the file of system prompts: the model's name, and name -> prompt.

    Raises:
        InputError: listing every fault.
    """
    data = read_yaml(path)
    if not isinstance(data, dict):
        raise InputError(f"{path}: found {type(data).__name__}; allowed: {', '.join(PROMPT_KEYS)}")
    faults = [unknown("key", key, PROMPT_KEYS) for key in data if key not in PROMPT_KEYS]
    model, prompts = data.get("model_name_or_path"), data.get("system_prompts")
    if not isinstance(model, str) or not model:
        faults.append(f"model_name_or_path: found {model!r}; allowed: a model name or folder")
    if not isinstance(prompts, dict) or not prompts:
        faults.append("system_prompts: allowed: a mapping of names to texts, or null")
    else:
        faults += [
            f"system_prompts.{name}: found {text!r}; allowed: text, or null"
            for name, text in prompts.items()
            if text is not None and not (isinstance(text, str) and text.strip())
        ]
    if faults:
        raise one_message([f"{path}: {fault}" for fault in faults], str(path))
    return str(model), dict(prompts or {})


def _prompted(
    base: str, name: str, text: str | None, rows: Sequence[Any], options: argparse.Namespace
) -> Point:
    """The untouched model under one system prompt."""
    title = f"system prompt: {name}"
    made = _plain(base, text, rows, options)
    origin = {"model": base, "system_prompt": text}
    return point(title, _outcomes(title, made, rows, options, origin), 0.0)


def _fine_tuned(share: float, rows: Sequence[Any], options: argparse.Namespace) -> Point:
    """One training run without control tokens."""
    from refusal_tokens.checkpoint import PLAIN_INFO_FILE
    from refusal_tokens.recipe import load_recipe

    title = f"no token: {share:g} refuse rows"
    folder = options.output / f"no-token-{share:g}"
    changes = [*options.set, f"refusal_tokens.refusal_share={share}"]
    train_or_resume(load_recipe(ROOT / NO_TOKEN, changes), folder)
    info = read_json(folder / "model" / PLAIN_INFO_FILE)
    made = _plain(str(folder / "model"), None, rows, options)
    origin = {"model_fingerprint": info["model_fingerprint"]}
    outcomes = _outcomes(title, made, rows, options, origin)
    return point(title, outcomes, info["training"]["seconds"] / 60)


def _plain(name: str, text: str | None, rows: Sequence[Any], options: argparse.Namespace) -> Any:
    def make() -> list[Outcome]:
        from refusal_tokens.plain import plain_outcomes

        return plain_outcomes(name, rows, system_prompt=text, max_new_tokens=options.max_new_tokens)

    return make


def _file(options: argparse.Namespace, title: str) -> Path:
    name = "".join(c if c.isalnum() or c in ".-+" else "-" for c in title)
    found: Path = options.output / f"{name}.parquet"
    return found


def _outcomes(
    title: str,
    make: Any,
    rows: Sequence[Any],
    options: argparse.Namespace,
    origin: Mapping[str, Any],
) -> Sequence[Outcome]:
    """Make an outcomes file, or read the one that is there if it is of the same replies.

    Raises:
        InputError: if it is of other rows, another model or another length.
    """
    from refusal_tokens.rows import data_hash

    stated = {**origin, "data": data_hash(rows), "max_new_tokens": options.max_new_tokens}
    file = _file(options, title)
    if not file.is_file():
        print(f"{title}: {len(rows)} replies", flush=True)
        write_outcomes(file, make(), stated)
    outcomes, metadata = read_outcomes(file)
    if {key: metadata.get(key) for key in stated} != stated:
        raise InputError(f"{file}: is of other rows or settings; use another --output")
    return outcomes


def _token_model(options: argparse.Namespace) -> tuple[Path, float]:
    """The run with control tokens, trained here where none is named; and its minutes."""
    from refusal_tokens.checkpoint import load_info
    from refusal_tokens.recipe import load_recipe

    run = options.run
    if run is None:
        run = options.output / "token"
        train_or_resume(load_recipe(ROOT / TOKEN, options.set), run)
    return run, float(load_info(run).training.get("seconds", 0.0)) / 60


def _profile(run: Path, rows: Sequence[Any], output: Path) -> Any:
    from refusal_tokens.base_model import fast_dtype
    from refusal_tokens.checkpoint import load_checkpoint, load_info
    from refusal_tokens.prefill import profile_rows
    from refusal_tokens.profiles import read_profile, write_profile

    file = output / "token.parquet"
    if file.is_file():
        profile = read_profile(file)
        same = profile.metadata.get("model_fingerprint") == load_info(run).model_fingerprint
        if not same or list(profile.columns["id"]) != [row.id for row in rows]:
            raise InputError(f"{file}: is of another model or other rows; use another --output")
        return profile
    profile = profile_rows(load_checkpoint(run, dtype=fast_dtype()), rows)
    write_profile(file, profile)
    return profile


def _steered(
    run: Path, rows: Sequence[Any], profile: Any, minutes: float, options: argparse.Namespace
) -> list[Point]:
    """The text of the model with control tokens, all knobs at each bias; one training run."""
    from refusal_tokens.checkpoint import load_info

    info = load_info(run)
    points = []
    # A prompt's reply after one token is the same at every bias, so it is generated once.
    kept = Partial(None, None)
    for bias in BIASES:
        title = f"tokens: bias {bias:+g}"
        policy = dict.fromkeys(info.taxonomy.knobs, bias)
        origin = {"model_fingerprint": info.model_fingerprint, "bias": policy}
        made = _replies(run, policy, rows, profile, kept, options)
        points.append(point(title, _outcomes(title, made, rows, options, origin), minutes))
    return points


def _replies(
    run: Path,
    bias: Mapping[str, float],
    rows: Sequence[Any],
    profile: Any,
    kept: Partial,
    options: argparse.Namespace,
) -> Any:
    def make() -> list[Outcome]:
        from refusal_tokens.base_model import fast_dtype
        from refusal_tokens.checkpoint import load_checkpoint
        from refusal_tokens.evaluate import Plan, generate_outcomes
        from refusal_tokens.judge import judge
        from refusal_tokens.policy import Policy
        from refusal_tokens.steering import SteeredModel

        model = SteeredModel(load_checkpoint(run, dtype=fast_dtype()))
        plan = Plan((), policy=Policy(bias=bias), max_new_tokens=options.max_new_tokens)
        found = generate_outcomes(model, rows, profile, plan, kept)
        # Judged as the models without tokens are: told the prompt's category.
        return [replace(own, verdict=judge(own.text, own.category)) for own in found]

    return make


def point(name: str, outcomes: Sequence[Outcome], minutes: float) -> Point:
    """Read a setting's rates off its replies."""
    known = [o for o in outcomes if o.verdict != "undecided"]
    rates = []
    for label in ("refuse", "respond"):
        own = [o.verdict == "refused" for o in known if o.label == label]
        rates.append(rate(sum(own), len(own)))
    return Point(name, rates[0], rates[1], len(outcomes) - len(known), minutes)


def within(profile: Any, over_refusal: float) -> Rate:
    """Return the most refusal by token of any setting on the curve within an over-refusal."""
    from refusal_tokens.policy import Policy
    from refusal_tokens.tradeoff import trade_off

    curve = trade_off(profile, Policy().knobs(profile.taxonomy))
    place = int(np.flatnonzero(curve.over_refusal <= over_refusal + 1e-12)[-1])
    return rate(round(curve.refusal[place] * curve.n_refuse), curve.n_refuse)


def _write(
    points: Sequence[Point], baselines: set[str], profile: Any, options: argparse.Namespace
) -> None:
    head = ["setting", "refused, by text", "over-refused, by text", "undecided", "training runs"]
    head += ["minutes of training", "one model with tokens, by token, within that over-refusal"]
    lines = []
    for own in points:
        reach = ""
        if own.name in baselines and own.over_refused.value is not None:
            reach = str(within(profile, own.over_refused.value)).strip()
        runs = "0" if own.name.startswith("system") else "1"
        runs = runs if own.name in baselines else "1 for all settings"
        cells = [str(own.refused).strip(), str(own.over_refused).strip(), str(own.undecided)]
        lines.append([own.name, *cells, runs, f"{own.minutes:.1f}", reach])
    trained = [p for p in points if p.name.startswith("no token")]
    cost = (
        f"Without control tokens: {len(trained)} settings, {len(trained)} training runs, "
        f"{sum(p.minutes for p in trained):.1f} minutes. With them: every setting, one training "
        f"run, {points[-1].minutes:.1f} minutes. Minutes are of the training loop."
    )
    notes = (
        "Intervals are 95% (Wilson). Text is judged by the rules, told the category of the prompt; "
        "undecided replies are left out of the rates. The last column is read off the curve of the "
        "same prompts, so it is what could be reached with hindsight, and counts tokens, not text."
    )
    text = "\n\n".join([markdown(head, lines), cost, notes, provenance(_command(options))])
    write_text(options.output / "table.md", text + "\n")
    write_json(
        options.output / "points.json",
        [
            {**vars(p), "refused": vars(p.refused), "over_refused": vars(p.over_refused)}
            for p in points
        ],
    )
    print(f"\n{text}\n")
    _page(points, options)
    if options.write_docs:
        write_between(options.write_docs, "baselines", text)
        print(f"{options.write_docs}: table written")


def _command(options: argparse.Namespace) -> str:
    """The command with what decides its numbers; a run by its name alone."""
    words = [f"python benchmarks/baselines.py --shares {options.shares} --limit {options.limit}"]
    words += [f"--run runs/{options.run.name}"] if options.run else []
    return " ".join([*words, *settings(options)])


def _page(points: Sequence[Point], options: argparse.Namespace) -> None:
    from refusal_tokens.cli import main as command

    files = {"tokens: profile": options.output / "token.parquet"}
    files |= {own.name: _file(options, own.name) for own in points}
    names = ["--names", ",".join(files)]
    place = ["--output", str(options.output / "page"), "--overwrite"]
    if command(["compare", *map(str, files.values()), *names, *place]):
        raise InputError("the page could not be made; the table and outcomes are whole")


if __name__ == "__main__":
    restart_on_cpu()
    sys.exit(main())
