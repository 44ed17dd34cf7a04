"""How long a training would take, from a few steps of it: the subject once, then every setting for itself.

Nothing is extrapolated but the length. What a few steps cannot show is left out and said to be: revival of dead latents
(AuxK), which begins later, and all stages after the training.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from sae.common.ranks import ALONE
from sae.study.stage import Compute, Source, open_source

if TYPE_CHECKING:
    import torch

    from sae.activations.stream import ActivationStream
    from sae.settings import Settings
    from sae.study.train import Study

STEPS = 8
"""of each setting, the first two of them not counted"""
_WARM = 2
_BLOCKS = 3
_FORWARD_SECONDS = 0.5


class Probe(NamedTuple):
    """Seconds that a training of several studies on one stream would take."""

    stream: float
    """to compute the activations of the longest, once; later epochs are taken to be read from the cache on disk"""
    studies: dict[str, float]
    """to train all seeds of each"""
    steps: int
    """how many steps of each were made"""

    @property
    def seconds(self) -> float:
        return self.stream + sum(self.studies.values())


def probe(studies: Sequence[Study], root: Path, compute: Compute) -> Probe:
    """Time a few steps of every study. Prepares the text under ``root``, as the training would, and nothing else."""
    from sae.activations.stream import TrainingBatches, read_together

    source = open_source([study.settings for study in studies], root, compute, cache="none")
    batches = {
        study.name: TrainingBatches(
            source.stream(study.settings.subject.hookpoint),
            study.settings.training.tokens,
            study.settings.training.batch_tokens,
            study.settings.corpus.order_seed,
        )
        for study in studies
    }
    longest = max(batches.values(), key=len)
    n = min(STEPS, len(longest))
    hookpoints = list({of.stream.hookpoint: of for of in batches.values()}.values())
    read = [read_together(hookpoints, step) for step in range(n)]
    held = {of.stream.hookpoint: [batch[i] for batch in read] for i, of in enumerate(hookpoints)}
    computed = min(len(longest) * longest.tokens_per_step, source.corpus.n_tokens)
    return Probe(
        computed * _seconds_per_token([of.stream for of in hookpoints]),
        {
            study.name: _step_seconds(
                study, source, held[batches[study.name].stream.hookpoint], len(batches[study.name])
            )
            * len(batches[study.name])
            * len(study.seeds)
            for study in studies
        },
        n,
    )


def forward_seconds(settings: Settings, compute: Compute) -> float:
    """Seconds per token of the subject's forward pass: the best of half a second of passes over arbitrary tokens."""
    import torch

    from sae.activations.subject import Subject

    device = compute.resolve()
    subject = Subject.load(settings.subject.model, device=device, dtype=settings.subject.dtype)
    tokens = torch.arange(8 * settings.corpus.context).reshape(8, -1) % 7  # ids that every vocabulary has
    times: list[float] = []
    while len(times) < 2 or sum(times) < _FORWARD_SECONDS:  # the first one also allocates
        began = time.perf_counter()
        subject.activations(tokens, [settings.subject.hookpoint])
        times.append(time.perf_counter() - began)
    return min(times) / tokens.numel()


def _seconds_per_token(streams: Sequence[ActivationStream]) -> float:
    """The median of a few blocks of the subject's forward pass, which has been run before."""
    from sae.activations.stream import compute_block

    corpus = streams[0].corpus
    times = []
    for number in range(min(_BLOCKS, corpus.n_blocks)):
        began = time.perf_counter()
        compute_block(streams, number)
        times.append((time.perf_counter() - began) / (len(corpus.block(number)) * corpus.context))
    return statistics.median(times)


def _step_seconds(study: Study, source: Source, batches: list[torch.Tensor], steps: int) -> float:
    """The median step of one seed, the compiler's work in the first ones not counted."""
    from sae.dictionaries.architectures import ARCHITECTURES
    from sae.dictionaries.objective import total_variance
    from sae.training.learner import Learner, Plan

    training = study.settings.training
    stream = source.stream(study.settings.subject.hookpoint)
    shape = stream.width, training.num_latents, training.k
    sae = ARCHITECTURES[training.architecture].init(*shape, seed=study.seeds[0], x_sample=batches[0])
    sae = sae.to(stream.device)
    learner = Learner(sae, Plan.of(training, steps, sae.d_in, sae.device), training.auxk, study.name)
    times = []
    for step, batch in enumerate(batches):
        began = time.perf_counter()
        x = batch.to(device=sae.device, dtype=sae.dtype).contiguous()
        learner.step(x, total_variance(x), step, ALONE)
        times.append(time.perf_counter() - began)
    return statistics.median(times[_WARM:] or times)
