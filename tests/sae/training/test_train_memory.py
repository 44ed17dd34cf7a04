"""A training that does not fit: refused before it begins, or one line that says what to lower."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_study import cli

from sae.common.errors import UserError
from sae.dictionaries.architectures.topk import TopKSae
from sae.settings import TrainingSettings
from sae.training import memory

REPOSITORY = Path(memory.__file__).parents[2]


def part(**values: Any) -> memory.Part:
    given = {"num_latents": 4096, "k": 32, "batch_tokens": 65536, **values}
    seeds = given.pop("seeds", 3)
    return memory.Part(TrainingSettings.model_validate(given), seeds, 768, "layers.6.mlp")


def test_advice_gives_numbers() -> None:
    need = memory.training_need([part()])
    at_half = memory.training_need([part(batch_tokens=32768)])
    said = memory.describe_shortage([part()], int(at_half.total / 0.9) + 2**20)
    assert "training.batch_tokens 65536 needs about" in said
    assert said.endswith("lower training.batch_tokens to 32768")
    assert f"{need.total / 2**30:.3g} GiB" in said
    # The dictionaries themselves do not fit side by side.
    wide = part(num_latents=2**17, batch_tokens=2048, seeds=8)
    states = memory.training_need([wide])
    assert "train 4 at a time" in memory.describe_shortage([wide], int((states.total - states.states * 0.45) / 0.9))
    # Not even one.
    said = memory.describe_shortage([wide], 3 * 2**30)
    latents = int(said.split("num_latents from 131072 to ")[1].split(",")[0])
    assert memory.training_need([part(num_latents=latents, batch_tokens=2048, seeds=1)]).total <= 3 * 2**30
    assert "free some memory" in memory.describe_shortage([wide], 1000)
    # It failed although the sums say that it fits: ask for less all the same.
    assert "lower training.batch_tokens to" in memory.describe_shortage([part()], 2**45, failed=True)
    assert "lower training.batch_tokens to" in memory.describe_shortage([part()], None, failed=True)


def test_training_that_cannot_fit_is_refused_at_once(
    short: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "runs"
    monkeypatch.setattr(memory, "free_bytes", lambda _: 200 << 20)
    wide = ("--batch-tokens", 2**21, "--tokens", 2**21)
    cli("train", "--no-controls", "--recipe", short, *wide, "--root", root, "--json").failed_in_one_line(
        "training.batch_tokens 2097152 needs about", "200 MiB are free", "lower training.batch_tokens to"
    )
    assert not list(root.glob("*/run.json"))


ALLOCATION = "[enforce fail at alloc_cpu.cpp:127] data. DefaultCPUAllocator: can't allocate memory: you tried to"


@pytest.mark.parametrize(
    "error", [RuntimeError(ALLOCATION), MemoryError(), torch.OutOfMemoryError("CUDA out of memory")], ids=repr
)
@pytest.mark.parametrize("when", [1, 7])
def test_an_allocation_that_fails_is_one_line(
    short: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, when: int
) -> None:
    root, calls = tmp_path / "runs", 0
    real = TopKSae.loss_and_gradient

    def fails(self: TopKSae, *rest: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == when:
            raise error
        return real(self, *rest)

    train = ("train", "--no-controls", "--recipe", short, "--seeds", 0, "--root", root)
    with monkeypatch.context() as patched:
        patched.setattr(TopKSae, "loss_and_gradient", fails)
        cli(*train, "--json").failed_in_one_line("out of memory on cpu", "lower")
    assert (root / "run_a").exists() == (when == 7)  # with its state of step 4
    cli(*train).well()


def test_another_runtime_error_keeps_its_traceback(
    short: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> Any:
        raise RuntimeError("a defect of ours")

    monkeypatch.setattr(TopKSae, "loss_and_gradient", fails)
    with pytest.raises(RuntimeError, match="a defect of ours"):
        cli("train", "--no-controls", "--recipe", short, "--seeds", 0, "--root", tmp_path / "runs")


LIMITED = """
import resource, sys
sys.path[:0] = [{root!r}]
import torch, transformers.models.llama.modeling_llama
import cli, sae.dictionaries.architectures, sae.training.memory, sae.activations.subject
import sae.study.train, sae.training.trainer
torch.set_num_threads(1)
sys.argv = ["cli.py", *sys.argv[1:]]
taken = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (taken + {room}, resource.RLIM_INFINITY))
for attempt in range(2):
    try:
        cli.main()
    except SystemExit as end:
        assert end.code == 1
    sae.training.memory.check_fits = lambda *_: None  # the second time it is met, not foreseen
"""


def test_a_real_limit_on_memory(short: Path, tmp_path: Path) -> None:
    code = LIMITED.format(root=str(REPOSITORY), room=500 << 20)
    arguments = (
        "train",
        "--no-controls",
        "--recipe",
        short,
        "-M",
        2**19,
        "--k",
        8,
        "--seeds",
        0,
        1,
        2,
        "--root",
        tmp_path / "runs",
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"},
    )
    assert ran.returncode == 0, ran.stderr
    assert "Traceback" not in ran.stderr
    foreseen, met = [line for line in ran.stderr.splitlines() if line.startswith("error: ")]
    assert foreseen.startswith("error: training 3 SAEs with training.batch_tokens 256 needs about")
    assert met.startswith("error: out of memory on cpu: training 3 SAEs")
    for line in (foreseen, met):
        advice = line.rsplit(": ", 1)[1]
        assert advice.startswith(("train 1 at a time", "train 2 at a time", "lower training.num_latents from 524288"))
    assert not list((tmp_path / "runs").glob("*/run.json"))


def test_free_memory_respects_the_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    free = memory.free_bytes("cpu")
    assert free is None or 0 < free < 2**50
    monkeypatch.setattr(resource, "getrlimit", lambda _: (2**30, resource.RLIM_INFINITY))
    limited = memory.free_bytes("cpu")
    assert limited is not None
    assert limited <= 2**30


def test_memory_errors_have_one_form() -> None:
    with pytest.raises(UserError, match="out of memory on cpu"), memory.report_out_of_memory([part()], "cpu"):
        torch.empty(2**62, dtype=torch.uint8)
    with pytest.raises(UserError, match="out of memory on cpu"), memory.report_out_of_memory([part()], "cpu"):
        np.empty(2**62, dtype=np.uint8)
