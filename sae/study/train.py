"""Train studies: all that share a model and a text read one stream of activations together.

A study is one setting and its seeds. Studies share the expensive forward pass of the subject (see
:func:`sae.training.trainer.train_groups`), with the same results as alone. A run has a ``run.json`` once it has begun
and weights once it is done; in between it resumes from its last state.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae.common.amounts import human
from sae.common.errors import BadInput, UserError
from sae.common.files import mapping_differences, write_table
from sae.common.launch import launched
from sae.common.parallel import join_ranks
from sae.common.progress import say
from sae.settings import Settings
from sae.study.controls import add_controls
from sae.study.run import Run, Study, plan_study, study_runs, write_record
from sae.study.stage import (
    Compute,
    Source,
    check_same_inputs,
    describe_inputs,
    get_source_key,
    lock_study,
    open_source,
    resolve_dtype,
)

if TYPE_CHECKING:
    import torch

    from sae.activations.outliers import Outliers
    from sae.activations.stream import TrainingBatches
    from sae.common.precision import Precision
    from sae.common.ranks import Job
    from sae.dictionaries.sae import Sae
    from sae.study.tracking import Tracker
    from sae.training.learner import LogRow, TrainLog
    from sae.training.trainer import Group

_SAMPLE = 16_384  # tokens of the first batch that are searched for outliers


def train_study(
    study: str, seeds: Sequence[int], settings: Settings, root: Path, compute: Compute, parallel: str | None = None
) -> list[Run]:
    return train_studies([Study(study, settings, tuple(seeds))], root, compute, parallel)[0]


def train_studies(
    studies: Sequence[Study],
    root: Path,
    compute: Compute,
    parallel: str | None = None,
    tracker: Tracker | None = None,
    controls: bool = False,
) -> list[list[Run]]:
    """Train one SAE per seed of each study. Returns each study's runs in the order of its seeds.

    Within a study all seeds see the same batches in the same order; trained runs are not touched. Studies with the same
    subject, corpus and batch size share one pass; set ``corpus.max_tokens`` to share a dataset.

    Args:
        parallel: how the ranks of torchrun share the work (see :mod:`sae.common.ranks`).
        tracker: gets each new row of the training logs.
        controls: train the studies' controls too (:mod:`sae.study.controls`); their runs are not returned.
    """
    n_studies = len(studies)
    studies = [replace(s, settings=_bounded(resolve_dtype(s.name, s.settings, root, compute))) for s in studies]
    if controls:
        studies = add_controls(studies, root)
    names = [study.name for study in studies]
    if len(set(names)) < len(names):
        raise BadInput(f"studies {', '.join(names)}: give each name once")
    # Count before anything is written, so that all ranks get the same number.
    missing = sum(_missing(study, root) for study in studies)
    with join_ranks(parallel or _parallel_begun(studies, root), missing, compute.device) as (job, device):
        # Rank 0 decides, since other ranks may read the disk later.
        dtypes = job.first("dtypes", lambda: [study.settings.subject.dtype for study in studies])
        studies = [
            replace(study, settings=study.settings.with_values(subject={"dtype": dtype}))
            for study, dtype in zip(studies, dtypes, strict=True)
        ]
        planned = job.first("planned", lambda: [_planned(study, root) for study in studies])
        runs = [[Run(name, root) for name, _, _ in of_study] for of_study in planned]
        todo = [
            _Todo(study, [(Run(name, root), seed) for name, seed, trained in of_study if not trained])
            for study, of_study in zip(studies, planned, strict=True)
        ]
        todo = [each for each in todo if each.missing]
        if not todo:
            say(f"train: {', '.join(run.name for of_study in runs for run in of_study)}: already trained")
            return runs[:n_studies]
        with ExitStack() as locks:
            for name in sorted(each.study.name for each in todo) if job.rank == 0 else []:
                locks.enter_context(lock_study(root, name))
            for number, sharing in enumerate(_sharing(todo)):
                _train_together(sharing, root, replace(compute, device=device), job, tracker, f"source {number}")
    return runs[:n_studies]


@dataclass(frozen=True)
class _Todo:
    """A study and its untrained runs with their seeds."""

    study: Study
    missing: list[tuple[Run, int]]

    @property
    def settings(self) -> Settings:
        return self.study.settings


def _missing(study: Study, root: Path) -> int:
    return len(set(study.seeds) - {run.seed for run in study_runs(study.name, root) if run.is_trained})


def _parallel_begun(studies: Sequence[Study], root: Path) -> str | None:
    """Return how the ranks share an unfinished training, since its last bits may depend on it; else None."""
    if not launched():
        return None
    begun = [run for study in studies for run in study_runs(study.name, root) if not run.is_trained]
    return next((run.record["ranks"]["parallel"] for run in begun if "ranks" in run.record), None)


def _planned(study: Study, root: Path) -> list[tuple[str, int, bool]]:
    planned = plan_study(study.name, list(study.seeds), study.settings, root)
    later = {"harvest", "contexts"}
    for run in study_runs(study.name, root):
        own, given = (settings.model_dump(include=later) for settings in (run.settings, study.settings))
        if differences := mapping_differences(own, given):
            say(f"{run.name} keeps its own settings ({'; '.join(differences)})")
    for run, _ in planned:
        if run.is_trained and run.state_folder.is_dir():  # a kill came after the weights were written
            shutil.rmtree(run.state_folder, ignore_errors=True)
    return [(run.name, seed, run.is_trained) for run, seed in planned]


def _bounded(settings: Settings) -> Settings:
    """Limit a dataset, which may be endless, to the tokens that the study needs."""
    if settings.corpus.kind != "dataset" or settings.corpus.max_tokens is not None:
        return settings
    return settings.with_values(corpus={"max_tokens": max(settings.training.tokens, settings.harvest.tokens)})


def _sharing(todo: Sequence[_Todo]) -> list[list[_Todo]]:
    """Group the studies that share a source and the sequences of each step."""
    found: dict[Any, list[_Todo]] = {}
    for each in todo:
        key = get_source_key(each.settings), each.settings.training.batch_tokens
        found.setdefault(key, []).append(each)
    return list(found.values())


def _train_together(
    todo: list[_Todo], root: Path, compute: Compute, job: Job, tracker: Tracker | None, label: str
) -> None:
    from sae.training.memory import Part, check_fits, report_out_of_memory
    from sae.training.reading import Reader
    from sae.training.trainer import train_groups

    with job.first_then_others(label):
        source = open_source([each.settings for each in todo], root, compute, cache="fill" if job.rank == 0 else "none")
    batches = [source.batches(each.settings) for each in todo]
    mine = set(job.share([run.name for each in todo for run, _ in each.missing]))
    parts = [
        Part(
            each.settings.training, sum(run.name in mine for run, _ in each.missing), b.stream.width, b.stream.hookpoint
        )
        for each, b in zip(todo, batches, strict=True)
    ]
    provenance = [_provenance(source, each, b, root) for each, b in zip(todo, batches, strict=True)]
    for each, of_study in zip(todo, provenance, strict=True) if job.rank == 0 else []:
        for run, _ in each.missing:
            check_same_inputs(run, of_study)
    check_fits(parts, source.subject.device)
    for each in todo:
        training, stream = each.settings.training, source.stream(each.settings.subject.hookpoint)
        say(
            f"train: {', '.join(run.name for run, _ in each.missing)} · M {training.num_latents}, k {training.k}, "
            f"D {stream.width} · {human(training.tokens)} tokens of {human(source.corpus.n_tokens)} · "
            f"{source.subject.source}, {stream.hookpoint}"
        )
    with _remove_empty_runs(todo, job), report_out_of_memory(parts, source.subject.device):
        read = Reader(job)
        samples = read(batches, 0)
        outliers = _outliers(batches, samples)
        dominated = {
            of.stream.hookpoint: sample[:_SAMPLE].clone()
            for of, sample in zip(batches, samples, strict=True)
            if outliers[of.stream.hookpoint].dominate
        }
        for each, of_study in zip(todo, provenance, strict=True) if job.rank == 0 else []:
            for run, seed in each.missing:
                if not (run.folder / "run.json").is_file():
                    found = {"outlier_tokens": outliers[of_study["hookpoint"]].record()}
                    write_record(run, seed, each.study.name, each.settings, {**of_study, **found, **job.record})
        job.barrier()
        groups = _groups(todo, batches, samples, mine, root)
        del samples
        try:
            train_groups(groups, job, read, _Ending(todo, groups, mine, job, tracker, dominated))
        except BaseException:
            if tracker is not None:
                tracker.abandon()
            raise
    job.barrier()


def _provenance(source: Source, todo: _Todo, batches: TrainingBatches, root: Path) -> dict[str, Any]:
    settings, stream = todo.settings, batches.stream
    return {
        **describe_inputs(settings, source.subject, source.corpus, stream.hookpoint),
        "batch_order": {"seed": settings.corpus.order_seed, "fingerprint": batches.fingerprint, "steps": len(batches)},
        "precision": _precision(todo, stream.device, root),
    }


def _precision(todo: _Todo, device: torch.device, root: Path) -> Precision:
    """Return the precision of the encoder's product: that of the study's first run, if there is one."""
    from sae.common.precision import resolve, warn_if_emulated

    precision = resolve(todo.settings.training.precision, device)
    trained_here = [run for run in study_runs(todo.study.name, root) if not run.imported]
    if trained_here:
        precision = trained_here[0].record.get("precision", "float32")  # old records have none
    warn_if_emulated("training.precision", precision, device)
    return precision


def _outliers(batches: Sequence[TrainingBatches], samples: Sequence[torch.Tensor]) -> dict[str, Outliers]:
    """Measure each hookpoint's outlier tokens on its first batch [B, D]; warn if they dominate FVU."""
    from sae.activations.outliers import find_outliers

    by_hookpoint = {of.stream.hookpoint: sample[:_SAMPLE] for of, sample in zip(batches, samples, strict=True)}
    found = {hookpoint: find_outliers(sample) for hookpoint, sample in by_hookpoint.items()}
    for hookpoint, outliers in found.items():
        if outliers.dominate:
            say(
                f"train: warning: at {hookpoint} {outliers.describe()}; FVU and L0, here and in the report, are mostly "
                "about these few tokens; both are printed without them at the end of the training"
            )
    return found


def _groups(
    todo: Sequence[_Todo],
    batches: Sequence[TrainingBatches],
    samples: Sequence[torch.Tensor],
    mine: set[str],
    root: Path,
) -> list[Group]:
    from sae.dictionaries.architectures import ARCHITECTURES
    from sae.training.trainer import Group

    groups = []
    for each, of_study, sample in zip(todo, batches, samples, strict=True):
        training = each.settings.training
        kind, shape = ARCHITECTURES[training.architecture], (of_study.stream.width, training.num_latents, training.k)
        own = [(run, seed) for run, seed in each.missing if run.name in mine]
        saes = [kind.init(*shape, seed=seed, x_sample=sample).to(of_study.stream.device) for _, seed in own]
        training = training.model_copy(update={"precision": _precision(each, of_study.stream.device, root)})
        groups.append(Group(of_study, saes, training, [run.state_folder for run, _ in own]))
    return groups


class _Ending:
    """Writes each study's weights and logs when it is trained, and sends new rows to the tracker."""

    def __init__(
        self,
        todo: Sequence[_Todo],
        groups: Sequence[Group],
        mine: set[str],
        job: Job,
        tracker: Tracker | None,
        dominated: Mapping[str, torch.Tensor],
    ) -> None:
        self._todo, self._groups, self._mine, self._job, self._tracker = todo, groups, mine, job, tracker
        self._dominated = dominated
        if tracker is not None and job.writes:
            for each in todo:
                for run, _ in each.missing:
                    if run.name in mine:
                        tracker.begin(run)

    def row(self, run: str, row: LogRow) -> None:
        if self._tracker is not None:
            self._tracker.row(run, row)

    def end(self, group: int, logs: list[TrainLog]) -> None:
        from sae.dictionaries.checkpoint import save_sae
        from sae.training.state import discard_states

        own = [run for run, _ in self._todo[group].missing if run.name in self._mine]
        for run, sae, log in zip(own, self._groups[group].saes, logs, strict=True) if self._job.writes else []:
            write_table(run.training_log_path, log.table(), **self._without_outliers(run, sae))
            save_sae(run.folder, sae, run.about())
            discard_states(run.state_folder)
            if self._tracker is not None:
                self._tracker.end(run.name)

    def _without_outliers(self, run: Run, sae: Sae) -> dict[str, Any]:
        """Return FVU and L0 without outlier tokens, as metadata of the log; empty if there are none."""
        from sae.activations.outliers import measure_quality

        sample = self._dominated.get(run.record["hookpoint"])
        if sample is None:
            return {}
        quality = measure_quality(sae, sample)
        if not run.is_control:
            say(f"train: {run.name}: {quality.describe()} (on the first batch)")
        return {"quality": asdict(quality)}


@contextmanager
def _remove_empty_runs(todo: Sequence[_Todo], job: Job) -> Iterator[None]:
    """Delete new runs if training fails before the first checkpoint, so that the name is free again."""
    new = [run for each in todo for run, _ in each.missing if not (run.folder / "run.json").is_file()]
    try:
        yield
    except UserError:
        for run in new if job.rank == 0 else []:
            if not run.is_trained and not (run.state_folder.is_dir() and any(run.state_folder.iterdir())):
                (run.folder / "run.json").unlink(missing_ok=True)
                if run.folder.is_dir() and not any(run.folder.iterdir()):
                    run.folder.rmdir()
        raise
