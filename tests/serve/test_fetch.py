"""Addresses in requests: none leads into the server's machine or networks, however it is written, redirected or resolved."""

import base64
import socket
import threading
from collections.abc import Iterator
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from fvlm_core.serve import fetch
from fvlm_core.serve.fetch import check_address, is_public, read_url
from fvlm_core.serve.limits import Limits, RequestRejectedError

INSIDE = Limits(upload_mb=1, fetch_s=1.5, allow_internal=True)


class Site(BaseHTTPRequestHandler):
    """Says what it was asked for, redirects, sends too much, or hangs."""

    asked: list[tuple[str, str]] = []
    hang = threading.Event()

    def do_GET(self) -> None:
        Site.asked.append((self.path, self.headers["Host"]))
        if self.path.startswith("/to/"):
            self.send_response(HTTPStatus.FOUND)
            self.send_header("Location", self.path.removeprefix("/to/"))
            self.end_headers()
        elif self.path == "/missing":
            self.send_error(HTTPStatus.NOT_FOUND)
        elif self.path == "/hang":
            Site.hang.wait(10)
        elif self.path == "/drip":
            self.send_response(HTTPStatus.OK)
            self.flush_headers()
            for _ in range(15):
                self.wfile.write(b"X-Slow: a\r\n")
                Site.hang.wait(0.1)
            self.end_headers()
        elif self.path == "/moved":
            self.send_response(HTTPStatus.FOUND)
            self.send_header("Location", "/видео.mp4".encode().decode("latin-1"))  # UTF-8, as servers send it
            self.end_headers()
        else:
            self.send_response(HTTPStatus.OK)
            self.end_headers()
            for _ in range(20 if self.path == "/large" else 0):
                self.wfile.write(bytes(100_000))
            self.wfile.write(self.path.encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Site)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    Site.hang.set()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1", "localhost", "0.0.0.0", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "224.0.0.1",
        "2130706433", "0x7f000001", "127.1", "[::1]", "[::]", "[fe80::1]", "[fc00::1]", "[::ffff:127.0.0.1]", "[::ffff:169.254.169.254]",
        "[64:ff9b::7f00:1]", "[2002:7f00:1::]", "user@127.0.0.1", "8.8.8.8@127.0.0.1",
    ],
)  # fmt: skip
def test_internal_addresses_are_refused_however_they_are_written(host):
    with pytest.raises(RequestRejectedError) as caught:
        read_url(f"http://{host}:9/clip.mp4", Limits(fetch_s=1))
    assert caught.value.status == HTTPStatus.FORBIDDEN


@pytest.mark.parametrize("address", ["8.8.8.8", "2001:4860:4860::8888", "::ffff:8.8.8.8", "64:ff9b::808:808"])
def test_public_addresses_are_public(address):
    assert is_public(address)


@pytest.mark.parametrize(
    "url", ["file:///etc/passwd", "/etc/passwd", "ftp://8.8.8.8/", "gopher://8.8.8.8/", "//8.8.8.8/", "concat:a|b", ""]
)
def test_other_schemes_are_refused(url):
    with pytest.raises(RequestRejectedError, match="must begin with"):
        read_url(url, INSIDE)


def test_the_connection_goes_to_the_address_that_was_checked(monkeypatch, site):
    """A name that means another address a moment later changes nothing; one that has an internal address among others is refused."""
    answers = [["93.184.216.34"], ["127.0.0.1"], ["93.184.216.34", "127.0.0.1"]]
    connected = []

    def resolve(host, port, *_, **__):
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in answers.pop(0)]

    def connect(address, *_, **__):
        connected.append(address)
        raise ConnectionRefusedError

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr(socket, "create_connection", connect)
    with pytest.raises(RequestRejectedError, match="cannot be fetched"):
        read_url("http://rebinding.example/clip.mp4", Limits())
    assert connected == [("93.184.216.34", 80)]
    for _ in range(2):
        with pytest.raises(RequestRejectedError, match="not on the public internet"):
            check_address("rebinding.example", 80, allow_internal=False)


def test_a_redirect_is_checked_like_the_first_address(monkeypatch, site):
    port = site.rpartition(":")[2]
    monkeypatch.setattr(fetch, "is_public", lambda address: address == "127.0.0.1")
    assert read_url(f"{site}/to/{site}/clip.mp4", Limits()) == b"/clip.mp4"
    Site.asked.clear()
    for target in (f"http://127.0.0.2:{port}/secret", f"http://localhost.localdomain@127.0.0.3:{port}/secret"):
        with pytest.raises(RequestRejectedError):
            read_url(f"{site}/to/{target}", Limits())
    assert not any("secret" in path for path, _ in Site.asked if not path.startswith("/to/"))
    with pytest.raises(RequestRejectedError, match="neither http nor https"):
        read_url(f"{site}/to/file:///etc/passwd", Limits())


def test_fetching_has_limits(site):
    assert read_url(f"{site}/clip.mp4?a=b#part", INSIDE) == b"/clip.mp4?a=b"
    assert Site.asked[-1][1] == site.removeprefix("http://")
    often = "/to/" + "/to/".join([site] * 4) + "/end"
    for path, message in (
        ("/missing", "status 404"),
        ("/large", "larger than 1 MB"),
        ("/hang", "did not answer"),
        (often, "more than 3"),
        ("/to/http://[bad", "cannot be fetched"),
    ):
        with pytest.raises(RequestRejectedError, match=message):
            read_url(f"{site}{path}", INSIDE)


def test_headers_that_never_end_are_not_waited_for(site):
    with pytest.raises(RequestRejectedError, match=r"did not answer within 0\.5 s"):
        read_url(f"{site}/drip", Limits(fetch_s=0.5, allow_internal=True))


def test_addresses_may_hold_any_character(monkeypatch, site):
    quoted = b"/%D0%B2%D0%B8%D0%B4%D0%B5%D0%BE.mp4"
    assert read_url(f"{site}/видео.mp4?a=%20 b", INSIDE) == quoted + b"?a=%20%20b"
    assert read_url(f"{site}/moved", INSIDE) == quoted
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, port, **_: [(0, 0, 0, "", (f"{host}:{port}", port))])
    monkeypatch.setattr(fetch, "is_public", lambda address: address != "xn--bcher-kva.example:8080")
    with pytest.raises(RequestRejectedError, match=r"'xn--bcher-kva\.example' is not on the public internet"):
        read_url("http://bücher.example:8080/", Limits())


def test_data_addresses():
    assert read_url("data:video/mp4;base64," + base64.b64encode(b"clip").decode(), INSIDE) == b"clip"
    assert read_url("data:text/plain,a%20b", INSIDE) == b"a b"
    for url, message in (
        ("data:video/mp4;base64", "form"),
        ("data:;base64,%%%", "base64"),
        ("data:," + "a" * 1_000_001, "larger than 1 MB"),
    ):
        with pytest.raises(RequestRejectedError, match=message):
            read_url(url, INSIDE)
