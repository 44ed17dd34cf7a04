"""Read the files of a report once, and decide what is missing, which runs are compared, and which scores count."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from autointerp.contexts.sampling import EXPLAINED_BY, Sample, load_sample
from autointerp.explaining.copies import find_flags
from autointerp.findings.shape import ReportedRun, Step
from autointerp.journal.journal import open_journal
from autointerp.journal.method import BASELINE
from autointerp.scoring.setups import TOO_FEW, rows_of, setups_of, wanted_of
from sae.alignment.alignment import pair_path, read_both_ways
from sae.alignment.overlap import DEFINITIONS, DIPS, StudyOverlap, build_latent_table, classify_sharing, measure_overlap
from sae.common.commands import command
from sae.common.errors import BadInput, NotFound, suggest
from sae.common.files import read_table, table_metadata
from sae.study.align import is_aligned, is_compared, read_behaviours
from sae.study.harvest import is_harvested
from sae.study.run import MAIN_SCORER, Run, study_runs

MODEL = ("--llm-url", "URL")
"""Placeholder for the language model's address; without it a command would use the n-gram baseline."""


@dataclass(frozen=True)
class View:
    """The choices of a report.

    ``focus`` is the run whose latents are counted and explained (default: the first); ``against`` names the runs that
    decide which latents are unshared (default: all others); the rest chooses among set-ups of scores. ``judge`` is the
    name of a judge or of its model.
    """

    focus: str | None = None
    definition: str = "strict"
    threshold: float = 0.7
    against: tuple[str, ...] = ()
    scorer: str | None = MAIN_SCORER
    explainer: str | None = None
    judge: str | None = None
    draw: int = 0
    replicate: int = 0

    @property
    def setup(self) -> dict[str, Any]:
        """The columns of a set-up that are chosen."""
        return {"scorer": self.scorer, "draw": self.draw, "replicate": self.replicate}


@dataclass(frozen=True)
class JournalFacts:
    """The explanations of the chosen set-up in the focus run's journal."""

    table: pd.DataFrame
    texts: dict[int, str]  # by the explanation's number
    explained: set[int]
    too_few: set[int]
    failed: dict[int, str]
    cost: list[dict[str, Any]]
    rounds: dict[str, Any] | None = None  # of adaptive judging: `Precision.identity`
    first: dict[str, str] = field(default_factory=dict)  # settings hash of a repeat → that of draw or replicate 0

    @functools.cached_property
    def flags(self) -> dict[int, list[str]]:
        """Why explanations are suspicious, by their numbers."""
        return find_flags(self.table) if len(self.table) else {}

    def explanations(self, own: pd.DataFrame) -> dict[int, str]:
        """Map each latent to the explanation of its score in ``own`` (by latent), or else to the newest."""
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
    compared: list[str]  # the runs that are aligned with each other, the focus run among them
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
        tables = read_both_ways(root / "alignments", compared) if len(compared) > 1 else {}
        alive = {run.name: _alive(run, firing) for run in runs}
        behaviour, facts = read_behaviours(root, compared)
        dips = root / "alignments" / DIPS
        scores = read_table(path) if (path := focus.stage_path("scores")).exists() else None
        known = [] if scores is None else setups_of(scores, **view.setup)
        if scores is not None and not known and (view.draw or view.replicate):
            raise NotFound(_explain_missing_repeat(scores, focus.name, view))
        chosen = wanted_of(known, focus.name, explainer=view.explainer, judge=view.judge)
        return cls(
            root=root,
            runs=runs,
            focus=focus,
            view=view,
            firing=firing,
            alive=alive,
            tables=tables,
            behaviour=behaviour,
            behaviour_facts=facts,
            compared=compared,
            shared=measure_overlap(compared, tables, {x: alive[x] for x in compared}, view.threshold, kept=dips)
            if tables
            else None,
            scores=scores,
            setup=chosen[0] if chosen else None,
            other_setups=[setup for setup in known if setup not in chosen[:1]],
        )

    @property
    def names(self) -> list[str]:
        return [run.name for run in self.runs]

    def describe(self, run: Run) -> ReportedRun:
        stages = {
            "trained": run.is_trained,
            "harvested": run.name in self.firing,
            "aligned": any(run.name in pair for pair in self.tables),
            "explained": run.journal_path.exists(),
            "scored": run.stage_path("scores").exists(),
        }
        done = [stage for stage, is_done in stages.items() if is_done]
        architecture = run.settings.training.architecture
        return ReportedRun(run.name, run.seed, len(self.alive[run.name]), architecture, run.k, done)

    def focus_latents(self) -> pd.DataFrame:
        return self.latents_of(self.focus)

    def latents_of(self, run: Run) -> pd.DataFrame:
        """Return a copy of a run's latents by number: firing, sharing under the view's definition, eligibility."""
        if run.name not in self._latents:
            self._latents[run.name] = self._gather_latents(run)
        return self._latents[run.name].copy()

    @functools.cached_property
    def _latents(self) -> dict[str, pd.DataFrame]:
        return {}

    def _gather_latents(self, run: Run) -> pd.DataFrame:
        name, view = run.name, self.view
        latents = pd.DataFrame({"alive": self.alive[name]}, index=pd.RangeIndex(len(self.alive[name]), name="latent"))
        if name in self.firing:
            latents = latents.join(self.firing[name].set_index("latent"))
        if (path := run.stage_path("contexts")).exists():
            latents = latents.join(read_table(path).set_index("latent")[["eligible", "ineligible_reason"]])
        if self.tables and name in self.compared:
            others = [n for n in view.against if n != name] or [n for n in self.compared if n != name]
            table = build_latent_table(name, [name, *others], self.tables, self.alive[name], view.threshold)
            table = table.set_index("latent")
            n = table[f"n_shared_{view.definition}"]
            latents["n_shared"] = n
            latents["similarity"] = table["similarity"]
            latents["unshared"] = latents["alive"] & (n == 0)
            latents["shared_class"] = classify_sharing(n, len(others))
        return latents

    def score_rows(self) -> pd.DataFrame | None:
        return None if self.scores is None or self.setup is None else rows_of(self.scores, self.setup)

    @functools.cached_property
    def sample(self) -> Sample | None:
        """The recorded sample of the focus run's latents for the chosen set-up, if there is one."""
        return None if self.setup is None else load_sample(self.focus, self.setup)

    def journal(self) -> JournalFacts:
        """Read the explanations of the chosen set-up; without scores the newest, a language model's first."""
        if not self.focus.journal_path.exists():
            return JournalFacts(pd.DataFrame(), {}, set(), set(), {}, [])
        with open_journal(self.focus) as journal:
            table, cost, setups = journal.explanations(), journal.usage(), journal.setups()
        texts = {int(i): text for i, text in zip(table["id"], table["text"], strict=True) if isinstance(text, str)}
        table = table[table["draw"] == self.view.draw]
        for column, value in self._identity(table).items():
            if value is not None:
                table = table[table[column] == value]
        good = set(table.loc[table["status"] == "ok", "latent"].astype(int))
        lost = table[(table["status"] == "failed") & ~table["latent"].isin(good)]
        failed = {int(latent): str(why) for latent, why in zip(lost["latent"], lost["failure"], strict=True)}
        too_few = {latent for latent, why in failed.items() if TOO_FEW in why}
        return JournalFacts(
            table=table,
            texts=texts,
            explained=good,
            too_few=too_few,
            failed={latent: why for latent, why in failed.items() if latent not in too_few},
            cost=[{str(k): v for k, v in row.items()} for row in cost.to_dict("records")],
            rounds=setups.get((self.setup or {}).get("settings_hash", ""), {}).get("adaptive"),
            first={key: str(settings["first"]) for key, settings in setups.items() if "first" in settings},
        )

    def _identity(self, table: pd.DataFrame) -> dict[str, Any]:
        """Return the explainer, model, settings and prompt of the explanations meant; ``None`` stands for any."""
        if self.setup:
            return {column: self.setup.get(key) for column, key in EXPLAINED_BY.items()}
        of = table if self.view.explainer is None else table[table["explainer"] == self.view.explainer]
        of = of if (of["explainer"] == BASELINE).all() else of[of["explainer"] != BASELINE]
        return (
            {column: of[column].iloc[-1] for column in EXPLAINED_BY} if len(of) else {"explainer": self.view.explainer}
        )

    def forced(self) -> list[list[str]]:
        """Return the pairs of a reported run and a run of another study, aligned by ``align --force``."""
        ours = {run.name for run in study_runs(self.focus.study, self.root)}
        pairs = [path.stem.split("--") for path in sorted((self.root / "alignments").glob("*--*.parquet"))]
        return [
            sorted(pair, key=lambda name: name not in ours)
            for pair in pairs
            if len(pair) == 2 and len(ours & set(pair)) == 1 and set(pair) & set(self.names)
        ]

    # --- the next commands ------------------------------------------------------------------------------------

    def command(self, *words: str) -> str:
        return command(self.root, *words)

    def _step(self, stage: str, says: str, *words: str) -> Step:
        return Step(stage, says, self.command(*words))

    def missing(self, explained: set[int], has_scores: bool) -> Iterator[Step]:
        """Yield the stages that have not been run, in order."""
        focus, seeds = self.focus.name, [run.seed for run in self.runs if run.seed is not None]
        train = ["train", "--name", self.focus.study, "--seeds"]
        trained = [run.name for run in self.runs if run.is_trained]
        untrained = [run.name for run in self.runs if not run.is_trained and not run.imported]
        if untrained:
            says = f"Not trained to the end: {', '.join(untrained)}. To resume, give the options as before to:"
            yield self._step("train", says, *train, *map(str, seeds))
        for run in self.runs:
            if run.imported and not run.is_trained:
                words = ["import", "--from", str(run.imported["from"]), "--name", run.name, "--study", run.study]
                yield self._step("train", f"Not imported to the end: {run.name}. To resume:", *words)
        unharvested = [name for name in self.names if name not in self.firing]
        if unharvested:
            chosen = [word for name in unharvested for word in ("--sae", name)]
            yield self._step("harvest", f"Not harvested yet: {', '.join(unharvested)}.", "harvest", *chosen)
        alone = "One SAE alone has nothing to be compared with."
        if len(self.runs) == 1 and seeds:
            says = f"{alone} With the same options, this trains another seed:"
            yield self._step("overlap", says, *train, *map(str, [*seeds, max(seeds) + 1]))
        elif len(self.runs) == 1:
            words = ["import", "--from", "DIR", "--name", "NAME", "--study", self.focus.study]
            yield self._step("overlap", f"{alone} This imports another into the study:", *words)
        elif len(trained) > 1 and (apart := [name for name in trained if name not in self.compared]):
            says = f"Not aligned with the others yet: {', '.join(apart)}."
            says = says if self.tables else "These SAEs have not been aligned yet."
            yield self._step("overlap", says, "align", *trained)
        if not explained and not has_scores:
            yield self._step("explain", f"No latent of {focus} has been explained yet.", "explain", "--sae", focus)
        if not has_scores:
            yield self._step("score", f"No explanation of {focus} has been scored yet.", "score", "--sae", focus)

    def stale(self) -> Iterator[Step]:
        """Yield the stages whose inputs have changed since they ran."""
        for run in self.runs:
            if run.name in self.firing and _can_be_checked(run) and not is_harvested(run):
                says = f"The firing table of {run.name} is not of its present weights and harvest."
                yield self._step("harvest", says, "harvest", "--sae", run.name)
        trained = [run for run in self.runs if run.name in self.compared and run.is_trained]
        changed = any(not is_aligned(a, b) for i, a in enumerate(trained) for b in trained[i + 1 :])
        if changed:
            yield self._step("align", "Weights have changed since the SAEs were aligned.", "align", *self.compared)
        by_name = {run.name: run for run in self.runs}
        fired = [(by_name[a], by_name[b]) for a, b in self.behaviour if _can_be_checked(by_name[a], by_name[b])]
        if not changed and not all(is_compared(a, b) for a, b in fired):
            says = "Weights or harvests have changed since the SAEs' firings were compared."
            yield self._step("align", says, "align", *self.compared)
        if self.scores is not None and (self.focus.firings_folder / "store.json").is_file():
            from autointerp.contexts.material import Material

            made_from = table_metadata(self.focus.stage_path("scores")).get("material")
            if made_from is not None and made_from != Material.of(self.focus).digest:
                says = f"These scores are from before {self.focus.name} was harvested again."
                yield self._step("score", says, "score", "--sae", self.focus.name)


def _explain_missing_repeat(scores: pd.DataFrame, run: str, view: View) -> str:
    there = {(s["draw"], s["replicate"]) for s in setups_of(scores, scorer=view.scorer, draw=None, replicate=None)}
    listed = ", ".join(f"draw {draw} replicate {replicate}" for draw, replicate in sorted(there))
    return (
        f"run {run!r} has no scores of draw {view.draw} replicate {view.replicate}; there are {listed or 'none'}; "
        "`explain --draws` and `score --draws --replicates` make more"
    )


def _compared(folder: Path, focus: str, names: Sequence[str]) -> list[str]:
    """Return the focus run and, in order, every run that is aligned with all before it."""
    found = [focus]
    for name in names:
        if name != focus and all(pair_path(folder, name, other) is not None for other in found):
            found.append(name)
    return [name for name in names if name in found]


def _can_be_checked(*runs: Run) -> bool:
    """Whether weights and stores are available; a report on another machine works without them."""
    return all(run.is_trained and (run.firings_folder / "store.json").is_file() for run in runs)


def _alive(run: Run, firing: Mapping[str, pd.DataFrame]) -> np.ndarray:
    """Return whether each latent fired, [M]; all True if the run is not harvested."""
    if run.name in firing:
        return ~firing[run.name].sort_values("latent")["dead"].to_numpy(bool)
    return np.ones(run.settings.training.num_latents, bool)


def asking(study: Study, facts: JournalFacts, stage: Literal["explain", "score"], *words: str) -> str:
    """Return the command of a stage for the focus run, with :data:`MODEL` if a language model was asked before.

    That is the explainer of ``facts``, or, to score, the judge of the study's set-up if there is one.
    """
    explained_by = str(facts.table["model"].iloc[-1] or "") if len(facts.table) else ""
    judged_by = explained_by if study.setup is None else str(study.setup.get("model") or "")
    asks_model = explained_by if stage == "explain" else judged_by
    repeats = {"draws": study.view.draw, **({"replicates": study.view.replicate} if stage == "score" else {})}
    more = [word for name, number in repeats.items() if number for word in (f"--{name}", str(number + 1))]
    return study.command(stage, "--sae", study.focus.name, *words, *more, *(MODEL if asks_model else ()))
