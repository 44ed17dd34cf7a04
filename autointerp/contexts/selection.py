"""Which latents to explain: filters by sharing, a seeded sample, and their partners in the sibling runs.

How the sample is drawn is in :mod:`autointerp.contexts.sampling`: asking for 300 after 200 keeps the 200 and adds a
hundred, and nothing that was paid for is asked again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd

from autointerp.contexts.sample_record import Draw
from autointerp.contexts.sampling import drawn, strata
from sae.alignment.overlap import shared
from sae.common.errors import BadInput, NotFound, suggest
from sae.common.files import read_table
from sae.study.run import Run

Sharing = Literal["any", "unshared", "shared"]


@dataclass(frozen=True)
class Choice:
    """What the user asked to have explained.

    ``against`` names the sibling runs that decide what is unshared (all of the study's where empty);
    ``indices`` names latents outright and leaves the sample out.
    """

    sharing: Sharing = "any"
    n: int | None = 200
    indices: tuple[int, ...] = ()
    against: tuple[str, ...] = ()
    definition: str = "strict"
    threshold: float = 0.7
    with_partners: bool = False
    seed: int = 0

    @property
    def needs_alignment(self) -> bool:
        return self.sharing != "any" or self.with_partners


def check(run: Run, choice: Choice) -> None:
    """Raise in one line what is wrong with ``choice`` for ``run``: cheap, so that it is told before any work."""
    n = run.settings.training.num_latents
    outside = [i for i in choice.indices if not 0 <= i < n]
    if outside:
        raise NotFound(f"latent {outside[0]} does not exist in run {run.name!r}; it has latents 0 to {n - 1}")
    if choice.indices and choice.sharing != "any":
        raise BadInput(f"--indices names latents outright, --{choice.sharing}-only chooses them; give one of the two")
    siblings = [r.name for r in run.siblings()]
    unknown = [name for name in choice.against if name not in siblings]
    if unknown:
        hint = f"did you mean {suggest(unknown[0], siblings)}?" if siblings else "the study has no other run"
        raise BadInput(f"--against {unknown[0]!r} is not another run of study {run.study!r}; {hint}")
    if choice.needs_alignment and not siblings:
        raise BadInput(
            f"run {run.name!r} is its study's only run, so nothing can be called shared or unshared; "
            f"{run.suggest_another_run()}, or leave --unshared-only, --shared-only and --with-partners out"
        )


def choose(run: Run, table: pd.DataFrame, eligible: Sequence[int], choice: Choice) -> list[int]:
    """The latents of ``run`` to explain, ascending: those named outright, or those of :func:`draw`."""
    if choice.indices:
        check(run, choice)
        return sorted(set(choice.indices))
    return draw(run, table, eligible, choice).latents


def draw(run: Run, table: pd.DataFrame, eligible: Sequence[int], choice: Choice) -> Draw:
    """A stratified sample of the eligible latents that the choice is among.

    Args:
        table: the run's overlap table (may be empty where the choice does not look at sharing: strata are then of the
            firing frequency alone).
        eligible: latents with contexts enough.
    """
    check(run, choice)
    pool = set(eligible)
    if choice.sharing != "any":
        unshared = unshared_latents(run, table, choice)
        pool = pool & unshared if choice.sharing == "unshared" else pool - unshared
    latents = sorted(pool)
    frequency = read_table(run.stage_path("firing"), ["latent", "firing_frequency"]).set_index("latent")
    similarity = table.set_index("latent")["similarity"].reindex(latents) if "similarity" in table else None
    cells = strata(frequency["firing_frequency"].reindex(latents), similarity)
    about: dict[str, Any] = {"sharing": choice.sharing, "strata": cells.by, "seed": choice.seed}
    if choice.sharing != "any":
        about |= {"definition": choice.definition, "threshold": choice.threshold, "against": list(choice.against)}
    return Draw(drawn(latents, cells, choice.n, choice.seed), about)


def unshared_latents(run: Run, table: pd.DataFrame, choice: Choice) -> set[int]:
    """Alive or not, the latents that are shared with none of the runs that the choice is against."""
    check(run, choice)
    against = choice.against or tuple(r.name for r in run.siblings())
    found = np.zeros(len(table), dtype=bool)
    for name in against:
        found |= shared(_as_seen_with(table, name), choice.definition, choice.threshold)
    return set(table["latent"][~found].tolist())


def partners(table: pd.DataFrame, sibling: str, latents: Sequence[int]) -> list[int]:
    """The decoder-matched partners in ``sibling`` of ``latents``, those without one left out."""
    column = table.set_index("latent")[f"decoder_partner__{sibling}"].reindex(np.asarray(latents))
    return sorted({int(x) for x in column if x >= 0})


def _as_seen_with(table: pd.DataFrame, other: str) -> pd.DataFrame:
    """The columns about one sibling, under the names that an alignment gives them."""
    ending = f"__{other}"
    names = [str(c) for c in table.columns if str(c).endswith(ending)]
    return table[names].rename(columns={name: name.removesuffix(ending) for name in names})
