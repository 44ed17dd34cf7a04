"""The stages that need the weights: train, harvest, align. Each does what is missing and says so.

A stage is *done* when its file is on disk and carries the digest of the inputs that it would have now;
otherwise it runs (again). So the same command after a kill goes on where the disk says it stopped.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from filelock import FileLock, Timeout

from sae.errors import BadInput, NotFound, SettingsDiffer, UserError
from sae.files import digest, mapping_differences, read_table, write_table
from sae.progress import human, say, track
from sae.run import Run, plan_study, study_runs, write_record
from sae.settings import Settings

if TYPE_CHECKING:
    from sae.activations import ActivationStream
    from sae.corpus import Corpus
    from sae.firings import FiringStore
    from sae.subject import Subject


@dataclass(frozen=True)
class Compute:
    """Where the arithmetic happens."""

    device: str = "auto"
    threads: int | None = None

    def resolve(self) -> str:
        """Set the number of threads and return the device's name for torch."""
        import torch

        if self.threads is not None:
            if self.threads < 1:
                raise BadInput(f"--threads {self.threads}: give 1 or more")
            torch.set_num_threads(self.threads)
        if self.device == "auto":
            return "cuda" if torch.cuda.is_available() else "cpu"
        try:
            torch.empty(1, device=self.device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise BadInput(f"--device {self.device!r} cannot be used here ({reason}); try --device cpu") from None
        return self.device


@contextmanager
def only_one(root: Path, study: str) -> Iterator[None]:
    """Keep two commands from writing the same study at once. The lock dies with its process."""
    root.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(root / f".{study}.lock", timeout=0):
            yield
    except Timeout:
        raise UserError(f"another command is at work on study {study!r}; wait for it, then run this again") from None


# --- train ------------------------------------------------------------------------------------------------


def train_study(study: str, seeds: Sequence[int], settings: Settings, root: Path, compute: Compute) -> list[Run]:
    """Train one SAE per seed on one stream of activations. Returns the runs in the order of ``seeds``.

    Every seed sees the same batches in the same order; seeds that exist are not touched.
    """
    settings = _bounded(settings)
    planned = plan_study(study, list(seeds), settings, root)
    runs = [run for run, _ in planned]
    _say_what_is_kept(study, settings, root)
    missing = [(run, seed) for run, seed in planned if not run.trained]
    if not missing:
        say(f"train: {', '.join(r.name for r in runs)}: already trained")
        return runs
    with only_one(root, study):
        _train_missing(study, missing, settings, root, compute)
    return runs


def _say_what_is_kept(study: str, settings: Settings, root: Path) -> None:
    """A run keeps the settings of its later stages too: other ones given now take no effect, which has to be said."""
    later = {"harvest", "contexts"}
    for run in study_runs(study, root):
        differences = mapping_differences(run.settings.model_dump(include=later), settings.model_dump(include=later))
        if differences:
            say(f"{run.name} keeps the settings that it was begun with ({'; '.join(differences)})")


def _train_missing(
    study: str, missing: list[tuple[Run, int]], settings: Settings, root: Path, compute: Compute
) -> None:
    from sae.activations import TrainingBatches
    from sae.architectures import TopKSae
    from sae.checkpoint import save_sae
    from sae.trainer import train
    from sae.training_state import discard_states

    subject, corpus, stream = _open_stream(settings, root, compute)
    batches = TrainingBatches(
        stream,
        tokens=settings.training.tokens,
        batch_tokens=settings.training.batch_tokens,
        order_seed=settings.corpus.order_seed,
    )
    hookpoint = subject.resolve(settings.subject.hookpoint)
    provenance = {
        "subject": {
            "source": settings.subject.model,
            "fingerprint": subject.fingerprint,
            "dtype": settings.subject.dtype,
            "d_in": stream.width,
        },
        "hookpoint": hookpoint,
        "corpus": {"key": corpus.key, "fingerprint": corpus.fingerprint, **corpus.info},
        "batch_order": {"seed": settings.corpus.order_seed, "fingerprint": batches.fingerprint, "steps": len(batches)},
    }
    for run, seed in missing:
        _check_same_inputs(run, provenance)
        if not (run.folder / "run.json").is_file():
            write_record(run, seed, study, settings, provenance)
    training = settings.training
    say(
        f"train: {', '.join(r.name for r, _ in missing)} · M {training.num_latents}, k {training.k}, D {stream.width}"
        f" · {human(training.tokens)} tokens of {human(corpus.n_tokens)} · {subject.source}, {hookpoint}"
    )
    sample = batches[0]
    saes = [
        TopKSae.init(stream.width, training.num_latents, training.k, seed=seed, x_sample=sample).to(stream.device)
        for _, seed in missing
    ]
    logs = train(batches, saes, training, [run.state_folder for run, _ in missing])
    for (run, _), sae, log in zip(missing, saes, logs, strict=True):
        write_table(run.training_log_path, log.table())
        save_sae(run.folder, sae)
        discard_states(run.state_folder)


def _open_stream(settings: Settings, root: Path, compute: Compute) -> tuple[Subject, Corpus, ActivationStream]:
    """The subject, its corpus and the stream of its activations, with the cache that all stages share."""
    from sae.activations import ActivationCache, ActivationStream
    from sae.corpus import prepare_corpus
    from sae.subject import Subject, load_tokenizer

    device = compute.resolve()
    subject = Subject.load(settings.subject.model, device=device, dtype=settings.subject.dtype)
    subject.resolve(settings.subject.hookpoint)  # a wrong name is told before the text is read
    _, tokenizer_fingerprint = load_tokenizer(settings.subject.model)
    corpus = prepare_corpus(settings.corpus, subject.tokenizer, tokenizer_fingerprint, root)
    cache = ActivationCache.for_stream(corpus, subject, settings.subject.hookpoint)
    return subject, corpus, ActivationStream(subject, corpus, settings.subject.hookpoint, cache)


def _bounded(settings: Settings) -> Settings:
    """A data set, which may have no end, is read no further than the study needs: recorded as if it had been asked."""
    if settings.corpus.kind != "dataset" or settings.corpus.max_tokens is not None:
        return settings
    return settings.with_values(corpus={"max_tokens": max(settings.training.tokens, settings.harvest.tokens)})


def _check_same_inputs(run: Run, provenance: dict[str, Any]) -> None:
    """A run that was begun goes on only from the very text and model that it began with."""
    if not (run.folder / "run.json").is_file():
        return
    differences = [
        f"{what}.fingerprint: {run.record[what]['fingerprint'][:12]} there, {provenance[what]['fingerprint'][:12]} now"
        for what in ("subject", "corpus", "batch_order")
        if run.record[what]["fingerprint"] != provenance[what]["fingerprint"]
    ]
    if differences:
        raise SettingsDiffer(
            f"run {run.name!r} was begun from something else ({'; '.join(differences)}): a model or text has changed "
            "under the same name; give the study another --name"
        )


# --- harvest ----------------------------------------------------------------------------------------------


def harvest_runs(runs: Sequence[Run], compute: Compute, tokens: int | None = None) -> None:
    """Fill the firing stores of ``runs``, those of one study in one pass over the subject model.

    Without ``tokens`` a store that is there is enough; with it, one that holds fewer is added to.
    """
    for study, of_study in _by_study(runs).items():
        for run in of_study:
            _need_trained(run)
        todo = [run for run in of_study if tokens is not None or not is_harvested(run)]
        if todo:
            with only_one(todo[0].root, study):
                _harvest_study(todo, compute, tokens or todo[0].settings.harvest.tokens)


def _harvest_study(runs: list[Run], compute: Compute, tokens: int) -> None:
    from sae.firings import FiringStore, latent_statistics
    from sae.harvest import harvest

    settings = runs[0].settings
    subject, corpus, stream = _open_stream(settings, runs[0].root, compute)
    for run in runs:
        _check_same_inputs(
            run,
            {
                "subject": {"fingerprint": subject.fingerprint},
                "corpus": {"fingerprint": corpus.fingerprint},
                "batch_order": run.record["batch_order"],
            },
        )
    if tokens > corpus.n_tokens:
        say(f"harvest: {human(tokens)} tokens asked for, the corpus has {human(corpus.n_tokens)}; taking all of it")
    harvest(
        stream,
        {run.name: run.sae().to(stream.device) for run in runs},
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
    whole_study = [run for run in study_runs(runs[0].study, runs[0].root) if run.trained]
    if stream.cache is not None and all(is_harvested(run) for run in whole_study):
        stream.cache.delete()  # every later stage is a look-up in the firing stores


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

    compute.resolve()
    weights: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def rows(run: Run) -> tuple[np.ndarray, np.ndarray]:
        if run.name not in weights:
            sae = run.sae()
            weights[run.name] = (sae.W_enc.numpy(), sae.W_dec.numpy())
        return weights[run.name]

    with track("align", len(pairs), "pairs") as bar:
        for a, b in pairs:
            alignment = align(*rows(a), *rows(b), names=(a.name, b.name))
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
    return overlap(names, tables, {run.name: alive(run) for run in runs}, threshold).as_dict()


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
            f"run {run.name!r} is its study's only run, so nothing can be called shared or unshared; train another "
            f"seed (`python cli.py train --name {run.study} --seeds …`), or leave the choice by sharing out"
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
        "num_latents": training.num_latents,
        "k": training.k,
        "tokens": training.tokens,
        "trained": run.trained,
        "harvested": table["firing"] and run.trained,
        "aligned": table["overlap"],
        "explained": run.journal_path.exists(),
        "scored": table["scores"],
    }


def _need_trained(run: Run) -> None:
    if not run.trained:
        raise NotFound(
            f"run {run.name!r} is not trained to its end; give the `train` command that began it again and it goes on"
        )


def _by_study(runs: Sequence[Run]) -> dict[str, list[Run]]:
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(run.study, []).append(run)
    return found
