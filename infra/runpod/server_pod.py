"""The program of the small pod that runs the Prefect server and the workers, so that the user's own machine need not stay on.

The server's database is on the pod's own disk, because SQLite does not work on a network file system. It is copied to the volume every
minute and at the end; the next pod starts with the copy. Everything started here ends with this program: before the pod's deadline, when
the pod's program sends SIGTERM, or when a stop file appears on the volume.

The account's key comes in a separate variable, because RunPod sets the usual one to a key that can only end this pod. The workers get the
account's key; the server does not.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import sqlite3
import threading
import time
from collections.abc import Mapping
from pathlib import Path

from infra.runpod.account import KEY_VARIABLE
from infra.runpod.pod import DISK_VARIABLE
from infra.runpod.pool import PUBLIC_API_VARIABLE
from infra.stack import Stack, StackError
from infra.volume import HOME

ACCOUNT_KEY_VARIABLE = "FVLM_RUNPOD_ACCOUNT_KEY"
FOLDER = f"{HOME}/server"
DATABASE, STOP, ADDRESS = f"{FOLDER}/prefect.db", f"{FOLDER}/stop", f"{FOLDER}/address.json"
"""Files on the volume: the copy of the database, the request to stop the server, and the server's address."""
SAVE_S = 60.0
LOOK_S = 1.0
RESTART_S = 5.0
"""Delay before the whole stack is restarted after a part of it has died."""


class ServerPod:
    """Runs the server and the workers until a stop is requested."""

    def __init__(
        self,
        volume: Path,
        disk: Path,
        *,
        port: int,
        address: str,
        pools: Mapping[str, str],
        environment: Mapping[str, str],
        save_s: float = SAVE_S,
    ) -> None:
        """`disk` is a folder on this host's own disk; `pools` are the types of the workers' pools by name."""
        self.volume, self.port, self.address, self.pools, self.save_s = volume, port, address, dict(pools), save_s
        self.database = disk / "prefect.db"
        self.key = environment.get(ACCOUNT_KEY_VARIABLE, "")
        hidden = (ACCOUNT_KEY_VARIABLE, KEY_VARIABLE)
        self.environment = {name: value for name, value in environment.items() if name not in hidden} | {
            "PREFECT_SERVER_API_HOST": "0.0.0.0",
            "PREFECT_SERVER_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{self.database}",
        }
        self.over = threading.Event()
        self.served = False
        """Whether this pod has run the volume's server."""

    def run(self) -> None:
        """Run server and workers until a stop is requested. If a part dies, all of them are restarted."""
        (self.volume / STOP).unlink(missing_ok=True)
        while not self.over.is_set():
            if not self.served:
                self.restore()
            try:
                self.serve()
            except StackError as error:
                say(str(error))
                self.over.wait(RESTART_S)
        if not self.served:  # the files on the volume belong to another pod, whose database is newer
            return
        self.save()
        for name in (STOP, ADDRESS):
            (self.volume / name).unlink(missing_ok=True)

    def serve(self) -> None:
        """Run the stack until a stop is requested. Raises StackError if a part dies, or if another host runs the volume's server."""
        stack = Stack(self.volume, environment=self.environment, address=self.address)
        try:
            stack.start_server(self.port)
            self.served = True
            stack.wait_for_server()
            stack.start_workers(self.pools, every_queue=True, more={KEY_VARIABLE: self.key, PUBLIC_API_VARIABLE: f"{self.address}/api"})
            say(f"the Prefect server answers at {self.address}")
            where = {"pod": os.environ.get("RUNPOD_POD_ID", ""), "address": self.address}
            replace(self.volume / ADDRESS, json.dumps(where).encode())
            saved = time.monotonic()
            while not self.over.wait(LOOK_S):
                stack.check()
                if (self.volume / STOP).exists():
                    say("a stop was requested")
                    self.over.set()
                if time.monotonic() - saved > self.save_s:
                    self.save()
                    saved = time.monotonic()
        finally:
            if stack.state is not None:
                stack.stop()

    def restore(self) -> None:
        """Start with the database of an earlier pod, if there is one."""
        self.database.parent.mkdir(parents=True, exist_ok=True)
        if (self.volume / DATABASE).is_file():
            shutil.copyfile(self.volume / DATABASE, self.database)
            say("continues with the database on the volume")

    def save(self) -> None:
        """Copy a consistent snapshot of the database to the volume. Errors are only logged, because the next copy may succeed."""
        if not self.database.exists():
            return
        copy = self.database.with_suffix(".copy")
        copy.unlink(missing_ok=True)
        try:
            with contextlib.closing(sqlite3.connect(self.database)) as source, contextlib.closing(sqlite3.connect(copy)) as target:
                source.backup(target)
            replace(self.volume / DATABASE, copy)
        except (OSError, sqlite3.Error) as error:
            say(f"the database could not be copied to the volume: {error}")


def replace(path: Path, content: bytes | Path) -> None:
    """Write bytes, or the content of a file, to `path` atomically and flushed to disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.{os.getpid()}")
    with new.open("wb") as stream:
        if isinstance(content, bytes):
            stream.write(content)
        else:
            with content.open("rb") as source:
                shutil.copyfileobj(source, stream)
        stream.flush()
        os.fsync(stream.fileno())
    new.replace(path)


def say(text: str) -> None:
    """Print a line to the pod's log."""
    print(f"[server] {text}", flush=True)


def main() -> int:
    """Run until a signal, or the stop file on the volume, requests a stop."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--volume", type=Path, required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--address", required=True, help="URL by which others reach the server; {pod} stands for the pod's id")
    parser.add_argument("--pools", type=json.loads, required=True, help="types of work pools by name, as JSON")
    options = parser.parse_args()
    address = options.address.replace("{pod}", os.environ.get("RUNPOD_POD_ID", ""))
    disk = Path(os.environ[DISK_VARIABLE]) / "server"
    pod = ServerPod(options.volume, disk, port=options.port, address=address, pools=options.pools, environment=os.environ)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: pod.over.set())
    pod.run()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
