"""The set-ups in a run's score table: who explained and judged, with which settings, prompts and contexts.

Every figure is of one set-up, because a mean over several would mean nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import pandas as pd

from autointerp.contexts.sampling import EXPLAINED_BY
from autointerp.journal.method import BASELINE
from sae.common.errors import NotFound

Row = dict[str, Any]
JUDGED_BY = ("judge", "model", "scorer", "settings_hash", "judge_prompt_hash")
FIRST = {"draw": 0, "replicate": 0}
"""Of several explanations of a latent, and of several judgements of a context, those that are shown by default."""
_COLUMNS = (*EXPLAINED_BY.values(), *JUDGED_BY, *FIRST)  # that identify a set-up
TOO_FEW = "too few contexts"  # how an explanation that was not even tried says so


def setups_of(scores: pd.DataFrame, **wanted: str | int | None) -> list[dict[str, Any]]:
    """Return the set-ups in a score table that match ``wanted`` (``scorer="detection"``…), newest first.

    Of draw 0 and replicate 0 unless ``wanted`` names others; ``None`` matches any value.

    Newest by explanation id. The n-gram baseline's explanations and judgements come last. Of equal ones, those judged
    on all contexts come before those judged to a precision, and finer precisions before coarser ones.
    """
    columns = [c for c in _COLUMNS if c in scores]
    if "judge" not in columns:  # nothing but failed explanations
        return []
    mask = (scores["control"] == "none") & scores["judge"].notna()
    for column, value in {**FIRST, **wanted}.items():
        if value is not None and column in scores:
            mask &= scores[column] == value
    found = []
    for _, group in scores[mask].groupby(columns, dropna=False, sort=False):
        by_model = {column: group[column].iloc[0] != BASELINE for column in columns}
        newest = int(group["explanation_id"].max()), by_model["judge"]
        rank = by_model.get("explainer", True), *newest, -(precision_of(group) or 0.0), int(group.index.max())
        setup = {c: plain(group[c].iloc[0]) for c in columns}
        found.append((rank, {**setup, **{c: int(setup[c]) for c in FIRST if c in setup}}))
    return [setup for _, setup in sorted(found, key=lambda item: item[0], reverse=True)]


def wanted_of(
    setups: Sequence[Mapping[str, Any]], name: str, *, explainer: str | None = None, judge: str | None = None
) -> list[dict[str, Any]]:
    """Return the set-ups of run ``name`` with this explainer and judge (``None``: any), in order.

    A judge is named by its name or its model. Raises NotFound, with the existing ones, if no set-up has them.
    """
    there = list(dict.fromkeys(str(setup.get("explainer")) for setup in setups))
    if explainer is not None and explainer not in there:
        those = f"those by {' and '.join(map(repr, there))} are" if there else "no explanation of it is"
        raise NotFound(f"--explainer {explainer!r} has no explanations of {name!r} that are scored; {those}")
    by = [setup for setup in setups if explainer in (None, setup.get("explainer"))]
    found = [dict(setup) for setup in by if judge in (None, setup.get("judge"), setup.get("model") or None)]
    if judge is not None and not found:
        judges = list(dict.fromkeys(str(setup.get("model") or setup.get("judge")) for setup in by))
        those = f"those by {' and '.join(map(repr, judges))} do" if judges else "no judge does"
        raise NotFound(f"--judge {judge!r} has no scores of {name!r}; {those}")
    return found


def verdict_filters(setup: Mapping[str, Any]) -> dict[str, Any]:
    """Return filters of :meth:`autointerp.journal.journal.Journal.verdicts` for a set-up's own explanations."""
    same = {key: setup[key] for key in ("judge", "scorer", "settings_hash")}
    by = {"prompt_hash": setup["judge_prompt_hash"], "model": setup["model"] or ""}
    return {**same, **by, "control": "none", "replicate": setup.get("replicate", 0)}


def rows_of(scores: pd.DataFrame, setup: Mapping[str, Any]) -> pd.DataFrame:
    """Return the last row per latent and control of one set-up, and of its explainer's failed explanations."""
    mask = pd.Series(True, index=scores.index)
    for column, value in setup.items():
        mask &= (scores[column] == value) | scores[column].isna()
    return scores[mask].drop_duplicates(["latent", "control"], keep="last")


def records_of(table: pd.DataFrame) -> list[Row]:
    return cast(list[Row], table.to_dict("records"))


def own_scores(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the scores under the latents' own explanations that did not fail, by latent."""
    return rows[(rows["control"] == "none") & (rows["status"] == "ok")].set_index("latent")


def rows_over(rows: pd.DataFrame, kind: str) -> pd.DataFrame:
    """Return the rows scored over a harder ``kind`` of negatives, with these figures under the usual names."""
    names = {f"ba_{kind}": "balanced_accuracy"}
    names |= {f"{name}_{kind}{end}": name + end for name in ("ba", "tnr", "auroc") for end in ("_low", "_high")}
    names |= {f"{name}_{kind}": name for name in ("tnr", "auroc")}
    if f"ba_{kind}" not in rows:
        return rows.iloc[:0]
    rows = rows[rows[f"ba_{kind}"].notna()]
    return rows.drop(columns=list(names.values()), errors="ignore").rename(columns=names)


def precision_of(rows: pd.DataFrame) -> float | None:
    """Return the half-width to which one set-up's explanations were judged; ``None`` if all contexts were."""
    if "precision" not in rows:
        return None
    precisions = rows.loc[rows["status"] == "ok", "precision"].dropna()
    return float(precisions.iloc[0]) if len(precisions) else None


def described(scores: pd.DataFrame, setup: Mapping[str, Any]) -> dict[str, Any]:
    """Return a set-up with its ``precision`` (``None``: all contexts) and its ``n_scored`` latents."""
    rows = rows_of(scores, setup)
    own = rows[rows["control"] == "none"]
    return {**setup, "precision": precision_of(rows), "n_scored": int((own["status"] == "ok").sum())}


def status_kind(status: object) -> str:
    """Return ``ok``, ``ineligible`` or ``failed`` for a score row's status."""
    words = str(status)
    return "ok" if words == "ok" else "ineligible" if TOO_FEW in words else "failed"


def reason(row: Mapping[Any, Any]) -> str:
    """Return the stored reason why a row is not ``ok``."""
    return str(row["status"]).removeprefix("failed:").strip()


def plain(value: Any) -> Any:
    """Return a numpy or pandas scalar as a JSON value, ``None`` if missing."""
    if value is None or pd.isna(value):
        return None
    return value.item() if isinstance(value, np.generic) else value
