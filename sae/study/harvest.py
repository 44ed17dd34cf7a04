"""Harvest runs: write their firing stores, and check whether these are up to date.

A stage is *done* when its file carries the digest of its present inputs; otherwise it runs, and resumes.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae.common.amounts import human
from sae.common.errors import BadInput, NotFound, UserError
from sae.common.files import digest, write_table
from sae.common.parallel import join_ranks_at_text
from sae.common.progress import say
from sae.common.ranks import Job
from sae.study.controls import find_controls
from sae.study.run import Run, all_runs, split_readable
from sae.study.stage import (
    Compute,
    Source,
    check_same_inputs,
    get_source_key,
    limit_norms,
    lock_study,
    open_source,
)

if TYPE_CHECKING:
    from sae.firings.store import FiringStore


def harvest_runs(runs: Sequence[Run], compute: Compute, tokens: int | None = None) -> None:
    """Fill the firing stores of ``runs`` and of their studies' controls, in one pass over the subject model.

    Several hookpoints of one model and text follow one another, from the caches that the first pass has filled.
    ``tokens`` extends stores that hold fewer.
    """
    for run in runs:
        check_trained(run)
    controls = {control.name: control for run in runs for control in find_controls(run).values()}
    runs = [*runs, *(control for name, control in controls.items() if name not in {run.name for run in runs})]
    with join_ranks_at_text(compute.device) as (job, device):
        # Rank 0 decides, since other ranks may read the disk later.
        lacking = job.first("lacking", lambda: [r.name for r in runs if tokens is not None or not is_harvested(r)])
        sources: dict[Any, list[Run]] = {}
        for run in runs:
            if run.name in lacking:
                sources.setdefault(get_source_key(run.settings), []).append(run)
        for number, sharing in enumerate(sources.values()):
            _harvest_sharing(sharing, replace(compute, device=device), tokens, job, f"source {number}")


def _harvest_sharing(sharing: list[Run], compute: Compute, tokens: int | None, job: Job, label: str) -> None:
    with ExitStack() as locks:
        for study in sorted({run.study for run in sharing}) if job.rank == 0 else []:
            locks.enter_context(lock_study(sharing[0].root, study))
        with job.first_then_others(label):
            settings = [run.settings for run in sharing]
            source = open_source(settings, sharing[0].root, compute, cache="fill" if job.rank == 0 else "read")
        groups: dict[Any, list[Run]] = {}  # one pass each: the same hookpoint, tokens and order
        for run in sharing:
            limit = run.record["skipped"]["norm_limit"] if "skipped" in run.record else None
            key = run.record["hookpoint"], run.settings.harvest, run.settings.corpus.order_seed, limit
            groups.setdefault(key, []).append(run)
        for group in groups.values():
            _harvest_group(source, group, tokens or group[0].settings.harvest.tokens, job)
        job.barrier()
        if job.rank == 0:
            _delete_unused_caches(source, sharing[0].root)


def _harvest_group(source: Source, runs: list[Run], tokens: int, job: Job) -> None:
    from sae.firings.harvest import harvest
    from sae.firings.store import latent_statistics

    settings, corpus = runs[0].settings, source.corpus
    stream = source.stream(settings.subject.hookpoint)
    limit_norms(stream, settings, runs[0].record.get("skipped"))
    for run in runs:
        check_same_inputs(run, subject=source.subject.fingerprint, corpus=corpus.fingerprint)
    saes = {run.name: run.sae().to(stream.device) for run in runs}
    for name, sae in saes.items():
        if sae.d_in != stream.width:
            raise BadInput(
                f"run {name!r} reads activations of width {sae.d_in}, but {stream.hookpoint} of model "
                f"{stream.subject.source!r} has width {stream.width}; give the model and hookpoint of its training"
            )
    if tokens > corpus.n_tokens:
        say(f"harvest: the corpus has {human(corpus.n_tokens)} tokens, fewer than {human(tokens)}; using all of it")
    harvest(
        stream,
        saes,
        {run.name: run.firings_folder for run in runs},
        {run.name: run.weights_digest for run in runs},
        tokens=min(tokens, corpus.n_tokens),
        window=settings.harvest.window,
        order_seed=settings.corpus.order_seed,
        ids={run.name: run.id for run in runs},
        ranks=job,
    )
    for run in runs if job.rank == 0 else []:
        store = run.store()
        inputs = _firing_inputs(run, store)
        if run.stage_inputs("firing") != inputs:
            n_tokens = store.n_encoded_tokens
            write_table(run.stage_path("firing"), latent_statistics(store), inputs=inputs, n_tokens=n_tokens)


def _delete_unused_caches(source: Source, root: Path) -> None:
    """Delete the activation caches of hookpoints whose runs are all harvested: later stages read the stores."""
    every, damaged = split_readable(all_runs(root))
    if damaged:  # they may need a cache
        return
    readers = [run for run in every if run.record["corpus"]["key"] == source.corpus.key]
    begun = [run for run in readers if run.is_trained or run.state_folder.is_dir()]
    for hookpoint, stream in source.streams.items():
        own = [run for run in begun if run.record["hookpoint"] == hookpoint]
        try:
            is_unused = all(map(is_harvested, own))
        except (UserError, OSError):  # another run is damaged and may have to be harvested again
            continue
        if stream.cache is not None and is_unused:
            stream.cache.delete()


def _firing_inputs(run: Run, store: FiringStore) -> str:
    return digest({"weights": run.weights_digest, "store": store.digest})


def is_harvested(run: Run) -> bool:
    """Return whether the run's firing table exists and matches its weights and its store."""
    if not run.stage_path("firing").exists():
        return False
    try:
        return run.stage_inputs("firing") == _firing_inputs(run, run.store())
    except NotFound:
        return False


def ensure_harvested(runs: Sequence[Run], compute: Compute) -> None:
    """Harvest the runs that are not harvested, and print a line."""
    missing = [run for run in runs if not is_harvested(run)]
    if missing:
        say(f"{', '.join(r.name for r in missing)}: not harvested yet, harvesting first")
        harvest_runs(missing, compute)


def check_trained(run: Run) -> None:
    """Raise NotFound if training, or the import, has not finished."""
    if not run.is_trained:
        noun, verb = ("import", "import") if run.imported else ("training", "train")
        raise NotFound(f"run {run.name!r} has not finished {noun}; run the same `{verb}` command to resume")


def group_by_study(runs: Sequence[Run]) -> dict[str, list[Run]]:
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(run.study, []).append(run)
    return found
