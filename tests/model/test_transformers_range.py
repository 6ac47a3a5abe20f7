"""The model on the oldest transformers that pyproject.toml allows; every other test runs on the newest, from the lock."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

OLDEST = ["transformers==5.0.0", "tokenizers==0.22.2", "huggingface-hub==1.5.0"]
ROOT = Path(__file__).parents[2]


@pytest.mark.e2e
def test_the_oldest_transformers_gives_the_same_numbers(tmp_path):
    subprocess.run([ROOT / "infra" / "install.sh", sys.prefix, "--no-deps", "--target", tmp_path, *OLDEST], check=True)
    names = ("encoder", "llama", "build", "convert")  # the passes of the model are made of these and of torch
    tests = [*(f"tests/model/test_{name}.py" for name in names), "tests/data/test_tokenizer.py"]
    tests += [f"tests/serve/test_{name}.py" for name in ("session", "use")]  # the rest of serving deals with what these load
    tests += [f"tests/release/test_{name}.py" for name in ("hub_model", "hub_generation", "conversations")]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-k", "not one_graph", *tests],  # what the compiler takes depends on torch
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": f"{tmp_path}"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-3000:]
