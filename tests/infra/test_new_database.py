"""What a new volume's server begins with."""

import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

from infra.new_database import MODEL, begin, has_block_types
from infra.prefect_settings import without
from infra.stack import Stack


def schema(database: Path) -> tuple[dict[str, str], list[str]]:
    """What its tables and indices are made by, and the tables that hold something."""
    with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as open_:
        made = dict(open_.execute("select name, sql from sqlite_master where sql is not null").fetchall())
        tables = [name for name, sql in made.items() if sql.lower().startswith("create table")]
        return made, [name for name in tables if open_.execute(f'select exists (select * from "{name}")').fetchone()[0]]


BLOCKS = {"block_type", "block_schema", "block_schema_reference"}


def kinds(database: Path) -> list[tuple[str, ...]]:
    """Types of blocks and checksums of their schemas."""
    with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as open_:
        return sorted(
            open_.execute("select t.slug, s.checksum, s.version from block_schema s join block_type t on t.id = s.block_type_id").fetchall()
        )


def test_a_new_database_is_a_copy_of_what_prefect_makes_and_of_nothing_else(stack: Stack, tmp_path: Path) -> None:
    served = stack.database_folder() / "prefect.db"
    (made, filled), (serving, _) = schema(MODEL), schema(served)
    assert made == serving, "a server with such a database has nothing to migrate"
    assert set(filled) == {"alembic_version"} | BLOCKS
    assert kinds(MODEL) == kinds(served)
    assert has_block_types(served)
    mine = tmp_path / "prefect.db"
    begin(mine)
    assert [path.name for path in tmp_path.iterdir()] == ["prefect.db"]
    assert schema(mine) == (made, filled)


def test_a_server_that_is_left_to_itself_knows_the_same_types_of_blocks(tmp_path: Path) -> None:
    """Prefect's own server, on a database that it makes itself."""
    database = tmp_path / "own.db"
    environment = without(os.environ) | {
        "PREFECT_HOME": str(tmp_path),
        "PREFECT_API_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{database}",
    }
    ask = (
        "from starlette.testclient import TestClient; from prefect.server.api.server import create_app\nwith TestClient(create_app()): pass"
    )
    subprocess.run(
        [sys.executable, "-c", ask], env=environment, check=False, capture_output=True
    )  # it ends with an error, because its services have not all begun
    assert not has_block_types(database)
    assert kinds(database) == kinds(MODEL)


def test_a_database_that_is_there_stays_and_none_is_made_where_the_model_cannot_be_kept(tmp_path: Path) -> None:
    (tmp_path / "mine.db").write_bytes(b"somebody's")
    begin(tmp_path / "mine.db")
    assert (tmp_path / "mine.db").read_bytes() == b"somebody's"
    begin(tmp_path / "other.db", tmp_path / "mine.db" / "in a file" / "model.db")
    assert not (tmp_path / "other.db").exists()
