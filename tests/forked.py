"""Runs all tests in processes of pytest-xdist that are forked off one which has imported them.

`python -m tests.forked PROCESSES JOB OPTIONS...`: JOB is the process id of a child, inherited from a shell, that has to end well before
the first test. To import all tests, and what they import, takes nine processor seconds, which each of xdist's processes would spend by
itself. xdist starts this file in place of Python (`python -u -c CODE`): it asks for a copy of the process that has imported the tests,
gives it its own input and output, and waits. The copy runs the code.
"""

import atexit
import os
import socket
import sys
from types import ModuleType
from typing import NoReturn

CODE_BYTES = 4096


def main(processes: str, job: str, *options: str) -> int:
    """Import the tests, wait for the job, run pytest; its exit status, also where a test cannot be imported."""
    import contextlib
    import gc
    import io
    import secrets
    import select
    import shlex
    import subprocess

    import pytest

    with contextlib.redirect_stdout(io.StringIO()) as said:
        status = pytest.main(["--collect-only", "-qq"])
    if status:
        print(said.getvalue())
        return int(status)
    if status := os.waitstatus_to_exitcode(os.waitpid(int(job), 0)[1]):
        return status
    gc.freeze()  # looking for garbage would copy the memory that the copies share
    place = f"fvlm-tests-{secrets.token_hex(8)}"
    server = _socket()
    server.bind(f"\0{place}")
    server.listen()
    python = shlex.join([sys.executable, "-S", "-E", __file__, place])
    run = subprocess.Popen([sys.executable, "-m", "pytest", "--tx", f"{processes}*popen//python={python}", *options])
    ended = os.pidfd_open(run.pid)
    while ended not in select.select([server, ended], [], [])[0]:
        client, _ = server.accept()
        if os.fork() == 0:
            server.close()
            copy(client)
        client.close()
    return run.wait()


def copy(client: socket.socket) -> NoReturn:
    """Run the client's code with its input and output, and end; the connection ends with this process."""
    code, descriptors, *_ = socket.recv_fds(client, CODE_BYTES, 3)
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.argv, sys.modules["__main__"] = ["-c"], ModuleType("__main__")
    try:
        exec(code, vars(sys.modules["__main__"]))
        atexit._run_exitfuncs()
        sys.stdout.flush()
    finally:
        os._exit(0)  # what C++ does at the end of a process waits for threads, which only the original has


def ask(place: str, code: str) -> int:
    """Have the code run by a copy, and wait for its end."""
    with _socket() as server:
        server.connect(f"\0{place}")
        socket.send_fds(server, [code.encode()], [0, 1, 2])
        server.recv(1)
    return 0


def _socket() -> socket.socket:
    return socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)


if __name__ == "__main__":
    own, *given = sys.argv[1:]
    sys.exit(ask(own, given[-1]) if "-c" in given else main(own, *given))
