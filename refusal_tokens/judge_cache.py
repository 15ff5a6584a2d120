"""Verdicts on disk by content hash, so that an interrupted run goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from threading import Lock
from typing import Any

from refusal_tokens.errors import InputError
from refusal_tokens.files import clear_write_errors, read_bytes


def content_key(payload: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a request: another prompt, reply, rubric or model is another key."""
    text = json.dumps(payload, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


class Cache:
    """A JSONL file with one record a line, each with its ``key``; in memory where no path is given.

    A record is appended as soon as it is known. A last line that was cut off is dropped.
    """

    def __init__(self, path: Path | None) -> None:
        """Read the file, if it is there.

        Raises:
            InputError: if a whole line is not a record.
        """
        self._path = path
        self._lock = Lock()
        self._records: dict[str, dict[str, Any]] = {}
        if path is not None and path.exists():
            self._read(path)

    def __len__(self) -> int:
        return len(self._records)

    def kept(self) -> str:
        """Say where the verdicts are that are known so far."""
        if self._path is None:
            return "no --cache was named, so no verdict is kept"
        return f"{len(self)} verdicts are kept in {self._path}: run again to go on"

    def get(self, key: str) -> dict[str, Any] | None:
        """Return the record of a request, or None."""
        return self._records.get(key)

    def put(self, key: str, record: Mapping[str, Any]) -> None:
        """Keep a record.

        Raises:
            InputError: if the file cannot be written.
        """
        # Escaped: half of an emoji, as a model may write, has no UTF-8.
        line = json.dumps({"key": key, **record}) + "\n"
        with self._lock:
            self._records[key] = dict(record)
            if self._path is not None:
                with clear_write_errors(self._path):
                    self._path.parent.mkdir(parents=True, exist_ok=True)
                    with self._path.open("a", encoding="utf-8") as stream:
                        stream.write(line)

    def _read(self, path: Path) -> None:
        data = read_bytes(path)
        whole = data[: data.rfind(b"\n") + 1]
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                record = json.loads(line)
                self._records[record.pop("key")] = record
            except (ValueError, KeyError, TypeError, AttributeError):
                raise InputError(
                    f"{path}, line {number}: not a verdict of an earlier run; allowed: a file that "
                    "--cache wrote, or a new one"
                ) from None
        if len(whole) < len(data):
            with clear_write_errors(path), path.open("r+b") as stream:
                stream.truncate(len(whole))
