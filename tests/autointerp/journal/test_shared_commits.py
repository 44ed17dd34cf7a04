"""Transactions that several writers share: one commit, no one hurt by another's mistake, nothing used unkept."""

from __future__ import annotations

import asyncio
import sqlite3
from pathlib import Path

import pytest

from sae.common.database import Database

SCHEMA = ("CREATE TABLE x (n INTEGER PRIMARY KEY)",)


def stored(path: Path) -> list[int]:
    connection = sqlite3.connect(path)
    try:
        return [row[0] for row in connection.execute("SELECT n FROM x ORDER BY n")]
    finally:
        connection.close()


async def add(database: Database, n: int) -> None:
    await database.written(lambda connection: connection.execute("INSERT INTO x VALUES (?)", (n,)))


def test_concurrent_writers_share_a_commit(tmp_path: Path) -> None:
    path = tmp_path / "x.sqlite"
    database = Database(path, SCHEMA)
    said: list[str] = []
    with database.reading() as connection:
        connection.set_trace_callback(said.append)

    async def one(n: int) -> bool:
        await add(database, n)
        return n in stored(path)  # by another connection: it has been committed

    async def main() -> list[bool]:
        return await asyncio.gather(*map(one, range(50)))

    assert all(asyncio.run(main()))
    assert said.count("COMMIT") == 1
    database.close()


def test_who_fails_fails_alone(tmp_path: Path) -> None:
    path = tmp_path / "x.sqlite"
    database = Database(path, SCHEMA)

    async def main() -> list[BaseException | None]:
        return await asyncio.gather(*(add(database, n) for n in (1, 2, 2, 3)), return_exceptions=True)

    outcomes = asyncio.run(main())
    assert [type(x) for x in outcomes] == [type(None), type(None), sqlite3.IntegrityError, type(None)]
    assert stored(path) == [1, 2, 3]
    database.close()


@pytest.mark.parametrize("another_loop", [False, True])
def test_pending_writes_are_finished_at_the_end(tmp_path: Path, another_loop: bool) -> None:
    path = tmp_path / "x.sqlite"
    database = Database(path, SCHEMA)

    async def stopped() -> None:
        task = asyncio.create_task(add(database, 1))
        await asyncio.sleep(0)
        task.cancel()

    asyncio.run(stopped())
    if another_loop:
        asyncio.run(add(database, 2))
    database.close()
    assert stored(path) == ([1, 2] if another_loop else [1])
