"""Creates the SQLite database of a Prefect server from a template.

Running all migrations takes four CPU seconds, and registering Prefect's block types another one at every start; both give the same result
for every volume. They run once per Python environment, and later databases start as copies of the result.
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
    """Return a checksum of Prefect's version, the packages that provide block types, and this file. It fits SQLite's `user_version`."""
    found = entry_points(group="prefect.collections")
    names = [f"{one.value} {one.dist.version if one.dist else ''}" for one in found]
    return crc32(" ".join([prefect.__version__, *sorted(names), Path(__file__).read_text()]).encode()) >> 1


INSTALLED = _installed()
MODEL = Path(prefect.__file__).parent / "__pycache__" / f"database-{INSTALLED}.db"
"""The template: a database with Prefect's tables and block types, on which no server has run. It is stored next to Prefect's bytecode."""
INCOMPLETE = "select slug from block_type where id not in (select block_type_id from block_schema)"
WAIT_S = 60.0
"""Timeout for another process that is creating the template."""


def begin(database: Path, model: Path = MODEL) -> None:
    """Create the database that Prefect's settings name, if it does not exist, as a copy of the template `model`.

    The first process also creates the template. If there is none and its folder is not writable, nothing is created: a server runs the
    migrations itself when it starts.
    """
    if database.exists():
        return
    with suppress(OSError):
        if not model.exists():
            with FileLock(model.with_suffix(".lock"), timeout=WAIT_S):
                if not model.exists():
                    asyncio.run(_made())
                    with closing(sqlite3.connect(database)) as made:
                        if made.execute(INCOMPLETE).fetchone() is None:  # Prefect only logs block types that it cannot register
                            made.execute(f"PRAGMA user_version = {INSTALLED}")
                    _copy(database, model)
                    return
        _copy(model, database)


def has_block_types(database: Path) -> bool:
    """Return whether the database was created with the block types of the installed packages, so that a server need not register them."""
    with closing(sqlite3.connect(f"{database.absolute().as_uri()}?mode=ro", uri=True)) as read:
        return read.execute("PRAGMA user_version").fetchone()[0] == INSTALLED


async def _made() -> None:
    """Create the database that Prefect's settings name, with its tables and block types."""
    from prefect.plugins import load_prefect_collections  # takes seconds, and copying needs none of it
    from prefect.server.database import provide_database_interface
    from prefect.server.models.block_registration import run_block_auto_registration

    database = provide_database_interface()
    await database.create_db()
    load_prefect_collections()
    async with await database.session() as session:
        await run_block_auto_registration(session=session)


def _copy(source: Path, target: Path) -> None:
    """Copy a database atomically, including its write-ahead log."""
    new = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        with closing(sqlite3.connect(source)) as old, closing(sqlite3.connect(new)) as copy:
            old.backup(copy)
        new.replace(target)
    finally:
        new.unlink(missing_ok=True)
