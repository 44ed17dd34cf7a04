"""Summarise the points of a sweep, one row each, from their studies' reports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from statistics import fmean
from typing import Any

from autointerp.findings.paper.intervals import without_each
from autointerp.findings.study import findings
from autointerp.findings.sweep_table import Summary
from sae.alignment.overlap import DEFINITIONS
from sae.common.files import SCHEMA
from sae.study.run import Run, git_commit
from sae.study.sweep import Point, Sweep

_COSINES = ("mean_decoder", "mean_encoder", "mean_max_decoder", "mean_max_encoder")


def summarise(sweep: Sweep, of_points: Sequence[Sequence[Run]], inputs: str) -> Summary:
    """Return the table: the settings common to all points, then ``points`` with a :func:`row_of` each."""
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
    """Return one point's row, from its study's findings.

    ``values`` are its places on the axes; ``fvu``, ``l0``, ``dead_fraction`` are means over seeds. ``shared`` has for
    each definition the fraction of alive latents that two seeds share, with its interval, each pair's, the mean without
    each seed (for a jackknife), and the nulls; ``None`` for one seed. ``scores`` is ``None`` if nothing was scored.
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
