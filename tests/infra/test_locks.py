"""Locks between processes."""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from infra.locks import leased, locked, try_lock
from infra.runpod.pod import SHARED_VARIABLE
from infra.stack import REPOSITORY

HOLD = """
import sys, time
from pathlib import Path
from infra.locks import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@contextmanager
def holder(path: Path) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen([sys.executable, "-c", HOLD, path], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_it_waits_and_dies_with_its_owner(tmp_path: Path) -> None:
    path, waited = tmp_path / "locks" / "one", []
    with locked(path, waiting=lambda: pytest.fail("nobody holds it")):
        pass
    with holder(path) as process:
        assert try_lock(path) is None

        def waiting() -> None:
            waited.append(1)
            if len(waited) == 2:
                process.kill()

        with locked(path, waiting=waiting):
            assert process.wait() == -9
    assert len(waited) >= 2


def test_waiting_can_give_up(tmp_path: Path) -> None:
    def waiting() -> None:
        raise TimeoutError("enough")

    with holder(tmp_path / "one"), pytest.raises(TimeoutError, match="enough"), locked(tmp_path / "one", waiting=waiting):
        pass


def test_a_lock_is_free_again_when_it_was_released(tmp_path: Path) -> None:
    first = try_lock(tmp_path / "one")
    assert first is not None
    assert try_lock(tmp_path / "one") is None
    first.release()
    assert try_lock(tmp_path / "one") is not None


TAKES_TURNS = """
import sys, time
from pathlib import Path
from infra.locks import leased
folder = Path(sys.argv[1])
for turn in range(int(sys.argv[2])):
    with leased(folder / "step", lease_s=float(sys.argv[3])):
        (folder / "busy").mkdir()
        time.sleep(0.01)
        (folder / "busy").rmdir()
        with (folder / "turns").open("a") as stream:
            stream.write(sys.argv[4] + "\\n")
print("done")
"""


def test_of_several_hosts_one_at_a_time_has_the_lease(tmp_path: Path) -> None:
    """`mkdir` fails where two are in at once."""
    run = [sys.executable, "-c", TAKES_TURNS, str(tmp_path), "5", "5"]
    hosts = [subprocess.Popen([*run, name], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) for name in "abc"]
    assert [host.communicate(timeout=60)[0] for host in hosts] == ["done\n"] * 3
    assert sorted((tmp_path / "turns").read_text().split()) == sorted("abc" * 5)


def test_a_lease_outlives_its_owner_for_its_time_and_no_longer(tmp_path: Path) -> None:
    code = "import sys, time\nfrom pathlib import Path\nfrom infra.locks import leased\nwith leased(Path(sys.argv[1]), lease_s=1.5):\n"
    code += "    print('in', flush=True)\n    time.sleep(600)"
    path = tmp_path / "step"
    with subprocess.Popen([sys.executable, "-c", code, str(path)], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == "in\n"
        waited: list[float] = []
        time.sleep(2.0)  # longer than the lease: signs of life keep it
        owner.send_signal(signal.SIGSTOP)
        began = time.monotonic()
        with leased(path, lease_s=1.5, waiting=lambda: waited.append(time.monotonic() - began)):
            assert waited, "it was held"
            assert time.monotonic() - began < 10
            owner.send_signal(signal.SIGCONT)
            assert owner.wait(10) == -signal.SIGTERM, "who lost it ends itself"
        with leased(path, lease_s=1.5):
            pass
    assert not [file.name for file in tmp_path.iterdir()]


def test_a_lock_for_life_is_a_lease_where_other_hosts_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SHARED_VARIABLE, "1")
    held = try_lock(tmp_path / "stack.lock")
    assert held is not None
    assert (tmp_path / "stack.lock.lease").is_file()
    assert try_lock(tmp_path / "stack.lock") is None
    held.release()
    again = try_lock(tmp_path / "stack.lock")
    assert again is not None
    again.release()
    assert list(tmp_path.iterdir()) == []
