"""Choose the questions of `score`: which explanations of which runs, and which controls.

Controls cost as much as the scores, so with a language model only a sample of the latents has them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd

from autointerp.contexts.material import Material
from autointerp.contexts.sampler import Context
from autointerp.contexts.selection import keep_first, list_control_saes, was_explained
from autointerp.journal.journal import Journal, PlannedContext, SetUp
from autointerp.journal.method import BASELINE
from autointerp.scoring.adaptive import StoppingRule, find_stop, lay_out
from autointerp.scoring.judges.base import Judge
from autointerp.scoring.scorers.base import Scorer
from autointerp.scoring.setups import records_of
from autointerp.scoring.swapping import swap_partners
from sae.common.commands import command
from sae.common.errors import BadInput
from sae.common.files import digest
from sae.common.progress import say
from sae.study.run import Run, all_runs, split_readable

C = TypeVar("C", Context, PlannedContext)

CONTROL_LATENTS = {False: None, True: 50}
"""Latents that have a swapped control, by whether the judge asks a model; ``None``: all."""


@dataclass(frozen=True)
class Part:
    """One run's part of a `score`."""

    run: Run
    n_swapped: int | None = None
    """Latents also judged by another's explanation; ``None``: all."""
    at_most: int | None = None
    """Latents to score; ``None``: all that are explained."""
    is_control: bool = False
    """Whether it is a control SAE, scored with a run of its study."""
    draw: int = 0
    """Of the explanations of each latent, the one to score."""
    latents: frozenset[int] | None = None
    """Those whose scores are wanted; ``None``: all that are explained. Others lend their explanations to controls."""

    def explanations(self, journal: Journal) -> pd.DataFrame:
        """The explanations to score, from any explainer."""
        return keep_first(journal.explanations(status="ok", draw=self.draw), self.at_most)

    def readable(self, journal: Journal, judge: Judge) -> pd.DataFrame:
        """The explanations that the judge can read.

        The n-gram judge parses only its own explainer's sentences. Another judge scores those only if no other
        explainer was ever asked: otherwise they are the baseline, which has its own judge.
        """
        explanations = self.explanations(journal)
        if judge.reads is not None:
            return explanations[explanations["explainer"] == judge.reads]
        if not has_more_than_baseline(journal):
            return explanations
        return explanations[explanations["explainer"] != BASELINE]

    def wanted(self, readable: pd.DataFrame) -> pd.DataFrame:
        """The ``readable`` explanations to score."""
        return readable if self.latents is None else readable[readable["latent"].isin(self.latents)]


def parts_of(named: Sequence[Run] | None, root: Path, control_sae_latents: int | None) -> list[Part]:
    """Return the runs that the user named, or all under ``root``, and their control SAEs."""
    if named is None:
        readable, damaged = split_readable(all_runs(root))
        for line in damaged.values():
            say(f"score: {line}")
        found = [run for run in readable if was_explained(run)]
    else:
        found = list(named)
    if not found:
        explain = command(root, "explain")
        raise BadInput(f"no run under {str(root)!r} has explanations to score; make some with `{explain}`")
    own = found if named is not None else [run for run in found if not run.is_control]
    controls = [run for run in list_control_saes(own) if was_explained(run)]
    names = {run.name for run in controls}
    parts = [Part(run) for run in found if run.name not in names]
    if control_sae_latents != 0:
        parts += [Part(run, 0, control_sae_latents, is_control=True) for run in controls]
    return parts


def passes_of(
    parts: Sequence[Part], judge: Judge, control_latents: int | None, draws: int, replicates: int
) -> Iterator[tuple[int, list[Part]]]:
    """Yield what ``judge`` scores, in order: the number of the replicate, and ``parts`` for one draw.

    ``control_latents`` have a swapped control (``None``: the judge's usual number); latents of control SAEs have none.
    """
    n_swapped = CONTROL_LATENTS[judge.asks_model] if control_latents is None else control_latents
    for replicate in range(replicates if hasattr(judge, "repeated") else 1):
        for draw in range(draws):
            yield (
                replicate,
                [replace(part, draw=draw, n_swapped=0 if part.is_control else n_swapped) for part in parts],
            )


@dataclass(frozen=True)
class Question:
    """One latent's contexts under one explanation: its own, or another latent's as a control."""

    latent: int
    explanation_id: int
    text: str
    seen: frozenset[int]
    """Windows that the explainer saw: never judged."""
    control: str = "none"

    @property
    def key(self) -> tuple[int, int, str]:
        """Identify the question's verdicts among others of the same set-up."""
        return self.explanation_id, self.latent, self.control


class TestSets:
    """The test contexts of one scorer for a run's latents.

    Without a stopping rule a latent's test set is a single round.
    """

    __test__ = False  # for pytest: no test

    def __init__(self, run: Run, scorer: Scorer, rule: StoppingRule | None = None) -> None:
        contexts = run.settings.contexts
        self.scorer = scorer
        self.material = Material.of(run, rule.cap(contexts) if rule else None)
        self.adaptive = rule.identity(contexts) if rule else None
        self._drawn: dict[int, list[list[Context]]] = {}

    def draw(self, latent: int) -> list[list[Context]]:
        """Return a latent's contexts, round by round; each latent is drawn once. No contexts: there are too few."""
        if latent not in self._drawn:
            test_set = self.scorer.test_set(self.material.sampler, latent)
            items = self.scorer.items
            rounds = [items(test_set)] if self.adaptive is None else lay_out(test_set, items)
            self._drawn[latent] = rounds
        return self._drawn[latent]

    def set_up(self, judge: Judge) -> SetUp:
        """Return the columns that all verdicts of ``judge`` on these contexts have in common."""
        decides = {"judge": judge.settings_hash, "material": self.material.digest}
        settings_hash = digest({**decides, "adaptive": self.adaptive} if self.adaptive else decides)
        return SetUp(judge.name, self.scorer.name, settings_hash, judge.prompt_hash, judge.model)

    def next_round(
        self, rounds: Sequence[Sequence[C]], labels: Mapping[int, bool | None], skipped: Set[int]
    ) -> list[C]:
        """Return the contexts to ask next: the first round's without a label. Empty when judging is complete.

        Args:
            labels: window → the judge's label, ``None`` if the judge failed.
            skipped: windows that are not asked (again); they count as failed.
        """
        for number, contexts in enumerate(rounds):
            todo = [c for c in contexts if labels.get(c.window) is None and c.window not in skipped]
            if todo:
                return todo
            if self.adaptive is not None:
                stop = find_stop(rounds, {**dict.fromkeys(skipped), **labels}, self.adaptive)
                if stop is not None and stop.look <= number:
                    break
        return []


def has_more_than_baseline(journal: Journal) -> bool:
    """Return whether an explainer other than the n-gram baseline was asked about any latent, even if it failed."""
    return bool((journal.explanations()["explainer"] != BASELINE).any())


def questions_of(part: Part, readable: pd.DataFrame) -> tuple[list[Question], int]:
    """Return the questions for each wanted readable explanation (:meth:`Part.readable`), and its controls.

    The explanation used for a control does not depend on ``wanted``, so scoring more latents later keeps the controls.
    The number is of the wanted latents that can have no control, because no dissimilar latent has another text.
    """
    own = [_question(row) for row in records_of(part.wanted(readable))]
    controls, n_lacking = _controls(part.run, readable, part.n_swapped, part.latents)
    return [*own, *controls], n_lacking


def _controls(
    run: Run, explanations: pd.DataFrame, n: int | None, wanted: Set[int] | None
) -> tuple[list[Question], int]:
    """Pair up to ``n`` latents of each set-up with the explanation of a dissimilar latent; count those without one."""
    controls: list[Question] = []
    n_lacking = 0
    if n == 0 or explanations.empty:
        return controls, n_lacking
    decoder = run.read_decoder()
    for _, group in explanations.groupby(["explainer", "settings_hash", "prompt_hash", "model", "draw"]):
        own = {question.latent: question for question in map(_question, records_of(group))}
        texts = {latent: question.text for latent, question in own.items()}
        seed = run.settings.contexts.sample_seed
        partners = swap_partners(sorted(own), decoder, run.store(), texts=texts, seed=seed)
        asked = own.keys() if wanted is None else own.keys() & wanted
        n_lacking += len(asked - partners.keys())
        for latent in _first_by_hash(sorted(asked & partners.keys()), n):
            other = own[partners[latent]]
            controls.append(replace(own[latent], explanation_id=other.explanation_id, text=other.text, control="swap"))
    return controls, n_lacking


def _question(explanation: Mapping[str, Any]) -> Question:
    """Turn a row of the journal's explanations into a question."""
    return Question(
        int(explanation["latent"]), int(explanation["id"]), explanation["text"], frozenset(explanation["contexts"])
    )


def _first_by_hash(latents: Sequence[int], n: int | None) -> list[int]:
    ranked = sorted(latents, key=lambda latent: digest(["control", latent]))
    return sorted(ranked if n is None else ranked[:n])
