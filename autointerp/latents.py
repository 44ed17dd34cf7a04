"""One latent: everything that the stages have found out about it, side by side.

A mean over hundreds of latents convinces nobody who has not looked at some of them. This gathers what there is on
one, from the same files as the findings; whatever has not been made yet is ``None`` or empty.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from autointerp.journal import Journal
from autointerp.reliability import reliability_findings, together_of, verdicts_of
from autointerp.scored import number, rows_of, setups
from autointerp.scorers.base import HARDER
from sae.align_stage import behaviour_folder
from sae.alignment import read_alignment
from sae.errors import NotFound
from sae.files import SCHEMA, read_table
from sae.overlap import DEFINITIONS, shared
from sae.pair_files import pair_path, read_sides
from sae.run import Run, command

if TYPE_CHECKING:
    from autointerp.contexts import Context
    from autointerp.material import Material

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
    """What is known of one latent of ``run``, as JSON values.

    ``matches`` has an entry per sibling run that it is aligned with: partners by encoder and decoder, cosines, which
    definitions of shared hold at ``threshold``, and what the partner was explained as there. ``contexts`` run
    from the strongest activation to the weakest. Raises :class:`NotFound` for a number that the run does not have.
    """
    m = run.settings.training.num_latents
    if not 0 <= latent < m:
        raise NotFound(f"latent {latent} does not exist in run {run.name!r}; it has latents 0 to {m - 1}")
    matches = [_match(run, sibling, latent, threshold) for sibling in run.siblings() if _aligned(run, sibling)]
    similar = [match["similarity"] for match in matches if match["similarity"] is not None]
    return {
        "schema": SCHEMA,
        "run": run.name,
        "commands": {
            "harvest": command(run.root, "harvest", "--sae", run.name),
            "explain": command(run.root, "explain", "--sae", run.name, "--indices", str(latent)),
            "score": command(run.root, "score", "--sae", run.name),
            "align": command(run.root, "align", run.name, *(x.name for x in run.siblings())),
        },
        "latent": latent,
        "study": run.study,
        "threshold": threshold,
        "firing": _firing(run, latent),
        "activations": _activations(run, latent),
        "similarity": float(np.mean(similar)) if similar else None,
        "n_shared": sum(match["shared"]["strict"] for match in matches),
        "matches": matches,
        "explanations": explanations_of(run, latent),
        "scores": scores_of(run, latent),
        "reliability": reliability_of(run),
        "contexts": [_as_json(context) for context in from_strong_to_weak(contexts_of(run, latent), n_contexts)],
    }


def contexts_of(run: Run, latent: int) -> Sequence[Context]:
    """The contexts that an explainer is shown; none where the run is not harvested."""
    if not (run.firings_folder / "store.json").is_file():
        return []
    return _material(run.root.resolve(), run.name).sampler.explaining(latent)


@functools.lru_cache(maxsize=2)
def _material(root: Path, name: str) -> Material:
    from autointerp.material import Material

    return Material.of(Run.open(name, root))


def from_strong_to_weak(contexts: Sequence[Context], n: int) -> list[Context]:
    """``n`` of the contexts, evenly over the ranks of their peaks, strongest first."""
    ordered = sorted(contexts, key=lambda c: -max(c.activations, default=0.0))
    if not ordered:
        return []
    return [ordered[i] for i in sorted({round(x) for x in np.linspace(0, len(ordered) - 1, n)})]


def explanations_of(run: Run, latent: int) -> list[dict[str, Any]]:
    """Every explanation in the journal, newest first; failed ones with their reason."""
    if not run.journal_path.exists():
        return []
    with Journal(run.journal_path) as journal:
        table = journal.explanations(latent=latent)
    columns = ["id", "explainer", "model", "draw", "status", "text", "failure", "created"]
    return [{str(k): _plain(v) for k, v in row.items()} for row in table[columns][::-1].to_dict("records")]


def scores_of(run: Run, latent: int) -> list[dict[str, Any]]:
    """Every row of the score table, controls among them."""
    path = run.stage_path("scores")
    if not path.exists():
        return []
    table = read_table(path)
    rows = table.loc[table["latent"] == latent, [c for c in _SCORE_COLUMNS if c in table]]
    return [{str(k): _plain(v) for k, v in row.items()} for row in rows.to_dict("records")]


def reliability_of(run: Run) -> list[dict[str, Any]]:
    """The reliability of each set-up of the run's scores, newest first: of all its latents, not of one.

    With it who explained and judged, and by which scorer; ``value`` and ``interval``, ``None`` where they are not to be
    had, and ``n`` latents.
    """
    path = run.stage_path("scores")
    if not path.exists():
        return []
    table, found = read_table(path), []
    for setup in setups(table):
        rows = rows_of(table, setup)
        told = reliability_findings(rows, verdicts_of(run, rows, setup), together_of(setup))
        found.append({**setup, **(told or {"value": None, "interval": None, "n": 0})})
    return found


def _aligned(run: Run, sibling: Run) -> bool:
    return pair_path(run.root / "alignments", run.name, sibling.name) is not None


def _match(run: Run, sibling: Run, latent: int, threshold: float) -> dict[str, Any]:
    """The latent's match in one sibling run, both ways of matching, and what the decoder's partner was said to be."""
    table = read_alignment(run.root / "alignments", run.name, sibling.name).a
    row = table.loc[table["latent"] == latent]
    entry = row.iloc[0]
    cosines = [number(entry["encoder_cosine"]), number(entry["decoder_cosine"])]
    partner = int(entry["decoder_partner"])
    told = [e for e in explanations_of(sibling, partner) if e["status"] == "ok"] if partner >= 0 else []
    scores = [s for s in scores_of(sibling, partner) if s["status"] == "ok" and s["control"] == "none"]
    # The scorers are never mixed; of explainers a language model comes before the baseline beside it.
    scores = [s for s in scores if s["scorer"] == "detection"]
    scores.sort(key=lambda s: (s["explainer"] != "ngram", s["explanation_id"]))
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
        "shared": {name: bool(shared(row, name, threshold)[0]) for name in DEFINITIONS},
        "behaviour": _behaviour(run, sibling, latent),
        "explanation": told[0]["text"] if told else None,
        "score": scores[-1]["balanced_accuracy"] if scores else None,
    }


def _behaviour(run: Run, sibling: Run, latent: int) -> dict[str, Any] | None:
    """Where it fires, beside what fires in the sibling; for a latent that the weights do not find again, more."""
    folder = behaviour_folder(run.root)
    if pair_path(folder, run.name, sibling.name) is None:
        return None
    row = read_sides(folder, run.name, sibling.name)[0].iloc[latent]

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


def _firing(run: Run, latent: int) -> dict[str, Any] | None:
    path = run.stage_path("firing")
    if not path.exists():
        return None
    table = read_table(path)
    row = table.loc[table["latent"] == latent].iloc[0]
    found = {column: _plain(row[column]) for column in table.columns if column != "latent"}
    found["rank"] = int((table["n_firings"] > row["n_firings"]).sum()) + 1
    contexts = run.stage_path("contexts")
    if contexts.exists():
        eligible = read_table(contexts).set_index("latent").loc[latent]
        found["eligible"] = bool(eligible["eligible"])
        found["ineligible_reason"] = str(eligible["ineligible_reason"] or "") or None
    return found


def _activations(run: Run, latent: int) -> dict[str, Any] | None:
    """A histogram of the latent's activations over all its firings, from 0 to the largest."""
    if not (run.firings_folder / "store.json").is_file():
        return None
    _, activations = run.store().firings(latent)
    if not len(activations):
        return None
    values = np.asarray(activations, np.float32)
    counts, edges = np.histogram(values, bins=_BINS, range=(0.0, float(values.max())))
    return {"edges": edges.tolist(), "counts": counts.tolist()}


def _as_json(context: Context) -> dict[str, Any]:
    return {
        "window": context.window,
        "stratum": context.stratum,
        "tokens": list(context.tokens),
        "activations": [round(float(a), 4) for a in context.activations],
    }


def _index(value: Any) -> int | None:
    return None if value < 0 else int(value)


def _plain(value: Any) -> Any:
    """A numpy or pandas scalar as JSON has it; what is missing is ``None``."""
    if value is None or pd.isna(value):
        return None
    return value.item() if isinstance(value, np.generic) else value
