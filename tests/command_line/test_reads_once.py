"""A report reads each table of its study once, and computes nothing that is kept."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from tiny_study import cli

from sae.firings.store import FiringStore


def test_a_report_reads_each_table_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: Counter[str] = Counter()
    read: Callable[..., pd.DataFrame] = pd.read_parquet

    def counted(path: Path, *arguments: Any, **options: Any) -> pd.DataFrame:
        reads[str(Path(path).relative_to(root))] += 1
        return read(path, *arguments, **options)

    monkeypatch.setattr(pd, "read_parquet", counted)
    cli("report", "--full", "--root", root).well()
    assert reads
    assert {path: n for path, n in reads.items() if n > 1} == {}


def test_report_opens_no_firing_store_for_a_pair(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Path] = []
    whole = FiringStore.open

    def counted(folder: Path) -> FiringStore:
        opened.append(folder)
        return whole(folder)

    monkeypatch.setattr(FiringStore, "open", counted)
    cli("report", "--full", "--root", root).well()
    runs = len({str(folder) for folder in opened})
    assert len(opened) <= runs + 2  # each once to see whether it is up to date, the first for contexts and scores


def test_a_second_report_tests_no_dip(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = cli("report", "--root", root, "--json").well().out

    def refused(*_: object, **__: object) -> None:
        raise AssertionError("tested again")

    monkeypatch.setattr("sae.alignment.dip.run_dip_test", refused)
    assert cli("report", "--root", root, "--json").well().out == first
