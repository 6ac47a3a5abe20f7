"""What newcomers and CI type: the recipes, the hooks and the documents say the same and work; CI tries the same examples every time."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent


@pytest.mark.parametrize("recipe", ["one TESTS", "quick", "check", "test", "speedrun"])
def test_contributing_shows_the_line_of_every_recipe(recipe: str) -> None:
    dry = subprocess.run([BIN / "just", "--dry-run", *recipe.split()], cwd=ROOT, capture_output=True, text=True, check=True)
    (line,) = dry.stderr.strip().splitlines()
    (row,) = [row for row in (ROOT / "CONTRIBUTING.md").read_text().splitlines() if f"`just {recipe}`" in row and row.startswith("|")]
    assert f"`{line.strip()}`" in row


def test_every_check_comes_before_the_tests_in_the_full_run() -> None:
    dry = subprocess.run([BIN / "just", "--dry-run", "check"], cwd=ROOT, capture_output=True, text=True, check=True)
    checks = dry.stderr.strip().split(" && ")[1:]
    lines = (ROOT / "test.sh").read_text().splitlines()
    assert len(checks) == 4
    assert [lines.index(check) for check in checks] == sorted(lines.index(check) for check in checks)
    assert max(lines.index(check) for check in checks) < min(number for number, line in enumerate(lines) if "-m pytest" in line)


def test_commit_hooks_are_local_and_use_the_locked_programs() -> None:
    config = ROOT / ".pre-commit-config.yaml"
    subprocess.run([BIN / "pre-commit", "validate-config", config], check=True)
    (repo,) = yaml.safe_load(config.read_text())["repos"]
    assert repo["repo"] == "local"
    for hook in repo["hooks"]:
        assert hook["language"] == "system"
        assert (BIN / Path(hook["entry"].split()[0]).name).is_file()


@pytest.mark.parametrize(
    ("environment", "same_every_time"),
    [({"HYPOTHESIS_PROFILE": "ci"}, True), ({"CI": "true"}, True), ({"HYPOTHESIS_PROFILE": "local"}, False), ({}, False)],
)
def test_ci_tries_the_same_examples_every_time(environment: dict[str, str], same_every_time: bool) -> None:
    program = "import tests.conftest; from hypothesis import settings; print(settings().derandomize, settings().print_blob)"
    rest = {name: value for name, value in os.environ.items() if name not in ("CI", "HYPOTHESIS_PROFILE")}
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=rest | environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(same_every_time), "True"]


def test_types_are_checked_with_nothing_but_the_locked_program(tmp_path: Path) -> None:
    """Nothing is fetched, nothing has to be installed beside it."""
    (tmp_path / "wrong.py").write_text("number: int = 'text'\n")
    nothing = {"PATH": "/nonexistent", "HOME": str(tmp_path), "https_proxy": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9"}
    done = subprocess.run([BIN / "ty", "check", "wrong.py"], cwd=tmp_path, env=nothing, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "invalid-assignment" in done.stdout
