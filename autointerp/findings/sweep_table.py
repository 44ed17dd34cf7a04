"""Summarise the points of a sweep, from their studies' reports, in a table with the digest of its inputs.

``reports/NAME.sweep.json`` is the whole table, ``reports/NAME.sweep.parquet`` a flat row for each point.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean
from typing import Any

import pandas as pd

from autointerp.findings.paper.intervals import without_each
from sae.alignment.overlap import DEFINITIONS
from sae.common.errors import BadInput
from sae.common.files import SCHEMA, digest, digest_file, read_json, write_json, write_table
from sae.common.progress import say
from sae.study.recipes import Point, Sweep
from sae.study.run import Run, git_commit


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
    write_json(path, table)


def read_summary(root: Path, name: str) -> dict[str, Any] | None:
    """Return the stored table; ``None`` if there is none of this version."""
    path = summary_path(root, name)
    if not path.is_file():
        return None
    try:
        table: dict[str, Any] = read_json(path)
        if table["schema"] != SCHEMA or table["points"] is None:
            return None
        table["created"], table["axes"], table["subject"]["fingerprint"]  # must be there
        return table
    except (ValueError, KeyError, TypeError):
        raise BadInput(f"{str(path)!r} is damaged; delete it and run the sweep again") from None


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


# --- the points ------------------------------------------------------------------------------------------------

_COSINES = ("mean_decoder", "mean_encoder", "mean_max_decoder", "mean_max_encoder")


def summarise(sweep: Sweep, of_points: Sequence[Sequence[Run]], inputs: str) -> dict[str, Any]:
    """Return the table: what is common to all points, then ``points`` with a :func:`row_of` each."""
    from autointerp.findings.study import findings  # which reads the tables of sweeps

    first, rows, subject = of_points[0][0], [], {}
    for point, runs in zip(sweep.points, of_points, strict=True):
        found = findings(first.root, [run.name for run in runs], with_sweeps=False)
        subject = {key: found["subject"][key] for key in ("model", "fingerprint")}
        rows.append(row_of(point, found))
    return {
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


def row_of(point: Point, found: Mapping[str, Any]) -> dict[str, Any]:
    """Return one point's row, from its study's findings.

    ``values`` are its places on the axes; ``fvu``, ``l0``, ``dead_fraction`` are means over seeds. ``shared`` has for
    each definition the fraction of alive latents that two seeds share, with its interval, each pair's, the mean without
    each seed (for a jackknife), and the nulls; ``None`` for one seed. ``scores`` is ``None`` if nothing was scored.
    """
    settings, seeds = point.study.settings.training, {run["name"]: run["seed"] for run in found["runs"]}
    firing, overlap, similarity = found["firing"], found["overlap"], found["similarity"]
    return {
        "name": point.study.name,
        "values": dict(point.at),
        "runs": list(seeds),
        "seeds": list(seeds.values()),
        "hookpoint": found["subject"]["hookpoint"],
        **{key: getattr(settings, key) for key in ("architecture", "num_latents", "k", "tokens", "learning_rate")},
        "harvested": firing["tokens"],
        "alive": _mean(firing["alive"]),
        "fvu": _mean(found["training"]["fvu"]),
        "l0": _mean(firing["mean_l0"]),
        "dead_fraction": _mean(firing["dead_fraction"]),
        "shared": overlap and {name: _shared(overlap[name], seeds) for name in DEFINITIONS},
        "max_cosine": overlap and _with_null(overlap, "max_cosine", overlap["nulls"]),
        "cosines": similarity and {name: _with_null(similarity, name, similarity["null"]) for name in _COSINES},
        "scores": _score(found) if found["scores"] and found["scores"]["n_scored"] else None,
        "findings": found["findings"],
    }


def _mean(of: Mapping[str, float | None]) -> float | None:
    known = [value for value in of.values() if value is not None]
    return fmean(known) if known else None


def _shared(row: Mapping[str, Any], seeds: Mapping[str, int | None]) -> dict[str, Any]:
    without = {str(seeds[run]): value for run, value in without_each(row["pairs"]).items()}
    return {**{key: row[key] for key in ("value", "interval", "pairs", "null", "null_range")}, "without": without}


def _with_null(tree: Mapping[str, Any], name: str, nulls: Mapping[str, Any]) -> dict[str, Any]:
    null = {null: of[name] for null, of in nulls.items()}
    return {"value": tree[name], "interval": tree[f"{name}_interval"], "null": null}


def _score(found: Mapping[str, Any]) -> dict[str, Any]:
    scores, relation, judge = found["scores"], found["relation"], found["methods"]["judge"]
    control = scores["control"]
    return {
        "judge": judge and " ".join(word for word in judge.values() if word),
        **{key: scores[key] for key in ("mean", "interval", "quartiles", "n_scored", "n_failed")},
        "control": control and control["mean"],
        "above_control": control and control["above_control"],
        "spearman": relation and {key: relation[key] for key in ("spearman", "interval", "n", "partial")},
    }
