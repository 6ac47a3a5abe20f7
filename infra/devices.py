"""The GPUs of this machine, dealt out to jobs that run at once: each sees its own and no other."""

import threading
from collections.abc import Generator
from contextlib import contextmanager

VISIBLE = "CUDA_VISIBLE_DEVICES"


class Devices:
    """GPUs by number. Used by several threads."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._free = list(range(count))
        self._changed = threading.Condition()

    @contextmanager
    def taken(self, count: int) -> Generator[dict[str, str]]:
        """Have `count` of them to oneself, as environment variables; waits until so many are free. All of them need no variable."""
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
