"""A small HTTP server for local media, so that files, archives' members and web addresses take the same way through video2dataset."""

import shutil
import threading
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

from fvlm_core.data.media import MediaError, UnreachableError, open_media


class FileServer:
    """Serves the media that it is asked about and no other, on a free port of this machine, while its `with` block runs."""

    def __init__(self, find: Callable[[str], str | None]) -> None:
        """`find`: the reference (`fvlm_core.data.media`) behind the path of a URL, which starts with a slash; None where there is none."""

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"  # keeps connections open

            def do_GET(self) -> None:
                reference = find(self.path)
                try:
                    if reference is None:
                        raise MediaError("file not found")
                    content, size = open_media(reference)
                except MediaError as error:
                    status = HTTPStatus.SERVICE_UNAVAILABLE if isinstance(error, UnreachableError) else HTTPStatus.NOT_FOUND
                    self.send_error(status, str(error).encode("ascii", "replace").decode())
                    return
                with content:
                    self.send_response(HTTPStatus.OK)
                    self.send_header("Content-Type", "application/octet-stream")
                    self.send_header("Content-Length", str(size))
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
