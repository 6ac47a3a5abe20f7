"""Prefect's server, with two additions: `python -m infra.server --host HOST --port PORT`, its settings from the environment.

* Requests that change something wait for each other, and one that SQLite was too busy for is tried again here. Prefect answers it
  with status 503 and leaves the next try to its clients; a browser makes none, and the click in the UI is lost.
* The page `/open#PASSWORD` keeps the password where the UI's own login page would, so that one link opens the UI. What follows
  the # never leaves the browser, so it is in no log.
"""

import argparse
import asyncio
import json
import random
from http import HTTPStatus

import uvicorn
from prefect.server.api.server import create_app
from prefect.settings import get_current_settings
from starlette.requests import Request
from starlette.responses import HTMLResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

OPEN_PATH = "/open"
PAGE = """<!doctype html><title>fVLM</title><script>
localStorage.setItem("prefect-password", btoa(decodeURIComponent(location.hash.slice(1))));
location.replace(%s);
</script>"""
DELAYS_S = (0.02, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2)
"""Before each new try. Most conflicts are over at once: a transaction had read what another one then changed."""


READS = ("filter", "count", "history", "paginate")
"""Words in the paths of POST requests that only read; those need not wait."""


class OneWriterAtATime:
    """ASGI middleware: runs changing requests one by one, and again while the answer is 503, as Prefect's own client would send them.

    SQLite has one writer at a time in any case. What is left to conflict with are the server's own services.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app, self.turn = app, asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            return await self.app(scope, receive, send)
        body = await _body(receive)  # before the wait: a client that sends slowly keeps nobody else from writing
        if any(word in scope["path"] for word in READS):
            return await self._run(scope, body, receive, send)
        async with self.turn:
            return await self._run(scope, body, receive, send)

    async def _run(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        for delay in DELAYS_S:
            if not await self._unavailable(scope, body, receive, send):
                return
            await asyncio.sleep(delay * random.uniform(0.5, 1.5))
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


async def _body(receive: Receive) -> bytes:
    """The request's, all of it."""
    body = b""
    while True:
        message = await receive()
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


def app() -> ASGIApp:
    """Prefect's application with both additions."""
    served = create_app(final=True)
    page = PAGE % json.dumps(get_current_settings().server.ui.serve_base or "/")

    def open_page(_request: Request) -> HTMLResponse:
        return HTMLResponse(page)

    served.router.routes.insert(0, Route(OPEN_PATH, open_page))
    return OneWriterAtATime(served)


def main() -> None:
    """Serve until a signal ends it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", required=True, type=int)
    options = parser.parse_args()
    settings = get_current_settings().server
    uvicorn.run(
        app(),
        host=options.host,
        port=options.port,
        timeout_keep_alive=settings.api.keepalive_timeout,
        ws_ping_interval=settings.api.websocket_ping_interval,
        ws_ping_timeout=settings.api.websocket_ping_timeout,
        log_level=settings.logging_level.lower(),
    )


if __name__ == "__main__":
    main()
