"""Hub sets, as local folders of the same layout, and what is said when one cannot be had."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub.errors import GatedRepoError
from stand_ins import COCONOT_CONTRAST, COCONOT_ORIGINAL, OR_BENCH, write_hub_set

from refusal_tokens.errors import InputError
from refusal_tokens.readers import hub_parts, open_table
from refusal_tokens.rows import check_hub_columns, read_rows
from refusal_tokens.sources import Source
from refusal_tokens.taxonomy import default_taxonomy

TAXONOMY = default_taxonomy()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder in which ``owner/name`` folders stand for Hub sets."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    write_hub_set(
        tmp_path / "allenai" / "coconot",
        {
            "original": {"train": COCONOT_ORIGINAL, "test": COCONOT_ORIGINAL[:1]},
            "contrast": {"test": COCONOT_CONTRAST},
        },
    )
    write_hub_set(tmp_path / "some" / "set", {"default": {"train": OR_BENCH}})
    return tmp_path


def fault(path: str, row_map: Any = None) -> str:
    with pytest.raises(InputError) as caught:
        read_rows([path], TAXONOMY, row_map=row_map)
    return str(caught.value)


def test_a_hub_path_names_set_configuration_and_split() -> None:
    assert hub_parts("hub:a/b") == ("a/b", None, "train")
    assert hub_parts("hub:a/b:test") == ("a/b", None, "test")
    assert hub_parts("hub:a/b/c") == ("a/b", "c", "train")
    assert hub_parts("hub:a/b/c:train[:10%]") == ("a/b", "c", "train[:10%]")
    for path in ("hub:", "hub:a", "hub:a/b/c/d", "hub:a//b", "hub:/a:test"):
        with pytest.raises(InputError, match=r"allowed: hub:owner/name\[/config\]\[:split\]"):
            hub_parts(path)


def test_a_hub_set_is_read_by_configuration_and_split(hub: Path) -> None:
    counts = {
        "hub:allenai/coconot/original": ("coconot_original", 5),
        "hub:allenai/coconot/original:test": ("coconot_original", 1),
        "hub:allenai/coconot/original:train[:2]": ("coconot_original", 2),
        "hub:allenai/coconot/contrast:test": ("coconot_contrast", 2),
        "hub:some/set": ("or_bench", 2),
    }
    for path, (row_map, count) in counts.items():
        assert len(read_rows([path], TAXONOMY, row_map=row_map)) == count
    table = open_table("hub:some/set")
    assert table.columns == ("prompt", "category")
    assert next(iter(table.records)) == ("hub:some/set, row 1", OR_BENCH[0])


def test_columns_of_a_hub_set_are_checked_before_its_rows(hub: Path) -> None:
    said = fault("hub:some/set", "coconot_original")
    assert said.count("\n") == 0
    assert said.startswith("hub:some/set: map coconot_original: no column 'id' to read 'id' from")
    assert "no column 'subcategory' to read 'subcategory' from (did you mean 'category'?)" in said
    assert "expected: id, prompt, response, category, subcategory" in said
    assert said.endswith("found: prompt, category")


def test_columns_that_a_hub_set_states_are_checked_before_any_download(
    hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = hub / "some" / "set" / "README.md"
    features = ["dataset_info:", "- config_name: default", "  features:"]
    features += [line for c in OR_BENCH[0] for line in (f"  - name: {c}", "    dtype: string")]
    card.write_text(card.read_text().replace("---\n", "\n".join(["---", *features, ""]), 1))
    downloaded = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **_: downloaded.append(a))
    fitting = Source("hub:some/set", "or_bench")
    check_hub_columns([fitting, Source("hub:allenai/coconot/original", "coconot_original")])
    with pytest.raises(InputError, match="no column 'id' to read 'id' from"):
        check_hub_columns([fitting, Source("hub:some/set", "coconot_original")])
    with pytest.raises(InputError, match=r"orignal: cannot be loaded"):
        check_hub_columns([fitting, Source("hub:allenai/coconot/orignal", "coconot_original")])
    assert not downloaded


def test_a_hub_set_of_another_shape_without_map_is_one_fault(hub: Path) -> None:
    said = fault("hub:allenai/coconot/original")
    assert "columns: expected id, prompt, label, and none but id, prompt, response" in said
    assert said.endswith("there are maps for it: coconot_original, coconot_contrast, coconot_pref")
    assert fault("hub:some/set").endswith("found: prompt, category; it needs a map")


def test_unknown_configurations_and_splits_are_named(hub: Path) -> None:
    said = fault("hub:allenai/coconot/orignal", "coconot_original")
    assert "hub:allenai/coconot/orignal: cannot be loaded (" in said
    assert said.endswith("(did you mean 'original'?)")
    said = fault("hub:allenai/coconot/original:tran", "coconot_original")
    assert said.endswith("(did you mean 'train'?)")
    said = fault("hub:allenai/coconot", "coconot_original")
    assert "original" in said
    assert "contrast" in said


def test_an_empty_split_is_named(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = "hub:some/set:train[:0]"
    assert "corresponds to no data" in fault(path, "or_bench")
    empty = datasets.Dataset.from_dict({"prompt": [], "category": []})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: empty)
    assert fault("hub:some/set", "or_bench") == "hub:some/set: no rows in it"


def test_a_set_whose_files_do_not_agree_says_what_is_wrong(hub: Path) -> None:
    (hub / "some" / "set" / "default-train.jsonl").write_text('{"prompt": "x"}\n{"prompt": \n')
    said = fault("hub:some/set", "or_bench")
    assert said.startswith("hub:some/set: cannot be loaded (")
    assert "JSON" in said


def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[Exception, Exception | None], None]:
    def fail(error: Exception, cause: Exception | None = None) -> None:
        def load(*args: Any, **kwargs: Any) -> None:
            raise error from cause

        monkeypatch.setattr(datasets, "load_dataset", load)

    return fail


@pytest.mark.parametrize("status", [401, 403])
def test_a_gated_set_says_how_to_get_in(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    response: Any = SimpleNamespace(headers={}, request=None, status_code=status)
    gated = GatedRepoError("gated", response=response)
    failing(monkeypatch)(DatasetNotFoundError("Dataset 'x' is a gated dataset on the Hub."), gated)
    said = fault("hub:allenai/wildguardmix/wildguardtest:test", "wildguardmix")
    assert said == (
        "hub:allenai/wildguardmix/wildguardtest:test: this set is gated; accept its terms at "
        "https://huggingface.co/datasets/allenai/wildguardmix, then log in with `hf auth login`, "
        "or set HF_TOKEN"
    )


def test_a_hub_out_of_reach_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch)(ConnectionError("Couldn't reach 'a/b' on the Hub"), None)
    assert "hub:a/b: the Hub cannot be reached (Couldn't reach 'a/b'" in fault("hub:a/b", "chat")


def test_a_set_that_does_not_exist_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch)(DatasetNotFoundError("Dataset 'a/b' doesn't exist on the Hub"), None)
    said = fault("hub:a/b", "chat")
    assert said == "hub:a/b: cannot be loaded (Dataset 'a/b' doesn't exist on the Hub)"
