"""A run's score table, made of the journal's verdicts: one row per explanation, judge set-up and control.

Every row can be made again from verdicts, whatever the call that asked for them: what was judged under other settings,
prompts or models stands beside what is judged now.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, cast

import pandas as pd

from autointerp.contexts import Context
from autointerp.journal import Journal
from autointerp.judges.base import Judge
from autointerp.material import Material
from autointerp.method import BASELINE
from autointerp.rounds import AdaptivePlan
from autointerp.scorers import SCORERS
from autointerp.scorers.base import Scorer, ScoreRow
from sae.files import digest
from sae.run import Run

_IDENTITY = ("latent", "explanation_id", "explainer", "explainer_model", "explain_settings_hash", "explain_prompt_hash")
_JUDGED_BY = ("judge", "model", "scorer", "settings_hash", "judge_prompt_hash")
COLUMNS = (*_IDENTITY, "draw", *_JUDGED_BY, "control", "replicate", *ScoreRow._fields)
"""Of the score table. All are there even when every explanation failed and nothing was judged."""
UNTESTED = "failed: too few contexts that can be marked otherwise"
_OUTDATED = "failed: judged in rounds of contexts that a later harvest replaced; score again"

Plans = dict[str, Mapping[str, AdaptivePlan | None]]
"""Settings hash → scorer → the plan by which it was judged, of adaptive set-ups; ``None``: no longer known."""


@dataclass(frozen=True)
class Test:
    """A scorer with the judge that it asks, of one run's contexts."""

    __test__ = False  # for pytest: no test

    scorer: Scorer
    judge: Judge
    same: dict[str, str]
    """What all its verdicts have in common in the journal."""
    items: Callable[[int], Sequence[Context]]
    """What is to be judged of a latent, at most; worked out once."""
    plan: AdaptivePlan | None = None
    """The rounds in which it is judged; ``None`` where all is judged."""

    @property
    def key(self) -> tuple[str, str]:
        return self.scorer.name, self.same["settings_hash"]

    @classmethod
    def of(
        cls,
        scorer: Scorer,
        judge: Judge,
        material: Material,
        plan: AdaptivePlan | None = None,
        items: Callable[[int], Sequence[Context]] | None = None,
    ) -> Test:
        """The test of ``scorer`` on contexts out of ``material``, or on those of ``plan``.

        ``items`` gives those out of ``material`` where they have been worked out for another judge.
        """
        asked = judge.of_marks() if scorer.marked else judge
        decides = {"judge": asked.settings_hash, "material": (plan.material if plan else material).digest}
        same = {
            "judge": asked.name,
            "scorer": scorer.name,
            "settings_hash": digest({**decides, "adaptive": plan.identity} if plan else decides),
            "prompt_hash": asked.prompt_hash,
            "model": asked.model,
        }
        if plan is not None:
            return cls(scorer, asked, same, plan.contexts, plan)
        return cls(scorer, asked, same, items or _items(scorer, material))

    @classmethod
    def all_of(cls, judges: Sequence[Judge], material: Material, scorers: Iterable[str]) -> list[Test]:
        """Those of every one of the ``scorers`` with each of ``judges``; contexts are drawn once for all of these."""
        found = []
        for scorer in (SCORERS[name]() for name in scorers):
            items = _items(scorer, material)
            found += [cls.of(scorer, judge, material, items=items) for judge in judges]
        return found


def _items(scorer: Scorer, material: Material) -> Callable[[int], Sequence[Context]]:
    return functools.cache(lambda latent: scorer.items(scorer.test_set(material.sampler, latent)))


def plans_of(run: Run, journal: Journal) -> Plans:
    """The adaptive set-ups by which the run was ever judged."""
    scorers = [name for name in journal.scorers() if name in SCORERS]
    setups = {key: setup for key, setup in journal.setups().items() if "adaptive" in setup}
    return {
        key: {name: AdaptivePlan.again(run, SCORERS[name](), setup) for name in scorers}
        for key, setup in setups.items()
    }


def score_table(
    journal: Journal,
    tests: Sequence[Test],
    readable: Mapping[str, pd.DataFrame],
    made: Set[tuple[str, str]],
    plans: Plans | None = None,
) -> pd.DataFrame:
    """One row per explanation, judge set-up and control, from the verdicts; failed explanations are rows too.

    ``tests`` give what should have been judged of a latent under their settings, so that what is missing counts as
    failed. What other set-ups asked (another harvest, say) is no longer known, and is taken as it stands; of adaptive
    ones ``plans`` are what is known. Of the explanations that are ``readable`` for a judge (by its name), those whose
    latent has too few contexts for a test among the ``made`` ones (scorer and settings) are rows without scores.
    Verdicts of scorers that are gone (:func:`lost_scorers`) make no rows.
    """
    explanations = {row["id"]: row for row in records_of(journal.explanations())}
    # Sums are rounded in the order of their parts, and answers come in any order: a score must not depend on it.
    verdicts, plans = journal.verdicts().sort_values("context", kind="stable"), plans or {}
    known = {test.key: test for test in tests}
    rows: list[dict[str, Any]] = []
    keys = ["explanation_id", "latent", "judge", "scorer", "settings_hash", "prompt_hash", "model"]
    keys += ["control", "replicate"]
    for key, group in verdicts[verdicts["scorer"].isin(list(SCORERS))].groupby(keys, sort=True):
        found: dict[str, Any] = dict(zip(keys, cast(tuple[Any, ...], key), strict=True))
        scorer = SCORERS[found["scorer"]]()
        if found["settings_hash"] in plans:
            plan = plans[found["settings_hash"]].get(found["scorer"])
            outdated = scorer.score(group.iloc[:0])._replace(status=_OUTDATED)
            row = plan.score(found["latent"], group) if plan else outdated
        else:
            test = known.get((found["scorer"], found["settings_hash"]))
            row = scorer.score(group, test.items(found["latent"]) if test is not None else ())
        rows.append(
            {
                **_identity(found["latent"], explanations[found["explanation_id"]]),
                **_judged_by(found),
                "control": found["control"],
                "replicate": found["replicate"],
                **row._asdict(),
            }
        )
    for test in (known[key] for key in sorted(made & known.keys())):
        for explained in records_of(readable[test.same["judge"]]):
            if not test.items(explained["latent"]):
                untested = {"control": "none", "replicate": 0, "status": UNTESTED}
                rows.append({**_identity(explained["latent"], explained), **_judged_by(test.same), **untested})
    for explained in explanations.values():
        if explained["status"] == "failed":
            status = f"failed: no explanation: {explained['failure']}"
            rows.append({**_identity(explained["latent"], explained), "control": "none", "status": status})
    return pd.DataFrame(rows, columns=list(COLUMNS))


def lost_scorers(journal: Journal) -> list[str]:
    """Scorers that the journal has verdicts of, and that there are no files of any more."""
    return sorted(set(journal.scorers()) - set(SCORERS))


def records_of(table: pd.DataFrame) -> list[dict[str, Any]]:
    return cast(list[dict[str, Any]], table.to_dict("records"))


def of_this_judge(table: pd.DataFrame, same: Mapping[str, str]) -> pd.DataFrame:
    """The rows that are this judge's doing under these settings, and the failed explanations it would have judged.

    What other judges, protocols and prompts made of the same explanations stands in the table beside them.
    """
    found = table[table["control"] == "none"]
    judged = found["judge_prompt_hash"] == same["prompt_hash"]
    for column in ("judge", "scorer", "settings_hash", "model"):
        judged &= found[column] == same[column]
    unexplained, by_ngram = found["judge"].isna(), found["explainer"] == BASELINE
    if same["judge"] == BASELINE:
        unexplained &= by_ngram
    elif not by_ngram.all():  # beside others' explanations those are the baseline's
        unexplained &= ~by_ngram
    return found[judged | unexplained]


def _judged_by(verdict: Mapping[str, Any]) -> dict[str, Any]:
    """The columns that say who judged, and how."""
    same = {key: verdict[key] for key in ("judge", "model", "scorer", "settings_hash")}
    return {**same, "judge_prompt_hash": verdict["prompt_hash"]}


def _identity(latent: int, explanation: Mapping[str, Any]) -> dict[str, Any]:
    """The columns that say which explanation a score is of. ``latent`` is whose contexts were judged."""
    return {
        "latent": latent,
        "explanation_id": explanation["id"],
        "explainer": explanation["explainer"],
        "explainer_model": explanation["model"],
        "explain_settings_hash": explanation["settings_hash"],
        "explain_prompt_hash": explanation["prompt_hash"],
        "draw": explanation["draw"],
    }
