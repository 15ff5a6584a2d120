"""What a training run shows and stores of itself while it goes on."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from transformers import ProgressCallback, TrainerCallback

from refusal_tokens.files import write_text


class LogFile(TrainerCallback):  # type: ignore[misc]
    """Writes each log entry as a JSON line."""

    def __init__(self, path: Path, after: int) -> None:
        """Prepare a log, new or going on after a step; training's begin writes first."""
        self._path = path
        self._after = after

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the file, or drop what comes after the step: it will come again."""
        there = self._after and self._path.is_file()
        lines = self._path.read_text("utf-8").splitlines() if there else []
        kept = [line for line in lines if _step(line) <= self._after]
        write_text(self._path, "".join(f"{line}\n" for line in kept))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Append the entry with its step."""
        entry = {"step": state.global_step, **(logs or {})}
        with self._path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(entry) + "\n")


def _step(line: str) -> float:
    """The step of a log entry; infinity for one that was cut off."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


class Progress(ProgressCallback):  # type: ignore[misc]
    """transformers' bar with the time left, and the last log entry beside it."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Show what tells whether training goes well."""
        if self.training_bar is None or not logs:
            return
        shown = {name: logs[name] for name in ("control_nll", "reply_nll", "loss") if name in logs}
        self.training_bar.set_postfix({k: f"{float(v):.2f}" for k, v in shown.items()})
