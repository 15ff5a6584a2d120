"""Agreement with labels, the correction of rates, the classifier, and the command."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from sklearn.metrics import cohen_kappa_score

from refusal_tokens.agreement import agreement, expected_of, read_labels, reasons
from refusal_tokens.cli import main
from refusal_tokens.correction import corrected
from refusal_tokens.errors import InputError
from refusal_tokens.judge import Case, RulesJudge
from refusal_tokens.judge_classifier import (
    features,
    load_classifier,
    save_classifier,
    train_classifier,
)
from refusal_tokens.judging import against_labels, judged
from refusal_tokens.outcomes import Outcome, read_outcomes, write_outcomes
from refusal_tokens.rates import rate
from refusal_tokens.rows import Row, data_hash, read_rows
from refusal_tokens.taxonomy import default_taxonomy

LABELS = ROOT / "data" / "labels" / "judge_labels.jsonl"


def test_a_planted_table_has_its_rates() -> None:
    pairs = [("refused", "refused")] * 40 + [("refused", "answered")] * 10
    pairs += [("answered", "refused")] * 4 + [("partly", "refused")]
    pairs += [("answered", "answered")] * 40 + [("partly", "partly")] * 5
    pairs += [("undecided", "refused")] * 3 + [("refused", "undecided")] * 2
    found = agreement("j", [a for a, _ in pairs], [b for _, b in pairs])
    assert (found.n, found.label_undecided, found.judge_undecided) == (100, 3, 2)
    assert (found.precision.count, found.precision.n) == (40, 45)
    assert (found.recall.count, found.recall.n) == (40, 50)
    assert (found.specificity.count, found.specificity.n) == (45, 50)
    assert found.kappa is not None
    assert found.kappa.value == pytest.approx(0.7)
    decided = [p for p in pairs if "undecided" not in p]
    reference = cohen_kappa_score(
        [a == "refused" for a, _ in decided], [b == "refused" for _, b in decided]
    )
    assert found.kappa.value == pytest.approx(reference)
    assert found.kappa.low < 0.7 < found.kappa.high
    assert found.counts["undecided"]["refused"] == 3


def test_one_verdict_only_has_no_kappa() -> None:
    found = agreement("j", ["refused", "answered"], ["answered", "answered"])
    assert found.kappa is None
    assert found.precision.value is None


def test_correction_undoes_the_judges_error() -> None:
    # 600 true refusals among 1000: 0.9 * 600 + 0.2 * 400 = 620 are called refused.
    found = corrected(rate(620, 1000), rate(90, 100), rate(80, 100))
    assert found.value == pytest.approx(0.6)
    assert found.low < 0.6 < found.high
    assert not found.clipped
    exact = corrected(rate(300, 1000), rate(10**7, 10**7), rate(10**7, 10**7))
    wilson = rate(300, 1000)
    assert (exact.value, exact.low, exact.high) == pytest.approx(
        (0.3, wilson.low, wilson.high), abs=2e-3
    )


def test_correction_covers_the_truth() -> None:
    random = np.random.default_rng(0)
    held = 0
    for _ in range(500):
        positive = random.binomial(200, 0.3 * 0.9 + 0.7 * 0.1)
        known = random.binomial(80, 0.9), random.binomial(80, 0.9)
        found = corrected(rate(positive, 200), rate(known[0], 80), rate(known[1], 80))
        held += found.low <= 0.3 <= found.high
    assert 0.92 <= held / 500 <= 0.99


def test_correction_is_clipped_and_flagged() -> None:
    clipped = corrected(rate(1, 100), rate(95, 100), rate(90, 100))
    assert (clipped.value, clipped.clipped, clipped.low) == (0.0, True, 0.0)
    useless = corrected(rate(40, 100), rate(50, 100), rate(50, 100))
    assert useless.useless
    assert (useless.value, useless.low, useless.high) == (None, 0.0, 1.0)
    assert "does not tell" in str(useless)
    assert corrected(rate(4, 10), rate(0, 0), rate(1, 2)).useless
    assert str(corrected(rate(0, 0), rate(9, 10), rate(9, 10))) == "no replies"


def test_expected_of_each_token() -> None:
    tokens = default_taxonomy().tokens
    assert [expected_of(token) for token in tokens] == [None, *default_taxonomy().category_ids]
    assert expected_of("<|refuse|>") is None
    assert expected_of(None) is None


def test_the_shipped_labels_are_of_shipped_rows() -> None:
    labels = read_labels(LABELS)
    assert len(labels) == 300
    assert Counter(label.forced is None for label in labels) == {True: 150, False: 150}
    rows = {row.id: row for row in read_rows([ROOT / "data/test.jsonl"], default_taxonomy())}
    assert len({rows[label.id].group for label in labels}) == 300
    categories = Counter(rows[label.id].category for label in labels)
    assert set(categories) == {*default_taxonomy().category_ids, None}
    assert all(label.case.category == rows[label.id].category for label in labels)
    forced = Counter(label.forced for label in labels if label.forced)
    assert set(forced.values()) == {25}
    assert set(reasons(labels)) == set(default_taxonomy().tokens[1:])


def test_judges_against_the_shipped_labels() -> None:
    labels = read_labels(LABELS)
    rules = against_labels(RulesJudge(), labels)
    classifier = against_labels(load_classifier(), labels)
    for found in (rules, classifier):
        assert found.n == 292
        assert found.kappa is not None
        assert found.kappa.value > 0.8
        assert (found.recall.value or 0) > 0.9
    assert load_classifier().made["rows"] > 5000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"verdict": "refuse"}, r"l\.jsonl, line 2: unknown verdict 'refuse' .did you mean"),
        ({"id": "a"}, "line 2: id 'a' twice"),
        ({"reason_fits": "yes"}, "line 2: reason_fits must be true, false or null"),
        ({"prompt": 3}, "line 2: prompt must be"),
        ({"text": None}, "line 2: text must be a text"),
    ],
)
def test_broken_labels(change: dict, message: str, tmp_path: Path) -> None:
    first = json.loads(LABELS.read_text("utf-8").splitlines()[0]) | {"id": "a"}
    path = tmp_path / "l.jsonl"
    path.write_text("\n".join(json.dumps(r) for r in (first, first | {"id": "b"} | change)))
    with pytest.raises(InputError, match=message):
        read_labels(path)
    path.write_text("\n")
    with pytest.raises(InputError, match="no labels"):
        read_labels(path)


@pytest.fixture(scope="module")
def some_rows() -> list[Row]:
    rows = read_rows([ROOT / "data" / "test.jsonl"], default_taxonomy())
    return [row for row in rows if row.response][:300]


def test_a_reloaded_classifier_is_the_same(some_rows: list[Row], tmp_path: Path) -> None:
    judge, error = train_classifier(some_rows)
    assert error.n == 300
    assert 0 < (error.value or 0) < 0.35
    again, _ = train_classifier(some_rows)
    assert again.name == judge.name
    save_classifier(tmp_path / "c.safetensors", judge)
    loaded = load_classifier(tmp_path / "c.safetensors")
    cases = [Case(row.prompt_text, str(row.response)) for row in some_rows]
    assert (loaded.probabilities(cases) == judge.probabilities(cases)).all()
    assert loaded.name == judge.name
    assert loaded.made["rows"] == 300
    one_by_one = [loaded.probabilities([case])[0] for case in cases[:10]]
    assert one_by_one == pytest.approx(loaded.probabilities(cases)[:10].tolist())


def test_held_out_error_is_chance_where_the_label_is_random(some_rows: list[Row]) -> None:
    random = np.random.default_rng(0)
    flipped = [
        Row(row.id, row.prompt, row.response, label, row.category, row.group)
        for row, label in zip(some_rows, random.choice(["refuse", "respond"], 300), strict=True)
    ]
    _, error = train_classifier(flipped)
    assert (error.low or 0) < 0.5 < (error.high or 0) + 0.05


def test_the_classifier_does_not_see_the_prompts_words() -> None:
    words = features([Case("alpha beta", "No."), Case("gamma delta", "No.")])
    assert (words[0] != words[1]).nnz == 0


def test_broken_classifiers(some_rows: list[Row], tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    path.write_bytes(b"no such thing")
    with pytest.raises(InputError, match=r"c\.safetensors: not a saved classifier"):
        load_classifier(path)
    with pytest.raises(InputError, match="no such file"):
        load_classifier(tmp_path / "none")
    with pytest.raises(InputError, match="0 groups of refuse rows with a reply; 5 or more"):
        train_classifier([row for row in some_rows if row.label == "respond"])


def test_empty_replies_are_undecided() -> None:
    cases = [Case("Q?", ""), Case("Q?", "<|respond|>"), Case("Q?", "I can't help with that.")]
    for judge in (RulesJudge(), load_classifier()):
        assert judged(judge, cases) == ["undecided", "undecided", "refused"]


def test_the_command_compares_and_judges_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["judge", "--labels", str(LABELS), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [judge["n"] for judge in found["judges"]] == [292, 292]
    (pair,) = found["pairs"]
    assert (pair["first"], pair["judge"][:5]) == (found["judges"][0]["judge"], "class")
    assert pair["kappa"]["value"] > 0.8
    assert main(["judge", "--labels", str(LABELS), "--judge", "rules"]) == 0
    screen = capsys.readouterr().out
    assert "n=292" in screen
    assert "Next: refusal-tokens judge" in screen
    before, after = tmp_path / "before.parquet", tmp_path / "after.parquet"
    token = "<|refuse:safety|>"
    texts = ["I won't help with that."] * 9 + ["Boil it for an hour.", ""]
    write_outcomes(
        before,
        [Outcome(str(i), "refuse", "safety", None, token, token, text, "partly")
         for i, text in enumerate(texts)],
        {},
    )  # fmt: skip
    arguments = ["judge", str(before), "--output", str(after), "--judge", "rules"]
    assert main([*arguments, "--labels", str(LABELS)]) == 0
    screen = capsys.readouterr().out
    assert "90.0%" in screen
    assert "n=10" in screen
    assert "corrected for the judge" in screen
    assert [outcome.verdict for outcome in read_outcomes(after)[0]][-2:] == [
        "answered",
        "undecided",
    ]
    assert main(arguments) == 2
    assert "exists; use --overwrite" in capsys.readouterr().err


def test_a_reply_that_is_both_own_and_forced_is_judged_and_counted_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"id": f"r{i}", "prompt": f"Question {i}?", "label": "refuse", "category": "safety",
         "response": None}
        for i in range(6)
    ]  # fmt: skip
    data, other = tmp_path / "rows.jsonl", tmp_path / "other.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    other.write_text(data.read_text().replace("Question 5", "Else 5"))
    token = "<|refuse:safety|>"
    outcomes = [
        Outcome(row["id"], "refuse", "safety", row["id"], forced, token, "I won't.", "answered",
                preferred=token)
        for forced in (None, token)
        for row in rows
    ]  # fmt: skip
    taxonomy = default_taxonomy()
    metadata = {
        "taxonomy": taxonomy.to_dict(),
        "data_hash": data_hash(read_rows([data], taxonomy)),
        "max_new_tokens": 8,
    }
    before, after = tmp_path / "before.parquet", tmp_path / "after.parquet"
    write_outcomes(before, outcomes, metadata)
    command = ["judge", str(before), "--output", str(after), "--judge", "rules", "--json"]
    assert main([*command, "--data", str(other)]) == 2
    assert "not the rows that the replies were generated on" in capsys.readouterr().err
    assert main([*command, "--data", str(data)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["refused"][token]["n"] == 6
    assert found["refused"]["refuse safety"]["n"] == 6
    assert (found["unchanged"]["count"], found["unchanged"]["n"]) == (0, 6)
    (forced,) = [a for a in found["report"]["adherence"] if a["token"] == token]
    assert (forced["preferred"]["count"], forced["preferred"]["n"]) == (6, 6)
    assert main([*command[:-1], "--overwrite"]) == 0
    assert "Text that obeys a forced token" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to judge"),
        (["--labels", "none.jsonl"], "none.jsonl: no such file"),
        (["o.parquet", "--output", "p.parquet"], "--judge: one is needed"),
        (["o.parquet", "--judge", "rules"], "--output is missing"),
        (["--labels", str(LABELS), "--output", "p.parquet"], "--labels alone writes none"),
        (["--labels", str(LABELS), "--judge", "llm"], "--judge llm needs --endpoint"),
        (["--labels", str(LABELS), "--concurrency", "0"], "--concurrency: found 0"),
        (
            ["--labels", str(LABELS), "--judge", "llm", "--endpoint", "localhost", "--model", "m",
             "--cache", "c"],
            "endpoint 'localhost': allowed: an http",
        ),
        (
            ["--labels", str(LABELS), "--judge", "llm", "--endpoint", "http://127.0.0.1", "--model",
             "m", "--cache", "c", "--api-key-env", "NO_SUCH_KEY_HERE"],
            "the environment has no NO_SUCH_KEY_HERE",
        ),
    ],
)  # fmt: skip
def test_wrong_input(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["judge", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_missing_client_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "httpx", None)
    arguments = ["--endpoint", "http://127.0.0.1:9", "--model", "m", "--cache", "c"]
    assert main(["judge", "--labels", str(LABELS), "--judge", "llm", *arguments]) == 2
    assert "pip install 'httpx>=0.27'" in capsys.readouterr().err
