"""The journal: what is committed stays, what failed is tried again, what is no number is never stored as one."""

from __future__ import annotations

import hashlib
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from autointerp.journal.journal import MIGRATIONS, Journal, Verdict
from autointerp.journal.usage import Usage
from sae.common.database import Database
from sae.common.errors import BadInput, Unavailable

SAME: dict[str, Any] = {"explainer": "llm", "settings_hash": "s", "prompt_hash": "p", "model": "m"}


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(tmp_path / "run_a" / "journal.sqlite")


def verdict(context: int = 1, truth: bool = True, **fields: Any) -> Verdict:
    base = Verdict(
        latent=7,
        explanation_id=1,
        judge="llm",
        scorer="detection",
        settings_hash="s",
        prompt_hash="p",
        model="m",
        context=context,
        truth=truth,
        negative_kind=None if truth else "random",
    )
    return replace(base, **fields)


def test_explanations_come_back_as_they_went_in(journal: Journal) -> None:
    text = "Quotes \" and ' and\nnewlines, 日本語, \x00 and \U0001f600; DROP TABLE explanation"
    first = journal.add_explanation(latent=7, contexts=np.array([3, 1, 2]), text=text, **SAME)
    second = journal.add_explanation(latent=8, contexts=[], failure="no line", **SAME)
    table = journal.explanations()
    assert table["id"].tolist() == [first, second]
    assert table["text"].iloc[0] == text
    assert table["contexts"].tolist() == [[3, 1, 2], []]
    assert table["status"].tolist() == ["ok", "failed"]
    assert table["text"].isna().tolist() == [False, True]
    assert table["failure"].isna().tolist() == [True, False]


def test_an_explanation_may_say_whether_its_quotes_were_seen(journal: Journal) -> None:
    for latent, quotes_unseen in enumerate((True, False, None)):
        journal.add_explanation(latent=latent, contexts=[1], text="x", quotes_unseen=quotes_unseen, **SAME)
    stored = journal.explanations()["quotes_unseen"]
    assert stored.dtype == "boolean"
    assert stored.astype(object).where(stored.notna(), None).tolist() == [True, False, None]


def test_only_a_failed_explanation_is_replaced(journal: Journal) -> None:
    failed = journal.add_explanation(latent=7, contexts=[1], failure="cut off", **SAME)
    mended = journal.add_explanation(latent=7, contexts=[1], text="Commas.", **SAME)
    kept = journal.add_explanation(latent=7, contexts=[1], text="Full stops.", **SAME)
    kept_too = journal.add_explanation(latent=7, contexts=[1], failure="cut off", **SAME)
    assert failed == mended == kept == kept_too
    table = journal.explanations(latent=7)
    assert len(table) == 1
    assert table["text"].tolist() == ["Commas."]
    assert table["status"].tolist() == ["ok"]


def test_other_settings_prompts_models_and_draws_stand_beside(journal: Journal) -> None:
    changes: tuple[dict[str, Any], ...]
    changes = ({}, {"settings_hash": "S"}, {"prompt_hash": "P"}, {"model": "M"}, {"draw": 1}, {"explainer": "x"})
    for change in changes:
        journal.add_explanation(latent=7, contexts=[], text="t", **{**SAME, **change})
    assert len(journal.explanations()) == 6
    assert len(journal.explanations(draw=0)) == 5
    assert len(journal.explanations(settings_hash=["s", "S"], model="m", draw=0, explainer="llm", prompt_hash="p")) == 2


@pytest.mark.parametrize("fields", [{}, {"text": "t", "failure": "f"}])
def test_an_explanation_is_a_text_or_a_failure(journal: Journal, fields: dict[str, Any]) -> None:
    with pytest.raises(sqlite3.IntegrityError):
        journal.add_explanation(latent=7, contexts=[], **SAME, **fields)
    assert len(journal.explanations()) == 0


def test_verdicts_round_trip_with_nan(journal: Journal) -> None:
    journal.add_explanation(latent=7, contexts=[], text="t", **SAME)
    journal.add_verdicts(
        [
            verdict(1, p=0.75, label=True),
            verdict(np.uint32(2), truth=False, p=np.float32(0.5), label=np.bool_(False)),  # type: ignore[arg-type]
            verdict(np.int64(3), truth=np.bool_(False), failure="cut off"),  # type: ignore[arg-type]
        ]
    )
    table = journal.verdicts(explanation_id=1)
    assert table["truth"].tolist() == [True, False, False]
    assert table["truth"].dtype == bool
    np.testing.assert_array_equal(table["p"], [0.75, 0.5, np.nan])
    np.testing.assert_array_equal(table["label"], [1, 0, np.nan])
    assert table["failure"].isna().tolist() == [True, True, False]
    assert journal.verdicts(negative_kind=None)["context"].tolist() == [1]
    pd.testing.assert_frame_equal(journal.verdicts(["label", "truth"], latent=7), table[["label", "truth"]])
    assert journal.labels(explanation_id=1) == {(1, 7, "none"): {1: True, 2: False, 3: None}}
    assert journal.verdicts(context={1, np.int64(3)})["context"].tolist() == [1, 3]


def test_only_a_failed_verdict_is_replaced(journal: Journal) -> None:
    journal.add_explanation(latent=7, contexts=[], text="t", **SAME)
    journal.add_verdicts([verdict(1, failure="HTTP 500"), verdict(2, p=0.9, label=True)])
    journal.add_verdicts([verdict(1, p=0.2, label=False), verdict(2, p=0.1, label=False)])
    journal.add_verdicts([verdict(1, failure="HTTP 500")])
    table = journal.verdicts()
    assert table["p"].tolist() == [0.2, 0.9]
    assert table["failure"].isna().all()


def test_window_may_be_a_negative_of_two_kinds(journal: Journal) -> None:
    journal.add_explanation(latent=7, contexts=[], text="t", **SAME)
    kinds = {"random": False, "hard": True}
    for _ in range(2):
        journal.add_verdicts(
            [verdict(1, truth=False, negative_kind=kind, label=label) for kind, label in kinds.items()]
        )
    assert dict(zip(*(journal.verdicts()[c] for c in ("negative_kind", "label")), strict=True)) == kinds


@pytest.mark.parametrize(
    "wrong",
    [
        {"failure": "HTTP 500", "label": False},
        {"failure": "HTTP 500", "p": 0.0},
        {},
        {"p": 0.0},
        {"label": True, "p": 1.5},
        {"label": True, "negative_kind": "random"},
        {"label": True, "explanation_id": 99},
    ],
)
def test_failures_are_never_stored_as_numbers(journal: Journal, wrong: dict[str, Any]) -> None:
    journal.add_explanation(latent=7, contexts=[], text="t", **SAME)
    with pytest.raises(sqlite3.IntegrityError):
        journal.add_verdicts([verdict(1, p=0.5, label=True), verdict(2, **wrong)])
    assert len(journal.verdicts()) == 0, "a batch is stored whole or not at all"


def test_nan_is_refused(journal: Journal) -> None:
    journal.add_explanation(latent=7, contexts=[], text="t", **SAME)
    with pytest.raises(ValueError, match="NaN"):
        journal.add_verdicts([verdict(1, p=float("nan"), label=True)])


def test_an_unknown_filter_is_an_error(journal: Journal) -> None:
    unknown: dict[str, Any] = {"1=1; --": 3}
    with pytest.raises(TypeError, match="no such filter"):
        journal.verdicts(**unknown)


def test_usage_sums(journal: Journal) -> None:
    journal.add_usage("explain", "m", Usage(2, 100, 60, 10, 0, 1.5), latent=3)
    journal.add_usage("explain", "m", Usage(1, 50, 0, 5, 1, 0.5))
    journal.add_usage("score", "m", Usage(from_cache=4))
    journal.add_usage("score", "", Usage())
    table = journal.usage().set_index("stage")
    assert table.loc["explain"].to_dict() == {
        "model": "m",
        "requests": 3,
        "prompt_tokens": 150,
        "cached_tokens": 60,
        "completion_tokens": 15,
        "from_cache": 1,
        "seconds": 2.0,
    }
    assert table.loc["score", "from_cache"] == 4
    assert len(table) == 2


_WRITER = """
import sys
from pathlib import Path
from autointerp.journal.journal import Journal, Verdict
journal = Journal(Path(sys.argv[1]))
same = dict(explainer="llm", settings_hash="s", prompt_hash="p", model="m")
for latent in range(100_000):
    row = journal.add_explanation(latent=latent, contexts=[latent], text=f"text {latent}", **same)
    journal.add_verdicts([
        Verdict(latent, row, "llm", "detection", "s", "p", "m", context, True, p=.5, label=True) for context in range(3)
    ])
    print(latent, flush=True)
"""


def test_what_was_written_survives_kill_minus_9(tmp_path: Path) -> None:
    path = tmp_path / "journal.sqlite"
    root = Path(__file__).resolve().parents[3]
    with subprocess.Popen(
        [sys.executable, "-c", _WRITER, str(path)], stdout=subprocess.PIPE, text=True, cwd=root
    ) as writer:
        assert writer.stdout is not None
        last = -1
        for line in writer.stdout:
            last = int(line)
            if last >= 60:
                os.kill(writer.pid, signal.SIGKILL)
                break
    journal = Journal(path)
    latents = journal.explanations(status="ok")["latent"].tolist()
    assert latents[: last + 1] == list(range(last + 1))
    counts = journal.verdicts()["latent"].value_counts()
    assert (counts == 3).all(), "a batch of verdicts is whole or absent"
    assert counts.index.max() >= last


def test_threads_may_share_it(journal: Journal) -> None:
    def work(start: int) -> None:
        for latent in range(start, start + 25):
            journal.add_explanation(latent=latent, contexts=[], text="t", **SAME)

    threads = [threading.Thread(target=work, args=(25 * i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(journal.explanations()["latent"]) == list(range(100))


def test_a_claim_excludes_a_second_process(tmp_path: Path) -> None:
    path = tmp_path / "run_a" / "journal.sqlite"
    code = (
        "import sys, time; from pathlib import Path; from autointerp.journal.journal import Journal\n"
        "with Journal(Path(sys.argv[1])).claim():\n    print('held', flush=True); time.sleep(60)"
    )
    root = Path(__file__).resolve().parents[3]
    with subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True, cwd=root
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        journal = Journal(path)
        with pytest.raises(Unavailable, match=rf"'run_a' is being worked on by another process \(id {other.pid}\)"):  # noqa: SIM117
            with journal.claim():
                pass
        assert len(journal.explanations()) == 0, "reading goes on all the while"
        os.kill(other.pid, signal.SIGKILL)
        other.wait()
    with journal.claim():
        pass


def test_a_locked_file_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "x.sqlite"
    first = Database(path, ["CREATE TABLE t (x)"], busy_seconds=0.1)
    second = Database(path, ["CREATE TABLE t (x)"], busy_seconds=0.1)
    with (
        first.writing(),
        pytest.raises(Unavailable, match="another process has locked it; wait"),
        second.writing(),
    ):
        pass


def test_migrations_run_once_each_and_in_order(tmp_path: Path) -> None:
    path = tmp_path / "x.sqlite"
    Database(path, ["CREATE TABLE t (x); INSERT INTO t VALUES (1)"]).close()
    grown = Database(path, ["CREATE TABLE t (x); INSERT INTO t VALUES (1)", "INSERT INTO t VALUES (2)"])
    with grown.reading() as connection:
        assert [row[0] for row in connection.execute("SELECT x FROM t ORDER BY x")] == [1, 2]
    grown.close()
    with pytest.raises(BadInput, match="later version of this program"):
        Database(path, ["CREATE TABLE t (x)"])


def test_a_migration_that_fails_leaves_no_trace(tmp_path: Path) -> None:
    path = tmp_path / "x.sqlite"
    with pytest.raises(BadInput, match="NONSENSE"):
        Database(path, ["CREATE TABLE t (x); NONSENSE"])
    Database(path, ["CREATE TABLE t (x)"]).close()


def test_migrations_are_never_edited() -> None:
    """Journals written by earlier versions exist from here on: append a migration instead."""
    found = [hashlib.sha256(" ".join(script.split()).encode()).hexdigest()[:16] for script in MIGRATIONS]
    assert found[:2] == ["ddc0ebea5ef2cf64", "38ddaadafeacc7c9"]


def test_file_that_is_no_database_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "journal.sqlite"
    path.write_bytes(b"not a database at all" * 100)
    with pytest.raises(BadInput, match=r"journal.sqlite' cannot be read .*move it away") as caught:
        Journal(path)
    assert "\n" not in str(caught.value)
