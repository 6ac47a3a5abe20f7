"""A new SQLite database of Prefect's server. Its migrations from nothing take four processor seconds, and Prefect's types of blocks another
one at every start; both give the same for every volume. An environment does them once, and later databases begin as copies of the result.
"""

import asyncio
import os
import sqlite3
from contextlib import closing, suppress
from importlib.metadata import entry_points
from pathlib import Path
from zlib import crc32

import prefect
from filelock import FileLock


def _installed() -> int:
    """A number for this release of Prefect, the installed packages that bring types of blocks, and what is done here with them; it fits
    SQLite's `user_version`."""
    found = entry_points(group="prefect.collections")
    names = [f"{one.value} {one.dist.version if one.dist else ''}" for one in found]
    return crc32(" ".join([prefect.__version__, *sorted(names), Path(__file__).read_text()]).encode()) >> 1


INSTALLED = _installed()
MODEL = Path(prefect.__file__).parent / "__pycache__" / f"database-{INSTALLED}.db"
"""A database with Prefect's tables and types of blocks, and nothing else: no server has run on it. It is where Python keeps what it makes
of Prefect's source."""
INCOMPLETE = "select slug from block_type where id not in (select block_type_id from block_schema)"
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
                    asyncio.run(_made())
                    with closing(sqlite3.connect(database)) as made:
                        if made.execute(INCOMPLETE).fetchone() is None:  # Prefect logs what it cannot register, and goes on
                            made.execute(f"PRAGMA user_version = {INSTALLED}")
                    _copy(database, model)
                    return
        _copy(model, database)


def has_block_types(database: Path) -> bool:
    """Whether the database began with the types of blocks of what is installed, so that a server need not look for new ones."""
    with closing(sqlite3.connect(f"{database.absolute().as_uri()}?mode=ro", uri=True)) as read:
        return read.execute("PRAGMA user_version").fetchone()[0] == INSTALLED


async def _made() -> None:
    """The database that Prefect's settings name, with its tables and types of blocks."""
    from prefect.plugins import load_prefect_collections  # seconds, which a copy does not need
    from prefect.server.database import provide_database_interface
    from prefect.server.models.block_registration import run_block_auto_registration

    database = provide_database_interface()
    await database.create_db()
    load_prefect_collections()
    async with await database.session() as session:
        await run_block_auto_registration(session=session)


def _copy(source: Path, target: Path) -> None:
    """Copy a database, with what is in its write-ahead log, in one step."""
    new = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        with closing(sqlite3.connect(source)) as old, closing(sqlite3.connect(new)) as copy:
            old.backup(copy)
        new.replace(target)
    finally:
        new.unlink(missing_ok=True)
