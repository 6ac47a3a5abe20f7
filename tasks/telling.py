"""What a phase on a rented machine tells the volume's board: that it began, how it ended, and what it cannot go on without."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from infra.board import Board
from infra.errors import InfraError
from infra.store import FolderStore
from tasks.config import PipelineConfig


@contextlib.contextmanager
def telling(phase: str, config: PipelineConfig, volume: Path) -> Iterator[Callable[[str], None]]:
    """Tell the board about what happens in the block; yields a function for more. Without rented machines there is no board.

    A board that cannot be written stops nothing.
    """
    board = Board(FolderStore(volume), "RUNPOD") if config.machine.rental else None

    def tell(text: str) -> None:
        if board is not None:
            with contextlib.suppress(InfraError, OSError):
                board.post(f"{phase}: {text}")

    tell("begins")
    try:
        yield tell
    except Exception as error:
        tell(f"BLOCKER: {error}")
        raise
    tell("is done")
