"""The common entry point of all jobs: `python -m fvlm_core.<module> job.yaml`."""

import atexit
import contextlib
import errno
import gc
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from fvlm_core.errors import FolderTakenError, UserError
from fvlm_core.exit_status import ATTEMPT_VARIABLE, ERROR_FILE, STOPPED, STOPPED_KIND, USER_ERROR, USER_ERROR_KIND
from fvlm_core.folder_lock import is_held
from fvlm_core.manifest import FILE_NAME, write_atomically
from fvlm_core.settings import Settings, read_yaml

Job = TypeVar("Job", bound=Settings)
FULL = [*(os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT)), "database or disk is full"]
"""Messages of a full disk: the operating system's, which libraries pass on, and SQLite's."""


def run_job(settings: type[Job], function: Callable[[Job], object]) -> None:
    """Read the settings file named on the command line and run the job on it.

    A UserError or a full disk is printed without a traceback and ends the process with status 2. It is also written to `error.json` in
    the job's output folder, as is a stop by SIGTERM; the next attempt removes the file. A folder that belongs to another job is left as
    it is.
    """
    atexit.register(gc.freeze)  # skips the garbage collection at exit: most of a second with a million objects
    if len(sys.argv) != 2:
        print(f"usage: python -m {function.__module__} SETTINGS.yaml", file=sys.stderr)
        sys.exit(USER_ERROR)
    path = Path(sys.argv[1])
    output = _output(path)
    _remove_earlier(output)
    try:
        function(settings.from_yaml(path))
    except UserError as error:
        _refuse(error, output)
    except SystemExit as error:
        if error.code == STOPPED:
            _leave(output, STOPPED_KIND, UserError("stopped by SIGTERM", where=str(output), fix="start it again: it resumes from there"))
        raise
    except Exception as error:
        full = next((cause for cause in _causes(error) if any(text in str(cause) for text in FULL)), None)
        if full is None:
            raise
        place = getattr(full, "filename", None) or output or Path.cwd()
        fix = "free some space there and start it again: finished work is kept"
        _refuse(UserError("the disk is full", where=str(place), fix=fix), output)


def _refuse(error: UserError, output: Path | None) -> None:
    print(f"error: {error}", file=sys.stderr)
    _leave(output, USER_ERROR_KIND, error)
    sys.exit(USER_ERROR)


def _leave(output: Path | None, kind: str, error: UserError) -> None:
    """Write `error.json` if possible, but not into the folder of another job."""
    if output is None:
        return
    taken = isinstance(error, FolderTakenError) or (output / FILE_NAME).is_file() or _is_in_use(output)
    if ATTEMPT_VARIABLE in os.environ or not taken:  # a launcher starts jobs only in folders of its own, and reads the file
        values = {"kind": kind, "what": error.what, "where": error.where, "fix": error.fix, "attempt": _attempt()}
        with contextlib.suppress(OSError):
            write_atomically(output / ERROR_FILE, json.dumps(values, indent=2).encode())


def _remove_earlier(output: Path | None) -> None:
    """Remove the `error.json` of an earlier attempt; one of this attempt was written by another rank and stays."""
    if output is not None and not _is_in_use(output):
        with contextlib.suppress(OSError, ValueError):
            if json.loads((output / ERROR_FILE).read_text())["attempt"] != _attempt():
                (output / ERROR_FILE).unlink()


def _is_in_use(output: Path) -> bool:
    """Whether another job holds the folder's lock. For ranks above 0, their own rank 0 may hold it."""
    return os.environ.get("RANK", "0") == "0" and is_held(output)


def _attempt() -> str:
    """The launcher's name for this attempt, or a name that is the same for all ranks of one torchrun."""
    run = os.environ.get("TORCHELASTIC_RUN_ID")
    return os.environ.get(ATTEMPT_VARIABLE) or (f"process {os.getpid()}" if run is None else f"torchrun {run} {os.getppid()}")


def _output(settings: Path) -> Path | None:
    """The output folder named in a settings file, even if the rest of the file is invalid."""
    try:
        values: Any = read_yaml(settings)
    except UserError:  # raised again when the job's settings are read
        return None
    output = values.get("output") if isinstance(values, dict) else None
    return Path(output) if isinstance(output, str) else None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and its chain of causes."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
