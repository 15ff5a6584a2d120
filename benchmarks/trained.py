"""What the benchmarks that train share: options, runs that resume, measures, tables."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from refusal_tokens.errors import InputError
from refusal_tokens.files import read_text, write_text
from refusal_tokens.recipe import Recipe
from refusal_tokens.rows import Row

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Measured:
    """A number with its 95% interval and how many it is of; ``value`` None where not known."""

    value: float | None
    low: float | None
    high: float | None
    n: int

    def __str__(self) -> str:
        if self.value is None or self.low is None or self.high is None:
            return "not known"
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def parser_of(doc: str | None, output: Path) -> argparse.ArgumentParser:
    """Return a parser with the options that every such benchmark has."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--output", type=Path, default=output, help=f"default: {output}")
    parser.add_argument(
        "--write-docs",
        nargs="?",
        type=Path,
        const=ROOT / "docs" / "ablations.md",
        metavar="PAGE",
        help="put the table into docs/ablations.md, or another page",
    )
    return parser


def status_of(work: Callable[[argparse.Namespace], None], options: argparse.Namespace) -> int:
    """Do the work; return the exit status, with wrong input and interruptions said."""
    try:
        work(options)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nstopped; the same command goes on in {options.output}", file=sys.stderr)
        return 130
    return 0


def restart_on_cpu() -> None:
    """Begin this process anew with the allocator's settings, where it will train on a CPU."""
    import torch

    if not torch.accelerator.is_available():
        from refusal_tokens.allocator import restart_with_allocator_settings

        restart_with_allocator_settings()


def train_or_resume(recipe: Recipe, folder: Path) -> dict[str, list[Row]]:
    """Train a recipe, or go on with the same run where it was interrupted; return its rows.

    Raises:
        InputError: if the folder holds another run.
    """
    from refusal_tokens.preparation import RUN_FILE, check_run, prepare
    from refusal_tokens.training import train

    prepared = prepare(recipe)
    begun = (folder / RUN_FILE).is_file()
    check_run(folder, prepared, resume=begun, overwrite=False)
    # The model's folder appears whole, after the last step.
    if not (folder / "model" / "config.json").is_file():
        train(prepared, folder, resume=begun)
    return {name: list(rows) for name, rows in prepared.rows.items()}


def remove_weights(folder: Path) -> None:
    """Delete the weights of a measured run: half a gigabyte each, and never read again."""
    for name in ("trainer", "adapter", "model"):
        shutil.rmtree(folder / name, ignore_errors=True)


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    rule = ["---"] * len(head)
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, rule, *lines])


def settings(options: argparse.Namespace) -> list[str]:
    """The ``--set`` of a command, without a model's folder: a matter of place alone."""
    changed = [text for text in options.set if not text.startswith("model_name_or_path=/")]
    return [f"--set {text}" for text in changed]


def provenance(command: str) -> str:
    """Say how a table was made: command, date, machine, versions."""
    import torch

    from refusal_tokens.checkpoint import versions

    place = f"{os.cpu_count()} CPU cores"
    if torch.cuda.is_available():
        place = torch.cuda.get_device_name()
    found = ", ".join(f"{name} {version}" for name, version in versions().items())
    return f"`{command}`, {date.today().isoformat()}, {place}. Versions: {found}."


def write_between(path: Path, name: str, text: str) -> None:
    """Replace what stands between ``<!-- name -->`` and ``<!-- /name -->`` in a page of docs.

    Raises:
        InputError: if the page lacks the two marks.
    """
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    whole = read_text(path)
    before, found, rest = whole.partition(begin)
    _, found_end, after = rest.partition(end)
    if not found or not found_end:
        raise InputError(f"{path}: no place for the table; allowed: a page with {begin} and {end}")
    write_text(path, f"{before}{begin}\n\n{text}\n\n{end}{after}")
