"""The checks that wait for a GPU run: their code on a CPU with a tiny model."""

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_checks
from benchmarks.gpu_checks import TINY, checks, main
from benchmarks.gpu_train_step import NO_GPU
from fvlm_core.config import ModelSettings


def test_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_checks, "LONG_WARM_UP", 5)
    sizes, kernels = {"tiny": ModelSettings.model_validate(TINY)}, tmp_path / "kernels.jsonl"
    found = {check.what: check.value for check in checks(sizes, torch.device("cpu"), kernels, budget_s=1e6, long_steps=15)}
    assert all(value is not None for what, value in found.items() if "ATTENTION" not in what)
    assert (
        min(found[what] or 0.0 for what in ("tiny eager, 1 micro-batches step", "tiny eager, 2 micro-batches kernels", "5 steps speed")) > 0
    )
    assert min(found[f"attention of {tokens} tokens, FLASH_ATTENTION"] or 0.0 for tokens in (4, 5, 6)) > 0
    assert {"5 steps stalls", "5 steps waiting for data"} <= found.keys()
    ran = [json.loads(line) for line in kernels.read_text().splitlines()]
    assert sum(kernel["count"] for kernel in ran) == sum(found[f"tiny eager, {n} micro-batches kernels"] or 0.0 for n in (1, 2))


def test_what_there_is_no_time_for_is_left_out_and_said(tmp_path: Path) -> None:
    sizes = {"tiny": ModelSettings.model_validate(TINY)}
    found = list(checks(sizes, torch.device("cpu"), tmp_path / "kernels.jsonl", budget_s=0.0, long_steps=100))
    assert {check.unit for check in found} == {"left out: no time"}
    assert len(found) == 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_says_that_there_is_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_checks", "--output", str(tmp_path)])
    with pytest.raises(SystemExit, match=str(NO_GPU)):
        main()
    assert "torch sees no GPU" in capsys.readouterr().err
