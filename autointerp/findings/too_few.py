"""Latents that have too few contexts to be explained and tested: how many, which, and why."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pandas as pd

from autointerp.findings.json_values import number
from sae.alignment.latent_table import CLASSES
from sae.common.estimate import proportion


def too_few_findings(latents: pd.DataFrame) -> dict[str, Any] | None:
    """The alive latents that have too few contexts to be explained and tested, by shared class, with the reasons.

    ``together`` and, where there are siblings, each class: how many are alive, how many of them have too few, the share
    with its interval, their numbers, how often they fire beside those that have enough, and latents by reason.
    ``None`` where contexts were not counted.
    """
    if "eligible" not in latents:
        return None
    alive = latents[latents["alive"].astype(bool)]
    found = {"together": _too_few(alive)}
    if "shared_class" in alive:
        classes = {name: alive[alive["shared_class"] == name] for name in CLASSES}
        found |= {name: _too_few(members) for name, members in classes.items() if len(members)}
    return found


def _too_few(members: pd.DataFrame) -> dict[str, Any]:
    enough = members["eligible"].astype("boolean").fillna(False).astype(bool)
    lacking = members[~enough]
    said = lacking.get("ineligible_reason", pd.Series("", index=lacking.index))
    reasons = Counter(said.map(_kind_of_reason))
    frequency = members.get("firing_frequency", pd.Series(np.nan, index=members.index))
    return {
        "n_alive": len(members),
        "n": len(lacking),
        "fraction": (share := proportion(len(lacking), len(members)).as_dict())["value"],
        "interval": share["interval"],
        "latents": [int(latent) for latent in lacking.index],
        "reasons": dict(reasons.most_common()),
        "median_frequency": number(frequency[~enough].median()) if len(lacking) else None,
        "median_frequency_of_eligible": number(frequency[enough].median()) if enough.any() else None,
    }


def _kind_of_reason(reason: object) -> str:
    """The reason without its numbers, which differ from latent to latent."""
    words = str(reason or "not said")
    for kind in ("fires nearly everywhere", "activating contexts to explain from", "activating contexts to test on"):
        if kind in words:
            return kind if kind.startswith("fires") else f"too few {kind}"
    return words
