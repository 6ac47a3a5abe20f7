"""Ports of this machine: which are free, and why one is not."""

import errno
import socket

FIRST_PORT = 4200
"""Prefect's own; the next free one is taken where it is in use and none was asked for."""
PORTS_TRIED = 50
LOCALHOST = "127.0.0.1"


def why_not(port: int, host: str = LOCALHOST) -> str | None:
    """Why no server could listen on the port now; None where one could."""
    if not 0 < port < 1 << 16:
        return "there is no such port; they go from 1 to 65535"
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return "it is taken by another program" if error.errno == errno.EADDRINUSE else (error.strerror or str(error))
    return None


def free_port(host: str = LOCALHOST) -> int | None:
    """Prefect's port or the next free one; None when all of them are taken."""
    return next((port for port in range(FIRST_PORT, FIRST_PORT + PORTS_TRIED) if why_not(port, host) is None), None)
