"""What a sweep's points came to: one table, kept beside the reports, with the digest of what it was made from.

``reports/NAME.sweep.json`` is the whole, ``reports/NAME.sweep.parquet`` a flat row for each point. Every figure of a
point is that of its own study's report (:func:`autointerp.analysis.findings`), so the two cannot disagree.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean
from typing import Any

import pandas as pd

from autointerp.findings.intervals import without_each
from sae.errors import BadInput
from sae.files import SCHEMA, digest, digest_file, read_json, write_json, write_table
from sae.overlap import DEFINITIONS
from sae.progress import say
from sae.run import Run, git_commit
from sae.sweep import Point, Sweep

_COSINES = ("mean_decoder", "mean_encoder", "mean_max_decoder", "mean_max_encoder")


@dataclass(frozen=True)
class Summary:
    """A sweep's table as JSON values: see :func:`summarise`."""

    table: dict[str, Any]

    @property
    def name(self) -> str:
        return str(self.table["sweep"])

    @property
    def inputs(self) -> str:
        return str(self.table["inputs"])


def summary_path(root: Path, name: str) -> Path:
    return root / "reports" / f"{name}.sweep.json"


def summary_inputs(sweep: Sweep, of_points: Sequence[Sequence[Run]]) -> str:
    """The digest of everything that the table is made from."""
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


def summarise(sweep: Sweep, of_points: Sequence[Sequence[Run]], inputs: str) -> Summary:
    """The table: what is the same of all points, then ``points``, a row for each (see :func:`row_of`)."""
    from autointerp.analysis import findings

    first = of_points[0][0]
    rows, subject = [], {}
    for point, runs in zip(sweep.points, of_points, strict=True):
        found = findings(first.root, [run.name for run in runs], with_sweeps=False)
        subject = {key: found["subject"][key] for key in ("model", "fingerprint")}
        rows.append(row_of(point, found))
    return Summary(
        {
            "schema": SCHEMA,
            "sweep": sweep.name,
            "inputs": inputs,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "git_commit": git_commit(),
            "subject": subject,
            "corpus": {key: first.record["corpus"].get(key) for key in ("kind", "n_tokens", "fingerprint")},
            "axes": {name: list(values) for name, values in sweep.axes.items()},
            "together": list(sweep.together),
            "seeds": list(sweep.seeds),
            "points": rows,
        }
    )


def row_of(point: Point, found: Mapping[str, Any]) -> dict[str, Any]:
    """One point, out of its study's findings.

    ``values`` are its places on the axes; ``fvu``, ``l0``, ``dead_fraction`` means over seeds; ``shared`` has for each
    definition the fraction of alive latents that two seeds share, with its interval (bootstrap over latents), each
    pair's, the mean without each seed (for a jackknife), and the same of each null; ``None`` where there is one seed.
    ``scores`` is ``None`` where nothing was scored. ``findings`` are the study's own rows of the findings table.
    """
    settings, seeds = point.study.settings, {run["name"]: run["seed"] for run in found["runs"]}
    training, firing, scores = found["training"], found["firing"], found["scores"]
    return {
        "name": point.study.name,
        "values": dict(point.at),
        "runs": list(seeds),
        "seeds": list(seeds.values()),
        "hookpoint": found["subject"]["hookpoint"],
        **{
            key: getattr(settings.training, key)
            for key in ("architecture", "num_latents", "k", "tokens", "learning_rate")
        },
        "harvested": firing["tokens"],
        "alive": _mean(firing["alive"]),
        "fvu": _mean(training["fvu"]),
        "l0": _mean(firing["mean_l0"]),
        "dead_fraction": _mean(firing["dead_fraction"]),
        "shared": None if found["overlap"] is None else _shared(found["overlap"], seeds),
        "max_cosine": None if found["overlap"] is None else _max_cosine(found["overlap"]),
        "cosines": None if found["similarity"] is None else _cosines(found["similarity"]),
        "scores": None if scores is None or not scores["n_scored"] else _score(found),
        "findings": found["findings"],
    }


def _mean(of: Mapping[str, float | None]) -> float | None:
    known = [value for value in of.values() if value is not None]
    return fmean(known) if known else None


def _shared(tree: Mapping[str, Any], seeds: Mapping[str, int | None]) -> dict[str, Any]:
    found = {}
    for name in DEFINITIONS:
        row = tree[name]
        without = without_each(row["pairs"])
        found[name] = {
            **{key: row[key] for key in ("value", "interval", "pairs", "null", "null_range")},
            "without": {str(seeds[run]): value for run, value in without.items()},
        }
    return found


def _max_cosine(tree: Mapping[str, Any]) -> dict[str, Any]:
    null = {null: of["max_cosine"] for null, of in tree["nulls"].items()}
    return {"value": tree["max_cosine"], "interval": tree["max_cosine_interval"], "null": null}


def _cosines(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: {
            "value": tree[name],
            "interval": tree[f"{name}_interval"],
            "null": {null: of[name] for null, of in tree["null"].items()},
        }
        for name in _COSINES
    }


def _score(found: Mapping[str, Any]) -> dict[str, Any]:
    scores, relation, judge = found["scores"], found["relation"], found["methods"]["judge"]
    return {
        "judge": None if judge is None else " ".join(word for word in judge.values() if word),
        **{key: scores[key] for key in ("mean", "interval", "quartiles", "n_scored", "n_failed")},
        "control": None if scores["control"] is None else scores["control"]["mean"],
        "above_control": None if scores["control"] is None else scores["control"]["above_control"],
        "spearman": None
        if relation is None
        else {key: relation[key] for key in ("spearman", "interval", "n", "partial")},
    }


# --- on disk -------------------------------------------------------------------------------------------------------


def write_summary(root: Path, summary: Summary) -> None:
    """Both files, the one that is read last: where it is there, the other is too."""
    path = summary_path(root, summary.name)
    write_table(path.with_suffix(".parquet"), flat(summary.table), inputs=summary.inputs)
    write_json(path, summary.table)


def read_summary(root: Path, name: str) -> Summary | None:
    """The stored table; ``None`` where there is none, or one of another version."""
    path = summary_path(root, name)
    if not path.is_file():
        return None
    try:
        table = read_json(path)
        if table["schema"] != SCHEMA or table["points"] is None:
            return None
        table["created"], table["axes"], table["subject"]["fingerprint"]  # what tells whose it is
        return Summary(table)
    except (ValueError, KeyError, TypeError):
        raise BadInput(f"{str(path)!r} is damaged; delete it and give `python cli.py sweep` again") from None


def sweeps_of(root: Path, subject: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The tables of sweeps of the same subject model under ``root``, the newest first."""
    found = []
    for path in sorted((root / "reports").glob("*.sweep.json")):
        try:
            summary = read_summary(root, path.name.removesuffix(".sweep.json"))
        except BadInput as error:  # a report does without
            say(str(error))
            continue
        if summary is not None and summary.table["subject"]["fingerprint"] == subject.get("fingerprint"):
            found.append(summary.table)
    return sorted(found, key=lambda table: str(table["created"]), reverse=True)


def flat(table: Mapping[str, Any]) -> pd.DataFrame:
    """A row for each point: settings, training, what is shared with its interval and by chance, cosines, scores."""
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
    chance = [v for v in of.get("null", {}).values() if v is not None]
    columns = {
        name: of.get("value"),
        f"{name}_low": low,
        f"{name}_high": high,
        f"{name}_chance": max(chance, default=None),
    }
    if "pairs" in of:
        columns |= {f"{name}_least_pair": min(pairs, default=None), f"{name}_largest_pair": max(pairs, default=None)}
    return columns
