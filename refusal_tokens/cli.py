"""The command ``refusal-tokens``: one subcommand a stage, whose work is imported when called."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from refusal_tokens import __version__
from refusal_tokens.commands import (
    chat,
    compare,
    curves,
    data,
    evaluate,
    export,
    generate,
    inspect,
    judge,
    profile,
    serve,
    target,
    traffic,
    train,
)
from refusal_tokens.errors import InputError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status.

    0: done. 1: what was asked for is out of reach. 2: the input was wrong, with one message. 130:
    interrupted. Anything else raises.
    """
    options = _parse(arguments)
    try:
        return options.run(options) or 0
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of a pipe has gone, as with `| head`.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse, taking prompts on either side of the options.

    argparse ends an open list of positional arguments at the first option.
    """
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    prompts = getattr(options, "prompt", None)
    if not rest:
        return options
    if not isinstance(prompts, list) or any(word.startswith("-") for word in rest):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    options.prompt = [*prompts, *rest]
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="refusal-tokens",
        description="Train refusal tokens into a language model and dial its refusal rates.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    stages = (
        train,
        data,
        profile,
        curves,
        target,
        compare,
        generate,
        inspect,
        traffic,
        chat,
        evaluate,
        judge,
        serve,
        export,
    )
    for stage in stages:
        stage.add(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
