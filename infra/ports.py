"""Ports of this machine. A port is claimed by listening on it immediately: a starting server would do so only half a minute later, and
two servers could choose the same port."""

import errno
import socket

FIRST_PORT = 4200
"""Prefect's default port. If it is in use and no port was requested, the next free one is used."""
PORTS_TRIED = 50
LOCALHOST = "127.0.0.1"


def listen(port: int, host: str = LOCALHOST) -> socket.socket:
    """Return a socket that listens on the port. Raises OSError, with a message for the user, if that is not possible."""
    if not 0 < port < 1 << 16:
        raise OSError(errno.EINVAL, "there is no such port; they go from 1 to 65535")
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, dualstack_ipv6=host == "::" and socket.has_dualstack_ipv6())
    except OSError as error:
        taken = error.errno == errno.EADDRINUSE
        raise OSError(error.errno, "it is taken by another program" if taken else error.strerror or str(error)) from None


def listen_on_free(host: str = LOCALHOST) -> socket.socket | None:
    """Return a socket that listens on Prefect's port or the next free one; None if the first `PORTS_TRIED` are all taken."""
    for port in range(FIRST_PORT, FIRST_PORT + PORTS_TRIED):
        try:
            return listen(port, host)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
    return None


def address_of(host: str, port: int) -> str:
    """Return the URL of a server on this host and port."""
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"
