"""`score`: test every stored explanation, journal each verdict, and update the run's score table.

An explanation is judged on contexts that its explainer never saw. As a control, the same contexts are judged by the
explanation of a dissimilar latent. Existing verdicts are kept, failed ones are asked again, and latents without an
explanation are counted but are no failure.

The explained sample of each control SAE of the study is scored too (:mod:`autointerp.contexts.selection`), and the
n-gram judge scores the n-gram baseline's explanations on the same contexts.
"""

from __future__ import annotations

import asyncio
import functools
from collections import defaultdict
from collections.abc import Sequence, Set
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from pathlib import Path

import pandas as pd

from autointerp.contexts.sampler import Context
from autointerp.contexts.selection import Choice, list_control_saes, was_explained
from autointerp.explaining.explain import Outcome, explain_runs, get_marker_path
from autointerp.journal.journal import Journal, PlannedContext, Verdict, open_journal
from autointerp.journal.method import BASELINE
from autointerp.journal.usage import Usage
from autointerp.llm.limits import run_in_flight, run_with_progress
from autointerp.llm.local.server import OneServer
from autointerp.llm.opening import check_flags, list_missing, open_method, resolve_name
from autointerp.llm.options import LlmOptions
from autointerp.scoring.adaptive import StoppingRule
from autointerp.scoring.judges import JUDGES
from autointerp.scoring.judges.base import Judge
from autointerp.scoring.questions import (
    CONTROL_LATENTS,
    Part,
    Question,
    TestSets,
    has_more_than_baseline,
    parts_of,
    questions_of,
)
from autointerp.scoring.score_table import UNEXPLAINED, UNTESTED, rows_of_set_up, update_score_table
from autointerp.scoring.scorers import SCORERS
from autointerp.scoring.scorers.base import Scorer
from autointerp.scoring.setups import records_of, status_kind
from sae.common.commands import command, get_typed_command
from sae.common.progress import say
from sae.study.run import Run

_BATCHES_AT_ONCE = 32
"""Requests about one explanation that may be under way together."""


def score_runs(
    runs: Sequence[Run] | None,
    root: Path,
    scorers: Sequence[str],
    backend: str,
    options: LlmOptions,
    control_latents: int | None = None,
    rule: StoppingRule | None = None,
    control_sae_latents: int | None = None,
) -> Outcome:
    """Score the stored explanations of ``runs``, or of every run under ``root``; see the module's docstring.

    With a ``rule`` each explanation is judged in rounds until its score is precise enough. Named runs without
    explanations are explained first; without names nothing is ever explained.

    ``control_sae_latents`` is the most latents to score of each control SAE (``None``: all explained), unless the user
    named it. They have no swapped control, because they are one.
    """
    tested = [SCORERS[SCORERS.check(name, "--scorer")]() for name in scorers]
    kind = resolve_name(JUDGES, backend, options.for_judge())
    check_flags(JUDGES, kind, options.list_judge_flags())
    if control_latents is None:
        control_latents = CONTROL_LATENTS[JUDGES[kind].asks_model]
    with OneServer() as servers:
        named = None if runs is None else _with_explanations(runs, options, servers)
        parts = parts_of(named, root, control_latents, control_sae_latents)
        return asyncio.run(_score(parts, root, tested, kind, options, rule, servers))


def open_judge(
    backend: str, options: LlmOptions, cache: Path, servers: OneServer | None = None
) -> AbstractAsyncContextManager[Judge]:
    """Open the judge for a block; see :func:`autointerp.llm.opening.open_method`."""
    return open_method(JUDGES, backend, options.for_judge(), cache, servers)


def _with_explanations(runs: Sequence[Run], options: LlmOptions, servers: OneServer | None) -> list[Run]:
    for run in runs:
        if get_marker_path(run).exists() or not was_explained(run):
            say(f"{run.name}: not explained yet, doing that first (200 latents)")
            get_marker_path(run).touch()
            explain_runs([run], Choice(), "auto", options, servers=servers)
    return list(runs)


async def _score(
    parts: Sequence[Part],
    root: Path,
    scorers: Sequence[Scorer],
    kind: str,
    options: LlmOptions,
    rule: StoppingRule | None,
    servers: OneServer | None,
) -> Outcome:
    outcome = Outcome("score", [part.run.name for part in parts], retry=get_typed_command())
    outcome.of = "score" if len(scorers) > 1 else "latent"
    async with open_judge(kind, options, root / "cache.sqlite", servers) as judge:
        outcome.backend = f"{judge.name} ({judge.model})" if judge.model else judge.name
        for part in parts:
            before = outcome.n_done
            for scorer in scorers:
                tests = TestSets(part.run, scorer, rule)
                if judge.name != BASELINE and not part.is_control:
                    await _score_baseline(part, tests, judge, outcome)
                await _score_run(part, tests, judge, options.concurrency, outcome)
            outcome.n_controls += outcome.n_done - before if part.is_control else 0
        outcome.notes += list_missing(judge)
    own = [part.run for part in parts if not part.is_control]
    outcome.notes += _without_controls(own)
    outcome.next = command(root, "report", "--sae", own[0].name)
    return outcome


def _without_controls(runs: Sequence[Run]) -> list[str]:
    """Return a sentence about existing control SAEs that are not explained and so cannot be scored."""
    lacking = [run for run in list_control_saes(runs) if not was_explained(run)]
    if not lacking:
        return []
    names = ", ".join(run.name for run in lacking)
    return [f"{names} (control): not explained, so not scored; the command that explained {runs[0].name} explains them"]


async def _score_baseline(part: Part, tests: TestSets, judge: Judge, outcome: Outcome) -> None:
    """Score the n-gram explanations of the latents that ``judge`` scores next, by the n-gram judge."""
    from autointerp.scoring.judges.ngram import NgramJudge

    with open_journal(part.run) as journal:
        if not has_more_than_baseline(journal):
            return
        latents = frozenset(part.readable(journal, judge)["latent"].tolist())
        if journal.explanations(status="ok", explainer=BASELINE, latent=latents).empty:
            return
    baseline = Outcome("score")
    same_latents = replace(part, n_swapped=CONTROL_LATENTS[NgramJudge.asks_model], latents=latents)
    await _score_run(same_latents, tests, NgramJudge(), 1, baseline, "score by n-grams")
    outcome.notes += [
        f"{part.run.name}: {n} n-gram baselines have no {tests.scorer.name} score: {why}"
        for why, n in (baseline.failures + baseline.left_out).items()
    ]


async def _score_run(
    part: Part, tests: TestSets, judge: Judge, concurrency: int, outcome: Outcome, doing: str = "score"
) -> None:
    """Judge what lacks a verdict in one run by one scorer, and update its score table."""
    run, scorer = part.run, tests.scorer
    with open_journal(run) as journal, journal.claim():
        asking = Asking(tests, judge, journal)
        explanations, readable = part.explanations(journal), part.readable(journal, judge)
        if judge.reads is not None and len(readable) < len(explanations) and doing == "score":
            outcome.notes.append(
                f"{run.name}: skipped {len(explanations) - len(readable)} explanations that are not by {judge.reads}, "
                f"because the judge {judge.name} reads no others; to judge them give --llm-url or another --judge"
            )
        questions, n_lacking = questions_of(part, readable)
        if n_lacking:
            outcome.notes.append(
                f"{run.name}: {n_lacking} explanations have no swapped control: no dissimilar latent with another text"
            )
        if not all(map(asking.is_done, questions)):
            n_swapped = sum(question.control != "none" for question in questions)
            of = f"{scorer.name}, {n_swapped:,} of them swapped controls" if n_swapped else scorer.name
            await run_with_progress(questions, asking.ask, concurrency, f"{doing} {run.name} ({of})", "explanations")
        for name in sorted({of[1] for of in journal.state()["verdicts"]} - set(SCORERS)):
            outcome.notes.append(
                f"{run.name}: verdicts of the scorer {name} stay in the journal but have no scores: "
                f"there is no autointerp/scoring/scorers/{name}.py any more"
            )
        table = update_score_table(run, journal, asking.set_up, part.wanted(readable), judge)
    if part.latents is not None:
        table = table[table["latent"].isin(part.latents)]
    _count(rows_of_set_up(table, asking.set_up), asking.asked, outcome, run.name, scorer.name)


class Asking:
    """Ask one judge about explanations of one run. Each answer is in the journal before it is used."""

    def __init__(self, tests: TestSets, judge: Judge, journal: Journal) -> None:
        self.judge = judge.of_marks() if tests.scorer.marked else judge
        self.set_up = tests.set_up(self.judge)
        self.asked: set[int] = set()
        """Explanations asked about, controls aside."""
        self._tests, self._journal = tests, journal
        if tests.adaptive:
            about = {"adaptive": tests.adaptive, "material": tests.material.digest}
            journal.add_setup(self.set_up.settings_hash, about)
        self._test_sets = journal.test_sets(self.set_up.scorer, self.set_up.settings_hash)
        self._labels = defaultdict(dict, journal.labels(**self.set_up._asdict(), replicate=0))

    def is_done(self, question: Question) -> bool:
        """Return whether the journal has every verdict that is needed; nothing is drawn to find out."""
        rounds = self._test_sets.get(question.latent)
        return rounds is not None and not self._tests.next_round(rounds, self._labels[question.key], question.seen)

    async def ask(self, question: Question) -> None:
        """Judge the contexts without a verdict, round by round."""
        if self.is_done(question):
            return
        rounds = self._tests.draw(question.latent)
        planned = [[PlannedContext(c.window, c.truth, c.kind, c.stratum) for c in contexts] for contexts in rounds]
        if self._test_sets.get(question.latent) != planned:
            self._journal.add_test_set(self.set_up.scorer, self.set_up.settings_hash, question.latent, planned)
            self._test_sets[question.latent] = planned
        skipped, size = set(question.seen), self.judge.contexts_per_request
        while todo := self._tests.next_round(rounds, self._labels[question.key], skipped):
            # In parallel, so that the last latents keep the server busy too; the judge's client bounds the requests.
            batches = [todo[start : start + size] for start in range(0, len(todo), size)]
            await run_in_flight(batches, functools.partial(self._judge, question), _BATCHES_AT_ONCE)
            skipped |= {context.window for context in todo}
        if question.control == "none" and skipped != question.seen:
            self.asked.add(question.explanation_id)

    async def _judge(self, question: Question, contexts: Sequence[Context]) -> None:
        """Send one request, and store its verdicts together with what it cost."""
        judgements = await self.judge.judge(question.text, contexts)
        verdicts = [
            Verdict(
                **self.set_up._asdict(),
                latent=question.latent,
                explanation_id=question.explanation_id,
                context=context.window,
                truth=context.truth,
                negative_kind=None if context.truth else context.kind,
                control=question.control,
                p=judgement.p,
                label=judgement.label,
                failure=judgement.failure,
                request=contexts[0].window if self.judge.asks_model else None,
            )
            for context, judgement in zip(contexts, judgements, strict=True)
        ]
        spent = sum((judgement.usage for judgement in judgements), Usage())
        stage = "score" if question.control == "none" else "control"
        await self._journal.record(verdicts, stage, self.judge.model, spent, question.latent)
        self._labels[question.key].update({verdict.context: verdict.label for verdict in verdicts})


def _count(rows: pd.DataFrame, asked: Set[int], outcome: Outcome, run: str, scorer: str) -> None:
    """Add to ``outcome`` what became of one set-up's explanations."""
    untested = unexplained = 0
    for row in records_of(rows):
        if row["status"] == "ok":
            outcome.n_done += 1
            outcome.n_new += row["explanation_id"] in asked
        elif row["status"] == UNTESTED:
            untested += 1
        elif row["status"].startswith(UNEXPLAINED):
            outcome.left_out[row["status"].removeprefix("failed: ")] += 1
            unexplained += status_kind(row["status"]) == "failed"
        else:
            outcome.failures[row["status"].removeprefix("failed: ")] += 1
    if untested:
        outcome.notes.append(f"{run}: {untested} explanations have no {scorer} score: too few contexts for it")
    if unexplained:
        outcome.notes.append(
            f"{run}: explaining {unexplained} latents failed; the same `explain` asks again about these"
        )
