"""Steps that share something: the GPUs of one pod among the runs of a phase, and one volume among several hosts."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from deployments.checks import load_profile
from flows.training import training
from infra import locks
from infra.launch import python_job
from infra.runpod.pod import SHARED_VARIABLE
from infra.stack import REPOSITORY
from tasks.ablations import baseline_recipe
from tasks.make import MakeOptions, Reporter, make
from tasks.steps import Step

HOST = """
import sys
from pathlib import Path
from infra import locks
from tasks.ablations import baseline_recipe
from tasks.make import make
from tests.tasks.test_shared import LEASE_S, counted
locks.LEASE_S = LEASE_S
make(counted(), Path(sys.argv[1]))
"""
LEASE_S = 2.0
RUNS = 4


class Log(Reporter):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def log(self, message: str) -> None:
        self.lines.append(message)


def counted() -> Step:
    return Step("counted", "tests.jobs.count", {"value": 1, "seconds": 2.0})


def test_small_runs_of_the_production_profile_keep_both_gpus_busy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each sees one GPU, no two see the same one at once, and none of the first two ends before both are at work."""
    machine = (config := load_profile("runpod")).machine
    ranks = training(baseline_recipe(config.model, config.base, 0, {}), machine, {}, shared=True).ranks
    assert (machine.ranks, machine.parallel_jobs, ranks) == (2, 2, 1)
    assert training(baseline_recipe(config.model, config.base, 0, {}), machine, {}).ranks == 2, "a stage has both"
    # what torchrun would start, without waiting for torch
    monkeypatch.setattr("tasks.make.torchrun_job", lambda module, settings, **_: python_job(module, settings))
    how = MakeOptions.of(config.with_changes({"machine.min_free_gb": 0.0}, where="the test").machine)
    busy = tmp_path / "busy"
    (busy / "begun").mkdir(parents=True)
    settings = {"busy": str(busy), "gpus": machine.ranks}
    steps = [Step(f"run{number}", "tests.jobs.gpu", {"value": number, **settings}, ranks=ranks) for number in range(RUNS)]
    with ThreadPoolExecutor(machine.parallel_jobs) as pool:
        made = list(pool.map(lambda step: make(step, tmp_path, how=how), steps))
    assert {(tmp_path / one.folder / "gpu.txt").read_text() for one in made} == {"0", "1"}
    assert len(list((busy / "begun").iterdir())) == RUNS


@contextmanager
def host(volume: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Another host that makes the step; killed with everything that it has started."""
    environment = os.environ | {SHARED_VARIABLE: "1"}
    with subprocess.Popen([sys.executable, "-c", HOST, str(volume)], cwd=REPOSITORY, env=environment) as process:
        yield process
        for one in [*psutil.Process(process.pid).children(recursive=True), process] if process.poll() is None else []:
            one.kill()


@pytest.mark.parametrize("dies", [False, True])
def test_of_two_hosts_that_want_a_step_one_makes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dies: bool) -> None:
    """The other waits; where the first one dies it goes on with what that had done."""
    monkeypatch.setenv(SHARED_VARIABLE, "1")
    monkeypatch.setattr(locks, "LEASE_S", LEASE_S)
    folder, log = tmp_path / counted().folder, Log()
    with host(tmp_path) as first:
        deadline = time.monotonic() + 60
        while not (folder / "done.txt").is_file() or not (folder / "done.txt").read_text():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        if dies:
            for one in [*psutil.Process(first.pid).children(recursive=True), first]:
                one.kill()
            first.wait()
        done = int((folder / "done.txt").read_text())
        made = make(counted(), tmp_path, reporter=log)
        assert dies or first.wait(30) == 0
    assert any("another process is making it" in line for line in log.lines)
    assert (made.folder, made.problems(tmp_path, "sha256")) == (counted().folder, [])
    starts = (tmp_path / f"{counted().folder}.runs").read_text().split()
    assert len(starts) == (2 if dies else 1)
    assert 0 < done < 20
    assert not list(tmp_path.glob("steps/.locks/*.lease*"))
