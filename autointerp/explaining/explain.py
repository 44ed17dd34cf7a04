"""`explain`: choose latents, show their activating contexts to an explainer, keep each answer in the journal.

Earlier stages that are missing run first. A latent that already has an explanation by the same explainer, from
the same contexts and prompts, is not asked again; one that failed is. A latent with too few contexts is never asked
about: named outright it is counted, with the reason, and is no failure.

With the latents of a run a sample of each control SAE of its study is explained
(:mod:`autointerp.contexts.control_saes`), and beside any other explainer the n-gram baseline explains the same latents,
which costs no request.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from autointerp.contexts.control_saes import beside, sample_of, sample_size
from autointerp.contexts.material import Material
from autointerp.contexts.sample_record import Draw, partners_of, record
from autointerp.contexts.sampling import permanent_number
from autointerp.contexts.selection import Choice, check, choose, draw, partners
from autointerp.explaining.explainers import EXPLAINERS
from autointerp.explaining.explainers.base import Explainer
from autointerp.explaining.outcome import Outcome
from autointerp.journal.journal import Journal
from autointerp.journal.method import BASELINE
from autointerp.llm.limits import BudgetSpent, reporting_progress, run_in_flight
from autointerp.llm.opening import list_missing, open_method, resolve
from autointerp.llm.options import LlmOptions
from sae.common.commands import get_typed_command
from sae.common.errors import BadInput
from sae.common.files import digest, read_table
from sae.common.progress import say, track
from sae.study.align import ensure_aligned
from sae.study.harvest import ensure_harvested
from sae.study.run import Run
from sae.study.stage import Compute

if TYPE_CHECKING:
    from autointerp.llm.local.server import OneServer


@dataclass(frozen=True)
class Task:
    """The latents of one run that are to be explained, and the sample that they are (``None``: named outright)."""

    run: Run
    latents: list[int]
    draw: Draw | None = None


def explain_runs(
    runs: Sequence[Run],
    choice: Choice,
    backend: str,
    options: LlmOptions,
    compute: Compute | None = None,
    control_sae_latents: int | None = None,
    servers: OneServer | None = None,
) -> Outcome:
    """Explain the chosen latents of ``runs``, and return what came of it; see the module's docstring.

    ``control_sae_latents`` is how many of each control SAE are explained too (``None``: the default number);
    ``servers`` keeps a vLLM server for the judge.
    """
    kind = resolve(EXPLAINERS, backend, options)
    for run in runs:
        check(run, choice)
    outcome = asyncio.run(_explain(runs, choice, kind, options, compute or Compute(), control_sae_latents, servers))
    for run in runs:
        begun_path(run).unlink(missing_ok=True)
    return outcome


def _prepare(runs: Sequence[Run], choice: Choice, compute: Compute, with_controls: bool) -> list[Task]:
    """What is to be explained of ``runs``, after the stages that it takes to know, and harvests their controls."""
    for run in runs:
        others = run.siblings() if choice.needs_alignment else []
        ensure_harvested([run, *others, *(beside([run]) if with_controls else [])], compute)
        if choice.needs_alignment:
            ensure_aligned(run, compute)
    return [task for run in runs for task in plan_latents(run, choice)]


def begun_path(run: Run) -> Path:
    """Marks a run that `score` began to explain: stopped on the way, it is to go on with that and not score a part."""
    return run.folder / ".explaining"


def plan_latents(run: Run, choice: Choice) -> list[Task]:
    """What is to be explained of a run that is harvested (and aligned, where the choice needs that)."""
    eligibility = Material.of(run).eligibility()
    eligible = eligibility["latent"][eligibility["eligible"]].tolist()
    path = run.stage_path("overlap")
    table = read_table(path) if choice.needs_alignment or path.exists() else pd.DataFrame()
    sample = None if choice.indices else draw(run, table, eligible, choice)
    latents = choose(run, table, eligible, choice) if sample is None else sample.latents
    lacking = sorted(set(latents) - set(eligible))
    if lacking:  # named outright by the user: said here, recorded with the reason below
        say(f"{run.name}: {len(lacking)} of the latents named have too few contexts, the first is {lacking[0]}")
    if not latents:
        raise BadInput(
            f"run {run.name!r}: no latent fits (asked for: {choice.sharing}, {len(eligible)} eligible in all); "
            "ask for another class, another --threshold, or harvest more tokens"
        )
    tasks = [Task(run, latents, sample)]
    if choice.with_partners:
        for sibling in run.siblings():
            theirs = Material.of(sibling).eligibility()
            able = set(theirs["latent"][theirs["eligible"]])
            column = table.sort_values("latent")[f"decoder_partner__{sibling.name}"].to_numpy()
            of_sample = None if sample is None else partners_of(sample, run.name, column, able)
            chosen = [x for x in partners(table, sibling.name, latents) if x in able]
            tasks.append(Task(sibling, chosen, of_sample))
    return tasks


def plan_controls(tasks: Sequence[Task], choice: Choice, asks_model: bool, asked: int | None) -> list[Task]:
    """What is to be explained of the control SAEs beside ``tasks``; they are harvested. See :func:`sample_size`.

    A control SAE none of whose latents has contexts enough is there with no latent.
    """
    n = sample_size(choice, asks_model, asked, max(len(task.latents) for task in tasks))
    planned = []
    for control in beside([task.run for task in tasks]) if n else []:
        planned.append(Task(control, sample_of(control, n)))
    return planned


async def _explain(
    runs: Sequence[Run],
    choice: Choice,
    kind: str,
    options: LlmOptions,
    compute: Compute,
    control_sae_latents: int | None,
    servers: OneServer | None,
) -> Outcome:
    outcome = Outcome("explain", retry=get_typed_command())
    # Opened first: an endpoint that is down is reported before an hour's harvest, not after it.
    async with open_explainer(kind, options, runs[0].root / "cache.sqlite", servers) as explainer:
        outcome.backend = f"{explainer.name} ({explainer.model})" if explainer.model else explainer.name
        with_controls = sample_size(choice, explainer.asks_model, control_sae_latents, 1) > 0
        tasks = _prepare(runs, choice, compute, with_controls)
        controls = plan_controls(tasks, choice, explainer.asks_model, control_sae_latents)
        for task in [*tasks, *controls]:
            with_baseline = kind != BASELINE and task not in controls
            before = outcome.n_done
            try:
                await _explain_run(task, explainer, options.concurrency, outcome)
            except BudgetSpent:  # what was paid for is compared with what costs nothing
                if with_baseline:
                    await _explain_by_baseline(task, explainer, outcome)
                raise
            if with_baseline:
                await _explain_by_baseline(task, explainer, outcome)
            outcome.n_controls += outcome.n_done - before if task in controls else 0
        for task in controls:
            n = f"{len(task.latents)} latents" if task.latents else "no latent has contexts enough"
            outcome.notes.append(f"{task.run.name} (control): {n}")
        outcome.notes += list_missing(explainer)
    outcome.explained = list(dict.fromkeys(task.run.name for task in tasks))
    outcome.runs = outcome.explained + [task.run.name for task in controls]
    return outcome


def open_explainer(
    backend: str, options: LlmOptions, cache: Path, servers: OneServer | None = None
) -> AbstractAsyncContextManager[Explainer]:
    """Open the explainer for a block; see :func:`autointerp.llm.opening.open_method`."""
    return open_method(EXPLAINERS, backend, options, cache, servers)


async def _explain_by_baseline(task: Task, explainer: Explainer, outcome: Outcome) -> None:
    """The n-gram baseline's explanations of the latents that ``explainer`` explained, which count as nobody's."""
    from autointerp.explaining.explainers.ngram import NgramExplainer

    with Journal(task.run.journal_path) as journal:
        told = journal.explanations(status="ok", draw=0, **identity_of(explainer, Material.of(task.run)))
    latents = sorted(set(task.latents) & set(told["latent"].tolist()))
    if not latents:
        return
    baseline = Outcome("explain")
    await _explain_run(Task(task.run, latents), NgramExplainer(), 1, baseline, "explain by n-grams")
    lost = (baseline.failures + baseline.left_out).items()
    outcome.notes += [f"{task.run.name}: {n} latents without an n-gram baseline: {why}" for why, n in lost]


def identity_of(explainer: Explainer, material: Material) -> dict[str, Any]:
    """What all of an explainer's explanations from one run's contexts have in common in the journal."""
    return {
        "explainer": explainer.name,
        "settings_hash": digest({"explainer": explainer.settings_hash, "material": material.digest}),
        "prompt_hash": explainer.prompt_hash,
        "model": explainer.model,
    }


async def _explain_run(
    task: Task, explainer: Explainer, concurrency: int, outcome: Outcome, doing: str = "explain"
) -> None:
    material = Material.of(task.run)
    same = identity_of(explainer, material)
    with Journal(task.run.journal_path) as journal, journal.claim():
        if task.draw is not None:
            record(task.run, task.draw, same)
        stored = journal.explanations(status="ok", draw=0, **same)
        # In an order that says nothing of a latent, so that what is done when a budget ends is a fair sample as well.
        todo = sorted(set(task.latents) - set(stored["latent"].tolist()), key=lambda x: permanent_number(0, x))
        before = len(task.latents) - len(todo)
        if before:
            say(f"{task.run.name}: {before} of {len(task.latents)} latents were explained before")

        async def explain_one(latent: int) -> None:
            contexts = material.sampler.explaining(latent)
            eligible, reason = material.sampler.eligible(latent)
            background = material.sampler.background(latent, explainer.needs_background)
            text, failure = None, f"too few contexts: {reason}"
            if eligible:
                explanation = await explainer.explain(latent, contexts, background)
                text, failure = explanation.text, explanation.failure or ""
                journal.add_usage("explain", explainer.model, explanation.usage, latent)
            journal.add_explanation(
                latent=latent,
                contexts=[context.window for context in contexts],
                text=text,
                failure=None if text is not None else failure,
                **same,
            )
            if not eligible:
                outcome.left_out[failure] += 1
            elif text is None:
                outcome.failures[failure] += 1
            else:
                outcome.n_new += 1

        if todo:
            with (
                track(f"{doing} {task.run.name}", len(task.latents), "latents", done=before) as bar,
                reporting_progress(len(todo), "latents", get_typed_command()),
            ):
                await run_in_flight(todo, explain_one, concurrency, bar)
        outcome.n_done += len(journal.explanations(status="ok", draw=0, latent=task.latents, **same))
