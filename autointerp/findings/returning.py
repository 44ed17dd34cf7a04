"""How many latents come back when the SAE is trained with another seed, and how training went.

Arranges the figures of :mod:`sae.alignment.overlap`, and adds how often shared and unshared latents fire.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from autointerp.findings import shape
from autointerp.findings.counterparts import counterpart_findings
from autointerp.findings.evidence import Study
from autointerp.findings.statistics.correlation import quantiles
from sae.alignment.overlap import CLASSES, DEFINITIONS, StudyOverlap, classify_sharing, find_range
from sae.common.files import read_table, table_metadata
from sae.study.align import explain_difference
from sae.study.run import Run

_CURVES = ("step", "tokens", "loss", "fvu", "l0", "dead_fraction", "learning_rate")
_CURVE_POINTS = 100
_MEANS = ("mean_encoder", "mean_decoder", "mean_max_encoder", "mean_max_decoder")
_BY_NUMBER = ("only_one", "all_of_n", "exactly_n")  # lists over the number of SAEs, 1 … S


def overlap_findings(study: Study) -> shape.Overlap | None:
    if study.shared is None:
        return None
    is_harvested = study.firing.keys() >= set(study.compared)
    over = "alive latents" if is_harvested else "all latents, not all being harvested"
    return describe_overlap(study.shared, study.view.definition, over)


def describe_overlap(found: StudyOverlap, chosen: str = "strict", over: str | None = None) -> shape.Overlap:
    """Arrange the overlap under every definition; the figures over the number of SAEs also under the ``chosen`` one."""
    by: dict[str, Any] = {name: _shared_by(found, name) for name in DEFINITIONS}
    by_number: dict[str, Any] = {key: [e.value for e in getattr(by[chosen], key)] for key in _BY_NUMBER}
    return shape.Overlap(
        definition=chosen,
        threshold=found.threshold,
        **by,
        **by_number,
        same_partner=found.same_partner.value,
        max_cosine=found.max_cosine,
        max_cosine_pairs=found.by_pair["max_cosine"],
        sweep=_columns(found.sweep),
        nulls={
            null: shape.OverlapNull(
                **{key: getattr(by[chosen], f"{key}_null")[null] for key in _BY_NUMBER},
                pairs=by[chosen].pairs_null[null],
                same_partner=of.same_partner.value,
                same_partner_range=by["lenient"].null_range[null],
                max_cosine=of.max_cosine.value,
                max_cosine_range=find_range(of.by_pair["max_cosine"]),
                sweep=_columns(of.sweep),
            )
            for null, of in found.nulls.items()
        },
        over=over,
    )


def _columns(table: pd.DataFrame) -> dict[str, list[float]]:
    return {str(name): column.tolist() for name, column in table.items()}


def _shared_by(found: StudyOverlap, name: str) -> shape.SharedBy:
    real, nulls = found.alive[name], {null: of.alive[name] for null, of in found.nulls.items()}
    pairs_null = {null: {pair: e.value for pair, e in of.pairs.items()} for null, of in nulls.items()}
    by_number: dict[str, Any] = {key: getattr(real, key) for key in _BY_NUMBER}
    for key in _BY_NUMBER:
        by_number[f"{key}_null"] = {null: [e.value for e in getattr(of, key)] for null, of in nulls.items()}
    return shape.SharedBy(
        value=real.value,
        pairs=real.pairs,
        pairs_null=pairs_null,
        over_all_latents=found.all[name].value,
        over_all_latents_null={null: of.all[name].value.value for null, of in found.nulls.items()},
        retained=real.retained,
        retained_null={null: of.retained.value for null, of in nulls.items()},
        null={null: of.value.value for null, of in nulls.items()},
        null_range={null: find_range(pairs) for null, pairs in pairs_null.items()},
        **by_number,
    )


def similarity_findings(found: StudyOverlap | None) -> shape.Similarity | None:
    """Arrange the matched cosines, their histogram and the test for two modes."""
    if found is None:
        return None
    cosines, nulls, dip = found.histogram, found.nulls, found.bimodality
    counts_null = {null: shape.CosineCounts(**_count(of.histogram)) for null, of in nulls.items()}
    return shape.Similarity(
        **{name: getattr(found, name) for name in _MEANS},
        pairs={name: found.by_pair[name] for name in _MEANS},
        mean_same_partner=cosines["mean_agree"],
        mean_different_partner=cosines["mean_differ"],
        pw_mcc=shape.PwMcc(
            value=found.mean_decoder,
            sd=found.pw_mcc_sd,
            null={null: of.mean_decoder.value for null, of in nulls.items()},
            null_sd={null: of.pw_mcc_sd for null, of in nulls.items()},
        ),
        null={null: _describe_null(of) for null, of in nulls.items()},
        bimodality=shape.Bimodality(
            statistic="Hartigan's dip of the mean of matched encoder and decoder cosine; mean over pairs",
            **dip._asdict(),
            null={null: shape.DipOfNull(*of.bimodality[1:]) for null, of in nulls.items()},
        ),
        histogram=shape.CosineHistogram(**_count(cosines), null=counts_null),
    )


def _describe_null(of: StudyOverlap) -> shape.SimilarityNull:
    means: dict[str, Any] = {name: getattr(of, name).value for name in _MEANS}
    ranges: dict[str, Any] = {f"{name}_range": find_range(of.by_pair[name]) for name in _MEANS}
    partners = {"mean_same_partner": of.histogram["mean_agree"], "mean_different_partner": of.histogram["mean_differ"]}
    return shape.SimilarityNull(**means, **ranges, **partners)


def _count(cosines: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of :class:`CosineCounts`."""
    return {
        **{key: cosines[key] for key in ("edges", "encoder", "decoder")},
        "counts": [a + b for a, b in zip(cosines["agree"], cosines["differ"], strict=True)],
        "same_partner": cosines["agree"],
        "different_partner": cosines["differ"],
    }


def membership_findings(study: Study, latents: pd.DataFrame) -> shape.Membership | None:
    """Split the focus run's alive latents by the runs that share them; with over three runs, by their number."""
    if study.shared is None:
        return None
    focus, definition = study.focus.name, study.view.definition
    n_alive = int(latents["alive"].sum())
    regions = study.shared.alive[definition].regions[focus]
    nulls = {null: of.alive[definition].regions[focus] for null, of in study.shared.nulls.items()}
    others = [name for name in study.compared if name != focus]
    parts: list[tuple[str, list[str] | None, int]] = [(f"only {focus}", [] if len(others) <= 2 else None, 0)]
    if len(others) <= 2:
        alone = " alone" if len(others) > 1 else ""
        parts += [(f"with {name}{alone}", [name], 1) for name in others]
        parts += [("with both", others, 2)] if len(others) > 1 else []
    else:
        parts += [(f"with {n} of {len(others)}", None, n) for n in range(1, len(others))]
        parts += [(f"with all {len(others)} others", None, len(others))]
    rows = []
    for label, held, n in parts:
        fraction, null = _fraction(regions, n, held), {name: _fraction(split, n, held) for name, split in nulls.items()}
        kind = str(classify_sharing(n, len(others)))
        rows.append(shape.Region(label, held, n, kind, round(fraction * n_alive), fraction, null))
    return shape.Membership(definition, n_alive, rows)


def _fraction(regions: Sequence[tuple[tuple[str, ...], float]], n: int, held: Sequence[str] | None) -> float:
    """Return the fraction of latents that ``n`` other runs share; ``held`` names these runs."""
    return sum((part for by, part in regions if len(by) == n and (held is None or set(by) == set(held))), 0.0)


def frequency_by_class_findings(latents: pd.DataFrame) -> dict[str, shape.Frequencies] | None:
    """Describe how often alive latents fire (firings per token) by shared class; five logarithmic bins per decade."""
    if "shared_class" not in latents or "firing_frequency" not in latents:
        return None
    alive = latents[latents["alive"] & (latents["firing_frequency"] > 0)]
    if alive.empty:
        return None
    low, high = np.floor(np.log10(alive["firing_frequency"].min())), np.ceil(np.log10(alive["firing_frequency"].max()))
    edges = np.linspace(low, max(high, low + 1), round(5 * max(1.0, high - low)) + 1)
    by_class = {name: alive.loc[alive["shared_class"] == name, "firing_frequency"] for name in CLASSES}
    found = {}
    for name, members in by_class.items():
        if len(members):
            counts = shape.Histogram([float(10**e) for e in edges], np.histogram(np.log10(members), edges)[0].tolist())
            found[name] = shape.Frequencies(len(members), members.median(), quantiles(members).tolist(), counts)
    return found


# --- training and firing ----------------------------------------------------------------------------------


def training_findings(runs: Iterable[Run]) -> shape.Training | None:
    """Average the last twentieth of each run's training log, and thin the log for small curves."""
    paths = {run.name: run.training_log_path for run in runs if run.training_log_path.exists()}
    if not paths:
        return None
    logs = {name: read_table(path) for name, path in paths.items()}
    tails = {name: log.tail(max(1, len(log) // 20)) for name, log in logs.items()}
    qualities = {name: table_metadata(path).get("quality") for name, path in paths.items()}
    means = {
        key: {name: tail[key].mean() for name, tail in tails.items()} for key in ("fvu", "l0", "dead_fraction", "auxk")
    }
    return shape.Training(
        **means,
        quality={name: quality for name, quality in qualities.items() if quality},
        tokens={name: int(log["tokens"].iloc[-1]) if len(log) else 0 for name, log in logs.items()},
        steps={name: int(log["step"].iloc[-1]) if len(log) else 0 for name, log in logs.items()},
        curves={name: _thinned(log) for name, log in logs.items() if len(log)},
    )


def _thinned(log: pd.DataFrame) -> dict[str, list[float]]:
    """Return at most 100 evenly spaced points of each curve, the first and the last among them."""
    places = np.unique(np.linspace(0, len(log) - 1, _CURVE_POINTS).round().astype(int))
    return {column: log[column].to_numpy(float)[places].tolist() for column in _CURVES}


def firing_findings(study: Study) -> shape.Firing | None:
    if not study.firing:
        return None
    dead = {name: int(table["dead"].sum()) for name, table in study.firing.items()}
    size = {name: len(table) for name, table in study.firing.items()}
    tokens = [n for table in study.firing.values() if (n := _harvested_tokens(table)) is not None]
    return shape.Firing(
        tokens=min(tokens, default=None),
        alive={name: size[name] - dead[name] for name in dead},
        dead=dead,
        dead_fraction={name: dead[name] / max(1, size[name]) for name in dead},
        mean_l0={name: table["firing_frequency"].sum() for name, table in study.firing.items()},
    )


def _harvested_tokens(table: pd.DataFrame) -> int | None:
    """Return the harvested tokens: count divided by frequency of the latent that fires most."""
    if table.empty or table["n_firings"].max() <= 0:
        return None
    most = int(table["n_firings"].argmax())
    return round(table["n_firings"].iloc[most] / table["firing_frequency"].iloc[most])


def alignment_findings(study: Study) -> shape.Alignment:
    """Return the overlap of aligned runs, in the shape of the report's findings."""
    assert study.shared is not None
    return shape.Alignment(
        runs=[shape.AlignedRun(run.name, run.seed, run.study) for run in study.runs],
        compared=study.compared,
        apart=explain_difference(study.runs),
        missing=[],
        overlap=describe_overlap(study.shared, study.view.definition),
        similarity=similarity_findings(study.shared),
        counterparts=counterpart_findings(study.behaviour, study.tables, study.alive, study.behaviour_facts),
    )
