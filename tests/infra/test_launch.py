"""The launcher against real processes: what a job prints, how it ends, and that nothing of it is ever left behind."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from infra.exit_status import ATTEMPT_VARIABLE, ERROR_FILE, USER_ERROR
from infra.launch import (
    DiskFullError,
    JobError,
    JobRefusedError,
    JobStoppedError,
    job_environment,
    launch,
    python_job,
    torchrun_job,
)
from infra.processes import JOB_VARIABLE, mark, marked, wait_until_ended
from tests.waiting import wait_until

# A job whose child leaves its session, as torchrun's ranks do, and writes both process ids down before it waits.
FAMILY = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
open("pids.tmp", "w").write(f"{os.getpid()} {child.pid}")
os.rename("pids.tmp", "pids")
time.sleep(600)
"""


def python(code: str, folder: Path) -> list[str]:
    return [sys.executable, "-c", f"import os; os.chdir({str(folder)!r})\n{code}"]


def family(folder: Path) -> list[psutil.Process]:
    """The processes of FAMILY, once they are there: the job and its child."""
    wait_until((folder / "pids").exists, "the family to be there")
    return [psutil.Process(int(pid)) for pid in (folder / "pids").read_text().split()]


def in_thread(folder: Path, stop: threading.Event) -> tuple[threading.Thread, list[BaseException]]:
    errors: list[BaseException] = []

    def run() -> None:
        try:
            launch(python(FAMILY, folder), folder, stop=stop, grace_s=2)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, errors


def test_output_goes_to_the_log_and_watch_is_called(tmp_path: Path) -> None:
    seen = []
    launch(python("print('hello', flush=True); import time; time.sleep(1)", tmp_path), tmp_path, watch=lambda: seen.append(1), watch_s=0.2)
    assert "hello" in (tmp_path / "log.txt").read_text()
    assert len(seen) >= 3


def test_error_carries_the_end_of_this_attempts_log(tmp_path: Path) -> None:
    (tmp_path / "log.txt").write_text("from an earlier attempt\n")
    with pytest.raises(JobError) as caught:
        launch(python("print('about to fail', flush=True); raise RuntimeError('the reason')", tmp_path), tmp_path)
    assert caught.value.status == 1
    assert "the reason" in caught.value.tail
    assert "earlier attempt" not in caught.value.tail
    assert "earlier attempt" in (tmp_path / "log.txt").read_text()


def test_a_signal_is_reported_as_the_shell_does(tmp_path: Path) -> None:
    with pytest.raises(JobError) as caught:
        launch(python("os.kill(os.getpid(), 9)", tmp_path), tmp_path)
    assert caught.value.status == 128 + 9


def count_job(folder: Path, **settings: object) -> Path:
    path = folder.parent / "job.yaml"
    path.write_text(json.dumps({"output": str(folder), "value": 1, **settings}))
    return path


@pytest.mark.parametrize("ranks", [0, 2])
def test_a_refusal_comes_back_with_its_parts(tmp_path: Path, ranks: int) -> None:
    """From the job itself and through torchrun, which ends with another status and prints a report of its own."""
    folder = tmp_path / "job"
    settings = count_job(folder, refuse=True)
    command = torchrun_job("tests.jobs.count", settings, processes=ranks) if ranks else python_job("tests.jobs.count", settings)
    with pytest.raises(JobRefusedError) as caught:
        launch(command, folder)
    assert (caught.value.what, caught.value.where, caught.value.fix) == ("the value is bad", "value", "give a good one")
    assert caught.value.status == USER_ERROR
    launch(python_job("tests.jobs.count", count_job(folder)), folder)
    assert not (folder / ERROR_FILE).exists()


def test_settings_that_cannot_be_read_are_refused_too(tmp_path: Path) -> None:
    with pytest.raises(JobRefusedError, match="unknown key 'valu'"):
        launch(python_job("tests.jobs.count", count_job(tmp_path / "job", valu=2)), tmp_path / "job")


def test_another_starts_refusal_is_not_taken_for_this_ones(tmp_path: Path) -> None:
    """A start by hand beside a launched job: its refusal says nothing of why that one fails."""
    folder = tmp_path / "job"
    beside = [sys.executable, "-m", "tests.jobs.count", str(count_job(folder, refuse=True))]
    code = f"import subprocess; subprocess.run({beside!r}, env=dict(os.environ, {ATTEMPT_VARIABLE}='')); raise KeyError('own')"
    with pytest.raises(JobError, match="own") as caught:
        launch(python(code, Path.cwd()), folder)
    assert not isinstance(caught.value, JobRefusedError)
    assert json.loads((folder / ERROR_FILE).read_text())["what"] == "the value is bad"


def test_torchrun_gives_its_ranks_the_same_grace(tmp_path: Path) -> None:
    launch(python("print(os.environ['TORCH_ELASTIC_SHUTDOWN_TIMEOUT'])", tmp_path), tmp_path, grace_s=40.5)
    assert (tmp_path / "log.txt").read_text() == "41\n"


def test_stop_ends_the_whole_family(tmp_path: Path) -> None:
    stop = threading.Event()
    thread, errors = in_thread(tmp_path, stop)
    processes = family(tmp_path)
    stop.set()
    thread.join(20)
    assert isinstance(errors[0], JobStoppedError)
    wait_until_ended(processes)


def test_killing_the_main_process_takes_its_children_along(tmp_path: Path) -> None:
    thread, errors = in_thread(tmp_path, threading.Event())
    main, child = family(tmp_path)
    main.kill()
    thread.join(20)
    assert isinstance(errors[0], JobError)
    assert errors[0].status == 128 + signal.SIGKILL
    wait_until_ended([main, child])


def test_a_job_does_not_outlive_its_launcher(tmp_path: Path) -> None:
    arguments = f"{python(FAMILY, tmp_path)!r}, Path({str(tmp_path)!r}), grace_s=2"
    code = f"from pathlib import Path; from infra.launch import launch; launch({arguments})"
    launcher = subprocess.Popen([sys.executable, "-c", code])
    processes = family(tmp_path)
    launcher.kill()
    launcher.wait()
    wait_until_ended(processes)


def test_leftovers_of_the_same_folder_are_ended_and_others_are_not(tmp_path: Path) -> None:
    mine, other = tmp_path / "mine", tmp_path / "other"
    sleepers = {
        folder: subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], env=os.environ | {JOB_VARIABLE: mark(folder)})
        for folder in (mine, other)
    }
    try:
        while len(list(marked(JOB_VARIABLE, mark(mine)))) != 1:  # until the new process shows its own environment
            time.sleep(0.02)
        launch(python("", tmp_path), mine)
        sleepers[mine].wait(10)
        assert sleepers[other].poll() is None
    finally:
        for sleeper in sleepers.values():
            sleeper.kill()


def test_full_disk_is_noticed_before_the_start(tmp_path: Path) -> None:
    with pytest.raises(DiskFullError):
        launch(python("open('started', 'w')", tmp_path), tmp_path, min_free_bytes=10**18)
    assert not (tmp_path / "started").exists()


def test_a_job_sees_where_things_are_and_nothing_of_the_orchestration() -> None:
    given = {
        "PATH": "/bin",
        "CUDA_VISIBLE_DEVICES": "0",
        "WANDB_API_KEY": "k",
        "PREFECT_API_URL": "u",
        "PREFECT_API_KEY": "s",
        "MY_SECRET": "x",
    }
    kept = job_environment(given, threads=2)
    assert {"PATH", "CUDA_VISIBLE_DEVICES", "WANDB_API_KEY"} <= set(kept)
    assert not {"PREFECT_API_URL", "PREFECT_API_KEY", "MY_SECRET"} & set(kept)
    assert kept["OMP_NUM_THREADS"] == "2"


def test_two_nodes_meet_and_train_as_one(tmp_path: Path) -> None:
    """Two torchruns on this machine stand for two nodes: they meet, and every rank sees both."""
    job = tmp_path / "job.py"
    job.write_text(
        "import os, sys, torch.distributed as dist\n"
        "dist.init_process_group('gloo')\n"
        "box = [None] * dist.get_world_size()\n"
        "dist.all_gather_object(box, int(os.environ['GROUP_RANK']))\n"
        "open(f'{sys.argv[1]}.{dist.get_rank()}', 'w').write(str(sorted(box)))\n"
        "dist.destroy_process_group()\n"
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = torchrun_job("job", tmp_path / "out", processes=1, nodes=2, rendezvous=f"127.0.0.1:{port}")
    environment = job_environment(os.environ, threads=1) | {"PYTHONPATH": str(tmp_path)}
    nodes = [subprocess.Popen(command, env=environment, cwd=tmp_path) for _ in range(2)]
    assert [node.wait(180) for node in nodes] == [0, 0]
    assert [(tmp_path / f"out.{rank}").read_text() for rank in range(2)] == ["[0, 1]", "[0, 1]"]
