"""What comes back when a dictionary is trained again with another seed, and how the dictionaries were trained.

The figures are :mod:`sae.overlap`'s; this only arranges them as JSON values, and adds what needs the firing
counts: how often the latents fire that return, and those that do not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from autointerp.evidence import Study
from autointerp.scored import CLASSES, histogram, number
from autointerp.statistics import quartiles
from sae.files import read_table
from sae.overlap import DEFINITIONS
from sae.run import Run

_CURVES = ("step", "tokens", "loss", "fvu", "l0", "dead_fraction", "learning_rate")
_CURVE_POINTS = 100
_BY_NUMBER = ("only_one", "all_of_n", "exactly_n")  # lists over the number of SAEs, 1 … S


def overlap_findings(study: Study) -> dict[str, Any] | None:
    if study.shared is None:
        return None
    harvested = study.firing.keys() >= set(study.compared)
    over = "alive latents" if harvested else "all latents, not all being harvested"
    return {"over": over, **overlap_tree(study.shared.as_dict(), study.view.definition)}


def overlap_tree(found: Mapping[str, Any], chosen: str = "strict") -> dict[str, Any]:
    """The ``overlap`` of the findings, out of :meth:`sae.overlap.StudyOverlap.as_dict`."""
    tree: dict[str, Any] = {"definition": chosen, "threshold": found["threshold"]}
    for name in DEFINITIONS:
        whole, everyone = found["alive"][name], found["all"][name]
        tree[name] = {
            "value": whole["value"],
            "interval": whole["interval"],
            "pairs": {pair: e["value"] for pair, e in whole["pairs"].items()},
            "pair_intervals": {pair: e["interval"] for pair, e in whole["pairs"].items()},
            "over_all_latents": everyone["value"],
            "over_all_latents_interval": everyone["interval"],
            "retained": whole["retained"],
            "null": {null: of["alive"][name]["value"] for null, of in found["nulls"].items()},
            **{key: [e["value"] for e in whole[key]] for key in _BY_NUMBER},
            **{f"{key}_intervals": [e["interval"] for e in whole[key]] for key in _BY_NUMBER},
        }
    return {
        **tree,
        **{key: tree[chosen][key] for key in _BY_NUMBER},
        "same_partner": found["same_partner"]["value"],
        "max_cosine": found["max_cosine"]["value"],
        "max_cosine_interval": found["max_cosine"]["interval"],
        "sweep": found["sweep"],
        "nulls": {
            null: {
                **{key: [e["value"] for e in of["alive"][chosen][key]] for key in _BY_NUMBER},
                "same_partner": of["same_partner"]["value"],
                "max_cosine": of["max_cosine"]["value"],
                "sweep": of["sweep"],
            }
            for null, of in found["nulls"].items()
        },
    }


def similarity_findings(study: Study) -> dict[str, Any] | None:
    return None if study.shared is None else similarity_tree(study.shared.as_dict())


def similarity_tree(found: Mapping[str, Any]) -> dict[str, Any]:
    """The ``similarity`` of the findings, out of :meth:`sae.overlap.StudyOverlap.as_dict`."""
    encoder, decoder, shape = found["mean_encoder"], found["mean_decoder"], found["histogram"]
    return {
        "mean_encoder": encoder["value"],
        "mean_encoder_interval": encoder["interval"],
        "mean_decoder": decoder["value"],
        "mean_decoder_interval": decoder["interval"],
        "mean_same_partner": shape["mean_agree"],
        "mean_different_partner": shape["mean_differ"],
        "pw_mcc": {
            "value": decoder["value"],
            "interval": decoder["interval"],
            "sd": found["pw_mcc_sd"],
            "null": {null: of["mean_decoder"]["value"] for null, of in found["nulls"].items()},
        },
        "null": {
            null: {"mean_encoder": of["mean_encoder"]["value"], "mean_decoder": of["mean_decoder"]["value"]}
            for null, of in found["nulls"].items()
        },
        "bimodality": found["bimodality"],
        "histogram": {
            "edges": shape["edges"],
            "counts": [a + b for a, b in zip(shape["agree"], shape["differ"], strict=True)],
            "same_partner": shape["agree"],
            "different_partner": shape["differ"],
            "encoder": shape["encoder"],
            "decoder": shape["decoder"],
        },
    }


def membership_findings(study: Study, latents: pd.DataFrame) -> dict[str, Any] | None:
    """The focus run's alive latents by which other runs share them; by how many, where there are more than three."""
    if study.shared is None:
        return None
    focus, definition = study.focus.name, study.view.definition
    alive = int(latents["alive"].sum())
    regions = study.shared.alive[definition].regions[focus]
    others = [name for name in study.compared if name != focus]
    parts: list[tuple[str, list[str] | None, float, int]] = []
    if len(others) <= 2:
        by_set = {frozenset(held): fraction for held, fraction in regions}
        sets: list[list[str]] = [[], *([o] for o in others), *([others] if len(others) > 1 else [])]
        for held in sets:
            words = f"only {focus}" if not held else f"with {held[0]}" + (" alone" if len(others) > 1 else "")
            parts.append((words if len(held) < 2 else "with both", held, by_set.get(frozenset(held), 0.0), len(held)))
    else:
        for n in range(len(others) + 1):
            words = f"with {n} of {len(others)}" if n < len(others) else f"with all {n} others"
            words = words if n else f"only {focus}"
            parts.append((words, None, sum(fraction for held, fraction in regions if len(held) == n), n))
    return {
        "definition": definition,
        "n_alive": alive,
        "parts": [
            {
                "label": words,
                "runs": held,
                "n_others": n,
                "shared_class": "one" if n == 0 else "all" if n == len(others) else "some",
                "n": round(fraction * alive),
                "fraction": fraction,
            }
            for words, held, fraction, n in parts
        ],
    }


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
