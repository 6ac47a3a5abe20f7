"""A pod's network connection that can be cut: the URLs in its environment go through its own forwarder."""

import contextlib
import socket
import threading
from collections.abc import Mapping
from urllib.parse import urlsplit, urlunsplit

CHUNK_BYTES = 65536


class Network:
    """Forwards local ports to the addresses that a pod was given."""

    def __init__(self) -> None:
        self.up = True
        self._listeners: list[socket.socket] = []
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()

    def through(self, environment: Mapping[str, str], names: tuple[str, ...]) -> dict[str, str]:
        """Return the environment with the URLs of the variables `names` replaced by ones that go through this network."""
        led = {name: self._forward(environment[name]) for name in names if environment.get(name)}
        return {**environment, **led}

    def cut(self) -> None:
        """Cut all connections and refuse new ones."""
        with self._lock:
            self.up = False
            for one in self._open:
                with contextlib.suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Cut all connections and close the ports."""
        self.cut()
        for listener in self._listeners:
            listener.close()

    def _forward(self, url: str) -> str:
        """Return a local URL that forwards to `url`. URLs that are not HTTP are returned unchanged."""
        parts = urlsplit(url)
        port = parts.port or (443 if parts.scheme == "https" else 80)
        if parts.scheme != "http" or parts.hostname is None:  # a certificate is only valid for its own host name
            return url
        listener = socket.create_server(("127.0.0.1", 0))
        self._listeners.append(listener)
        threading.Thread(target=self._accept, args=(listener, (parts.hostname, port)), daemon=True).start()
        user = f"{parts.username}:{parts.password}@" if parts.username else ""
        return urlunsplit(parts._replace(netloc=f"{user}127.0.0.1:{listener.getsockname()[1]}"))

    def _accept(self, listener: socket.socket, target: tuple[str, int]) -> None:
        while True:
            try:
                inside, _ = listener.accept()
            except OSError:
                return
            try:
                outside = socket.create_connection(target, timeout=10) if self.up else None
            except OSError:
                outside = None
            if outside is None:
                inside.close()
                continue
            outside.settimeout(None)
            with self._lock:
                self._open |= {inside, outside}
            for source, sink in ((inside, outside), (outside, inside)):
                threading.Thread(target=self._copy, args=(source, sink), daemon=True).start()

    def _copy(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(CHUNK_BYTES):
                sink.sendall(data)
        for one in (source, sink):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            with self._lock:
                self._open.discard(one)
        source.close()
