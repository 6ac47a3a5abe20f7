"""`metrics.csv` holds each step once whatever happened before; wandb writes its files without a key, and no key anywhere."""

import csv
import math
import os
import pty
import re
import select
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fvlm_core.data.batch import PackedBatch
from fvlm_core.train.__main__ import train
from fvlm_core.train.distributed import World
from fvlm_core.train.loop import Trainer
from fvlm_core.train.metrics import MetricsFile, columns, peak_flops, peak_memory_gb
from tests.train.conftest import program, tiny_recipe


@given(written=st.integers(0, 8), resumed=st.integers(0, 10), cut=st.integers(0, 30))
def test_truncation(tmp_path_factory: pytest.TempPathFactory, written: int, resumed: int, cut: int) -> None:
    """Rows after the resume step and a row cut short by a kill are gone, all others stay."""
    path = tmp_path_factory.mktemp("metrics") / "metrics.csv"
    names = columns(["coarse"])
    first = MetricsFile(path, names)
    first.truncate(0)
    for step in range(1, written + 1):
        first.append({"step": step, "val_loss": 0.5, "peak_memory_gb": 1.25})
    content = path.read_bytes()
    header = content.index(b"\n") + 1
    path.write_bytes(content[: max(header, len(content) - cut)])
    whole = path.read_bytes().count(b"\n") - 1
    again = MetricsFile(path, names)
    again.truncate(resumed)
    again.append({"step": 99})
    rows = list(csv.DictReader(path.open(newline="")))
    assert [int(row["step"]) for row in rows] == [*range(1, min(whole, resumed) + 1), 99]
    assert {row["peak_memory_gb"] for row in rows[:-1]} <= {"1.25"}


def test_unknown_column_is_an_error(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "metrics.csv", columns(["coarse"]))
    metrics.truncate(0)
    with pytest.raises(ValueError, match="loss_val"):
        metrics.append({"step": 1, "loss_val": 0.5})


def test_a_skipped_step_is_left_out_of_its_row(tmp_path: Path, shards: Path) -> None:
    """Counted, and no part of the means; a row whose every step was skipped has none."""
    recipe = tiny_recipe(tmp_path / "run", shards, run__eval_every=2, run__steps=8)
    trainer = Trainer(recipe, World(0, 1, torch.device("cpu")), "test", {}, has_wandb_key=False)
    accumulate, healthy = trainer._accumulate, {}

    def damaged(micro_batches: list[PackedBatch], units: int) -> torch.Tensor:
        sums = accumulate(micro_batches, units)
        step = trainer.state.step + 1
        if step in (3, 5, 6):
            return sums * math.nan
        healthy[step] = (sums / units).tolist()
        return sums

    trainer._accumulate = damaged
    trainer.run()
    rows = pd.read_csv(recipe.output / "metrics.csv", index_col="step")
    assert rows["skipped_steps"].tolist() == [0, 1, 3, 3]
    assert rows.loc[4, ["train_loss", "train_coarse"]].tolist() == pytest.approx(healthy[4][:2])
    assert rows.loc[[2, 4, 8]].filter(regex="^(train_|entropy|grad_norm_|val_)").notna().all(axis=None)
    assert rows.loc[6].filter(regex="^(train_|entropy|grad_norm_)").isna().all()
    assert (rows.filter(regex="^lr_") > 0).all(axis=None)


def test_wandb_offline_without_a_key(tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    recipe = tiny_recipe(tmp_path / "run", shards, run__steps=2, run__wandb="auto", phase="speed")
    train(recipe)
    (log,) = (recipe.output / "wandb").glob("offline-run-*/run-*.wandb")
    deadline = time.monotonic() + 20  # wandb's own process writes it, after `finish` on a busy machine
    while b"foveated-vlm-speed" not in log.read_bytes() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert b"foveated-vlm-speed" in log.read_bytes()


@pytest.mark.slow(reason="a run in a process of its own")
def test_a_terminal_shows_where_the_run_is(tmp_path: Path, shards: Path) -> None:
    """A live line on a terminal, none in a file."""
    recipe = tiny_recipe(tmp_path / "run", shards)
    recipe.to_yaml(tmp_path / "run.yaml")
    command = ["fvlm_core.train", str(tmp_path / "run.yaml")]
    ours, theirs = pty.openpty()
    process = program(command, os.ttyname(theirs))
    shown = b""
    while select.select([ours], [], [], 0.1)[0] or process.exitcode is None:
        shown += os.read(ours, 65536) if select.select([ours], [], [], 0)[0] else b""
    for end in (ours, theirs):
        os.close(end)
    assert process.exitcode == 0
    text = re.sub(rb"\x1b\[[0-9;?]*[a-zA-Z]", b"", shown).decode()
    assert re.search(r"tiny .*6/6 +loss \d+\.\d{4} +lr \d\.\d+e-\d+ +0:00:00", text)
    assert "step 6/6  train" in text
    shutil.rmtree(recipe.output)
    process = program(command, str(tmp_path / "printed"))
    process.join(60)
    assert [line.split("/")[0] for line in (tmp_path / "printed").read_text().splitlines()] == [f"step {number}" for number in range(1, 7)]


@pytest.mark.parametrize(
    ("card", "tflops"),
    [("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H100 NVL", 835), ("NVIDIA H200 NVL", 835), ("Quadro K600", None)],
)
def test_peaks_are_of_the_card_and_not_of_its_family(monkeypatch: pytest.MonkeyPatch, card: str, tflops: int | None) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: card)
    assert peak_flops(torch.device("cuda")) == (tflops and tflops * 1e12)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the kernel does not say it here")
def test_peak_memory_is_not_that_of_the_process_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which getrusage goes on to count."""
    monkeypatch.setattr("fvlm_core.train.metrics.resource.getrusage", lambda who: SimpleNamespace(ru_maxrss=1 << 40))
    assert 0.01 < peak_memory_gb(torch.device("cpu")) < 1000
