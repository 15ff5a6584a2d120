"""One evaluation from prompts to files: profile, replies, comparison with the base model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from refusal_tokens.checkpoint import info_summary
from refusal_tokens.evaluate import Plan, generate_outcomes
from refusal_tokens.evaluation import Evaluation, evaluate_outcomes
from refusal_tokens.helpfulness import Helpfulness, compare_with_base, find_base
from refusal_tokens.outcomes import beside, write_outcomes
from refusal_tokens.partial import partial_file
from refusal_tokens.prefill import profile_rows
from refusal_tokens.profiles import Profile, write_profile
from refusal_tokens.rows import Row, data_hash
from refusal_tokens.steering import SteeredModel


@dataclass(frozen=True)
class Done:
    """A finished evaluation.

    Attributes:
        report: what the outcomes say.
        helpfulness: None where no base model was asked for.
        files: what was written -> path.
    """

    report: Evaluation
    helpfulness: Helpfulness | None
    files: Mapping[str, str]


def evaluate_model(
    model: SteeredModel,
    rows: Sequence[Row],
    plan: Plan,
    output: Path,
    *,
    base: str | None,
    limit: int,
) -> Done:
    """Evaluate a model and write its outcomes, with the profile of the same prompts beside them.

    An interrupted evaluation goes on where it stopped, from ``OUTPUT.partial``.

    Args:
        model: the checkpoint.
        rows: labelled; reference answers are scored on all of them.
        plan: what to generate.
        output: the outcomes file; ``STEM.profile.parquet`` and ``STEM.base.parquet`` lie beside it.
        base: name of the model to compare helpfulness with; None compares with none.
        limit: prompts to generate for, taken evenly from the rows.

    Raises:
        InputError: for a plan that does not fit, or a base model that is missing.
    """
    chosen = spread(rows, limit)
    found = None if base is None else find_base(base, model.checkpoint)
    profile = profile_rows(
        model.checkpoint, chosen, partial=output.with_name(f"{output.name}.partial-profile")
    )
    metadata = _metadata(model, profile, plan)
    # All that a finished part depends on, the prompts apart, which name it.
    work = [
        info_summary(model.checkpoint.info),
        metadata["dtype"],
        plan.max_new_tokens,
        data_hash(rows),
    ]
    with partial_file(output.with_name(f"{output.name}.partial"), work) as kept:
        outcomes = generate_outcomes(model, chosen, profile, plan, kept)
        helpfulness = None
        files = {"outcomes": str(output), "profile": str(beside(output, "profile"))}
        if found is not None:
            helpfulness, plain = compare_with_base(model, found, rows, outcomes, plan, kept)
            if plain:
                files["base"] = str(beside(output, "base"))
                asked = {outcome.id for outcome in plain}
                of = data_hash(row for row in chosen if row.id in asked)
                write_outcomes(files["base"], plain, {"model": found.name, "data_hash": of})
        if "base" not in files:
            beside(output, "base").unlink(missing_ok=True)
        write_profile(files["profile"], profile)
        write_outcomes(output, outcomes, metadata)
    report = evaluate_outcomes(outcomes, model.checkpoint.info.taxonomy)
    return Done(report, helpfulness, files)


def spread(rows: Sequence[Row], limit: int) -> list[Row]:
    """Take rows evenly within each label and category, each in its share, in their order.

    Stepping through the list alone would miss kinds where rows of two labels take turns.
    """
    kinds = [(row.label or "", row.category or "") for row in rows]
    by_kind = sorted(range(len(rows)), key=kinds.__getitem__)
    step = max(1.0, len(rows) / limit)
    taken = [by_kind[int(i * step)] for i in range(min(limit, len(rows)))]
    return [rows[i] for i in sorted(taken)]


def _metadata(model: SteeredModel, profile: Profile, plan: Plan) -> dict[str, Any]:
    return {
        **info_summary(model.checkpoint.info),
        "taxonomy": model.checkpoint.info.taxonomy.to_dict(),
        "data_hash": profile.metadata["data_hash"],
        "dtype": profile.metadata["dtype"],
        "policy": plan.policy.to_dict(),
        "max_new_tokens": plan.max_new_tokens,
        "forced": list(plan.force),
    }
