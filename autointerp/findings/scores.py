"""What the scores of one run say, of one set-up: how well its latents can be explained.

Two things that a mean score hides are kept in view: how many latents could not be scored and why, and what
the same judge makes of somebody else's explanation (the swapped control). How scores go with the latents'
return is in :mod:`autointerp.findings.relation`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Set
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from autointerp.contexts.sample_record import Sample
from autointerp.findings.evidence import Study, Told
from autointerp.findings.json_values import histogram, mean_of, number, quartile_figures
from autointerp.findings.statistics.estimation import Estimator, error_of
from autointerp.journal.method import CHANCE
from autointerp.scoring.scorers.base import HARDER, STOPS
from autointerp.scoring.setups import precision_of, rows_of, setups_of, status_kind
from sae.alignment.latent_table import CLASSES
from sae.common.estimate import UNKNOWN, proportion

#: Bins of a score histogram: from 0 to 1 in steps of .02.
SCORE_EDGES = np.linspace(0, 1, 51)


def score_findings(
    rows: pd.DataFrame,
    latents: pd.DataFrame,
    explained: set[int],
    too_few: Set[int] = frozenset(),
    sample: Sample | None = None,
) -> dict[str, Any]:
    """Distribution, control, and counts by shared class.

    ``rows`` are one set-up's; ``latents`` is the run's table by latent number (``alive``, ``shared_class``
    where there are siblings, ``eligible`` where contexts were counted for all); ``explained`` are the latents with
    an explanation in the journal, ``too_few`` those that were asked for and had too few contexts for one. With a
    ``sample``, figures are of its latents and weighted (:mod:`autointerp.findings.statistics.estimation`); counts are
    of latents as ever.
    """
    own = rows[rows["control"] == "none"].set_index("latent")
    kinds = own["status"].map(status_kind)
    of = estimator_of(rows, too_few, sample)
    scored = own[kinds == "ok"]
    good, swapped = of.of(scored), Swapped.among(rows, sample)
    values = good["balanced_accuracy"].astype(float)
    mean, error = of.mean(values, error_of(good)), error_of(good)
    aurocs = good["auroc"].astype(float).dropna() if "auroc" in good else pd.Series(dtype=float)
    ineligible = set(own.index[kinds == "ineligible"]) | too_few
    asked = set(own.index) | explained | ineligible
    eligible = latents.get("eligible")
    return {
        **mean_of(mean),
        **quartile_figures(of, values, error),
        "auroc_mean": (auroc := of.mean(aurocs, error_of(good.loc[aurocs.index], "auroc")).as_dict())["value"],
        "auroc_interval": auroc["interval"],
        "n_scored": len(good),
        "precision": _precision(good),
        "sample": None if sample is None else _sample_findings(sample, of.sample, good, scored),
        "n_failed": int((kinds == "failed").sum()),
        "n_ineligible": len(ineligible),
        "n_asked": len(asked),
        "n_explained": len(explained),
        "n_waiting": len(explained - set(own.index)),
        "n_eligible": int(eligible.sum()) if eligible is not None else len(asked - ineligible),
        "eligible_of": "all latents" if eligible is not None else "the latents asked for",
        "n_alive": int(latents["alive"].sum()),
        "n_latents": len(latents),
        "n_failed_answers": failed_answers(own),
        "histogram": histogram(values, SCORE_EDGES, of),
        "control": _control(swapped, good),
        "negatives": _negatives(good, of, swapped),
        "too_few": too_few_findings(latents),
        "by_class": _by_class(latents, own, kinds, explained, of, swapped) if "shared_class" in latents else None,
    }


def _precision(good: pd.DataFrame) -> dict[str, Any] | None:
    """Of scores that were judged to a precision: to which, what ended it for how many latents, and after how many
    contexts (activating and random silent ones that were answered) on average. ``None`` where all contexts were."""
    to = precision_of(good)
    if to is None:
        return None
    judged = good["n_active"].astype(float) + good["n_inactive"].astype(float)
    counts = good["stopped"].value_counts()
    return {
        "half_width": to,
        "stopped": {why: int(counts.get(why, 0)) for why in STOPS},
        "mean_contexts": number(judged.mean()),
    }


def _sample_findings(
    sample: Sample, weights: pd.DataFrame | None, good: pd.DataFrame, scored: pd.DataFrame
) -> dict[str, Any]:
    """What the figures are a sample of, how far it has come, and how many scored latents are outside it."""
    assert weights is not None
    return {
        **sample.as_dict(),
        "n_done": len(weights),
        "n_scored": len(good),
        "n_waiting": len(sample.drawn - set(weights.index)),
        "n_failed": len(weights) - len(good),
        "n_outside": len(scored) - len(good),
        "effective_n": number(weights["weight"].sum() ** 2 / (weights["weight"] ** 2).sum()) if len(weights) else None,
    }


def estimator_of(rows: pd.DataFrame, too_few: Set[int], sample: Sample | None) -> Estimator:
    """What the own scores among ``rows`` are a sample of: those that came to an end, scored, failed or ``too_few``."""
    if sample is None:
        return Estimator()
    return Estimator(sample.weights(set(rows["latent"][rows["control"] == "none"]) | too_few))


@dataclass(frozen=True)
class Swapped:
    """The swapped controls that did not fail.

    Of a sample, the latents that have one are a smaller sample, chosen by their numbers alone.
    """

    rows: pd.DataFrame
    """By latent."""
    of: Estimator
    n_failed: int

    @classmethod
    def among(cls, rows: pd.DataFrame, sample: Sample | None) -> Swapped:
        asked = rows[rows["control"] == "swap"].set_index("latent")
        of = Estimator(None if sample is None else sample.weights(set(asked.index)))
        good = asked["status"].map(status_kind) == "ok"
        return cls(of.of(asked[good]), of, int((~good).sum()))

    def mean(self, column: str) -> float | None:
        """The mean of one of the columns, without an interval."""
        if column not in self.rows or self.rows[column].isna().all():
            return None
        return number(self.of.plain_mean(self.rows[column].astype(float).dropna()))

    def below(self, own: pd.DataFrame, value: str = "ba") -> dict[str, Any] | None:
        """The mean of own − swapped over the latents that have both, ``n`` of them, and for what ``fraction`` it is
        above 0; ``None`` where none has.

        Args:
            own: rows by latent.
            value: the beginning of the names of the score's interval.
        """
        column = "balanced_accuracy" if value == "ba" else value
        if column not in own or column not in self.rows:
            return None
        paired = (own[column].astype(float) - self.rows[column].astype(float)).dropna()
        if paired.empty:
            return None
        difference = self.of.difference(own, self.rows, column, value)
        return {**mean_of(difference), "n": len(paired), "fraction": number(self.of.share(paired > 0))}


def _control(swapped: Swapped, own: pd.DataFrame) -> dict[str, Any] | None:
    """The swapped control: each latent's contexts judged by another latent's explanation.

    ``leaks``: its mean is not .5 within its interval, so that something other than the explanation tells the judge
    where the latent fires.
    """
    if swapped.rows.empty:
        return None
    of, values, error = swapped.of, swapped.rows["balanced_accuracy"].astype(float), error_of(swapped.rows)
    mean = of.mean(values, error)
    return {
        "kind": "swap",
        **mean_of(mean),
        "leaks": bool(mean.low > CHANCE or mean.high < CHANCE),
        **quartile_figures(of, values, error),
        "auroc_mean": swapped.mean("auroc"),
        "n_scored": len(values),
        "n_failed": swapped.n_failed,
        "histogram": histogram(values, SCORE_EDGES, of),
        "above_control": swapped.below(own) or {**mean_of(UNKNOWN), "n": 0, "fraction": None},
    }


def failed_answers(rows: pd.DataFrame) -> int:
    """Contexts of any kind without a verdict."""
    columns = [c for c in ("n_failed", *(f"n_failed_{kind}" for kind in HARDER)) if c in rows]
    return int(sum(rows[c].fillna(0).sum() for c in columns))


def _negatives(good: pd.DataFrame, of: Estimator, swapped: Swapped) -> dict[str, Any]:
    """By kind of negative: the mean over the latents that have it, and how many lack it. ``random`` makes the score.

    ``random_mean`` is the score of the same latents over random negatives: the kinds are compared on equal terms.
    ``swapped_mean`` is that of the swapped control over this kind, ``above_control`` the difference. Empty where no
    score has any kind but the random one.
    """
    found: dict[str, Any] = {}
    for kind in HARDER:
        if f"ba_{kind}" not in good:
            continue
        has = good[f"ba_{kind}"].notna()
        if not has.any():
            continue
        some = good[has].astype({f"ba_{kind}": float, f"tnr_{kind}": float, "balanced_accuracy": float})
        aurocs = some[f"auroc_{kind}"].astype(float).dropna()
        found[kind] = {
            **mean_of(of.mean(some[f"ba_{kind}"], error := error_of(some, f"ba_{kind}"))),
            **quartile_figures(of, some[f"ba_{kind}"], error),
            "tnr": of.mean(some[f"tnr_{kind}"], error_of(some, f"tnr_{kind}")).as_dict(),
            "auroc_mean": number(of.plain_mean(aurocs)) if len(aurocs) else None,
            "random_mean": number(of.plain_mean(some["balanced_accuracy"])),
            "swapped_mean": swapped.mean(f"ba_{kind}"),
            "above_control": swapped.below(some, f"ba_{kind}"),
            "n_scored": int(has.sum()),
            "n_missing": int((~has).sum()),
            "n_failed_answers": int(good[f"n_failed_{kind}"].fillna(0).sum()),
        }
    return found


def _by_class(
    latents: pd.DataFrame, own: pd.DataFrame, kinds: pd.Series, explained: set[int], of: Estimator, swapped: Swapped
) -> dict[str, Any]:
    found = {}
    for name in CLASSES:
        members = latents[latents["shared_class"] == name]
        if members.empty:
            continue
        inside = own.index.isin(members.index)
        good = of.of(own[inside & (kinds == "ok").to_numpy()])
        values = good["balanced_accuracy"].astype(float)
        counted = members.get("eligible")
        found[name] = {
            "n_latents": len(members),
            "n_alive": int(members["alive"].sum()),
            "n_eligible": int(counted.sum()) if counted is not None else int((kinds[inside] != "ineligible").sum()),
            "n_explained": len(explained & set(members.index)),
            "n_scored": len(good),
            "n_failed": int((kinds[inside] == "failed").sum()),
            **mean_of(of.mean(values, error_of(good))),
            "above_control": swapped.below(good),
            **quartile_figures(of, values, error_of(good)),
        }
    return found


def too_few_findings(latents: pd.DataFrame) -> dict[str, Any] | None:
    """The alive latents that have too few contexts to be explained and tested, by shared class, with the reasons.

    ``together`` and, where there are siblings, each class: how many are alive, how many of them have too few, the share
    with its interval, their numbers, how often they fire beside those that have enough, and latents by reason.
    ``None`` where contexts were not counted.
    """
    if "eligible" not in latents:
        return None
    alive = latents[latents["alive"].astype(bool)]
    found = {"together": _too_few(alive)}
    if "shared_class" in alive:
        classes = {name: alive[alive["shared_class"] == name] for name in CLASSES}
        found |= {name: _too_few(members) for name, members in classes.items() if len(members)}
    return found


def _too_few(members: pd.DataFrame) -> dict[str, Any]:
    enough = members["eligible"].astype("boolean").fillna(False).astype(bool)
    lacking = members[~enough]
    said = lacking.get("ineligible_reason", pd.Series("", index=lacking.index))
    reasons = Counter(said.map(_kind_of_reason))
    frequency = members.get("firing_frequency", pd.Series(np.nan, index=members.index))
    return {
        "n_alive": len(members),
        "n": len(lacking),
        "fraction": (share := proportion(len(lacking), len(members)).as_dict())["value"],
        "interval": share["interval"],
        "latents": [int(latent) for latent in lacking.index],
        "reasons": dict(reasons.most_common()),
        "median_frequency": number(frequency[~enough].median()) if len(lacking) else None,
        "median_frequency_of_eligible": number(frequency[enough].median()) if enough.any() else None,
    }


def _kind_of_reason(reason: object) -> str:
    """The reason without its numbers, which differ from latent to latent."""
    words = str(reason or "not said")
    for kind in ("fires nearly everywhere", "activating contexts to explain from", "activating contexts to test on"):
        if kind in words:
            return kind if kind.startswith("fires") else f"too few {kind}"
    return words


_FIGURES = ("mean", "interval", "auroc_mean", "auroc_interval", "n_scored", "n_failed", "n_ineligible", "control")
_SAME = ("explainer", "explainer_model", "judge", "model")


def other_scorer_findings(study: Study, latents: pd.DataFrame, told: Told) -> list[dict[str, Any]]:
    """A row for each other scorer in the focus run's score table, by name, as JSON values."""
    if study.scores is None or "scorer" not in study.scores:
        return []
    view, same = study.view, {key: (study.setup or {}).get(key) for key in _SAME}
    wanted = same if study.setup else {"explainer": view.explainer, "judge": view.judge}
    found = []
    for scorer in sorted(set(study.scores["scorer"].dropna()) - {view.scorer, (study.setup or {}).get("scorer")}):
        setups = setups_of(study.scores, scorer=scorer, **wanted)
        if setups:
            rows = rows_of(study.scores, setups[0])
            sample = study.sample_of(setups[0])
            figures = score_findings(rows, latents, told.explained, told.too_few, sample)
            who = {"explainer": setups[0].get("explainer"), "judge": setups[0].get("judge")}
            found.append({"scorer": scorer, **who, **{key: figures[key] for key in _FIGURES}})
    return found
