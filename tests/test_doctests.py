"""The examples in docstrings print what they say."""

from __future__ import annotations

import doctest
import importlib
import sys
from pathlib import Path

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

# Examples that need a run or a server: tests of their own have them.
NEEDS_MORE = ("refusal_tokens.steering", "refusal_tokens.serving.client")


def names(folder: Path, root: Path) -> list[str]:
    """The modules with examples."""
    return [
        ".".join(path.relative_to(root).with_suffix("").parts)
        for path in sorted(folder.rglob("*.py"))
        if ">>> " in path.read_text("utf-8")
    ]


MODULES = [
    name
    for name in names(ROOT / "refusal_tokens", ROOT)
    + names(ROOT / "benchmarks", ROOT / "benchmarks")
    if name not in NEEDS_MORE
]


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_hold(name: str) -> None:
    found = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert found.failed == 0
    assert found.attempted > 0
