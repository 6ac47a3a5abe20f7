"""One finished volume for all end-to-end tests: the tests' profile through the real command, a real server, workers and torchrun jobs.

It is made once. Each process that runs tests works on a copy of its own, so that files of tests run side by side; a test gets the
copy with everything finished and nothing running, and a profile of its own to change; so each works alone.
"""

import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
from filelock import FileLock

from infra.volume import HOME
from tests.e2e.volume import Result, Volume


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A folder of all processes that run tests."""
    base = tmp_path_factory.getbasetemp()
    return base if worker_id == "master" else base.parent


@pytest.fixture(scope="session")
def finished(shared: Path) -> Result:
    """The complete pipeline, run on an empty volume by the first process that asks."""
    record = shared / "finished.json"
    with FileLock(shared / "finished.lock"):
        if not record.exists():
            volume = Volume(shared / "finished")
            try:
                record.write_text(json.dumps(asdict(volume.run())))
            finally:
                volume.end()
    return Result(**json.loads(record.read_text()))


@pytest.fixture(scope="session")
def folder(shared: Path, finished: Result, worker_id: str) -> Iterator[Path]:
    """A copy of the finished volume; without its id, which marks its processes and deployments, and without its server's database."""
    folder = shared / f"volume-{worker_id}"
    shutil.copytree(shared / "finished", folder, symlinks=True)
    for file in (folder / HOME).iterdir():
        if file.is_file():
            file.unlink()
    yield folder
    Volume(folder).end()


@pytest.fixture
def volume(folder: Path) -> Iterator[Volume]:
    """The finished volume."""
    volume = Volume(folder)
    yield volume
    volume.end()
