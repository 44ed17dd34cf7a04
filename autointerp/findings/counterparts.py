"""Total over all pairs of runs how latents behave in the other SAEs, and what became of the unshared ones.

The rows are :class:`sae.alignment.behaviour.Behaviour`'s: one per latent and other SAE, so with S runs a latent counts
up to S - 1 times. An unshared latent here is alive and not strict-shared at 0.7, whatever definition a report uses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pandas as pd

from autointerp.findings import shape
from autointerp.findings.statistics.correlation import bootstrap_mean, mean_fraction, quantiles
from sae.alignment.nulls import FIRING_COLUMNS, SHIFTED
from sae.alignment.overlap import find_range
from sae.alignment.relation import RELATIONS
from sae.common.estimate import UNKNOWN, Estimate

Tables = Mapping[tuple[str, str], pd.DataFrame]
_JACCARDS = ("jaccard", "max_jaccard")
_FREQUENCIES = ("decoder_partner_jaccard", "decoder_partner_p_there", "decoder_partner_p_here")


def counterpart_findings(
    behaviour: Tables,
    alignments: Tables,
    alive: Mapping[str, np.ndarray],
    facts: Mapping[tuple[str, str], Mapping[str, Any]] | None = None,
) -> shape.Counterparts | None:
    """Return the totals; ``None`` if no firings have been compared. ``null`` is ``None`` unless all pairs have it.

    Args:
        behaviour: (x, y) → the side of x.
        alignments: (x, y) → the alignment of x in terms of y.
        alive: run → [M].
        facts: (x, y), each pair once → ``n_tokens`` and ``jaccard_gap_per_latent`` of its comparison.
    """
    if not behaviour:
        return None
    rows = pd.concat(
        [_rows(pair, table, alignments[pair], alive[pair[0]]) for pair, table in behaviour.items()], ignore_index=True
    )
    rows["unit"] = rows.groupby(["run", "latent"]).ngroup()
    unshared = rows[rows["relation"].notna()]
    null = _under_null(rows, behaviour)
    facts = facts or {}
    return shape.Counterparts(
        **_by_firing(rows),
        pairs=[list(pair) for pair in behaviour],
        n=len(rows),
        n_tokens=min((of["n_tokens"] for of in facts.values()), default=None),
        jaccard_gap_per_latent=max((of["jaccard_gap_per_latent"] for of in facts.values()), default=None),
        comparisons=[{"runs": list(pair), **of} for pair, of in facts.items()],
        n_unshared=len(unshared),
        rebuilt=shape.Rebuilt(
            mean=_by_latent(unshared["rebuilt"].dropna(), unshared, bootstrap_mean),
            quartiles=quantiles(unshared["rebuilt"].dropna()).tolist(),
            null=unshared["rebuilt__rotated"].mean() if "rebuilt__rotated" in unshared else None,
        ),
        null=None if null is None else {SHIFTED: shape.FiringNull(**_by_firing(null), **_ranges(null))},
    )


def _by_firing(rows: pd.DataFrame) -> dict[str, Any]:
    """Return the fields of :class:`FiringTogether`."""
    unshared = rows[rows["relation"].notna()]
    by_class = {"shared": rows[rows["relation"].isna()], "unshared": unshared}
    agreements = [_agreement(rows, "decoder"), _agreement(rows, "encoder")]
    return {
        "same_partner": shape.SamePartner(*agreements, *(_agreement(of, "decoder") for of in by_class.values())),
        "jaccard": rows["jaccard"].mean(),
        "max_jaccard": rows["max_jaccard"].mean(),
        "of_decoder_partner": {
            name: shape.WithDecoderPartner(
                **{column.removeprefix("decoder_partner_"): of[column].mean() for column in _FREQUENCIES},
                n=int(of["decoder_partner_p_here"].notna().sum()),
            )
            for name, of in by_class.items()
        },
        "relations": [_relation(name, unshared) for name in RELATIONS],
    }


def _ranges(rows: pd.DataFrame) -> dict[str, Any]:
    """Return the range of a null's figures over pairs of runs."""
    unshared = rows[rows["relation"].notna()]
    same = rows.loc[rows["decoder_partner"] >= 0]
    agree = (same["jaccard_partner"] == same["decoder_partner"]).astype(float)
    return {
        **{f"{name}_range": find_range(rows.groupby("pair")[name].mean().to_dict()) for name in _JACCARDS},
        "same_partner_range": find_range(agree.groupby(same["pair"]).mean().to_dict()),
        "relations_range": {
            name: find_range((unshared["relation"] == name).groupby(unshared["pair"]).mean().to_dict())
            for name in RELATIONS
        },
    }


def _under_null(rows: pd.DataFrame, behaviour: Tables) -> pd.DataFrame | None:
    """Return the rows with the other SAE's firings moved."""
    if any(f"jaccard__{SHIFTED}" not in table for table in behaviour.values()):
        return None
    moved = {name: rows[f"{name}__{SHIFTED}"] for name in FIRING_COLUMNS}
    return rows.drop(columns="rebuilt").assign(**moved)


def _agreement(rows: pd.DataFrame, space: str) -> float | None:
    """Return the fraction of latents with a partner by cosine whose partner by firing is the same."""
    partnered = rows[rows[f"{space}_partner"] >= 0]
    return (partnered["jaccard_partner"] == partnered[f"{space}_partner"]).mean() if len(partnered) else None


def _by_latent(values: pd.Series, rows: pd.DataFrame, interval: Callable[[pd.Series], Estimate]) -> Estimate:
    """Return the mean of a share over rows; its interval counts all rows of a latent as one observation."""
    if values.empty:
        return UNKNOWN
    whole = float(values.mean())
    per_latent = interval(values.groupby(rows.loc[values.index, "unit"].to_numpy()).mean())
    low, high = whole - (per_latent.value - per_latent.low), whole + (per_latent.high - per_latent.value)
    return Estimate(whole, max(low, 0.0), min(high, 1.0))


def _rows(pair: tuple[str, str], table: pd.DataFrame, alignment: pd.DataFrame, alive: np.ndarray) -> pd.DataFrame:
    joined = table.assign(
        run=pair[0],
        pair="--".join(sorted(pair)),
        decoder_partner=alignment["decoder_partner"].to_numpy(),
        encoder_partner=alignment["encoder_partner"].to_numpy(),
    )
    return joined[np.asarray(alive, bool)]


def _relation(name: str, unshared: pd.DataFrame) -> shape.RelationShare:
    of = unshared[unshared["relation"] == name]
    share = _by_latent((unshared["relation"] == name).astype(float), unshared, mean_fraction)
    rebuilt = of["rebuilt"].mean() if "rebuilt" in of else None
    return shape.RelationShare(name, RELATIONS[name], len(of), share, of["relation_covered"].mean(), rebuilt)
