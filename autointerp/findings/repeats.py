"""Compare the scores with others that differ in one thing: the draw of the explanation, the replicate, or the judge.

Only contexts that both judged are compared. Other contexts are those of :mod:`autointerp.findings.reliability`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pandas as pd

from autointerp.contexts.sampling import Sample
from autointerp.findings.evidence import JournalFacts, Study
from autointerp.findings.reliability import resample_latents, verdicts_of
from autointerp.findings.shape import Repeat
from autointerp.findings.statistics.resampling import interval_of
from autointerp.scoring.setups import rows_of, setups_of

METHODS = {
    "repeats": "share of contexts with equal answers, a mean over latents, and rank correlation of the scores on these "
    "contexts; expanded percentile bootstrap over latents, 1000 resamples, seeded"
}
_OF_JUDGE = {"judge", "model", "judge_prompt_hash", "settings_hash"}


def repeat_findings(
    study: Study, rows: pd.DataFrame, verdicts: pd.DataFrame, facts: JournalFacts, sample: Sample | None
) -> list[Repeat]:
    """Compare the scores in ``rows`` with each other draw, replicate and judge; ``verdicts`` are those behind them."""
    if study.scores is None or study.setup is None:
        return []
    found: list[Repeat] = []
    for by, setup in _find_repeats(study.scores, study.setup, facts.first):
        theirs = verdicts_of(study.focus, rows_of(study.scores, setup), setup)
        both = verdicts.merge(theirs, on=["latent", "context", "truth"], suffixes=("", "_there"))
        scores = [_score(both, label) for label in ("label", "label_there")]
        latents, resamples = resample_latents(rows, sample, set(scores[0].index))
        if not latents:
            continue
        equal = both["label"].eq(both["label_there"]).groupby(both["latent"]).mean()[latents]
        n = max(2, resamples.n_free)
        found.append(
            Repeat(
                by=by,
                draw=setup.get("draw"),
                replicate=setup.get("replicate"),
                judge=setup["judge"],
                model=setup.get("model"),
                equal=interval_of(resamples.means(equal), n),
                spearman=interval_of(resamples.correlations([score[latents] for score in scores])[:, 0, 1], n),
                n=len(latents),
                n_contexts=int(both["latent"].isin(latents).sum()),
            )
        )
    return found


def _score(both: pd.DataFrame, label: str) -> pd.Series:
    """Return the balanced accuracy of the answers ``label``, by latent, where both kinds of contexts were judged."""
    right = both.assign(right=both[label].eq(both["truth"].astype(float)).astype(float))
    rates = right.pivot_table("right", "latent", "truth").reindex(columns=[False, True])
    return rates.dropna().mean(axis=1)


def _find_repeats(
    scores: pd.DataFrame, own: Mapping[str, Any], first: Mapping[str, str]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the newest set-up of each other draw, replicate and judge, with what differs from the set-up ``own``.

    ``first`` maps the settings hash of a repeat to that of draw or replicate 0.
    """
    seen = set()
    for setup in setups_of(scores, scorer=own["scorer"], draw=None, replicate=None):
        differing = {name for name in own if first.get(own[name], own[name]) != first.get(setup[name], setup[name])}
        is_other_judge = bool(differing & {"judge", "model"}) and differing <= _OF_JUDGE
        by = "judge" if is_other_judge else next((name for name in ("draw", "replicate") if differing == {name}), None)
        which = tuple(setup.get(name) for name in ("draw", "replicate", "judge", "model"))
        if by is not None and which not in seen:
            seen.add(which)
            yield by, setup
