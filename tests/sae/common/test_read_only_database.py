"""A database in a folder that cannot be written is read, with what a killed process left in its log."""

from __future__ import annotations

import os
import shutil
import sqlite3
from pathlib import Path

import pytest

from sae.common.database import Database
from sae.common.errors import UserError

TABLE = ("CREATE TABLE t (x)",)


@pytest.mark.parametrize("has_log", [False, True])
def test_a_read_only_folder_is_read(has_log: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, kept = tmp_path / "begun.sqlite", tmp_path / "kept" / "kept.sqlite"
    kept.parent.mkdir()
    database = Database(begun, TABLE)
    with database.writing() as connection:
        connection.execute("INSERT INTO t VALUES (7)")
    if not has_log:
        database.close()
    for ending in ("", "-wal") if has_log else ("",):
        shutil.copy(f"{begun}{ending}", f"{kept}{ending}")
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != kept.parent or mode != os.W_OK)
    before = sorted(kept.parent.iterdir())
    opened = Database(kept, TABLE)
    with opened.reading() as connection:
        assert connection.execute("SELECT x FROM t").fetchall() == [(7,)]
    with pytest.raises((UserError, sqlite3.OperationalError)), opened.writing() as connection:
        connection.execute("INSERT INTO t VALUES (8)")
    opened.close()
    assert sorted(kept.parent.iterdir()) == before


def test_an_older_file_is_upgraded_on_demand(tmp_path: Path) -> None:
    path = tmp_path / "older.sqlite"
    Database(path, TABLE).close()
    before, newer = path.read_bytes(), (*TABLE, "CREATE TABLE u (y)")
    reader = Database(path, newer, upgrade=False)
    with reader.reading() as connection:
        assert connection.execute("SELECT y FROM u").fetchall() == []
    reader.close()
    assert path.read_bytes() == before
    Database(path, newer).close()
    assert path.read_bytes() != before
