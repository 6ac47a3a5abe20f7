"""Waiting for what another process does."""

import time
from collections.abc import Callable

EVENT_TIMEOUT_S = 600
"""For something that takes seconds on an idle machine."""


def wait_until(condition: Callable[[], object], what: str, timeout_s: float = EVENT_TIMEOUT_S, *, poll_s: float = 0.1) -> None:
    """`poll_s`: longer where each look is a request to Prefect's server, which costs 20 ms of a core."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s} s for {what}"
        time.sleep(poll_s)
