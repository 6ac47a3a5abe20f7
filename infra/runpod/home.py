"""The program of the small pod that keeps the Prefect server and the workers, so that nobody's own machine has to stay on.

The server's database is on the pod's own disk, because SQLite cannot be on a network file system. It is copied to the volume every minute
and at the end; the next pod begins with the copy. What is started here ends with this program: at the pod's deadline (the pod's program
sends SIGTERM before it), or when somebody asks for the end by a file on the volume.

The account's key comes under a name of its own: RunPod puts a key that may end this pod only in the usual place. Workers get it, the
server does not.
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
"""On the volume: the copy of the database, the wish that the server ends, and where it answers."""
SAVE_S = 60.0
LOOK_S = 1.0
RESTART_S = 5.0
"""After a part of the stack has died, until all of it is started again."""


class Home:
    """Server and workers, as long as they are wanted."""

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
        """`disk` is a folder of this host's own; `pools` are the types of the workers' pools by name."""
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
        """Whether the volume's server has been this one."""

    def run(self) -> None:
        """All of it; what dies is started again."""
        (self.volume / STOP).unlink(missing_ok=True)
        while not self.over.is_set():
            if not self.served:
                self.restore()
            try:
                self.serve()
            except StackError as error:
                say(str(error))
                self.over.wait(RESTART_S)
        if not self.served:  # what is there is another's, who knows more
            return
        self.save()
        for name in (STOP, ADDRESS):
            (self.volume / name).unlink(missing_ok=True)

    def serve(self) -> None:
        """Until the end is asked for. Raises StackError where a part has died, or another host keeps the volume's server."""
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
                    say("its end was asked for")
                    self.over.set()
                if time.monotonic() - saved > self.save_s:
                    self.save()
                    saved = time.monotonic()
        finally:
            if stack.state is not None:
                stack.stop()

    def restore(self) -> None:
        """Begin with what an earlier pod knew."""
        self.database.parent.mkdir(parents=True, exist_ok=True)
        if (self.volume / DATABASE).is_file():
            shutil.copyfile(self.volume / DATABASE, self.database)
            say("goes on with the database on the volume")

    def save(self) -> None:
        """Copy the database to the volume, as it is at one moment. A volume that is away or full stops nothing: there is a next time."""
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
    """Write the content, or a file's, flushed and in one step: readers see all of it or nothing."""
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
    """A line in the pod's log."""
    print(f"[server] {text}", flush=True)


def main() -> int:
    """Until a signal, or a file on the volume, asks for the end."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--volume", type=Path, required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--address", required=True, help="by which others reach the server; {pod} stands for the pod's id")
    parser.add_argument("--pools", type=json.loads, required=True, help="types of work pools by name, as JSON")
    options = parser.parse_args()
    address = options.address.replace("{pod}", os.environ.get("RUNPOD_POD_ID", ""))
    disk = Path(os.environ[DISK_VARIABLE]) / "server"
    home = Home(options.volume, disk, port=options.port, address=address, pools=options.pools, environment=os.environ)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: home.over.set())
    home.run()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
