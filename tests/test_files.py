"""Reading with clear messages; writing all or nothing."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from refusal_tokens.errors import InputError
from refusal_tokens.files import (
    atomic_file,
    atomic_folder,
    file_sha256,
    parse_yaml,
    read_bytes,
    read_json,
    read_text,
    read_yaml,
    write_json,
    write_text,
)

Writer = Callable[[Path], AbstractContextManager[Path]]
WRITERS = pytest.mark.parametrize("writer", [atomic_file, atomic_folder])


@pytest.fixture
def umask() -> Iterator[int]:
    before = os.umask(0o027)
    yield 0o027
    os.umask(before)


def put(place: Path, text: str) -> None:
    """Write into a temporary file, or into a file within a temporary folder."""
    (place / "inner.txt" if place.is_dir() else place).write_text(text)


def fail_halfway(writer: Writer, target: Path, error: BaseException) -> None:
    """Write a part of the result, then raise."""
    with writer(target) as place:
        put(place, "half")
        raise error


def contents(folder: Path) -> dict[str, str]:
    """Every file below a folder, hidden ones too."""
    found = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_text() for path in found}


def test_text_is_read_without_its_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfgr\xc3\xbcn\r\n")
    assert read_text(path) == "grün\r\n"


def test_a_byte_that_is_not_utf8_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\ntwo\nthr\xe9e\n")
    with pytest.raises(InputError, match=r"a\.txt, line 3: not UTF-8 text"):
        read_text(path)


def test_missing_files_and_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"gone\.txt: no such file"):
        read_bytes(tmp_path / "gone.txt")
    with pytest.raises(InputError, match="is a folder; a file is needed"):
        read_bytes(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match=r"cannot be read \(Not a directory\)"):
        read_bytes(tmp_path / "file" / "below")


def test_broken_json_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"a": 1,\n "b": }\n')
    with pytest.raises(InputError, match=r"a\.json, line 2: not JSON"):
        read_json(path)


def test_broken_yaml_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("a: 1\nb: [1, 2\nc: 3\n")
    with pytest.raises(InputError, match=r"a\.yaml, line 3: not YAML"):
        read_yaml(path)


def test_a_repeated_yaml_key_is_refused_at_any_depth() -> None:
    with pytest.raises(InputError, match=r"r\.yaml, line 4: key 'x' twice"):
        parse_yaml("a:\n  - x: 1\n    y: 2\n    x: 3\n", "r.yaml")
    assert parse_yaml("a: {x: 1}\nb: {x: 2}\n", "r.yaml") == {"a": {"x": 1}, "b": {"x": 2}}


def test_yaml_builds_no_python_objects() -> None:
    with pytest.raises(InputError, match="not YAML"):
        parse_yaml("a: !!python/object/apply:os.getcwd []\n", "r.yaml")


@pytest.mark.parametrize("text", ["a: \x07\n", "? [1, 2]\n: b\n", "a: 2024-13-45\n"])
def test_odd_yaml_gives_a_message_and_no_traceback(text: str) -> None:
    with pytest.raises(InputError, match=r"^r\.yaml"):
        parse_yaml(text, "r.yaml")


def test_the_hash_of_a_file_is_that_of_its_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert file_sha256(tmp_path / "a") == hashlib.sha256(b"abc").hexdigest()


@WRITERS
def test_a_finished_block_leaves_its_result_and_nothing_else(
    writer: Writer, tmp_path: Path
) -> None:
    target = tmp_path / "deep" / "er" / "out"
    with writer(target) as place:
        put(place, "new")
        assert not target.exists()
    assert list(contents(tmp_path).values()) == ["new"]
    assert os.listdir(target.parent) == ["out"]


@WRITERS
@pytest.mark.parametrize("error", [RuntimeError("stopped"), KeyboardInterrupt()])
def test_a_block_that_raises_leaves_what_was_there(
    writer: Writer, error: BaseException, tmp_path: Path
) -> None:
    target = tmp_path / "out"
    with writer(target) as place:
        put(place, "old")
    before = contents(tmp_path)
    with pytest.raises(type(error)):
        fail_halfway(writer, target, error)
    assert contents(tmp_path) == before
    assert os.listdir(tmp_path) == ["out"]


@WRITERS
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_gives_a_clear_message_and_leaves_nothing(
    writer: Writer, number: int, tmp_path: Path
) -> None:
    error = OSError(number, os.strerror(number))
    with pytest.raises(InputError, match="out: no space left on the disk; nothing was written"):
        fail_halfway(writer, tmp_path / "out", error)
    assert os.listdir(tmp_path) == []


@WRITERS
def test_a_place_below_a_file_cannot_be_written(writer: Writer, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with (
        pytest.raises(InputError, match="cannot be written"),
        writer(tmp_path / "file" / "out") as place,
    ):
        put(place, "new")
    assert contents(tmp_path) == {"file": "x"}


@WRITERS
def test_another_error_of_the_system_is_not_dressed_up(writer: Writer, tmp_path: Path) -> None:
    error = OSError(errno.EIO, os.strerror(errno.EIO))
    with pytest.raises(OSError, match="Input/output"):
        fail_halfway(writer, tmp_path / "out", error)
    assert os.listdir(tmp_path) == []


def test_a_replaced_folder_keeps_none_of_the_old_files(tmp_path: Path) -> None:
    for name in ("old", "new"):
        with atomic_folder(tmp_path / "out") as place:
            (place / name).write_text(name)
    assert contents(tmp_path) == {"out/new": "new"}


def test_results_are_as_readable_as_other_files(umask: int, tmp_path: Path) -> None:
    write_text(tmp_path / "file", "x")
    with atomic_folder(tmp_path / "folder"):
        pass
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o666 & ~umask
    assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o777 & ~umask
    assert os.umask(umask) == umask


def test_written_json_is_read_back_and_holds_no_nan(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"name": "grün", "value": [1, None, 0.5]})
    assert read_json(path) == {"name": "grün", "value": [1, None, 0.5]}
    assert "grün" in path.read_text("utf-8")
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"value": float("nan")})
    assert read_json(path)["name"] == "grün"


def test_a_file_that_would_replace_a_folder_is_refused_clearly(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be written"):
        write_text(tmp_path, "x")


def test_a_folder_may_be_written_over_a_link_to_a_folder(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with atomic_folder(tmp_path / "link") as place:
        put(place, "new")
    assert (tmp_path / "link" / "inner.txt").read_text() == "new"


def test_yaml_merge_keys_work_and_may_be_overridden() -> None:
    text = "a: &a {x: 1, y: 2}\nb: &b\n  <<: *a\n  x: 3\nc: {<<: *b, y: 4}\n"
    found = parse_yaml(text, "r.yaml")
    assert found["b"] == {"x": 3, "y": 2}
    assert found["c"] == {"x": 3, "y": 4}


def test_a_json_key_twice_is_refused_at_any_depth(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"x": [{"y": 1, "y": 1}]}')
    with pytest.raises(InputError, match=r"a\.json: key 'y' twice"):
        read_json(tmp_path / "a.json")


def test_a_name_that_is_too_long_is_refused_clearly(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be written"):
        write_text(tmp_path / ("x" * 300), "x")


def test_what_is_no_ordinary_file_is_not_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(InputError, match="is no ordinary file"):
        write_text(pipe, "text")
    assert pipe.is_fifo()
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]


def test_of_a_link_the_file_it_points_to_is_replaced(tmp_path: Path) -> None:
    target, link = tmp_path / "target.txt", tmp_path / "link.txt"
    target.write_text("old")
    link.symlink_to(target)
    write_text(link, "new")
    assert link.is_symlink()
    assert target.read_text() == "new"


def test_yaml_nested_beyond_reading_is_named() -> None:
    with pytest.raises(InputError, match="deep.yaml: not YAML"):
        parse_yaml("[" * 5000, "deep.yaml")
