"""Two runs side by side: how far they agree, and the pairs that their latents make with both explanations of each.

A pair is a latent of the first run and its decoder-matched partner in the second. Everything is read off what the
stages left; only an alignment that is not there is made first. Whatever can be said of all pairs is here
(:func:`compare_runs`); which of them a terminal shows is chosen in :mod:`autointerp.findings.pair`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from autointerp.contexts.selection import Choice
from autointerp.findings.evidence import Study, Told, View
from autointerp.findings.json_values import number
from autointerp.findings.pairs import METHODS, agreement, good_scores, scored_alike, scored_pairs
from autointerp.findings.returning import overlap_findings, similarity_findings
from autointerp.scoring.setups import rows_of, setups_of, status_kind, wanted_of
from sae.alignment.overlap import DEFINITIONS, shared
from sae.alignment.pairs import pair_path
from sae.alignment.similarity import similarity
from sae.common.commands import command, shell_command
from sae.common.errors import BadInput
from sae.common.files import SCHEMA, read_table
from sae.common.progress import say
from sae.study.align import align_runs, explain_difference
from sae.study.run import Run
from sae.study.stage import Compute

USUAL = Choice().n or 0
"""How many latents ``explain`` takes where it is not told."""


def the_two(names: Sequence[str], root: Path) -> tuple[Run, Run]:
    """The two runs of a comparison; raises BadInput in one line unless ``names`` are two different ones."""
    if len(names) != 2 or names[0] == names[1]:
        told = f"{names[0]!r} twice" if len(names) == 2 else f"{len(names)} run{'' if len(names) == 1 else 's'}"
        raise BadInput(
            f"a comparison takes two different runs, not {told}; "
            f"name them: {shell_command('compare', 'run_a', 'run_b')}"
        )
    return Run.open(names[0], root), Run.open(names[1], root)


def ensure_pair_aligned(a: Run, b: Run, compute: Compute) -> None:
    """Align the two where they never were, saying so. What is out of date is told, as in a report, and not made again.

    Raises BadInput where they are of different studies, which are aligned by ``align --force`` alone.
    """
    if pair_path(a.root / "alignments", a.name, b.name) is not None:
        return
    apart = explain_difference([a, b])
    if apart:
        forced = command(a.root, "align", a.name, b.name, "--force")
        raise BadInput(
            f"{apart}, so what differs is not the seed alone; compare runs of one study, or align these first: {forced}"
        )
    say(f"{a.name} and {b.name} are not aligned yet, doing that first")
    align_runs([a, b], compute)


def compare_runs(
    a: Run, b: Run, definition: str = "strict", threshold: float = 0.7, explainer: str | None = None
) -> dict[str, Any]:
    """The comparison of two aligned runs, as JSON values.

    The scores are those of the newest set-up that both have (of ``explainer``, where it is given: NotFound where it
    made none of the first run's scores), else of the first run's newest.

    ``overlap`` and ``similarity`` are as in a report; ``agreement`` has, of the pairs that are scored alike on both
    sides, those that are ``shared``, those that are ``unshared`` and all ``together``; ``pairs`` has one entry for each
    latent of ``a`` with a partner, ``sides`` what is known of the two; ``lacking`` says which explained latents have a
    partner that has no explanation, and by which commands it gets one.
    """
    view = View(a.name, definition, threshold, explainer=explainer)
    study = _seen_by_both(Study.open(a.root, [a.name, b.name], view), b)
    here, there = Side.of(study, a), Side.of(study, b)
    table = study.tables[a.name, b.name].sort_values("latent", ignore_index=True)
    pairs = _pairs(study, table, here, there)
    return {
        "schema": SCHEMA,
        "study": a.study,
        "runs": [{**study.describe(side.run), "study": side.run.study, **side.counts()} for side in (here, there)],
        "compared": study.compared,
        "apart": explain_difference([a, b]),
        "missing": [],
        "stale": study.stale(),
        "definition": definition,
        "threshold": threshold,
        "overlap": overlap_findings(study),
        "similarity": similarity_findings(study),
        "agreement": _agreement(study, table),
        "scored_by": _scored_by(study, there),
        "n_without_partner": len(table) - len(pairs),
        "pairs": pairs,
        "lacking": _lacking(here, there, pairs),
        "methods": {"definitions": DEFINITIONS, **METHODS},
    }


# --- one run's side -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Side:
    """One of the two runs: its latents, what they were said to mean and how well that did."""

    run: Run
    latents: pd.DataFrame
    told: Told
    texts: dict[int, str]
    scores: pd.DataFrame
    """by latent; of the set-up that is compared"""
    untestable: frozenset[int]
    """latents with too few contexts for a score of that set-up"""
    made_otherwise: bool
    """whether it has scores that are not made like the first run's, and are left out"""

    @classmethod
    def of(cls, study: Study, run: Run) -> Side:
        found = _newest_scores(study, run) if study.setup is None else scored_alike(study, run)
        scores = good_scores(found[0]) if found is not None else pd.DataFrame()
        path = run.stage_path("scores")
        told = _seen_from(study, run, None if found is None else dict(found[1])).journal()
        texts, otherwise = told.explanations(scores), found is None and path.exists()
        untestable = frozenset[int]() if found is None else _untestable(found[0])
        return cls(run, study.latents_of(run), told, texts, scores, untestable, otherwise)

    def counts(self) -> dict[str, int]:
        return {
            "n_alive": int(self.latents["alive"].sum()),
            "n_explained": len(self.texts),
            "n_scored": len(self.scores),
        }

    def figures(self, latent: int) -> dict[str, Any]:
        """What is known of one latent, as JSON values."""
        row, text = self._rows[latent], self.texts.get(latent)
        return {
            "latent": latent,
            "alive": bool(row["alive"]),
            "n_firings": _whole(row.get("n_firings")),
            "firing_frequency": number(row.get("firing_frequency")),
            "explanation": text,
            "without_explanation": None if text is not None else self._why_none(latent),
            "score": self._score(latent),
        }

    def _score(self, latent: int) -> dict[str, Any] | None:
        row = self._good.get(latent)
        if row is None:
            return None
        low, high = number(row["ba_low"]), number(row["ba_high"])
        interval = None if low is None or high is None else [low, high]
        return {"value": number(row["balanced_accuracy"]), "interval": interval, "auroc": number(row.get("auroc"))}

    def _why_none(self, latent: int) -> str:
        """Why a latent has no explanation, in words."""
        if latent in self.told.failed:
            return f"failed: {self.told.failed[latent]}"
        if self.can_be_explained(latent):
            return "not explained"
        row = self._rows[latent]
        return str(row.get("ineligible_reason") or "too few contexts") if row["alive"] else "it never fires"

    def can_be_explained(self, latent: int) -> bool:
        """Whether it fires in contexts enough; taken to be so where contexts have not been counted."""
        row = self._rows[latent]
        eligible = row.get("eligible", True)
        return bool(row["alive"]) and latent not in self.told.too_few and (pd.isna(eligible) or bool(eligible))

    @functools.cached_property
    def _rows(self) -> dict[int, dict[str, Any]]:
        return _by_latent(self.latents)

    @functools.cached_property
    def _good(self) -> dict[int, dict[str, Any]]:
        return _by_latent(self.scores)


def _untestable(rows: pd.DataFrame) -> frozenset[int]:
    tried = rows[rows["control"] == "none"]
    return frozenset(tried.loc[tried["status"].map(status_kind) == "ineligible", "latent"].astype(int))


def _by_latent(table: pd.DataFrame) -> dict[int, dict[str, Any]]:
    rows = table.to_dict("index").items()
    return {int(str(latent)): {str(k): v for k, v in row.items()} for latent, row in rows}


def _newest_scores(study: Study, run: Run) -> tuple[pd.DataFrame, Mapping[str, Any]] | None:
    """Those of a run where the first has none that could be like them."""
    path = run.stage_path("scores")
    table = read_table(path) if path.exists() else None
    chosen = [] if table is None else setups_of(table, scorer=study.view.scorer)
    return None if table is None or not chosen else (rows_of(table, chosen[0]), chosen[0])


def _seen_by_both(study: Study, there: Run) -> Study:
    """The study with the newest of the first run's set-ups that the other run has too, where there is one."""
    if study.setup is None or study.scores is None:
        return study
    for setup in wanted_of([study.setup, *study.other_setups], study.focus.name, explainer=study.view.explainer):
        others = [other for other in [study.setup, *study.other_setups] if other != setup]
        seen = replace(study, setup=setup, other_setups=others)
        if scored_alike(seen, there) is not None:
            return seen
    return study


def _seen_from(study: Study, run: Run, setup: dict[str, Any] | None) -> Study:
    """The study with another run in its middle, and the set-up of that run's scores that is like the first one's.

    Where it has none, explanations are still those by the same explainer.
    """
    if run.name == study.focus.name:
        return study
    explainer = (study.setup or {}).get("explainer")
    view = replace(study.view, focus=run.name, explainer=explainer)
    return replace(study, focus=run, view=view, scores=None, setup=setup)


# --- the pairs ----------------------------------------------------------------------------------------------


def _pairs(study: Study, table: pd.DataFrame, here: Side, there: Side) -> list[dict[str, Any]]:
    alike = similarity(table)
    holds = {name: shared(table, name, study.view.threshold) for name in DEFINITIONS}
    fired = study.behaviour.get((here.run.name, there.run.name))
    together = None if fired is None else fired["decoder_partner_jaccard"].to_numpy(float)
    partner, encoder = table["decoder_partner"].to_numpy(), table["encoder_partner"].to_numpy()
    cosines = {name: table[f"{name}_cosine"].to_numpy(float) for name in ("encoder", "decoder")}
    found = []
    for latent in np.flatnonzero(partner >= 0).tolist():
        one, other = here.figures(latent), there.figures(int(partner[latent]))
        scores = [side["score"]["value"] for side in (one, other) if side["score"] is not None]
        found.append(
            {
                "latent": latent,
                "partner": int(partner[latent]),
                "encoder_partner": int(encoder[latent]) if encoder[latent] >= 0 else None,
                "same_partner": bool(partner[latent] == encoder[latent]),
                "encoder_cosine": number(cosines["encoder"][latent]),
                "decoder_cosine": number(cosines["decoder"][latent]),
                "similarity": number(alike[latent]),
                "shared": {name: bool(of[latent]) for name, of in holds.items()},
                "is_shared": bool(holds[study.view.definition][latent]),
                "jaccard": None if together is None else number(together[latent]),
                "score_gap": scores[0] - scores[1] if len(scores) == 2 else None,
                "sides": [one, other],
            }
        )
    return found


def _agreement(study: Study, table: pd.DataFrame) -> dict[str, Any] | None:
    """``None`` where no pair is scored on both sides."""
    pairs = scored_pairs(study, study.view.threshold)
    if pairs is None or pairs.empty:
        return None
    returns = shared(table, study.view.definition, study.view.threshold)[pairs["latent"].to_numpy()]
    everyone = np.ones(len(pairs), bool)
    kept = {"shared": returns, "unshared": ~returns, "together": everyone}
    return {name: agreement(pairs, mask).as_dict() for name, mask in kept.items()}


def _scored_by(study: Study, there: Side) -> dict[str, Any] | None:
    """Whose scores these are, and whether the second run has scores that were made otherwise and are left out."""
    if study.setup is None:
        return None
    names = ("explainer", "explainer_model", "judge", "model", "scorer")
    told = {name: study.setup.get(name) or None for name in names}
    return {**told, "other_made_otherwise": there.made_otherwise}


def _lacking(here: Side, there: Side, pairs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What is missing for a comparison of explanations and scores, with the commands that provide it.

    ``without_explanation`` has the latents whose partner is explained and that are not: ``can_be_explained`` where they
    have contexts enough. ``not_scored``: latents of pairs explained on both sides that lack a score on either.
    ``score`` is ``None`` where no such pair could have one and nothing more is to be explained.
    """
    both = [pair for pair in pairs if _explained(pair) == 2]
    lone = [pair for pair in pairs if _explained(pair) == 1]
    entries = []
    for pair in lone:
        place = 0 if pair["sides"][0]["explanation"] is None else 1
        side, mine, other = (here, there)[place], pair["sides"][place], pair["sides"][1 - place]
        entries.append(
            {
                "run": side.run.name,
                "latent": mine["latent"],
                "partner_of": other["latent"],
                "can_be_explained": side.can_be_explained(mine["latent"]),
                "why": mine["without_explanation"],
            }
        )
    wanting = {entry["run"] for entry in entries if entry["can_be_explained"]}
    # What lacks a side is explained as the partner of the other.
    explaining = [one for one, other in ((here, there), (there, here)) if other.run.name in wanting]
    if not both and not lone:
        explaining = [here]
    not_scored = [pair for pair in both if any(side["score"] is None for side in pair["sides"])]
    names = (here.run.name, there.run.name)
    score = command(here.run.root, "score", *(word for name in names for word in ("--sae", name)))
    helps = bool(explaining) or any(_can_be_scored(pair, here, there) for pair in not_scored)
    return {
        "n_explained_both": len(both),
        "n_explained_one": len(lone),
        "without_explanation": entries,
        "not_scored": [pair["latent"] for pair in not_scored],
        "by_language_model": any(_by_language_model(side) for side in (here, there)),
        "explain": [_explain_command(side) for side in explaining],
        "score": score if helps else None,
    }


def _can_be_scored(pair: dict[str, Any], here: Side, there: Side) -> bool:
    """Whether every score that the pair lacks can be had."""
    sides = zip(pair["sides"], (here, there), strict=True)
    return all(told["score"] is not None or told["latent"] not in side.untestable for told, side in sides)


def _explain_command(side: Side) -> str:
    """Explains the partners of what is explained; ``--latents`` where that is more than the usual number."""
    n = len(side.texts)
    more = ["--latents", str(n)] if n > USUAL else []
    return command(side.run.root, "explain", "--sae", side.run.name, *more, "--with-partners")


def _by_language_model(side: Side) -> bool:
    return len(side.told.table) > 0 and bool((side.told.table["explainer"] != "ngram").any())


def _explained(pair: dict[str, Any]) -> int:
    return sum(side["explanation"] is not None for side in pair["sides"])


def _whole(value: Any) -> int | None:
    return None if value is None or pd.isna(value) else int(value)


Sort = Literal["similarity", "score", "gap", "firing"]
Sharing = Literal["any", "shared", "unshared"]
Pair = Mapping[str, Any]
SHOWN = 8


@dataclass(frozen=True)
class PairChoice:
    """``n`` pairs in the order of ``sort``; without one, spread evenly over similarity.

    ``sharing`` keeps the pairs that are shared, or those that are not, under the comparison's definition.
    """

    n: int = SHOWN
    sort: Sort | None = None
    sharing: Sharing = "any"


def _similarity(pair: Pair) -> float | None:
    return pair["similarity"]


def _score(pair: Pair) -> float | None:
    """The mean of the two scores."""
    values = [side["score"]["value"] for side in pair["sides"] if side["score"] is not None]
    return sum(values) / 2 if len(values) == 2 else None


def _gap(pair: Pair) -> float | None:
    return None if pair["score_gap"] is None else abs(pair["score_gap"])


def _firing(pair: Pair) -> float | None:
    """The frequency of the one that fires less."""
    known = [side["firing_frequency"] for side in pair["sides"] if side["firing_frequency"] is not None]
    return min(known) if len(known) == 2 else None


_ORDERS: dict[str, tuple[Callable[[Pair], float | None], str]] = {
    "similarity": (_similarity, "the most alike first"),
    "score": (_score, "the best scored first (mean of both)"),
    "gap": (_gap, "those first whose scores differ most"),
    "firing": (_firing, "the most frequent first (the rarer of the two counts)"),
}
_BY_SCORES = ("score", "gap")


def chosen(pairs: Sequence[Pair], choice: PairChoice) -> dict[str, Any]:
    """The pairs to show, in order; ``n_of`` how many they are out of, and ``says``, in words which they are.

    They are among those that are explained on both sides, where there are any; else among those that are on one; else
    among all whose two latents fire. In an order by scores, among those that are scored on both sides.
    """
    kept = [pair for pair in pairs if choice.sharing == "any" or pair["is_shared"] == (choice.sharing == "shared")]
    kept, among = _among(kept, choice)
    order, how = _ORDERS[choice.sort or "similarity"]
    ranked = sorted(kept, key=lambda pair: (-_or_least(order(pair)), pair["latent"]))
    if choice.sort is None:
        n = min(choice.n, len(ranked))
        shown = [ranked[i] for i in sorted({round(x) for x in np.linspace(0, len(ranked) - 1, n)})] if n else []
        how = "evenly spread from the most alike to the least alike"
    else:
        shown = ranked[: choice.n]
    kind = "" if choice.sharing == "any" else f"{choice.sharing} "
    which = f"{len(shown):,} of the {len(kept):,} {kind}pairs {among}"
    says = f"{which}, {how}" if shown else f"There are no {kind}pairs {among}"
    return {"n_of": len(kept), "says": f"{says}.", "latents": [pair["latent"] for pair in shown], "pairs": shown}


def _among(pairs: list[Pair], choice: PairChoice) -> tuple[list[Pair], str]:
    """The pairs that can be shown, and what they have in common."""
    if choice.sort in _BY_SCORES:
        return [pair for pair in pairs if pair["score_gap"] is not None], "that are scored on both sides"
    for n, words in ((2, "that are explained on both sides"), (1, "that are explained on one side")):
        found = [pair for pair in pairs if sum(side["explanation"] is not None for side in pair["sides"]) == n]
        if found:
            return found, words
    return [pair for pair in pairs if all(side["alive"] for side in pair["sides"])], "of latents that both fire"


def _or_least(value: float | None) -> float:
    return -math.inf if value is None else value
