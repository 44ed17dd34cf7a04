"""What the scores of one run say: how well its latents can be explained.

A run's score table may hold several *set-ups* side by side (another explainer, judge, prompt or set of
contexts), because making new scores never overwrites old ones. A mean over different set-ups would mean
nothing, so every figure here is of one set-up; the others are named beside it.

Two things that a mean score hides are kept in view: how many latents could not be scored and why, and what
the same judge makes of somebody else's explanation (the swapped control). How scores go with the latents'
return is in :mod:`autointerp.relation`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pandas as pd

from autointerp.estimation import Estimator, error_of
from autointerp.method import BASELINE
from autointerp.sample_record import Sample
from autointerp.scorers.base import HARDER
from autointerp.statistics import UNKNOWN, Estimate, proportion, quartiles

CLASSES = ("one", "some", "all")
#: Bins of a score histogram: from 0 to 1 in steps of .02.
SCORE_EDGES = np.linspace(0, 1, 51)
#: Who explained and judged, under which settings and prompts: what tells set-ups apart.
_EXPLAIN = ("explainer", "explainer_model", "explain_settings_hash", "explain_prompt_hash")
_JUDGE = ("judge", "model", "scorer", "settings_hash", "judge_prompt_hash")
CHANCE = 0.5
TOO_FEW = "too few contexts"  # how an explanation that was not even tried says so
N_INTERESTING = 10
N_CONTEXTS = 3


class ShownContext(Protocol):
    """What is needed of a context to show it (``autointerp.contexts.Context`` is one)."""

    @property
    def tokens(self) -> Sequence[str]: ...
    @property
    def activations(self) -> Sequence[float]: ...


#: Gives a run's name and a latent the contexts to choose from; the firing store is opened only for those shown.
ContextSource = Callable[[str, int], Sequence[ShownContext]]


def status_kind(status: object) -> str:
    """``ok``, ``ineligible`` or ``failed``, of a score row's status."""
    words = str(status)
    return "ok" if words == "ok" else "ineligible" if TOO_FEW in words else "failed"


def reason(row: Mapping[Any, Any]) -> str:
    """Why a row is not ``ok``, in the words of whoever wrote it."""
    return str(row["status"]).removeprefix("failed:").strip()


# --- set-ups ----------------------------------------------------------------------------------------------


def setups(scores: pd.DataFrame, **wanted: str | None) -> list[dict[str, Any]]:
    """The set-ups in a score table that have what is ``wanted`` (``scorer="detection"``…), newest first.

    Newest by the explanations' numbers in the journal. Other explanations, and other judgements where the same ones
    were judged twice, come before the n-gram baseline's, which is made beside them.
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
        newest = int(group["explanation_id"].max()), by_model["judge"], int(group.index.max())
        rank = by_model.get("explainer", True), *newest
        found.append((rank, {c: _plain(group[c].iloc[0]) for c in columns}))
    return [setup for _, setup in sorted(found, key=lambda item: item[0], reverse=True)]


def verdicts_of(setup: Mapping[str, Any]) -> dict[str, Any]:
    """What a set-up's verdicts under the latents' own explanations have in common in the journal."""
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


# --- figures ----------------------------------------------------------------------------------------------


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
    ``sample``, figures are of its latents and weighted (:mod:`autointerp.estimation`); counts are of latents as ever.
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


def interesting(
    run: str, rows: pd.DataFrame, latents: pd.DataFrame, texts: Mapping[int, str], contexts: ContextSource | None
) -> list[dict[str, Any]]:
    """Latents that no other seed has and that can be explained all the same, best first.

    Ordered by the *lower* end of the score's interval: by the score itself, the first places would go to the luckiest.
    Only those whose interval lies above chance and whose own explanation does better than a swapped one.
    """
    good = rows[rows["status"].map(status_kind) == "ok"]
    own = good[good["control"] == "none"].set_index("latent")
    control = good[good["control"] == "swap"].set_index("latent")["balanced_accuracy"]
    joined = own.join(latents[latents.columns.difference(own.columns)], how="inner")
    joined["swapped"] = control.reindex(joined.index)
    beats = joined["swapped"].isna() | (joined["balanced_accuracy"] > joined["swapped"])
    kept = joined[joined["unshared"].astype(bool) & (joined["ba_low"] > 0.5) & beats]
    kept = kept.sort_values(["ba_low", "balanced_accuracy"], ascending=False, kind="stable").head(N_INTERESTING)
    return [
        {
            "latent": int(row["latent"]),
            "score": number(row["balanced_accuracy"]),
            "interval": [number(row["ba_low"]), number(row["ba_high"])],
            "auroc": number(row.get("auroc")),
            "control": number(row["swapped"]),
            "similarity": number(row["similarity"]),
            "firing_frequency": number(row.get("firing_frequency")),
            "explanation_id": int(row["explanation_id"]),
            "explanation": texts.get(int(row["explanation_id"])),
            "contexts": spread(contexts(run, int(row["latent"]))) if contexts else [],
        }
        for row in kept.reset_index().to_dict("records")
    ]


def spread(contexts: Sequence[ShownContext], n: int = N_CONTEXTS) -> list[dict[str, Any]]:
    """``n`` contexts from the strongest down to the middle of the range, not only the strongest.

    The strongest alone make a latent look purer than it is.
    """
    ordered = sorted(contexts, key=lambda c: -max(c.activations, default=0.0))
    picked = sorted({round(i * (len(ordered) - 1) / (2 * max(1, n - 1))) for i in range(n)}) if ordered else []
    return [
        {"tokens": list(ordered[i].tokens), "activations": [round(float(a), 4) for a in ordered[i].activations]}
        for i in picked
    ]


# --- small things -----------------------------------------------------------------------------------------


def number(value: Any) -> float | None:
    """A float for JSON; ``None`` for what is missing, infinite or not a number."""
    if value is None or pd.isna(value):
        return None
    return float(value) if math.isfinite(value) else None


def mean_of(estimate: Estimate) -> dict[str, Any]:
    as_dict = estimate.as_dict()
    return {"mean": as_dict["value"], "interval": as_dict["interval"]}


def quartiles_of(values: pd.Series) -> list[float | None]:
    return [number(q) for q in quartiles(values)]


def quartile_figures(of: Estimator, values: pd.Series, error: pd.Series | None = None) -> dict[str, Any]:
    found = [quartile.as_dict() for quartile in of.quartiles(values, error)]
    return {"quartiles": [q["value"] for q in found], "quartile_intervals": [q["interval"] for q in found]}


def histogram(values: pd.Series | np.ndarray, edges: np.ndarray, of: Estimator | None = None) -> dict[str, Any]:
    """Counts between ``edges``; what lies outside is counted in the first or last bin.

    Of a sample also ``estimated``: how many of all eligible latents are in each bin.
    """
    inside = np.clip(np.asarray(values, dtype=float), edges[0], edges[-1])
    known = np.isfinite(inside)
    counts, _ = np.histogram(inside[known], bins=edges)
    found = {"edges": [round(float(e), 6) for e in edges], "counts": counts.tolist()}
    if of is not None and of.sample is not None and isinstance(values, pd.Series):
        estimated, _ = np.histogram(inside[known], bins=edges, weights=of.weights(values)[known])
        found["estimated"] = [round(float(n), 3) for n in estimated]
    return found


def _plain(value: Any) -> Any:
    return None if pd.isna(value) else value
