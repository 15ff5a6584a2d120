"""What has no need of a model starts without the libraries that load one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from refusal_tokens.outcomes import Outcome, write_outcomes
from refusal_tokens.taxonomy import default_taxonomy

MODELS = ("torch", "transformers", "datasets")
FIGURES = (*MODELS, "matplotlib", "jinja2", "scipy")
AUDIT = (*MODELS, "sklearn", "datasketch", "scipy")
PROFILE = "data/profiles/smollm2-135m.parquet"
COMMANDS = [
    (["--help"], MODELS),
    (["curves", "--help"], FIGURES),
    (["compare", "--help"], FIGURES),
    (["target", "--help"], FIGURES),
    (["data", "check", "--help"], AUDIT),
    (["data", "check", "data"], MODELS),
    (["curves", PROFILE, "--output", "{}/curves"], MODELS),
    (["target", PROFILE, "--preset", "balanced", "--output", "{}/policy.json"], MODELS),
    (["judge", "{}/outcomes.parquet", "--judge", "rules", "--output", "{}/judged.parquet"], MODELS),
]
MODULES = [
    ("audit, curves, decision, files, policy, profiles, rows, taxonomy", MODELS),
    ("report, comparison, analysis", (*MODELS, "matplotlib", "jinja2", "scipy.stats")),
]


def imported(program: str) -> set[str]:
    """Modules that are there after a program has run to its end."""
    code = f"import sys\n{program}\nprint('\\n'.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines())


@pytest.mark.parametrize(("arguments", "heavy"), COMMANDS)
def test_commands_without_a_model_start_light(
    arguments: list[str], heavy: tuple[str, ...], tmp_path: Path
) -> None:
    outcome = Outcome("1", "refuse", "safety", None, None, "<|refuse:safety|>", "No.", "refused")
    stated = {"taxonomy": default_taxonomy().to_dict(), "max_new_tokens": 8}
    write_outcomes(tmp_path / "outcomes.parquet", [outcome], stated)
    command = [argument.replace("{}", str(tmp_path)) for argument in arguments]
    found = imported(
        "from refusal_tokens.cli import main\n"
        f"try: assert main({command!r}) == 0\n"
        # Of --help: a status of 0, where an unknown command or option has 2.
        "except SystemExit as ended: assert not ended.code"
    )
    assert not found & set(heavy)


@pytest.mark.parametrize(("modules", "heavy"), MODULES)
def test_modules_without_a_model_import_light(modules: str, heavy: tuple[str, ...]) -> None:
    assert not imported(f"from refusal_tokens import {modules}") & set(heavy)
