"""Every page of docs/ that explains how to add or change something ends with an example, and the example runs."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
PAGES = ("how-it-runs", "data-sources", "benchmarks", "experiments", "phases", "machines")
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
COMMANDS = {"python": [sys.executable, "-"], "sh": ["bash", "-euo", "pipefail"]}


@pytest.mark.parametrize("page", PAGES)
def test_the_example_runs(page: str, tmp_path: Path) -> None:
    _, heading, example = (DOCS / f"{page}.md").read_text().rpartition("\n## Example\n")
    assert heading, "the page ends with its example"
    blocks = FENCE.findall(example)
    assert blocks
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    for language, code in blocks:
        done = subprocess.run(
            COMMANDS[language], input=code, text=True, capture_output=True, cwd=tmp_path, env=os.environ | {"PATH": path}, timeout=300
        )
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
