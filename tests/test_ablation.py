"""The ablation and the baselines: end to end on tiny models, and on planted numbers."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, tiny_settings

sys.path.insert(0, str(ROOT / "benchmarks"))

import ablation
import baselines
from trained import Measured, write_between

from refusal_tokens.errors import InputError
from refusal_tokens.outcomes import Outcome, read_outcomes
from refusal_tokens.recipe import load_recipe

PAGE = "# Page\n\n<!-- ablation -->\nold\n<!-- /ablation -->\n\nend\n"


@pytest.mark.parametrize("name", [name for name in ablation.VARIANTS if name != "default"])
def test_every_variant_changes_the_default_recipe(name: str) -> None:
    budget = ablation.BUDGETS["default"]
    plain = load_recipe(ROOT / budget.recipe, budget.settings).to_dict()
    changed = load_recipe(ROOT / budget.recipe, [*budget.settings, *ablation.VARIANTS[name]])
    assert changed.to_dict() != plain


def run_of(value: float, half: float, adherence: float = 0.9) -> dict[str, Any]:
    keys = list(ablation.HEADLINE)
    measures = {keys[0]: asdict(Measured(value, value - half, value + half, 100))}
    measures[keys[2]] = asdict(Measured(adherence, adherence - 0.1, adherence + 0.1, 40))
    return {"measures": measures, "training": {"seconds": 60}}


def test_the_variants_that_moved_most_are_chosen_by_their_own_precision() -> None:
    results = {
        "default": [run_of(0.90, 0.01)],
        "same": [run_of(0.90, 0.01)],
        # 2 points, 1.4 half-widths of both intervals; against 5 points at a tenth of the precision.
        "precise": [run_of(0.88, 0.01)],
        "vague": [run_of(0.85, 0.1)],
        "text": [run_of(0.90, 0.01, adherence=0.55)],
        "a": [run_of(0.86, 0.01)],
        "b": [run_of(0.95, 0.01)],
    }
    assert ablation.most_moved(results) == ["b", "a", "text", "precise"]


def test_several_seeds_give_a_mean_with_student_s_interval() -> None:
    values = (0.80, 0.82, 0.87)
    # Mean 0.83, standard deviation 0.03606, t(0.975, 2) = 4.3027: half-width 0.08957.
    assert ablation.seed_half_width(values) == pytest.approx(0.08957, abs=1e-5)
    found = ablation.over_seeds([Measured(v, v - 0.03, v + 0.04, 50) for v in values])
    # With the prompts' own: hypot(0.03, 0.08957) = 0.09446 below, hypot(0.04, ...) = 0.09810 above.
    ends = (found.value, found.low, found.high)
    assert ends == pytest.approx((0.83, 0.73554, 0.92810), abs=1e-4)
    assert found.n == 50
    # Seeds that agree do not make the prompts' error go away, and a rate stays a rate.
    agreed = ablation.over_seeds([Measured(1.0, 0.8, 1.0, 9)] * 3)
    assert (agreed.low, agreed.high) == pytest.approx((0.8, 1.0))
    one = Measured(0.5, 0.4, 0.6, 9)
    assert ablation.over_seeds([one]) == one


def test_differences_pair_the_seeds() -> None:
    key = next(iter(ablation.HEADLINE))
    default = [run_of(v, 0.1) for v in (0.5, 0.6, 0.7)]
    shifted = [run_of(v + 0.05, 0.1) for v in (0.5, 0.6, 0.7)]
    found = ablation.differences(shifted, default, key)
    assert found is not None
    assert (found.value, found.low, found.high) == pytest.approx((0.05, 0.05, 0.05))
    assert ablation.differences(shifted[:1], default, key) is None


def test_a_page_s_table_is_replaced_and_the_rest_stays(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    write_between(page, "ablation", "| new |")
    assert page.read_text() == PAGE.replace("\nold\n", "\n\n| new |\n\n")
    write_between(page, "ablation", "| newer |")
    assert "| new |" not in page.read_text()
    with pytest.raises(InputError, match="no place for the table"):
        write_between(page, "other", "x")
    docs = (ROOT / "docs" / "ablations.md").read_text()
    assert all(f"<!-- {name} -->" in docs for name in ("ablation", "baselines"))


def sets_of(settings: list[str]) -> list[str]:
    return [argument for setting in settings for argument in ("--set", setting)]


def test_a_tiny_ablation_runs_writes_its_table_and_resumes(
    tiny_run: Path,
    tiny_base: Callable[[bool], Path],
    rows_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    page, output = tmp_path / "page.md", tmp_path / "out"
    page.write_text(PAGE)
    settings = tiny_settings(tiny_base(True), rows_file)
    command = ["--budget", "tiny", "--only", "smoothing-0.1", "--output", str(output)]
    command += [*sets_of(settings), "--write-docs", str(page)]
    assert ablation.main(command) == 0
    table = (output / "table.md").read_text()
    assert "| smoothing-0.1 | 2 |" in table
    assert "--budget tiny --only smoothing-0.1" in table
    assert str(tmp_path) not in table.replace(str(rows_file), "")
    assert table.strip() in page.read_text()
    assert page.read_text().endswith("end\n")
    with open(output / "table.csv", newline="") as stream:
        records = list(csv.DictReader(stream))
    own = {r["measure"]: r for r in records if r["variant"] == "smoothing-0.1"}
    # Each refusal token on three prompts.
    assert own["text: refusal after a refusal token"]["n"] == "15"
    assert own["test: AUC"]["n"] == "12"
    assert own["test: AUC"]["interval over"] == "prompts and seeds"
    assert (output / "page" / "index.html").is_file()
    assert not list(output.glob("*/model"))

    # A run that lost its result is run again, to the same numbers; the finished ones are not.
    results = {path: path.stat().st_mtime_ns for path in output.glob("*/results.json")}
    assert len(results) == 4
    lost = output / "smoothing-0.1-1" / "results.json"
    measures = json.loads(lost.read_text())["measures"]
    lost.unlink()
    capsys.readouterr()
    assert ablation.main(command) == 0
    assert "smoothing-0.1, seed 1:" in (out := capsys.readouterr().out)
    assert "default, seed" not in out
    again = {path: path.stat().st_mtime_ns for path in output.glob("*/results.json")}
    assert {path for path in results if again[path] != results[path]} == {lost}
    assert json.loads(lost.read_text())["measures"] == measures

    assert ablation.main([*command, "--set", "learning_rate=0.5"]) == 2
    assert "default-0/results.json: other recipe now; use another" in capsys.readouterr().err


def test_an_unknown_variant_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert ablation.main(["--only", "smoothing"]) == 2
    assert "unknown variant 'smoothing' (did you mean" in capsys.readouterr().err


def outcome(number: int, label: str, verdict: str) -> Outcome:
    return Outcome(f"r{number}", label, None, None, None, None, "text", verdict)


def test_a_point_leaves_undecided_replies_out_and_counts_them() -> None:
    verdicts = ["refused", "refused", "answered", "undecided", "partly"]
    found = baselines.point(
        "x",
        [
            outcome(10 * i + j, label, verdict)
            for i, label in enumerate(("refuse", "respond"))
            for j, verdict in enumerate(verdicts[i:])
        ],
        3.0,
    )
    assert (found.refused.count, found.refused.n) == (2, 4)
    assert (found.over_refused.count, found.over_refused.n) == (1, 3)
    assert found.undecided == 2


def test_within_reads_the_most_refusal_on_the_curve() -> None:
    from test_profiles import TWO, profile_of

    entries = [("refuse", "safety", [0.0, z, -9.0]) for z in (4.0, 3.0, 1.0, -2.0)]
    entries += [("respond", None, [0.0, z, -9.0]) for z in (2.0, 0.0, -1.0, -3.0)]
    category = TWO.category_ids[0]
    profile = profile_of([(label, c and category, z) for label, c, z in entries], TWO)
    # No respond row refused: the two refuse rows above it; one of four: three; all: all.
    assert [baselines.within(profile, x).count for x in (0.0, 0.25, 0.3, 1.0)] == [2, 3, 3, 4]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("system_prompts: {a: x}", "model_name_or_path: found None"),
        ("model_name_or_path: m\nsystem_prompts: {a: ''}", "system_prompts.a: found ''"),
        ("model_name_or_path: m\nprompts: {}", "unknown key 'prompts'"),
        ("- a", "found list"),
    ],
)
def test_a_faulty_file_of_system_prompts_is_named(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text(text)
    with pytest.raises(InputError) as caught:
        baselines.read_prompts(tmp_path / "p.yaml")
    assert said in str(caught.value)


def test_the_shipped_system_prompts_are_valid() -> None:
    model, prompts = baselines.read_prompts(ROOT / baselines.PROMPTS)
    assert model == "smollm2-135m-instruct"
    assert prompts["none"] is None
    assert len(prompts) == 4


def test_tiny_baselines_run_and_go_on(
    tiny_run: Path,
    tiny_base: Callable[[bool], Path],
    rows_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    prompts = tmp_path / "prompts.yaml"
    prompts.write_text("model_name_or_path: unused\nsystem_prompts: {none: null, strict: Decline.}")
    output = tmp_path / "out"
    settings = [*tiny_settings(tiny_base(True), rows_file), "max_steps=2", "save_steps=2"]
    settings = [text for text in settings if "calibration" not in text]
    command = ["--run", str(tiny_run), "--shares", "0.2,0.5", "--prompts", str(prompts)]
    command += ["--data", str(rows_file), "--max-new-tokens", "6", "--output", str(output)]
    command += sets_of(settings)
    assert baselines.main(command) == 0
    points = json.loads((output / "points.json").read_text())
    assert [point["name"] for point in points] == [
        "system prompt: none",
        "system prompt: strict",
        "no token: 0.2 refuse rows",
        "no token: 0.5 refuse rows",
        *(f"tokens: bias {bias}" for bias in ("-2", "+0", "+2")),
    ]
    assert [point["minutes"] > 0 for point in points] == [False] * 2 + [True] * 5
    outcomes, metadata = read_outcomes(output / "no-token--0.2-refuse-rows.parquet")
    assert len(outcomes) == 12
    assert all(o.forced is None and o.decision is None for o in outcomes)
    assert metadata["max_new_tokens"] == 6
    opened, _ = read_outcomes(output / "tokens--bias-+2.parquet")
    assert all(o.decision for o in opened)
    table = (output / "table.md").read_text()
    assert "2 settings, 2 training runs" in table
    assert (output / "page" / "index.html").is_file()

    files = {path: path.stat().st_mtime_ns for path in output.glob("*.parquet")}
    assert len(files) == 8
    assert baselines.main(command) == 0
    assert files == {path: path.stat().st_mtime_ns for path in output.glob("*.parquet")}
    capsys.readouterr()
    assert baselines.main([*command, "--max-new-tokens", "7"]) == 2
    assert "is of other rows or settings" in capsys.readouterr().err
