"""`score`: put every stored explanation to the test, journal each verdict, and make the run's score table of them.

An explanation is judged on contexts that its explainer never saw. Beside each mean stands a control: the same
contexts judged by the explanation of another, dissimilar latent, which is what words that say nothing about this
latent are worth. What was judged is not judged again; what failed is. A latent that has no explanation is counted and
no failure: there is nothing to judge.

With a run the explained sample of each control SAE of its study is scored (:mod:`autointerp.contexts.control_saes`).
Beside other explanations those of the n-gram baseline are judged by the n-gram judge on the same contexts.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence, Set
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from autointerp.contexts.control_saes import list_control_saes, was_explained
from autointerp.contexts.material import Material
from autointerp.contexts.sampler import Context
from autointerp.explaining.outcome import Outcome
from autointerp.journal.journal import Journal, Verdict
from autointerp.journal.method import BASELINE
from autointerp.journal.usage import Usage
from autointerp.llm.limits import reporting_progress, run_in_flight
from autointerp.llm.opening import check_flags, keep_server, list_missing, open_method, resolve_name
from autointerp.llm.options import LlmOptions
from autointerp.scoring.adaptive import StoppingRule
from autointerp.scoring.judges import JUDGES
from autointerp.scoring.judges.base import Judge
from autointerp.scoring.kept_scores import KeptScores, brought_up_to_date, states_of
from autointerp.scoring.questions import CONTROL_LATENTS, Part, Question, has_more_than_baseline, parts_of, questions_of
from autointerp.scoring.rounds import AdaptivePlan
from autointerp.scoring.score_table import UNEXPLAINED, UNTESTED, Test, lost_scorers, of_this_judge, records_of
from autointerp.scoring.scorers import SCORERS
from autointerp.scoring.scorers.base import Scorer
from autointerp.scoring.setups import status_kind
from sae.common.commands import command, get_typed_command
from sae.common.files import digest
from sae.common.progress import Bar, say, track
from sae.study.run import Run

if TYPE_CHECKING:
    from autointerp.llm.local.server import OneServer

_PARTS_AT_ONCE = 32
"""Requests about one explanation that may be under way together."""


def score_runs(
    runs: Sequence[Run] | None,
    root: Path,
    scorers: Sequence[str],
    backend: str,
    options: LlmOptions,
    control_latents: int | None = None,
    precision: StoppingRule | None = None,
    control_sae_latents: int | None = None,
) -> Outcome:
    """Score the stored explanations of ``runs``, or of every run under ``root``; see this module's head.

    With a ``precision`` each explanation is judged in rounds, until its score is known so well (``adaptive``).
    Named runs without explanations are explained first. Without names nothing is ever explained.

    ``control_sae_latents`` is the most of each control SAE's latents that are scored (``None``: all that are
    explained), unless it is named itself. They get no swapped control: they are one.
    """
    tested = [SCORERS.choose(name, "--scorer")() for name in scorers]
    kind = resolve_name(JUDGES, backend, options.for_judge())
    check_flags(JUDGES, kind, options.list_judge_flags())
    if control_latents is None:
        control_latents = CONTROL_LATENTS[JUDGES[kind].asks_model]
    with keep_server(options) as servers:
        named = None if runs is None else _with_explanations(runs, options, servers)
        parts = parts_of(named, root, control_latents, control_sae_latents)
        return asyncio.run(_score(parts, root, tested, kind, options, precision, servers))


def open_judge(
    backend: str, options: LlmOptions, cache: Path, servers: OneServer | None = None
) -> AbstractAsyncContextManager[Judge]:
    """Open the judge for a block; see :func:`autointerp.llm.opening.open_method`."""
    return open_method(JUDGES, backend, options.for_judge(), cache, servers)


def _with_explanations(runs: Sequence[Run], options: LlmOptions, servers: OneServer | None) -> list[Run]:
    from autointerp.contexts.selection import Choice
    from autointerp.explaining.explain import explain_runs, get_marker_path

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
    precision: StoppingRule | None,
    servers: OneServer | None,
) -> Outcome:
    outcome = Outcome("score", [part.run.name for part in parts], retry=get_typed_command())
    outcome.of = "score" if len(scorers) > 1 else "latent"
    async with open_judge(kind, options, root / "cache.sqlite", servers) as judge:
        outcome.backend = f"{judge.name} ({judge.model})" if judge.model else judge.name
        for part in parts:
            before = outcome.n_done
            for scorer in scorers:
                if judge.name != BASELINE and not part.is_control:
                    await _score_baseline(part, scorer, judge, precision, outcome)
                await _score_run(part, scorer, judge, options.concurrency, precision, outcome)
            outcome.n_controls += outcome.n_done - before if part.is_control else 0
        outcome.notes += list_missing(judge)
    own = [part.run for part in parts if not part.is_control]
    outcome.notes += _without_controls(own)
    outcome.next = command(root, "report", "--sae", own[0].name)
    return outcome


def _without_controls(runs: Sequence[Run]) -> list[str]:
    """A sentence for control SAEs that are there and not explained, so that there was nothing to score of them."""
    lacking = [run for run in list_control_saes(runs) if not was_explained(run)]
    if not lacking:
        return []
    names = ", ".join(run.name for run in lacking)
    return [f"{names} (control): not explained, so not scored; the command that explained {runs[0].name} explains them"]


async def _score_baseline(
    part: Part, scorer: Scorer, judge: Judge, precision: StoppingRule | None, outcome: Outcome
) -> None:
    """The n-gram explanations of the latents whose explanations ``judge`` scores after this, by the n-gram judge."""
    from autointerp.scoring.judges.ngram import NgramJudge

    with Journal(part.run.journal_path) as journal:
        if not has_more_than_baseline(journal):
            return
        latents = frozenset(part.readable(journal, judge)["latent"].tolist())
        if journal.explanations(status="ok", explainer=BASELINE, latent=latents).empty:
            return
    baseline = Outcome("score")
    beside = replace(part, n_swapped=CONTROL_LATENTS[NgramJudge.asks_model], latents=latents)
    await _score_run(beside, scorer, NgramJudge(), 1, precision, baseline, "score by n-grams", judge)
    outcome.notes += [
        f"{part.run.name}: {n} n-gram baselines have no {scorer.name} score: {why}"
        for why, n in (baseline.failures + baseline.left_out).items()
    ]


async def _score_run(
    part: Part,
    scorer: Scorer,
    judge: Judge,
    concurrency: int,
    precision: StoppingRule | None,
    outcome: Outcome,
    doing: str = "score",
    other: Judge | None = None,
) -> None:
    """Judge what is to be judged of one run by one scorer, and make its score table; ``other`` judges it too, apart."""
    from autointerp.scoring.judges.ngram import NgramJudge

    run = part.run
    plan = AdaptivePlan.of(run, scorer, precision) if precision else None
    material = Material.of(run)
    judges = {each.name: each for each in (NgramJudge(), other, judge) if each is not None}
    test = Test.of(scorer, judge, material, plan)
    same = test.same
    kept = KeptScores.of(run.stage_path("scores"), material.digest)
    asked_now: set[int] = set()
    with Journal(run.journal_path) as journal, journal.claim():
        made = kept.keys()
        used = {scorer.name, *journal.scorers(), *(name for name, _ in made)}  # the others need not even work
        tests = Test.all_of(list(judges.values()), material, sorted(used & set(SCORERS)))
        if plan is None:
            test = next(each for each in tests if each.key == test.key)  # its contexts are drawn once
        else:
            journal.add_setup(same["settings_hash"], plan.setup)
        explanations = part.explanations(journal)
        readable = {name: part.readable(journal, each) for name, each in judges.items()}
        read = readable[judge.name]
        if judge.reads is not None and len(read) < len(explanations) and doing == "score":
            outcome.notes.append(
                f"{run.name}: {len(explanations) - len(read)} explanations that are not by {judge.reads} were left "
                f"out: the judge {judge.name} reads no others; give --llm-url, or another --judge, to have them judged"
            )
        call = _call(part, read)
        is_done = kept.is_done(test.set_up, call, states_of(journal))
        if not is_done:
            questions = questions_of(part, read)
            if questions:
                n_swapped = sum(question.control != "none" for question in questions)
                of = f"{scorer.name}, {n_swapped:,} of them swapped controls" if n_swapped else scorer.name
                with (
                    track(f"{doing} {run.name} ({of})", len(questions), "explanations") as bar,
                    reporting_progress(len(questions), "explanations", get_typed_command()),
                ):
                    await _judge_all(questions, test, journal, asked_now, concurrency, bar)
            outcome.notes += [
                f"{run.name}: verdicts of the scorer {name} stay in the journal and out of the scores: there is no "
                f"autointerp/scorers/{name}.py any more"
                for name in lost_scorers(journal)
            ]
        wanted = {name: part.wanted(each) for name, each in readable.items()}
        table = brought_up_to_date(kept, journal, material, [*tests, test], wanted, None if is_done else call, judge)
    if part.latents is not None:
        table = table[table["latent"].isin(part.latents)]
    _count(table, same, asked_now, outcome, run.name, f"{run.name}: {{}} explanations have no {scorer.name} score")


def _count(
    table: pd.DataFrame, same: Mapping[str, str], asked_now: Set[int], outcome: Outcome, run: str, lacking: str
) -> None:
    """Add to ``outcome`` what became of one judge's explanations; ``lacking`` says how many have too few contexts."""
    untested = unexplained = 0
    for row in records_of(of_this_judge(table, same)):
        if row["status"] == "ok":
            outcome.n_done += 1
            outcome.n_new += row["explanation_id"] in asked_now
        elif row["status"] == UNTESTED:
            untested += 1
        elif row["status"].startswith(UNEXPLAINED):
            outcome.left_out[row["status"].removeprefix("failed: ")] += 1
            unexplained += status_kind(row["status"]) == "failed"
        else:
            outcome.failures[row["status"].removeprefix("failed: ")] += 1
    if untested:
        outcome.notes.append(f"{lacking.format(untested)}: too few contexts for it")
    if unexplained:
        outcome.notes.append(
            f"{run}: explaining {unexplained} latents failed; the same `explain` asks again about these"
        )


def _call(part: Part, readable: pd.DataFrame) -> str:
    """The digest of what one call asks of a set-up: whose explanations, and whose controls."""
    wanted = part.wanted(readable)
    own = [[int(x) for x in wanted[column]] for column in ("id", "latent")]
    lenders = [] if part.n_swapped == 0 else [int(number) for number in readable["id"]]
    return digest({"explanations": own, "controls": part.n_swapped, "lenders": lenders})


async def _judge_all(
    questions: Sequence[Question], test: Test, journal: Journal, asked_now: set[int], concurrency: int, bar: Bar
) -> None:
    """Judge what has no verdict yet, and add to ``asked_now`` the explanations, controls aside, that were asked about:
    one by one, because a spent budget ends this half way."""

    async def ask(question: Question) -> None:
        if test.plan:
            judged = await _judge_rounds(question, test.plan, test.judge, journal, test.same)
        else:
            judged = await _judge_one(question, test.items(question.latent), test.judge, journal, test.same)
        if judged and question.control == "none":
            asked_now.add(question.explanation_id)

    await run_in_flight(questions, ask, concurrency, bar)


async def _judge_one(
    question: Question, items: Sequence[Context], judge: Judge, journal: Journal, same: dict[str, str]
) -> int:
    """Judge what has no verdict yet of one question, journalling request by request. Returns how many those were."""
    done = journal.judged(
        latent=question.latent, explanation_id=question.explanation_id, control=question.control, replicate=0, **same
    )
    todo = [c for c in items if c.window not in done and c.window not in question.seen]
    stage = "score" if question.control == "none" else "control"
    size = judge.contexts_per_request

    async def ask(part: Sequence[Context]) -> None:
        judgements = await judge.judge(question.text, part)
        verdicts = [
            Verdict(
                latent=question.latent,
                explanation_id=question.explanation_id,
                judge=same["judge"],
                scorer=same["scorer"],
                settings_hash=same["settings_hash"],
                prompt_hash=same["prompt_hash"],
                model=same["model"],
                context=context.window,
                truth=context.truth,
                negative_kind=None if context.truth else context.kind,
                control=question.control,
                p=judgement.p,
                label=judgement.label,
                failure=judgement.failure,
                request=part[0].window if judge.asks_model else None,
            )
            for context, judgement in zip(part, judgements, strict=True)
        ]
        # The cost with the verdicts and not at the end: what was paid for is on record however the command ends.
        spent = sum((judgement.usage for judgement in judgements), Usage())
        await journal.record(verdicts, stage, judge.model, spent, question.latent)

    # Side by side, so that the last latents, too, keep the server busy; the judge's client bounds what is in flight.
    await run_in_flight([todo[start : start + size] for start in range(0, len(todo), size)], ask, _PARTS_AT_ONCE)
    return len(todo)


async def _judge_rounds(
    question: Question, plan: AdaptivePlan, judge: Judge, journal: Journal, same: dict[str, str]
) -> int:
    """Judge one question round by round, as far as it takes. Returns how many contexts were asked."""
    identity = {"latent": question.latent, "explanation_id": question.explanation_id, "control": question.control}

    def labels() -> dict[int, bool | None]:
        return {**dict.fromkeys(question.seen), **journal.labels(**identity, replicate=0, **same)}

    return await plan.judge(
        question.latent, labels, lambda contexts: _judge_one(question, contexts, judge, journal, same)
    )
