"""The set-ups in a run's score table: who explained and who judged, under which settings, prompts and contexts.

A table may hold several side by side, because making new scores never overwrites old ones. A mean over different
set-ups would mean nothing, so every figure is of one set-up; the others are named beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from autointerp.journal.method import BASELINE
from sae.common.errors import NotFound

#: Who explained and judged, under which settings and prompts: what tells set-ups apart.
_EXPLAIN = ("explainer", "explainer_model", "explain_settings_hash", "explain_prompt_hash")
_JUDGE = ("judge", "model", "scorer", "settings_hash", "judge_prompt_hash")
TOO_FEW = "too few contexts"  # how an explanation that was not even tried says so


def setups_of(scores: pd.DataFrame, **wanted: str | None) -> list[dict[str, Any]]:
    """The set-ups in a score table that have what is ``wanted`` (``scorer="detection"``…), newest first.

    Newest by the explanations' numbers in the journal. Other explanations, and other judgements where the same ones
    were judged twice, come before the n-gram baseline's, which is made beside them. Of equal ones, those judged on all
    contexts come before those judged to a precision, and finer precisions before coarser ones.
    """
    columns = [c for c in (*_EXPLAIN, *_JUDGE) if c in scores]
    if "judge" not in columns:  # nothing but failed explanations
        return []
    mask = (scores["control"] == "none") & scores["judge"].notna()
    for column, value in wanted.items():
        if value is not None:
            mask &= scores[column] == value
    found = []
    for _, group in scores[mask].groupby(columns, dropna=False, sort=False):
        by_model = {column: group[column].iloc[0] != BASELINE for column in columns}
        newest = int(group["explanation_id"].max()), by_model["judge"]
        rank = by_model.get("explainer", True), *newest, -(precision_of(group) or 0.0), int(group.index.max())
        found.append((rank, {c: plain(group[c].iloc[0]) for c in columns}))
    return [setup for _, setup in sorted(found, key=lambda item: item[0], reverse=True)]


def wanted_of(
    setups: Sequence[Mapping[str, Any]], name: str, *, explainer: str | None = None, judge: str | None = None
) -> list[dict[str, Any]]:
    """Those of the run ``name``'s set-ups with this explainer and judge (``None``: any), in their order.

    Raises NotFound, in one line that names those that there are, where no set-up has the explainer.
    """
    there = list(dict.fromkeys(str(setup.get("explainer")) for setup in setups))
    if explainer is not None and explainer not in there:
        those = f"those by {' and '.join(map(repr, there))} are" if there else "no explanation of it is"
        raise NotFound(f"--explainer {explainer!r} has no explanations of {name!r} that are scored; {those}")
    wanted = {"explainer": explainer, "judge": judge}
    return [dict(s) for s in setups if all(value is None or s.get(key) == value for key, value in wanted.items())]


def verdict_filters(setup: Mapping[str, Any]) -> dict[str, Any]:
    """What a set-up's verdicts under the latents' own explanations have in common, as filters of
    :meth:`autointerp.journal.journal.Journal.verdicts`."""
    same = {key: setup[key] for key in ("judge", "scorer", "settings_hash")}
    by = {"prompt_hash": setup["judge_prompt_hash"], "model": setup["model"] or ""}
    return {**same, **by, "control": "none", "replicate": 0}


def rows_of(scores: pd.DataFrame, setup: Mapping[str, Any]) -> pd.DataFrame:
    """The rows of one set-up, and those of its explainer that came to no judge (an explanation that failed).

    One row per latent and control: the last.
    """
    mask = pd.Series(True, index=scores.index)
    for column, value in setup.items():
        mask &= (scores[column] == value) | scores[column].isna()
    return scores[mask].drop_duplicates(["latent", "control"], keep="last")


def precision_of(rows: pd.DataFrame) -> float | None:
    """The half-width to which one set-up's explanations were judged; ``None`` where all contexts were."""
    if "precision" not in rows:
        return None
    told = rows.loc[rows["status"] == "ok", "precision"].dropna()
    return float(told.iloc[0]) if len(told) else None


def described(scores: pd.DataFrame, setup: Mapping[str, Any]) -> dict[str, Any]:
    """A set-up with the ``precision`` to which it was judged (``None``: all contexts) and its ``n_scored`` latents."""
    rows = rows_of(scores, setup)
    own = rows[rows["control"] == "none"]
    return {**setup, "precision": precision_of(rows), "n_scored": int((own["status"] == "ok").sum())}


def status_kind(status: object) -> str:
    """``ok``, ``ineligible`` or ``failed``, of a score row's status."""
    words = str(status)
    return "ok" if words == "ok" else "ineligible" if TOO_FEW in words else "failed"


def reason(row: Mapping[Any, Any]) -> str:
    """Why a row is not ``ok``, in the words of whoever wrote it."""
    return str(row["status"]).removeprefix("failed:").strip()


def plain(value: Any) -> Any:
    """A numpy or pandas scalar as JSON has it; what is missing is ``None``."""
    if value is None or pd.isna(value):
        return None
    return value.item() if isinstance(value, np.generic) else value
