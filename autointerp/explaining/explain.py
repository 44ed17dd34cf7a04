"""`explain`: choose latents, show their activating contexts to an explainer, and keep each answer in the journal.

Missing earlier stages run first. Existing explanations by the same explainer, contexts and prompts are kept, and failed
ones are asked again. Latents with too few contexts are never explained; if the user named them, they are counted with
the reason and are no failure.

The n-gram baseline explains the same latents, and a sample of each control SAE is explained too
(:mod:`autointerp.contexts.selection`).

Draw 0 of a latent's explanations is the model's likeliest answer. Further draws have the same contexts and are sampled
at one temperature, so only these are equal in distribution. All of draw 0 comes first, in case a budget ends.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from autointerp.contexts.material import Material
from autointerp.contexts.sampling import Draw, map_to_partners, permanent_number, store_draw
from autointerp.contexts.selection import (
    Choice,
    check_choice,
    choose_latents,
    choose_sample_size,
    draw_control_latents,
    draw_latents,
    find_partners,
    list_control_saes,
)
from autointerp.explaining.copies import find_flags, is_quoting_unseen
from autointerp.explaining.explainers import EXPLAINERS
from autointerp.explaining.explainers.base import Evidence, Explainer, list_texts, needs_logits
from autointerp.journal.journal import open_journal
from autointerp.journal.method import BASELINE, repeat
from autointerp.llm.limits import BudgetSpent, run_with_progress
from autointerp.llm.opening import check_repeats, list_missing, open_method, resolve_name
from autointerp.llm.options import LlmOptions
from sae.common.commands import get_typed_command
from sae.common.errors import BadInput
from sae.common.files import digest, read_table
from sae.common.progress import say
from sae.study.align import ensure_aligned
from sae.study.harvest import ensure_harvested
from sae.study.logits import ensure_logits
from sae.study.run import Run
from sae.study.stage import Compute

if TYPE_CHECKING:
    from autointerp.llm.local.server import OneServer


@dataclass
class Outcome:
    """The result of one command, summed over its runs."""

    stage: str
    runs: list[str] = field(default_factory=list)
    backend: str = ""
    n_done: int = 0  # latents that now have a result, including those of earlier calls
    n_new: int = 0  # of these, the ones of this call
    failures: Counter[str] = field(default_factory=Counter)  # reason → latents that failed; asking again may succeed
    left_out: Counter[str] = field(default_factory=Counter)  # reason → latents with nothing to ask about; not failures
    flags: Counter[str] = field(default_factory=Counter)  # flag → explained latents whose text is suspicious
    retry: str = ""  # The typed command, which asks again only for what failed. Empty in a notebook.
    next: str = ""  # the command for the next stage
    notes: list[str] = field(default_factory=list)
    of: str = "latent"  # the unit of the counts: ``latent``, or, of several for each, ``explanation`` or ``score``
    explained: list[str] = field(default_factory=list)  # ``runs`` without control SAEs
    n_controls: int = 0  # of ``n_done``, latents of control SAEs

    @property
    def n_failed(self) -> int:
        return sum(self.failures.values())

    def as_dict(self) -> dict[str, Any]:
        counts = {name: getattr(self, name) for name in ("runs", "backend", "of", "n_done", "n_new", "n_controls")}
        return {
            **counts,
            "n_failed": self.n_failed,
            "failures": dict(self.failures.most_common()),
            "n_left_out": self.left_out.total(),
            "left_out": dict(self.left_out.most_common()),
            **({"flags": dict(self.flags.most_common())} if self.stage == "explain" else {}),
            "retry": (self.retry or None) if self.failures else None,
            "next": (self.next or None) if self.n_done and not self.failures else None,
            "notes": self.notes,
        }


@dataclass(frozen=True)
class Task:
    """The latents of one run to explain, and their sample (``None`` if the user named them)."""

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
    draws: int = 1,
) -> Outcome:
    """Explain the chosen latents of ``runs``, and ``control_sae_latents`` (``None``: the default) of each control SAE.

    Each gets ``draws`` independent explanations. ``servers`` keeps a vLLM server for the judge.
    """
    kind = resolve_name(EXPLAINERS, backend, options)
    check_repeats(EXPLAINERS, kind, "--draws", draws)
    for run in runs:
        check_choice(run, choice)
    outcome = Outcome("explain", retry=get_typed_command(), of="explanation" if draws > 1 else "latent")

    async def explain() -> None:
        # Opened first: an endpoint that is down is reported before an hour's harvest.
        async with open_method(EXPLAINERS, kind, options, runs[0].root / "cache.sqlite", servers) as explainer:
            outcome.backend = f"{explainer.name} ({explainer.model})" if explainer.model else explainer.name
            with_controls = choose_sample_size(choice, explainer.asks_model, control_sae_latents, 1) > 0
            _prepare(runs, choice, with_controls, compute or Compute())
            tasks = [task for run in runs for task in plan_latents(run, choice)]
            controls = plan_controls(tasks, choice, explainer.asks_model, control_sae_latents)
            if needs_logits(explainer):
                ensure_logits([task.run for task in [*tasks, *controls]], compute or Compute())
            for draw in range(draws):
                await _explain_tasks(tasks, controls, explainer, draw, kind != BASELINE and not draw, options, outcome)
            for task in controls:
                n = f"{len(task.latents)} latents" if task.latents else "no latent has enough contexts"
                outcome.notes.append(f"{task.run.name} (control): {n}")
            outcome.explained = list(dict.fromkeys(task.run.name for task in tasks))
            outcome.runs = outcome.explained + [task.run.name for task in controls]
            outcome.notes += list_missing(explainer)

    asyncio.run(explain())
    for run in runs:
        get_marker_path(run).unlink(missing_ok=True)
    return outcome


def get_marker_path(run: Run) -> Path:
    """Return the file that marks a run while `score` explains it: if stopped, it resumes before it scores."""
    return run.folder / ".explaining"


def plan_latents(run: Run, choice: Choice) -> list[Task]:
    """Choose the latents to explain of a harvested run (aligned too, if the choice needs that)."""
    eligibility = Material.of(run).eligibility()
    eligible = eligibility["latent"][eligibility["eligible"]].tolist()
    path = run.stage_path("overlap")
    table = read_table(path) if choice.needs_alignment or path.exists() else pd.DataFrame()
    sample = None if choice.indices else draw_latents(run, table, eligible, choice)
    latents = choose_latents(run, table, eligible, choice) if sample is None else sample.latents
    lacking = sorted(set(latents) - set(eligible))
    if lacking:  # named by the user
        say(f"{run.name}: {len(lacking)} of the named latents have too few contexts, the first is {lacking[0]}")
    if not latents:
        raise BadInput(
            f"run {run.name!r}: no latent fits (asked for: {choice.sharing}, {len(eligible)} eligible in all); "
            "ask for another class, another --threshold, or harvest more tokens"
        )
    tasks = [Task(run, latents, sample)]
    if choice.with_partners:
        for sibling in run.siblings():
            eligibility = Material.of(sibling).eligibility()
            able = set(eligibility["latent"][eligibility["eligible"]])
            column = table.sort_values("latent")[f"decoder_partner__{sibling.name}"].to_numpy()
            partners = None if sample is None else map_to_partners(sample, run.name, column, able)
            chosen = [x for x in find_partners(table, sibling.name, latents) if x in able]
            tasks.append(Task(sibling, chosen, partners))
    return tasks


def plan_controls(tasks: Sequence[Task], choice: Choice, asks_model: bool, asked: int | None) -> list[Task]:
    """Choose the latents to explain of the harvested control SAEs of ``tasks``; a task may be empty."""
    n = choose_sample_size(choice, asks_model, asked, max(len(task.latents) for task in tasks))
    controls = list_control_saes([task.run for task in tasks]) if n else []
    return [Task(control, draw_control_latents(control, n)) for control in controls]


def _prepare(runs: Sequence[Run], choice: Choice, with_controls: bool, compute: Compute) -> None:
    """Run the missing earlier stages."""
    for run in runs:
        others = run.siblings() if choice.needs_alignment else []
        ensure_harvested([run, *others, *(list_control_saes([run]) if with_controls else [])], compute)
        if choice.needs_alignment:
            ensure_aligned(run, compute)


async def _explain_tasks(
    tasks: Sequence[Task],
    controls: Sequence[Task],
    explainer: Explainer,
    draw: int,
    with_baseline: bool,
    options: LlmOptions,
    outcome: Outcome,
) -> None:
    for task in [*tasks, *controls]:
        before = outcome.n_done
        spent: BudgetSpent | None = None
        try:
            await _explain_run(task, explainer, draw, options, outcome)
        except BudgetSpent as error:  # the paid explanations still get their baseline
            spent = error
        if with_baseline and task not in controls:
            await _explain_by_baseline(task, explainer, outcome)
        if spent is not None:
            raise spent
        outcome.n_controls += outcome.n_done - before if task in controls else 0


async def _explain_by_baseline(task: Task, explainer: Explainer, outcome: Outcome) -> None:
    """Explain the latents that ``explainer`` explained by the n-gram baseline too, without counting them."""
    from autointerp.explaining.explainers.ngram import NgramExplainer

    with open_journal(task.run) as journal:
        explained = journal.explanations(status="ok", draw=0, **get_identity(explainer, Material.of(task.run)))
    latents = sorted(set(task.latents) & set(explained["latent"].tolist()))
    if not latents:
        return
    baseline, options = Outcome("explain"), LlmOptions(concurrency=1)
    await _explain_run(Task(task.run, latents), NgramExplainer(), 0, options, baseline, "explain by n-grams")
    failed = (baseline.failures + baseline.left_out).items()
    outcome.notes += [f"{task.run.name}: {n} latents without an n-gram baseline: {why}" for why, n in failed]


def get_identity(explainer: Explainer, material: Material) -> dict[str, Any]:
    """Return the journal columns shared by all of an explainer's explanations from one run's contexts."""
    return {
        "explainer": explainer.name,
        "settings_hash": digest({"explainer": explainer.settings_hash, "material": material.digest}),
        "prompt_hash": explainer.prompt_hash,
        "model": explainer.model,
    }


async def _explain_run(
    task: Task, first: Explainer, draw: int, options: LlmOptions, outcome: Outcome, doing: str = "explain"
) -> None:
    """Explain the task's latents that have no explanation of this ``draw``; ``first`` is the explainer of draw 0."""
    material, explainer = Material.of(task.run), repeat(first, draw, options.temperature)
    same, of_draw = get_identity(explainer, material), f", draw {draw}" if draw else ""
    with open_journal(task.run) as journal, journal.claim():
        if task.draw is not None:
            store_draw(task.run, task.draw, same)
        if draw:
            journal.add_setup(same["settings_hash"], {"first": get_identity(first, material)["settings_hash"]})
        stored = journal.explanations(status="ok", draw=draw, **same)
        # In a random order, so that the latents done when a budget ends are a fair sample.
        todo = sorted(set(task.latents) - set(stored["latent"].tolist()), key=lambda x: permanent_number(0, x))
        evidence = Evidence(explainer, material)
        if evidence.without_logits and not draw:
            outcome.notes.append(f"{task.run.name}: explained without promoted tokens: {evidence.without_logits}")
        before = len(task.latents) - len(todo)
        if before:
            say(f"{task.run.name}{of_draw}: {before} of {len(task.latents)} latents already have an explanation")

        async def explain_one(latent: int) -> None:
            shown = evidence.of(latent)
            eligible, reason = material.sampler.eligible(latent)
            if draw and not eligible:  # counted in draw 0
                return
            text, failure, is_unseen = None, f"too few contexts: {reason}", None
            if eligible:
                explanation = await explainer.explain(latent, *shown)
                text, failure = explanation.text, explanation.failure or ""
                is_unseen = None if text is None else is_quoting_unseen(text, list_texts(*shown))
                journal.add_usage("explain", explainer.model, explanation.usage, latent)
            journal.add_explanation(
                latent=latent,
                contexts=[context.window for context in shown[0]],
                text=text,
                failure=None if text is not None else failure,
                quotes_unseen=is_unseen,
                draw=draw,
                **same,
            )
            if not eligible:
                outcome.left_out[failure] += 1
            elif text is None:
                outcome.failures[failure] += 1
            else:
                outcome.n_new += 1

        if todo:
            words = f"{doing} {task.run.name}{of_draw}"
            await run_with_progress(todo, explain_one, options.concurrency, words, "latents", before)
        done = journal.explanations(status="ok", draw=draw, **same)
    flags, mine = find_flags(done), done[done["latent"].isin(task.latents)]
    outcome.n_done += len(mine)
    for number in mine["id"]:
        outcome.flags.update(flags.get(number, []))
