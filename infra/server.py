"""Prefect's server, with five additions: `python -m infra.server --socket N` serves on the inherited socket
N; its settings are in the environment.

* Requests that change something wait for each other, and one that SQLite was too busy for is tried again here. Prefect answers it
  with status 503 and leaves the next try to its clients; a browser makes none, and the click in the UI is lost.
* What a worker says on its channel waits for SQLite's lock. Nobody tries it again: a greeting that fails closes the channel, and a
  heartbeat that fails is lost.
* A statement that SQLite refused is closed where it was run. Left to itself it is closed by whoever drops the last reference to it, mostly
  the event loop; and that waits for the connection, which may be waiting for a lock whose owner waits for the event loop. The
  server did not answer for a minute then, until SQLite's own time-out.
* The page `/open#PASSWORD` keeps the password where the UI's own login page would, so that one link opens the UI. What follows
  the # never leaves the browser, so it is in no log.
* Less work: a new database is a copy of one that is migrated and has Prefect's types of blocks (`new_database.py`), a schema is checked
  once (`schema_checks.py`).
"""

import argparse
import asyncio
import json
import random
import socket
import sqlite3
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from contextvars import ContextVar
from http import HTTPStatus
from pathlib import Path
from typing import Any, Self

import uvicorn
from prefect.server.api.server import create_app
from prefect.server.database.configurations import AioSqliteConfiguration
from prefect.server.database.dependencies import MODELS_DEPENDENCIES
from prefect.server.utilities.database import get_dialect
from prefect.settings import (
    PREFECT_API_BLOCKS_REGISTER_ON_START,
    PREFECT_MEMOIZE_BLOCK_AUTO_REGISTRATION,
    get_current_settings,
    temporary_settings,
)
from sqlalchemy import Dialect, event
from sqlalchemy.engine import make_url
from sqlalchemy.exc import OperationalError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, AsyncSessionTransaction
from sqlalchemy.pool import ConnectionPoolEntry
from starlette.requests import Request
from starlette.responses import HTMLResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from infra.new_database import begin, has_block_types
from infra.schema_checks import check_schemas_once

OPEN_PATH = "/open"
PAGE = """<!doctype html><title>fVLM</title><script>
localStorage.setItem("prefect-password", btoa(decodeURIComponent(location.hash.slice(1))));
location.replace(%s);
</script>"""
DELAYS_S = (0.0, 0.1, 0.1, 0.2, 0.2, 0.4, 0.4, 0.8, 0.8, 1.6, 1.6)
"""Before each new try."""


READS = ("filter", "count", "history", "paginate")
"""Words in the paths of POST requests that only read; those need not wait."""


LOCK_FIRST: ContextVar[bool] = ContextVar("LOCK_FIRST", default=False)
"""Whether transactions of this request, or of this websocket, take SQLite's write lock when they begin."""
HELD: ContextVar[bool] = ContextVar("HELD", default=False)
"""Whether a transaction of this request has it."""


class ClosingCursor(sqlite3.Cursor):
    """Closes itself when it fails. Python and SQLAlchemy leave a failed one open, with its statement, in the exception's traceback."""

    def execute(self, sql: str, parameters: Any = (), /) -> Self:
        try:
            return super().execute(sql, parameters)
        except sqlite3.Error:
            self.close()
            raise

    def executemany(self, sql: str, parameters: Any, /) -> Self:
        try:
            return super().executemany(sql, parameters)
        except sqlite3.Error:
            self.close()
            raise


class ClosingConnection(sqlite3.Connection):
    """Its cursors close themselves when they fail."""

    def cursor(self, factory: Any = ClosingCursor) -> Any:
        return super().cursor(factory)


def _closing(_dialect: Dialect, _record: ConnectionPoolEntry, _arguments: list[Any], options: dict[str, Any]) -> None:
    """Before SQLAlchemy connects."""
    options["factory"] = ClosingConnection


class LockingSqlite(AioSqliteConfiguration):
    """SQLite whose transactions wait for the write lock where LOCK_FIRST says so.

    Prefect begins most of them as readers. One that has read, and writes after another one has written, is refused at once,
    whatever the time-out.
    """

    async def engine(self) -> AsyncEngine:
        """Its connections are ClosingConnections."""
        engine = await super().engine()
        if not event.contains(engine.sync_engine, "do_connect", _closing):
            event.listen(engine.sync_engine, "do_connect", _closing)
        return engine

    @asynccontextmanager
    async def begin_transaction(
        self, session: AsyncSession, with_for_update: bool = False
    ) -> AsyncGenerator[AsyncSessionTransaction, None]:
        first = LOCK_FIRST.get()
        if first and HELD.get():  # a second transaction within the first would wait for ever
            error = sqlite3.OperationalError("database is locked by this request itself")
            error.sqlite_errorname = "SQLITE_BUSY"
            raise OperationalError("BEGIN IMMEDIATE", {}, error)
        token = HELD.set(first)
        try:
            async with super().begin_transaction(session, with_for_update=first or with_for_update) as transaction:
                yield transaction
        finally:
            HELD.reset(token)


class OneWriterAtATime:
    """ASGI middleware: runs changing requests one by one, and again while the answer is 503, as Prefect's own client would send them.

    SQLite has one writer at a time in any case. What is left to conflict with are the server's own services: every second try
    locks them out first. The others do not, because some requests begin a transaction within another.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app, self.turn = app, asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            LOCK_FIRST.set(True)
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            return await self.app(scope, receive, send)
        body = await _body(receive)  # before the wait: a client that sends slowly keeps nobody else from writing
        if body is None:  # the client has gone
            return None
        if scope["method"] == "POST" and any(word in scope["path"] for word in READS):
            return await self._run(scope, body, receive, send)
        async with self.turn:
            return await self._run(scope, body, receive, send)

    async def _run(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        for number, delay in enumerate(DELAYS_S):
            LOCK_FIRST.set(number % 2 == 1)
            if not await self._unavailable(scope, body, receive, send):
                return
            await asyncio.sleep(delay * random.uniform(0.5, 1.5))
        LOCK_FIRST.set(True)
        await self.app(dict(scope), _replay(body, receive), send)

    async def _unavailable(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> bool:
        """Run the request once. Returns whether the answer was 503, of which nothing has been sent."""
        unavailable = False

        async def answer(message: Message) -> None:
            nonlocal unavailable
            if message["type"] == "http.response.start":
                unavailable = message["status"] == HTTPStatus.SERVICE_UNAVAILABLE
            if not unavailable:
                await send(message)

        try:
            await self.app(dict(scope), _replay(body, receive), answer)
        except Exception:  # starlette raises the cause once more, after the answer
            if not unavailable:
                raise
        return unavailable


async def _body(receive: Receive) -> bytes | None:
    """The request's, all of it; None where the client went before it was sent."""
    body = b""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        body += message.get("body", b"")
        if not message.get("more_body", False):
            return body


def _replay(body: bytes, receive: Receive) -> Receive:
    """Gives the body once more, then what comes after it."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


def prepared_database() -> bool:
    """See to it that SQLite locks as it should, and begins with a database. Returns whether that has all of Prefect's types of blocks."""
    url = get_current_settings().server.database.connection_url
    if not url or get_dialect(url.get_secret_value()).name != "sqlite":
        return False
    MODELS_DEPENDENCIES["database_config"] = config = LockingSqlite(url.get_secret_value())
    file = Path(make_url(config.connection_url).database or "")
    if config.is_inmemory():
        return False
    begin(file)
    return file.exists() and has_block_types(file)


def app() -> ASGIApp:
    """Prefect's application with the additions."""
    served = create_app(final=True)
    page = PAGE % json.dumps(get_current_settings().server.ui.serve_base or "/")

    def open_page(_request: Request) -> HTMLResponse:
        return HTMLResponse(page)

    served.router.routes.insert(0, Route(OPEN_PATH, open_page))
    return OneWriterAtATime(served)


def serve(listening: int) -> None:
    """Serve on a socket until a signal ends it."""
    settings = get_current_settings().server
    config = uvicorn.Config(
        app(),
        timeout_keep_alive=settings.api.keepalive_timeout,
        ws_ping_interval=settings.api.websocket_ping_interval,
        ws_ping_timeout=settings.api.websocket_ping_timeout,
        log_level=settings.logging_level.lower(),
    )
    uvicorn.Server(config).run(sockets=[socket.socket(fileno=listening)])


def main() -> None:
    """Serve until a signal ends it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--socket", required=True, type=int, help="file descriptor of a listening socket")
    options = parser.parse_args()
    check_schemas_once()
    needless = (PREFECT_API_BLOCKS_REGISTER_ON_START, PREFECT_MEMOIZE_BLOCK_AUTO_REGISTRATION) if prepared_database() else ()
    with temporary_settings(dict.fromkeys(needless, False)):
        serve(options.socket)


if __name__ == "__main__":
    main()
