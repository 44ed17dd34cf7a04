"""Compare two runs: how far they agree, and the pairs of their latents with both explanations.

A pair is a latent of the first run and its decoder-matched partner in the second. Everything is read from files; only a
missing alignment is made first. :func:`compare_runs` describes all pairs, and :func:`chosen` selects those that a
terminal shows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import pandas as pd

from autointerp.contexts.selection import Choice
from autointerp.findings import shape
from autointerp.findings.evidence import JournalFacts, Study, View
from autointerp.findings.pairs import METHODS, Agreement, agreement, scored_alike, scored_pairs
from autointerp.findings.returning import overlap_findings, similarity_findings
from autointerp.scoring.setups import own_scores, rows_of, setups_of, status_kind, wanted_of
from sae.alignment.alignment import pair_path
from sae.alignment.overlap import DEFINITIONS, compute_similarity, find_shared
from sae.common.amounts import is_known
from sae.common.commands import command, shell_command
from sae.common.errors import BadInput
from sae.common.estimate import Estimate
from sae.common.files import SCHEMA, read_table
from sae.common.progress import say
from sae.study.align import align_runs, explain_difference
from sae.study.run import Run
from sae.study.stage import Compute

USUAL = Choice().n or 0
"""The number of latents that ``explain`` takes by default."""
SHOWN = 8
Sort = Literal["similarity", "score", "gap", "firing"]
Sharing = Literal["any", "shared", "unshared"]


def the_two(names: Sequence[str], root: Path) -> tuple[Run, Run]:
    """Open the two runs of a comparison; raise BadInput unless ``names`` are two different ones."""
    if len(names) != 2 or names[0] == names[1]:
        given = f"{names[0]!r} twice" if len(names) == 2 else f"{len(names)} run{'' if len(names) == 1 else 's'}"
        raise BadInput(
            f"a comparison takes two different runs, not {given}; "
            f"name them: {shell_command('compare', 'run_a', 'run_b')}"
        )
    return Run.open(names[0], root), Run.open(names[1], root)


def ensure_pair_aligned(a: Run, b: Run, compute: Compute) -> None:
    """Align the two runs if they never were; an alignment that is out of date is reported, not recomputed.

    Raises BadInput if they are of different studies: only ``align --force`` aligns those.
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
    a: Run, b: Run, definition: str = "strict", threshold: float = 0.7, explainer: str | None = None, **scores: Any
) -> shape.Comparison:
    """Return the comparison of two aligned runs.

    Scores are those of the newest set-up that both runs have, else of the first run's newest. Raises NotFound if
    ``explainer`` made none of the first run's scores. ``scores``: other choices of :class:`View` among set-ups.

    ``agreement`` covers the pairs scored alike on both sides: ``shared``, ``unshared`` and all ``together``. ``pairs``
    has one entry for each latent of ``a`` with a partner, and ``sides`` describes the two latents. ``lacking`` lists
    explained latents whose partner has no explanation, with the commands that provide one.
    """
    view = View(a.name, definition, threshold, explainer=explainer, **scores)
    study = _with_common_setup(Study.open(a.root, [a.name, b.name], view), b)
    here, there = Side.of(study, a), Side.of(study, b)
    table = study.tables[a.name, b.name].sort_values("latent", ignore_index=True)
    pairs = _pairs(study, table, here, there)
    return shape.Comparison(
        schema=SCHEMA,
        study=a.study,
        runs=[side.describe(study) for side in (here, there)],
        compared=study.compared,
        apart=explain_difference([a, b]),
        missing=[],
        stale=list(study.stale()),
        definition=definition,
        threshold=threshold,
        overlap=overlap_findings(study),
        similarity=similarity_findings(study.shared),
        agreement=_agreement(study, table),
        scored_by=_scored_by(study, there),
        n_without_partner=len(table) - len(pairs),
        pairs=pairs,
        lacking=_lacking(here, there, pairs),
        methods={"definitions": DEFINITIONS, **METHODS},
    )


# --- one run's side -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Side:
    """One of the two runs: its latents, their explanations and their scores."""

    run: Run
    facts: JournalFacts
    texts: dict[int, str]
    latents: dict[int, dict[str, Any]]
    scores: dict[int, dict[str, Any]]
    """by latent; of the set-up that is compared"""
    untestable: frozenset[int]
    """latents with too few contexts for a score of that set-up"""
    made_otherwise: bool
    """whether all its scores are made differently from the first run's, and are skipped"""

    @classmethod
    def of(cls, study: Study, run: Run) -> Side:
        found = _newest_scores(study, run) if study.setup is None else scored_alike(study, run)
        if run.name != study.focus.name:
            # Without scores like the first run's, use the explanations by the same explainer.
            view = replace(study.view, focus=run.name, explainer=(study.setup or {}).get("explainer"))
            study = replace(study, focus=run, view=view, scores=None, setup=None if found is None else dict(found[1]))
        facts, rows = (
            study.journal(),
            pd.DataFrame(columns=["latent", "control", "status"]) if found is None else found[0],
        )
        scores = own_scores(rows)
        is_untestable = (rows["control"] == "none") & (rows["status"].map(status_kind) == "ineligible")
        return cls(
            run=run,
            facts=facts,
            texts=facts.explanations(scores),
            latents=_by_latent(study.latents_of(run)),
            scores=_by_latent(scores),
            untestable=frozenset(rows["latent"][is_untestable].astype(int)),
            made_otherwise=found is None and run.stage_path("scores").exists(),
        )

    def describe(self, study: Study) -> shape.ComparedRun:
        n_alive = sum(bool(row["alive"]) for row in self.latents.values())
        facts = vars(study.describe(self.run))
        return shape.ComparedRun(
            **facts, study=self.run.study, n_alive=n_alive, n_explained=len(self.texts), n_scored=len(self.scores)
        )

    def figures(self, latent: int) -> shape.SideOfPair:
        """Describe one latent."""
        row, text, score = self.latents[latent], self.texts.get(latent), self.scores.get(latent)
        n, found = row.get("n_firings"), None
        if score is not None:
            estimate = Estimate(score["balanced_accuracy"], score["ba_low"], score["ba_high"])
            found = shape.LatentScore(estimate, score.get("auroc"))
        return shape.SideOfPair(
            latent=latent,
            alive=bool(row["alive"]),
            n_firings=None if n is None or pd.isna(n) else int(n),
            firing_frequency=row.get("firing_frequency"),
            explanation=text,
            without_explanation=None if text is not None else self._why_none(latent),
            score=found,
        )

    def _why_none(self, latent: int) -> str:
        """Say why a latent has no explanation."""
        if latent in self.facts.failed:
            return f"failed: {self.facts.failed[latent]}"
        if self.can_be_explained(latent):
            return "not explained"
        row = self.latents[latent]
        return str(row.get("ineligible_reason") or "too few contexts") if row["alive"] else "it never fires"

    def can_be_explained(self, latent: int) -> bool:
        """Whether it fires in enough contexts; assumed if contexts have not been counted."""
        row = self.latents[latent]
        eligible = row.get("eligible", True)
        return bool(row["alive"]) and latent not in self.facts.too_few and (pd.isna(eligible) or bool(eligible))

    def explain_command(self) -> str:
        """Return the command that explains the partners of the explained latents."""
        more = ["--latents", str(len(self.texts))] if len(self.texts) > USUAL else []
        return command(self.run.root, "explain", "--sae", self.run.name, *more, "--with-partners")


def _by_latent(table: pd.DataFrame) -> dict[int, dict[str, Any]]:
    return cast(dict[int, dict[str, Any]], table.to_dict("index"))


def _newest_scores(study: Study, run: Run) -> tuple[pd.DataFrame, Mapping[str, Any]] | None:
    path = run.stage_path("scores")
    if not path.exists() or not (setups := setups_of(table := read_table(path), **study.view.setup)):
        return None
    return rows_of(table, setups[0]), setups[0]


def _with_common_setup(study: Study, there: Run) -> Study:
    """Return the study with the newest of the first run's set-ups that the other run has too, if there is one."""
    if study.setup is None or study.scores is None:
        return study
    setups = [study.setup, *study.other_setups]
    for setup in wanted_of(setups, study.focus.name, explainer=study.view.explainer, judge=study.view.judge):
        found = replace(study, setup=setup, other_setups=[other for other in setups if other != setup])
        if scored_alike(found, there) is not None:
            return found
    return study


# --- the pairs ----------------------------------------------------------------------------------------------


def _pairs(study: Study, table: pd.DataFrame, here: Side, there: Side) -> list[shape.Pair]:
    alike = compute_similarity(table)
    is_shared = {name: find_shared(table, name, study.view.threshold) for name in DEFINITIONS}
    fired = study.behaviour.get((here.run.name, there.run.name))
    jaccard = None if fired is None else fired["decoder_partner_jaccard"].to_numpy(float)
    partner, encoder = table["decoder_partner"].to_numpy(), table["encoder_partner"].to_numpy()
    cosines = {name: table[name].to_numpy(float) for name in ("encoder_cosine", "decoder_cosine")}
    found = []
    for latent in np.flatnonzero(partner >= 0).tolist():
        sides = [here.figures(latent), there.figures(int(partner[latent]))]
        scores = [side.score.value.value for side in sides if side.score is not None]
        found.append(
            shape.Pair(
                latent=latent,
                partner=int(partner[latent]),
                encoder_partner=int(encoder[latent]) if encoder[latent] >= 0 else None,
                same_partner=bool(partner[latent] == encoder[latent]),
                encoder_cosine=cosines["encoder_cosine"][latent],
                decoder_cosine=cosines["decoder_cosine"][latent],
                similarity=alike[latent],
                shared={name: bool(of[latent]) for name, of in is_shared.items()},
                is_shared=bool(is_shared[study.view.definition][latent]),
                jaccard=None if jaccard is None else jaccard[latent],
                score_gap=scores[0] - scores[1] if len(scores) == 2 else None,
                sides=sides,
            )
        )
    return found


def _agreement(study: Study, table: pd.DataFrame) -> dict[str, Agreement] | None:
    """Return the agreement of the pairs; ``None`` if no pair is scored on both sides."""
    pairs = scored_pairs(study, study.view.threshold)
    if pairs is None or pairs.empty:
        return None
    returns = find_shared(table, study.view.definition, study.view.threshold)[pairs["latent"].to_numpy()]
    kept = {"shared": returns, "unshared": ~returns, "together": np.ones(len(pairs), bool)}
    return {name: agreement(pairs, mask) for name, mask in kept.items()}


def _scored_by(study: Study, there: Side) -> shape.ScoredBy | None:
    if study.setup is None:
        return None
    names = ("explainer", "explainer_model", "judge", "model", "scorer")
    who = {name: study.setup.get(name) or None for name in names}
    return shape.ScoredBy(**who, other_made_otherwise=there.made_otherwise)


def _lacking(here: Side, there: Side, pairs: Sequence[shape.Pair]) -> shape.Lacking:
    both = [pair for pair in pairs if pair.n_explained == 2]
    one_sided = [pair for pair in pairs if pair.n_explained == 1]
    entries = []
    for pair in one_sided:
        place = 0 if pair.sides[0].explanation is None else 1
        side, mine, other = (here, there)[place], pair.sides[place], pair.sides[1 - place]
        is_able = side.can_be_explained(mine.latent)
        entries.append(shape.Unexplained(side.run.name, mine.latent, other.latent, is_able, mine.without_explanation))
    wanting = {entry.run for entry in entries if entry.can_be_explained}
    # A latent without an explanation is explained as a partner, by the other run's command.
    explaining = [one for one, other in ((here, there), (there, here)) if other.run.name in wanting]
    if not both and not one_sided:
        explaining = [here]
    not_scored = [pair for pair in both if any(side.score is None for side in pair.sides)]
    score = command(here.run.root, "score", "--sae", here.run.name, "--sae", there.run.name)
    helps = bool(explaining) or any(_can_be_scored(pair, here, there) for pair in not_scored)
    tables = [side.facts.table for side in (here, there)]
    return shape.Lacking(
        n_explained_both=len(both),
        n_explained_one=len(one_sided),
        without_explanation=entries,
        not_scored=[pair.latent for pair in not_scored],
        by_language_model=any(len(table) > 0 and bool((table["explainer"] != "ngram").any()) for table in tables),
        explain=[side.explain_command() for side in explaining],
        score=score if helps else None,
    )


def _can_be_scored(pair: shape.Pair, here: Side, there: Side) -> bool:
    """Whether both latents have a score or can get one."""
    sides = zip(pair.sides, (here, there), strict=True)
    return all(latent.score is not None or latent.latent not in side.untestable for latent, side in sides)


# --- the pairs that a terminal shows ------------------------------------------------------------------------


@dataclass(frozen=True)
class PairChoice:
    """``n`` pairs in the order of ``sort`` (default: spread evenly over similarity), all or only (un)shared ones."""

    n: int = SHOWN
    sort: Sort | None = None
    sharing: Sharing = "any"


_ORDERS = {
    None: "evenly spread from the most alike to the least alike",
    "similarity": "the most alike first",
    "score": "the best scored first (mean of both)",
    "gap": "those first whose scores differ most",
    "firing": "the most frequent first (the rarer of the two counts)",
}


def _sort_key(pair: shape.Pair, sort: Sort | None) -> float:
    """Return the value to sort by, -inf if it is unknown: for ``firing``, that of the latent that fires less."""
    values: list[float | None] = [pair.similarity]
    if sort == "gap":
        values = [None if pair.score_gap is None else abs(pair.score_gap)]
    elif sort == "score":
        values = [None if side.score is None else side.score.value.value for side in pair.sides]
    elif sort == "firing":
        values = [side.firing_frequency for side in pair.sides]
    known = [value for value in values if value is not None and is_known(value)]
    if len(known) < len(values):
        return -math.inf
    return float(min(known) if sort == "firing" else sum(known) / len(known))


def chosen(pairs: Sequence[shape.Pair], choice: PairChoice) -> shape.ChosenPairs:
    """Return the pairs to show, in order; ``n_of`` is how many they are chosen from, and ``says`` describes them.

    Chosen from the pairs explained on both sides, else on one, else from all alive ones; in an order by scores, from
    those scored on both sides.
    """
    kept = [pair for pair in pairs if choice.sharing == "any" or pair.is_shared == (choice.sharing == "shared")]
    kept, among = _among(kept, choice)
    ranked = sorted(kept, key=lambda pair: (-_sort_key(pair, choice.sort), pair.latent))
    n = min(choice.n, len(ranked))
    shown = ranked[:n]
    if choice.sort is None and n:
        shown = [ranked[i] for i in sorted({round(x) for x in np.linspace(0, len(ranked) - 1, n)})]
    kind = "" if choice.sharing == "any" else f"{choice.sharing} "
    which = f"{len(shown):,} of the {len(kept):,} {kind}pairs {among}, {_ORDERS[choice.sort]}"
    says = which if shown else f"There are no {kind}pairs {among}"
    return shape.ChosenPairs(f"{says}.", len(kept), [pair.latent for pair in shown], shown)


def _among(pairs: list[shape.Pair], choice: PairChoice) -> tuple[list[shape.Pair], str]:
    """Return the pairs that can be shown, and what they have in common."""
    if choice.sort in ("score", "gap"):
        return [pair for pair in pairs if pair.score_gap is not None], "that are scored on both sides"
    for n, words in ((2, "that are explained on both sides"), (1, "that are explained on one side")):
        if found := [pair for pair in pairs if pair.n_explained == n]:
            return found, words
    return [pair for pair in pairs if all(side.alive for side in pair.sides)], "of latents that both fire"
