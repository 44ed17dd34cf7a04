"""Choose the latents that a report shows one by one: found by no other seed, but explained well."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import pandas as pd

from autointerp.findings.json_values import number
from autointerp.scoring.setups import own_scores

N_INTERESTING = 10
N_CONTEXTS = 3


class ShownContext(Protocol):
    """The parts of ``autointerp.contexts.sampler.Context`` that are shown."""

    @property
    def tokens(self) -> Sequence[str]: ...
    @property
    def activations(self) -> Sequence[float]: ...


#: (run name, latent) → contexts; called only for the latents shown.
ContextSource = Callable[[str, int], Sequence[ShownContext]]


def interesting(
    run: str, rows: pd.DataFrame, latents: pd.DataFrame, texts: Mapping[int, str], contexts: ContextSource | None
) -> list[dict[str, Any]]:
    """Return latents that no other seed has and that can be explained, best first.

    Their interval is above chance and their own explanation beats a swapped one. Ordered by the *lower* end of the
    interval, so that luck counts less.
    """
    own, swapped = own_scores(rows), rows[(rows["control"] == "swap") & (rows["status"] == "ok")]
    joined = own.join(latents[latents.columns.difference(own.columns)], how="inner")
    joined["swapped"] = swapped.set_index("latent")["balanced_accuracy"].reindex(joined.index)
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
    """Return ``n`` contexts from the strongest to the median: the strongest alone make a latent look too pure."""
    ordered = sorted(contexts, key=lambda c: -max(c.activations, default=0.0))
    picked = sorted({round(i * (len(ordered) - 1) / (2 * max(1, n - 1))) for i in range(n)}) if ordered else []
    return [
        {"tokens": list(ordered[i].tokens), "activations": [round(float(a), 4) for a in ordered[i].activations]}
        for i in picked
    ]
