"""Choose the latents to explain: filters by sharing, a seeded sample, partners in the sibling runs, and control SAEs.

Latents of a study's control SAEs (:mod:`sae.study.controls`) are explained and judged in the same way as the run's
latents; only the part of a run's score above its controls comes from training.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd

from autointerp.contexts.material import Material
from autointerp.contexts.sampling import Draw, draw_sample, make_strata, permanent_number
from autointerp.journal.journal import open_journal
from sae.alignment.overlap import find_shared
from sae.common.errors import BadInput, suggest
from sae.common.files import read_table
from sae.study.controls import find_controls
from sae.study.run import Run

Sharing = Literal["any", "unshared", "shared"]


@dataclass(frozen=True)
class Choice:
    """The latents that the user asked for.

    ``against``: sibling runs that decide what is unshared (all if empty). ``indices``: latents in place of a sample.
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


def check_choice(run: Run, choice: Choice) -> None:
    """Raise UserError if ``choice`` does not fit ``run``; fast, to be called before any work."""
    for latent in choice.indices:
        run.check_latent(latent)
    if choice.indices and choice.sharing != "any":
        raise BadInput(f"--indices names latents, --{choice.sharing}-only chooses them; give one of the two")
    siblings = [r.name for r in run.siblings()]
    unknown = [name for name in choice.against if name not in siblings]
    if unknown:
        hint = f"did you mean {suggest(unknown[0], siblings)}?" if siblings else "the study has no other run"
        raise BadInput(f"--against {unknown[0]!r} is not another run of study {run.study!r}; {hint}")
    if choice.needs_alignment and not siblings:
        raise BadInput(
            f"run {run.name!r} is its study's only run, so nothing can be called shared or unshared; "
            f"{run.suggest_another_run()}, or omit --unshared-only, --shared-only and --with-partners"
        )


def choose_latents(run: Run, table: pd.DataFrame, eligible: Sequence[int], choice: Choice) -> list[int]:
    """Return the latents of ``run`` to explain, ascending: the named ones, or those of :func:`draw_latents`."""
    if choice.indices:
        check_choice(run, choice)
        return sorted(set(choice.indices))
    return draw_latents(run, table, eligible, choice).latents


def draw_latents(run: Run, table: pd.DataFrame, eligible: Sequence[int], choice: Choice) -> Draw:
    """Draw a stratified sample of the eligible latents that pass the filters.

    Args:
        table: the run's overlap table; may be empty if the choice does not filter by sharing (strata are then of the
            firing frequency alone).
        eligible: latents with enough contexts.
    """
    check_choice(run, choice)
    pool = set(eligible)
    if choice.sharing != "any":
        unshared = find_unshared(run, table, choice)
        pool = pool & unshared if choice.sharing == "unshared" else pool - unshared
    latents = sorted(pool)
    frequency = read_table(run.stage_path("firing"), ["latent", "firing_frequency"]).set_index("latent")
    similarity = table.set_index("latent")["similarity"].reindex(latents) if "similarity" in table else None
    cells = make_strata(frequency["firing_frequency"].reindex(latents), similarity)
    about: dict[str, Any] = {"sharing": choice.sharing, "strata": cells.by, "seed": choice.seed}
    if choice.sharing != "any":
        about |= {"definition": choice.definition, "threshold": choice.threshold, "against": list(choice.against)}
    return Draw(draw_sample(latents, cells, choice.n, choice.seed), about)


def find_unshared(run: Run, table: pd.DataFrame, choice: Choice) -> set[int]:
    """Return the latents, dead ones included, that are shared with none of the runs in ``choice.against``."""
    check_choice(run, choice)
    against = choice.against or tuple(r.name for r in run.siblings())
    found = np.zeros(len(table), dtype=bool)
    for name in against:
        found |= find_shared(_select_sibling(table, name), choice.definition, choice.threshold)
    return set(table["latent"][~found].tolist())


def find_partners(table: pd.DataFrame, sibling: str, latents: Sequence[int]) -> list[int]:
    """Return the decoder-matched partners of ``latents`` in ``sibling``, skipping latents without one."""
    column = table.set_index("latent")[f"decoder_partner__{sibling}"].reindex(np.asarray(latents))
    return sorted({int(x) for x in column if x >= 0})


def _select_sibling(table: pd.DataFrame, other: str) -> pd.DataFrame:
    """Return the columns about one sibling, under the names of an alignment."""
    ending = f"__{other}"
    names = [str(c) for c in table.columns if str(c).endswith(ending)]
    return table[names].rename(columns={name: name.removesuffix(ending) for name in names})


# --- control SAEs --------------------------------------------------------------------------------------------

LATENTS = {False: 200, True: 50}
"""Latents explained of each control SAE, by whether a model is asked; never more than of the run itself."""


def list_control_saes(runs: Sequence[Run]) -> list[Run]:
    """Return the control SAEs of the studies of ``runs``, each once and without those among ``runs``."""
    controls = {control.name: control for run in runs for control in find_controls(run).values()}
    return [control for name, control in controls.items() if name not in {run.name for run in runs}]


def choose_sample_size(choice: Choice, asks_model: bool, asked: int | None, n_of_run: int) -> int:
    """Return how many latents of each control SAE to explain.

    Args:
        choice: of the run's latents. Named latents are not a sample, and get no controls unless asked for.
        asks_model: whether the explainer does.
        asked: the user's number, if any.
        n_of_run: latents of the run that are explained.
    """
    if asked is not None:
        return asked
    return 0 if choice.indices else min(LATENTS[asks_model], n_of_run)


def draw_control_latents(control: Run, n: int) -> list[int]:
    """Draw a plain random sample of ``n`` latents of a control SAE that have enough contexts."""
    sampler = Material.of(control).sampler
    latents = shuffle(range(control.settings.training.num_latents))
    return sorted(itertools.islice((x for x in latents if sampler.eligible(x)[0]), n))


def shuffle(latents: Iterable[int]) -> list[int]:
    """Return latents in a fixed random order, independent of which others there are."""
    return sorted(latents, key=lambda latent: permanent_number(0, latent))


def keep_first(explanations: pd.DataFrame, n: int | None) -> pd.DataFrame:
    """Return the explanations of the first ``n`` latents of :func:`shuffle`; all for ``None``."""
    if n is None or explanations.empty:
        return explanations
    return explanations[explanations["latent"].isin(shuffle(set(explanations["latent"].astype(int)))[:n])]


def was_explained(run: Run) -> bool:
    """Return whether the run has explanations; an ``explain`` stopped early leaves a journal without any."""
    if not run.journal_path.exists():
        return False
    with open_journal(run) as journal:
        return not journal.explanations().empty
