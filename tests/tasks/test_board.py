"""What a phase posts on the board of a rented machine's volume."""

from pathlib import Path

import pytest

from deployments.checks import load_profile
from infra.board import Board
from infra.store import FolderStore
from tasks.board import on_board


def entries(volume: Path) -> list[str]:
    return [entry.text for entry in Board(FolderStore(volume), "LOCAL").entries()]


def test_status_and_blockers_are_on_the_board(tmp_path: Path) -> None:
    config = load_profile("runpod")
    with on_board("speed", config, tmp_path) as post:
        post("twice as fast")
    with pytest.raises(ValueError), on_board("train", config, tmp_path):
        raise ValueError("no shards")
    assert entries(tmp_path) == ["speed: begins", "speed: twice as fast", "speed: is done", "train: begins", "train: BLOCKER: no shards"]


def test_at_home_nothing_is_posted_and_a_board_that_cannot_be_written_stops_nothing(tmp_path: Path) -> None:
    with on_board("speed", load_profile("ci"), tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "comms").write_text("in the way")
    with on_board("speed", load_profile("runpod"), tmp_path):
        pass
