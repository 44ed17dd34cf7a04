"""`score`: test every stored explanation, journal each verdict, and update the run's score table.

An explanation is judged on contexts that its explainer never saw. As a control, the same contexts are judged by the
explanation of a dissimilar latent. Existing verdicts are kept, failed ones are asked again, and latents without an
explanation are counted but are no failure.

Several judges score one after the other. Each judges all of draw 0 of the explanations before further draws, and these
before further replicates, in case a budget ends. Replicate 0 is the judge's likeliest answer; the others are sampled
at one temperature, so only these are equal in distribution.

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
from autointerp.journal.method import BASELINE, repeat
from autointerp.journal.usage import Usage
from autointerp.llm.limits import run_in_flight, run_with_progress
from autointerp.llm.local.server import OneServer
from autointerp.llm.opening import check_flags, check_repeats, list_missing, open_method, resolve_name
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
    passes_of,
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
    backends: str | Sequence[str],
    options: LlmOptions,
    control_latents: int | None = None,
    rule: StoppingRule | None = None,
    control_sae_latents: int | None = None,
    draws: int = 1,
    replicates: int = 1,
) -> Outcome:
    """Score the stored explanations of ``runs``, or of every run under ``root``; see the module's docstring.

    Every judge of ``backends`` scores the first ``draws`` explanations of each latent, ``replicates`` times.

    With a ``rule`` each explanation is judged in rounds until its score is precise enough. Named runs without
    explanations are explained first; without names nothing is ever explained.

    ``control_sae_latents`` is the most latents to score of each control SAE (``None``: all explained), unless the user
    named it. They have no swapped control, because they are one.
    """
    tested = [SCORERS[SCORERS.check(name, "--scorer")]() for name in scorers]
    judges = list_judges(backends, options, replicates)
    with OneServer() as servers:
        named = None if runs is None else _with_explanations(runs, options, servers, draws)
        parts = parts_of(named, root, control_sae_latents)
        outcome = Outcome("score", [part.run.name for part in parts], retry=get_typed_command())
        outcome.of = "score" if len(tested) * len(judges) * draws * replicates > 1 else "latent"

        async def score() -> None:
            for kind, of_judge in judges:
                async with open_judge(kind, of_judge, root / "cache.sqlite", servers) as judge:
                    who = f"{judge.name} ({judge.model})" if judge.model else judge.name
                    outcome.backend += f", {who}" if outcome.backend else who
                    for replicate, of_draw in passes_of(parts, judge, control_latents, draws, replicates):
                        await _score_parts(of_draw, tested, judge, replicate, of_judge, rule, outcome)
                    outcome.notes += list_missing(judge)

        asyncio.run(score())
    own = [part.run for part in parts if not part.is_control]
    outcome.notes = list(dict.fromkeys([*outcome.notes, *_without_controls(own)]))
    outcome.next = command(root, "report", "--sae", own[0].name)
    return outcome


def list_judges(
    backends: str | Sequence[str], options: LlmOptions, replicates: int = 1
) -> list[tuple[str, LlmOptions]]:
    """Return the name and the options of each judge: of a language model, one judge for each of its models.

    Raises BadInput if a judge cannot be opened, or if flags or ``replicates`` have no effect on any.
    """
    found: list[tuple[str, LlmOptions]] = []
    for backend in [backends] if isinstance(backends, str) else backends:
        for of_model in options.split_judges():
            kind = resolve_name(JUDGES, backend, of_model.for_judge())
            if kind not in [name for name, _ in found] or (JUDGES[kind].asks_model and (kind, of_model) not in found):
                found.append((kind, of_model))
    if not any(JUDGES[kind].asks_model for kind, _ in found):
        check_flags(JUDGES, found[0][0], options.list_judge_flags())
    if not any(hasattr(JUDGES[kind], "repeated") for kind, _ in found):
        check_repeats(JUDGES, found[0][0], "--replicates", replicates)
    return found


def open_judge(
    backend: str, options: LlmOptions, cache: Path, servers: OneServer | None = None
) -> AbstractAsyncContextManager[Judge]:
    """Open the judge for a block; see :func:`autointerp.llm.opening.open_method`."""
    return open_method(JUDGES, backend, options.for_judge(), cache, servers)


def _with_explanations(runs: Sequence[Run], options: LlmOptions, servers: OneServer | None, draws: int) -> list[Run]:
    """Explain the runs that are not; only a language model makes several ``draws``."""
    for run in runs:
        if get_marker_path(run).exists() or not was_explained(run):
            say(f"{run.name}: not explained yet, doing that first (200 latents)")
            get_marker_path(run).touch()
            explain_runs([run], Choice(), "auto", options, servers=servers, draws=draws if options.is_named else 1)
    return list(runs)


async def _score_parts(
    parts: Sequence[Part],
    scorers: Sequence[Scorer],
    judge: Judge,
    replicate: int,
    options: LlmOptions,
    rule: StoppingRule | None,
    outcome: Outcome,
) -> None:
    for part in parts:
        before = outcome.n_done
        for scorer in scorers:
            tests = TestSets(part.run, scorer, rule)
            if judge.name != BASELINE and not part.is_control and not part.draw and not replicate:
                await _score_baseline(part, tests, judge, outcome)
            await _score_run(part, tests, judge, replicate, options, outcome)
        outcome.n_controls += outcome.n_done - before if part.is_control else 0


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
    await _score_run(same_latents, tests, NgramJudge(), 0, LlmOptions(concurrency=1), baseline, "score by n-grams")
    outcome.notes += [
        f"{part.run.name}: {n} n-gram baselines have no {tests.scorer.name} score: {why}"
        for why, n in (baseline.failures + baseline.left_out).items()
    ]


async def _score_run(
    part: Part,
    tests: TestSets,
    judge: Judge,
    replicate: int,
    options: LlmOptions,
    outcome: Outcome,
    doing: str = "score",
) -> None:
    """Judge what lacks a verdict in one run by one scorer, and update its score table."""
    run, scorer = part.run, tests.scorer
    with open_journal(run) as journal, journal.claim():
        asking = Asking(tests, judge, journal, replicate, options.temperature)
        explanations, readable = part.explanations(journal), part.readable(journal, judge)
        if part.draw and explanations.empty and not part.is_control:
            outcome.notes.append(f"{run.name} has no draw {part.draw}; `explain --draws {part.draw + 1}` makes it")
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
            of = [scorer.name, *(f"{name} {n}" for name, n in (("draw", part.draw), ("replicate", replicate)) if n)]
            of += [f"{n_swapped:,} of them swapped controls"] if n_swapped else []
            words = f"{doing} {run.name} ({', '.join(of)})"
            await run_with_progress(questions, asking.ask, options.concurrency, words, "explanations")
        for name in sorted({of[1] for of in journal.state()["verdicts"]} - set(SCORERS)):
            outcome.notes.append(
                f"{run.name}: verdicts of the scorer {name} stay in the journal but have no scores: "
                f"there is no autointerp/scoring/scorers/{name}.py any more"
            )
        table = update_score_table(run, journal, asking.set_up, replicate, part.wanted(readable), judge)
    if part.latents is not None:
        table = table[table["latent"].isin(part.latents)]
    rows = rows_of_set_up(table[table["draw"] == part.draw], asking.set_up, replicate)
    _count(rows, asking.asked, outcome, run.name, scorer.name)


class Asking:
    """Ask one judge about explanations of one run. Each answer is in the journal before it is used.

    ``replicate`` numbers the judgement of the same contexts; those after 0 are sampled at ``temperature``.
    """

    def __init__(
        self, tests: TestSets, judge: Judge, journal: Journal, replicate: int = 0, temperature: float = 0.0
    ) -> None:
        first = judge.of_marks() if tests.scorer.marked else judge
        self.judge = repeat(first, replicate, temperature)
        self.set_up = tests.set_up(self.judge)
        self.asked: set[int] = set()
        """Explanations asked about, controls aside."""
        self._tests, self._journal, self._replicate = tests, journal, replicate
        about = {"adaptive": tests.adaptive, "material": tests.material.digest} if tests.adaptive else {}
        about |= {"first": tests.set_up(first).settings_hash} if replicate else {}
        if about:
            journal.add_setup(self.set_up.settings_hash, about)
        self._test_sets = journal.test_sets(self.set_up.scorer, self.set_up.settings_hash)
        self._labels = defaultdict(dict, journal.labels(**self.set_up._asdict(), replicate=replicate))

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
                replicate=self._replicate,
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
