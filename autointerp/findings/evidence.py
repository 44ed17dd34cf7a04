"""What the stages left on disk for a report, read once: tables, alignments, one run's journal.

Every later room of the analysis asks this one, so that what is missing, which runs are compared and which set-up
of scores is meant are decided in a single place.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from autointerp.contexts.sample_record import Sample, sample_of
from autointerp.journal.journal import Journal
from autointerp.journal.method import BASELINE
from autointerp.scoring.setups import TOO_FEW, rows_of, setups_of, wanted_of
from sae.alignment.alignment import both_ways
from sae.alignment.latent_table import latent_table, shared_class
from sae.alignment.overlap import DEFINITIONS, DIPS, StudyOverlap, overlap
from sae.alignment.pairs import pair_path
from sae.common.commands import command
from sae.common.errors import BadInput, NotFound, suggest
from sae.common.files import read_table, table_metadata
from sae.study.align import is_aligned, is_compared, read_behaviour_facts, read_behaviours
from sae.study.harvest import is_harvested
from sae.study.run import MAIN_SCORER, Run, all_runs

_UNALIGNED = "These SAEs have not been aligned yet."


@dataclass(frozen=True)
class View:
    """How the findings are looked at.

    ``focus`` is the run whose latents are counted and explained (the first where ``None``); ``against`` names the
    runs that decide what is unshared (all others where empty); the last three choose among set-ups of scores.
    """

    focus: str | None = None
    definition: str = "strict"
    threshold: float = 0.7
    against: tuple[str, ...] = ()
    scorer: str | None = MAIN_SCORER
    explainer: str | None = None
    judge: str | None = None


@dataclass(frozen=True)
class Told:
    """What the focus run's journal holds of the chosen set-up."""

    table: pd.DataFrame
    texts: dict[int, str]  # by the explanation's number
    explained: set[int]
    too_few: set[int]
    failed: dict[int, str]
    cost: list[dict[str, Any]]
    rounds: dict[str, Any] | None = None  # of scores to a precision: as of `Precision.identity`

    def explanations(self, own: pd.DataFrame) -> dict[int, str]:
        """Latent → the explanation that was scored, or else the newest of the explainer meant.

        Args:
            own: scores by latent, with ``explanation_id`` where there are any.
        """
        newest: dict[int, str] = {}
        if len(self.table):
            good = self.table[self.table["status"] == "ok"]
            newest = {int(i): str(text) for i, text in zip(good["latent"], good["text"], strict=True)}
        numbers = own["explanation_id"].items() if "explanation_id" in own else ()
        scored = {int(str(latent)): self.texts[int(n)] for latent, n in numbers if int(n) in self.texts}
        return {**newest, **scored}


@dataclass(frozen=True)
class Study:
    root: Path
    runs: list[Run]
    focus: Run
    view: View
    firing: dict[str, pd.DataFrame]
    alive: dict[str, np.ndarray]
    tables: dict[tuple[str, str], pd.DataFrame]
    behaviour: dict[tuple[str, str], pd.DataFrame]
    behaviour_facts: dict[tuple[str, str], dict[str, Any]]
    compared: list[str]  # the runs that are aligned with each other, the focus among them
    shared: StudyOverlap | None
    scores: pd.DataFrame | None
    setup: dict[str, Any] | None
    other_setups: list[dict[str, Any]]

    @classmethod
    def open(cls, root: Path, names: Sequence[str], view: View) -> Study:
        if not names:
            raise NotFound(f"no run was named; there is nothing to report under {str(root)!r}")
        runs = [Run.open(name, root) for name in names]
        for wanted in (*([view.focus] if view.focus else []), *view.against):
            if wanted not in names:
                raise NotFound(
                    f"run {wanted!r} is not among the runs reported on; did you mean {suggest(wanted, names)}?"
                )
        if view.definition not in DEFINITIONS:
            raise BadInput(
                f"--definition {view.definition!r} is not known; use {suggest(view.definition, DEFINITIONS, 4)}"
            )
        focus = next(run for run in runs if run.name == (view.focus or names[0]))
        firing = {run.name: read_table(path) for run in runs if (path := run.stage_path("firing")).exists()}
        compared = _compared(root / "alignments", focus.name, names)
        tables = both_ways(root / "alignments", compared) if len(compared) > 1 else {}
        alive = {run.name: _alive(run, firing) for run in runs}
        scores = read_table(path) if (path := focus.stage_path("scores")).exists() else None
        known = [] if scores is None else setups_of(scores, scorer=view.scorer)
        chosen = wanted_of(known, focus.name, explainer=view.explainer, judge=view.judge)
        return cls(
            root=root,
            runs=runs,
            focus=focus,
            view=view,
            firing=firing,
            alive=alive,
            tables=tables,
            behaviour=read_behaviours(root, compared),
            behaviour_facts=read_behaviour_facts(root, compared),
            compared=compared,
            shared=overlap(
                compared,
                tables,
                {name: alive[name] for name in compared},
                view.threshold,
                kept=root / "alignments" / DIPS,
            )
            if tables
            else None,
            scores=scores,
            setup=chosen[0] if chosen else None,
            other_setups=[setup for setup in known if setup not in chosen[:1]],
        )

    @property
    def names(self) -> list[str]:
        return [run.name for run in self.runs]

    def describe(self, run: Run) -> dict[str, Any]:
        stages = {
            "trained": run.is_trained,
            "harvested": run.name in self.firing,
            "aligned": any(run.name in pair for pair in self.tables),
            "explained": run.journal_path.exists(),
            "scored": run.stage_path("scores").exists(),
        }
        return {
            "name": run.name,
            "seed": run.seed,
            "num_latents": len(self.alive[run.name]),
            "architecture": run.settings.training.architecture,
            "k": run.k,
            "stages": [stage for stage, done in stages.items() if done],
        }

    def focus_latents(self) -> pd.DataFrame:
        """:meth:`latents_of` the focus run."""
        return self.latents_of(self.focus)

    def latents_of(self, run: Run) -> pd.DataFrame:
        """A run's latents by number: firing, sharing under the view's definition, eligibility. A copy."""
        if run.name not in self._latents:
            self._latents[run.name] = self._gathered(run)
        return self._latents[run.name].copy()

    @functools.cached_property
    def _latents(self) -> dict[str, pd.DataFrame]:
        return {}

    def _gathered(self, run: Run) -> pd.DataFrame:
        name, view = run.name, self.view
        latents = pd.DataFrame({"alive": self.alive[name]}, index=pd.RangeIndex(len(self.alive[name]), name="latent"))
        if name in self.firing:
            latents = latents.join(self.firing[name].set_index("latent"))
        path = run.stage_path("contexts")
        if path.exists():
            latents = latents.join(read_table(path).set_index("latent")[["eligible", "ineligible_reason"]])
        if self.tables and name in self.compared:
            others = [n for n in view.against if n != name] or [n for n in self.compared if n != name]
            table = latent_table(name, [name, *others], self.tables, self.alive[name], view.threshold).set_index(
                "latent"
            )
            n = table[f"n_shared_{view.definition}"]
            latents["n_shared"] = n
            latents["similarity"] = table["similarity"]
            latents["unshared"] = latents["alive"] & (n == 0)
            latents["shared_class"] = shared_class(n, len(others))
        return latents

    def score_rows(self) -> pd.DataFrame | None:
        return None if self.scores is None or self.setup is None else rows_of(self.scores, self.setup)

    def sample(self) -> Sample | None:
        """What was drawn of the focus run's latents for the chosen set-up; ``None`` where nothing is on record."""
        return self._sample

    @functools.cached_property
    def _sample(self) -> Sample | None:
        return None if self.setup is None else self.sample_of(self.setup)

    def sample_of(self, setup: Mapping[str, Any]) -> Sample | None:
        """The same for any set-up of the focus run's scores."""
        return sample_of(self.focus, setup)

    def journal(self) -> Told:
        """The explanations of the chosen set-up; where nothing is scored yet, the newest (a language model's before the
        baseline's, which is made beside them)."""
        if not self.focus.journal_path.exists():
            return Told(pd.DataFrame(), {}, set(), set(), {}, [])
        with Journal(self.focus.journal_path) as journal:
            table, cost, setups = journal.explanations(), journal.usage(), journal.setups()
        texts = {int(i): text for i, text in zip(table["id"], table["text"], strict=True) if isinstance(text, str)}
        table = table[self._by_explainer(table)]
        good = set(table.loc[table["status"] == "ok", "latent"].astype(int))
        lost = table[(table["status"] == "failed") & ~table["latent"].isin(good)]
        failed = {int(latent): str(why) for latent, why in zip(lost["latent"], lost["failure"], strict=True)}
        too_few = {latent for latent, why in failed.items() if TOO_FEW in why}
        return Told(
            table=table,
            texts=texts,
            explained=good,
            too_few=too_few,
            failed={latent: why for latent, why in failed.items() if latent not in too_few},
            cost=[{str(k): v for k, v in row.items()} for row in cost.to_dict("records")],
            rounds=setups.get((self.setup or {}).get("settings_hash", ""), {}).get("adaptive"),
        )

    def _by_explainer(self, table: pd.DataFrame) -> pd.Series:
        """Which rows of the explanation table are by the explainer, model, prompt and settings that are meant."""
        identity = dict.fromkeys(("explainer", "model", "settings_hash", "prompt_hash"))
        if self.setup:
            setup = self.setup
            keys = ("explainer", "explainer_model", "explain_settings_hash", "explain_prompt_hash")
            identity = {mine: setup.get(theirs) for mine, theirs in zip(identity, keys, strict=True)}
        else:
            of = table if self.view.explainer is None else table[table["explainer"] == self.view.explainer]
            identity["explainer"] = self.view.explainer
            of = of if (of["explainer"] == BASELINE).all() else of[of["explainer"] != BASELINE]
            if len(of):
                identity = {column: of[column].iloc[-1] for column in identity}
        mask = pd.Series(True, index=table.index)
        for column, value in identity.items():
            if value is not None:
                mask &= table[column] == value
        return mask

    def forced(self) -> list[list[str]]:
        """Pairs of a run looked at and one of another study, which were aligned by ``align --force``."""
        ours = {run.name for run in all_runs(self.root) if run.study == self.focus.study}
        pairs = [path.stem.split("--") for path in sorted((self.root / "alignments").glob("*--*.parquet"))]
        return [
            sorted(pair, key=lambda name: name not in ours)
            for pair in pairs
            if len(pair) == 2 and len(ours & set(pair)) == 1 and set(pair) & set(self.names)
        ]

    # --- what to run next ---------------------------------------------------------------------------------

    def command(self, *words: str) -> str:
        return command(self.root, *words)

    def missing(self, explained: set[int], has_scores: bool) -> list[dict[str, str]]:
        """The stages that have not been run, in order, each with the command that runs it."""
        found = []

        def add(stage: str, says: str, *words: str) -> None:
            found.append({"stage": stage, "says": says, "command": self.command(*words)})

        focus, seeds = self.focus.name, [run.seed for run in self.runs if run.seed is not None]
        trained = [run.name for run in self.runs if run.is_trained]
        untrained = [run.name for run in self.runs if not run.is_trained]
        halves = [run for run in self.runs if not run.is_trained and run.imported]
        if len(untrained) > len(halves):
            names = ", ".join(name for name in untrained if name not in [run.name for run in halves])
            says = f"Not trained to the end: {names}. With the same options as before, this goes on:"
            add("train", says, *self._train(seeds))
        for run in halves:
            add("train", f"Not imported to the end: {run.name}. This goes on:", *self._import(run))
        unharvested = [name for name in self.names if name not in self.firing]
        if unharvested:
            chosen = [word for name in unharvested for word in ("--sae", name)]
            add("harvest", f"Not harvested yet: {', '.join(unharvested)}.", "harvest", *chosen)
        if len(self.runs) == 1:
            alone = "One SAE alone has nothing to be compared with."
            if seeds:
                says = f"{alone} With the same options, this trains another seed:"
                add("overlap", says, *self._train([*seeds, max(seeds) + 1]))
            else:
                says = f"{alone} This imports another into the study:"
                add("overlap", says, "import", "--from", "DIR", "--name", "NAME", "--study", self.focus.study)
        elif len(trained) > 1 and (apart := [name for name in trained if name not in self.compared]):
            says = f"Not aligned with the others yet: {', '.join(apart)}." if self.tables else _UNALIGNED
            add("overlap", says, "align", *trained)
        if not explained and not has_scores:
            add("explain", f"No latent of {focus} has been explained yet.", "explain", "--sae", focus)
        if not has_scores:
            add("score", f"No explanation of {focus} has been scored yet.", "score", "--sae", focus)
        return found

    def stale(self) -> list[dict[str, str]]:
        """Stages whose tables were made from something that has changed since, each with the command that mends it."""
        found = []

        def add(stage: str, says: str, *words: str) -> None:
            found.append({"stage": stage, "says": says, "command": self.command(*words)})

        for run in self.runs:
            stored = run.is_trained and (run.firings_folder / "store.json").is_file()
            if run.name in self.firing and stored and not is_harvested(run):
                says = f"The firing table of {run.name} is not of its present weights and harvest."
                add("harvest", says, "harvest", "--sae", run.name)
        changed = [
            (a, b)
            for i, a in enumerate(self.runs)
            for b in self.runs[i + 1 :]
            if a.name in self.compared
            and b.name in self.compared
            and a.is_trained
            and b.is_trained
            and not is_aligned(a, b)
        ]
        if changed:
            add("align", "Weights have changed since the SAEs were aligned.", "align", *self.compared)
        by_name = {run.name: run for run in self.runs}
        fired = [(by_name[a], by_name[b]) for a, b in self.behaviour if _can_be_checked(by_name[a], by_name[b])]
        if not changed and not all(is_compared(a, b) for a, b in fired):
            says = "Weights or harvests have changed since the SAEs' firings were compared."
            add("align", says, "align", *self.compared)
        if self.scores is not None and (self.focus.firings_folder / "store.json").is_file():
            from autointerp.contexts.material import Material

            made_from = table_metadata(self.focus.stage_path("scores")).get("material")
            if made_from is not None and made_from != Material.of(self.focus).digest:
                says = f"These scores are from before {self.focus.name} was harvested again."
                add("score", says, "score", "--sae", self.focus.name)
        return found

    def _train(self, seeds: Sequence[int]) -> list[str]:
        return ["train", "--name", self.focus.study, "--seeds", *map(str, seeds)]

    def _import(self, run: Run) -> list[str]:
        source = str((run.imported or {})["from"])
        return ["import", "--from", source, "--name", run.name, "--study", run.study]


def _compared(folder: Path, focus: str, names: Sequence[str]) -> list[str]:
    """The focus and, in order, every run that is aligned with all before it."""
    found = [focus]
    for name in names:
        if name != focus and all(pair_path(folder, name, other) is not None for other in found):
            found.append(name)
    return [name for name in names if name in found]


def _can_be_checked(*runs: Run) -> bool:
    """Whether weights and stores are still there: a report does without, on another machine than the study's."""
    return all(run.is_trained and (run.firings_folder / "store.json").is_file() for run in runs)


def _alive(run: Run, firing: Mapping[str, pd.DataFrame]) -> np.ndarray:
    """Whether each latent fired; where nothing was harvested, every latent is taken to be alive."""
    if run.name in firing:
        return ~firing[run.name].sort_values("latent")["dead"].to_numpy(bool)
    return np.ones(run.settings.training.num_latents, bool)


MODEL = ("--llm-url", "URL")
"""Stands in a command for where the language model is: without it the n-gram baseline would be asked."""


def asking(study: Study, told: Told, stage: Literal["explain", "score"], *words: str) -> str:
    """The command of a stage for the focus run; with a place for the model's address where one was asked before.

    To explain, that is the explainer of ``told``; to score, the judge of the study's set-up or, where nothing is scored
    yet, the explainer again.
    """
    explained_by = str(told.table["model"].iloc[-1] or "") if len(told.table) else ""
    judged_by = explained_by if study.setup is None else str(study.setup.get("model") or "")
    asks_model = explained_by if stage == "explain" else judged_by
    return study.command(stage, "--sae", study.focus.name, *words, *(MODEL if asks_model else ()))
