"""Store everything asked, answered and failed: one SQLite file per run.

Explaining and scoring cost money and hours, so every row is committed before its answer is used, and a killed process
finds everything it paid for. A failure is a row with its reason and no number, so that it can be counted and retried
but never stored as a zero. Rows of different settings, prompts and models are kept alongside each other: a digest of
each is part of a row's identity.
"""

from __future__ import annotations

import fcntl
import json
import os
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
from pydantic import TypeAdapter

from autointerp.journal.usage import Usage
from sae.common.database import Database
from sae.common.errors import BadInput, Unavailable

if TYPE_CHECKING:
    from sae.study.run import Run

_VERDICT_TYPES: dict[str, Any] = {"truth": bool, "p": float, "label": float, "request": "Int64"}
_SET_UP = "judge, scorer, settings_hash, prompt_hash, model"
_IDENTITY = {
    "explanation": "latent, explainer, settings_hash, prompt_hash, model, draw",
    # One window may stand for several questions: a negative of two kinds, or marked rightly and wrongly.
    "verdict": f"latent, explanation_id, {_SET_UP}, context, ifnull(negative_kind, ''), control, replicate",
}
"""The columns that name a question. Its row is replaced if it failed, and never otherwise."""

for _code in "?ef" + np.typecodes["AllInteger"]:  # SQLite would store NumPy's scalars as blobs
    sqlite3.register_adapter(np.dtype(_code).type, np.generic.item)


@dataclass(frozen=True)
class Verdict:
    """A judge's answer for one context under one explanation, or why there is none.

    ``negative_kind`` is ``None`` exactly if ``truth`` is true. A failed verdict has neither ``p`` nor ``label``.
    """

    latent: int  # the latent whose contexts these are (under the swap control, not the latent that was explained)
    explanation_id: int
    judge: str
    scorer: str
    settings_hash: str
    prompt_hash: str
    model: str
    context: int  # the window's id in the firing store
    truth: bool  # whether the latent fires in the context
    negative_kind: str | None = None
    control: str = "none"
    replicate: int = 0
    p: float | None = None
    label: bool | None = None
    failure: str | None = None
    request: int | None = None  # the window of its request's first context; ``None`` where no model was asked


class SetUp(NamedTuple):
    """One way of judging: the columns that all its verdicts have in common."""

    judge: str
    scorer: str
    settings_hash: str
    prompt_hash: str
    model: str


class PlannedContext(NamedTuple):
    """One context of a test set, with everything that a score needs."""

    window: int  # the window's id in the firing store
    truth: bool
    kind: str  # ``active``, or the kind of negative
    stratum: int | None


_WINDOWS = TypeAdapter(list[int])
_ROUNDS = TypeAdapter(list[list[PlannedContext]])
_SETTINGS = TypeAdapter(dict[str, Any])


def open_journal(run: Run, upgrade: bool = True) -> Journal:
    """Open a run's journal. Raises BadInput if it has been emptied. ``upgrade`` as in :class:`Database`."""
    path = run.journal_path
    if path.is_file() and not path.stat().st_size and run.stage_path("scores").is_file():
        raise BadInput(f"{str(path)!r} is empty, but the run has scores; restore it, or delete both to start again")
    return Journal(run.journal_path, run.id, upgrade)


class Journal:
    """A run's journal. Opening creates the file; every method that writes commits before it returns.

    Threads and tasks of one process may share it, and others may read while one writes. Processes that ask models
    exclude each other with :meth:`claim`. ``run`` is the id of the run that it belongs to. Raises BadInput if the file
    is no journal, another run's, or of a later version.
    """

    def __init__(self, path: Path, run: str | None = None, upgrade: bool = True) -> None:
        self.path = path
        self._database = Database(path, MIGRATIONS, "SAEj", upgrade=upgrade)
        self._notes_owner = upgrade

        if run is not None and self._owner(run) != run:
            self.close()
            raise BadInput(f"{str(path)!r} is the journal of another run; move it away, and restore this run's")

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        """Yield the connection; a value that cannot be converted in the block is damage."""
        with self._database.reading() as connection:
            try:
                yield connection
            except (ValueError, TypeError, RecursionError) as error:
                raise BadInput(f"{str(self.path)!r} has a damaged row ({error}); restore it from a copy") from None

    def _owner(self, run: str) -> str:
        """Return the id of the run that this journal belongs to: ``run`` if it belongs to none yet."""
        with self._reading() as connection:
            row = connection.execute("SELECT run FROM owner").fetchone()
        if row is None and self._notes_owner:
            with suppress(Unavailable), self._database.writing() as connection:  # it may be read-only
                connection.execute("INSERT OR IGNORE INTO owner VALUES (?)", (run,))
        return run if row is None else str(row[0])

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._database.close()

    def check(self) -> None:
        self._database.check()

    @contextmanager
    def claim(self) -> Iterator[None]:
        """Be the only process that asks models for this run, so that no question is paid for twice.

        The claim ends with the block or the process, even after ``kill -9``. Raises Unavailable if another has it.
        """
        lock = self.path.with_name(f".{self.path.name}.lock")
        with lock.open("a+") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                stream.seek(0)
                holder = stream.read().strip() or "unknown"
                raise Unavailable(
                    f"run {self.path.parent.name!r} is being worked on by another process (id {holder}); "
                    "wait until it is done, or stop it: what it has finished is kept"
                ) from None
            stream.truncate(0)
            stream.write(str(os.getpid()))
            stream.flush()
            yield

    # explanations

    def add_explanation(
        self,
        *,
        latent: int,
        contexts: Iterable[int],
        text: str | None = None,
        failure: str | None = None,
        quotes_unseen: bool | None = None,
        draw: int = 0,
        **method: str,
    ) -> int:
        """Store an explanation (``text``) or why there is none (``failure``), and return its row's id.

        Replaces a failed row under the same id. Never replaces a good one, because verdicts refer to its text: the
        existing id is returned and the new text is dropped.

        :param contexts: the window ids that the explainer saw.
        :param quotes_unseen: whether the text quotes strings, and none of them is in these contexts.
        :param method: ``explainer``, ``settings_hash``, ``prompt_hash`` and ``model``.
        """
        identity = {"latent": latent, **method, "draw": draw}
        row = {
            **identity,
            "text": text,
            "status": "failed" if text is None else "ok",
            "failure": failure,
            "contexts": json.dumps(list(contexts), default=int),
            "quotes_unseen": quotes_unseen,
            "created": _now(),
        }
        with self._database.writing() as connection:
            _insert(connection, "explanation", [row])
            where, values = _where(connection, "explanation", identity)
            return int(connection.execute(f"SELECT id FROM explanation WHERE {where}", values).fetchone()[0])

    def explanations(self, **filters: Any) -> pd.DataFrame:
        """Return rows of the explanation table by id; ``contexts`` as lists of window ids.

        ``quotes_unseen`` is missing in failed rows and in those of earlier versions.
        Filters are columns: ``latent=17``, ``status="ok"``, ``model="…"``, …; a list, tuple or set matches any of its
        items.
        """
        table = self._select("explanation", filters)
        with self._reading():
            table["contexts"] = [_WINDOWS.validate_json(stored, strict=True) for stored in table["contexts"]]
            return table.astype({"quotes_unseen": "boolean"})

    # verdicts

    def add_verdicts(self, verdicts: Sequence[Verdict]) -> None:
        """Store a batch of verdicts in one transaction. A failed one is replaced by a later one; no other ever is."""
        with self._database.writing() as connection:
            _insert_verdicts(connection, verdicts)

    async def record(self, verdicts: Sequence[Verdict], stage: str, model: str, usage: Usage, latent: int) -> None:
        """Store verdicts and their cost, all or none, and commit. Simultaneous requests share a transaction."""

        def work(connection: sqlite3.Connection) -> None:
            _insert_verdicts(connection, verdicts)
            _insert_usage(connection, stage, model, usage, latent)

        await self._database.written(work)

    def verdicts(self, columns: Sequence[str] = ("*",), **filters: Any) -> pd.DataFrame:
        """Return rows of the verdict table by id. ``truth`` is bool; ``p`` and ``label`` are floats, NaN if missing.

        Filters are columns, as in :meth:`explanations`; ``negative_kind=None`` means the activating contexts.
        ``columns`` limits the columns that are read, because a score may have tens of thousands of rows.
        """
        table = self._select("verdict", filters, columns)
        with self._reading():
            return table.astype({name: kind for name, kind in _VERDICT_TYPES.items() if name in table})

    def verdicts_in_pieces(self, n: int) -> Iterator[pd.DataFrame]:
        """Yield all verdicts by id, at most ``n`` at a time, as of the first read; at least one piece."""
        with self._reading() as connection:
            for table in pd.read_sql_query("SELECT * FROM verdict ORDER BY id", connection, chunksize=n):
                yield table.astype(_VERDICT_TYPES)

    def labels(self, **filters: Any) -> dict[tuple[int, int, str], dict[int, bool | None]]:
        """Map (explanation id, latent, control) to window → the judge's label, ``None`` if the judge failed.

        ``filters`` are those of :meth:`verdicts`.
        """
        found: dict[tuple[int, int, str], dict[int, bool | None]] = {}
        with self._database.reading() as connection:
            where, values = _where(connection, "verdict", filters)
            query = f"SELECT explanation_id, latent, control, context, label FROM verdict WHERE {where}"
            for explanation, latent, control, window, label in connection.execute(query, values):
                answers = found.setdefault((explanation, latent, control), {})
                answers[window] = None if label is None else bool(label)
        return found

    # test sets

    def add_test_set(
        self, scorer: str, settings_hash: str, latent: int, rounds: Sequence[Sequence[PlannedContext]]
    ) -> None:
        """Store the contexts to judge of a latent, round by round. No contexts: the latent has too few."""
        row = (scorer, settings_hash, latent, json.dumps(rounds))
        with self._database.writing() as connection:
            connection.execute("INSERT OR REPLACE INTO test_set VALUES (?, ?, ?, ?)", row)

    def test_sets(self, scorer: str, settings_hash: str) -> dict[int, list[list[PlannedContext]]]:
        """Return latent → the contexts to judge, round by round, of the latents that have a test set."""
        with self._reading() as connection:
            query = "SELECT latent, contexts FROM test_set WHERE scorer = ? AND settings_hash = ?"
            rows = connection.execute(query, (scorer, settings_hash)).fetchall()
            return {int(latent): _ROUNDS.validate_json(rounds, strict=True) for latent, rounds in rows}

    # set-ups

    def add_setup(self, settings_hash: str, settings: Mapping[str, Any]) -> None:
        """Keep what ``settings_hash`` stands for; a hash that is known already stays as it is.

        ``first`` among the settings is the hash of draw 0, or of replicate 0, of the same explainer or judge.
        """
        with self._database.writing() as connection:
            connection.execute("INSERT OR IGNORE INTO setup VALUES (?, ?)", (settings_hash, json.dumps(settings)))

    def setups(self) -> dict[str, dict[str, Any]]:
        """Map the settings hash of each stored set-up to its settings."""
        with self._reading() as connection:
            rows = connection.execute("SELECT settings_hash, settings FROM setup").fetchall()
            return {str(row[0]): _SETTINGS.validate_json(row[1]) for row in rows}

    def state(self) -> dict[str, list[list[Any]]]:
        """Return JSON values that change with every explanation, test set and verdict that is added or replaced.

        ``verdicts`` has a row for each set-up: judge, scorer, settings hash, prompt hash and model come first.
        """
        queries = {
            "explanations": "SELECT count(*), max(id), sum(status = 'failed') FROM explanation",
            "test_sets": "SELECT count(*) FROM test_set",
            "verdicts": f"SELECT {_SET_UP}, count(*), max(id), sum(failure IS NOT NULL), min(created), max(created) "
            f"FROM verdict GROUP BY {_SET_UP} ORDER BY {_SET_UP}",
        }
        with self._reading() as connection:
            return {name: [list(row) for row in connection.execute(query)] for name, query in queries.items()}

    # usage

    def add_usage(self, stage: str, model: str, usage: Usage, latent: int | None = None) -> None:
        """Record the cost of a piece of work; nothing if it asked no model."""
        if usage != Usage():
            with self._database.writing() as connection:
                _insert_usage(connection, stage, model, usage, latent)

    def usage(self) -> pd.DataFrame:
        """Return the usage of this run so far: one row per stage and model, sums of the columns of ``Usage``."""
        sums = ", ".join(f"sum({name}) AS {name}" for name in vars(Usage()))
        query = f"SELECT stage, model, {sums} FROM usage GROUP BY stage, model ORDER BY stage, model"
        with self._reading() as connection:
            return pd.read_sql_query(query, connection)

    def _select(self, table: str, filters: Mapping[str, Any], columns: Sequence[str] = ("*",)) -> pd.DataFrame:
        with self._database.reading() as connection:
            where, values = _where(connection, table, filters)
            query = f"SELECT {', '.join(columns)} FROM {table} WHERE {where} ORDER BY id"
            return pd.read_sql_query(query, connection, params=values)


def _insert(connection: sqlite3.Connection, table: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Insert rows, each a map of column to value, except in place of one that did not fail; see ``_IDENTITY``."""
    columns = list(rows[0])
    query = f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({', '.join('?' * len(columns))})"
    if table in _IDENTITY:
        changes = ", ".join(f"{column} = excluded.{column}" for column in columns)
        query += f" ON CONFLICT ({_IDENTITY[table]}) DO UPDATE SET {changes} WHERE {table}.failure IS NOT NULL"
    connection.executemany(query, [tuple(row.values()) for row in rows])


def _insert_verdicts(connection: sqlite3.Connection, verdicts: Sequence[Verdict]) -> None:
    if any(verdict.p is not None and verdict.p != verdict.p for verdict in verdicts):
        raise ValueError("P(active) is NaN; a verdict without a probability has p = None")
    if verdicts:
        _insert(connection, "verdict", [{**vars(verdict), "created": _now()} for verdict in verdicts])


def _insert_usage(connection: sqlite3.Connection, stage: str, model: str, usage: Usage, latent: int | None) -> None:
    if usage != Usage():
        row = {"stage": stage, "latent": latent, "model": model, **vars(usage), "created": _now()}
        _insert(connection, "usage", [row])


def _where(connection: sqlite3.Connection, table: str, filters: Mapping[str, Any]) -> tuple[str, list[Any]]:
    """Return filters as an SQL condition and its parameters. Column names are checked."""
    known = [row[1] for row in connection.execute(f"PRAGMA table_info({table})")]
    terms = ["1"]
    values: list[Any] = []
    for column, wanted in filters.items():
        if column not in known:
            raise TypeError(f"no such filter: {column!r}; there are {', '.join(sorted(known))}")
        if wanted is None:
            terms.append(f"{column} IS NULL")
        elif isinstance(wanted, (list, tuple, set, frozenset)):
            # One JSON parameter, because the number of "?" in a statement is limited.
            terms.append(f"{column} IN (SELECT value FROM json_each(?))")
            values.append(json.dumps(list(wanted), default=int))
        else:
            terms.append(f"{column} = ?")
            values.append(wanted)
    return " AND ".join(terms), values


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


# --- the tables -------------------------------------------------------------------------------------------------------

MIGRATIONS = (
    # 1: explanations, verdicts and usage. Append further migrations; never edit one that has been released.
    """
    CREATE TABLE explanation (
        id INTEGER PRIMARY KEY,
        latent INTEGER NOT NULL,
        explainer TEXT NOT NULL, settings_hash TEXT NOT NULL, prompt_hash TEXT NOT NULL, model TEXT NOT NULL,
        draw INTEGER NOT NULL,
        text TEXT, status TEXT NOT NULL CHECK (status IN ('ok', 'failed')), failure TEXT,
        contexts TEXT NOT NULL,
        created TEXT NOT NULL,
        UNIQUE (latent, explainer, settings_hash, prompt_hash, model, draw),
        CHECK ((status = 'ok') = (text IS NOT NULL) AND (status = 'failed') = (failure IS NOT NULL))
    );
    CREATE TABLE verdict (
        id INTEGER PRIMARY KEY,
        latent INTEGER NOT NULL,
        explanation_id INTEGER NOT NULL REFERENCES explanation (id),
        judge TEXT NOT NULL, scorer TEXT NOT NULL,
        settings_hash TEXT NOT NULL, prompt_hash TEXT NOT NULL, model TEXT NOT NULL,
        context INTEGER NOT NULL,
        negative_kind TEXT, control TEXT NOT NULL, replicate INTEGER NOT NULL,
        truth INTEGER NOT NULL CHECK (truth IN (0, 1)),
        p REAL CHECK (p BETWEEN 0 AND 1), label INTEGER CHECK (label IN (0, 1)), failure TEXT,
        created TEXT NOT NULL,
        CHECK ((failure IS NULL) = (label IS NOT NULL)),
        CHECK (failure IS NULL OR p IS NULL),
        CHECK ((negative_kind IS NULL) = (truth = 1))
    );
    CREATE UNIQUE INDEX verdict_identity ON verdict (latent, explanation_id, judge, scorer, settings_hash, prompt_hash,
        model, context, ifnull(negative_kind, ''), control, replicate);
    CREATE INDEX verdict_of_explanation ON verdict (explanation_id, control);
    CREATE TABLE usage (
        id INTEGER PRIMARY KEY,
        stage TEXT NOT NULL, latent INTEGER, model TEXT NOT NULL,
        requests INTEGER NOT NULL,
        prompt_tokens INTEGER NOT NULL, cached_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL,
        from_cache INTEGER NOT NULL,
        seconds REAL NOT NULL,
        created TEXT NOT NULL
    )
    """,
    # 2: what a settings hash stands for, where scoring again from verdicts needs to know it.
    """
    CREATE TABLE setup (
        settings_hash TEXT PRIMARY KEY,
        settings TEXT NOT NULL
    ) WITHOUT ROWID
    """,
    # 3: which verdicts were given together: the window of their request's first context. NULL where each was given by
    # itself, and in rows that are older.
    """
    ALTER TABLE verdict ADD COLUMN request INTEGER
    """,
    # 4: the contexts to judge, written before anything is asked: rounds of [window, truth, kind, stratum], as JSON.
    """
    CREATE TABLE test_set (
        scorer TEXT NOT NULL,
        settings_hash TEXT NOT NULL,
        latent INTEGER NOT NULL,
        contexts TEXT NOT NULL,
        PRIMARY KEY (scorer, settings_hash, latent)
    ) WITHOUT ROWID
    """,
    # 5: the id of the run, so that another run's journal is noticed.
    """
    CREATE TABLE owner (
        run TEXT PRIMARY KEY
    ) WITHOUT ROWID
    """,
    # 6: whether an explanation quotes strings, and none of them is in its contexts. NULL in failed and older rows.
    """
    ALTER TABLE explanation ADD COLUMN quotes_unseen INTEGER CHECK (quotes_unseen IN (0, 1))
    """,
)
"""Constraints make it impossible to store a failure, which has a reason and no number, as a zero."""
