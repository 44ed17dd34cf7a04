"""Train studies: all that share a model and a text read one stream of activations together.

A study is one setting and its seeds. Studies share the expensive forward pass of the subject (see
:func:`sae.training.trainer.train_groups`), with the same results as alone. A run has a ``run.json`` once it has begun
and weights once it is done; in between it resumes from its last state.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sae.common.amounts import human
from sae.common.errors import BadInput
from sae.common.files import mapping_differences, write_table
from sae.common.launch import launched
from sae.common.parallel import join_ranks
from sae.common.progress import say
from sae.study.controls import add_controls, get_parent
from sae.study.run import Run, Study, plan_study, remove_failed_runs, study_runs, write_record
from sae.study.stage import (
    Compute,
    Source,
    check_same_inputs,
    describe_inputs,
    find_skipped,
    fit_to_study,
    get_source_key,
    limit_norms,
    lock_study,
    open_source,
)

if TYPE_CHECKING:
    import torch

    from sae.activations.outliers import Compared, Outliers
    from sae.activations.stream import ActivationStream, TrainingBatches
    from sae.common.precision import Precision
    from sae.common.ranks import Job
    from sae.dictionaries.sae import Sae
    from sae.study.tracking import Tracker
    from sae.training.learner import LogRow, TrainLog
    from sae.training.trainer import Group


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
    studies = [replace(s, settings=s.settings.limit_dataset(s.settings.most_tokens)) for s in studies]
    studies = [replace(s, settings=fit_to_study(s.name, s.settings, root, compute)) for s in studies]
    if controls:
        studies = add_controls(studies, root)
    names = [study.name for study in studies]
    if len(set(names)) < len(names):
        raise BadInput(f"studies {', '.join(names)}: give each name once")
    # Count before anything is written, so that all ranks get the same number.
    missing = sum(_count_missing(study, root) for study in studies)
    with join_ranks(parallel or _find_begun_mode(studies, root), missing, compute.device) as (job, device):
        # Rank 0 decides, since other ranks may read the disk later.
        dtypes = job.first("dtypes", lambda: [study.settings.subject.dtype for study in studies])
        settings = [s.settings.with_values(subject={"dtype": x}) for s, x in zip(studies, dtypes, strict=True)]
        studies = [replace(study, settings=of_study) for study, of_study in zip(studies, settings, strict=True)]
        planned = job.first("planned", lambda: [_plan(study, root) for study in studies])
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
            for number, sharing in enumerate(_group_by_source(todo)):
                _train_together(sharing, root, replace(compute, device=device), job, tracker, f"source {number}")
    return runs[:n_studies]


class _Todo(NamedTuple):
    """A study and its untrained runs with their seeds."""

    study: Study
    missing: list[tuple[Run, int]]


class _Work(NamedTuple):
    """A study to train, with its batches."""

    study: Study
    missing: list[tuple[Run, int]]  # the untrained runs and their seeds
    own: list[tuple[Run, int]]  # those of them that this rank trains
    batches: TrainingBatches
    targets: TrainingBatches | None  # what transcoders predict
    record: dict[str, Any]  # the inputs, for ``run.json``

    @property
    def stream(self) -> ActivationStream:
        return self.batches.stream

    @property
    def output(self) -> ActivationStream:
        """The stream of what is reconstructed."""
        return (self.targets or self.batches).stream


def _count_missing(study: Study, root: Path) -> int:
    return len(set(study.seeds) - {run.seed for run in study_runs(study.name, root) if run.is_trained})


def _find_begun_mode(studies: Sequence[Study], root: Path) -> str | None:
    """Return how the ranks share an unfinished training, whose last bits may depend on it; else None."""
    if not launched():
        return None
    begun = [run for study in studies for run in study_runs(study.name, root) if not run.is_trained]
    return next((run.record["ranks"]["parallel"] for run in begun if "ranks" in run.record), None)


def _plan(study: Study, root: Path) -> list[tuple[str, int, bool]]:
    planned = plan_study(study.name, list(study.seeds), study.settings, root)
    later = {"harvest", "contexts"}
    for run in study_runs(study.name, root):
        own, given = (settings.model_dump(include=later) for settings in (run.settings, study.settings))
        if differences := mapping_differences(own, given):
            say(f"{run.name} keeps its own settings ({'; '.join(differences)})")
    for run, _ in planned:
        if run.is_trained and run.state_folder.is_dir():  # a kill came after the weights were written
            run.seal()
            shutil.rmtree(run.state_folder, ignore_errors=True)
    return [(run.name, seed, run.is_trained) for run, seed in planned]


def _group_by_source(todo: Sequence[_Todo]) -> list[list[_Todo]]:
    """Group the studies that share a source and the sequences of each step."""
    found: dict[Any, list[_Todo]] = {}
    for each in todo:
        key = get_source_key(each.study.settings), each.study.settings.training.batch_tokens
        found.setdefault(key, []).append(each)
    return list(found.values())


def _train_together(
    todo: list[_Todo], root: Path, compute: Compute, job: Job, tracker: Tracker | None, label: str
) -> None:
    from sae.activations.outliers import Compared
    from sae.activations.stream import Reader
    from sae.training.memory import Part, check_fits, report_out_of_memory
    from sae.training.trainer import train_groups

    with job.first_then_others(label):
        settings = [each.study.settings for each in todo]
        source = open_source(settings, root, compute, cache="fill" if job.rank == 0 else "none")
    skipped = _limit_norms(todo, source, root, job, label)
    mine = set(job.share([run.name for each in todo for run, _ in each.missing]))
    # Rank 0 decides, since other machines may have other instructions.
    precisions = job.first(f"{label} precision", lambda: [_precision(x, source.subject.device, root) for x in todo])
    works = [_prepare(each, mine, source, precision, skipped) for each, precision in zip(todo, precisions, strict=True)]
    new: list[tuple[_Work, Run, int]] = []
    for work in works if job.rank == 0 else []:
        for run, seed in work.missing:
            check_same_inputs(run, **{x: work.record[x]["fingerprint"] for x in ("subject", "corpus", "batch_order")})
            if not run.has_begun:
                new.append((work, run, seed))
    parts = [Part(w.study.settings.training, len(w.own), w.stream.width, w.stream.hookpoint) for w in works]
    check_fits(parts, source.subject.device)
    for work in works:
        training = work.study.settings.training
        say(
            f"train: {', '.join(run.name for run, _ in work.missing)} · M {training.num_latents}, k {training.k}, "
            f"D {work.stream.width} · {human(training.tokens)} tokens of {human(source.corpus.n_tokens)} · "
            f"{source.subject.source}, {work.stream.hookpoint}{f' → {work.output.hookpoint}' if work.targets else ''}"
        )
    with remove_failed_runs([run for _, run, _ in new]), report_out_of_memory(parts, source.subject.device):
        read = Reader(job)
        outputs = [work.targets or work.batches for work in works]
        every = [batches for work in works for batches in (work.batches, work.targets) if batches is not None]
        first = read(every, 0)
        samples = {batches.rows_source: x for batches, x in zip(every, first, strict=True)}
        batches = {of.rows_source: of for of in outputs}
        outliers = {source: _find_outliers(of, samples[source]) for source, of in batches.items()}
        compared = {
            of.hookpoint: Compared.with_skipped(of)
            if of.stream.skip
            else Compared.without_outliers(samples[of.rows_source])
            for of in (work.batches for work in works if work.targets is None)
            if job.writes and (outliers[of.rows_source].dominate or of.stream.skip)
        }
        for work, run, seed in new:
            found = {"outlier_tokens": outliers[(work.targets or work.batches).rows_source].record()}
            write_record(run, seed, work.study.name, work.study.settings, {**work.record, **found, **job.record})
        job.barrier()
        groups = [_make_group(work, samples[of.rows_source]) for work, of in zip(works, outputs, strict=True)]
        del first, samples
        pairs = [list(zip((run for run, _ in w.own), g.saes, strict=True)) for w, g in zip(works, groups, strict=True)]
        ending = _Ending(pairs if job.writes else [[] for _ in pairs], tracker, compared)
        written = [run for of_group in ending.dictionaries for run, _ in of_group]
        with nullcontext() if tracker is None else tracker.follow(written):
            train_groups(groups, job, read, ending)
    job.barrier()


def _limit_norms(todo: Sequence[_Todo], source: Source, root: Path, job: Job, label: str) -> dict[str, dict[str, Any]]:
    """Let each stream skip the same tokens as the runs that have begun; return its entry of ``run.json``.

    Rank 0 measures the limits on norms that no run has, and tells the others.
    """
    sharing: dict[str, list[Study]] = {}
    for each in todo:
        sharing.setdefault(source.subject.resolve(each.study.settings.subject.hookpoint), []).append(each.study)
    found = {}
    for hookpoint, studies in sharing.items():
        stream, settings = source.streams[hookpoint], studies[0].settings
        names = [name for study in studies for name in (study.name, get_parent(study))]
        measure = functools.partial(limit_norms, stream, settings)
        found[hookpoint] = job.first(f"{label} skipped {hookpoint}", lambda: measure(find_skipped(names, root)))  # noqa: B023
        measure(found[hookpoint].get("skipped"))
    return found


def _prepare(
    todo: _Todo, mine: Collection[str], source: Source, precision: Precision, skipped: Mapping[str, dict[str, Any]]
) -> _Work:
    settings, batches = todo.study.settings, source.batches(todo.study.settings)
    targets = None if settings.subject.target is None else source.batches(settings, settings.subject.target)
    record = describe_inputs(settings, source.subject, source.corpus, batches.stream.hookpoint, batches)
    record |= skipped[batches.stream.hookpoint]
    own = [(run, seed) for run, seed in todo.missing if run.name in mine]
    return _Work(*todo, own, batches, targets, {**record, "precision": precision})


def _precision(todo: _Todo, device: torch.device, root: Path) -> Precision:
    """Return the precision of the encoder's product: that of the study's first run, if there is one."""
    from sae.common.precision import resolve, warn_if_emulated

    precision = resolve(todo.study.settings.training.precision, device)
    trained_here = [run for run in study_runs(todo.study.name, root) if not run.imported]
    if trained_here:
        precision = trained_here[0].record.get("precision", "float32")  # old records have none
    warn_if_emulated("training.precision", precision, device)
    return precision


def _find_outliers(batches: TrainingBatches, x: torch.Tensor) -> Outliers:
    """Measure the outlier tokens of the first batch ``x`` [B, D]; warn, with the flag that helps, if they dominate."""
    from sae.activations.outliers import SAMPLE, advise, find_outliers

    outliers = find_outliers(x[:SAMPLE])
    if outliers.dominate:
        is_target = batches.masked_by is not batches.stream  # of transcoders, which are not measured without them
        more = "" if is_target else "; both are printed without them at the end of the training"
        say(
            f"train: warning: at {batches.stream.hookpoint} {outliers.describe()}; FVU and L0, here and in the report, "
            f"are mostly about these few tokens{more}; {advise(batches, x[:SAMPLE])}"
        )
    return outliers


def _make_group(work: _Work, sample: torch.Tensor) -> Group:
    from sae.dictionaries.architectures import ARCHITECTURES
    from sae.dictionaries.sae import draw_transcoder
    from sae.training.trainer import Group

    training = work.study.settings.training
    kind, shape = ARCHITECTURES[training.architecture], (work.stream.width, training.num_latents, training.k)
    if work.targets is None:
        saes = [kind.init(*shape, seed=seed, x_sample=sample).to(work.stream.device) for _, seed in work.own]
    else:
        sizes, device = (work.stream.width, work.output.width), work.stream.device
        saes = [
            draw_transcoder(kind, sizes, *shape[1:], seed, training.skip, sample).to(device) for _, seed in work.own
        ]
    training = training.model_copy(update={"precision": work.record["precision"]})
    return Group(work.batches, saes, training, [run.state_folder for run, _ in work.own], work.targets)


@dataclass(frozen=True)
class _Ending:
    """Writes each study's weights and logs when it is trained, and sends new rows to the tracker."""

    dictionaries: list[list[tuple[Run, Sae]]]  # those that this rank writes, of each group
    tracker: Tracker | None
    compared: Mapping[str, Compared]  # the first batch of hookpoints that have outliers or skipped tokens

    def row(self, run: str, row: LogRow) -> None:
        if self.tracker is not None:
            self.tracker.row(run, row)

    def end(self, group: int, logs: list[TrainLog]) -> None:
        from sae.dictionaries.checkpoint import save_sae
        from sae.training.state import discard_states

        for (run, sae), log in zip(self.dictionaries[group], logs, strict=False):
            write_table(run.training_log_path, log.table(), **self._with_and_without(run, sae))
            save_sae(run.folder, sae, run.about())
            run.seal()
            discard_states(run.state_folder)
            if self.tracker is not None:
                self.tracker.end(run.name)

    def _with_and_without(self, run: Run, sae: Sae) -> dict[str, Any]:
        """Return FVU and L0 with and without outlier or skipped tokens, as metadata of the log; empty without any.

        Empty for transcoders, too.
        """
        compared = self.compared.get(run.record["hookpoint"])
        if compared is None or sae.transcodes or compared.kept.all():
            return {}
        quality = compared.measure(sae)
        if not run.is_control:
            say(f"train: {run.name}: {quality.describe()} (on the first batch)")
        return {"quality": asdict(quality)}
