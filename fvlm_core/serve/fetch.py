"""Fetch media from `data:` and http(s) addresses, without access to this machine or its networks (no server-side request forgery).

A host name is resolved once, and every resulting IP address is checked. The connection goes to a checked IP address, not to the name, which
could resolve differently by then (DNS rebinding). Redirects are checked in the same way. Only http and https are supported. Proxies set in
the environment are not used, because they would bypass the check.
"""

import base64
import binascii
import ipaddress
import socket
import ssl
import time
from http import HTTPStatus
from string import punctuation
from typing import Any
from urllib.parse import quote, unquote_to_bytes, urljoin, urlsplit

import httpcore

from fvlm_core.serve.limits import MB, Limits, RequestRejectedError

REDIRECTS = 3
REDIRECTING = (301, 302, 303, 307, 308)
AGENT = b"fvlm"


def read_url(url: str, limits: Limits) -> bytes:
    """Return the content of an address. Raises RequestRejectedError."""
    scheme = url[:8].lower().partition(":")[0]
    if scheme == "data":
        return _data(url, limits)
    if scheme in ("http", "https"):
        return _fetch(url, limits)
    raise RequestRejectedError("an address must begin with https://, http:// or data:; files of the server cannot be read")


def check_address(host: str, port: int, *, allow_internal: bool) -> str:
    """Return the IP address to connect to. Raises RequestRejectedError if the host has none, or one outside the public internet."""
    try:
        found = [str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    except (OSError, UnicodeError) as error:
        raise RequestRejectedError(f"the host {host!r} cannot be found") from error
    if not found:
        raise RequestRejectedError(f"the host {host!r} cannot be found")
    if not allow_internal and not all(is_public(address) for address in found):
        raise RequestRejectedError(f"the host {host!r} is not on the public internet", HTTPStatus.FORBIDDEN, code="address_refused")
    return found[0]


def is_public(address: str) -> bool:
    """Whether an IP address is on the public internet. An IPv6 address that embeds an IPv4 address is public only if that one is."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = [ip.ipv4_mapped, ip.sixtofour, *(ip.teredo or ())]
        if ip in ipaddress.ip_network("64:ff9b::/96"):
            inner.append(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF))
        if any(part is not None and not is_public(str(part)) for part in inner):
            return False
        if ip.ipv4_mapped is not None:
            return True
    return ip.is_global and not ip.is_multicast


class _Timely(httpcore.NetworkStream):
    """A connection with a deadline for all reads: httpcore's timeout is per read, and a server may send headers byte by byte."""

    def __init__(self, stream: httpcore.NetworkStream, deadline: float) -> None:
        self.stream, self.deadline = stream, deadline

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise httpcore.ReadTimeout("the deadline has passed")
        return self.stream.read(max_bytes, left)

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self.stream.write(buffer, timeout)

    def close(self) -> None:
        self.stream.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        return _Timely(self.stream.start_tls(ssl_context, server_hostname, timeout), self.deadline)

    def get_extra_info(self, info: str) -> Any:
        return self.stream.get_extra_info(info)


class _Checked(httpcore.SyncBackend):
    """Connects only to checked addresses, with a deadline for all reads."""

    def __init__(self, allow_internal: bool, deadline: float) -> None:
        self.allow_internal, self.deadline = allow_internal, deadline

    def connect_tcp(self, host: str, port: int, *arguments: Any, **options: Any) -> httpcore.NetworkStream:
        address = check_address(host, port, allow_internal=self.allow_internal)
        return _Timely(super().connect_tcp(address, port, *arguments, **options), self.deadline)


def _fetch(url: str, limits: Limits) -> bytes:
    deadline = time.monotonic() + limits.fetch_s
    with httpcore.ConnectionPool(network_backend=_Checked(limits.allow_internal, deadline), max_keepalive_connections=0) as pool:
        for _ in range(REDIRECTS + 1):
            answer = _get(pool, url, deadline, limits)
            if isinstance(answer, bytes):
                return answer
            url = answer
    raise RequestRejectedError(f"the address redirects more than {REDIRECTS} times")


def _get(pool: httpcore.ConnectionPool, url: str, deadline: float, limits: Limits) -> bytes | str:
    """Return the content of an address, or the address it redirects to."""
    try:
        parts = urlsplit(url)
        name, colon, port = parts.netloc.rpartition("@")[2].partition(":")
        host = (name if name.isascii() else name.encode("idna").decode()) + colon + port
        if parts.scheme.lower() not in ("http", "https") or not host:
            raise RequestRejectedError("the address leads to something that is neither http nor https")
        left = max(0.1, deadline - time.monotonic())
        timeouts = dict.fromkeys(("connect", "write", "pool"), left)
        headers = [(b"Host", host.encode("ascii")), (b"User-Agent", AGENT), (b"Accept", b"*/*")]
        # quote non-ASCII characters as browsers do; keep the bytes of a redirect that are not UTF-8
        target = quote(parts._replace(netloc=host, fragment="").geturl(), safe=punctuation, errors="surrogateescape")
        with pool.stream("GET", target, headers=headers, extensions={"timeout": timeouts}) as response:
            location = next((value for name, value in response.headers if name.lower() == b"location"), None)
            if response.status in REDIRECTING and location:
                return urljoin(url, location.decode(errors="surrogateescape"))
            if response.status != HTTPStatus.OK:
                raise RequestRejectedError(f"the address answers with status {response.status}")
            return _content(response, limits)
    except (httpcore.TimeoutException, TimeoutError) as error:
        raise RequestRejectedError(f"the address did not answer within {limits.fetch_s:g} s") from error
    except (httpcore.NetworkError, httpcore.ProtocolError, httpcore.UnsupportedProtocol, OSError, ValueError) as error:
        raise RequestRejectedError("the address cannot be fetched") from error


def _content(response: httpcore.Response, limits: Limits) -> bytes:
    parts, size = [], 0
    for part in response.iter_stream():
        size += len(part)
        if size > limits.upload_bytes:
            raise _too_large(limits)
        parts.append(part)
    return b"".join(parts)


def _data(url: str, limits: Limits) -> bytes:
    head, comma, body = url.partition(",")
    if not comma:
        raise RequestRejectedError("a data: address must have the form data:TYPE;base64,CONTENT")
    if not head.lower().endswith(";base64"):
        content = unquote_to_bytes(body)
    else:
        try:
            content = base64.b64decode(body, validate=True)
        except (binascii.Error, ValueError) as error:
            raise RequestRejectedError("the data: address is not valid base64") from error
    if len(content) > limits.upload_bytes:
        raise _too_large(limits)
    return content


def _too_large(limits: Limits) -> RequestRejectedError:
    what = f"larger than {limits.upload_bytes // MB} MB, which is this server's limit"
    return RequestRejectedError(what, HTTPStatus.REQUEST_ENTITY_TOO_LARGE, code="too_large")
