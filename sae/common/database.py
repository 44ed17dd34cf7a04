"""SQLite files that survive ``kill -9`` and are upgraded by numbered migrations.

Write-ahead logging with ``synchronous=NORMAL``: a power cut may lose the last transactions, but the file stays intact.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import sqlite3
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from sae.common.errors import BadInput, Unavailable, UserError

BUSY_SECONDS = 30.0

Work = Callable[[sqlite3.Connection], object]


class Database:
    """One SQLite file, usable from any thread of this process; other processes wait up to ``BUSY_SECONDS``.

    :param migrations: SQL scripts, run once each, in order; statements are separated by ``;``.
    :param kind: four letters that are kept in the file, so that no file is taken for another kind.
    :param upgrade: whether an older file is upgraded in place; otherwise a copy in memory is.
    :raises BadInput: the file is not a database of this kind, or a later version of this program wrote it.
    :raises Unavailable: the file cannot be opened, or another process has locked it.
    """

    def __init__(
        self,
        path: Path,
        migrations: Sequence[str],
        kind: str = "",
        busy_seconds: float = BUSY_SECONDS,
        upgrade: bool = True,
    ) -> None:
        self.path, self._kind = path, int.from_bytes(kind.encode())
        self._lock = threading.RLock()
        self._waiting: list[tuple[Work, asyncio.Future[None]]] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        is_read_only = path.is_file() and not os.access(path.parent, os.W_OK)
        self._stays_as_it_is = is_read_only or not upgrade
        address: Path | str = path
        if is_read_only:  # SQLite cannot lock there, but nobody else writes either
            address = f"{path.absolute().as_uri()}?immutable=1"
            log = path.with_name(f"{path.name}-wal")
            if log.is_file() and log.stat().st_size > 0:  # left by a kill: it is applied to a copy
                self._copy = tempfile.TemporaryDirectory()
                copy = Path(self._copy.name) / path.name
                shutil.copyfile(path, copy)
                shutil.copyfile(log, copy.with_name(log.name))
                address = f"{copy.as_uri()}?mode=ro"
        with self._errors():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._connection = sqlite3.connect(
                address, timeout=busy_seconds, isolation_level=None, check_same_thread=False, uri=is_read_only
            )
        try:
            with self._errors():
                if not self._stays_as_it_is:
                    self._connection.execute("PRAGMA journal_mode = WAL")
                self._connection.execute("PRAGMA synchronous = NORMAL")
                self._connection.execute("PRAGMA foreign_keys = ON")
            self._migrate(migrations)
        except BaseException:
            self._connection.close()
            raise

    def _migrate(self, migrations: Sequence[str]) -> None:
        def applied(connection: sqlite3.Connection) -> int:
            return int(connection.execute("PRAGMA user_version").fetchone()[0])

        with self.reading() as connection:
            done, kind = applied(connection), connection.execute("PRAGMA application_id").fetchone()[0]
            tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        needed = set(re.findall(r"CREATE TABLE (\w+)", "".join(migrations[:done])))
        if kind not in (0, self._kind) or not needed <= tables or (not done and tables):
            raise BadInput(f"{str(self.path)!r} is a database of another kind; move it away to start a new one")
        if done > len(migrations):
            raise BadInput(
                f"{str(self.path)!r} was written by a later version of this program (schema {done}, known "
                f"{len(migrations)}); update the program"
            )
        if done == len(migrations) and (kind == self._kind or self._stays_as_it_is):
            return
        if self._stays_as_it_is:  # an older file: a copy in memory is upgraded
            copy = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
            self._connection.backup(copy)
            self._connection.close()
            self._connection = copy
        with self.writing() as connection:
            connection.execute(f"PRAGMA application_id = {self._kind}")
            # Check again inside the transaction: another process may have migrated meanwhile.
            for number, script in enumerate(migrations[applied(connection) :], start=applied(connection) + 1):
                for statement in script.split(";"):
                    if statement.strip():
                        connection.execute(statement)
                connection.execute(f"PRAGMA user_version = {number}")

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Turn the SQLite errors that a user can fix into one line."""
        try:
            yield
        except sqlite3.OperationalError as error:
            reason = str(error)
            if "locked" in reason or "busy" in reason:
                what = "another process has locked it; wait until that process is done, or stop it"
            elif any(word in reason for word in ("unable to open", "readonly", "disk", "full")):
                what = f"{reason}; check the folder, its permissions and the free space"
            else:
                raise BadInput(
                    f"database {str(self.path)!r} cannot be read ({reason}); move it away to start a new one"
                ) from None
            raise Unavailable(f"database {str(self.path)!r}: {what}") from None
        except sqlite3.DatabaseError as error:
            if type(error) is not sqlite3.DatabaseError:  # its subclasses are bugs
                raise
            raise BadInput(f"{str(self.path)!r} cannot be read ({error}); move it away to start again") from None
        except OSError as error:
            raise UserError(f"database {str(self.path)!r}: {error.strerror or error}") from None

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """Yield the connection for queries."""
        with self._lock, self._errors():
            yield self._connection

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """Yield the connection in a transaction, which is rolled back if the block fails."""
        with self._lock, self._errors():
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
            except BaseException:
                if self._connection.in_transaction:  # SQLite has already rolled back after some errors
                    self._connection.execute("ROLLBACK")
                raise
            self._connection.execute("COMMIT")

    async def written(self, work: Work) -> None:
        """Do ``work`` in a transaction shared with concurrent callers, even if the caller is cancelled.

        Committed on return. Raises what ``work`` raised; other work is kept.
        """
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            self._flush()  # left by an event loop that has ended
            self._loop = loop
        done: asyncio.Future[None] = loop.create_future()
        self._waiting.append((work, done))
        if len(self._waiting) == 1:
            # Commit in the next turn of the loop and no later: waiting work would be lost with the process.
            loop.call_soon(self._flush)
        await done

    def _flush(self) -> None:
        batch, self._waiting = self._waiting, []
        if not batch:
            return
        try:
            with self.writing() as connection:
                for work, _ in batch:
                    work(connection)
        except Exception as error:
            if len(batch) > 1:  # rolled back: repeat one by one, so that only the bad one fails
                for one in batch:
                    self._waiting = [one]
                    self._flush()
            elif not batch[0][1].done() and not batch[0][1].get_loop().is_closed():
                batch[0][1].set_exception(error)
            return
        for _, done in batch:
            if not done.done() and not done.get_loop().is_closed():
                done.set_result(None)

    def check(self) -> None:
        """Raise BadInput if the structure of the file is damaged; reads all of it."""
        with self.reading() as connection:
            found = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
        if found != "ok":
            raise BadInput(f"{str(self.path)!r} is damaged ({found}); restore it from a copy, or move it away")

    def close(self) -> None:
        with self._lock:
            self._flush()
            self._connection.close()
