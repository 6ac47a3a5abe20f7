"""What a new volume's server begins with."""

import sqlite3
from contextlib import closing
from pathlib import Path

from infra.new_database import MODEL, begin
from infra.stack import Stack


def schema(database: Path) -> tuple[dict[str, str], list[str]]:
    """What its tables and indices are made by, and the tables that hold something."""
    with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as open_:
        made = dict(open_.execute("select name, sql from sqlite_master where sql is not null").fetchall())
        tables = [name for name, sql in made.items() if sql.lower().startswith("create table")]
        return made, [name for name in tables if open_.execute(f'select exists (select * from "{name}")').fetchone()[0]]


def test_a_new_database_is_a_copy_of_what_the_migrations_make_and_of_nothing_else(stack: Stack, tmp_path: Path) -> None:
    (made, filled), (serving, _) = schema(MODEL), schema(stack.database_folder() / "prefect.db")
    assert made == serving, "a server with such a database has nothing to migrate"
    assert filled == ["alembic_version"]
    mine = tmp_path / "prefect.db"
    begin(mine)
    assert [path.name for path in tmp_path.iterdir()] == ["prefect.db"]
    assert schema(mine) == (made, filled)


def test_a_database_that_is_there_stays_and_none_is_made_where_the_model_cannot_be_kept(tmp_path: Path) -> None:
    (tmp_path / "mine.db").write_bytes(b"somebody's")
    begin(tmp_path / "mine.db")
    assert (tmp_path / "mine.db").read_bytes() == b"somebody's"
    begin(tmp_path / "other.db", tmp_path / "mine.db" / "in a file" / "model.db")
    assert not (tmp_path / "other.db").exists()
