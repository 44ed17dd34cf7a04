"""Store everything asked, answered and failed: one SQLite file per run.

Explaining and scoring cost money and hours, so every row is committed before its answer is used, and a killed process
finds everything it paid for. A failure is a row with its reason and no number (:mod:`autointerp.journal.schema`), so
that it can be counted and retried but never stored as a zero.

Rows of different settings, prompts and models are kept alongside each other: a digest of each is part of a row's
identity.
"""

from __future__ import annotations

import fcntl
import json
import os
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from autointerp.journal.schema import MIGRATIONS
from autointerp.journal.usage import Usage
from sae.common.database import Database
from sae.common.errors import Unavailable

_EXPLANATION_FILTERS = {
    *("id", "latent", "explainer", "settings_hash", "prompt_hash", "model", "draw", "status"),
}
_VERDICT_FILTERS = {
    *("latent", "explanation_id", "judge", "scorer", "settings_hash", "prompt_hash", "model", "context"),
    *("negative_kind", "control", "replicate", "truth"),
}
_VERDICT_TYPES: dict[str, Any] = {"truth": bool, "p": float, "label": float, "request": "Int64"}
_VERDICT_COLUMNS = "latent, explanation_id, judge, scorer, settings_hash, prompt_hash, model, context"
# One window may stand for several questions: a negative of two kinds, or marked rightly and wrongly.
_VERDICT_IDENTITY = f"{_VERDICT_COLUMNS}, ifnull(negative_kind, ''), control, replicate"
_INSERT_VERDICT = f"""
    INSERT INTO verdict ({_VERDICT_COLUMNS}, control, replicate, negative_kind, truth, p, label, failure, request,
        created)
    VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
    ON CONFLICT ({_VERDICT_IDENTITY}) DO UPDATE SET
        p = excluded.p, label = excluded.label, failure = excluded.failure, request = excluded.request,
        created = excluded.created
    WHERE verdict.failure IS NOT NULL
"""


@dataclass(frozen=True)
class Verdict:
    """A judge's answer for one context under one explanation, or why there is none.

    ``negative_kind`` is ``None`` exactly if ``truth`` is true. A failed verdict has neither ``p`` nor ``label``.
    """

    latent: int
    """The latent whose contexts these are (under the swap control, not the latent that was explained)."""
    explanation_id: int
    judge: str
    scorer: str
    settings_hash: str
    prompt_hash: str
    model: str
    context: int
    """The window's id in the firing store."""
    truth: bool
    """Whether the latent fires in the context."""
    negative_kind: str | None = None
    control: str = "none"
    replicate: int = 0
    p: float | None = None
    label: bool | None = None
    failure: str | None = None
    request: int | None = None
    """The window of the first context of the request that the verdict came with; ``None`` where no model was asked."""


class SetUp(NamedTuple):
    """One way of judging: the columns that all its verdicts have in common."""

    judge: str
    scorer: str
    settings_hash: str
    prompt_hash: str
    model: str


class PlannedContext(NamedTuple):
    """One context of a test set, with everything that a score needs."""

    window: int
    """The window's id in the firing store."""
    truth: bool
    kind: str
    """``active``, or the kind of negative."""
    stratum: int | None


class Journal:
    """A run's journal. Opening creates the file; every method that writes commits before it returns.

    Threads and tasks of one process may share it, and others may read while one writes. Processes that ask models
    exclude each other with :meth:`claim`.

    :raises BadInput: the file is no journal, or a later version of this program wrote it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._database = Database(path, MIGRATIONS)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._database.close()

    @contextmanager
    def claim(self) -> Iterator[None]:
        """Be the only process that asks models for this run, so that no question is paid for twice.

        The claim ends with the block or the process, even after ``kill -9``.

        :raises Unavailable: another process holds it.
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
        explainer: str,
        settings_hash: str,
        prompt_hash: str,
        model: str,
        contexts: Iterable[int],
        text: str | None = None,
        failure: str | None = None,
        draw: int = 0,
    ) -> int:
        """Store an explanation (``text``) or why there is none (``failure``), and return its row's id.

        Replaces a failed row under the same id. Never replaces a good one, because verdicts refer to its text: the
        existing id is returned and the new text is dropped.

        :param contexts: the window ids that the explainer saw.
        """
        identity = (latent, explainer, settings_hash, prompt_hash, model, draw)
        with self._database.writing() as connection:
            connection.execute(
                """
                INSERT INTO explanation (latent, explainer, settings_hash, prompt_hash, model, draw,
                    text, status, failure, contexts, created)
                VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
                ON CONFLICT (latent, explainer, settings_hash, prompt_hash, model, draw) DO UPDATE SET
                    text = excluded.text, status = excluded.status, failure = excluded.failure,
                    contexts = excluded.contexts, created = excluded.created
                WHERE explanation.status = 'failed'
                """,
                (
                    *identity,
                    text,
                    "failed" if text is None else "ok",
                    failure,
                    json.dumps([int(window) for window in contexts]),
                    _now(),
                ),
            )
            row = connection.execute(
                """
                SELECT id FROM explanation WHERE latent = ? AND explainer = ? AND settings_hash = ?
                    AND prompt_hash = ? AND model = ? AND draw = ?
                """,
                identity,
            ).fetchone()
        return int(row[0])

    def explanations(self, **filters: Any) -> pd.DataFrame:
        """Return rows of the explanation table by id; ``contexts`` as lists of window ids.

        Filters are columns: ``latent=17``, ``status="ok"``, ``model="…"``, …; a list, tuple or set matches any of its
        items.
        """
        table = self._select("explanation", _EXPLANATION_FILTERS, filters)
        table["contexts"] = [json.loads(stored) for stored in table["contexts"]]
        return table

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

    def verdicts(self, columns: Sequence[str] | None = None, **filters: Any) -> pd.DataFrame:
        """Return rows of the verdict table by id. ``truth`` is bool; ``p`` and ``label`` are floats, NaN if missing.

        Filters are columns, as in :meth:`explanations`; ``negative_kind=None`` means the activating contexts.
        ``columns`` limits the columns that are read, because a score may have tens of thousands of rows.
        """
        table = self._select("verdict", _VERDICT_FILTERS, filters, columns)
        return table.astype({name: kind for name, kind in _VERDICT_TYPES.items() if name in table})

    def verdicts_in_pieces(self, n: int) -> Iterator[pd.DataFrame]:
        """Yield all verdicts by id, at most ``n`` at a time, as of the first read; at least one piece."""
        with self._database.reading() as connection:
            found = False
            for table in pd.read_sql_query("SELECT * FROM verdict ORDER BY id", connection, chunksize=n):
                found = True
                yield table.astype(_VERDICT_TYPES)
        if not found:
            yield self.verdicts()

    def labels(self, **filters: Any) -> dict[tuple[int, int, str], dict[int, bool | None]]:
        """Map (explanation id, latent, control) to window → the judge's label, ``None`` if the judge failed.

        ``filters`` are those of :meth:`verdicts`.
        """
        where, values = _where(_VERDICT_FILTERS, filters)
        found: dict[tuple[int, int, str], dict[int, bool | None]] = {}
        with self._database.reading() as connection:
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
        with self._database.writing() as connection:
            row = (scorer, settings_hash, int(latent), json.dumps(rounds))
            connection.execute("INSERT OR REPLACE INTO test_set VALUES (?, ?, ?, ?)", row)

    def test_sets(self, scorer: str, settings_hash: str) -> dict[int, list[list[PlannedContext]]]:
        """Return latent → the contexts to judge, round by round, of the latents that have a test set."""
        with self._database.reading() as connection:
            query = "SELECT latent, contexts FROM test_set WHERE scorer = ? AND settings_hash = ?"
            rows = connection.execute(query, (scorer, settings_hash)).fetchall()
        return {
            int(latent): [[PlannedContext(*fields) for fields in contexts] for contexts in json.loads(rounds)]
            for latent, rounds in rows
        }

    # set-ups

    def add_setup(self, settings_hash: str, settings: Mapping[str, Any]) -> None:
        """Keep what ``settings_hash`` stands for; a hash that is known already stays as it is."""
        with self._database.writing() as connection:
            connection.execute("INSERT OR IGNORE INTO setup VALUES (?, ?)", (settings_hash, json.dumps(settings)))

    def setups(self) -> dict[str, dict[str, Any]]:
        """Map the settings hash of each stored set-up to its settings."""
        with self._database.reading() as connection:
            rows = connection.execute("SELECT settings_hash, settings FROM setup").fetchall()
        return {str(row[0]): json.loads(row[1]) for row in rows}

    def state(self) -> dict[str, list[list[Any]]]:
        """Return JSON values that change with every explanation, test set and verdict that is added or replaced.

        ``verdicts`` has a row for each set-up: judge, scorer, settings hash, prompt hash and model come first.
        """
        columns = "judge, scorer, settings_hash, prompt_hash, model"
        queries = {
            "explanations": "SELECT count(*), max(id), sum(status = 'failed') FROM explanation",
            "test_sets": "SELECT count(*) FROM test_set",
            "verdicts": f"SELECT {columns}, count(*), max(id), sum(failure IS NOT NULL), min(created), max(created) "
            f"FROM verdict GROUP BY {columns} ORDER BY {columns}",
        }
        with self._database.reading() as connection:
            return {name: [list(row) for row in connection.execute(query)] for name, query in queries.items()}

    # usage

    def add_usage(self, stage: str, model: str, usage: Usage, latent: int | None = None) -> None:
        """Record the cost of a piece of work; nothing if it asked no model."""
        if usage != Usage():
            with self._database.writing() as connection:
                _insert_usage(connection, stage, model, usage, latent)

    def usage(self) -> pd.DataFrame:
        """Return the usage of this run so far: one row per stage and model, sums of the columns of ``Usage``."""
        with self._database.reading() as connection:
            return pd.read_sql_query(
                """
                SELECT stage, model, sum(requests) AS requests, sum(prompt_tokens) AS prompt_tokens,
                    sum(cached_tokens) AS cached_tokens, sum(completion_tokens) AS completion_tokens,
                    sum(from_cache) AS from_cache, sum(seconds) AS seconds
                FROM usage GROUP BY stage, model ORDER BY stage, model
                """,
                connection,
            )

    def _select(
        self, table: str, known: set[str], filters: Mapping[str, Any], columns: Sequence[str] | None = None
    ) -> pd.DataFrame:
        where, values = _where(known, filters)
        with self._database.reading() as connection:
            query = f"SELECT {'*' if columns is None else ', '.join(columns)} FROM {table} WHERE {where} ORDER BY id"
            return pd.read_sql_query(query, connection, params=values)


def _insert_verdicts(connection: sqlite3.Connection, verdicts: Sequence[Verdict]) -> None:
    now = _now()
    connection.executemany(
        _INSERT_VERDICT,
        [
            (
                *(int(v.latent), int(v.explanation_id), v.judge, v.scorer, v.settings_hash, v.prompt_hash),
                *(v.model, int(v.context), v.control, int(v.replicate), v.negative_kind, int(v.truth)),
                *(_real(v.p), None if v.label is None else int(v.label), v.failure, v.request, now),
            )
            for v in verdicts
        ],
    )


def _insert_usage(connection: sqlite3.Connection, stage: str, model: str, usage: Usage, latent: int | None) -> None:
    if usage == Usage():
        return
    connection.execute(
        """
        INSERT INTO usage (stage, latent, model, requests, prompt_tokens, cached_tokens, completion_tokens,
            from_cache, seconds, created) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
        """,
        (
            *(stage, latent, model, usage.requests, usage.prompt_tokens, usage.cached_tokens),
            *(usage.completion_tokens, usage.from_cache, usage.seconds, _now()),
        ),
    )


def _where(known: set[str], filters: Mapping[str, Any]) -> tuple[str, list[str | int]]:
    """Return filters as an SQL condition and its parameters. Column names are checked."""
    terms: list[str] = ["1"]
    values: list[str | int] = []
    for column, wanted in filters.items():
        if column not in known:
            raise TypeError(f"no such filter: {column!r}; there are {', '.join(sorted(known))}")
        if wanted is None:
            terms.append(f"{column} IS NULL")
        elif isinstance(wanted, (list, tuple, set, frozenset)):
            # One JSON parameter, because the number of "?" in a statement is limited.
            terms.append(f"{column} IN (SELECT value FROM json_each(?))")
            values.append(json.dumps([_plain(value) for value in wanted]))
        else:
            terms.append(f"{column} = ?")
            values.append(_plain(wanted))
    return " AND ".join(terms), values


def _plain(value: Any) -> str | int:
    """Convert NumPy integers and booleans for SQLite, which would store them as blobs."""
    return value if isinstance(value, str) else int(value)


def _real(p: float | None) -> float | None:
    if p is None:
        return None
    if p != p:
        raise ValueError("P(active) is NaN; a verdict without a probability has p = None")
    return float(p)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
