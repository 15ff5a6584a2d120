"""Finished parts of long work, kept in a file so that an interrupted command goes on from there.

The file only grows: its first line says what the work is, each further line holds a finished part.
A line that an interruption cut off is done again.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from refusal_tokens.files import clear_write_errors, write_text


class Partial:
    """Finished parts by name; those of an interrupted run of the same work are there at once.

    Attributes:
        done: name -> what was found, as JSON holds it.
    """

    def __init__(self, path: Path | None, work: Any) -> None:
        """Take up what is in the file.

        Args:
            path: the file; None keeps nothing.
            work: what the work depends on, as JSON; a file of other work is started anew.
        """
        self.done: dict[str, Any] = {}
        self._path = path
        head = json.dumps({"work": hashlib.sha256(json.dumps(work).encode()).hexdigest()})
        if path is None:
            return
        lines = [head, *self._kept(path, head)]
        write_text(path, "".join(f"{line}\n" for line in lines))

    def _kept(self, path: Path, head: str) -> list[str]:
        """The file's whole lines after its head; none if it belongs to other work."""
        if not path.is_file():
            return []
        first, *lines = path.read_text("utf-8", errors="replace").split("\n")
        if first != head:
            print(f"{path}: of other work, or damaged; starting anew", file=sys.stderr, flush=True)
            return []
        kept = []
        for line in lines:
            try:
                name, value = json.loads(line)
            except ValueError:
                break
            self.done[name] = value
            kept.append(line)
        return kept

    def put(self, parts: Mapping[str, Any]) -> None:
        """Keep finished parts."""
        self.done.update(parts)
        if self._path is not None:
            with clear_write_errors(self._path), self._path.open("a", encoding="utf-8") as stream:
                stream.writelines(f"{json.dumps(part)}\n" for part in parts.items())


@contextmanager
def partial_file(path: Path | None, work: Any) -> Iterator[Partial]:
    """Give the finished parts; once the block is done without error the file is removed.

    Raises:
        InputError: if the file cannot be written.
    """
    partial = Partial(path, work)
    try:
        yield partial
    except KeyboardInterrupt:
        if path is not None:
            kept = f"{len(partial.done)} finished parts are kept in {path}"
            print(f"\n{kept}; the same command goes on from there", file=sys.stderr)
        raise
    if path is not None:
        path.unlink(missing_ok=True)
