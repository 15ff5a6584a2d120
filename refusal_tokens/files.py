"""Reading text with clear messages, and writing files so that none is ever half-written."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
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
    """PyYAML keeps the last of two equal keys in silence; here that is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                mark = key_node.start_mark
                raise InputError(f"{mark.name}, line {mark.line + 1}: key {key!r} twice")
            seen.add(key)
        return super().construct_mapping(node, deep)


def parse_yaml(text: str, where: str) -> Any:
    """Parse YAML, refusing repeated keys.

    Raises:
        InputError: with the file and line of the fault.
    """
    loader = _UniqueKeyLoader(text)
    loader.name = where
    try:
        return loader.get_single_data()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error)
        raise InputError(f"{where}{line}: not YAML ({problem})") from None
    finally:
        loader.dispose()


def read_yaml(path: str | Path) -> Any:
    """Read a YAML file; see ``parse_yaml``."""
    return parse_yaml(read_text(path), str(path))


def read_json(path: str | Path) -> Any:
    """Read a JSON file.

    Raises:
        InputError: if it is missing or not JSON (naming the line).
    """
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise InputError(f"{path}, line {error.lineno}: not JSON ({error.msg})") from None


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

    An existing folder at ``path`` is replaced only then.

    Raises:
        InputError: as ``atomic_file``.
    """
    target = Path(path)
    with clear_write_errors(target):
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
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR, errno.EEXIST):
            raise InputError(f"{target}: cannot be written ({error.strerror})") from None
        raise


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
