"""What latents do in the other SAEs, and what those are there that do not return: totals over all pairs of runs.

The rows are :class:`sae.behaviour.Behaviour`'s. What became of a latent was asked where it is alive and not
strict-shared at 0.7 with that run, whatever definition a report is looked at with.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from autointerp.scored import mean_of, number, quartiles_of
from autointerp.statistics import bootstrap_mean, proportion
from sae.relation import RELATIONS

Tables = Mapping[tuple[str, str], pd.DataFrame]
_FREQUENCIES = ("decoder_partner_jaccard", "decoder_partner_p_there", "decoder_partner_p_here")


def counterpart_findings(
    behaviour: Tables, alignments: Tables, alive: Mapping[str, np.ndarray]
) -> dict[str, Any] | None:
    """The totals as JSON values; ``None`` where no firings have been compared.

    Args:
        behaviour: (x, y) → the side of x, for the pairs whose firings have been compared.
        alignments: (x, y) → the alignment of x in terms of y.
        alive: run → [M].
    """
    if not behaviour:
        return None
    rows = pd.concat(
        [_rows(table, alignments[pair], alive[pair[0]]) for pair, table in behaviour.items()], ignore_index=True
    )
    lone = rows[rows["relation"].notna()]
    shared = rows[rows["relation"].isna()]
    by_class = {"shared": shared, "unshared": lone}
    return {
        "pairs": [list(pair) for pair in behaviour],
        "n": len(rows),
        "same_partner": {
            "decoder": number((rows["jaccard_partner"] == rows["decoder_partner"]).mean()),
            "encoder": number((rows["jaccard_partner"] == rows["encoder_partner"]).mean()),
            **{
                name: number((of["jaccard_partner"] == of["decoder_partner"]).mean()) if len(of) else None
                for name, of in by_class.items()
            },
        },
        "jaccard": number(rows["jaccard"].fillna(0).mean()),
        "of_decoder_partner": {
            name: {
                column.removeprefix("decoder_partner_"): number(of[column].fillna(0).mean()) if len(of) else None
                for column in _FREQUENCIES
            }
            for name, of in by_class.items()
        },
        "n_unshared": len(lone),
        "relations": [_relation(name, lone) for name in RELATIONS],
        "rebuilt": {
            **mean_of(bootstrap_mean(lone["rebuilt"])),
            "quartiles": quartiles_of(lone["rebuilt"]),
            "null": number(lone["rebuilt__rotated"].mean()) if "rebuilt__rotated" in lone else None,
        },
    }


def _rows(table: pd.DataFrame, alignment: pd.DataFrame, alive: np.ndarray) -> pd.DataFrame:
    joined = table.assign(
        decoder_partner=alignment["decoder_partner"].to_numpy(), encoder_partner=alignment["encoder_partner"].to_numpy()
    )
    return joined[np.asarray(alive, bool)]


def _relation(name: str, lone: pd.DataFrame) -> dict[str, Any]:
    of = lone[lone["relation"] == name]
    share = proportion(len(of), len(lone)).as_dict() if len(lone) else {"value": None, "interval": None}
    return {
        "relation": name,
        "says": RELATIONS[name],
        "n": len(of),
        "fraction": share["value"],
        "interval": share["interval"],
        "covered": number(of["relation_covered"].mean()) if len(of) else None,
        "rebuilt": number(of["rebuilt"].mean()) if len(of) else None,
    }
