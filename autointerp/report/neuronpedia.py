"""Write explanations as JSON lines, in the form of Neuronpedia's exports.

An export (``v1/MODEL/SOURCE/explanations/batch-0.jsonl.gz``, see docs.neuronpedia.org/api-and-data) has a line per
explanation with the columns of its table: ``id``, ``modelId``, ``layer`` (the source's id, such as ``6-res-jb``),
``index`` (the latent, as text), ``authorId``, ``description``, ``typeName``, ``explanationModelName``. Its importer
takes the columns from the first line, so every line has the same keys, and ignores unknown keys such as ``scores``,
which has the form of its API.

An installation must know types, models and authors before it imports the lines. Types and scores have our own names,
because the protocols differ from those that Neuronpedia's names mean.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import pandas as pd

from autointerp.findings.json_values import number
from autointerp.notebook import Run as OpenedRun
from sae.common.errors import BadInput
from sae.common.files import digest, read_table
from sae.study.run import Run

DEFAULT_AUTHOR = "clkht01d40000jv08hvalcvly"
"""What Neuronpedia's own tools write as author where none is set."""
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_LAYER = re.compile(r"\.(\d+)(?:\.|$)")
_OF_SCORE = (
    *("balanced_accuracy", "ba_low", "ba_high", "tpr", "tnr", "auroc", "auroc_low", "auroc_high"),
    *("n_active", "n_inactive", "n_failed"),
)


@dataclass(frozen=True)
class Ids:
    """Neuronpedia's ids of the model, the SAE and the author."""

    model: str
    source: str
    author: str = DEFAULT_AUTHOR

    @classmethod
    def of(cls, run: Run, model: str | None = None, source: str | None = None, author: str | None = None) -> Ids:
        """Return the given ids; by default the model's name without owner, and the layer before the run's name."""
        subject = str(run.record["subject"]["source"]).partition("@")[0]
        if subject == "bundled":
            from sae.activations.bundled import BUNDLED

            subject = BUNDLED.name
        layer = _LAYER.search("." + run.record["hookpoint"])
        usual = f"{layer.group(1)}-{run.name}" if layer else run.name
        found = cls(model or PurePath(subject).name.lower(), source or usual, author or DEFAULT_AUTHOR)
        for option, value in (("model", found.model), ("source", found.source), ("author", found.author)):
            if not _ID.fullmatch(value):
                letters = "letters, digits, '.', '_' and '-'"
                raise BadInput(f"{value!r} is no id of Neuronpedia's; give one of {letters} with --{option}-id")
        return found


def lines_of(run: Run, ids: Ids) -> tuple[list[dict[str, Any]], int]:
    """Return a line for each explanation (draw 0) that did not fail, by latent, and the number of failed ones.

    Raises NotFound if there are no explanations.
    """
    table = OpenedRun(run.name, run.root).explanations()
    table = table[table["draw"] == 0]
    good = table[table["status"] == "ok"].sort_values(["latent", "id"], kind="stable")
    if good.empty:
        raise run.missing_error("explanations", "explain")
    path = run.stage_path("scores")
    scores = _scores_by_explanation(read_table(path)) if path.exists() else {}
    rows = ({str(k): v for k, v in row.items()} for row in good.to_dict("records"))
    return [_line(run, row, scores.get(int(row["id"]), []), ids) for row in rows], len(table) - len(good)


def _line(run: Run, row: Mapping[str, Any], scores: list[dict[str, Any]], ids: Ids) -> dict[str, Any]:
    same = {key: row[key] for key in ("latent", "explainer", "settings_hash", "prompt_hash", "model", "draw")}
    notes = f"sae-autointerp, run {run.name}, explanation {row['id']}, settings {row['settings_hash'][:12]}"
    return {
        # A digest of its identity, so that importing an explanation twice stores it once.
        "id": f"ai{digest([ids.model, ids.source, same])[:23]}",
        "modelId": ids.model,
        "layer": ids.source,
        "index": str(row["latent"]),
        "authorId": ids.author,
        "description": row["text"],
        "typeName": f"sae-autointerp_{row['explainer']}",
        "explanationModelName": row["model"] or None,
        "notes": notes,
        "createdAt": row["created"],
        "scores": scores,
    }


def _scores_by_explanation(table: pd.DataFrame) -> dict[int, list[dict[str, Any]]]:
    """Map each explanation to its valid scores under its own latent."""
    is_repeated = table.reindex(columns=["replicate"]).gt(0).any(axis=1)
    good = table[(table["control"] == "none") & (table["status"] == "ok") & ~is_repeated]
    found: dict[int, list[dict[str, Any]]] = {}
    for row in good.to_dict("records"):
        entry = {
            "value": number(row["balanced_accuracy"]),
            "explanationScoreTypeName": f"sae-autointerp_{row['scorer']}",
            "explanationScoreModelName": row["model"] or row["judge"],
            "jsonDetails": json.dumps({name: number(row[name]) for name in _OF_SCORE if name in row}),
        }
        found.setdefault(int(row["explanation_id"]), []).append(entry)
    return found
