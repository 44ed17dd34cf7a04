"""Gather everything known about one latent; missing parts are ``None`` or empty."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from autointerp.contexts.sampling import load_sample
from autointerp.explaining.copies import find_flags
from autointerp.findings.json_values import number, to_json
from autointerp.findings.reliability import reliability_findings, verdicts_of
from autointerp.findings.shape import Reliability
from autointerp.journal.journal import open_journal
from autointerp.journal.method import BASELINE
from autointerp.scoring.scorers.base import SCORE_COLUMNS
from autointerp.scoring.setups import FIRST, own_scores, plain, precision_of, records_of, rows_of, setups_of
from sae.alignment.alignment import pair_path, read_alignment, read_sides
from sae.alignment.overlap import DEFINITIONS, find_shared
from sae.common.commands import command
from sae.common.errors import NotApplicable, NotFound
from sae.common.estimate import UNKNOWN
from sae.common.files import SCHEMA, read_table
from sae.study.align import behaviour_folder
from sae.study.logits import LogitTable
from sae.study.run import MAIN_SCORER, Run

if TYPE_CHECKING:
    from autointerp.contexts.material import Material
    from autointerp.contexts.sampler import Context

_BINS = 30
_SCORE_COLUMNS = (
    *("explanation_id", "explainer", "judge", "model", "scorer", "control", *FIRST),
    *(name for name in SCORE_COLUMNS if not name.startswith("stratum")),
)
_EXPLANATION_COLUMNS = ("id", "explainer", "model", "draw", "status", "text", "failure", "created")


def latent_findings(run: Run, latent: int, n_contexts: int = 8, threshold: float = 0.7) -> dict[str, Any]:
    """Return :meth:`LatentReader.findings` and the reliability of the set-ups that scored the latent."""
    return {**LatentReader(run, threshold).findings(latent, n_contexts), "reliability": reliability_of(run, latent)}


class LatentReader:
    """Reads the findings of any latent of one run, and every table only once.

    ``threshold`` is that of the definitions of shared.
    """

    def __init__(self, run: Run, threshold: float = 0.7) -> None:
        self.run, self.threshold = run, threshold
        self._all_siblings = run.siblings()
        self.siblings = [x for x in self._all_siblings if pair_path(run.root / "alignments", run.name, x.name)]
        """The trained runs of the study that this one is aligned with."""
        self._tables: dict[Path, tuple[pd.DataFrame, dict[Any, Any]] | None] = {}
        self._flagged: dict[Path, dict[int, list[str]]] = {}
        self._materials: dict[str, Material] = {}

    def findings(self, latent: int, n_contexts: int = 8) -> dict[str, Any]:
        """Return everything known about one latent, as JSON values.

        ``matches`` has an entry per aligned sibling: partners by encoder and decoder, cosines, which definitions of
        shared hold, and the partner's explanation. ``contexts`` are ordered from the strongest activation.
        ``cannot_be_explained`` and ``no_logits`` give the reason, if any. Raises :class:`NotFound` for a number the
        run does not have.
        """
        run = self.run
        run.check_latent(latent)
        firing = self._firing(latent)
        unable, words = _why_unable(firing), ("explain", "--sae", run.name, "--indices", str(latent))
        matches = [self._match(sibling, latent) for sibling in self.siblings]
        similar = [match["similarity"] for match in matches if match["similarity"] is not None]
        found: dict[str, Any] = to_json(
            {
                "schema": SCHEMA,
                "run": run.name,
                "commands": {
                    "harvest": command(run.root, "harvest", "--sae", run.name),
                    "explain": None if unable else command(run.root, *words),
                    "score": command(run.root, "score", "--sae", run.name),
                    "align": command(run.root, "align", run.name, *(x.name for x in self._all_siblings)),
                },
                "latent": latent,
                "study": run.study,
                "threshold": self.threshold,
                "firing": firing,
                "cannot_be_explained": unable,
                "activations": self._activations(latent),
                "logits": None if isinstance(self._logits, str) else self._logits[latent],
                "no_logits": self._logits if isinstance(self._logits, str) else None,
                "similarity": np.mean(similar) if similar else None,
                "n_shared": sum(match["shared"]["strict"] for match in matches),
                "matches": matches,
                "explanations": self.explanations(run, latent),
                "scores": self.scores(run, latent),
                "contexts": [as_json(context) for context in self.contexts(run, latent, n_contexts)],
            }
        )
        return found

    def contexts(self, run: Run, latent: int, n: int) -> list[Context]:
        """Return ``n`` of the contexts that an explainer is shown, strongest first; none if nothing was harvested."""
        material = self.material(run) if n else None
        return [] if material is None else from_strong_to_weak(material.sampler.explaining(latent), n)

    def material(self, run: Run) -> Material | None:
        """Return the contexts of ``run``; ``None`` if it is not harvested."""
        from autointerp.contexts.material import Material

        if run.name not in self._materials and (run.firings_folder / "store.json").is_file():
            self._materials[run.name] = Material.of(run)
        return self._materials.get(run.name)

    def explanations(self, run: Run, latent: int) -> list[dict[str, Any]]:
        """Return every explanation in the run's journal, by draw and newest first; failed ones with their reason.

        ``flags`` say why an explanation is suspicious (:func:`autointerp.explaining.copies.find_flags`).
        """
        rows = sorted(self._rows(run.journal_path, latent), key=lambda row: (row["draw"], -row["id"]))
        flags = self._flags(run.journal_path) if rows else {}
        return [{**{k: plain(row[k]) for k in _EXPLANATION_COLUMNS}, "flags": flags.get(row["id"], [])} for row in rows]

    def scores(self, run: Run, latent: int) -> list[dict[str, Any]]:
        """Return every row of the run's score table, including controls."""
        rows = self._rows(run.stage_path("scores"), latent)
        return [{k: plain(row[k]) for k in _SCORE_COLUMNS if k in row} for row in rows]

    def _match(self, sibling: Run, latent: int) -> dict[str, Any]:
        """Return the latent's partners in one sibling, and the decoder partner's explanation and score."""
        row = self._alignments[sibling.name].iloc[[latent]]
        entry = row.iloc[0]
        partner = int(entry["decoder_partner"])
        explanations = [e for e in self.explanations(sibling, partner) if e["status"] == "ok"]
        # Scorers are never mixed; any other explainer comes before the baseline.
        wanted = {"status": "ok", "control": "none", "scorer": MAIN_SCORER}
        scores = [s for s in self.scores(sibling, partner) if wanted.items() <= s.items()]
        scores = [s for s in scores if not any(map(s.get, FIRST))]
        scores.sort(key=lambda s: (s["explainer"] != BASELINE, s["explanation_id"]))
        partners = ("encoder_partner", "decoder_partner", "max_encoder_neighbor", "max_decoder_neighbor")
        cosines = ("encoder_cosine", "decoder_cosine", "max_encoder_cosine", "max_decoder_cosine")
        return {
            "latent": latent,
            "run": sibling.name,
            **{key: _index(entry[key]) for key in partners},
            **{key: entry[key] for key in cosines},
            "similarity": number((entry["encoder_cosine"] + entry["decoder_cosine"]) / 2),
            "shared": {name: bool(find_shared(row, name, self.threshold)[0]) for name in DEFINITIONS},
            "behaviour": _behaviour(self._behaviours[sibling.name], latent),
            "explanation": explanations[0]["text"] if explanations else None,
            "score": scores[-1]["balanced_accuracy"] if scores else None,
        }

    @functools.cached_property
    def _alignments(self) -> dict[str, pd.DataFrame]:
        folder = self.run.root / "alignments"
        tables = {x.name: read_alignment(folder, self.run.name, x.name).a for x in self.siblings}
        return {name: table.sort_values("latent", ignore_index=True) for name, table in tables.items()}

    @functools.cached_property
    def _behaviours(self) -> dict[str, pd.DataFrame | None]:
        folder, name = behaviour_folder(self.run.root), self.run.name
        has_behaviour = {x.name: pair_path(folder, name, x.name) is not None for x in self.siblings}
        return {x: read_sides(folder, name, x)[0] if has else None for x, has in has_behaviour.items()}

    def _firing(self, latent: int) -> dict[str, Any] | None:
        path = self.run.stage_path("firing")
        if not (rows := self._rows(path, latent)):
            return None
        found = {column: plain(value) for column, value in rows[0].items() if column != "latent"}
        (table, _) = self._table(path) or (pd.DataFrame(), {})
        found["rank"] = int((table["n_firings"] > rows[0]["n_firings"]).sum()) + 1
        for eligible in self._rows(self.run.stage_path("contexts"), latent):
            found["eligible"] = bool(eligible["eligible"])
            found["ineligible_reason"] = str(eligible["ineligible_reason"] or "") or None
        return found

    def _activations(self, latent: int) -> dict[str, Any] | None:
        """Return a histogram of the latent's activations over all its firings, from 0 to the largest."""
        material = self.material(self.run)
        values = np.asarray([] if material is None else material.store.firings(latent)[1], np.float32)
        if not len(values):
            return None
        counts, edges = np.histogram(values, bins=_BINS, range=(0.0, float(values.max())))
        return {"edges": edges, "counts": counts}

    @functools.cached_property
    def _logits(self) -> LogitTable | str:
        """The logits of the run's latents, or why there are none."""
        try:
            return LogitTable(self.run)
        except (NotApplicable, NotFound) as error:
            return str(error)

    def _table(self, path: Path) -> tuple[pd.DataFrame, dict[Any, Any]] | None:
        """Return a table, or a journal's explanations, with the places of each latent's rows; ``None`` if missing."""
        if path not in self._tables:
            self._tables[path] = None
            if path.exists():
                if path.suffix == ".sqlite":
                    with open_journal(Run(path.parent.name, path.parent.parent)) as journal:
                        table = journal.explanations()
                else:
                    table = read_table(path)
                self._tables[path] = table, table.groupby("latent").indices
        return self._tables[path]

    def _flags(self, journal: Path) -> dict[int, list[str]]:
        if journal not in self._flagged:
            found = self._table(journal)
            self._flagged[journal] = {} if found is None else find_flags(found[0])
        return self._flagged[journal]

    def _rows(self, path: Path, latent: int) -> list[dict[str, Any]]:
        """Return the rows of a table about a latent, in order."""
        if (found := self._table(path)) is None:
            return []
        table, places = found
        return records_of(table.iloc[places.get(latent, [])])


def from_strong_to_weak(contexts: Sequence[Context], n: int) -> list[Context]:
    """Return ``n`` of the contexts, evenly spaced by rank of their peaks, strongest first."""
    ordered = sorted(contexts, key=lambda c: -max(c.activations, default=0.0))
    places = {round(x) for x in np.linspace(0, len(ordered) - 1, n)} if ordered else ()
    return [ordered[i] for i in sorted(places)]


def reliability_of(run: Run, latent: int | None = None) -> list[dict[str, Any]]:
    """Return the reliability of each set-up of the run's scores, newest first; always over all its latents.

    With a ``latent``, only for set-ups that scored it. Each row has the set-up, its ``precision`` (``None``: all
    contexts), ``value`` and ``interval`` (``None`` if undefined), and ``n`` latents.
    """
    path = run.stage_path("scores")
    if not path.exists():
        return []
    table, found = read_table(path), []
    for setup in setups_of(table):
        rows = rows_of(table, setup)
        if latent is None or latent in own_scores(rows).index:
            figures = reliability_findings(rows, verdicts_of(run, rows, setup), load_sample(run, setup))
            figures = figures or Reliability(UNKNOWN, 0)
            found.append({**to_json(setup), "precision": precision_of(rows), **to_json(figures)})
    return found


def _why_unable(firing: dict[str, Any] | None) -> str | None:
    """Return why a latent cannot be explained; ``None`` if it can, or contexts have not been counted."""
    if firing is None:
        return None
    if firing["dead"]:
        return "it never fires over the harvested tokens"
    return None if firing.get("eligible", True) else firing["ineligible_reason"] or "too few contexts"


def _behaviour(table: pd.DataFrame | None, latent: int) -> dict[str, Any] | None:
    """Return how the latent fires compared with its partners; for an unshared latent, also its relation."""
    if table is None:
        return None
    row = table.iloc[latent]
    relation = row["relation"] if isinstance(row["relation"], str) else None  # pandas reads an empty column as numbers

    def paired(latents: str, values: str) -> list[dict[str, Any]] | None:
        if relation is None:
            return None
        return [{"latent": int(i), "value": float(x)} for i, x in zip(row[latents], row[values], strict=True)]

    return {
        "jaccard_partner": _index(row["jaccard_partner"]),
        **{key: row[key] for key in ("jaccard", "p_there", "p_here")},
        "max_jaccard_neighbor": _index(row["max_jaccard_neighbor"]),
        "max_jaccard": row["max_jaccard"],
        "decoder_partner": {key: row[f"decoder_partner_{key}"] for key in ("jaccard", "p_there", "p_here")},
        "relation": relation,
        "relation_latents": None if relation is None else [int(i) for i in row["relation_latents"]],
        "relation_covered": row["relation_covered"],
        "rebuilt": row["rebuilt"],
        "rebuilt_null": row.get("rebuilt__rotated"),
        "rebuilt_from": paired("rebuilt_from", "rebuilt_weights"),
        "nearest_decoder": paired("nearest_decoder", "nearest_decoder_cosines"),
        "nearest_firing": paired("nearest_firing", "nearest_firing_jaccards"),
    }


def as_json(context: Context) -> dict[str, Any]:
    return {
        "window": context.window,
        "stratum": context.stratum,
        "tokens": list(context.tokens),
        "activations": [round(float(a), 4) for a in context.activations],
    }


def _index(value: Any) -> int | None:
    return None if value < 0 else int(value)
