"""Putting a judge to work: on labelled replies, and on an outcomes file again."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

from refusal_tokens.agreement import Agreement, Label, agreement, expected_of
from refusal_tokens.correction import Corrected, corrected
from refusal_tokens.errors import InputError
from refusal_tokens.judge import Case, Judge, Verdict, conversation, without_control_tokens
from refusal_tokens.outcomes import Outcome, distinct
from refusal_tokens.rates import Rate, rate
from refusal_tokens.rows import Row, data_hash

# Fewer replies than this may all be undecided with good reason.
SUSPICIOUS = 5


def judged(judge: Judge, cases: Sequence[Case]) -> list[Verdict]:
    """Return one verdict a case: control tokens stripped, replies without a word ``undecided``.

    Raises:
        InputError: if the judge decides none of five or more replies that hold words.
    """
    stripped = [replace(case, text=without_control_tokens(case.text)) for case in cases]
    asked = [i for i, case in enumerate(stripped) if re.search(r"\w", case.text)]
    verdicts: list[Verdict] = ["undecided"] * len(cases)
    for i, verdict in zip(asked, judge.verdicts([stripped[i] for i in asked]), strict=True):
        verdicts[i] = verdict
    if len(asked) >= SUSPICIOUS and all(verdicts[i] == "undecided" for i in asked):
        raise InputError(
            f"{judge.name} leaves all {len(asked)} replies undecided, so it measures nothing; "
            "nothing was written"
        )
    return verdicts


def against_labels(judge: Judge, labels: Sequence[Label]) -> Agreement:
    """Judge the labelled replies and compare with the reader's verdicts."""
    verdicts = judged(judge, [label.case for label in labels])
    return agreement(judge.name, [label.verdict for label in labels], verdicts)


def compare_judges(
    judges: Sequence[Judge], labels: Sequence[Label]
) -> tuple[list[Agreement], dict[tuple[str, str], Agreement]]:
    """Judge the labelled replies; compare each judge with the reader, and each two with each other.

    Returns:
        One agreement a judge; and (first, second) -> their agreement, the first one's verdicts
        taken as true.
    """
    cases = [label.case for label in labels]
    verdicts = {judge.name: judged(judge, cases) for judge in judges}
    read = [label.verdict for label in labels]
    alone = [agreement(name, read, found) for name, found in verdicts.items()]
    pairs = combinations(verdicts, 2)
    return alone, {(a, b): agreement(b, verdicts[a], verdicts[b]) for a, b in pairs}


def prompts_of(
    outcomes: Sequence[Outcome], metadata: Mapping[str, Any], rows: Sequence[Row]
) -> dict[str, Row]:
    """Return id -> row for the prompts that were replied to.

    Raises:
        InputError: if one is missing, or the rows are not those the replies were generated on.
    """
    by_id = {row.id: row for row in rows}
    wanted = dict.fromkeys(outcome.id for outcome in outcomes)
    for name in wanted:
        if name not in by_id:
            raise InputError(
                f"--data: no row {name!r}, whose reply is to be judged; give the files of rows "
                "that the replies were generated on"
            )
    found = {name: by_id[name] for name in wanted}
    stated, ours = metadata.get("data_hash"), data_hash(found.values())
    if stated is not None and stated != ours:
        raise InputError(
            f"--data: not the rows that the replies were generated on (data hash {ours}; the "
            f"outcomes file states {stated})"
        )
    return found


def judge_again(
    judge: Judge, outcomes: Sequence[Outcome], prompts: Mapping[str, Row] | None
) -> list[Outcome]:
    """Return the outcomes with a judge's verdicts in place of those that they had.

    Args:
        prompts: from ``prompts_of``; None for a judge that does not read prompts.
    """
    cases = [_case(outcome, prompts) for outcome in outcomes]
    verdicts = judged(judge, cases)
    return [
        replace(outcome, verdict=verdict, judge=judge.name)
        for outcome, verdict in zip(outcomes, verdicts, strict=True)
    ]


def _case(outcome: Outcome, prompts: Mapping[str, Row] | None) -> Case:
    prompt = "" if prompts is None else conversation(prompts[outcome.id].prompt)
    return Case(prompt, outcome.text, expected_of(outcome.decision), outcome.category)


def refused_by_opening(outcomes: Sequence[Outcome]) -> dict[str, tuple[Rate, int]]:
    """Return, by opening control token, the share of refusals among decided replies.

    Beside it stands the number of undecided ones, which are not in it. A reply that is both the
    model's own and forced counts once.
    """
    by_token: dict[str, list[str]] = {}
    for outcome in distinct(outcomes):
        by_token.setdefault(outcome.decision or "no control token", []).append(outcome.verdict)
    found = {}
    for token, verdicts in by_token.items():
        undecided = verdicts.count("undecided")
        found[token] = rate(verdicts.count("refused"), len(verdicts) - undecided), undecided
    return found


def corrections(rates: Mapping[str, tuple[Rate, int]], known: Agreement) -> dict[str, Corrected]:
    """Correct refusal rates by a judge's recall and specificity on labelled replies."""
    return {
        name: corrected(found, known.recall, known.specificity)
        for name, (found, _) in rates.items()
    }


def make_judge(name: str, options: Any) -> tuple[Judge, Any]:
    """Return a judge and, for the LLM judge, what it has cost so far, an ``Endpoint``.

    Raises:
        InputError: for an unreadable classifier, or an endpoint that is not fully named.
    """
    if name == "rules":
        from refusal_tokens.judge import RulesJudge

        return RulesJudge(), None
    if name == "classifier":
        from refusal_tokens.judge_classifier import load_classifier

        return load_classifier(options.classifier), None
    return _llm_judge(options)


def _llm_judge(options: Any) -> tuple[Judge, Any]:
    import os

    from refusal_tokens.judge_cache import Cache
    from refusal_tokens.judge_endpoint import Endpoint, Limits
    from refusal_tokens.judge_llm import LLMJudge, load_rubrics

    for option in ("endpoint", "model", "cache"):
        if not getattr(options, option):
            raise InputError(f"--judge llm needs --{option}")
    key = os.environ.get(options.api_key_env, "").strip() if options.api_key_env else None
    if options.api_key_env and not key:
        raise InputError(f"--api-key-env: the environment has no {options.api_key_env}")
    limits = Limits(
        options.max_requests, options.max_tokens, options.concurrency, timeout=options.timeout
    )
    endpoint = Endpoint(options.endpoint, key, limits)
    cache = Cache(Path(options.cache))
    rubrics = load_rubrics(options.rubrics)
    judge = LLMJudge(
        endpoint, options.model, concurrency=options.concurrency, cache=cache, rubrics=rubrics
    )
    return judge, endpoint
