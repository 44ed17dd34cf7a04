"""A run's score table, made of the journal's verdicts: one row per explanation, judge set-up and control.

Every row can be made again from verdicts, whatever the call that asked for them: what was judged under other settings,
prompts or models stands beside what is judged now.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import pandas as pd

from autointerp.contexts.material import Material
from autointerp.contexts.sampler import Context
from autointerp.journal.journal import Journal
from autointerp.journal.method import BASELINE
from autointerp.scoring.judges.base import Judge
from autointerp.scoring.rounds import AdaptivePlan
from autointerp.scoring.scorers import SCORERS
from autointerp.scoring.scorers.base import Scorer, ScoreRow
from sae.common.files import digest
from sae.study.run import Run

_IDENTITY = ("latent", "explanation_id", "explainer", "explainer_model", "explain_settings_hash", "explain_prompt_hash")
_JUDGED_BY = ("judge", "model", "scorer", "settings_hash", "judge_prompt_hash")
COLUMNS = (*_IDENTITY, "draw", *_JUDGED_BY, "control", "replicate", *ScoreRow._fields)
"""Of the score table. All are there even when every explanation failed and nothing was judged."""
UNTESTED = "failed: too few contexts that can be marked otherwise"
UNEXPLAINED = "failed: no explanation: "
_OUTDATED = "failed: judged in rounds of contexts that a later harvest replaced; score again"

Plans = dict[str, Mapping[str, AdaptivePlan | None]]
"""Settings hash → scorer → the plan by which it was judged, of adaptive set-ups; ``None``: no longer known."""


class SetUp(NamedTuple):
    """What all verdicts of one way of judging have in common in the journal."""

    judge: str
    scorer: str
    settings_hash: str
    prompt_hash: str
    model: str

    @property
    def key(self) -> tuple[str, str]:
        """What decides which contexts are judged."""
        return self.scorer, self.settings_hash


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
        return self.set_up.key

    @property
    def set_up(self) -> SetUp:
        return SetUp(**self.same)

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
    standing: Mapping[SetUp, Sequence[dict[str, Any]]] | None = None,
    kept: Sequence[dict[str, Any]] = (),
    advance: Callable[[int], None] | None = None,
) -> pd.DataFrame:
    """One row per explanation, judge set-up and control, from the verdicts; failed explanations are rows too.

    ``tests`` give what should have been judged of a latent under their settings, so that what is missing counts as
    failed. What other set-ups asked (another harvest, say) is no longer known, and is taken as it stands; of adaptive
    ones ``plans`` are what is known. Of the explanations that are ``readable`` for a judge (by its name), those whose
    latent has too few contexts for a test among the ``made`` ones (scorer and settings) are rows without scores.
    Verdicts of scorers that are gone (:func:`lost_scorers`) make no rows.

    Args:
        standing: set-up → its rows of verdicts, where these need not be made again.
        kept: rows without scores that stay; see ``made``.
        advance: called for each row that is made, with the number of its verdicts.
    """
    explanations = {row["id"]: row for row in records_of(journal.explanations())}
    standing, plans = standing or {}, plans or {}
    known = {test.key: test for test in tests}
    rows = [row for of in standing.values() for row in of]
    for set_up in map(SetUp._make, sorted(journal.verdict_states())):
        if set_up in standing or set_up.scorer not in SCORERS:
            continue
        # Sums are rounded in the order of their parts, and answers come in any order: a score must not depend on it.
        verdicts = journal.verdicts(**set_up._asdict()).sort_values("context", kind="stable")
        for key, group in verdicts.groupby(["explanation_id", "latent", "control", "replicate"], sort=True):
            number, latent, control, replicate = cast(tuple[int, int, str, int], key)
            rows.append(
                {
                    **_identity(latent, explanations[number]),
                    **_judged_by(set_up),
                    "control": control,
                    "replicate": replicate,
                    **_score(set_up, latent, group, known, plans)._asdict(),
                }
            )
            if advance:
                advance(len(group))
    rows.sort(key=_place)
    untested = {(row["explanation_id"], judged_by(row)): row for row in kept}
    for test in (known[key] for key in sorted(made & known.keys())):
        for explained in records_of(readable[test.same["judge"]]):
            if not test.items(explained["latent"]):
                row = {**_identity(explained["latent"], explained), **_judged_by(test.set_up)}
                row |= {"control": "none", "replicate": 0, "status": UNTESTED}
                untested[explained["id"], judged_by(row)] = row
    rows += sorted(untested.values(), key=lambda row: (row["scorer"], row["settings_hash"], *_place(row)))
    for explained in explanations.values():
        if explained["status"] == "failed":
            status = f"{UNEXPLAINED}{explained['failure']}"
            rows.append({**_identity(explained["latent"], explained), "control": "none", "status": status})
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _score(
    set_up: SetUp, latent: int, verdicts: pd.DataFrame, known: Mapping[tuple[str, str], Test], plans: Plans
) -> ScoreRow:
    """The score of one explanation, judged once by ``set_up``."""
    scorer = SCORERS[set_up.scorer]()
    if set_up.settings_hash not in plans:
        test = known.get(set_up.key)
        return scorer.score(verdicts, test.items(latent) if test is not None else ())
    plan = plans[set_up.settings_hash].get(set_up.scorer)
    return plan.score(latent, verdicts) if plan else scorer.score(verdicts.iloc[:0])._replace(status=_OUTDATED)


def _place(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """Where a row stands in the table: by explanation, then by who judged."""
    order = ("explanation_id", "latent", *("judge", "scorer", "settings_hash", "judge_prompt_hash", "model"))
    return tuple(row[column] for column in (*order, "control", "replicate"))


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


def _judged_by(set_up: SetUp) -> dict[str, Any]:
    """The columns that say who judged, and how."""
    same = {key: getattr(set_up, key) for key in ("judge", "model", "scorer", "settings_hash")}
    return {**same, "judge_prompt_hash": set_up.prompt_hash}


def judged_by(row: Mapping[str, Any]) -> SetUp:
    """The set-up that a row of the table is of."""
    return SetUp(row["judge"], row["scorer"], row["settings_hash"], row["judge_prompt_hash"], row["model"])


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
