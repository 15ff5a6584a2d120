"""Reading text with clear messages, and writing files so that none is ever half-written."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError

from refusal_tokens.errors import InputError


def read_text(path: str | Path) -> str:
    """Read a UTF-8 text file.

    Raises:
        InputError: if it is missing, a folder, unreadable or not UTF-8 (naming the line).
    """
    data = read_bytes(path)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}, line {line}: not UTF-8 text ({error.reason})") from None


def read_bytes(path: str | Path) -> bytes:
    """Read a whole file.

    Raises:
        InputError: if it is missing, a folder or unreadable.
    """
    try:
        return Path(path).read_bytes()
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise InputError(f"{path}: is a folder; a file is needed") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None


class _UniqueKeyLoader(yaml.SafeLoader):
    """PyYAML keeps the last of two equal keys in silence; here that is an error.

    Keys are compared before merge keys (``<<``) add those of other mappings.
    """

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        assert node is not None
        seen = set()
        for key, _ in node.value:
            # Lists and mappings cannot be keys; PyYAML says so later.
            if isinstance(key, yaml.ScalarNode) and (key.tag, key.value) in seen:
                mark = key.start_mark
                raise InputError(f"{mark.name}, line {mark.line + 1}: key {key.value!r} twice")
            seen.add((key.tag, str(key.value)))
        return node


def parse_yaml(text: str, where: str) -> Any:
    """Parse YAML, refusing repeated keys.

    Raises:
        InputError: with the file and, where known, the line of the fault.
    """
    try:
        loader = _UniqueKeyLoader(text)
        loader.name = where
        return loader.get_single_data()
    # ValueError and TypeError: PyYAML lets those of Python's own types through, as of a date.
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).partition("\n")[0]
        raise InputError(f"{where}{line}: not YAML ({problem})") from None


def read_yaml(path: str | Path) -> Any:
    """Read a YAML file; see ``parse_yaml``."""
    return parse_yaml(read_text(path), str(path))


def unique_keys(where: str) -> Callable[[list[tuple[str, Any]]], dict[str, Any]]:
    """Return an ``object_pairs_hook`` for ``json.loads``, which keeps the last of two equal keys.

    Raises:
        InputError: (the hook) naming ``where`` and the key that comes twice.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise InputError(f"{where}: key {key!r} twice")
            found[key] = value
        return found

    return unique


def read_json(path: str | Path) -> Any:
    """Read a JSON file.

    Raises:
        InputError: if it is missing, not JSON (naming the line), repeats a key, or is beyond what
            Python reads.
    """
    try:
        return json.loads(read_text(path), object_pairs_hook=unique_keys(str(path)))
    except json.JSONDecodeError as error:
        raise InputError(f"{path}, line {error.lineno}: not JSON ({error.msg})") from None
    except (ValueError, RecursionError) as error:
        # Numbers of thousands of digits, and text nested as deep.
        raise InputError(f"{path}: not JSON that can be read ({error})") from None


def file_sha256(path: str | Path) -> str:
    """Return the SHA-256 of a file's bytes."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Give a temporary path beside ``path`` and move it into place once the block is done.

    Raises:
        InputError: if the disk is full or the place cannot be written; nothing is left behind.
    """
    target = Path(path)
    with clear_write_errors(target):
        if target.exists() and not (target.is_file() or target.is_dir()):
            raise InputError(f"{target}: is no ordinary file, so it is not replaced")
        # Of a link, the file it points to.
        target = target.resolve() if target.is_symlink() else target
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            # mkstemp makes private files; a result should be as readable as any other file.
            temporary.chmod(0o666 & ~_umask())
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Give a temporary folder beside ``path`` and move it into place once the block is done.

    An existing folder at ``path`` is replaced only then; of a link, the folder it points to.

    Raises:
        InputError: as ``atomic_file``.
    """
    with clear_write_errors(Path(path)):
        target = Path(path).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
        try:
            yield temporary
            temporary.chmod(0o777 & ~_umask())
            if target.exists():
                shutil.rmtree(target)
            os.replace(temporary, target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


_UNWRITABLE = (
    errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR, errno.EEXIST, errno.EISDIR,
    errno.ENAMETOOLONG,
)  # fmt: skip


@contextmanager
def clear_write_errors(target: Path) -> Iterator[None]:
    """Turn a full disk or a place that cannot be written into a clear message.

    Raises:
        InputError: naming ``target``; other errors pass through.
    """
    try:
        yield
    except SafetensorError as error:
        # safetensors hides the system's error in its text.
        if "No space left" in str(error):
            raise InputError(f"{target}: no space left on the disk; nothing was written") from None
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise InputError(f"{target}: no space left on the disk; nothing was written") from None
        if error.errno in _UNWRITABLE:
            raise InputError(f"{target}: cannot be written ({error.strerror})") from None
        raise


def check_new_file(path: Path, overwrite: bool, option: str = "--output") -> None:
    """Check, before the work for it is done, that a file may be written.

    Raises:
        InputError: if it is a folder or cannot be, or exists and may not be replaced.
    """
    with clear_write_errors(path):
        try:
            # Unlike exists(), it tells of a name that is too long, or below a file.
            mode = path.stat().st_mode
        except FileNotFoundError:
            return
        if stat.S_ISDIR(mode):
            raise InputError(f"{path}: is a folder; a file is needed")
        if not overwrite:
            raise InputError(f"{path}: exists; use --overwrite or another {option}")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_text(path: str | Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, data: Any) -> None:
    """Write a JSON file atomically, indented."""
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
