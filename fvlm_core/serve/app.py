"""The HTTP server: OpenAI's chat completions with videos, and a web page.

A request is counted before its body is read, which bounds the number of requests in memory. Media are fetched and decoded outside the
engine's thread, and cached by content, so that a video is decoded once for all requests about it. Requests that are prefilled together also
encode it once.
"""

import asyncio
import base64
import hmac
import json
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator, Generator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from hashlib import sha256
from http import HTTPStatus
from pathlib import Path
from threading import Event, Lock, Semaphore
from typing import Any
from uuid import uuid4

import anyio.to_thread
import numpy as np
from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from fvlm_core.data.frames import encode_jpeg
from fvlm_core.errors import UserError
from fvlm_core.eval.answerers.foveated import FoveatedAnswerer
from fvlm_core.serve import engine
from fvlm_core.serve.batched_decoding import TextPieces
from fvlm_core.serve.chat_request import ChatRequest, to_model_input
from fvlm_core.serve.decode import Kind, decode
from fvlm_core.serve.fetch import read_url
from fvlm_core.serve.limits import MB, ClientDisconnectedError, Limits, RequestRejectedError
from fvlm_core.serve.load import checked_mode

PAGE = Path(__file__).with_name("page.html")
DECODERS = 2
"""Videos and pictures decoded at the same time."""
KEPT_MEDIA = 16
"""Decoded videos and pictures in the cache; 64 frames of 224 px are 10 MB."""
HEARTBEAT_S = 1.0
"""Interval of the check whether a waiting client is still connected."""
PAGE_POLICY = "default-src 'self'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; media-src blob:"


class Server:
    """State that the endpoints share."""

    def __init__(self, answerer: FoveatedAnswerer, limits: Limits, api_key: str | None) -> None:
        self.answerer, self.limits, self.api_key = answerer, limits, api_key
        self.engine = engine.Engine(answerer.subject, running=limits.running, frames_at_once=limits.frames_at_once)
        self.inside = 0
        """Requests that were admitted and are not answered yet."""
        self.media: OrderedDict[str, np.ndarray] = OrderedDict()
        self.decoding: dict[str, tuple[Lock, int]] = {}
        """The lock of each content that is being decoded, with the number of requests that hold it or wait for it."""
        self.lock, self.decoders = Lock(), Semaphore(DECODERS)
        self.threads = anyio.CapacityLimiter(limits.running + limits.waiting)
        self.created = int(time.time())

    def check_key(self, request: Request) -> None:
        """Raise RequestRejectedError if the server has an API key and the request does not give it."""
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if self.api_key and not hmac.compare_digest(given.encode(), self.api_key.encode()):
            raise RequestRejectedError("the API key is missing or wrong", HTTPStatus.UNAUTHORIZED, code="invalid_api_key")

    async def body(self, request: Request) -> ChatRequest:
        """Read and validate the request's body. Raises RequestRejectedError if it is invalid, too large or too slow."""
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            # this also blocks other sites' pages: a browser sends a CORS preflight before this content type, and gets no permission
            raise RequestRejectedError("the content type must be application/json", HTTPStatus.UNSUPPORTED_MEDIA_TYPE)
        parts, size = [], 0
        try:
            async with asyncio.timeout(self.limits.body_s):
                async for part in request.stream():
                    size += len(part)
                    if size > self.limits.body_bytes:
                        what = f"the request is larger than {self.limits.body_bytes // MB} MB, which is this server's limit"
                        raise RequestRejectedError(what, HTTPStatus.REQUEST_ENTITY_TOO_LARGE, code="too_large")
                    parts.append(part)
        except TimeoutError as error:
            what = f"the request did not arrive within {self.limits.body_s:g} s"
            raise RequestRejectedError(what, HTTPStatus.REQUEST_TIMEOUT) from error
        try:
            return await anyio.to_thread.run_sync(ChatRequest.model_validate_json, b"".join(parts))
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(str(place) for place in first["loc"])
            raise RequestRejectedError(f"{where or 'the body'}: {first['msg']}") from error

    def frames_of(self, url: str, kind: Kind, *, gone: Event) -> np.ndarray:
        """Fetch and decode the frames of an address, or take them from the cache. Runs in a worker thread.

        Raises RequestRejectedError for unusable media, ClientDisconnectedError once `gone` is set because the client has disconnected.
        """
        if gone.is_set():
            raise ClientDisconnectedError
        content = read_url(url, self.limits)
        key = f"{kind} {sha256(content).hexdigest()}"
        with self.lock:
            mine, users = self.decoding.get(key, (Lock(), 0))
            self.decoding[key] = mine, users + 1
        try:
            with _taken(mine, gone):  # concurrent requests with the same media decode it once
                if (found := self.media.get(key)) is None:
                    with _taken(self.decoders, gone):
                        found = decode(content, kind, self.answerer.rule, self.limits, gone)
                with self.lock:
                    self.media[key] = found
                    self.media.move_to_end(key)  # on a hit too: the least recently used is evicted
                    if len(self.media) > KEPT_MEDIA:
                        self.media.popitem(last=False)
        finally:
            with self.lock:
                _, users = self.decoding.pop(key)
                if users > 1:  # others still wait for this lock
                    self.decoding[key] = mine, users - 1
        return found

    async def ask(self, request: Request, body: ChatRequest) -> "ResponseStream":
        """Fetch the media and submit the request to the engine. Raises RequestRejectedError."""
        if body.model != self.answerer.name:
            what = f"there is no model {body.model!r}; this server has {self.answerer.name!r}"
            raise RequestRejectedError(what, HTTPStatus.NOT_FOUND, code="model_not_found")
        try:
            mode = checked_mode(self.answerer, body.mode)
        except UserError as error:
            raise RequestRejectedError(f"{error.what}; {error.fix}") from error
        gone = Event()
        work = partial(to_model_input, body, self.answerer, self.limits, partial(self.frames_of, gone=gone))
        translating = asyncio.create_task(anyio.to_thread.run_sync(work, limiter=self.threads))
        try:
            while not (await asyncio.wait([translating], timeout=HEARTBEAT_S))[0]:
                if await request.is_disconnected():
                    gone.set()  # still wait for the thread: until it frees the body, the request counts
        finally:
            gone.set()
        inputs = translating.result()
        events: asyncio.Queue[engine.Event] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        queued = engine.Request(
            inputs.sample, inputs.chat, mode, inputs.sampling, lambda event: loop.call_soon_threadsafe(events.put_nowait, event), body.gaze
        )
        self.engine.submit(queued)
        return ResponseStream(self, request, body, queued, events)


class ResponseStream:
    """An answer that is being sent to one client."""

    def __init__(
        self, server: Server, request: Request, body: ChatRequest, queued: engine.Request, events: "asyncio.Queue[engine.Event]"
    ) -> None:
        self.server, self.request, self.body, self.queued, self.events = server, request, body, queued, events
        self.id, self.created = f"chatcmpl-{uuid4().hex}", int(time.time())
        self.prompt_tokens = self.completion_tokens = 0
        self.looked: dict[str, Any] | None = None
        self.finished = ""
        self.next_check = time.monotonic() + HEARTBEAT_S
        """When to check next whether the client is still connected."""

    async def pieces(self) -> AsyncIterator[str]:
        """Yield the answer's text in pieces; the first one is empty, and comes after prefill. Raises RequestRejectedError."""
        text, stops = TextPieces(self.server.answerer.subject), self.body.stops
        held = ""
        longest = max(map(len, stops), default=1)
        try:
            while not self.finished:
                event = await self._event()
                if isinstance(event, engine.Failed):
                    raise RequestRejectedError("the answer could not be computed", HTTPStatus.INTERNAL_SERVER_ERROR, code="internal_error")
                if isinstance(event, engine.Started):
                    self.prompt_tokens = event.prompt_tokens
                    self.looked = self._look(event) if self.body.gaze else None
                    yield ""
                    continue
                self.completion_tokens, self.finished = len(event.tokens), event.finished
                held += text.piece(event.tokens, last=bool(event.finished))
                if ends := [held.find(stop) for stop in stops if stop in held]:
                    held, self.finished = held[: min(ends)], "stop"
                keep = 0 if self.finished else longest - 1  # the end may be the beginning of a stop text
                cut = max(0, len(held) - keep)
                said, held = held[:cut], held[cut:]
                if said:
                    yield said
        finally:
            self.queued.cancelled = True

    def completion(self, text: str) -> dict[str, Any]:
        """The complete answer as OpenAI's `chat.completion`."""
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "finish_reason": self.finished, "logprobs": None}
        return self._head("chat.completion") | {"choices": [choice], "usage": self.usage()} | self._extra()

    def chunk(self, delta: dict[str, str], *, end: bool = False) -> dict[str, Any]:
        """A piece as OpenAI's `chat.completion.chunk`."""
        choice = {"index": 0, "delta": delta, "finish_reason": self.finished if end else None, "logprobs": None}
        return self._head("chat.completion.chunk") | {"choices": [choice]}

    async def stream(self) -> AsyncIterator[str]:
        """Yield the answer as server-sent events; an error is sent as an event too, because the status has been sent before."""
        first = True
        try:
            async for piece in self.pieces():
                delta = {"role": "assistant", "content": piece} if first else {"content": piece}
                yield _event(self.chunk(delta) | (self._extra() if first else {}))
                first = False
            yield _event(self.chunk({}, end=True))
            if self.body.stream_options and self.body.stream_options.include_usage:
                yield _event(self._head("chat.completion.chunk") | {"choices": [], "usage": self.usage()})
        except RequestRejectedError as error:
            yield _event(_error(error))
        yield "data: [DONE]\n\n"

    def usage(self) -> dict[str, int]:
        total = self.prompt_tokens + self.completion_tokens
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": self.completion_tokens, "total_tokens": total}

    async def _event(self) -> engine.Event:
        while True:
            if (now := time.monotonic()) >= self.next_check:  # by the clock, not on a timeout: events may come without a pause
                self.next_check = now + HEARTBEAT_S
                if await self.request.is_disconnected():
                    self.queued.cancelled = True
                    raise ClientDisconnectedError
            try:
                return await asyncio.wait_for(self.events.get(), self.next_check - now)
            except TimeoutError:
                continue

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.server.answerer.name}

    def _extra(self) -> dict[str, Any]:
        return {"fvlm": self.looked} if self.looked else {}

    def _look(self, event: engine.Started) -> dict[str, Any]:
        """The shown frames as JPEG, the gaze in each (summing to 1), and its entropy in nats."""
        sample = self.queued.sample
        shown = [index for indexes in sample.media for index in indexes]
        jpegs = [base64.b64encode(encode_jpeg(frame)).decode() for frame in sample.frames]
        return {
            "mode": self.queued.mode,
            "question_first": sample.question_first,
            "frames": [f"data:image/jpeg;base64,{jpegs[index]}" for index in shown],
            "gaze": np.round(event.gaze.astype(float), 5).tolist(),
            "entropy": np.round(event.entropy.astype(float), 4).tolist(),
        }


class _Stream(StreamingResponse):
    """Streams server-sent events; the request counts until the stream ends, for whatever reason."""

    def __init__(self, answer: ResponseStream) -> None:
        super().__init__(answer.stream(), media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self.answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.answer.queued.cancelled = True
            self.answer.server.inside -= 1


def create_app(answerer: FoveatedAnswerer, limits: Limits | None = None, *, api_key: str | None = None) -> FastAPI:
    """Create the application; its engine runs for the application's lifespan."""
    server = Server(answerer, limits or Limits(), api_key)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
        server.engine.start()
        yield
        await asyncio.to_thread(server.engine.close)

    app = FastAPI(title="fVLM", lifespan=lifespan, openapi_url=None)

    @app.exception_handler(RequestRejectedError)
    async def refused(_: Request, error: RequestRejectedError) -> JSONResponse:
        headers = {"Retry-After": "1"} if error.status == HTTPStatus.TOO_MANY_REQUESTS else None
        return JSONResponse(_error(error), error.status, headers)

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> JSONResponse:
        """Report the framework's own errors: an unknown path or method."""
        refusal = RequestRejectedError(
            f"there is no {request.method} {request.url.path}", HTTPStatus(error.status_code), code="unknown_url"
        )
        return JSONResponse(_error(refusal), error.status_code, error.headers)

    @app.api_route("/", methods=["GET", "HEAD"], response_class=HTMLResponse)
    async def page() -> HTMLResponse:
        return HTMLResponse(PAGE.read_text(), headers={"Content-Security-Policy": PAGE_POLICY})

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "inside": server.inside}

    def model() -> dict[str, Any]:
        modes = {"modes": list(answerer.subject.model.modes), "upload_mb": server.limits.upload_mb, "video_s": server.limits.video_s}
        return {"id": answerer.name, "object": "model", "created": server.created, "owned_by": "fvlm", "fvlm": modes}

    @app.get("/v1/models")
    async def models(request: Request) -> dict[str, Any]:
        server.check_key(request)
        return {"object": "list", "data": [model()]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str, request: Request) -> dict[str, Any]:
        server.check_key(request)
        if name != answerer.name:
            raise RequestRejectedError(f"there is no model {name!r}", HTTPStatus.NOT_FOUND, code="model_not_found")
        return model()

    @app.post("/v1/chat/completions", response_model=None)
    async def complete(request: Request) -> Response:
        server.check_key(request)
        if server.inside >= server.limits.running + server.limits.waiting:
            raise RequestRejectedError(
                "too many requests are waiting; try again later", HTTPStatus.TOO_MANY_REQUESTS, code="rate_limit_exceeded"
            )
        server.inside += 1
        streaming = False
        try:
            body = await server.body(request)
            answer = await server.ask(request, body)
            if body.stream:
                streaming = True
                return _Stream(answer)
            return JSONResponse(answer.completion("".join([piece async for piece in answer.pieces()])))
        finally:
            if not streaming:
                server.inside -= 1

    return app


@contextmanager
def _taken(place: "Lock | Semaphore", gone: Event) -> Generator[None]:
    """Acquire a lock or semaphore, and hold it in the `with` block. Raises ClientDisconnectedError if the client disconnects before."""
    while not place.acquire(timeout=HEARTBEAT_S):
        if gone.is_set():
            raise ClientDisconnectedError
    try:
        if gone.is_set():  # acquired too late
            raise ClientDisconnectedError
        yield
    finally:
        place.release()


def _error(error: RequestRejectedError) -> dict[str, Any]:
    kind = "server_error" if error.status >= HTTPStatus.INTERNAL_SERVER_ERROR else "invalid_request_error"
    return {"error": {"message": error.message, "type": kind, "param": None, "code": error.code}}


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value)}\n\n"
