"""A report as lines for a terminal."""

from __future__ import annotations

from itertools import groupby

from refusal_tokens.analysis import summary_rates
from refusal_tokens.page import Report, p_words, test_words


def model_lines(report: Report) -> list[str]:
    """Return one line a model for a terminal."""
    rates = {a.name: summary_rates(a.summary) for a in report.analyses} | dict(report.texts)
    areas = {a.name: str(a.spread.measures["auc"]) for a in report.analyses}
    wide = 2 + max(len(name) for name in rates)
    lines = [f"{'':{wide}}{'refused':26}{'all respond rows refused':28}AUC"]
    for name, found in rates.items():
        refused, over = found["refused, all categories"], found["all respond rows"]
        lines.append(f"{name:{wide}}{refused!s:26}{over!s:28}{areas.get(name, 'by text')}")
    return lines


def test_lines(report: Report) -> list[str]:
    """Return one line a paired test for a terminal."""
    lines = []
    for (a, b), tests in groupby(report.tests, key=lambda test: (test.a, test.b)):
        lines.append(f"{b} less {a}, p corrected for {len(report.tests)} tests")
        for test in tests:
            words = test_words(test)
            difference = f"{words['difference']} {words['interval']}"
            end = f"p {p_words(test.p_holm)}{' *' * words['stands']}"
            lines.append(f"  {test.measure:36}{difference:32}{end}")
    return lines
