"""Judge only as many contexts as a score needs: rounds, a stopping rule, and a score that stopping does not bias.

Rates near 1 have narrow intervals, so lucky streaks stop early: the plain mean is too high, and its interval covers the
truth too seldom. Three things correct this:

* There are few looks, fixed beforehand (:func:`schedule`), the first after ``FIRST`` contexts of the larger class.
* The interval joins the Clopper-Pearson intervals of the two rates (MOVER). The *reported* interval, on whose width
  judging stops, covers the truth in at least 94.4 % of cases over true rates from .5 to .98, and in 95 % nearly
  everywhere; Wilson's falls to 88 % (computed exactly by ``benchmarks/adaptive_scoring.py``).
* The rates are the expectations of the raw ones given the stop (Girshick, Mosteller and Savage 1946): the mean rate
  among the first look's answers, over all orders of answers that reach the same look with the same counts. They are
  unbiased under any rule.

The harder negatives are judged in the same rounds, in the settings' proportion to the random ones, so every request
shows the same mix. They do not affect when judging stops, so their own rates need no correction; only the TPR does.

``precision`` is the half-width of the 95 % interval of balanced accuracy, not its standard error. ± .065 takes about 25
contexts of each kind if both rates are .98, 36 at .95, 54 at .9, 105 at .75. So a test set of 50 and 50 reaches it for
good explanations only; others end at the cap.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from autointerp.contexts.sampler import TestSet
from autointerp.scoring.scorers.base import HARDER, STOPS, Figures, ScoreRow
from sae.common.errors import BadInput
from sae.common.estimate import UNKNOWN, Estimate

if TYPE_CHECKING:
    import pandas as pd

    from autointerp.contexts.sampler import Context
    from autointerp.scoring.scorers.base import Planned, Scorer
    from sae.settings import ContextSettings

FIRST = 20
"""Contexts of the larger class before the first look. With fewer, perfect answers would stop too soon to cover .98."""
STEP = 5
GROWTH = 1.25
LARGEST = 1_000
"""Contexts of both kinds at most: beyond it the path counts leave the range of floating point."""
MOST_FAILED = 0.2
"""A look with a larger share of failures decides nothing, because such a score is not valid."""
LEVEL = 0.95
METHOD = 2
"""Of rounds, rule and estimate; part of what adaptive scores are keyed by."""

UNFINISHED = "failed: not judged to its end; run the same `score` again"

SIZES = ("n_active", "n_inactive", "n_hard", "n_same_token")
"""Of a test set, as the settings call them."""

Array = NDArray[np.float64]


@dataclass(frozen=True)
class StoppingRule:
    """The ``half_width`` of the 95 % interval of balanced accuracy, and the most contexts per latent."""

    half_width: float
    max_contexts: int | None = None
    """Activating and random silent ones together; ``None``: as many as the run's settings have in a test set."""

    def __post_init__(self) -> None:
        if not 0.01 <= self.half_width <= 0.5:
            raise BadInput(f"--ci-half-width {self.half_width:g}: give a half-width from 0.01 to 0.5, such as 0.065")
        if self.max_contexts is not None and not 4 <= self.max_contexts <= LARGEST:
            raise BadInput(f"--max-contexts {self.max_contexts}: give a number from 4 to {LARGEST}")

    def cap(self, settings: ContextSettings) -> ContextSettings:
        """Return the settings with ``max_contexts`` in their own proportion; harder negatives come on top."""
        whole = settings.n_active + settings.n_inactive
        n = min(self.max_contexts or whole, LARGEST)
        n_active = min(max(2, round(n * settings.n_active / whole)), n - 2)
        harder = {name: round(getattr(settings, name) * (n - n_active) / settings.n_inactive) for name in SIZES[2:]}
        return settings.model_copy(update={"n_active": n_active, "n_inactive": n - n_active, **harder})

    def identity(self, settings: ContextSettings) -> dict[str, Any]:
        """Return the JSON values that rounds and stop depend on, apart from the run's material and the judge."""
        capped = self.cap(settings)
        return {
            "method": METHOD,
            "half_width": self.half_width,
            **{name: getattr(capped, name) for name in SIZES},
        }


class Look(NamedTuple):
    """The number of contexts of each kind that have been judged when the rule is checked."""

    n_active: int
    n_inactive: int


class Tally(NamedTuple):
    """Answers up to a look, without failed ones."""

    n_active: int
    right_active: int
    n_inactive: int
    right_inactive: int
    n_failed: int

    @property
    def counts(self) -> Look:
        return Look(self.n_active, self.n_inactive)

    @property
    def decides(self) -> bool:
        answered = self.n_active + self.n_inactive
        return min(self.counts) > 0 and self.n_failed <= MOST_FAILED * (answered + self.n_failed)


class Stop(NamedTuple):
    """The look at which judging ended, and the score there."""

    look: int
    why: str
    """One of :data:`autointerp.scoring.scorers.base.STOPS`."""
    estimate: Estimate
    """Balanced accuracy, unbiased, with its 95 % interval; NaN where too much failed."""
    tpr: float
    tnr: float


def schedule(n_active: int, n_inactive: int) -> list[Look]:
    """Return the looks for a test set: 20 of the larger kind, then 25, 30, 40, 50, 60, 75, … and at last all."""
    most = max(n_active, n_inactive)
    at, looks = FIRST, []
    while at < most:
        looks.append(Look(round(at * n_active / most), round(at * n_inactive / most)))
        at = max(at + STEP, STEP * round(at * GROWTH / STEP))
    return [*looks, Look(n_active, n_inactive)]


def lay_out(test_set: TestSet, items: Callable[[TestSet], list[Context]]) -> list[list[Context]]:
    """Return a latent's contexts, round by round. ``items`` of the scorer orders each round.

    Each round has the same share of every harder kind as of the random silent contexts.
    """
    kinds = test_set.active, test_set.inactive, test_set.hard, test_set.same_token
    ends = [(0, 0, 0, 0)]
    for look in schedule(len(test_set.active), len(test_set.inactive)):
        share = look.n_inactive / max(1, len(test_set.inactive))
        ends.append((*look, round(share * len(test_set.hard)), round(share * len(test_set.same_token))))
    return [
        items(TestSet(*(contexts[i:j] for contexts, i, j in zip(kinds, start, end, strict=True))))
        for start, end in itertools.pairwise(ends)
    ]


def find_stop(
    rounds: Sequence[Sequence[Planned]], labels: Mapping[int, bool | None], adaptive: Mapping[str, Any]
) -> Stop | None:
    """Return where judging ends; ``None`` while an earlier round has contexts that were not asked.

    Args:
        labels: window → the judge's label, ``None`` if the judge failed; no entry if it was not asked.
        adaptive: from :meth:`StoppingRule.identity`.
    """
    tallies: list[Tally] = []
    for number, contexts in enumerate(rounds):
        if any(context.window not in labels for context in contexts):
            return None
        tallies.append(_tally([c for part in rounds[: number + 1] for c in part], labels))
        estimate, tpr, tnr = _score(tallies, adaptive["half_width"])
        narrow = (estimate.high - estimate.low) / 2 <= adaptive["half_width"]  # False where it is NaN
        if narrow or number == len(rounds) - 1:
            enough, cap, out = STOPS
            why = enough if narrow else cap if _are_all(rounds, adaptive) else out
            return Stop(number, why, estimate, tpr, tnr)
    return None


def _are_all(rounds: Sequence[Sequence[Planned]], adaptive: Mapping[str, Any]) -> bool:
    """Return whether the latent has as many contexts as were asked for."""
    counted = [context.truth for contexts in rounds for context in contexts if context.kind not in HARDER]
    n_active = sum(counted)
    return n_active >= adaptive["n_active"] and len(counted) - n_active >= adaptive["n_inactive"]


def score_rounds(
    scorer: Scorer, verdicts: pd.DataFrame, rounds: Sequence[Sequence[Planned]], adaptive: Mapping[str, Any]
) -> ScoreRow:
    """Return the score of one explanation from the contexts up to the stop; later verdicts do not count."""
    half_width = float(adaptive["half_width"])
    answered = zip(verdicts["context"].tolist(), verdicts["label"].tolist(), strict=True)
    labels = {int(window): None if label != label else bool(label) for window, label in answered}
    stop = find_stop(rounds, labels, adaptive)
    if stop is None:
        n = verdicts[verdicts["failure"].isna()]["truth"].value_counts()
        counts = Figures(n=int(n.get(False, 0)), n_failed=int(verdicts["failure"].notna().sum()))
        return ScoreRow(UNFINISHED, int(n.get(True, 0)), counts, precision=half_width)
    row = scorer.score(verdicts, [context for contexts in rounds[: stop.look + 1] for context in contexts])
    row = row._replace(precision=half_width, stopped=stop.why)
    if row.status != "ok":
        return row

    def correct(figures: Figures) -> Figures:
        """Replace the TPR in the figures of a harder kind by the one that is corrected for stopping."""
        if math.isnan(tnr := figures.tnr.value):
            return figures
        right = row.tpr.value * row.n_active, row.n_active, tnr * figures.n, figures.n
        return figures._replace(ba=_around((stop.tpr + tnr) / 2, *right), auroc=_bare(figures.auroc))

    random = row.random._replace(ba=stop.estimate, auroc=_bare(row.random.auroc))
    return row._replace(
        tpr=row.tpr._replace(value=stop.tpr),
        random=random._replace(tnr=random.tnr._replace(value=stop.tnr)),
        hard=correct(row.hard),
        same_token=correct(row.same_token),
    )


def _bare(auroc: Estimate) -> Estimate:
    """Drop the interval: DeLong's may not hold where the number of contexts depends on the answers."""
    return Estimate(auroc.value, math.nan, math.nan)


def _around(value: float, right_active: float, n_active: int, right_inactive: float, n_inactive: int) -> Estimate:
    """Return ``value`` with the :func:`interval` of the counts, widened to hold it."""
    low, high = interval(right_active, n_active, right_inactive, n_inactive)
    return Estimate(value, min(float(low), value), max(float(high), value))


def _tally(contexts: Sequence[Planned], labels: Mapping[int, bool | None]) -> Tally:
    """Count the right answers, without the harder negatives, which decide nothing."""
    contexts = [context for context in contexts if context.kind not in HARDER]
    answers = [(context.truth, label) for context in contexts if (label := labels[context.window]) is not None]
    active = [label for is_active, label in answers if is_active]
    inactive = [not label for is_active, label in answers if not is_active]
    return Tally(len(active), sum(active), len(inactive), sum(inactive), len(contexts) - len(answers))


def _score(tallies: Sequence[Tally], half_width: float) -> tuple[Estimate, float, float]:
    """Return balanced accuracy, TPR and TNR at the last of the looks so far."""
    now = tallies[-1]
    if not now.decides:
        return UNKNOWN, math.nan, math.nan
    # Which looks decide depends on failures only, never on the answers, so the estimate stays unbiased.
    looks = tuple(tally.counts for tally in tallies if tally.decides)
    tpr, tnr = unbiased(looks, half_width, now.right_active, now.right_inactive)
    counts = now.right_active, now.n_active, now.right_inactive, now.n_inactive
    return _around((tpr + tnr) / 2, *counts), tpr, tnr


def interval(
    right_active: float | Array, n_active: int, right_inactive: float | Array, n_inactive: int, level: float = LEVEL
) -> tuple[Array, Array]:
    """Return the interval of balanced accuracy for counts of right answers, which broadcast against each other."""
    tpr, tnr = np.divide(right_active, n_active), np.divide(right_inactive, n_inactive)
    (low_1, high_1), (low_2, high_2) = _exact(right_active, n_active, level), _exact(right_inactive, n_inactive, level)
    value = (tpr + tnr) / 2
    return value - np.hypot(tpr - low_1, tnr - low_2) / 2, value + np.hypot(high_1 - tpr, high_2 - tnr) / 2


def _exact(right: float | Array, n: int, level: float) -> tuple[Array, Array]:
    """Return Clopper and Pearson's interval of a proportion."""
    from scipy import stats

    x = np.asarray(right, dtype=float)
    tail = (1 - level) / 2
    low = stats.beta.ppf(tail, np.maximum(x, 0.5), n - x + 1)  # the value at 0 is not used
    high = stats.beta.ppf(1 - tail, x + 1, np.maximum(n - x, 0.5))
    return np.where(x == 0, 0.0, low), np.where(x == n, 1.0, high)


def unbiased(looks: tuple[Look, ...], half_width: float, right_active: int, right_inactive: int) -> tuple[float, float]:
    """Return the unbiased TPR and TNR if judging stopped at the last of ``looks`` with these counts."""
    paths = _paths(looks, half_width)[:, right_active, right_inactive]
    return float(paths[1] / paths[0]), float(paths[2] / paths[0])


@functools.lru_cache(maxsize=512)
def _paths(looks: tuple[Look, ...], half_width: float) -> Array:
    """Return the weight of all paths to the last look for each pair of right counts, without an earlier stop.

    Shape [3, n_active + 1, n_inactive + 1]: the weight, then the weight times the rate of right active (inactive)
    answers at the first look. Weights are probabilities under rates of ½; the ratio of two is the same under any rates.
    """
    now = looks[-1]
    if len(looks) == 1:
        chance = np.outer(_halves(now.n_active), _halves(now.n_inactive))
        tpr, tnr = (np.arange(n + 1) / n for n in now)
        return np.stack([chance, chance * tpr[:, None], chance * tnr])
    before = looks[-2]
    going_on = _paths(looks[:-1], half_width) * ~stops(before, half_width)
    active, inactive = (_added(n, m) for n, m in zip(before, now, strict=True))
    return np.asarray(active @ going_on @ inactive.T)


@functools.lru_cache(maxsize=512)
def stops(look: Look, half_width: float) -> NDArray[np.bool_]:
    """Return whether the interval is narrow enough for each pair of right counts [n_active + 1, n_inactive + 1]."""
    right_active, right_inactive = np.arange(look.n_active + 1.0)[:, None], np.arange(look.n_inactive + 1.0)[None]
    low, high = interval(right_active, look.n_active, right_inactive, look.n_inactive)
    return np.asarray((high - low) / 2 <= half_width)


def _halves(n: int) -> Array:
    from scipy import stats

    return np.asarray(stats.binom.pmf(np.arange(n + 1), n, 0.5))


def _added(before: int, now: int) -> Array:
    """Return the probability of x right of ``now`` after y right of ``before``, at a rate of ½.

    Shape [now + 1, before + 1].
    """
    from scipy import stats

    more = np.arange(now + 1)[:, None] - np.arange(before + 1)[None]
    return np.asarray(stats.binom.pmf(more, now - before, 0.5))
