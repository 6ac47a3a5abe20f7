"""The processes that run the tests, forked off one that has imported them."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow(reason="starts pytest, which starts others")
ROOT = Path(__file__).parents[1]
GOOD = """
import os, subprocess, sys
IMPORTED_BY = os.getpid()

def test_it_was_imported_by_another_process():
    assert os.getpid() != IMPORTED_BY

def test_children_are_waited_for():
    assert subprocess.run([sys.executable, "-c", "raise SystemExit(3)"]).returncode == 3
"""
CRASHES = """
import os, signal

def test_crashes():
    os.kill(os.getpid(), signal.SIGKILL)
"""


def forked(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.forked", "2", str(folder), "-c", "/dev/null", "--dist", "loadfile", "-v"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_copies_run_the_tests(tmp_path: Path) -> None:
    (tmp_path / "test_good.py").write_text(GOOD)
    done = forked(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 passed" in done.stdout


def test_a_copy_that_crashes_is_seen_and_not_replaced_for_ever(tmp_path: Path) -> None:
    (tmp_path / "test_crashes.py").write_text(CRASHES)
    done = forked(tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "crashed while running" in done.stdout


def test_nothing_runs_where_a_test_cannot_be_imported(tmp_path: Path) -> None:
    (tmp_path / "test_good.py").write_text(GOOD)
    (tmp_path / "test_wrong.py").write_text("import nothing_of_the_kind")
    done = forked(tmp_path)
    assert done.returncode == 2
    assert "No module named 'nothing_of_the_kind'" in done.stdout
    assert "passed" not in done.stdout
