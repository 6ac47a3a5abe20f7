"""A new SQLite database of Prefect's server. Its migrations from nothing take four processor seconds and give the same for every volume:
an environment does them once, and later databases begin as copies of what came of it.
"""

import asyncio
import os
import sqlite3
from contextlib import closing, suppress
from pathlib import Path

import prefect
from filelock import FileLock

MODEL = Path(prefect.__file__).parent / "__pycache__" / f"database-{prefect.__version__}.db"
"""What came of the migrations, and nothing else: no server has run on it. It is where Python keeps what it makes of Prefect's source."""
WAIT_S = 60.0
"""For another process that makes it."""


def begin(database: Path, model: Path = MODEL) -> None:
    """Make the database that Prefect's settings name, where there is none: as a copy of the model, which the first process makes too.

    Nothing is made where the model is not there and its folder cannot be written: a server migrates by itself when it starts.
    """
    if database.exists():
        return
    with suppress(OSError):
        if not model.exists():
            with FileLock(model.with_suffix(".lock"), timeout=WAIT_S):
                if not model.exists():
                    from prefect.server.database import provide_database_interface  # a second, which a copy does not need

                    asyncio.run(provide_database_interface().create_db())
                    _copy(database, model)
                    return
        _copy(model, database)


def _copy(source: Path, target: Path) -> None:
    """Copy a database, with what is in its write-ahead log, in one step."""
    new = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        with closing(sqlite3.connect(source)) as old, closing(sqlite3.connect(new)) as copy:
            old.backup(copy)
        new.replace(target)
    finally:
        new.unlink(missing_ok=True)
