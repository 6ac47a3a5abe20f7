"""Checks the stack from a thread while the main thread waits for its server.

Prefect's client retries for half an hour when a server is gone, and checks nothing else meanwhile. So the watchdog interrupts the main
thread when a part of the stack has died or does not answer.
"""

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from types import FrameType
from typing import NoReturn

from infra.stack import Stack, StackError

POLL_S = 1.0
REPORTED_S = 5.0
"""Silence of the server after which the user is told; including the time of a check, less than ten seconds."""
GIVEN_UP_S = 90.0
"""Silence of the server after which the command gives up. On two busy cores, a healthy server may not answer for half a minute."""


@dataclass
class Watch:
    """The watchdog's finding."""

    error: StackError | None = None
    """Why the stack cannot go on."""


@contextlib.contextmanager
def watched(stack: Stack, say: Callable[[str], None], *, given_up_s: float = GIVEN_UP_S) -> Generator[Watch]:
    """Leave the block with a StackError as soon as a part of the stack has died, whatever the main thread is waiting for.

    The server also counts as dead if it has not answered for `given_up_s` seconds. Inside the block, the error arrives as
    KeyboardInterrupt; if `Watch.error` is set, it does not come from the user. `say` gets a line when the server stops answering, and when
    it answers again.
    """
    watch, over, main = Watch(), threading.Event(), threading.get_ident()

    def look() -> None:
        answered, silent = time.monotonic(), False
        while not over.wait(POLL_S):
            try:
                stack.check()
                if stack.answers():
                    if silent:
                        say("the Prefect server answers again")
                    answered, silent = time.monotonic(), False
                    continue
                silence = time.monotonic() - answered
                if silence > REPORTED_S and not silent:
                    silent = True
                    say(f"the Prefect server at {stack.api_url} does not answer; waiting for it")
                if silence > given_up_s:
                    raise StackError(f"the Prefect server at {stack.api_url} has not answered for {silence:.0f} s")
            except StackError as error:
                watch.error = error
                signal.pthread_kill(main, signal.SIGUSR1)
                return

    def interrupt(_signal: int, _frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGUSR1, interrupt)
    thread = threading.Thread(target=look, name="watchdog", daemon=True)
    thread.start()
    try:
        try:
            yield watch
        finally:
            over.set()
            thread.join()
    except KeyboardInterrupt:
        if watch.error is not None:
            raise watch.error from None
        raise
    finally:
        signal.signal(signal.SIGUSR1, before)
