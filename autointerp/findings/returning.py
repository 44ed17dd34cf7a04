"""What comes back when a dictionary is trained again with another seed, and how the dictionaries were trained.

The figures are :mod:`sae.alignment.overlap`'s; this only arranges them as JSON values, and adds what needs the firing
counts: how often the latents fire that return, and those that do not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from autointerp.findings.counterparts import counterpart_findings
from autointerp.findings.evidence import Study
from autointerp.findings.json_values import histogram, number
from autointerp.findings.statistics.correlation import quartiles
from sae.alignment.latent_table import CLASSES, shared_class
from sae.alignment.overlap import DEFINITIONS
from sae.alignment.similarity import range_of
from sae.common.files import read_table, table_metadata
from sae.study.run import Run

if TYPE_CHECKING:
    from sae.study.align import Compared

_CURVES = ("step", "tokens", "loss", "fvu", "l0", "dead_fraction", "learning_rate")
_CURVE_POINTS = 100
_MEANS = ("mean_encoder", "mean_decoder", "mean_max_encoder", "mean_max_decoder")
_BY_NUMBER = ("only_one", "all_of_n", "exactly_n")  # lists over the number of SAEs, 1 … S


def overlap_findings(study: Study) -> dict[str, Any] | None:
    if study.shared is None:
        return None
    harvested = study.firing.keys() >= set(study.compared)
    over = "alive latents" if harvested else "all latents, not all being harvested"
    return {"over": over, **overlap_tree(study.shared.as_dict(), study.view.definition)}


def overlap_tree(found: Mapping[str, Any], chosen: str = "strict") -> dict[str, Any]:
    """The ``overlap`` of the findings, out of :meth:`sae.alignment.overlap.StudyOverlap.as_dict`.

    Whatever is called ``null`` has the same figure of each null; ``null_range`` its least and largest over pairs of
    runs, of which each has a draw of its own; ``None`` for a single pair.
    """
    tree: dict[str, Any] = {"definition": chosen, "threshold": found["threshold"]}
    for name in DEFINITIONS:
        whole, everyone = found["alive"][name], found["all"][name]
        of_null = {null: of["alive"][name] for null, of in found["nulls"].items()}
        tree[name] = {
            "value": whole["value"],
            "interval": whole["interval"],
            "pairs": _values(whole["pairs"]),
            "pair_intervals": {pair: e["interval"] for pair, e in whole["pairs"].items()},
            "pairs_null": {null: _values(of["pairs"]) for null, of in of_null.items()},
            "over_all_latents": everyone["value"],
            "over_all_latents_interval": everyone["interval"],
            "over_all_latents_null": {null: of["all"][name]["value"] for null, of in found["nulls"].items()},
            "retained": whole["retained"],
            "retained_null": {null: of["retained"]["value"] for null, of in of_null.items()},
            "null": {null: of["value"] for null, of in of_null.items()},
            "null_range": {null: range_of(_values(of["pairs"])) for null, of in of_null.items()},
            **{key: [e["value"] for e in whole[key]] for key in _BY_NUMBER},
            **{f"{key}_intervals": [e["interval"] for e in whole[key]] for key in _BY_NUMBER},
            **{
                f"{key}_null": {null: [e["value"] for e in of[key]] for null, of in of_null.items()}
                for key in _BY_NUMBER
            },
        }
    return {
        **tree,
        **{key: tree[chosen][key] for key in _BY_NUMBER},
        "same_partner": found["same_partner"]["value"],
        "max_cosine": found["max_cosine"]["value"],
        "max_cosine_interval": found["max_cosine"]["interval"],
        "max_cosine_pairs": found["by_pair"]["max_cosine"],
        "sweep": found["sweep"],
        "nulls": {
            null: {
                **{key: tree[chosen][f"{key}_null"][null] for key in _BY_NUMBER},
                "pairs": tree[chosen]["pairs_null"][null],
                "same_partner": of["same_partner"]["value"],
                "same_partner_range": tree["lenient"]["null_range"][null],
                "max_cosine": of["max_cosine"]["value"],
                "max_cosine_range": range_of(of["by_pair"]["max_cosine"]),
                "sweep": of["sweep"],
            }
            for null, of in found["nulls"].items()
        },
    }


def _values(of_pairs: Mapping[str, Any]) -> dict[str, float | None]:
    return {pair: e["value"] for pair, e in of_pairs.items()}


def similarity_findings(study: Study) -> dict[str, Any] | None:
    return None if study.shared is None else similarity_tree(study.shared.as_dict())


def similarity_tree(found: Mapping[str, Any]) -> dict[str, Any]:
    """The ``similarity`` of the findings, out of :meth:`sae.alignment.overlap.StudyOverlap.as_dict`."""
    decoder, shape, nulls = found["mean_decoder"], found["histogram"], found["nulls"]
    return {
        **{name: found[name]["value"] for name in _MEANS},
        **{f"{name}_interval": found[name]["interval"] for name in _MEANS},
        "pairs": {name: found["by_pair"][name] for name in _MEANS},
        "mean_same_partner": shape["mean_agree"],
        "mean_different_partner": shape["mean_differ"],
        "pw_mcc": {
            "value": decoder["value"],
            "interval": decoder["interval"],
            "sd": found["pw_mcc_sd"],
            "null": {null: of["mean_decoder"]["value"] for null, of in nulls.items()},
            "null_sd": {null: of["pw_mcc_sd"] for null, of in nulls.items()},
        },
        "null": {
            null: {
                **{name: of[name]["value"] for name in _MEANS},
                **{f"{name}_range": range_of(of["by_pair"][name]) for name in _MEANS},
                "mean_same_partner": of["histogram"]["mean_agree"],
                "mean_different_partner": of["histogram"]["mean_differ"],
            }
            for null, of in nulls.items()
        },
        "bimodality": {
            **found["bimodality"],
            "null": {
                null: {key: of["bimodality"][key] for key in ("of_sample", "p_value")} for null, of in nulls.items()
            },
        },
        "histogram": {**_histogram(shape), "null": {null: _histogram(of["histogram"]) for null, of in nulls.items()}},
    }


def _histogram(shape: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "edges": shape["edges"],
        "counts": [a + b for a, b in zip(shape["agree"], shape["differ"], strict=True)],
        "same_partner": shape["agree"],
        "different_partner": shape["differ"],
        "encoder": shape["encoder"],
        "decoder": shape["decoder"],
    }


def membership_findings(study: Study, latents: pd.DataFrame) -> dict[str, Any] | None:
    """The focus run's alive latents by which other runs share them; by how many, where there are more than three."""
    if study.shared is None:
        return None
    focus, definition = study.focus.name, study.view.definition
    alive = int(latents["alive"].sum())
    regions = study.shared.alive[definition].regions[focus]
    of_nulls = {null: of.alive[definition].regions[focus] for null, of in study.shared.nulls.items()}
    others = [name for name in study.compared if name != focus]
    parts: list[tuple[str, list[str] | None, float, int]] = []
    if len(others) <= 2:
        sets: list[list[str]] = [[], *([o] for o in others), *([others] if len(others) > 1 else [])]
        for held in sets:
            words = f"only {focus}" if not held else f"with {held[0]}" + (" alone" if len(others) > 1 else "")
            parts.append(
                (words if len(held) < 2 else "with both", held, _fraction(regions, len(held), held), len(held))
            )
    else:
        for n in range(len(others) + 1):
            words = f"with {n} of {len(others)}" if n < len(others) else f"with all {n} others"
            words = words if n else f"only {focus}"
            parts.append((words, None, _fraction(regions, n), n))
    return {
        "definition": definition,
        "n_alive": alive,
        "parts": [
            {
                "label": words,
                "runs": held,
                "n_others": n,
                "shared_class": str(shared_class(n, len(others))),
                "n": round(fraction * alive),
                "fraction": fraction,
                "null": {null: _fraction(split, n, held) for null, split in of_nulls.items()},
            }
            for words, held, fraction, n in parts
        ],
    }


def _fraction(regions: Sequence[tuple[tuple[str, ...], float]], n: int, held: Sequence[str] | None = None) -> float:
    """Of the anchors, those that ``n`` other runs share; ``held`` names which."""
    return sum((part for by, part in regions if len(by) == n and (held is None or set(by) == set(held))), 0.0)


def frequency_by_class_findings(latents: pd.DataFrame) -> dict[str, Any] | None:
    """How often alive latents fire (firings per token), by shared class; logarithmic bins, five a decade."""
    if "shared_class" not in latents or "firing_frequency" not in latents:
        return None
    alive = latents[latents["alive"] & (latents["firing_frequency"] > 0)]
    if alive.empty:
        return None
    low, high = np.floor(np.log10(alive["firing_frequency"].min())), np.ceil(np.log10(alive["firing_frequency"].max()))
    steps = round(5 * max(1.0, high - low)) + 1
    edges = np.linspace(low, max(high, low + 1), steps)
    found = {}
    for name in CLASSES:
        members = alive.loc[alive["shared_class"] == name, "firing_frequency"]
        if len(members):
            counts = histogram(np.log10(members), edges)["counts"]
            found[name] = {
                "n": len(members),
                "median": number(members.median()),
                "quartiles": [number(q) for q in quartiles(members)],
                "histogram": {"edges": [float(10**e) for e in edges], "counts": counts},
            }
    return found


# --- training and firing ----------------------------------------------------------------------------------


def training_findings(runs: Sequence[Run]) -> dict[str, Any] | None:
    """Per run, the mean over the last twentieth of its log, and the log itself thinned for small curves."""
    logs = {run.name: read_table(run.training_log_path) for run in runs if run.training_log_path.exists()}
    if not logs:
        return None
    tails = {name: log.tail(max(1, len(log) // 20)) for name, log in logs.items()}
    return {
        **{
            key: {name: number(tail[key].mean()) for name, tail in tails.items()}
            for key in ("fvu", "l0", "dead_fraction", "auxk")
        },
        "quality": {run.name: found for run in runs if (found := table_metadata(run.training_log_path).get("quality"))},
        "tokens": {name: int(log["tokens"].iloc[-1]) if len(log) else 0 for name, log in logs.items()},
        "steps": {name: int(log["step"].iloc[-1]) if len(log) else 0 for name, log in logs.items()},
        "curves": {
            name: {
                column: [number(v) for v in log[column].iloc[_spaced(len(log), _CURVE_POINTS)]] for column in _CURVES
            }
            for name, log in logs.items()
            if len(log)
        },
    }


def _spaced(n: int, most: int) -> list[int]:
    """At most ``most`` positions over ``n`` entries, evenly, the first and the last among them."""
    return sorted({round(x) for x in np.linspace(0, n - 1, most)})


def firing_findings(study: Study) -> dict[str, Any] | None:
    if not study.firing:
        return None
    dead = {name: int(table["dead"].sum()) for name, table in study.firing.items()}
    size = {name: len(table) for name, table in study.firing.items()}
    tokens = {name: _tokens(table) for name, table in study.firing.items()}
    return {
        "tokens": min((t for t in tokens.values() if t is not None), default=None),
        "alive": {name: size[name] - dead[name] for name in dead},
        "dead": dead,
        "dead_fraction": {name: dead[name] / max(1, size[name]) for name in dead},
        "mean_l0": {name: number(table["firing_frequency"].sum()) for name, table in study.firing.items()},
    }


def _tokens(table: pd.DataFrame) -> int | None:
    """The harvested tokens, out of the counts and frequencies of the latent that fires most."""
    if table.empty or table["n_firings"].max() <= 0:
        return None
    most = int(table["n_firings"].argmax())
    return round(table["n_firings"].iloc[most] / table["firing_frequency"].iloc[most])


def alignment_findings(compared: Compared, definition: str = "strict") -> dict[str, Any]:
    """Return what aligned runs share under ``definition``, in the shape of the report's findings."""
    shared = compared.shared.as_dict()
    return {
        "runs": [{"name": run.name, "study": run.study, "seed": run.seed} for run in compared.runs],
        "compared": shared["runs"],
        "apart": compared.apart,
        "missing": [],
        "overlap": overlap_tree(shared, definition),
        "similarity": similarity_tree(shared),
        "counterparts": counterpart_findings(
            compared.behaviour, compared.alignments, compared.alive, compared.behaviour_facts
        ),
    }
