"""Summarise the points of a sweep, one row each, from their studies' reports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from statistics import fmean
from typing import Any

from autointerp.findings.json_values import to_json
from autointerp.findings.paper.intervals import without_each
from autointerp.findings.shape import Overlap, SharedBy, Similarity, StudyFindings
from autointerp.findings.study import findings
from sae.alignment.overlap import DEFINITIONS
from sae.common.amounts import is_known
from sae.common.files import SCHEMA
from sae.study.recipes import Point, Sweep
from sae.study.run import Run, git_commit

_COSINES = ("mean_decoder", "mean_encoder", "mean_max_decoder", "mean_max_encoder")


def summarise(sweep: Sweep, of_points: Sequence[Sequence[Run]], inputs: str) -> dict[str, Any]:
    """Return the table: what is common to all points, then ``points`` with a :func:`row_of` each."""
    first, rows, subject = of_points[0][0], [], {}
    for point, runs in zip(sweep.points, of_points, strict=True):
        found = findings(first.root, [run.name for run in runs], with_sweeps=False)
        subject = {"model": found.subject.model, "fingerprint": found.subject.fingerprint}
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


def row_of(point: Point, found: StudyFindings) -> dict[str, Any]:
    """Return one point's row, from its study's findings.

    ``values`` are its places on the axes; ``fvu``, ``l0``, ``dead_fraction`` are means over seeds. ``shared`` has for
    each definition the fraction of alive latents that two seeds share, with its interval, each pair's, the mean without
    each seed (for a jackknife), and the nulls; ``None`` for one seed. ``scores`` is ``None`` if nothing was scored.
    """
    settings, seeds = point.study.settings.training, {run.name: run.seed for run in found.runs}
    firing, training, overlap, similarity = found.firing, found.training, found.overlap, found.similarity
    assert firing is not None
    assert training is not None
    return {
        "name": point.study.name,
        "values": dict(point.at),
        "runs": list(seeds),
        "seeds": list(seeds.values()),
        "hookpoint": found.subject.hookpoint,
        **{key: getattr(settings, key) for key in ("architecture", "num_latents", "k", "tokens", "learning_rate")},
        "harvested": firing.tokens,
        "alive": _mean(firing.alive),
        "fvu": _mean(training.fvu),
        "l0": _mean(firing.mean_l0),
        "dead_fraction": _mean(firing.dead_fraction),
        "shared": overlap and {name: _shared(overlap.by(name), seeds) for name in DEFINITIONS},
        "max_cosine": overlap and _with_null(overlap, "max_cosine", overlap.nulls),
        "cosines": similarity and {name: _with_null(similarity, name, similarity.null) for name in _COSINES},
        "scores": _score(found) if found.scores and found.scores.n_scored else None,
        "findings": to_json(found.findings),
    }


def _mean(of: Mapping[str, float]) -> float | None:
    known = [float(value) for value in of.values() if is_known(value)]
    return fmean(known) if known else None


def _shared(found: SharedBy, seeds: Mapping[str, int | None]) -> dict[str, Any]:
    row = to_json(found)
    without = {str(seeds[run]): value for run, value in without_each(row["pairs"]).items()}
    return {**{key: row[key] for key in ("value", "interval", "pairs", "null", "null_range")}, "without": without}


def _with_null(found: Overlap | Similarity, name: str, nulls: Mapping[str, Any]) -> dict[str, Any]:
    return {**to_json(getattr(found, name)), "null": to_json({null: getattr(of, name) for null, of in nulls.items()})}


def _score(found: StudyFindings) -> dict[str, Any]:
    scores, relation, judge = to_json(found.scores), to_json(found.relation), found.methods.judge
    control = scores["control"]
    return {
        "judge": judge and " ".join(word for word in (judge.name, judge.model) if word),
        **{key: scores[key] for key in ("mean", "interval", "quartiles", "n_scored", "n_failed")},
        "control": control and control["mean"],
        "above_control": control and control["above_control"],
        "spearman": relation and {key: relation[key] for key in ("spearman", "interval", "n", "partial")},
    }
