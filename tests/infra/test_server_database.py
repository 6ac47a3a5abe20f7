"""The server's SQLite database, without a server: Prefect's configuration of it with our additions."""

import asyncio
import gc
from pathlib import Path

from sqlalchemy.exc import OperationalError


def test_a_refused_statement_that_is_dropped_keeps_nobody_waiting(tmp_path: Path) -> None:
    """Its connection meanwhile waits for a lock, and the lock's owner for the event loop."""
    from infra.server import LockingSqlite  # a whole server: two seconds in every process that only collects tests

    async def drop_while_its_connection_waits() -> None:
        engine = await LockingSqlite(f"sqlite+aiosqlite:///{tmp_path / 'database'}").engine()
        async with engine.connect() as one, engine.connect() as other:
            await one.exec_driver_sql("CREATE TABLE numbers (number)")
            await one.exec_driver_sql("PRAGMA busy_timeout = 10000")
            await one.exec_driver_sql("BEGIN")
            await one.exec_driver_sql("SELECT * FROM numbers")
            await other.exec_driver_sql("INSERT INTO numbers VALUES (1)")
            refused: list[OperationalError] = []
            try:
                await one.exec_driver_sql("INSERT INTO numbers VALUES (2)")
            except OperationalError as error:
                refused.append(error)
            assert "locked" in str(refused)
            await one.rollback()
            await other.exec_driver_sql("BEGIN IMMEDIATE")
            waiting = asyncio.create_task(one.exec_driver_sql("INSERT INTO numbers VALUES (3)"))
            await asyncio.sleep(0.3)
            refused.clear()
            gc.collect()  # the exception, its traceback and the statement in it are a cycle
            await other.commit()
            await waiting  # "database is locked" where the event loop stood still for as long as its connection waits

    gc.freeze()  # so that a collection takes no time
    try:
        asyncio.run(drop_while_its_connection_waits())
    finally:
        gc.unfreeze()


def test_a_request_whose_client_goes_before_it_is_sent_is_not_run() -> None:
    from infra.server import OneWriterAtATime

    messages = [{"type": "http.request", "body": b'{"a":', "more_body": True}, {"type": "http.disconnect"}]
    ran: list[str] = []

    async def receive() -> dict:
        return messages.pop(0)

    async def app(*_: object) -> None:
        ran.append("it")

    asyncio.run(OneWriterAtATime(app)({"type": "http", "method": "POST", "path": "/api/flow_runs/"}, receive, app))
    assert not messages
    assert not ran
