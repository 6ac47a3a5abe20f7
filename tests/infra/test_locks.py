"""Locks between processes."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from infra.locks import locked, try_lock

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
