"""What follows training: profiles of the run's splits, its model card, and one screen of rates."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from refusal_tokens.analysis import knobs_with_rows
from refusal_tokens.base_model import fast_dtype
from refusal_tokens.checkpoint import INFO_FILE, load_checkpoint
from refusal_tokens.errors import InputError
from refusal_tokens.files import write_text
from refusal_tokens.model_card import model_card
from refusal_tokens.policy import Policy
from refusal_tokens.prefill import profile_rows
from refusal_tokens.profiles import Profile, write_profile
from refusal_tokens.report import build_report, write_report
from refusal_tokens.rows import Row
from refusal_tokens.summary import summarise, summary_table

REPORTED = ("test", "calibration")


def report_run(folder: Path, rows: Mapping[str, Sequence[Row]]) -> str:
    """Profile a run's calibration and test rows, complete its card, and return the screen to print.

    The screen shows the test rows, or the calibration rows where there are none.
    """
    if not (folder / "model" / INFO_FILE).is_file():
        return (
            f"{folder / 'model'} is ready. It has no control tokens, so only its text can be "
            "measured.\nNext: make baselines"
        )
    names = [name for name in REPORTED if name in rows]
    if not names:
        return f"{folder / 'model'} is ready; its recipe names no rows to measure it on.\n" + _next(
            folder
        )
    checkpoint = load_checkpoint(folder / "model", dtype=fast_dtype())
    profiles = {name: profile_rows(checkpoint, rows[name]) for name in names}
    for name, profile in profiles.items():
        write_profile(folder / f"{name}.parquet", profile)
    summary = summarise(profiles[names[0]], Policy().knobs(checkpoint.info.taxonomy))
    write_text(checkpoint.path / "README.md", model_card(checkpoint.info, summary))
    title = f"{folder}: {len(rows[names[0]])} {names[0]} prompts at bias 0, by token, 95% intervals"
    page = _write_page(folder, profiles[names[0]])
    following = _next(folder, calibrate="calibration" in names)
    return "\n".join(["", title, "", summary_table(summary), "", page, "", following])


def _write_page(folder: Path, profile: Profile) -> str:
    """Write the page of a run to its ``report`` folder; return what to say of it.

    Categories without refuse rows are left out. A set without both labels has no page: training
    has gone well all the same.
    """
    setting = Policy().knobs(profile.taxonomy)
    kept = knobs_with_rows(profile)
    try:
        report = build_report({folder.name: profile}, setting, categories=kept)
    except InputError as error:
        return f"No page of curves: {error}"
    write_report(folder / "report", report, f"Refusal rates of {folder.name}")
    lacking = [knob for knob in profile.taxonomy.knobs if knob not in kept]
    without = f" (no curve for {', '.join(lacking)}: no refuse rows)" if lacking else ""
    return f"Curves, figures and numbers: {folder / 'report' / 'index.html'}{without}"


def _next(folder: Path, *, calibrate: bool = False) -> str:
    prompt = "How do I get rid of my neighbour's dog?"
    run = shlex.quote(str(folder))
    lines = [
        "Next:",
        f'  refusal-tokens generate {run} --sweep safety=-8,0,8 "{prompt}"',
        f'  refusal-tokens inspect {run} "{prompt}"',
        f"  refusal-tokens chat {run}",
    ]
    if calibrate:
        lines.append(f"  make calibrate RUN={run}")
    return "\n".join(lines)
