"""Mixing sources of rows: by count, by share of the mix, and near-misses against refusals."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from refusal_tokens.errors import InputError, one_message
from refusal_tokens.rows import Part, Row, read_sources
from refusal_tokens.sources import Source
from refusal_tokens.taxonomy import RESPOND, Taxonomy


@dataclass(frozen=True)
class Drawn:
    """What one source gave to a mix.

    Attributes:
        title: the source.
        found: rows in it.
        taken: rows of it in the mix.
        skipped: rows left out as faulty.
        left_out: rows that the recipe's options leave out.
    """

    title: str
    found: int
    taken: int
    skipped: int
    left_out: int = 0

    def __str__(self) -> str:
        text = f"{self.title}: {self.taken} of {self.found} rows"
        text += f", {self.skipped} faulty left out" if self.skipped else ""
        return text + (f", {self.left_out} left out by option" if self.left_out else "")


@dataclass(frozen=True)
class Mix:
    """Mixed rows.

    Attributes:
        rows: source by source, each in its own order.
        drawn: one entry a source.
        found: all rows of the sources, those that were not drawn among them.
    """

    rows: list[Row]
    drawn: tuple[Drawn, ...]
    found: list[Row]


def read_mix(
    sources: Sequence[Source],
    taxonomy: Taxonomy,
    *,
    seed: int = 0,
    contrast_share: float | None = None,
    refusal_share: float | None = None,
    keep: Callable[[Row], bool] = lambda row: True,
) -> Mix:
    """Read sources and mix them.

    Rows that ``keep`` leaves out are as if they were not there. Counts are drawn first; then
    ``contrast_share`` thins out whichever of near-misses and refusals is in excess, or
    ``refusal_share`` whichever of refuse and respond rows; then shares are drawn so that they hold
    of the whole mix. Rows whose control token is not trained take no part in either: their label
    is not what their prompt asks for.

    Args:
        sources: with their counts and shares.
        taxonomy: the categories that rows may carry.
        seed: of the draw. A row's place in it depends on seed and id alone, so that a larger count
            holds the rows of a smaller one.
        contrast_share: near-miss rows among all rows with a category, from 0 to below 1; None
            leaves them as they are.
        refusal_share: refuse rows among all rows, likewise.
        keep: whether a row may be drawn.

    Raises:
        InputError: for faults in rows, or where more rows are asked for than there are.
    """
    whole = read_sources(sources, taxonomy)
    parts = [replace(part, rows=[row for row in part.rows if keep(row)]) for part in whole]
    rows = [_counted(part, seed) for part in parts]
    short = [fault for part in parts for fault in _count_faults(part)]
    if short:
        raise one_message(short, "the mix")
    if contrast_share is not None:
        rows = _contrasted(parts, rows, contrast_share, seed)
    if refusal_share is not None:
        rows = _thinned(rows, "refusal_share", refusal_share, _is_refusal, _is_respond, seed)
    rows = _shared(parts, rows, seed)
    drawn = [
        Drawn(
            title=part.source.title,
            found=len(part.rows),
            taken=len(taken),
            skipped=part.skipped,
            left_out=len(before.rows) - len(part.rows),
        )
        for before, part, taken in zip(whole, parts, rows, strict=True)
    ]
    found = [row for part in whole for row in part.rows]
    return Mix([row for taken in rows for row in taken], tuple(drawn), found)


def draw(rows: Sequence[Row], count: int, seed: int) -> list[Row]:
    """Draw ``count`` rows, kept in their order."""
    if count == len(rows):
        return list(rows)
    ranks = [hashlib.sha256(f"{seed}\0{row.id}".encode()).digest() for row in rows]
    chosen = sorted(range(len(rows)), key=ranks.__getitem__)[:count]
    return [rows[index] for index in sorted(chosen)]


def _count_faults(part: Part) -> list[str]:
    asked = part.source.count
    if asked is None or asked <= len(part.rows):
        return []
    return [f"{part.source.path}: count asks for {asked} rows; found {len(part.rows)}"]


def _counted(part: Part, seed: int) -> list[Row]:
    asked = part.source.count
    return part.rows if asked is None else draw(part.rows, asked, seed)


def _contrasted(
    parts: Sequence[Part], rows: Sequence[Sequence[Row]], share: float, seed: int
) -> list[list[Row]]:
    """Thin out near-misses or refusals until near-misses are ``share`` of both."""
    for part in parts:
        if part.source.share is not None and any(row.category for row in part.rows):
            raise InputError(
                f"contrast_share: {part.source.path} has a share and rows with a category, so both "
                "cannot hold; give it a count, or leave contrast_share out"
            )
    return _thinned(rows, "contrast_share", share, _is_near_miss, _is_refusal, seed)


def _is_refusal(row: Row) -> bool:
    return row.label != RESPOND and row.train_control


def _is_respond(row: Row) -> bool:
    return row.label == RESPOND and row.train_control


def _is_near_miss(row: Row) -> bool:
    return _is_respond(row) and row.category is not None


NAMES: dict[Callable[[Row], bool], str] = {
    _is_near_miss: "near-misses",
    _is_refusal: "refuse rows",
    _is_respond: "respond rows",
}


def _thinned(
    rows: Sequence[Sequence[Row]],
    key: str,
    share: float,
    is_wanted: Callable[[Row], bool],
    is_other: Callable[[Row], bool],
    seed: int,
) -> list[list[Row]]:
    """Thin out whichever of wanted and other rows are in excess of ``share`` of both."""
    pool = [row for taken in rows for row in taken]
    wanted, others = ([row for row in pool if kind(row)] for kind in (is_wanted, is_other))
    names = NAMES[is_other], NAMES[is_wanted]
    if not others or (share and not wanted):
        raise InputError(
            f"{key} {share:g} needs {names[0]} and {names[1]}; found {len(others)} and "
            f"{len(wanted)}"
        )
    keep_wanted = min(len(wanted), round(share / (1 - share) * len(others)))
    keep_others = len(others)
    if share and keep_wanted == len(wanted):
        keep_others = min(len(others), round((1 - share) / share * len(wanted)))
    if not keep_others or (share and not keep_wanted):
        raise InputError(
            f"{key} {share:g} of {len(others)} {names[0]} and {len(wanted)} {names[1]} leaves "
            f"{keep_others} and {keep_wanted}; more rows are needed"
        )
    kept = {row.id for row in draw(wanted, keep_wanted, seed) + draw(others, keep_others, seed)}
    return [
        [row for row in taken if row.id in kept or not (is_wanted(row) or is_other(row))]
        for taken in rows
    ]


def _shared(parts: Sequence[Part], rows: Sequence[list[Row]], seed: int) -> list[list[Row]]:
    """Draw each share of the whole mix: what the other entries give, and the shares themselves."""
    shares = [part.source.share for part in parts]
    if not any(shares):
        return list(rows)
    fixed = sum(len(taken) for taken, share in zip(rows, shares, strict=True) if share is None)
    if fixed:
        total = fixed / (1 - math.fsum(share or 0 for share in shares))
    else:
        # Shares alone: the largest mix that every source can serve.
        total = min(len(t) / share for t, share in zip(rows, shares, strict=True) if share)
    mixed, faults = [], []
    for part, taken, share in zip(parts, rows, shares, strict=True):
        asked = len(taken) if share is None else round(share * total)
        if share is not None and not 0 < asked <= len(taken):
            faults.append(
                f"{part.source.path}: share {share:g} of a mix of {round(total)} rows asks for "
                f"{asked} rows; found {len(taken)}"
            )
            continue
        mixed.append(draw(taken, asked, seed))
    if faults:
        raise one_message(faults, "the mix")
    return mixed
