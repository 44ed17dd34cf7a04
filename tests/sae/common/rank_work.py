"""What the ranks of ``small_ranks`` do: each function is run by every rank at once, and leaves files for the tests."""

# ruff: noqa: ARG001
from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import test_firings
import torch
from safetensors.torch import save_file

from autointerp.command_line.ending import finish
from sae.activations.cache import open_caches
from sae.activations.stream import Reader, TrainingBatches, open_streams
from sae.common import launch
from sae.common.errors import BadInput
from sae.common.parallel import join_ranks, join_ranks_at_text
from sae.common.progress import say, track
from sae.common.ranks import ALONE, Job
from sae.dictionaries.architectures import ARCHITECTURES
from sae.dictionaries.sae import Sae
from sae.settings import TrainingSettings
from sae.text.corpus import Corpus
from sae.training.learner import TrainLog
from sae.training.trainer import Group, train_groups

D, M, K, B = 12, 40, 4, 65
STEPS = 50
ARCHITECTURES_IN_DATA = ("topk", "batchtopk", "relu", "gated", "jumprelu")
RANKS = {
    "seeds_over_ranks": 2,
    "three_ranks_two_seeds": 3,
    "seeds_with_different_last_steps": 2,
    **{f"data_{name}": 2 for name in ARCHITECTURES_IN_DATA},
    "data_undisturbed": 2,
    "data_killed": 2,
    "data_resumed": 2,
    "data_interrupted": 2,
    "seeds_interrupted": 2,
    "one_pass_for_all_ranks": 2,
    "harvest_over_ranks": 3,
    "what_they_hand_each_other": 3,
    "the_same_mistake_everywhere": 2,
    "a_mistake_before_they_meet": 2,
    "a_mistake_on_one_rank": 2,
    "a_defect_on_one_rank": 2,
    "a_death": 2,
    "a_quiet_end": 2,
}
"""the scenarios, and how many ranks each takes"""


class Batches(Sequence[torch.Tensor]):
    """Sparse combinations of fixed directions; before step ``at``, something happens."""

    fingerprint = "synthetic"

    def __init__(self, steps: int, at: int | None = None, event: Callable[[], object] = lambda: None) -> None:
        self.steps, self.at, self.event = steps, at, event
        directions = torch.randn(24, D, generator=torch.Generator().manual_seed(99))
        self.directions = torch.nn.functional.normalize(directions, dim=1)

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> torch.Tensor:  # type: ignore[override]
        if step == self.at:
            self.event()
        generator = torch.Generator().manual_seed(step)
        active = torch.rand(B, 24, generator=generator) < 0.1
        return (active * torch.rand(B, 24, generator=generator)) @ self.directions + 0.5


def fresh(seeds: Sequence[int], architecture: str = "topk", dtype: torch.dtype = torch.float32) -> list[Sae]:
    kind = ARCHITECTURES[architecture]
    saes = [kind.init(D, M, K, seed, Batches(1)[0]).to(dtype=dtype) for seed in seeds]
    for sae in saes:
        # So that some are dead after a while, and AuxK, or what stands in its place, has work.
        sae.b_enc[:20] -= 3.0 if sae.penalised else 0.5
    return saes


def steps_of(architecture: str) -> int:
    """Steps in a training of ``architecture``: fewer where only the way is to be the same."""
    return STEPS if architecture == "topk" else 20


def folders(root: Path, seeds: Sequence[int]) -> list[Path]:
    return [root / f"run_{'abc'[seed]}" / "training-state" for seed in seeds]


def settings(architecture: str = "topk", **values: Any) -> TrainingSettings:
    given = {"num_latents": M, "k": K, "batch_tokens": B, "checkpoint_steps": 10, "learning_rate": 0.01}
    tokens = {"tokens": STEPS * B, "dead_tokens": 5 * B}
    return TrainingSettings.model_validate({"architecture": architecture, **given, **tokens, **values})


def trained(
    root: Path, seeds: Sequence[int], job: Job = ALONE, batches: Batches | None = None, **named: Any
) -> list[tuple[Sae, TrainLog]]:
    """The dictionaries of ``seeds``, trained under ``root``, where their weights and logs are left."""
    architecture, dtype = named.get("architecture", "topk"), named.get("dtype", torch.float32)
    saes = fresh(seeds, architecture, dtype)
    batches = batches or Batches(steps_of(architecture))
    (logs,) = train_groups([Group(batches, saes, settings(architecture), folders(root, seeds))], job)
    for seed, sae, log in zip(seeds, saes, logs, strict=True):
        if job.writes:
            root.mkdir(parents=True, exist_ok=True)
            save_file({name: t.clone() for name, t in sae.weights().items()}, root / f"{seed}.safetensors")
            (root / f"{seed}.json").write_text(json.dumps({"rows": log.rows, "resumed_from": log.resumed_from}))
    return list(zip(saes, logs, strict=True))


# --- training -------------------------------------------------------------------------------------------------


def alone(folder: Path) -> None:
    """What one process does: the reference for all others."""
    trained(folder / "seeds", [0, 1, 2])
    for architecture in ARCHITECTURES_IN_DATA:
        trained(folder / architecture, [0, 1], architecture=architecture, dtype=torch.float64)
    for name, caches in (("held", no_caches), ("cached", both_caches)):
        _read_all(folder / name, ALONE, caches, {})
    _harvest_twice(folder / "harvest", ALONE)


def seeds_over_ranks(folder: Path) -> None:
    with join_ranks(None, 3, "cpu") as (job, _):
        trained(folder, job.share([0, 1, 2]), job)


def three_ranks_two_seeds(folder: Path) -> None:
    with join_ranks("seeds", 2, "cpu") as (job, _):
        trained(folder, job.share([0, 1]), job)


def seeds_with_different_last_steps(folder: Path) -> None:
    """Seed 1 has come to step 30, seed 0 to step 20, and seed 2 is new."""
    with join_ranks("seeds", 3, "cpu") as (job, _):
        for seed, last in ((0, 20), (1, 30)) if job.rank == 0 else ():
            with suppress(KeyboardInterrupt):
                trained(folder, [seed], ALONE, Batches(STEPS, last, _interrupt))
        job.barrier()
        trained(folder, job.share([0, 1, 2]), job)


def _data(architecture: str) -> Callable[[Path], None]:
    def work(folder: Path) -> None:
        with join_ranks("data", 2, "cpu") as (job, _):
            trained(folder, [0, 1], job, architecture=architecture, dtype=torch.float64)

    return work


data_topk, data_batchtopk = _data("topk"), _data("batchtopk")
data_relu, data_gated, data_jumprelu = _data("relu"), _data("gated"), _data("jumprelu")


def data_undisturbed(folder: Path) -> None:
    with join_ranks("data", 1, "cpu") as (job, _):
        trained(folder, [0], job)


def data_killed(folder: Path) -> None:
    """Rank 1 dies before step 25."""
    with join_ranks(None, 1, "cpu") as (job, _):
        trained(folder, [0], job, Batches(STEPS, 25, _die if job.rank else _nothing))


def data_resumed(folder: Path) -> None:
    data_undisturbed(folder.with_name("data_killed"))


def data_interrupted(folder: Path) -> None:
    """Ctrl-C reaches rank 1 alone, in step 25; then all train on."""
    _interrupted(folder, "data", [0])


def seeds_interrupted(folder: Path) -> None:
    _interrupted(folder, "seeds", [0, 1, 2])


def _interrupted(folder: Path, mode: str, seeds: Sequence[int]) -> None:
    with join_ranks(mode, len(seeds), "cpu") as (job, _):
        mine = job.share(seeds)
        try:
            trained(folder, mine, job, Batches(STEPS, 24, _ctrl_c if job.rank else _nothing))
        except KeyboardInterrupt:
            trained(folder, mine, job)


def _ctrl_c() -> None:
    signal.raise_signal(signal.SIGINT)


def _interrupt() -> None:
    raise KeyboardInterrupt


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _nothing() -> None:
    pass


# --- the activations ------------------------------------------------------------------------------------------


Caches = Callable[[Any, Any], Mapping[str, Any]]


class Subject:
    """A model whose activations are numbers made from the tokens; it keeps count of the forward passes."""

    dtype, device, source, fingerprint, prefix = torch.float32, torch.device("cpu"), "made up", "made up", ()

    def __init__(self) -> None:
        self.passes: list[list[int]] = []

    def resolve(self, hookpoint: str) -> str:
        return hookpoint

    def width(self, hookpoint: str) -> int:
        return {"first": 6, "second": 4}[hookpoint]

    def check_context(self, context: int) -> None:
        pass

    def activations(self, tokens: np.ndarray, hookpoints: Sequence[str]) -> dict[str, torch.Tensor]:
        self.passes.append(tokens[:, 0].tolist())
        x = torch.from_numpy(tokens).float()[..., None]
        return {name: torch.sin(x * torch.arange(1, self.width(name) + 1)) for name in hookpoints}


def two_hookpoints(folder: Path, caches: Caches) -> tuple[Subject, list[Any]]:
    """A corpus of 5 blocks of 2 sequences, and the batches of two hookpoints over two epochs of it."""
    record = {
        "key": "made-up",
        "fingerprint": "made up",
        "context": 2048,
        "special_ids": [0],
        "info": {},
        "n_sequences": 10,
    }
    tokens = np.random.default_rng(0).integers(0, 500, (10, 2048)).astype(np.uint16)
    (folder / "corpus").mkdir(parents=True, exist_ok=True)
    corpus: Any = Corpus(folder / "corpus", record, tokens)  # type: ignore[arg-type]
    subject: Any = Subject()
    streams = open_streams(subject, corpus, ["first", "second"], caches(corpus, subject))
    return subject, [TrainingBatches(streams[n], 20 * 2048, 3 * 2048) for n in ("first", "second", "first")]


def no_caches(corpus: Any, subject: Any) -> Mapping[str, Any]:
    return {}


def both_caches(corpus: Any, subject: Any) -> Mapping[str, Any]:
    return open_caches(corpus, subject, ["first", "second"], 1 << 30)


def one_pass_for_all_ranks(folder: Path) -> None:
    """Once without a cache on disk, and once with one that is damaged in the middle of it, as rank 0 has it."""
    with join_ranks("seeds", 2, "cpu") as (job, _):
        for name, caches in (("held", no_caches), ("cached", both_caches)):
            events = {5: partial(_damage, folder / name)} if job.rank == 0 else {}
            _read_all(folder / name, job, caches if job.rank == 0 else no_caches, events)


def _read_all(folder: Path, job: Job, caches: Caches, events: Mapping[int, Callable[[], object]]) -> None:
    subject, batches = two_hookpoints(folder, caches)
    reader, read = Reader(job), []
    for step in range(len(batches[0])):
        events.get(step, _nothing)()
        first, second, again = reader(batches, step)
        assert first is again
        read += [first, second]
    save_file({f"{i:02d}": x.clone() for i, x in enumerate(read)}, folder / f"{job.rank}.safetensors")
    (folder / f"{job.rank}.json").write_text(json.dumps(subject.passes))


def harvest_over_ranks(folder: Path) -> None:
    with join_ranks_at_text("cpu") as (job, _):
        _harvest_twice(folder, job)


def _harvest_twice(folder: Path, job: Job) -> None:
    """Two runs, of which one has harvested a little before; then both of them, more."""
    with ExitStack() as small:
        small.enter_context(patch("sae.text.corpus.BLOCK_TOKENS", 2 * test_firings.T))
        small.enter_context(patch("sae.firings.harvest.SHARD_BLOCKS", 2))  # several shards, of four sequences each
        with job.first_then_others("corpus"):
            tokens = np.random.default_rng(0).integers(0, 25, (test_firings.N, test_firings.T))
            place = folder / "corpora" / "c0ffee"
            corpus = test_firings.a_corpus(place, tokens) if job.rank == 0 else Corpus.open(place)
        stream = test_firings.FakeStream(corpus)
        test_firings.run(stream, folder, "a", tokens=10 * test_firings.USED, ranks=job)
        test_firings.run(stream, folder, "ab", ranks=job)
    (folder / f"asked-{job.rank}.json").write_text(json.dumps(stream.asked))


def _damage(folder: Path) -> None:
    for file in folder.glob("corpus/activations/*/slots.bin"):
        with file.open("r+b") as stored:
            stored.write(bytes(64))  # the first slot no longer matches its checksum


# --- what they hand each other ----------------------------------------------------------------------------------


def what_they_hand_each_other(folder: Path) -> None:
    def slow() -> dict[str, list[int]]:
        time.sleep(0.1)
        return {"a": [1]}

    with join_ranks("data", 1, "cpu") as (job, device):
        assert (device, job.size, job.writes) == ("cpu", 3, job.rank == 0)
        assert job.least(7 - job.rank) == 5
        assert job.first("slow", slow) == {"a": [1]}
        seen = []
        with job.first_then_others("turns"):
            if job.rank == 0:
                time.sleep(0.1)
                (folder / "there").touch()
            seen.append((folder / "there").exists())
        assert seen == [True]
        for x in (
            torch.rand(3, 4, generator=torch.Generator().manual_seed(1)).bfloat16(),
            torch.arange(5),
            torch.zeros(0, 3),
            torch.tensor(2.5).double(),
        ):
            given = torch.full_like(x, -1) if job.rank else x
            told = job.broadcast(given)  # type: ignore[attr-defined]
            assert told.dtype == x.dtype
            assert told.shape == x.shape
            assert torch.equal(told, x)
        mine = torch.arange(job.rank * 2, dtype=torch.float64) + 10 * job.rank
        assert torch.equal(torch.cat(job.gather(mine)), torch.tensor([10, 11, 20, 21, 22, 23]).double())
        assert len(job.gather(mine)[job.place]) == len(mine)
        parts = job.gather(job.rows(torch.arange(65.0)[:, None]).flatten())
        assert torch.equal(torch.cat(parts), torch.arange(65.0))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
        tensor = torch.full((3,), float(job.rank))
        assert job.alike([tensor], {"rank": job.rank}) == {"rank": 0}
        assert torch.equal(tensor, torch.zeros(3))
        job.check_alike([tensor])
        tensor[1] += job.rank == 2
        job.check_alike([tensor])  # ends the job


# --- endings --------------------------------------------------------------------------------------------------


def the_same_mistake_everywhere(folder: Path) -> None:
    with join_ranks("data", 1, "cpu"):
        raise BadInput("this is wrong; do that")


def a_mistake_before_they_meet(folder: Path) -> None:
    with join_ranks("sideways", 1, "cpu"):
        pass


def a_mistake_on_one_rank(folder: Path) -> None:
    with join_ranks("data", 1, "cpu") as (job, _):
        if job.rank == 1:
            raise BadInput("only rank 1 sees this; mend it")
        job.barrier()


def a_defect_on_one_rank(folder: Path) -> None:
    with join_ranks("data", 1, "cpu") as (job, _):
        if job.rank == 1:
            raise AssertionError("ours to mend")
        job.barrier()


def a_death(folder: Path) -> None:
    with join_ranks("data", 1, "cpu") as (job, _):
        if job.rank == 1:
            _die()
        job.barrier()


def a_quiet_end(folder: Path) -> None:
    with join_ranks("data", 1, "cpu") as (job, _):
        say("something to say")
        with track("work", 3) as bar:
            bar.advance(3)
        job.barrier()
    finish(True, "train", lambda: {"rank": launch.rank()}, lambda: None)
