"""Addresses of both families."""

import socket

import pytest

from infra.ports import address_of, listen


def free() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


@pytest.mark.parametrize(("host", "reached"), [("127.0.0.1", "127.0.0.1"), ("::1", "::1"), ("::", "127.0.0.1"), ("::", "::1")])
def test_what_listens_is_reached(host: str, reached: str) -> None:
    if ":" in reached and not has_ipv6():
        pytest.skip("this machine has no IPv6")
    port = free()
    with listen(port, host), socket.create_connection((reached, port), timeout=5):
        pass


def has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


def test_an_address_with_colons_stands_in_brackets() -> None:
    assert address_of("::1", 4200) == "http://[::1]:4200"
    assert address_of("127.0.0.1", 4200) == "http://127.0.0.1:4200"
