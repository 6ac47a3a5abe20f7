"""Watches pods for the worker: polls one list of pods for all runs, reads the log of each pod, and ends it."""

import asyncio
import contextlib
import re
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

import anyio.to_thread

from infra.budget import Budget
from infra.errors import InfraError
from infra.runpod.account import Account
from infra.runpod.client import RunPod
from infra.runpod.errors import RunPodError
from infra.runpod.models import Pod

OF_PREFECT = re.compile(r"\d\d:\d\d:\d\d\.\d{3} \| \w+ +\| ")
"""Matches lines that the run has already sent to the server itself."""
SYSTEM_SAYS = "system:"
"""Prefix of lines that come from RunPod and not from the container."""


class Poller:
    """Polls one list of all pods for everyone who watches a pod; idle while no pod is watched."""

    def __init__(self, client: RunPod, interval_s: float, warn: Callable[[str], None]) -> None:
        self.client, self.interval_s, self.warn = client, interval_s, warn
        self.watched: set[str] = set()
        self._news = asyncio.Condition()
        self._pods: dict[str, Pod] = {}
        self._task: asyncio.Task[None] | None = None

    async def looks(self, pod: str) -> AsyncIterator[dict[str, Pod]]:
        """Yield all pods by id after every successful poll. While the API does not answer, nothing is yielded."""
        self.watched.add(pod)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._poll())
        try:
            while True:
                async with self._news:
                    await self._news.wait()
                yield self._pods
        finally:
            self.watched.discard(pod)

    def close(self) -> None:
        """Stop polling."""
        if self._task is not None:
            self._task.cancel()

    async def _poll(self) -> None:
        while self.watched:
            try:
                self._pods = {pod.id: pod for pod in await anyio.to_thread.run_sync(self.client.pods)}
            except RunPodError as error:
                self.warn(f"RunPod does not answer; pods go on: {error.what}")
            else:
                async with self._news:
                    self._news.notify_all()
                await self._end_twins()
            await asyncio.sleep(self.interval_s)

    async def _end_twins(self) -> None:
        """End other pods with the name of a watched one, so that no run is executed and paid for twice.

        Names are unique. There are two pods of the same name if the response to a create request was lost, and its pod was listed only
        after another one had been created.
        """
        names = {self._pods[pod].name for pod in self.watched if pod in self._pods}
        for twin in [pod for pod in self._pods.values() if pod.name in names and pod.id not in self.watched]:
            try:
                await anyio.to_thread.run_sync(self.client.terminate, twin.id)
                self.warn(f"the pod {twin.id} was ended: it was a second one of the name {twin.name}")
            except RunPodError as error:
                self.warn(f"the pod {twin.id}, a second one of the name {twin.name}, could not be ended, retrying: {error.what}")


async def ended(account: Account, budget: Budget, pod: str, name: str, warn: Callable[[str], None]) -> None:
    """End the pod, retrying until RunPod accepts, and record it in the ledger. If the ledger is unavailable, the reaper does so later."""
    delay_s = 1.0
    while True:
        try:
            await anyio.to_thread.run_sync(account.client.terminate, pod)
            break
        except RunPodError as error:
            warn(f"the pod {pod} could not be ended, retrying: {error.what}")
            await asyncio.sleep(delay_s)
            delay_s = min(60.0, delay_s * 2)
    try:
        await anyio.to_thread.run_sync(budget.ended, name)
    except (InfraError, OSError) as error:
        warn(f"the end of the pod {pod} is not in the ledger yet: {error}")


@contextlib.contextmanager
def reading_logs(client: RunPod, pod: str, say: Callable[[str], None]) -> Any:
    """During the block, pass the lines of the pod's log to `say`, except those that its run has logged itself."""
    over = threading.Event()

    def read() -> None:
        last: str | None = None
        while not over.is_set():
            with contextlib.suppress(RunPodError):
                for line in client.logs(pod, after=last, tail=1000):
                    last = line.id
                    if not OF_PREFECT.match(line.line):
                        say(f"{SYSTEM_SAYS} {line.line}" if line.source == "system" else line.line)
                    if over.is_set():
                        return
            over.wait(3.0)

    threading.Thread(target=read, name=f"log-{pod}", daemon=True).start()
    try:
        yield
    finally:
        over.set()
