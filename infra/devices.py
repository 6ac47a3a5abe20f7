"""Assigns the GPUs of this machine to concurrent jobs: each job sees only its own."""

import threading
from collections.abc import Generator
from contextlib import contextmanager

VISIBLE = "CUDA_VISIBLE_DEVICES"


class Devices:
    """The GPUs of this machine by index. Thread-safe."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._free = list(range(count))
        self._changed = threading.Condition()

    @contextmanager
    def taken(self, count: int) -> Generator[dict[str, str]]:
        """Reserve `count` GPUs during the block; waits until they are free. Yields the environment variables that select them.

        For none or all of the GPUs, nothing is reserved and no variable is needed.
        """
        count = min(count, self.count)
        if count in (0, self.count):
            yield {}
            return
        with self._changed:
            self._changed.wait_for(lambda: len(self._free) >= count)
            mine, self._free = self._free[:count], self._free[count:]
        try:
            yield {VISIBLE: ",".join(map(str, mine))}
        finally:
            with self._changed:
                self._free = sorted([*self._free, *mine])
                self._changed.notify_all()
