"""Adaptive scoring of one run: which rounds a latent has, judging them until the rule says stop, and the score then.

Everything is decided from the journal: a call that was killed goes on with the same rounds and stops where it would
have stopped. A failed verdict is asked again by a later call, in its round, before the stop is looked for anew.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import pandas as pd

from autointerp.contexts.material import Material
from autointerp.contexts.sampler import Context
from autointerp.scoring.adaptive import SIZES, Look, Rounds, StoppingRule, interval
from autointerp.scoring.scorers.base import HARDER, Scorer, ScoreRow
from sae.study.run import Run

UNFINISHED = "failed: not judged to its end; run the same `score` again"


class AdaptivePlan:
    """The rounds of a run's latents under one precision and one scorer.

    Args:
        identity: as of :meth:`autointerp.scoring.adaptive.StoppingRule.identity`.
    """

    def __init__(self, run: Run, scorer: Scorer, identity: Mapping[str, Any]) -> None:
        self._scorer, self.identity = scorer, dict(identity)
        self.half_width = float(identity["half_width"])
        self._wanted = Look(int(identity["n_active"]), int(identity["n_inactive"]))
        sizes = {name: int(identity.get(name, 0)) for name in SIZES}
        self.material = Material.of(run, run.settings.contexts.model_copy(update=sizes))
        self._rounds: dict[int, Rounds] = {}

    @classmethod
    def of(cls, run: Run, scorer: Scorer, precision: StoppingRule) -> AdaptivePlan:
        return cls(run, scorer, precision.identity(run.settings.contexts))

    @property
    def setup(self) -> dict[str, Any]:
        """What a later call needs to know to score the same verdicts again; see :meth:`again`. JSON values."""
        return {"adaptive": self.identity, "material": self.material.digest}

    @classmethod
    def again(cls, run: Run, scorer: Scorer, setup: Mapping[str, Any]) -> AdaptivePlan | None:
        """The plan that ``setup`` was kept of; ``None`` where the contexts of then are no longer there."""
        plan = cls(run, scorer, setup["adaptive"])
        return plan if plan.setup == setup else None

    def rounds(self, latent: int) -> Rounds:
        if latent not in self._rounds:
            test_set = self._scorer.test_set(self.material.sampler, latent)
            self._rounds[latent] = Rounds(test_set, self._scorer, self._wanted)
        return self._rounds[latent]

    def contexts(self, latent: int) -> list[Context]:
        """All that may be judged of a latent, round by round."""
        rounds = self.rounds(latent)
        return rounds.up_to(len(rounds) - 1)

    async def judge(
        self,
        latent: int,
        labels: Callable[[], dict[int, bool | None]],
        ask: Callable[[Sequence[Context]], Awaitable[int]],
    ) -> int:
        """Ask round after round until enough is known. Returns how many contexts were asked.

        Args:
            labels: gives the journal's labels so far (see :meth:`autointerp.scoring.adaptive.Rounds.stop`).
            ask: judges those of the contexts that have no verdict yet, journals them, and says how many those were.
        """
        rounds, asked = self.rounds(latent), 0
        for number in range(len(rounds)):
            asked += await ask(rounds[number])
            stop = rounds.stop(labels(), self.half_width)
            # A stop that lies further on rests on failures that this call has yet to try again.
            if stop is not None and stop.look <= number:
                break
        return asked

    def score(self, latent: int, verdicts: pd.DataFrame) -> ScoreRow:
        """The score of one explanation, judged once: of the contexts up to the stop, verdicts beyond it left aside."""
        rounds = self.rounds(latent)
        answered = zip(verdicts["context"].tolist(), verdicts["label"].tolist(), strict=True)
        labels = {int(window): None if label != label else bool(label) for window, label in answered}
        stop = rounds.stop(labels, self.half_width)
        if stop is None:
            row = self._scorer.score(verdicts.iloc[:0])
            n = verdicts[verdicts["failure"].isna()]["truth"].value_counts()
            return row._replace(
                n_active=int(n.get(True, 0)),
                n_inactive=int(n.get(False, 0)),
                n_failed=int(verdicts["failure"].notna().sum()),
                status=UNFINISHED,
                precision=self.half_width,
                stopped="",
            )
        row = self._scorer.score(verdicts, rounds.up_to(stop.look))
        row = row._replace(precision=self.half_width, stopped=stop.why)
        if row.status != "ok":
            return row
        return row._replace(
            **{key: value for kind in HARDER for key, value in _harder(kind, row, stop.tpr).items()},
            balanced_accuracy=stop.estimate.value,
            ba_low=stop.estimate.low,
            ba_high=stop.estimate.high,
            tpr=stop.tpr,
            tnr=stop.tnr,
            # DeLong's variance is not known to hold where the number of contexts depends on the answers.
            auroc_low=math.nan,
            auroc_high=math.nan,
        )


def _harder(kind: str, row: ScoreRow, tpr: float) -> dict[str, Any]:
    """The figures of one harder kind beside a TPR that was corrected for stopping.

    Whether judging stopped was not asked of these answers, so their own rate needs no correction.
    """
    told = row._asdict()
    n, tnr = told[f"n_{kind}"], told[f"tnr_{kind}"]
    if math.isnan(tnr):
        return {}
    value = (tpr + tnr) / 2
    low, high = interval(row.tpr * row.n_active, row.n_active, tnr * n, n)
    return {
        f"ba_{kind}": value,
        f"ba_{kind}_low": min(float(low), value),
        f"ba_{kind}_high": max(float(high), value),
        f"auroc_{kind}_low": math.nan,
        f"auroc_{kind}_high": math.nan,
    }
