"""The one exception for wrong input: the command line turns it into a message and exit status 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(Exception):
    """The input was wrong; the message says where, what was found and what is allowed."""


def nearest(found: object, allowed: Iterable[object]) -> str:
    """Return `` (did you mean 'x'?)`` for the closest allowed name, or an empty string.

    >>> nearest("safty", ["safety", "incomplete"])
    " (did you mean 'safety'?)"
    """
    close = difflib.get_close_matches(str(found), [str(name) for name in allowed], n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""


def unknown(what: str, found: object, allowed: Iterable[object]) -> str:
    """Say that a name is not known, listing the known ones and the nearest.

    >>> unknown("category", "safty", ["safety", "incomplete"])
    "unknown category 'safty' (did you mean 'safety'?); allowed: safety, incomplete"
    """
    names = [str(name) for name in allowed]
    return f"unknown {what} {found!r}{nearest(found, names)}; allowed: {', '.join(names)}"


def one_message(faults: list[str], what: str) -> InputError:
    """Fold every fault found in one input into a single error."""
    if len(faults) == 1:
        return InputError(faults[0])
    return InputError(f"{len(faults)} faults in {what}:\n" + "\n".join(f"  {f}" for f in faults))
