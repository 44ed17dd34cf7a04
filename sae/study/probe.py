"""Estimate how long a training takes from a few steps of each setting.

Revival of dead latents (AuxK), which starts later, and the stages after training are not included.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from sae.activations.stream import ActivationStream, compute_block, read_batches
from sae.common.ranks import ALONE
from sae.dictionaries.architectures import ARCHITECTURES
from sae.dictionaries.sae import total_variance
from sae.settings import Settings
from sae.study.run import Study
from sae.study.stage import Compute, open_source
from sae.training.learner import Batch, Learner

STEPS = 8  # steps per setting; the first two are not counted
_WARM = 2
_BLOCKS = 3
_FORWARD_SECONDS = 0.5


class Probe(NamedTuple):
    """Seconds that a training of several studies on one stream takes."""

    stream: float  # to compute the activations of the longest once; later epochs read the cache
    studies: dict[str, float]  # to train all seeds of each
    steps: int  # timed steps of each

    @property
    def seconds(self) -> float:
        return self.stream + sum(self.studies.values())


def probe(studies: Sequence[Study], root: Path, compute: Compute) -> Probe:
    """Time a few steps of each study. Writes only the corpus under ``root``."""
    source = open_source([study.settings for study in studies], root, compute, cache="none")
    batches = {study.name: source.batches(study.settings) for study in studies}
    longest = max(batches.values(), key=len)
    n = min(STEPS, len(longest))
    hookpoints = list({of.stream.hookpoint: of for of in batches.values()}.values())
    read = [read_batches(hookpoints, step) for step in range(n)]
    held = {of.stream.hookpoint: [batch[i] for batch in read] for i, of in enumerate(hookpoints)}
    read_tokens = len(longest) * longest.sequences_per_step * source.corpus.context
    computed = min(read_tokens, source.corpus.n_tokens)
    seconds = {}
    for study in studies:
        steps = len(batches[study.name])
        sample = held[batches[study.name].stream.hookpoint]
        seconds[study.name] = _step_seconds(study.settings, sample, steps, study.seeds[0]) * steps * len(study.seeds)
    return Probe(computed * _seconds_per_token([of.stream for of in hookpoints]), seconds, n)


class TokenSeconds(NamedTuple):
    """Seconds per token: of the subject's forward pass, and of one seed's training step."""

    forward: float
    step: float


def time_tokens(settings: Settings, compute: Compute) -> TokenSeconds:
    """Time the forward pass and the training step on random tokens: about a second once compiled."""
    training = settings.training
    subject = compute.load_subject(settings)
    n_sequences = -(-training.batch_tokens // settings.corpus.context)
    shape = n_sequences, settings.corpus.context
    tokens = torch.randint(256, shape, generator=torch.Generator().manual_seed(0))  # ids in every vocabulary
    times: list[float] = []
    while len(times) < 2 or sum(times) < _FORWARD_SECONDS:  # the first one also allocates
        began = time.perf_counter()
        (activations,) = subject.activations(tokens, [settings.subject.hookpoint]).values()
        times.append(time.perf_counter() - began)
    batch = activations.flatten(0, 1)[: training.batch_tokens]
    step = _step_seconds(settings, [batch] * STEPS, STEPS, seed=0)
    return TokenSeconds(min(times) / tokens.numel(), step / training.batch_tokens)


def _seconds_per_token(streams: Sequence[ActivationStream]) -> float:
    corpus = streams[0].corpus
    times = []
    for number in range(min(_BLOCKS, corpus.n_blocks)):
        began = time.perf_counter()
        compute_block(streams, number)
        times.append((time.perf_counter() - began) / (len(corpus.block(number)) * corpus.context))
    return statistics.median(times)


def _step_seconds(settings: Settings, batches: list[torch.Tensor], steps: int, seed: int) -> float:
    """Return the median seconds of a step of one seed, without the first ones, which compile."""
    training, sample = settings.training, batches[0]
    shape = sample.shape[1], training.num_latents, training.k
    kind = ARCHITECTURES[training.architecture]
    sae = kind.init(*shape, seed=seed, x_sample=sample.float()).to(sample.device)
    learner = Learner(sae, training, steps, Path("probe", "training-state"), {})
    times = []
    for step, batch in enumerate(batches):
        began = time.perf_counter()
        x = batch.to(device=sae.device, dtype=sae.dtype).contiguous()
        learner.step(Batch(x, total_variance(x)), step, ALONE)  # of a transcoder: about as long
        times.append(time.perf_counter() - began)
    return statistics.median(times[_WARM:] or times)
