"""Runs all tests in processes of pytest-xdist that are forked off one which has imported them.

`python -m tests.forked PROCESSES OPTIONS...`, with pytest's options. To import all tests, and what they import, takes nine processor
seconds, which each of xdist's processes would spend by itself. Once they are imported, this process becomes pytest, and a fork of it forks
copies of itself. xdist starts this file in place of Python (`python -u -c CODE`): it asks for a copy, gives it its input and output, and
waits. The copy runs the code.
"""

import atexit
import os
import signal
import socket
import sys
import traceback
from types import ModuleType
from typing import NoReturn

CODE_BYTES = 4096


def main(processes: str, *options: str) -> NoReturn:
    """Import the tests and become pytest. Ends with a status where a test cannot be imported, or something is missing."""
    import contextlib
    import gc
    import io
    import shlex
    import subprocess
    import tempfile
    from pathlib import Path

    import pytest

    with contextlib.redirect_stdout(io.StringIO()) as said:
        status = pytest.main(["--collect-only", "-qq", *options])
    if status:
        print(said.getvalue())
        sys.exit(int(status))
    # which test.sh has begun beside the checks; it is quick when it is done
    if status := subprocess.run([Path(__file__).parents[1] / "infra" / "video2dataset_env.sh", "--spark"], check=False).returncode:
        sys.exit(status)
    gc.freeze()  # looking for garbage would copy the memory that the copies share
    folder = tempfile.mkdtemp(prefix="fvlm-tests-")
    place = f"{folder}/socket"
    server = _socket()
    server.bind(place)
    server.listen()
    pytest_process = os.getpid()
    if os.fork() == 0:
        serve(server, folder, pytest_process)
    python = shlex.join([sys.executable, "-S", "-E", __file__, place])
    own = ["--tx", f"{processes}*popen//python={python}", "--max-worker-restart", processes]
    os.execv(sys.executable, [sys.executable, "-m", "pytest", *own, *options])


def serve(server: socket.socket, folder: str, pytest_process: int) -> NoReturn:
    """Fork a copy for whoever asks, until pytest has ended; then end those that are left."""
    import contextlib
    import select
    import shutil

    ended = os.pidfd_open(pytest_process)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # pytest ends its processes
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # copies need not be reaped
    copies = []
    while ended not in select.select([server, ended], [], [])[0]:
        client, _ = server.accept()
        if (child := os.fork()) == 0:
            server.close()
            copy(client)
        client.close()
        copies.append(os.pidfd_open(child))
    for one in copies:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(one, signal.SIGKILL)
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(0)


def copy(client: socket.socket) -> NoReturn:
    """Run the client's code with its input and output, and end; the connection ends with this process."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    code, descriptors, *_ = socket.recv_fds(client, CODE_BYTES, 3)
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.argv, sys.modules["__main__"] = ["-c"], ModuleType("__main__")
    try:
        exec(code, vars(sys.modules["__main__"]))
    except BaseException:
        traceback.print_exc()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(0)  # what ONNX Runtime does at the end of a process waits for a thread that only the first process has


def ask(place: str, code: str) -> None:
    """Have the code run by a copy, and wait for its end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the copy ends by it
    with _socket() as server:
        server.connect(place)
        socket.send_fds(server, [code.encode()], [0, 1, 2])
        server.recv(1)


def _socket() -> socket.socket:
    return socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)


if __name__ == "__main__":
    own, *given = sys.argv[1:]
    if given[:1] == ["-u"]:
        ask(own, given[-1])
    else:
        main(own, *given)
