"""Run the server on a free port inside this process, and build requests for it. The tests use it too."""

import base64
import socket
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import uvicorn
from fastapi import FastAPI


@contextmanager
def running(app: FastAPI) -> Generator[str]:
    """Serve `app` until the context ends; yields the address."""
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def data_url(content: bytes, kind: str = "video/mp4") -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def about(url: str, question: str, *, kind: str = "video_url", first: bool = False) -> list[dict[str, Any]]:
    """The messages of one question about a video."""
    parts: list[dict[str, Any]] = [{"type": kind, kind: {"url": url}}, {"type": "text", "text": question}]
    return [{"role": "user", "content": parts[::-1] if first else parts}]
