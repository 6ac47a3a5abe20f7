"""One volume for all end-to-end tests: the tests' profile through the real command, a real server, workers and torchrun jobs.

A test gets the volume with everything finished and nothing running, and a profile of its own to change; so each works alone.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from fvlm_core.train.jobs import RunManifest
from tests.e2e.volume import Result, Volume, lengthen

LONG_STAGE2_STEPS = 500
"""Long enough to be stopped in the middle by something that takes seconds to arrive."""


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("pipeline") / "volume"
    yield folder
    Volume(folder).end()


@pytest.fixture(scope="session")
def finished(folder: Path) -> Result:
    """The complete pipeline, run once on an empty volume."""
    return Volume(folder).run()


@pytest.fixture
def volume(folder: Path, finished: Result) -> Iterator[Volume]:
    """The finished volume."""
    volume = Volume(folder)
    yield volume
    volume.end()


@dataclass(frozen=True)
class Uninterrupted:
    """A long stage 2 that nothing stopped, and what follows from it."""

    folder: Path
    manifest: RunManifest
    remade: set[str]
    """Steps that the change of stage 2 made again."""


@pytest.fixture(scope="session")
def uninterrupted(folder: Path, finished: Result) -> Uninterrupted:
    before = Volume(folder).made_at()
    volume = Volume(folder)
    lengthen(volume.values, stage2=LONG_STAGE2_STEPS)
    assert volume.run().status == 0
    after = volume.made_at()
    stage2 = volume.step("train", "stage2")
    return Uninterrupted(stage2, RunManifest.read(stage2), {name for name in before if after[name] != before[name]})
