"""Helpers of all stages: choose the device, lock a study, open model, text and activations."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from filelock import FileLock, Timeout

from sae.common.errors import BadInput, SettingsDiffer, UserError
from sae.settings import Settings, SkipSettings
from sae.study.run import Run, SkipFacts, study_runs

if TYPE_CHECKING:
    from sae.activations.skipping import Skip
    from sae.activations.stream import ActivationStream, TrainingBatches
    from sae.activations.subject import Subject
    from sae.text.corpus import Corpus


@dataclass(frozen=True)
class Compute:
    """The device, the number of CPU threads, and whether a model's code may run."""

    device: str = "auto"
    threads: int | None = None
    trust_remote_code: bool = False  # run Python code that comes with the subject model

    def resolve(self) -> str:
        """Set the number of threads and return torch's name of the device."""
        import torch

        if self.threads is not None:
            if self.threads < 1:
                raise BadInput(f"--threads {self.threads}: give 1 or more")
            torch.set_num_threads(self.threads)
        elif (allowed := _cpus_allowed()) < torch.get_num_threads():
            torch.set_num_threads(allowed)  # more threads than a container's quota are slower
        if self.device == "auto":
            return "cuda" if torch.cuda.is_available() else "cpu"
        try:
            torch.empty(1, device=self.device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise BadInput(f"--device {self.device!r} cannot be used here ({reason}); try --device cpu") from None
        return self.device

    def load_subject(self, settings: Settings, with_unembedding: bool = False) -> Subject:
        from sae.activations.subject import Subject

        subject = settings.subject
        return Subject.load(subject.model, self.resolve(), subject.dtype, self.trust_remote_code, with_unembedding)


def _cpus_allowed() -> int:
    """Return a container's CPU quota, rounded up; without a quota, the number of CPUs."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, math.ceil(int(quota) / int(period)))
    except (OSError, ValueError):  # no cgroups, or "max": no quota
        return os.cpu_count() or 1


@contextmanager
def lock_study(root: Path, study: str) -> Iterator[None]:
    """Keep two commands from writing the same study at the same time."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=root):
            pass
    except OSError as error:
        reason = (error.strerror or "").lower()
        raise BadInput(f"--root {str(root)!r} cannot be written ({reason}); choose another folder") from None
    try:
        with FileLock(root / f".{study}.lock", timeout=0):
            yield
    except Timeout:
        raise UserError(f"another command is using study {study!r}; wait for it, then run this command again") from None


def fit_to_study(study: str, settings: Settings, root: Path, compute: Compute) -> Settings:
    """Return settings whose split of contexts is that of the study's runs, and whose dtype is theirs if it is "auto".

    Without runs, "auto" becomes the machine's best dtype.
    """
    begun = [run.settings for run in study_runs(study, root)[:1]]
    for theirs in begun:
        settings = settings.with_values(contexts={"split": theirs.contexts.split})
    if settings.subject.dtype != "auto":
        return settings
    from sae.common.precision import resolve_float

    dtype = begun[0].subject.dtype if begun else resolve_float("auto", compute.resolve())
    return settings.with_values(subject={"dtype": dtype})


Cache = Literal["fill", "read", "none"]


class Source(NamedTuple):
    """A model, a corpus, and a stream for each hookpoint by its resolved name."""

    subject: Subject
    corpus: Corpus
    streams: dict[str, ActivationStream]

    def stream(self, hookpoint: str) -> ActivationStream:
        return self.streams[self.subject.resolve(hookpoint)]

    def batches(self, settings: Settings, target: str | None = None) -> TrainingBatches:
        """Return the training batches of the settings, or those at ``target`` for the same tokens."""
        from sae.activations.stream import TrainingBatches

        training, source = settings.training, self.stream(settings.subject.hookpoint)
        stream = source if target is None else self.stream(target)
        return TrainingBatches(stream, training.tokens, training.batch_tokens, settings.corpus.order_seed, source)


def describe_inputs(
    settings: Settings, subject: Subject, corpus: Corpus, hookpoint: str, batches: TrainingBatches | None = None
) -> dict[str, Any]:
    """Return the entries of ``run.json`` for subject, hookpoint, corpus and batches (``None``: imported)."""
    fingerprint, steps = (None, 0) if batches is None else (batches.fingerprint, len(batches))
    target = settings.subject.target
    return {
        **({} if target is None else {"target": subject.resolve(target)}),
        "subject": {
            "source": settings.subject.model,
            "fingerprint": subject.fingerprint,
            "dtype": settings.subject.dtype,
            "d_in": subject.width(hookpoint),
        },
        "hookpoint": hookpoint,
        "corpus": {"key": corpus.key, "fingerprint": corpus.fingerprint, **corpus.info},
        "batch_order": {"seed": settings.corpus.order_seed, "fingerprint": fingerprint, "steps": steps},
    }


def get_source_key(settings: Settings) -> tuple[Any, ...]:
    """Return the settings that studies must share to use one forward pass over one text."""
    return settings.subject.model, settings.subject.dtype, settings.corpus, settings.skip


def open_source(of: Sequence[Settings], root: Path, compute: Compute, cache: Cache = "fill") -> Source:
    """Open the model, text and hookpoints of settings that share a source.

    ``cache``: fill the activation caches (one process per root), read those of that process, or use none.
    """
    from sae.activations.cache import open_caches, open_caches_to_read
    from sae.activations.stream import open_streams
    from sae.text.packing import prepare_corpus

    first = of[0]
    subject = compute.load_subject(first)
    # Resolve now, so that a wrong name of a hookpoint or token fails before the text is read.
    names = [name for s in of for name in (s.subject.hookpoint, s.subject.target) if name is not None]
    hookpoints = list(dict.fromkeys(subject.resolve(name) for name in names))
    skip = find_skip(first, subject)
    corpus = prepare_corpus(first.corpus, subject.tokenizer, subject.tokenizer_fingerprint, root)
    limit = min(settings.training.activation_cache for settings in of)
    caches = open_caches(corpus, subject, hookpoints, limit) if cache == "fill" else {}
    if cache == "read":
        caches = open_caches_to_read(corpus, subject, hookpoints)
    streams = open_streams(subject, corpus, hookpoints, caches)
    for stream in streams.values():
        stream.skip = skip
    return Source(subject, corpus, streams)


def find_skip(settings: Settings, subject: Subject) -> Skip:
    """Return which tokens the settings skip, without the limit on norms (:func:`limit_norms`)."""
    from sae.activations.skipping import Skip, resolve_tokens

    return Skip(settings.skip.positions, resolve_tokens(settings.skip.tokens, subject.tokenizer, subject.source))


def find_skipped(studies: Sequence[str], root: Path) -> SkipFacts | None:
    """Return the entry ``skipped`` of the first run of ``studies`` that has one."""
    records = (run.record for study in studies for run in study_runs(study, root))
    return next((record["skipped"] for record in records if "skipped" in record), None)


def limit_norms(stream: ActivationStream, settings: Settings, known: SkipFacts | None = None) -> dict[str, Any]:
    """Let ``stream`` skip tokens over ``skip.max_norm``; return the entry ``skipped`` of ``run.json``, if any.

    The limit is that of ``known``, the entry of a run of the study; without one, it is measured.
    """
    if settings.skip == SkipSettings():
        return {}
    median = limit = None
    if settings.skip.max_norm is not None:
        median = stream.measure_median_norm() if known is None else known["median_norm"]
        limit = settings.skip.max_norm * (median or 0.0) if known is None else known["norm_limit"]
    stream.skip = replace(stream.skip, norm_limit=limit)
    return {"skipped": {"token_ids": list(stream.skip.token_ids), "median_norm": median, "norm_limit": limit}}


def check_same_inputs(run: Run, **fingerprints: str) -> None:
    """Raise SettingsDiffer if a run began with another ``subject``, ``corpus`` or ``batch_order``."""
    if not run.has_begun:
        return
    record: Mapping[str, Any] = run.record
    there = {what: record[what]["fingerprint"] for what in fingerprints}
    differences = [
        f"{what}.fingerprint: {str(there[what])[:12]} there, {str(now)[:12]} now"
        for what, now in fingerprints.items()
        if there[what] != now
    ]
    if differences:
        raise SettingsDiffer(
            f"run {run.name!r} began with other inputs ({'; '.join(differences)}): a model or text has changed "
            "under the same name; give the study another --name"
        )
