"""What several subcommands share."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from refusal_tokens.errors import InputError

if TYPE_CHECKING:
    from refusal_tokens.rows import Row


def command(commands: Any, name: str, run: Any, text: str) -> argparse.ArgumentParser:
    """Add a subcommand that calls ``run`` with the parsed options."""
    added: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    added.set_defaults(run=run)
    return added


def next_line(*words: object) -> str:
    """Say which command usually follows, quoted so that it can be pasted into a shell.

    >>> next_line("refusal-tokens", "chat", "my runs/first")
    "Next: refusal-tokens chat 'my runs/first'"
    """
    return f"Next: {shlex.join(map(str, words))}"


def pairs(values: Sequence[str], option: str) -> dict[str, str]:
    """Parse ``name=value`` settings.

    Raises:
        InputError: for another form, or a name twice.
    """
    found = {}
    for value in values:
        key, equals, text = value.partition("=")
        if not equals or not key or not text:
            raise InputError(f"{option} {value!r}: allowed: name=value")
        if key in found:
            raise InputError(f"{option}: {key!r} twice")
        found[key] = text
    return found


def add_map(parser: argparse.ArgumentParser) -> None:
    """Add ``--map``, for rows of another shape."""
    parser.add_argument(
        "--map",
        metavar="NAME|FILE|YAML",
        help="from columns to rows: a built-in map, a YAML file, or such as '{prompt: question}'",
    )


def map_of(text: str | None) -> str | dict[str, Any] | None:
    """Return the map that ``--map`` names, checked.

    Raises:
        InputError: for an unknown name, field or form.
    """
    from refusal_tokens.files import parse_yaml
    from refusal_tokens.maps import load_map

    spec = parse_yaml(text, "--map") if text and text.lstrip().startswith("{") else text
    try:
        load_map(spec)
    except InputError as error:
        raise InputError(f"--map: {error}") from None
    return spec


def data_files(paths: Sequence[str]) -> list[str]:
    """Return the files of rows that paths name: files themselves, and those in folders.

    Raises:
        InputError: for a folder without any.
    """
    files: list[str] = []
    for path in paths:
        if Path(path).is_dir():
            found = sorted(
                str(p) for s in ("jsonl", "parquet", "csv") for p in Path(path).glob(f"*.{s}")
            )
            if not found:
                raise InputError(f"{path}: no .jsonl, .parquet or .csv file in this folder")
            files += found
        else:
            files.append(path)
    return files


def quiet_libraries() -> None:
    """Keep the libraries' notices off the screen; their errors still come through."""
    import logging
    import warnings

    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*save_embedding_layers.*")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from datasets import disable_progress_bars
    from transformers.utils import logging as transformers_logging

    disable_progress_bars()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def names_of(paths: Sequence[str]) -> list[str]:
    """Name models by their files: the run's folder, else the file; the path where these clash.

    >>> names_of(["runs/a/test.parquet", "runs/b/test.parquet"])
    ['a', 'b']
    """
    short = [
        Path(path).parent.name
        if Path(path).stem in ("test", "calibration") and Path(path).parent.name
        else Path(path).stem
        for path in paths
    ]
    whole = [str(Path(path).with_suffix("")) for path in paths]
    return [w if short.count(s) > 1 else s for s, w in zip(short, whole, strict=True)]


def warn_of_rows(found: Sequence[str], text: str) -> None:
    """Warn of rows, if there are any: how many, what about them, and the first one's id."""
    if found:
        print(f"warning: {len(found)} {text}; the first is row {found[0]!r}", file=sys.stderr)


def warn_of_spellings(rows: Sequence[Row], tokens: Sequence[str]) -> None:
    """Warn where prompts spell a control token."""
    from refusal_tokens.safeguards import spelled_tokens

    text = "prompts spell a control token, which is encoded as plain text"
    warn_of_rows(spelled_tokens(rows, tokens), text)
