"""Mixing: counts, shares of the whole, contrast share; what cannot be served is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refusal_tokens.errors import InputError
from refusal_tokens.mixing import draw, read_mix
from refusal_tokens.rows import Row
from refusal_tokens.sources import Source, sources_from
from refusal_tokens.taxonomy import default_taxonomy

TAXONOMY = default_taxonomy()


def plain(name: str) -> Row:
    return Row(name, ({"role": "user", "content": name},), None, "respond", None, name)


def write(path: Path, count: int, label: str = "respond", category: str | None = None) -> str:
    records = (
        {"id": f"{path.stem}{i}", "prompt": f"p{i}", "label": label, "category": category}
        for i in range(count)
    )
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return str(path)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    """200 ordinary rows, 90 refusals, 30 near-misses."""
    return {
        "ordinary": write(tmp_path / "ordinary.jsonl", 200),
        "refusals": write(tmp_path / "refusals.jsonl", 90, "refuse", "safety"),
        "near": write(tmp_path / "near.jsonl", 30, "respond", "safety"),
    }


def taken(sources: list[Source], **options: Any) -> list[int]:
    return [drawn.taken for drawn in read_mix(sources, TAXONOMY, **options).drawn]


def fault(sources: list[Source], **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        read_mix(sources, TAXONOMY, **options)
    return str(caught.value)


def test_without_counts_and_shares_all_rows_come_in_order(files: dict[str, str]) -> None:
    mix = read_mix([Source(files["near"]), Source(files["ordinary"])], TAXONOMY)
    assert [row.id for row in mix.rows] == [
        *(f"near{i}" for i in range(30)),
        *(f"ordinary{i}" for i in range(200)),
    ]
    assert [str(drawn) for drawn in mix.drawn] == [
        "near: 30 of 30 rows",
        "ordinary: 200 of 200 rows",
    ]


def test_a_count_is_exact_and_keeps_the_order(files: dict[str, str]) -> None:
    mix = read_mix([Source(files["ordinary"], count=17), Source(files["near"])], TAXONOMY, seed=3)
    numbers = [int(row.id.removeprefix("ordinary")) for row in mix.rows[:17]]
    assert numbers == sorted(set(numbers))
    assert [drawn.taken for drawn in mix.drawn] == [17, 30]


def test_a_share_is_of_the_whole_mix(files: dict[str, str]) -> None:
    sources = [Source(files["ordinary"], share=0.25), Source(files["refusals"])]
    assert taken(sources) == [30, 90]
    sources = [
        Source(files["ordinary"], share=0.5),
        Source(files["near"], share=0.1),
        Source(files["refusals"], count=40),
    ]
    assert taken(sources) == [50, 10, 40]


def test_shares_alone_make_the_largest_mix(files: dict[str, str]) -> None:
    sources = [Source(files["ordinary"], share=0.75), Source(files["near"], share=0.25)]
    assert taken(sources) == [90, 30]
    assert taken([Source(files["near"], share=1.0)]) == [30]


def test_the_seed_decides_the_draw(files: dict[str, str]) -> None:
    sources = [Source(files["ordinary"], count=50)]
    ids = [[row.id for row in read_mix(sources, TAXONOMY, seed=s).rows] for s in (0, 0, 1)]
    assert ids[0] == ids[1] != ids[2]


@settings(max_examples=30)
@given(st.integers(1, 60), st.integers(0, 2**32), st.randoms(use_true_random=False))
def test_a_larger_draw_holds_the_smaller_whatever_the_order(
    size: int, seed: int, random: Any
) -> None:
    rows = [plain(f"r{i}") for i in range(size)]
    few, many = sorted(random.randint(0, size) for _ in range(2))
    shuffled = random.sample(rows, size)
    small, large = draw(rows, few, seed), draw(shuffled, many, seed)
    assert (len(small), len(large)) == (few, many)
    assert {row.id for row in small} <= {row.id for row in large}
    assert [row for row in shuffled if row in large] == large


@pytest.mark.parametrize(
    ("share", "near", "refusals"), [(0.1, 10, 90), (0.25, 30, 90), (0.5, 30, 30), (0.0, 0, 90)]
)
def test_contrast_share_thins_out_whichever_is_in_excess(
    share: float, near: int, refusals: int, files: dict[str, str]
) -> None:
    sources = [Source(files[name]) for name in ("near", "ordinary", "refusals")]
    assert taken(sources, contrast_share=share) == [near, 200, refusals]


@settings(max_examples=40)
@given(st.integers(30, 300), st.integers(30, 300), st.floats(0.02, 0.95))
def test_contrast_share_holds_to_within_a_row(
    tmp_path_factory: pytest.TempPathFactory, near: int, refusals: int, share: float
) -> None:
    folder = tmp_path_factory.mktemp("contrast")
    sources = [
        Source(write(folder / "near.jsonl", near, "respond", "safety")),
        Source(write(folder / "refusals.jsonl", refusals, "refuse", "safety")),
    ]
    kept_near, kept_refusals = taken(sources, contrast_share=share)
    # One side stays whole, and one row fewer or more of the other is no nearer to the share.
    assert kept_near == near or kept_refusals == refusals
    exact = share / (1 - share) * kept_refusals
    whole = (1 - share) / share * kept_near
    assert abs(kept_near - exact) <= 0.5 + 1e-9 or abs(kept_refusals - whole) <= 0.5 + 1e-9


def test_a_share_holds_after_the_contrast_share(files: dict[str, str]) -> None:
    sources = [
        Source(files["ordinary"], share=0.5),
        Source(files["refusals"]),
        Source(files["near"]),
    ]
    assert taken(sources, contrast_share=0.1) == [100, 90, 10]


def test_a_share_of_rows_with_a_category_and_a_contrast_share_are_refused(
    files: dict[str, str],
) -> None:
    said = fault([Source(files["near"], share=0.5), Source(files["refusals"])], contrast_share=0.1)
    assert "near.jsonl has a share and rows with a category, so both cannot hold" in said


def test_a_contrast_share_without_both_sides_is_refused(files: dict[str, str]) -> None:
    for name, found in (("refusals", "found 90 and 0"), ("near", "found 0 and 30")):
        said = fault([Source(files[name])], contrast_share=0.2)
        assert said.startswith("contrast_share 0.2 needs refuse rows and near-misses")
        assert said.endswith(found)


def test_a_contrast_share_that_leaves_nothing_of_a_side_is_refused(files: dict[str, str]) -> None:
    sources = [Source(files["near"]), Source(files["refusals"])]
    said = "contrast_share 0.001 of 90 refuse rows and 30 near-misses leaves 90 and 0; more rows"
    assert said in fault(sources, contrast_share=0.001)
    assert "leaves 0 and 30" in fault(sources, contrast_share=0.99)


def test_more_rows_than_there_are_is_said_with_both_numbers(files: dict[str, str]) -> None:
    said = fault([Source(files["near"], count=31), Source(files["ordinary"], count=999)])
    assert said.startswith("2 faults in the mix:")
    assert "near.jsonl: count asks for 31 rows; found 30" in said
    assert "ordinary.jsonl: count asks for 999 rows; found 200" in said
    said = fault([Source(files["near"], share=0.5), Source(files["refusals"])])
    assert said.endswith("near.jsonl: share 0.5 of a mix of 180 rows asks for 90 rows; found 30")


def test_a_share_that_gives_no_row_is_said(files: dict[str, str]) -> None:
    said = fault([Source(files["ordinary"], share=0.001), Source(files["near"])])
    assert "share 0.001 of a mix of 30 rows asks for 0 rows; found 200" in said


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ([{"path": "a", "share": 0.7}, {"path": "b", "share": 0.4}], "the shares sum to 1.1"),
        ([{"path": "a", "share": 0.6}, {"path": "b", "share": 0.4}, "c"], "leaves no room"),
        ([{"path": "a", "share": 0.5}], "every entry has a share, and they sum to 0.5; allowed: 1"),
        (
            [{"path": "a", "share": 0.5, "count": 3}, "b"],
            "train, entry 1: found both count 3 and share 0.5; allowed: one of them",
        ),
        ([{"path": "a", "share": 0}, "b"], "share: found 0; allowed: above 0, to 1"),
        ([{"path": "a", "share": True}, "b"], "share: found True"),
        ([{"path": "a", "count": 0}], "count: found 0; allowed: a whole number of rows"),
        ([{"path": "a", "count": 2.5}], "count: found 2.5"),
        ([{"path": "a", "maps": "chat"}], "unknown key 'maps' (did you mean 'map'?)"),
        ([{"map": "chat"}], "path: found None; allowed: a file, or hub:owner/name"),
        ([{"path": "a", "map": "xtest"}], "unknown map 'xtest' (did you mean 'xstest'?)"),
        ([{"path": "a", "map": {"labl": "x"}}], "unknown row field 'labl'"),
        ([{"path": "a", "map": 3}], "map: found 3; allowed: a map's name"),
        ([{"path": "a", "name": ""}], "name: found ''; allowed: text"),
        ([{"path": "a", "skip_faulty": "all"}], "skip_faulty: found 'all'; allowed: true or"),
        (["hub:coconot"], "hub:coconot: allowed: hub:owner/name[/config][:split]"),
        ([3], "train, entry 1: found 3; allowed: a file"),
    ],
)
def test_each_fault_of_an_entry_is_named(entries: Any, said: str) -> None:
    faults: list[str] = []
    sources_from(entries, "train", faults)
    assert len(faults) == 1
    assert said in faults[0]


def test_an_entry_reads_back_as_it_was_written() -> None:
    entries = ["a.jsonl", {"path": "b", "map": {"prompt": "q"}, "share": 0.5, "name": "n"}]
    faults: list[str] = []
    assert [source.to_data() for source in sources_from(entries, "train", faults)] == entries
    assert not faults
