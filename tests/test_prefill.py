"""Prefill: interrupted profiles go on, several processes share the prompts."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refusal_tokens import prefill
from refusal_tokens.checkpoint import Checkpoint, load_checkpoint
from refusal_tokens.partial import Partial
from refusal_tokens.prefill import profile_rows
from refusal_tokens.profiles import read_profile
from refusal_tokens.rows import Row, read_rows


@pytest.fixture(scope="module")
def checkpoint(tiny_run: Path) -> Checkpoint:
    return load_checkpoint(tiny_run / "model", dtype="float32")


@pytest.fixture(scope="module")
def rows(rows_file: Path, checkpoint: Checkpoint) -> list[Row]:
    return read_rows([rows_file], checkpoint.info.taxonomy)


def test_prompts_of_several_lengths_and_heads_score_as_one_by_one(
    checkpoint: Checkpoint, rows: list[Row]
) -> None:
    system = {"role": "system", "content": "Be brief."}
    mixed = [
        *rows,
        Row("s", (system, {"role": "user", "content": "Hi"}), None, "respond", None, "s"),
    ]
    together = profile_rows(checkpoint, mixed, temperatures=[0.5], progress=False)
    alone = [profile_rows(checkpoint, [row], temperatures=[0.5], progress=False) for row in mixed]
    for name in ("control_logits", "rest_max"):
        wanted = np.concatenate([getattr(one, name) for one in alone])
        assert getattr(together, name) == pytest.approx(wanted, abs=1e-4)
    wanted = np.concatenate([one.rest_logsumexp[0.5] for one in alone])
    assert together.rest_logsumexp[0.5] == pytest.approx(wanted, abs=1e-4)


LAST_LOGITS = prefill.last_logits


def scored(monkeypatch: pytest.MonkeyPatch, batches: int | None = None) -> list[int]:
    """The sizes of the batches scored from here on; an interruption follows so many of them."""
    sizes: list[int] = []

    def counted(checkpoint: Checkpoint, prompts: Any) -> Any:
        if len(sizes) == batches:
            raise KeyboardInterrupt
        sizes.append(len(prompts))
        return LAST_LOGITS(checkpoint, prompts)

    monkeypatch.setattr(prefill, "last_logits", counted)
    return sizes


def test_an_interrupted_profile_goes_on_where_it_stopped(
    checkpoint: Checkpoint, rows: list[Row], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = profile_rows(checkpoint, rows, progress=False)
    partial = tmp_path / "partial"
    done = scored(monkeypatch, batches=2)
    with pytest.raises(KeyboardInterrupt):
        profile_rows(checkpoint, rows, progress=False, partial=partial, batch_tokens=80)
    rest = scored(monkeypatch)
    found = profile_rows(checkpoint, rows, progress=False, partial=partial, batch_tokens=80)
    assert sum(rest) == len(rows) - sum(done)
    assert found.control_logits == pytest.approx(whole.control_logits, abs=1e-4)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("change", ["a prompt", "the order", "the model", "the temperatures"])
def test_an_interrupted_profile_of_other_work_starts_anew(
    change: str,
    checkpoint: Checkpoint,
    rows: list[Row],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # Of as many rows, tokens and temperatures, so that what was kept would fit.
    before: dict[str, Any] = {"checkpoint": checkpoint, "rows": rows, "temperatures": [2.0]}
    asked = replace(rows[0], prompt=({"role": "user", "content": "Where is Ghent?"},))
    another = replace(checkpoint.info, model_fingerprint="f00")
    changes: dict[str, dict[str, Any]] = {
        "a prompt": {"rows": [asked, *rows[1:]]},
        "the order": {"rows": rows[::-1]},
        "the model": {"checkpoint": replace(checkpoint, info=another)},
        "the temperatures": {"temperatures": [0.5]},
    }
    after = before | changes[change]
    whole = profile_rows(**after, progress=False)
    partial = tmp_path / "partial"
    scored(monkeypatch, batches=2)
    with pytest.raises(KeyboardInterrupt):
        profile_rows(**before, progress=False, partial=partial, batch_tokens=80)
    again = scored(monkeypatch)
    found = profile_rows(**after, progress=False, partial=partial, batch_tokens=80)
    assert sum(again) == len(rows)
    assert found.control_logits == pytest.approx(whole.control_logits, abs=1e-4)
    for temperature, rest in whole.rest_logsumexp.items():
        assert found.rest_logsumexp[temperature] == pytest.approx(rest, abs=1e-4)
    assert "of other work, or damaged; starting anew" in capsys.readouterr().err


@pytest.mark.parametrize("change", ["other rows", "damaged"])
def test_what_does_not_belong_is_not_taken_up(
    change: str,
    checkpoint: Checkpoint,
    rows: list[Row],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    kept = tmp_path / "partial.0"
    zeros = [[0.0] * len(checkpoint.info.control_token_ids), 0.0, [0.0]]
    Partial(kept, "other work").put({str(i): zeros for i in range(len(rows))})
    if change == "damaged":
        kept.write_bytes(kept.read_bytes()[:40])
    found = profile_rows(checkpoint, rows, progress=False, partial=tmp_path / "partial")
    assert np.abs(found.control_logits).sum(axis=1).min() > 0
    assert "starting anew" in capsys.readouterr().err


def test_two_processes_write_the_profile_of_one(
    tiny_run: Path, rows_file: Path, tmp_path: Path, checkpoint: Checkpoint, rows: list[Row]
) -> None:
    output = tmp_path / "p.parquet"
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    command = ["-m", "refusal_tokens.cli", "profile", str(tiny_run), "--data", str(rows_file)]
    done = subprocess.run(
        [*launch, *command, "--output", str(output), "--dtype", "float32"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    alone = profile_rows(checkpoint, rows, progress=False)
    found = read_profile(output)
    assert list(found.columns["id"]) == list(alone.columns["id"])
    assert found.control_logits == pytest.approx(alone.control_logits, abs=1e-4)
