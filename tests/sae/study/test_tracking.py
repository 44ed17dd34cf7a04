"""W&B is given the rows of the log where the user asks, and nothing else; a training goes on without it."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tiny_study import Ran, cli, tree

from sae.common.errors import UserError
from sae.common.files import read_table
from sae.study.run import Run


class FakeWandb(ModuleType):
    """What of wandb is used, remembering what it was given."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.started: list[dict[str, Any]] = []
        self.rows: dict[str, list[dict[str, Any]]] = {}
        self.finished: list[str] = []
        self.failed: list[str] = []
        self.fails: Exception | None = None

    def Settings(self, **values: Any) -> Any:
        return SimpleNamespace(**values)

    def init(self, **values: Any) -> Any:
        if self.fails is not None:
            raise self.fails
        self.started.append(values)
        rows = self.rows.setdefault(values["name"], [])
        return SimpleNamespace(
            log=lambda row, step: rows.append({**row, "step": step}),
            finish=lambda exit_code=0: (self.failed if exit_code else self.finished).append(values["name"]),
        )


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_wandb_is_told_of_a_training_that_stops(
    short: Path, tmp_path: Path, wandb: FakeWandb, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise UserError("stopped")

    monkeypatch.setattr("sae.study.train._Ending.row", fail)
    cli(
        "train", "--no-controls", "--recipe", short, "--seeds", 0, 1, "--wandb", "saes", "--root", tmp_path
    ).failed_in_one_line("stopped")
    assert sorted(wandb.failed) == ["run_a", "run_b"]
    assert wandb.finished == []


def test_wandb_gets_the_log_rows_and_no_key(
    short: Path, tmp_path: Path, wandb: FakeWandb, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "secret-key")
    with_it, without = tmp_path / "with", tmp_path / "without"
    ran = cli(
        "train", "--no-controls", "--recipe", short, "--seeds", 0, 1, "--wandb", "saes", "--root", with_it, "--json"
    ).well()
    assert len(ran.out.splitlines()) == 1
    assert [(s["project"], s["name"], s["group"], s["config"]["seed"]) for s in wandb.started] == [
        ("saes", "run_a", "run", 0),
        ("saes", "run_b", "run", 1),
    ]
    assert "secret-key" not in f"{wandb.started} {ran.out} {ran.err} {tree(with_it)}"
    assert wandb.finished == ["run_a", "run_b"]
    for name, rows in wandb.rows.items():
        table = read_table(with_it / name / "training.parquet")
        assert [row["step"] for row in rows] == table["step"].tolist()
        for column in map(str, table.columns.drop("step")):
            np.testing.assert_array_equal([row[column] for row in rows], table[column])
    assert wandb.failed == []
    n = len(wandb.started)
    cli("train", "--no-controls", "--recipe", short, "--seeds", 0, 1, "--root", without).well()
    assert len(wandb.started) == n  # never on by itself
    assert len({(root / "run_a" / "sae.safetensors").read_bytes() for root in (with_it, without)}) == 1
    records = [{**Run.open("run_a", root).record, "created": ""} for root in (with_it, without)]
    assert records[0] == records[1]


def test_wandb_that_is_not_installed_or_refuses(
    short: Path, tmp_path: Path, wandb: FakeWandb, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "secret-key")
    train = (
        "train",
        "--no-controls",
        "--recipe",
        short,
        "--seeds",
        0,
        "--wandb",
        "saes",
        "--root",
        tmp_path / "runs",
        "--json",
    )
    wandb.fails = RuntimeError("401 for secret-key\nmore")
    line = cli(*train).failed_in_one_line("--wandb", "401 for …", "wandb login")
    assert "secret-key" not in line
    assert not (tmp_path / "runs" / "run_a").exists()
    monkeypatch.setitem(sys.modules, "wandb", None)
    ran: Ran = cli(*train)
    ran.failed_in_one_line("--wandb", "pip install wandb")
    assert len(ran.err.splitlines()) == 1  # before any work
