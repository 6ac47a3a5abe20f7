"""How a training job ends, seen by the launcher of the pipeline: stopped from outside, refused, or on a full disk."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from fvlm_core.config import Recipe
from fvlm_core.exit_status import ERROR_FILE, STOPPED
from fvlm_core.train.__main__ import train
from infra import guard
from infra.fork_server import ForkServer
from infra.launch import DiskFullError, JobInterruptedError, JobRefusedError, forked_ranks_job, launch, python_job, torchrun_job
from tasks.make import PRELOADED
from tests.train.conftest import tiny_recipe
from tests.train.test_resume import same_end

MODULE = "fvlm_core.train"


def written(recipe: Recipe) -> Path:
    path = recipe.output.with_suffix(".yaml")
    recipe.to_yaml(path)
    return path


@pytest.mark.parametrize("workers", [0, 1])
def test_stopped_by_somebody_else(tmp_path: Path, shards: Path, workers: int) -> None:
    """SIGTERM to torchrun, which sends it to loader processes too and ends with status 1: the run has saved, and says so."""
    recipe = tiny_recipe(tmp_path / "run", shards, run__steps=5000, run__checkpoint_every=5000, data__workers=workers)
    signalled = []

    def stop_torchrun() -> None:
        if not signalled and (recipe.output / "metrics.csv").is_file():
            (guarding,) = [child for child in psutil.Process().children() if guard.__file__ in child.cmdline()]
            (torchrun,) = guarding.children()
            torchrun.send_signal(signal.SIGTERM)
            signalled.append(torchrun.pid)

    with pytest.raises(JobInterruptedError, match="stopped by SIGTERM; start it again") as caught:
        launch(torchrun_job(MODULE, written(recipe), processes=2), recipe.output, watch=stop_torchrun, watch_s=0.2, grace_s=60)
    assert caught.value.status == STOPPED
    assert list((recipe.output / "checkpoints").glob("step-*/manifest.json"))


def test_refused_by_every_rank(tmp_path: Path, shards: Path) -> None:
    recipe = tiny_recipe(tmp_path / "run", shards, run__batch_samples=9)
    with pytest.raises(JobRefusedError) as caught:
        launch(torchrun_job(MODULE, written(recipe), processes=2), recipe.output)
    assert caught.value.what == "9 samples per step do not divide among 2 ranks"
    assert caught.value.where == "run.batch_samples"


def test_ranks_of_one_attempt_leave_each_others_refusal(tmp_path: Path) -> None:
    """Whichever rank starts last removes what an earlier attempt left, and not what another rank has just said."""
    output = tmp_path / "job"
    settings = tmp_path / "job.yaml"

    def rank(run: str, *, refuse: bool) -> None:
        settings.write_text(f"output: {output}\nvalue: 1\nrefuse: {refuse}\n")
        subprocess.run([sys.executable, "-m", "tests.jobs.count", settings], env=os.environ | {"TORCHELASTIC_RUN_ID": run})

    rank("one", refuse=True)
    rank("one", refuse=False)
    assert (output / ERROR_FILE).exists()
    rank("two", refuse=False)
    assert not (output / ERROR_FILE).exists()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """A real file system of a given size; the same one, larger or smaller, when called again."""
    place = tmp_path / "disk"
    place.mkdir()

    def sized(size: str) -> Path:
        options = f"size={size}" + (",remount" if place.is_mount() else "")
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "fvlm-test", place], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no file system may be mounted here: {done.stderr.strip()}")
        return place

    yield sized
    subprocess.run(["umount", "--lazy", place], check=False, capture_output=True)  # a rank that ends may still hold it


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    server = ForkServer(PRELOADED)
    yield server
    server.close()


@pytest.mark.parametrize(("size", "ranks"), [("64k", 0), ("1500k", 0), ("1500k", 2)])
def test_a_full_disk_is_called_so_and_the_run_goes_on_when_there_is_space(
    tmp_path: Path, shards: Path, disk: Callable[[str], Path], server: ForkServer, size: str, ranks: int
) -> None:
    """Wherever the disk runs full: in a checkpoint, the metrics, or the model that is made of it all."""
    recipe = tiny_recipe(disk(size) / "run", shards, run__checkpoint_every=1)
    undisturbed = tiny_recipe(tmp_path / "undisturbed", shards, run__checkpoint_every=1)
    settings = tmp_path / "run.yaml"
    recipe.to_yaml(settings)
    command = forked_ranks_job(MODULE, settings, processes=ranks) if ranks else python_job(MODULE, settings)
    if size == "1500k" and not ranks:  # its own words, in a log on another disk: what cannot be written is not seen
        alone = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300)
        assert alone.returncode == 2
        assert "error: the disk is full\n" in alone.stdout
        assert str(recipe.output.parent) in alone.stdout
        assert "Traceback" not in alone.stdout
    else:
        with pytest.raises((JobRefusedError, DiskFullError), match="the disk is full") as caught:
            launch(command, recipe.output, server=server)
        assert str(recipe.output.parent) in str(caught.value)
    if not ranks:
        disk("64m")
        launch(command, recipe.output, server=server)
        assert not (recipe.output / ERROR_FILE).exists()
        train(undisturbed)
        same_end(recipe, undisturbed)
