"""Prefect's server, with five additions. `python -m infra.server --socket N` serves on the inherited socket N; its settings are in the
environment.

* Write requests run one at a time, and a request that fails because SQLite is busy is retried here. Prefect answers it with status 503
  and leaves the retry to its clients; a browser does not retry, so the click in the UI is lost.
* Messages on a worker's websocket wait for SQLite's lock. Nothing retries them: a failed handshake closes the websocket, and a failed
  heartbeat is lost.
* A statement that SQLite refused is closed where it was run. Otherwise it is closed when its last reference is dropped, mostly in the
  event loop. Closing waits for the connection, which may be waiting for a lock whose owner waits for the event loop; the server then did
  not answer for a minute, until SQLite's own timeout.
* The page `/open#PASSWORD` stores the password where the UI's own login page would, so that a single link opens the UI. The part after
  the # never leaves the browser, so it appears in no log.
* Less work: a new database is a copy of a migrated one with Prefect's block types (`new_database.py`), and each schema is checked only
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
"""Delay before each retry."""


READS = ("filter", "count", "history", "paginate")
"""Words in the paths of POST requests that only read and need not wait for writers."""


LOCK_FIRST: ContextVar[bool] = ContextVar("LOCK_FIRST", default=False)
"""Whether transactions of this request, or of this websocket, take SQLite's write lock when they begin."""
HELD: ContextVar[bool] = ContextVar("HELD", default=False)
"""Whether a transaction of this request holds that lock."""


class ClosingCursor(sqlite3.Cursor):
    """Closes itself when it fails. Otherwise the traceback of the exception keeps the failed cursor and its statement open."""

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
    """A connection whose cursors close themselves when they fail."""

    def cursor(self, factory: Any = ClosingCursor) -> Any:
        return super().cursor(factory)


def _closing(_dialect: Dialect, _record: ConnectionPoolEntry, _arguments: list[Any], options: dict[str, Any]) -> None:
    """SQLAlchemy's `do_connect` hook: make the connection a ClosingConnection."""
    options["factory"] = ClosingConnection


class LockingSqlite(AioSqliteConfiguration):
    """SQLite whose transactions wait for the write lock when they begin, if LOCK_FIRST is set.

    Prefect begins most transactions as readers. If one has read, and writes after another one has written, SQLite refuses it at once,
    whatever the timeout.
    """

    async def engine(self) -> AsyncEngine:
        """Return an engine whose connections are ClosingConnections."""
        engine = await super().engine()
        if not event.contains(engine.sync_engine, "do_connect", _closing):
            event.listen(engine.sync_engine, "do_connect", _closing)
        return engine

    @asynccontextmanager
    async def begin_transaction(
        self, session: AsyncSession, with_for_update: bool = False
    ) -> AsyncGenerator[AsyncSessionTransaction, None]:
        first = LOCK_FIRST.get()
        if first and HELD.get():  # a second transaction within the first would wait forever
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
    """ASGI middleware that runs write requests one at a time and, like Prefect's own client, retries them while the answer is 503.

    SQLite has only one writer at a time in any case. The remaining conflicts are with the server's own services: every second attempt
    takes the write lock first, which keeps them out. The other attempts do not, because some requests begin a transaction within another.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app, self.turn = app, asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            LOCK_FIRST.set(True)
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            return await self.app(scope, receive, send)
        body = await _body(receive)  # before waiting, so that a slow client does not block other writers
        if body is None:  # the client has disconnected
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
        """Run the request once. Returns whether the answer was 503; nothing of such an answer is sent."""
        unavailable = False

        async def answer(message: Message) -> None:
            nonlocal unavailable
            if message["type"] == "http.response.start":
                unavailable = message["status"] == HTTPStatus.SERVICE_UNAVAILABLE
            if not unavailable:
                await send(message)

        try:
            await self.app(dict(scope), _replay(body, receive), answer)
        except Exception:  # starlette re-raises the cause after it has answered
            if not unavailable:
                raise
        return unavailable


async def _body(receive: Receive) -> bytes | None:
    """Return the complete body of a request, or None if the client disconnects first."""
    body = b""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        body += message.get("body", b"")
        if not message.get("more_body", False):
            return body


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that yields the body once more, then the messages after it."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


def prepared_database() -> bool:
    """Install LockingSqlite, and create the database if needed. Returns whether the database has all of Prefect's block types."""
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
    """Serve on the socket with file descriptor `listening` until a signal ends the server."""
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
    """Serve until a signal ends the server."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--socket", required=True, type=int, help="file descriptor of a listening socket")
    options = parser.parse_args()
    check_schemas_once()
    needless = (PREFECT_API_BLOCKS_REGISTER_ON_START, PREFECT_MEMOIZE_BLOCK_AUTO_REGISTRATION) if prepared_database() else ()
    with temporary_settings(dict.fromkeys(needless, False)):
        serve(options.socket)


if __name__ == "__main__":
    main()
