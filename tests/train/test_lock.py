"""One run at a time in a folder, whatever happens to the launcher: torchrun, killed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from fvlm_core.errors import UserError
from fvlm_core.exit_status import ERROR_FILE
from fvlm_core.train import lock
from fvlm_core.train.lock import RunLock
from tests.train.conftest import on_ranks, start, tiny_recipe
from tests.train.test_resume import rows, same_end, wait_for_rows

LONG = {"run__steps": 60, "run__eval_every": 1, "run__checkpoint_every": 4}


def test_a_killed_launcher_and_the_same_command_again(tmp_path: Path, shards: Path) -> None:
    """The ranks outlive their torchrun for as long as they need to save; the next run waits for them and goes on."""
    recipe, undisturbed = (tiny_recipe(tmp_path / name, shards, **LONG) for name in ("killed", "undisturbed"))
    killed = start(recipe, ranks=2)
    wait_for_rows(recipe, killed, 5)
    ranks = psutil.Process(killed.pid).children(recursive=True)
    killed.kill()
    again = start(recipe, ranks=2)
    again.join(120)
    assert again.exitcode == 0
    _, alive = psutil.wait_procs(ranks, timeout=10)
    assert not alive
    on_ranks(undisturbed, 2)
    assert rows(recipe)["step"].tolist() == list(range(1, 61))
    same_end(recipe, undisturbed)


def test_ranks_end_with_their_launcher_and_save(tmp_path: Path, shards: Path) -> None:
    recipe = tiny_recipe(tmp_path / "run", shards, **LONG | {"run__steps": 5000, "run__checkpoint_every": 5000})
    recipe.to_yaml(recipe.output.with_suffix(".yaml"))
    torchrun = Path(sys.executable).with_name("torchrun")
    command = [torchrun, "--standalone", "--nproc-per-node", "2", "-m", "fvlm_core.train", recipe.output.with_suffix(".yaml")]
    killed = subprocess.Popen(command)
    wait_for_rows(recipe, killed, 3)
    ranks = psutil.Process(killed.pid).children(recursive=True)
    assert len(ranks) >= 2
    killed.kill()
    killed.wait()
    _, alive = psutil.wait_procs(ranks, timeout=60)
    assert not alive
    assert list((recipe.output / "checkpoints").glob("step-*/manifest.json"))


def test_a_second_run_is_refused_and_the_first_goes_on(tmp_path: Path, shards: Path) -> None:
    recipe = tiny_recipe(tmp_path / "run", shards, **LONG | {"run__steps": 5000})
    first = start(recipe, ranks=1)
    try:
        wait_for_rows(recipe, first, 1)
        (worker,) = psutil.Process(first.pid).children()
        command = [sys.executable, "-m", "fvlm_core.train", recipe.output.with_suffix(".yaml")]
        second = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert second.returncode == 2
        assert f"another run is at work in this folder: process {worker.pid} on " in second.stderr
        assert str(recipe.output) in second.stderr
        invalid = tmp_path / "invalid.yaml"
        invalid.write_text(f"output: {recipe.output}\nsteps: many\n")
        third = subprocess.run([*command[:-1], invalid], capture_output=True, text=True, timeout=60)
        assert third.returncode == 2
        assert not (recipe.output / ERROR_FILE).exists(), "the first run has not failed"
        assert first.exitcode is None
    finally:
        first.terminate()
        first.join(60)


def test_a_refused_start_leaves_a_finished_or_another_run_as_it_is(tmp_path: Path, shards: Path) -> None:
    recipe = tiny_recipe(tmp_path / "run", shards, run__steps=2)
    settings = tmp_path / "run.yaml"
    recipe.to_yaml(settings)
    command = [sys.executable, "-m", "fvlm_core.train", settings]

    def files() -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in recipe.output.rglob("*") if path.is_file() and path.name != lock.LOCK_FILE}

    subprocess.run(command, check=True)
    for unfinished in (False, True):
        if unfinished:
            (recipe.output / "manifest.json").unlink()
        before = files()
        tiny_recipe(tmp_path / "run", shards, run__steps=3).to_yaml(settings)
        refused = subprocess.run(command, capture_output=True, text=True)
        assert refused.returncode == 2
        assert "the folder holds another run: run.steps was 2 and is 3" in refused.stderr
        assert files() == before


@pytest.mark.parametrize("shared", [False, True])
def test_a_lock_dies_with_its_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared: bool) -> None:
    """Of a lease the process may be on another host, so nobody asks whether it is there: its signs of life have ended."""
    code = f"""
import sys, time
from pathlib import Path
from fvlm_core.train import lock
lock.LEASE_S = 1.0
with lock.RunLock(Path({str(tmp_path)!r}), shared={shared}).held():
    print("held", flush=True)
    time.sleep(600)
"""
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    monkeypatch.setattr(lock, "LEASE_S", 1.0)
    with RunLock(tmp_path, shared=shared).held():
        pass


def test_a_lease_is_one_run_at_a_time_and_a_run_that_lost_it_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "LEASE_S", 1.0)
    monkeypatch.setattr(lock, "WAIT_S", 0.5)
    ended: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _frame: ended.append(number))
    with RunLock(tmp_path, shared=True).held():
        with pytest.raises(UserError, match=f"process {os.getpid()}"), RunLock(tmp_path, shared=True).held():
            pass
        assert ended == [], "it has given signs of life for longer than the lease"
        (tmp_path / lock.LEASE_FILE).unlink()
        deadline = time.monotonic() + 20
        while not ended and time.monotonic() < deadline:
            time.sleep(0.05)
    signal.signal(signal.SIGTERM, before)
    assert ended == [signal.SIGTERM]


def test_waits_longer_for_a_run_that_is_ending(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "WAIT_S", 0.5)
    monkeypatch.setattr(lock, "ENDING_WAIT_S", 2.0)
    first = RunLock(tmp_path)
    with first.held():
        for expected, end in ((0.5, False), (2.0, True)):
            if end:
                first.ending()
            started = time.monotonic()
            with pytest.raises(UserError, match=f"process {os.getpid()}"), RunLock(tmp_path).held():
                pass
            assert expected <= time.monotonic() - started < expected + 1.4


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write"), RunLock(tmp_path / "file" / "run").held():
        pass
