"""Ends a child process when its parent ends, so that it does not keep writing beside a restarted job."""

import os
import threading
import time

CHECK_S = 0.5


def end_with_parent() -> None:
    """End this process as soon as its parent is gone, even by SIGKILL."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(CHECK_S)
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="parent-watch").start()
