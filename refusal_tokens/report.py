"""From profiles and outcomes to a folder: one self-contained page, figures and numbers.

``index.html`` needs nothing beside it. Next to it lie each figure as PNG and SVG, each table as
CSV, and everything together in ``numbers.json``.
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from refusal_tokens.analysis import (
    analyse,
    bias_grid,
    plain,
    tables,
    text_rates,
)
from refusal_tokens.comparison import (
    PairedTest,
    align,
    paired_tests,
    profile_entrant,
    prompt_keys,
    prompts_hash,
    text_entrant,
)
from refusal_tokens.decision import Knobs
from refusal_tokens.errors import InputError
from refusal_tokens.files import atomic_folder, write_json
from refusal_tokens.outcomes import Outcome, by_text
from refusal_tokens.page import Report, page
from refusal_tokens.profiles import Profile
from refusal_tokens.text_curves import ForcedTexts

PAGE = "index.html"
NUMBERS = "numbers.json"


def build_report(
    profiles: Mapping[str, Profile],
    setting: Knobs | None,
    outcomes: Mapping[str, Sequence[Outcome]] | None = None,
    *,
    categories: Sequence[str] = (),
    texts: Mapping[str, ForcedTexts] | None = None,
) -> Report:
    """Compute what a page shows.

    Args:
        profiles: name of the model -> profile, all of the same prompts.
        setting: the knobs for all profiles; None only where there are no profiles.
        outcomes: name of the model -> replies, for models judged by their text.
        categories: whose control curves are drawn; all of them if empty.
        texts: name of a profiled model -> its replies under each control token.

    Raises:
        InputError: for profiles of other prompts or taxonomies, categories or labels without rows,
            outcomes that were all forced, or models that share no prompts.
    """
    profiles = align(profiles)
    replies = {name: by_text(found, name) for name, found in (outcomes or {}).items()}
    entrants, analyses = [], []
    if setting is not None and profiles:
        bias = bias_grid(list(profiles.values()), setting.rule)
        for name, profile in profiles.items():
            forced = (texts or {}).get(name)
            analyses.append(
                analyse(name, profile, setting, categories=categories, bias=bias, texts=forced)
            )
            entrants.append(profile_entrant(name, profile, setting))
    entrants += [text_entrant(name, found) for name, found in replies.items()]
    shown = _categories(profiles, replies)
    return Report(
        analyses=tuple(analyses),
        texts={name: text_rates(found, shown) for name, found in replies.items()},
        replies={name: _reply_counts(found) for name, found in replies.items()},
        tests=paired_tests(entrants) if len(entrants) > 1 else (),
        prompts_hash=next((prompts_hash(prompt_keys(p)) for p in profiles.values()), None),
    )


def _reply_counts(found: Sequence[Outcome]) -> dict[str, int | str]:
    counts: dict[str, int | str] = dict(Counter(outcome.verdict for outcome in found))
    return {
        "replies": len(found),
        **counts,
        "judged by": ", ".join(sorted({o.judge for o in found})),
    }


def _categories(
    profiles: Mapping[str, Profile], replies: Mapping[str, Sequence[Outcome]]
) -> tuple[str, ...]:
    for profile in profiles.values():
        return profile.taxonomy.category_ids
    found = {o.category for outcomes in replies.values() for o in outcomes if o.category}
    return tuple(sorted(found))


def check_output(folder: Path, overwrite: bool) -> None:
    """Check that a report may be written to a folder.

    Raises:
        InputError: if it exists and may not be replaced, or holds anything but a report.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise InputError(f"{folder}: is a file; a folder is needed")
    if any(folder.iterdir()):
        if not overwrite:
            raise InputError(f"{folder}: exists; use --overwrite or another --output")
        if not (folder / PAGE).is_file() or not (folder / NUMBERS).is_file():
            raise InputError(f"{folder}: holds other files than a report; use another --output")


def write_report(folder: Path, report: Report, title: str) -> None:
    """Write the page, the figures and the numbers, all or none.

    Raises:
        InputError: if the folder cannot be written.
    """
    from refusal_tokens.drawing import write_picture
    from refusal_tokens.figures import pictures

    drawn = pictures(report.analyses, report.texts)
    with atomic_folder(folder) as temporary:
        for picture in drawn:
            write_picture(picture, temporary)
        for name, records in _records(report).items():
            (temporary / f"{name}.csv").write_text(_csv(records), "utf-8")
        write_json(temporary / NUMBERS, plain(report))
        (temporary / PAGE).write_text(page(report, title, drawn), "utf-8")


def _records(report: Report) -> dict[str, list[dict[str, Any]]]:
    found = tables(report.analyses)
    if report.texts:
        found["by_text"] = [
            {"model": name, "measure": measure, **plain(rate)}
            for name, rates in report.texts.items()
            for measure, rate in rates.items()
        ]
    if report.tests:
        found["paired_tests"] = [_flat(test) for test in report.tests]
    return found


def _flat(test: PairedTest) -> dict[str, Any]:
    record = test.to_dict()
    difference = record.pop("difference")
    return {
        **record,
        "difference": difference["value"],
        "low": difference["low"],
        "high": difference["high"],
    }


def _csv(records: Sequence[Mapping[str, Any]]) -> str:
    """Records as CSV; a value that is not known is an empty field."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(records[0]), lineterminator="\n")
    writer.writeheader()
    for record in records:
        writer.writerow({key: _field(plain(value)) for key, value in record.items()})
    return stream.getvalue()


def _field(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value
