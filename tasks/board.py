"""Posts on the volume's board that a phase on a rented machine has started, how it ended, and which error blocks it."""

import contextlib
from collections.abc import Callable, Generator
from pathlib import Path

from infra.board import Board
from infra.errors import InfraError
from infra.store import FolderStore
from tasks.config import PipelineConfig


@contextlib.contextmanager
def on_board(phase: str, config: PipelineConfig, volume: Path) -> Generator[Callable[[str], None]]:
    """Post the start and the end or error of the block; yields a function that posts more. Without rented machines, nothing is posted.

    Errors while posting are ignored.
    """
    board = Board(FolderStore(volume), "RUNPOD") if config.machine.rental else None

    def post(text: str) -> None:
        if board is not None:
            with contextlib.suppress(InfraError, OSError):
                board.post(f"{phase}: {text}")

    post("begins")
    try:
        yield post
    except Exception as error:
        post(f"BLOCKER: {error}")
        raise
    post("is done")
