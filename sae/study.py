"""The stages that need the weights: harvest and align (:mod:`sae.train_stage` trains). Each does what is missing.

A stage is *done* when its file is on disk and carries the digest of the inputs that it would have now;
otherwise it runs (again). So the same command after a kill goes on where the disk says it stopped.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sae.errors import BadInput, NotFound
from sae.files import digest, read_table, write_table
from sae.progress import human, say, track
from sae.run import Run, all_runs, study_runs
from sae.stage import Compute, Source, check_same_inputs, only_one, open_source, shares_source

if TYPE_CHECKING:
    from sae.activations import ActivationStream
    from sae.dictionary import Sae
    from sae.firings import FiringStore


# --- harvest ----------------------------------------------------------------------------------------------


def harvest_runs(runs: Sequence[Run], compute: Compute, tokens: int | None = None) -> None:
    """Fill the firing stores of ``runs``, those of one study in one pass over the subject model.

    Studies of other hookpoints of the same model and text are harvested one after the other, out of what the first
    pass has put into their caches. Without ``tokens`` a store that is there is enough; with it, one that holds fewer is
    added to.
    """
    for run in runs:
        _need_trained(run)
    sources: dict[Any, list[Run]] = {}
    for run in runs:
        if tokens is not None or not is_harvested(run):
            sources.setdefault(shares_source(run.settings), []).append(run)
    for sharing in sources.values():
        studies = _by_study(sharing)
        with ExitStack() as locks:
            for study in sorted(studies):
                locks.enter_context(only_one(sharing[0].root, study))
            source = open_source([run.settings for run in sharing], sharing[0].root, compute)
            for of_study in studies.values():
                _harvest_study(source, of_study, tokens or of_study[0].settings.harvest.tokens)
            _delete_caches_of_no_more_use(source, sharing[0].root)


def _harvest_study(source: Source, runs: list[Run], tokens: int) -> None:
    from sae.firings import FiringStore, latent_statistics
    from sae.harvest import harvest

    settings, corpus = runs[0].settings, source.corpus
    stream = source.stream(settings.subject.hookpoint)
    for run in runs:
        check_same_inputs(
            run,
            {
                "subject": {"fingerprint": source.subject.fingerprint},
                "corpus": {"fingerprint": corpus.fingerprint},
                "batch_order": run.record["batch_order"],
            },
        )
    saes = {run.name: run.sae().to(stream.device) for run in runs}
    for name, sae in saes.items():
        _check_width(name, sae, stream)
    if tokens > corpus.n_tokens:
        say(f"harvest: {human(tokens)} tokens asked for, the corpus has {human(corpus.n_tokens)}; taking all of it")
    harvest(
        stream,
        saes,
        {run.name: run.firings_folder for run in runs},
        tokens=min(tokens, corpus.n_tokens),
        window=settings.harvest.window,
        order_seed=settings.corpus.order_seed,
        weights={run.name: run.weights_digest for run in runs},
    )
    for run in runs:
        store = FiringStore.open(run.firings_folder)
        inputs = _firing_inputs(run, store)
        if run.stage_inputs("firing") != inputs:
            write_table(
                run.stage_path("firing"),
                latent_statistics(store),
                inputs=inputs,
                n_tokens=store.n_tokens - store.n_special_tokens,
            )


def _check_width(name: str, sae: Sae, stream: ActivationStream) -> None:
    if sae.d_in != stream.width:
        raise BadInput(
            f"run {name!r} is an SAE of activations of width {sae.d_in}, and {stream.hookpoint} of model "
            f"{stream.subject.source!r} has width {stream.width}; give the model and hookpoint that it was trained on"
        )


def _delete_caches_of_no_more_use(source: Source, root: Path) -> None:
    """Once every run that reads a hookpoint's activations is harvested, all later stages are look-ups in the stores."""
    for hookpoint, stream in source.streams.items():
        readers = [
            run
            for run in all_runs(root)
            if run.record["corpus"]["key"] == source.corpus.key and run.record["hookpoint"] == hookpoint
        ]
        if stream.cache is not None and all(is_harvested(run) for run in readers if _is_or_will_be_trained(run)):
            stream.cache.delete()


def _is_or_will_be_trained(run: Run) -> bool:
    return run.trained or run.state_folder.is_dir()


def _firing_inputs(run: Run, store: FiringStore) -> str:
    return digest({"weights": run.weights_digest, "store": store.digest})


def is_harvested(run: Run) -> bool:
    """Whether the run's firing table is there and is that of its weights and its store."""
    from sae.firings import FiringStore

    if not run.stage_path("firing").exists():
        return False
    try:
        return run.stage_inputs("firing") == _firing_inputs(run, FiringStore.open(run.firings_folder))
    except NotFound:
        return False


# --- align ------------------------------------------------------------------------------------------------


def align_runs(runs: Sequence[Run], compute: Compute) -> None:
    """Match every pair of ``runs``, and bring the overlap tables of their studies up to date."""
    from sae.alignment import pairs

    by_name = {run.name: run for run in runs}
    wanted = pairs([run.name for run in runs])
    root = runs[0].root
    for run in runs:
        _need_trained(run)
    studies = _by_study(runs)
    if len(studies) > 1:
        raise BadInput(
            f"runs {', '.join(by_name)} belong to different studies ({', '.join(studies)}): they did not see the same "
            "batches, so what differs is not the seed alone; align runs of one study"
        )
    ensure_harvested(runs, compute)
    with only_one(root, runs[0].study):
        todo = [(a, b) for a, b in wanted if not is_aligned(by_name[a], by_name[b])]
        if todo:
            _align_pairs([(by_name[a], by_name[b]) for a, b in todo], compute)
        for run in study_runs(runs[0].study, root):
            if run.trained:
                _write_overlap(run)


def _align_pairs(pairs: list[tuple[Run, Run]], compute: Compute) -> None:
    from sae.alignment import align, write_alignment

    device = compute.resolve()
    weights: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def rows(run: Run) -> tuple[np.ndarray, np.ndarray]:
        if run.name not in weights:
            sae = run.sae()
            weights[run.name] = (sae.W_enc.numpy(), sae.W_dec.numpy())
        return weights[run.name]

    with track("align", len(pairs), "pairs") as bar:
        for a, b in pairs:
            alignment = align(*rows(a), *rows(b), names=(a.name, b.name), device=device)
            write_alignment(a.root / "alignments", a.name, b.name, alignment, _pair_inputs(a, b))
            bar.advance(note=f"{a.name} × {b.name}")


def _pair_inputs(a: Run, b: Run) -> str:
    return digest(sorted([[a.name, a.weights_digest], [b.name, b.weights_digest]]))


def is_aligned(a: Run, b: Run) -> bool:
    """Whether the pair's alignment is there and is that of its weights."""
    from sae.alignment import alignment_inputs

    return alignment_inputs(a.root / "alignments", a.name, b.name) == _pair_inputs(a, b)


def _write_overlap(run: Run) -> None:
    """The run's overlap table, over the siblings that it is aligned with; kept where it is up to date."""
    from sae.alignment import read_alignment
    from sae.overlap import latent_table

    siblings, inputs = _overlap_inputs(run)
    if not siblings or not is_harvested(run) or run.stage_inputs("overlap") == inputs:
        return
    tables = {(run.name, x.name): read_alignment(run.root / "alignments", run.name, x.name).a for x in siblings}
    table = latent_table(run.name, [run.name, *(x.name for x in siblings)], tables, alive(run))
    write_table(run.stage_path("overlap"), table, inputs=inputs, against=[x.name for x in siblings])


def _overlap_inputs(run: Run) -> tuple[list[Run], str]:
    """The siblings that the run is aligned with, and the digest of what its overlap table is made from."""
    siblings = [other for other in run.siblings() if is_aligned(run, other)]
    return siblings, digest([_pair_inputs(run, other) for other in siblings] + [run.stage_inputs("firing")])


def alive(run: Run) -> np.ndarray:
    """Which latents fired in the harvest: bool [M]."""
    return ~read_table(run.stage_path("firing"))["dead"].to_numpy(dtype=bool)


def overlap_of(runs: Sequence[Run], threshold: float = 0.7) -> dict[str, Any]:
    """What the aligned ``runs`` share, as one JSON value; see :class:`sae.overlap.StudyOverlap`."""
    from sae.alignment import both_ways
    from sae.overlap import overlap

    names = [run.name for run in runs]
    tables = both_ways(runs[0].root / "alignments", names)
    shared = overlap(names, tables, {run.name: alive(run) for run in runs}, threshold).as_dict()
    return {**shared, "seeds": {run.name: run.seed for run in runs}}


# --- what later stages ask for ----------------------------------------------------------------------------


def ensure_harvested(runs: Sequence[Run], compute: Compute) -> None:
    """Harvest those of ``runs`` that are not, saying so."""
    missing = [run for run in runs if not is_harvested(run)]
    if missing:
        say(f"{', '.join(r.name for r in missing)}: not harvested yet, doing that first")
        harvest_runs(missing, compute)


def ensure_aligned(run: Run, compute: Compute) -> None:
    """Align ``run`` with all its siblings where it is not, saying so."""
    siblings = run.siblings()
    if not siblings:
        raise BadInput(
            f"run {run.name!r} is its study's only run, so nothing can be called shared or unshared; "
            f"{run.advice_to_add_another()}, or leave the choice by sharing out"
        )
    missing = [other for other in siblings if not is_aligned(run, other)]
    if missing:
        say(f"{run.name}: not aligned with {', '.join(r.name for r in missing)} yet, doing that first")
    if missing or run.stage_inputs("overlap") != _overlap_inputs(run)[1]:  # a kill may fall between the two
        align_runs([run, *siblings], compute)


def progress_of(run: Run) -> dict[str, Any]:
    """How far a run has come: one JSON value, stage by stage."""
    record = run.record
    training = run.settings.training
    table = {stage: run.stage_path(stage).exists() for stage in ("firing", "overlap", "scores")}
    return {
        "name": run.name,
        "study": run.study,
        "seed": run.seed,
        "created": record["created"],
        "subject": record["subject"]["source"],
        "hookpoint": record["hookpoint"],
        "architecture": training.architecture,
        "num_latents": training.num_latents,
        "k": run.k,
        "tokens": None if run.imported else training.tokens,
        "trained": run.trained,
        "harvested": table["firing"] and run.trained,
        "aligned": table["overlap"],
        "explained": run.journal_path.exists(),
        "scored": table["scores"],
    }


def _need_trained(run: Run) -> None:
    if not run.trained:
        verb = "import" if run.imported else "train"
        raise NotFound(
            f"run {run.name!r} is not {verb}ed to its end; give the `{verb}` command that began it again and it goes on"
        )


def _by_study(runs: Sequence[Run]) -> dict[str, list[Run]]:
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(run.study, []).append(run)
    return found
