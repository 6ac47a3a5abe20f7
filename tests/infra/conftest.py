"""A clock that tests move, and a ledger by it."""

import time
from pathlib import Path

import pytest

from infra.budget import Budget
from infra.store import FolderStore


class Clock:
    def __init__(self) -> None:
        self.now = time.time()

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def budget(tmp_path: Path, clock: Clock) -> Budget:
    return Budget(FolderStore(tmp_path / "ledger"), cap_usd=20, reserve_usd=5, clock=clock)
