"""Arrange the data of every latent of the focus run in columns, for the page's figures and latent browser.

The findings are computed from the same columns (:class:`autointerp.findings.evidence.Study`). ``None`` is a value that
could not be measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from autointerp.findings.evidence import JournalFacts, Study
from autointerp.findings.pairs import scored_alike
from autointerp.findings.sweep_table import sweeps_of
from autointerp.scoring.setups import status_kind
from sae.alignment.overlap import CLASSES

#: The status of a latent; the page stores its index here.
STATUSES = ("not asked for", "too few contexts", "failed", "explained", "scored")
_COSINES = ("encoder_cosine", "decoder_cosine", "max_encoder_cosine", "max_decoder_cosine")
_PARTNERS = ("encoder_partner", "decoder_partner")


def columns_of(study: Study, facts: JournalFacts) -> dict[str, Any]:
    """Return the page's columns: M latents of the focus run, N of them scored.

    ``latents``: columns [M]; ``shared_class`` and ``status`` index ``classes`` (-1: dead, or nothing is aligned) and
    ``statuses``. ``against``: per aligned sibling, columns [M]. ``scored``: columns [N]. ``partners``: per sibling
    scored alike, one row for each pair of scores. ``explanations``: latent → text. ``sweeps``: see :func:`_sweeps`.
    """
    table = study.focus_latents()
    rows = study.score_rows()
    own, swapped = _ok(rows, "none"), _ok(rows, "swap")
    return {
        "run": study.focus.name,
        "n_latents": len(table),
        "threshold": study.view.threshold,
        "classes": list(CLASSES),
        "statuses": list(STATUSES),
        "latents": {
            "n_firings": _whole(table.get("n_firings")),
            "frequency": _rounded(table.get("firing_frequency"), significant=4),
            "similarity": _rounded(table.get("similarity")),
            "n_shared": _whole(table.get("n_shared")),
            "shared_class": _classes(table),
            "status": _statuses(table, rows, facts),
        },
        "against": [_against(study, name) for name in study.compared if name != study.focus.name and study.tables],
        "scored": _scored(own, swapped),
        "partners": _partner_scores(study, own),
        "explanations": {str(latent): text for latent, text in sorted(facts.explanations(own).items())},
        "sweeps": _sweeps(study.root, study.focus.record.get("subject", {})),
    }


def _ok(rows: pd.DataFrame | None, control: str) -> pd.DataFrame:
    """Return the valid scores, by latent."""
    if rows is None:
        return pd.DataFrame(columns=["balanced_accuracy", "explanation_id"])
    good = rows[(rows["control"] == control) & (rows["status"].map(status_kind) == "ok")]
    return good.set_index("latent").sort_index()


def _classes(table: pd.DataFrame) -> list[int]:
    if "shared_class" not in table:
        return [-1] * len(table)
    place = table["shared_class"].map({name: i for i, name in enumerate(CLASSES)}).fillna(-1)
    return np.where(table["alive"], place, -1).astype(int).tolist()


def _statuses(table: pd.DataFrame, rows: pd.DataFrame | None, facts: JournalFacts) -> list[int]:
    status = np.zeros(len(table), int)
    kinds = {"too few contexts": facts.too_few, "explained": facts.explained, "failed": facts.failed}
    for name, latents in kinds.items():
        status[list(latents)] = STATUSES.index(name)
    if rows is not None:
        own = rows[rows["control"] == "none"]
        words = own["status"].map(status_kind).map({"ok": "scored", "failed": "failed", "ineligible": STATUSES[1]})
        status[own["latent"].to_numpy(int)] = words.map(STATUSES.index)
    return status.tolist()


def _against(study: Study, sibling: str) -> dict[str, Any]:
    table = study.tables[study.focus.name, sibling].sort_values("latent")
    return {
        "run": sibling,
        **{name: _rounded(table[name]) for name in _COSINES},
        **{name: _whole(table[name]) for name in _PARTNERS},
    }


def _scored(own: pd.DataFrame, swapped: pd.DataFrame) -> dict[str, Any]:
    columns = {"score": "balanced_accuracy", "low": "ba_low", "high": "ba_high"}
    return {
        "latent": _whole(own.index.to_series()),
        **{name: _rounded(own.get(column), n=len(own)) for name, column in columns.items()},
        "control": _rounded(swapped["balanced_accuracy"].reindex(own.index), n=len(own)),
    }


def _partner_scores(study: Study, own: pd.DataFrame) -> list[dict[str, Any]]:
    """Return latents' scores with those of their decoder-matched partners (figure 6 of the paper)."""
    found = []
    for run in study.runs:
        if run.name == study.focus.name or (study.focus.name, run.name) not in study.tables:
            continue
        alike = scored_alike(study, run)
        theirs = _ok(None if alike is None else alike[0], "none")["balanced_accuracy"]
        table = study.tables[study.focus.name, run.name].set_index("latent").loc[own.index]
        pairs = pd.DataFrame(
            {
                "partner": table["decoder_partner"],
                "score": own["balanced_accuracy"],
                "partner_score": theirs.reindex(table["decoder_partner"]).to_numpy(),
                "similarity": (table["encoder_cosine"] + table["decoder_cosine"]) / 2,
            }
        ).dropna()
        if len(pairs):
            whole = {"latent": _whole(pairs.index.to_series()), "partner": _whole(pairs["partner"])}
            rounded = {name: _rounded(pairs[name]) for name in ("score", "partner_score", "similarity")}
            found.append({"run": run.name, **whole, **rounded})
    return found


def _whole(values: pd.Series | None) -> list[int | None] | None:
    if values is None:
        return None
    return [None if pd.isna(value) else int(value) for value in values.tolist()]


def _rounded(
    values: pd.Series | None, *, significant: int | None = None, n: int | None = None
) -> list[float | None] | None:
    """Round to four decimals, or to that many significant digits, to save bytes."""
    if values is None:
        return None if n is None else [None] * n
    numbers = values.astype(float).tolist()
    if significant is not None:
        return [None if not np.isfinite(x) else float(f"{x:.{significant}g}") for x in numbers]
    return [None if not np.isfinite(x) else round(x, 4) for x in numbers]


def _sweeps(root: Path, subject: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the sweeps of the subject model under ``root``, by name, for figure 4 of the paper.

    Per sweep: ``name``, ``axis`` (the first swept one) and ``points``: ``at`` on the axis, ``name``, and for ``both``
    and ``lenient`` the fraction shared, its ``interval`` and the chance level.
    """
    found = []
    for table in sorted(sweeps_of(root, subject), key=lambda table: str(table["sweep"])):
        axis = next(iter(table["axes"]))
        points = []
        for point in table["points"]:
            if point["shared"] is not None:
                of = {name: point["shared"][name] for name in ("both", "lenient")}
                shared = {
                    name: {"value": row["value"], "interval": row["interval"], "chance": row["null"].get("rotated")}
                    for name, row in of.items()
                }
                points.append({"name": point["name"], "at": point["values"][axis], **shared})
        if points:
            found.append({"name": str(table["sweep"]), "axis": axis, "points": points})
    return found
