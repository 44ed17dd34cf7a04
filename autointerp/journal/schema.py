"""The tables of a run's journal (:mod:`autointerp.journal.journal`), as SQL.

Constraints make it impossible to store a failure, which has a reason and no number, as a zero.
"""

from __future__ import annotations

MIGRATIONS = (
    # 1: explanations, verdicts and usage. Append further migrations; never edit one that has been released.
    """
    CREATE TABLE explanation (
        id INTEGER PRIMARY KEY,
        latent INTEGER NOT NULL,
        explainer TEXT NOT NULL,
        settings_hash TEXT NOT NULL,
        prompt_hash TEXT NOT NULL,
        model TEXT NOT NULL,
        draw INTEGER NOT NULL,
        text TEXT,
        status TEXT NOT NULL CHECK (status IN ('ok', 'failed')),
        failure TEXT,
        contexts TEXT NOT NULL,
        created TEXT NOT NULL,
        UNIQUE (latent, explainer, settings_hash, prompt_hash, model, draw),
        CHECK ((status = 'ok') = (text IS NOT NULL) AND (status = 'failed') = (failure IS NOT NULL))
    );
    CREATE TABLE verdict (
        id INTEGER PRIMARY KEY,
        latent INTEGER NOT NULL,
        explanation_id INTEGER NOT NULL REFERENCES explanation (id),
        judge TEXT NOT NULL,
        scorer TEXT NOT NULL,
        settings_hash TEXT NOT NULL,
        prompt_hash TEXT NOT NULL,
        model TEXT NOT NULL,
        context INTEGER NOT NULL,
        negative_kind TEXT,
        control TEXT NOT NULL,
        replicate INTEGER NOT NULL,
        truth INTEGER NOT NULL CHECK (truth IN (0, 1)),
        p REAL CHECK (p BETWEEN 0 AND 1),
        label INTEGER CHECK (label IN (0, 1)),
        failure TEXT,
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
        stage TEXT NOT NULL,
        latent INTEGER,
        model TEXT NOT NULL,
        requests INTEGER NOT NULL,
        prompt_tokens INTEGER NOT NULL,
        cached_tokens INTEGER NOT NULL,
        completion_tokens INTEGER NOT NULL,
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
)
