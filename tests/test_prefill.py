"""Prefill: interrupted profiles go on, several processes share the prompts."""

from __future__ import annotations

import os
import subprocess
import sys
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


def test_an_interrupted_profile_goes_on_where_it_stopped(
    checkpoint: Checkpoint, rows: list[Row], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = profile_rows(checkpoint, rows, progress=False)
    real, calls = prefill.last_logits, []

    def interrupted(checkpoint: Checkpoint, prompts: Any) -> Any:
        calls.append(len(prompts))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(checkpoint, prompts)

    partial = tmp_path / "partial"
    monkeypatch.setattr(prefill, "last_logits", interrupted)
    with pytest.raises(KeyboardInterrupt):
        profile_rows(checkpoint, rows, progress=False, partial=partial, batch_tokens=80)
    done = sum(calls[:2])
    seen: list[int] = []

    def counted(checkpoint: Checkpoint, prompts: Any) -> Any:
        seen.append(len(prompts))
        return real(checkpoint, prompts)

    monkeypatch.setattr(prefill, "last_logits", counted)
    found = profile_rows(checkpoint, rows, progress=False, partial=partial, batch_tokens=80)
    assert sum(seen) == len(rows) - done
    assert found.control_logits == pytest.approx(whole.control_logits, abs=1e-4)
    assert not list(tmp_path.iterdir())


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
