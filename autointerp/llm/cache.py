"""Answers that have been paid for, kept by content: the same question to the same model is never bought twice.

The key is a digest of the model, the messages, the parameters and the number of the replicate; the address of
the server is not in it, because the answer is the model's. An answer is committed here before anyone sees it, so
a process killed a moment later finds it again. Only usable answers are kept: a failure must be asked anew.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from autointerp.llm.exchange import Answer
from sae.common.database import Database

_MIGRATIONS = (
    # 1: answers. Append further migrations; never edit one that has been released.
    """
    CREATE TABLE answer (
        key TEXT PRIMARY KEY,
        model TEXT NOT NULL,
        answer TEXT NOT NULL,
        created TEXT NOT NULL
    ) WITHOUT ROWID
    """,
    # 2: what servers turned out to be able to do.
    """
    CREATE TABLE capability (
        url TEXT NOT NULL,
        model TEXT NOT NULL,
        found TEXT NOT NULL,
        created TEXT NOT NULL,
        PRIMARY KEY (url, model)
    ) WITHOUT ROWID
    """,
)
BELIEVED = timedelta(days=1)
"""How long what was found out about a server is believed: it may be restarted with other flags."""


class ResponseCache:
    """One SQLite file for all runs under a root. Threads and processes may share it.

    :raises BadInput: the file is no such cache.
    """

    def __init__(self, path: Path) -> None:
        self._database = Database(path, _MIGRATIONS)

    def get(self, key: str) -> Answer | None:
        with self._database.reading() as connection:
            row = connection.execute("SELECT answer FROM answer WHERE key = ?", (key,)).fetchone()
        return None if row is None else Answer.from_json(row[0])

    async def put(self, key: str, model: str, answer: Answer) -> None:
        """Keep ``answer``; committed when this returns, in one transaction with others of the same moment."""
        row = (key, model, answer.to_json(), datetime.now(UTC).isoformat(timespec="seconds"))
        await self._database.written(
            lambda connection: connection.execute(
                "INSERT OR REPLACE INTO answer (key, model, answer, created) VALUES (?, ?, ?, ?)", row
            )
        )

    def capabilities(self, url: str, model: str, lasting: bool = False) -> dict[str, Any]:
        """What was found out about the server at ``url`` in the last day, or ever; empty where nothing was."""
        oldest = "" if lasting else (datetime.now(UTC) - BELIEVED).isoformat(timespec="seconds")
        with self._database.reading() as connection:
            query = "SELECT found FROM capability WHERE url = ? AND model = ? AND created >= ?"
            row = connection.execute(query, (url, model, oldest)).fetchone()
        return {} if row is None else dict(json.loads(row[0]))

    async def put_capabilities(self, url: str, model: str, found: Mapping[str, Any]) -> None:
        """Keep what was found out, unless the same is known already: its age counts from when it was asked."""
        if self.capabilities(url, model) == found:
            return
        row = (url, model, json.dumps(found), datetime.now(UTC).isoformat(timespec="seconds"))
        await self._database.written(
            lambda connection: connection.execute(
                "INSERT OR REPLACE INTO capability (url, model, found, created) VALUES (?, ?, ?, ?)", row
            )
        )

    def __len__(self) -> int:
        with self._database.reading() as connection:
            return int(connection.execute("SELECT count(*) FROM answer").fetchone()[0])

    def close(self) -> None:
        self._database.close()
