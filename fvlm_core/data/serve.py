"""A small HTTP server for local videos, so that files and web addresses take the same way through video2dataset."""

import shutil
import threading
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self


class FileServer:
    """Serves the files that it is asked about and no other, on a free port of this machine, while its `with` block runs."""

    def __init__(self, find: Callable[[str], Path | None]) -> None:
        """`find`: the file behind the path of a URL, which starts with a slash; None where there is none."""

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"  # keeps connections open

            def do_GET(self) -> None:
                path = find(self.path)
                if path is None or not path.is_file():
                    self.send_error(HTTPStatus.NOT_FOUND, "file not found")
                    return
                with path.open("rb") as content:
                    self.send_response(HTTPStatus.OK)
                    self.send_header("Content-Type", "application/octet-stream")
                    self.send_header("Content-Length", str(path.stat().st_size))
                    self.end_headers()
                    shutil.copyfileobj(content, self.wfile)

            def log_message(self, format: str, *args: Any) -> None:
                """Requests are not worth a line each."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self.server.serve_forever, daemon=True, name="file-server").start()
        return self

    def __exit__(self, *error: object) -> None:
        self.server.shutdown()
        self.server.server_close()
