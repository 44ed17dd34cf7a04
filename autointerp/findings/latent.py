"""One latent: everything that the stages have found out about it, side by side.

A mean over hundreds of latents convinces nobody who has not looked at some of them. This gathers what there is on
one, from the same files as the findings; whatever has not been made yet is ``None`` or empty.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from autointerp.contexts.sample_record import sample_of
from autointerp.findings.json_values import number
from autointerp.findings.reliability import reliability_findings, verdicts_of
from autointerp.journal.journal import Journal
from autointerp.journal.method import BASELINE
from autointerp.scoring.scorers.base import HARDER
from autointerp.scoring.setups import plain, precision_of, rows_of, setups_of
from sae.alignment.alignment import read_alignment
from sae.alignment.overlap import DEFINITIONS, shared
from sae.alignment.pairs import pair_path, read_sides
from sae.common.commands import command
from sae.common.errors import NotFound
from sae.common.files import SCHEMA, read_table
from sae.study.align import behaviour_folder
from sae.study.run import MAIN_SCORER, Run

if TYPE_CHECKING:
    from autointerp.contexts.material import Material
    from autointerp.contexts.sampler import Context

_BINS = 30
_SCORE_COLUMNS = (
    *("explanation_id", "explainer", "judge", "model", "scorer", "control", "status"),
    *(f"{name}{end}" for name in ("tpr", "tnr", "auroc") for end in ("", "_low", "_high")),
    *("balanced_accuracy", "ba_low", "ba_high", "n_active", "n_inactive", "n_failed"),
    *(f"{name}_{kind}{end}" for kind in HARDER for name in ("ba", "tnr", "auroc") for end in ("", "_low", "_high")),
    *(f"{name}_{kind}" for kind in HARDER for name in ("n", "n_failed")),
    *("precision", "stopped"),
)


def latent_findings(run: Run, latent: int, n_contexts: int = 8, threshold: float = 0.7) -> dict[str, Any]:
    """What is known of one latent of ``run``, as JSON values: :meth:`LatentReader.findings`, and how far the run's
    scores can be relied upon, of the set-ups that have a score of this latent."""
    return {**LatentReader(run, threshold).findings(latent, n_contexts), "reliability": reliability_of(run, latent)}


class LatentReader:
    """What is known of any latent of one run. Every table is read once, when it is first needed.

    ``threshold`` is that of the definitions of shared.
    """

    def __init__(self, run: Run, threshold: float = 0.7) -> None:
        self.run, self.threshold = run, threshold
        self._tables: dict[Path, pd.DataFrame | None] = {}

    def findings(self, latent: int, n_contexts: int = 8) -> dict[str, Any]:
        """What is known of one latent, as JSON values.

        ``matches`` has an entry per sibling run that it is aligned with: partners by encoder and decoder, cosines,
        which definitions of shared hold, and what the partner was explained as there. ``contexts`` run from the
        strongest activation to the weakest. ``cannot_be_explained`` says why, where that is so. Raises
        :class:`NotFound` for a number that the run does not have.
        """
        run, m = self.run, self.run.settings.training.num_latents
        if not 0 <= latent < m:
            raise NotFound(f"latent {latent} does not exist in run {run.name!r}; it has latents 0 to {m - 1}")
        firing = self._firing(latent)
        unable, words = _why_unable(firing), ("explain", "--sae", run.name, "--indices", str(latent))
        matches = [self._match(sibling, latent) for sibling in self.siblings]
        similar = [match["similarity"] for match in matches if match["similarity"] is not None]
        return {
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
            "similarity": float(np.mean(similar)) if similar else None,
            "n_shared": sum(match["shared"]["strict"] for match in matches),
            "matches": matches,
            "explanations": self.explanations(run, latent),
            "scores": self.scores(run, latent),
            "contexts": [as_json(context) for context in self.contexts(run, latent, n_contexts)],
        }

    @functools.cached_property
    def siblings(self) -> list[Run]:
        """The trained runs of the study that this one is aligned with."""
        return [run for run in self._all_siblings if _aligned(self.run, run)]

    @functools.cached_property
    def _all_siblings(self) -> list[Run]:
        return self.run.siblings()

    def contexts(self, run: Run, latent: int, n: int) -> list[Context]:
        """``n`` of the contexts that an explainer is shown, from strong to weak; none where nothing was harvested."""
        material = self.material(run) if n else None
        return [] if material is None else from_strong_to_weak(material.sampler.explaining(latent), n)

    def material(self, run: Run) -> Material | None:
        """The contexts of ``run``; ``None`` where it is not harvested."""
        if not (run.firings_folder / "store.json").is_file():
            return None
        return self._materials(run.name, run.root.resolve())

    @functools.cached_property
    def _materials(self) -> Callable[[str, Path], Material]:
        from autointerp.contexts.material import Material

        return functools.cache(lambda name, root: Material.of(Run.open(name, root)))

    def explanations(self, run: Run, latent: int) -> list[dict[str, Any]]:
        """Every explanation in the run's journal, newest first; failed ones with their reason."""
        rows = self._of(self._journal(run), latent)
        columns = ["id", "explainer", "model", "draw", "status", "text", "failure", "created"]
        return [{k: plain(row[k]) for k in columns} for row in rows[::-1]]

    def scores(self, run: Run, latent: int) -> list[dict[str, Any]]:
        """Every row of the run's score table, controls among them."""
        rows = self._of(self._table(run.stage_path("scores")), latent)
        return [{k: plain(row[k]) for k in _SCORE_COLUMNS if k in row} for row in rows]

    def _match(self, sibling: Run, latent: int) -> dict[str, Any]:
        """The latent's match in one sibling, both ways of matching, and what the decoder's partner was said to be."""
        entry = self._alignments[sibling.name].iloc[latent]
        cosines = [number(entry["encoder_cosine"]), number(entry["decoder_cosine"])]
        partner = int(entry["decoder_partner"])
        told = [e for e in self.explanations(sibling, partner) if e["status"] == "ok"]
        scores = [s for s in self.scores(sibling, partner) if s["status"] == "ok" and s["control"] == "none"]
        # The scorers are never mixed; of explainers any other comes before the baseline beside it.
        scores = [s for s in scores if s["scorer"] == MAIN_SCORER]
        scores.sort(key=lambda s: (s["explainer"] != BASELINE, s["explanation_id"]))
        row = self._alignments[sibling.name].iloc[[latent]]
        return {
            "latent": latent,
            "run": sibling.name,
            "encoder_partner": _index(entry["encoder_partner"]),
            "encoder_cosine": cosines[0],
            "decoder_partner": _index(entry["decoder_partner"]),
            "decoder_cosine": cosines[1],
            "max_encoder_neighbor": _index(entry["max_encoder_neighbor"]),
            "max_encoder_cosine": number(entry["max_encoder_cosine"]),
            "max_decoder_neighbor": _index(entry["max_decoder_neighbor"]),
            "max_decoder_cosine": number(entry["max_decoder_cosine"]),
            "similarity": None if None in cosines else float(np.mean([c for c in cosines if c is not None])),
            "shared": {name: bool(shared(row, name, self.threshold)[0]) for name in DEFINITIONS},
            "behaviour": _behaviour(self._behaviours[sibling.name], latent),
            "explanation": told[0]["text"] if told else None,
            "score": scores[-1]["balanced_accuracy"] if scores else None,
        }

    @functools.cached_property
    def _alignments(self) -> dict[str, pd.DataFrame]:
        run = self.run
        tables = {x.name: read_alignment(run.root / "alignments", run.name, x.name).a for x in self.siblings}
        return {name: table.sort_values("latent", ignore_index=True) for name, table in tables.items()}

    @functools.cached_property
    def _behaviours(self) -> dict[str, pd.DataFrame | None]:
        folder = behaviour_folder(self.run.root)
        return {
            x.name: None
            if pair_path(folder, self.run.name, x.name) is None
            else read_sides(folder, self.run.name, x.name)[0]
            for x in self.siblings
        }

    def _firing(self, latent: int) -> dict[str, Any] | None:
        table = self._table(self.run.stage_path("firing"))
        if table is None:
            return None
        row = self._of(table, latent)[0]
        found = {column: plain(row[column]) for column in table.columns if column != "latent"}
        found["rank"] = int((table["n_firings"] > row["n_firings"]).sum()) + 1
        for eligible in self._of(self._table(self.run.stage_path("contexts")), latent):
            found["eligible"] = bool(eligible["eligible"])
            found["ineligible_reason"] = str(eligible["ineligible_reason"] or "") or None
        return found

    def _activations(self, latent: int) -> dict[str, Any] | None:
        """A histogram of the latent's activations over all its firings, from 0 to the largest."""
        material = self.material(self.run)
        if material is None:
            return None
        _, activations = material.store.firings(latent)
        if not len(activations):
            return None
        values = np.asarray(activations, np.float32)
        counts, edges = np.histogram(values, bins=_BINS, range=(0.0, float(values.max())))
        return {"edges": edges.tolist(), "counts": counts.tolist()}

    def _table(self, path: Path) -> pd.DataFrame | None:
        if path not in self._tables:
            self._tables[path] = read_table(path) if path.exists() else None
        return self._tables[path]

    def _journal(self, run: Run) -> pd.DataFrame | None:
        path = run.journal_path
        if path not in self._tables and path.exists():
            with Journal(path) as journal:
                self._tables[path] = journal.explanations()
        return self._tables.get(path)

    @functools.cached_property
    def _of(self) -> Callable[[pd.DataFrame | None, int], list[dict[str, Any]]]:
        """The rows of a table that are about a latent, in order."""
        places: dict[int, dict[Any, Any]] = {}

        def rows(table: pd.DataFrame | None, latent: int) -> list[dict[str, Any]]:
            if table is None:
                return []
            if id(table) not in places:
                places[id(table)] = table.groupby("latent").indices
            found = table.iloc[places[id(table)].get(latent, [])]
            return [{str(k): v for k, v in row.items()} for row in found.to_dict("records")]

        return rows


def contexts_of(run: Run, latent: int) -> Sequence[Context]:
    """The contexts that an explainer is shown; none where the run is not harvested."""
    if not (run.firings_folder / "store.json").is_file():
        return []
    return _material(run.root.resolve(), run.name).sampler.explaining(latent)


@functools.lru_cache(maxsize=2)
def _material(root: Path, name: str) -> Material:
    from autointerp.contexts.material import Material

    return Material.of(Run.open(name, root))


def from_strong_to_weak(contexts: Sequence[Context], n: int) -> list[Context]:
    """``n`` of the contexts, evenly over the ranks of their peaks, strongest first."""
    ordered = sorted(contexts, key=lambda c: -max(c.activations, default=0.0))
    if not ordered:
        return []
    return [ordered[i] for i in sorted({round(x) for x in np.linspace(0, len(ordered) - 1, n)})]


def reliability_of(run: Run, latent: int | None = None) -> list[dict[str, Any]]:
    """The reliability of each set-up of the run's scores, newest first: of all its latents, not of one.

    With a ``latent`` only of those that have a score of it. With it who explained and judged, by which scorer and to
    what ``precision`` (``None``: on all contexts); ``value`` and ``interval``, ``None`` where they are not to be
    had, and ``n`` latents.
    """
    path = run.stage_path("scores")
    if not path.exists():
        return []
    table, found = read_table(path), []
    for setup in setups_of(table):
        rows = rows_of(table, setup)
        own = rows[(rows["control"] == "none") & (rows["status"] == "ok")]
        if latent is not None and latent not in set(own["latent"]):
            continue
        told = reliability_findings(rows, verdicts_of(run, rows, setup), sample_of(run, setup))
        found.append({**setup, "precision": precision_of(rows), **(told or {"value": None, "interval": None, "n": 0})})
    return found


def _why_unable(firing: dict[str, Any] | None) -> str | None:
    """Why a latent that fires so cannot be explained; ``None`` where it can, or contexts have not been counted."""
    if firing is None:
        return None
    if firing["dead"]:
        return "it never fires over the harvested tokens"
    return None if firing.get("eligible", True) else firing["ineligible_reason"] or "too few contexts"


def _aligned(run: Run, sibling: Run) -> bool:
    return pair_path(run.root / "alignments", run.name, sibling.name) is not None


def _behaviour(table: pd.DataFrame | None, latent: int) -> dict[str, Any] | None:
    """Where it fires, beside what fires in the sibling; for a latent that the weights do not find again, more."""
    if table is None:
        return None
    row = table.iloc[latent]
    told = row["relation"] if isinstance(row["relation"], str) else None  # a column without any is read as numbers

    def paired(latents: str, values: str) -> list[dict[str, Any]] | None:
        if told is None:
            return None
        return [{"latent": int(i), "value": float(x)} for i, x in zip(row[latents], row[values], strict=True)]

    return {
        "jaccard_partner": _index(row["jaccard_partner"]),
        **{key: number(row[key]) for key in ("jaccard", "p_there", "p_here")},
        "max_jaccard_neighbor": _index(row["max_jaccard_neighbor"]),
        "max_jaccard": number(row["max_jaccard"]),
        "decoder_partner": {key: number(row[f"decoder_partner_{key}"]) for key in ("jaccard", "p_there", "p_here")},
        "relation": told,
        "relation_latents": None if told is None else [int(i) for i in row["relation_latents"]],
        "relation_covered": number(row["relation_covered"]),
        "rebuilt": number(row["rebuilt"]),
        "rebuilt_null": number(row.get("rebuilt__rotated")),
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
