"""The page and its folder, through the commands a user types."""

from __future__ import annotations

import csv
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from planted import normal_profile, with_logits

from refusal_tokens.cli import main
from refusal_tokens.decision import knobs
from refusal_tokens.outcomes import Outcome, read_outcomes, write_outcomes
from refusal_tokens.policy import Bounds, Policy, save_policy
from refusal_tokens.profiles import Profile, write_profile
from refusal_tokens.report import build_report
from refusal_tokens.taxonomy import Category, Taxonomy

Capture = pytest.CaptureFixture[str]
FIGURES = {"control_curves", "trade_off", "reliability"}
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Profiles of two models on the same prompts, and outcomes of a third."""
    folder = tmp_path_factory.mktemp("files")
    one = normal_profile(80)
    write_profile(folder / "one.parquet", one)
    two = with_logits(one, normal_profile(80, seed=5, shift=1.0).control_logits)
    write_profile(folder / "two.parquet", two)
    columns = (one.columns[name] for name in ("id", "label", "category", "group"))
    outcomes = []
    for number, (own, label, category, group) in enumerate(zip(*columns, strict=True)):
        benign = "undecided" if number % 4 == 0 else "answered"
        verdict = "refused" if label == "refuse" else benign
        own_text = (own, label, category, group, None, None, "text", verdict, "planted")
        outcomes.append(Outcome(*own_text))
    write_outcomes(folder / "text.parquet", outcomes, {})
    return folder


@pytest.fixture(scope="module")
def single(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that ``curves`` writes."""
    output = tmp_path_factory.mktemp("single") / "report"
    name = "<b>A</b> & $x_1$"
    arguments = ["curves", str(files / "one.parquet"), "--output", str(output), "--name", name]
    assert main(arguments) == 0
    return output


@pytest.fixture(scope="module")
def several(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that ``compare`` writes."""
    output = tmp_path_factory.mktemp("several") / "report"
    inputs = [str(files / f"{name}.parquet") for name in ("one", "two", "text")]
    assert main(["compare", *inputs, "--output", str(output)]) == 0
    return output


class Page(HTMLParser):
    """Tags, attributes and ids of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]


def test_the_page_needs_nothing_else(single: Path, several: Path) -> None:
    for folder in (single, several):
        text = (folder / "index.html").read_text("utf-8")
        page = Page()
        page.feed(text)
        assert not {"script", "link", "iframe", "img", "object", "embed"} & set(page.tags)
        fetched = [v for name, v in page.attributes if name in ("src", "href", "xlink:href")]
        assert all(value.startswith("#") for value in fetched)
        assert not re.search(r"url\((?!#)|@import|https?://", text)
        ids = [value for name, value in page.attributes if name == "id"]
        assert len(ids) == len(set(ids))
        used = set(re.findall(r"url\(#([^)]+)\)", text)) | {value[1:] for value in fetched}
        assert used <= set(ids)


def test_the_page_suits_light_dark_and_phones(single: Path) -> None:
    text = (single / "index.html").read_text("utf-8")
    assert "prefers-color-scheme: dark" in text
    assert 'name="viewport" content="width=device-width' in text
    drawing = text[text.index("<svg") : text.rindex("</svg>")]
    assert "var(--series0)" in drawing
    assert not re.search(r"#[0-9a-f]{6}\b", drawing)


def test_names_are_text_and_not_markup(single: Path) -> None:
    text = (single / "index.html").read_text("utf-8")
    assert "<b>A</b>" not in text
    assert "&lt;b&gt;A&lt;/b&gt; &amp; $x_1$" in text


def test_every_figure_is_there_as_png_and_svg(single: Path, several: Path) -> None:
    for folder, names in ((single, FIGURES | {"leakage", "confusion"}), (several, FIGURES)):
        assert {path.stem for path in folder.glob("*.png")} == names
        assert {path.stem for path in folder.glob("*.svg")} == names
        for name in names:
            assert (folder / f"{name}.png").read_bytes().startswith(PNG)
            ElementTree.fromstring((folder / f"{name}.svg").read_text("utf-8"))


def test_the_numbers_are_those_of_the_curves(single: Path, files: Path) -> None:
    numbers = json.loads((single / "numbers.json").read_text("utf-8"))
    summary = numbers["analyses"][0]["summary"]
    with (single / "control_curves.csv").open(encoding="utf-8") as stream:
        rows = [row for row in csv.DictReader(stream) if row["knob"] == "a"]
    at_zero = [row for row in rows if float(row["bias_nats"]) == 0]
    assert len(at_zero) == 1
    assert float(at_zero[0]["refusal"]) == pytest.approx(
        summary["categories"][0]["refused"]["value"], abs=1e-5
    )
    assert float(at_zero[0]["n_refuse"]) == summary["categories"][0]["refused"]["n"]
    near = summary["categories"][0]["over_refused"]
    for end, key in (("", "value"), ("_low", "low"), ("_high", "high")):
        found = float(at_zero[0][f"near_miss_over_refusal{end}"])
        assert found == pytest.approx(near[key], abs=1e-5)
    text = (single / "index.html").read_text("utf-8")
    assert f"{100 * summary['refused']['value']:.1f}%" in text
    assert f"n={summary['refused']['n']}" in text


def test_paired_tests_are_on_the_page_and_in_the_files(several: Path) -> None:
    with (several / "paired_tests.csv").open(encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    # Five for the two profiles, two for each of them with the outcomes.
    assert len(rows) == 9
    assert all(float(row["p_holm"]) >= float(row["p"]) for row in rows)
    text = (several / "index.html").read_text("utf-8")
    for shown in ("Which differences are real?", "McNemar, exact", "text, by text", "undecided"):
        assert shown in text
    numbers = json.loads((several / "numbers.json").read_text("utf-8"))
    assert numbers["replies"]["text"]["undecided"] == 20


def test_outcomes_alone_are_compared(files: Path, tmp_path: Path, capsys: Capture) -> None:
    text = str(files / "text.parquet")
    arguments = ["compare", text, text, "--names", "x,y", "--output", str(tmp_path / "r")]
    assert main(arguments) == 0
    assert "p = 1" in capsys.readouterr().out
    assert not list((tmp_path / "r").glob("*.png"))


def test_the_same_input_gives_the_same_folder(files: Path, single: Path, tmp_path: Path) -> None:
    arguments = ["curves", str(files / "one.parquet"), "--output", str(tmp_path / "r")]
    assert main([*arguments, "--name", "<b>A</b> & $x_1$"]) == 0
    for path in single.iterdir():
        assert path.read_bytes() == (tmp_path / "r" / path.name).read_bytes()


@pytest.mark.parametrize("extra", [["--rule", "threshold"], ["--decision", "sampled", "--json"]])
def test_rules_and_sampling(extra: list[str], files: Path, tmp_path: Path, capsys: Capture) -> None:
    output = tmp_path / "r"
    assert main(["curves", str(files / "one.parquet"), "--output", str(output), *extra]) == 0
    out = capsys.readouterr().out
    if "--json" in extra:
        assert json.loads(out)["summary"]["refused"]["n"] == 40
        assert "sampled at temperature 1" in (output / "index.html").read_text("utf-8")
    else:
        assert "rule threshold, greedy, every bias at 0" in out
        assert "Next: refusal-tokens target" in out


def test_a_policy_is_where_the_curves_start(files: Path, tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "policy.json"
    save_policy(path, Policy(bias={"a": 1.5}, bounds={"b": Bounds(min_bias=-1.0)}))
    arguments = ["curves", str(files / "one.parquet"), "--policy", str(path)]
    assert main([*arguments, "--output", str(tmp_path / "r")]) == 0
    assert "bias a +1.50 nats with floors" in capsys.readouterr().out
    assert main([*arguments, "--output", str(tmp_path / "s"), "--rule", "bias"]) == 2
    assert "says route; leave one of them out" in capsys.readouterr().err


def refused(arguments: list[str], capsys: Capture) -> str:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    return error


def written(profile: Profile, path: Path) -> str:
    write_profile(path, profile)
    return str(path)


def test_a_category_without_rows(tmp_path: Path, capsys: Capture) -> None:
    profile = normal_profile(80)
    only_a = profile.select(~(profile.is_label("refuse") & profile.is_category("b")))
    path = written(only_a, tmp_path / "p.parquet")
    arguments = ["curves", path, "--output", str(tmp_path / "r")]
    error = refused(arguments, capsys)
    assert "no prompts labelled refuse/b; leave them out: --categories a" in error
    assert "unknown category 'A'" in refused([*arguments, "--categories", "A"], capsys)
    assert main([*arguments, "--categories", "a"]) == 0


def test_wrong_input_to_curves(files: Path, tmp_path: Path, capsys: Capture) -> None:
    output = ["--output", str(tmp_path / "r")]
    profile = normal_profile(20)
    benign = written(profile.select(profile.is_label("respond")), tmp_path / "benign.parquet")
    assert "no prompts labelled refuse/a" in refused(["curves", benign, *output], capsys)
    asked = written(profile.select(profile.is_label("refuse")), tmp_path / "asked.parquet")
    assert "needs refuse and respond rows" in refused(["curves", asked, *output], capsys)
    nan = written(with_logits(profile, np.full((20, 3), np.nan)), tmp_path / "nan.parquet")
    assert "row 1: control_logits is not finite" in refused(["curves", nan, *output], capsys)
    assert not (tmp_path / "r").exists()


def test_outcomes_of_other_rows_with_the_same_ids_are_refused(
    files: Path, tmp_path: Path, capsys: Capture
) -> None:
    replies, _ = read_outcomes(files / "text.parquet")
    paths = []
    for number, metadata in enumerate(({"data_hash": "x"}, {"data_hash": "y"}, {})):
        paths.append(str(tmp_path / f"{number}.parquet"))
        write_outcomes(paths[-1], replies, metadata)
    said = refused(["compare", *paths[:2], "--output", str(tmp_path / "r")], capsys)
    assert "the same ids, and other rows (data hashes x and y)" in said
    # One that states no hash is taken at its word, and profiles carry their prompts.
    assert main(["compare", *paths[1:], "--output", str(tmp_path / "r")]) == 0


def test_wrong_input_to_compare(files: Path, tmp_path: Path, capsys: Capture) -> None:
    output = ["--output", str(tmp_path / "r")]
    one, two = str(files / "one.parquet"), str(files / "two.parquet")
    assert "needs two files" in refused(["compare", one, *output], capsys)
    other = written(normal_profile(60), tmp_path / "other.parquet")
    assert "20 only in the first" in refused(["compare", one, other, *output], capsys)
    cut = tmp_path / "cut.parquet"
    cut.write_bytes((files / "one.parquet").read_bytes()[:500])
    assert "not a whole Parquet file" in refused(["compare", one, str(cut), *output], capsys)
    names = [*output, "--names"]
    assert "3 names for 2 files" in refused(["compare", one, two, *names, "a,b,c"], capsys)
    assert "x twice" in refused(["compare", one, two, *names, "x,x"], capsys)
    assert "no such file" in refused(["compare", one, str(tmp_path / "gone"), *output], capsys)


def test_only_a_report_is_overwritten(files: Path, tmp_path: Path, capsys: Capture) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "letter.txt").write_text("keep me")
    arguments = ["curves", str(files / "one.parquet"), "--output", str(folder)]
    assert "exists; use --overwrite" in refused(arguments, capsys)
    assert "other files than a report" in refused([*arguments, "--overwrite"], capsys)
    assert (folder / "letter.txt").read_text() == "keep me"


def test_few_prompts_and_one_category_are_enough() -> None:
    taxonomy = Taxonomy((Category("a", "A."),), "Fine.")
    report = build_report({"m": normal_profile(4, taxonomy=taxonomy)}, knobs("route", [0.0]))
    assert report.analyses[0].leakage is None
    assert report.tests == ()


def test_training_ends_with_the_page_of_its_run(tiny_run: Path) -> None:
    assert "Refusal rates of tiny" in (tiny_run / "report" / "index.html").read_text("utf-8")
