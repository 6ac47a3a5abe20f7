"""Forked jobs against real processes: they are what a job of its own process is, and nothing of them is ever left behind."""

import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path

import psutil
import pytest

from infra import guard
from infra.fork_server import ForkServer
from infra.launch import JobError, JobRefusedError, JobStoppedError, forked_ranks_job, launch
from infra.processes import JOB_VARIABLE, UNMARKED, change_mark, mark, marked, wait_until_ended
from infra.stack import REPOSITORY
from tests.infra.test_launch import FAMILY, family
from tests.jobs import count
from tests.waiting import wait_until

PROGRAM = """
import atexit, os, pickle, sys
atexit.register(print, "atexit")
class Mine: ...
assert type(pickle.loads(pickle.dumps(Mine()))) is Mine, "found in the main module"
match sys.argv[1:]:
    case ["say", *words]:
        print(__name__, *words, "needed" in sys.modules, os.environ["OMP_NUM_THREADS"], sorted({"SEEN", "HIDDEN"} & os.environ.keys()))
    case ["end", status]:
        sys.exit(int(status))
    case ["fail"]:
        raise RuntimeError("the reason")
    case ["die"]:
        os.kill(os.getpid(), 9)
    case ["family"]:
        exec(FAMILY)
""".replace("FAMILY", repr(FAMILY))


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ForkServer]:
    """One that has imported the module `needed`; jobs find `program` in the folder they run in."""
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "needed.py").write_text("")
    monkeypatch.chdir(tmp_path)
    made = ForkServer(["needed"])
    yield made
    made.close()


def program(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "program", *arguments]


def servers() -> list[psutil.Process]:
    alive = (child for child in psutil.Process().children() if child.status() != psutil.STATUS_ZOMBIE)
    return [child for child in alive if "infra.fork_server" in child.cmdline()]


@contextmanager
def running(folder: Path, server: ForkServer) -> Iterator[tuple[Future[None], threading.Event]]:
    """The program's `family`, and what stops it; it is stopped at the end of the block, whatever ends that."""
    stop = threading.Event()
    with ThreadPoolExecutor() as pool:
        try:
            yield pool.submit(launch, program("family"), folder, server=server, stop=stop, grace_s=2), stop
        finally:
            stop.set()


def test_a_job_is_the_main_module_with_its_own_arguments_environment_and_log(
    server: ForkServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HIDDEN", "of the orchestration")
    for number, threads in enumerate((1, 2, 1)):
        folder = tmp_path / str(number)
        launch(program("say", f"job {number}"), folder, server=server, threads=threads, devices={"SEEN": "0"} if number else None)
        seen = ["SEEN"] if number else []
        assert (folder / "log.txt").read_text() == f"__main__ job {number} True {threads} {seen}\natexit\n"
    assert len(servers()) == 2, "one for each number of threads"
    assert [server.runs(threads) for threads in (1, 2, 3)] == [True, True, False]


@pytest.mark.parametrize(("what", "status"), [(("end", "0"), 0), (("end", "3"), 3), (("fail",), 1), (("die",), 128 + 9)])
def test_it_ends_as_a_process_of_its_own_does(server: ForkServer, tmp_path: Path, what: tuple[str, ...], status: int) -> None:
    if not status:
        launch(program(*what), tmp_path / "job", server=server)
        return
    with pytest.raises(JobError) as caught:
        launch(program(*what), tmp_path / "job", server=server)
    assert caught.value.status == status
    assert ("the reason" in caught.value.tail) == (what == ("fail",))


def test_jobs_at_once_have_their_own_marks_and_ends(server: ForkServer, tmp_path: Path) -> None:
    folders = [tmp_path / str(number) for number in range(6)]

    def one(number: int) -> int:
        try:
            launch(program("end", str(number)), folders[number], server=server)
        except JobError as error:
            return error.status
        return 0

    with ThreadPoolExecutor(len(folders)) as pool:
        assert list(pool.map(one, range(len(folders)))) == list(range(len(folders)))


def test_stopping_it_ends_all_that_bears_its_mark(server: ForkServer, tmp_path: Path) -> None:
    with running(tmp_path, server) as (launched, stop):
        processes = family(tmp_path)
        at_work = list(marked(JOB_VARIABLE, mark(tmp_path)))
        assert sorted(process.name() for process in at_work) == ["fvlm-guard", "fvlm-job", processes[1].name()]
        stop.set()
        with pytest.raises(JobStoppedError):
            launched.result(60)
    wait_until_ended([*processes, *at_work])


@pytest.mark.parametrize("victim", ["job", "guard", "server"])
def test_a_killed_part_takes_the_rest_along_and_the_next_job_starts(server: ForkServer, tmp_path: Path, victim: str) -> None:
    with running(tmp_path, server) as (launched, _):
        processes = family(tmp_path)
        (guarding,) = (process for process in marked(JOB_VARIABLE, mark(tmp_path)) if process.name() == guard.NAME)
        {"job": processes[0], "guard": guarding, "server": servers()[0]}[victim].kill()
        with pytest.raises(JobError) as caught:
            launched.result(60)
    assert caught.value.status == 128 + (signal.SIGTERM if victim == "server" else signal.SIGKILL)
    launch(program("say"), tmp_path, server=server)
    assert "__main__" in (tmp_path / "log.txt").read_text()
    wait_until_ended([*processes, guarding])


def test_neither_job_nor_server_outlives_the_launcher(server: ForkServer, tmp_path: Path) -> None:
    code = f"""
from pathlib import Path
from infra.fork_server import ForkServer
from infra.launch import launch
launch({program("family")!r}, Path("."), server=ForkServer(["needed"]), grace_s=2)
"""
    launcher = subprocess.Popen([sys.executable, "-c", code])
    processes = [*family(tmp_path), *psutil.Process(launcher.pid).children(), *marked(JOB_VARIABLE, mark(tmp_path))]
    assert len({process.pid for process in processes}) == 4, "the job and its child, the server, the guard"
    launcher.kill()
    launcher.wait()
    wait_until_ended(processes)
    assert (tmp_path / "log.txt").read_text() == "", "nobody complains"


def test_a_job_is_stopped_before_its_server_has_imported_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "slow.py").write_text("import time; open('importing', 'w'); time.sleep(5); open('imported', 'w')")
    (tmp_path / "program.py").write_text("open('begun', 'w')")
    server, stop = ForkServer(["slow"]), threading.Event()
    with ThreadPoolExecutor() as pool:
        launched = pool.submit(launch, program(), tmp_path, server=server, stop=stop)
        wait_until((tmp_path / "importing").exists, "the server to import")
        stop.set()
        with pytest.raises(JobStoppedError):
            launched.result(60)
        assert not (tmp_path / "imported").exists()
        wait_until((tmp_path / "imported").exists, "the server to be ready")
        (tmp_path / "program.py").write_text("open('next', 'w')")
        launch(program(), tmp_path, server=server)
    assert (tmp_path / "next").exists()
    assert not (tmp_path / "begun").exists()
    server.close()


def test_what_cannot_be_imported_is_said_in_the_jobs_log(tmp_path: Path) -> None:
    server = ForkServer(["there_is_no_such_module"])
    for _ in range(2):
        with pytest.raises(JobError, match="No module named 'there_is_no_such_module'"):
            launch(program("say"), tmp_path, server=server)
    server.close()


def test_ranks_are_forked_and_a_refusal_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    server = ForkServer(["torch.distributed.launcher.api"])
    settings, folder = tmp_path / "job.yaml", tmp_path / "job"
    for refuse in (True, False):
        settings.write_text(f"{{output: {folder}, value: 1, refuse: {refuse}}}")
        with pytest.raises(JobRefusedError, match="the value is bad") if refuse else nullcontext():
            launch(forked_ranks_job(count.__name__, settings, processes=2), folder, server=server)
    ranks = (tmp_path / "job.runs").read_text().split()
    server.close()
    assert len(set(ranks)) == 2


@pytest.mark.parametrize(("end", "status"), [("os.kill(os.getpid(), 2)", 1), ("sys.exit(3)", 1), ("sys.exit()", 0), ("", 0)])
def test_however_a_rank_ends_its_launcher_ends_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str, status: int) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "program.py").write_text(f"import os, sys; {end}")
    server = ForkServer(["torch.distributed.launcher.api"])
    with pytest.raises(JobError) if status else nullcontext():
        launch(forked_ranks_job("program", tmp_path / "none", processes=1), tmp_path, server=server)
    server.close()


def test_a_mark_is_only_changed_where_it_is_what_it_should_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FVLM_TEST_MARK", UNMARKED)
    change_mark("FVLM_TEST_MARK", UNMARKED, "f" * 16)
    for before, value in ((UNMARKED, "a" * 16), ("f" * 16, "short")):
        with pytest.raises(ValueError, match="FVLM_TEST_MARK"):
            change_mark("FVLM_TEST_MARK", before, value)
    with pytest.raises(ValueError, match="FVLM_NO_MARK"):
        change_mark("FVLM_NO_MARK", UNMARKED, "a" * 16)
