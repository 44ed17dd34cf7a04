"""Read and write the table of a sweep, with the digest of its inputs.

``reports/NAME.sweep.json`` is the whole table, ``reports/NAME.sweep.parquet`` a flat row for each point.
:mod:`autointerp.findings.sweep_points` computes it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NotRequired

import pandas as pd
from pydantic import with_config
from typing_extensions import TypedDict

from sae.alignment.overlap import DEFINITIONS
from sae.common.errors import BadInput, SettingsDiffer
from sae.common.files import SCHEMA, digest, digest_file, write_table
from sae.common.progress import say
from sae.common.records import OPEN, read_record, write_record
from sae.study.recipes import Sweep
from sae.study.run import Run


@with_config(OPEN)
class Measured(TypedDict):
    value: float | None
    interval: list[float] | None
    null: NotRequired[dict[str, Any]]
    pairs: NotRequired[dict[str, float | None]]
    without: NotRequired[dict[str, float | None]]


@with_config(OPEN)
class PointRecord(TypedDict):
    name: str
    values: dict[str, Any]
    runs: list[str]
    seeds: list[int | None]
    hookpoint: str
    architecture: str
    num_latents: int
    k: int
    tokens: int
    learning_rate: float | None
    harvested: int | None
    alive: float | None
    fvu: float | None
    l0: float | None
    dead_fraction: float | None
    shared: dict[str, Measured] | None
    max_cosine: Measured | None
    cosines: dict[str, Measured] | None
    scores: dict[str, Any] | None
    findings: list[dict[str, Any]]


@with_config(OPEN)
class SubjectRecord(TypedDict):
    fingerprint: str


@with_config(OPEN)
class SweepRecord(TypedDict):
    """The content of ``NAME.sweep.json``."""

    schema: Literal[1]
    sweep: str
    inputs: str
    created: str
    subject: SubjectRecord
    axes: dict[str, list[Any]]
    together: list[str]
    seeds: list[int]
    points: list[PointRecord] | None


def summary_path(root: Path, name: str) -> Path:
    return root / "reports" / f"{name}.sweep.json"


def summary_inputs(sweep: Sweep, of_points: Sequence[Sequence[Run]]) -> str:
    """Return the digest of the table's inputs."""
    made_from = [
        [
            point.study.name,
            point.at,
            [
                [run.name, run.weights_digest, *map(run.stage_inputs, ("firing", "overlap")), _scores(run)]
                for run in runs
            ],
        ]
        for point, runs in zip(sweep.points, of_points, strict=True)
    ]
    return digest([SCHEMA, list(sweep.seeds), made_from])


def _scores(run: Run) -> str | None:
    path = run.stage_path("scores")
    return digest_file(path) if path.exists() else None


def write_summary(root: Path, table: Mapping[str, Any]) -> None:
    """Write both files; the one that is read comes last, so its presence means that both are there."""
    path = summary_path(root, table["sweep"])
    write_table(path.with_suffix(".parquet"), flat(table), inputs=table["inputs"])
    write_record(path, table)


def read_summary(root: Path, name: str) -> dict[str, Any] | None:
    """Return the stored table; ``None`` if there is none of this version."""
    path = summary_path(root, name)
    if not path.is_file():
        return None
    try:
        table = read_record(path, SweepRecord, "delete it and run the sweep again")
    except SettingsDiffer:
        return None
    return None if table["points"] is None else dict(table)


def sweeps_of(root: Path, subject: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the tables of sweeps of the same subject model under ``root``, the newest first."""
    found = []
    for path in sorted((root / "reports").glob("*.sweep.json")):
        try:
            table = read_summary(root, path.name.removesuffix(".sweep.json"))
        except BadInput as error:  # the report works without it
            say(str(error))
            continue
        if table is not None and table["subject"]["fingerprint"] == subject.get("fingerprint"):
            found.append(table)
    return sorted(found, key=lambda table: str(table["created"]), reverse=True)


def flat(table: Mapping[str, Any]) -> pd.DataFrame:
    """Return a row for each point: settings, training, fractions shared with interval and chance, cosines, scores."""
    rows = []
    for point in table["points"]:
        row = {
            key: point[key]
            for key in (
                *("name", "hookpoint", "architecture", "num_latents", "k", "tokens", "learning_rate"),
                *("alive", "fvu", "l0", "dead_fraction"),
            )
        }
        row["seeds"] = len(point["seeds"])
        for name, of in {**(point["shared"] or {}), "max_cosine": point["max_cosine"] or {}}.items():
            row |= _columns(f"shared_{name}" if name in DEFINITIONS else name, of)
        for name, of in (point["cosines"] or {}).items():
            row |= _columns(name, of)
        scores = point["scores"] or {}
        row |= {"score": scores.get("mean"), "score_control": scores.get("control"), "n_scored": scores.get("n_scored")}
        rows.append(row)
    return pd.DataFrame(rows)


def _columns(name: str, of: Mapping[str, Any]) -> dict[str, Any]:
    low, high = of.get("interval") or (None, None)
    pairs = [v for v in of.get("pairs", {}).values() if v is not None]
    columns = {
        name: of.get("value"),
        f"{name}_low": low,
        f"{name}_high": high,
        f"{name}_chance": of.get("null", {}).get("rotated"),
    }
    if "pairs" in of:
        columns |= {f"{name}_least_pair": min(pairs, default=None), f"{name}_largest_pair": max(pairs, default=None)}
    return columns
