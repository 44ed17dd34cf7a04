"""The stage through its command: several hookpoints in one pass, what stops it, and what is left on disk then."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny_study import NUM_LATENTS, Ran, cli, tree, write_recipe

from sae import memory
from sae.architectures.topk import TopKSae
from sae.checkpoint import save_sae
from sae.errors import BadInput, UserError
from sae.files import read_json, read_table
from sae.harvest_stage import is_harvested
from sae.run import Run
from sae.settings import TrainingSettings, settings_from
from sae.stage import Compute
from sae.subject import Subject
from sae.train_stage import Study, studies_of, train_studies
from sae.training_state import kept_steps

REPOSITORY = Path(memory.__file__).parents[1]
HOOKPOINTS = ("layers.0.mlp", "layers.1.input_layernorm")


@pytest.fixture
def short(tiny_recipe: Path, tiny_llama_dir: Path, tmp_path: Path) -> Path:
    """A recipe of 16 steps with states every 4."""
    texts = tiny_recipe.parent / "texts"
    return write_recipe(tmp_path / "short.toml", tiny_llama_dir, texts, tokens=4096, checkpoint_steps=4)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """The hookpoints of every forward pass."""
    found: list[tuple[str, ...]] = []
    real = Subject.activations

    def watched(self: Subject, tokens: Any, hookpoints: Sequence[str]) -> Any:
        found.append(tuple(hookpoints))
        return real(self, tokens, hookpoints)

    monkeypatch.setattr(Subject, "activations", watched)
    return found


def weights(root: Path, run: str) -> bytes:
    return (root / run / "sae.safetensors").read_bytes()


# --- several studies ------------------------------------------------------------------------------------------


def test_several_hookpoints_are_a_study_each_in_one_pass(
    short: Path, tmp_path: Path, passes: list[tuple[str, ...]]
) -> None:
    root = tmp_path / "together"
    ran = cli(
        "train",
        "--no-controls",
        "--recipe",
        short,
        "--hookpoint",
        *HOOKPOINTS,
        "--seeds",
        0,
        1,
        "--root",
        root,
        "--json",
    ).well()
    names = [f"run-{hookpoint}_{letter}" for hookpoint in HOOKPOINTS for letter in "ab"]
    assert [run["name"] for run in ran.json["runs"]] == names
    assert [run["study"] for run in ran.json["runs"]] == [f"run-{h}" for h in HOOKPOINTS for _ in "ab"]
    assert [run["hookpoint"] for run in ran.json["runs"]] == [h for h in HOOKPOINTS for _ in "ab"]
    assert set(passes) == {HOOKPOINTS}
    together = len(passes)
    passes.clear()
    cli(
        "train",
        "--no-controls",
        "--recipe",
        short,
        "--hookpoint",
        HOOKPOINTS[0],
        "--seeds",
        0,
        1,
        "--root",
        tmp_path / "one",
    ).well()
    assert len(passes) == together
    for letter in "ab":
        alone, beside = (
            Run.open(name, where)
            for name, where in ((f"run_{letter}", tmp_path / "one"), (f"run-{HOOKPOINTS[0]}_{letter}", root))
        )
        assert weights(alone.root, alone.name) == weights(beside.root, beside.name)
        assert read_table(alone.training_log_path).equals(read_table(beside.training_log_path))

    # The harvest too: the first pass fills the caches of the others.
    passes.clear()
    cli("harvest", "--sae", names[0], "--sae", names[2], "--root", root).well()
    assert all(is_harvested(Run.open(name, root)) for name in (names[0], names[2]))
    assert len(set(passes)) <= 1
    n_blocks = Run.open(names[0], root).corpus().n_blocks
    assert together + len(passes) <= n_blocks
    caches = list(root.glob("corpora/*/activations/*"))
    assert len(caches) == 2  # for the seeds that are not harvested yet
    cli("harvest", "--sae", names[1], "--sae", names[3], "--root", root).well()
    assert not list(root.glob("corpora/*/activations/*"))


def test_a_sweep_shares_the_pass_and_each_ends_as_it_would_alone(
    short: Path, tmp_path: Path, passes: list[tuple[str, ...]]
) -> None:
    base = settings_from(short)
    swept = [
        Study("wide", base.with_values(training={"num_latents": 96}), (0,)),
        Study("few", base.with_values(training={"k": 1}), (0, 1)),
        Study("long", base.with_values(training={"tokens": 6000}), (0,)),
        Study("gated", base.with_values(training={"architecture": "gated"}), (1,)),
        Study("deep", base.with_values(subject={"hookpoint": "layers.0.mlp"}), (0,)),
        Study("large-steps", base.with_values(training={"batch_tokens": 512}), (0,)),
    ]
    runs = train_studies(swept, tmp_path / "sweep", Compute("cpu"))
    assert [[run.name for run in of_study] for of_study in runs[:2]] == [["wide_a"], ["few_a", "few_b"]]
    together = len(passes)
    passes.clear()
    for study, of_study in zip(swept, runs, strict=True):
        (alone,) = train_studies([study], tmp_path / study.name, Compute("cpu"))
        for a, b in zip(alone, of_study, strict=True):
            assert a.weights_path.read_bytes() == b.weights_path.read_bytes(), study.name
            assert a.record["batch_order"] == b.record["batch_order"]
    assert len(passes) > 3 * together
    passes.clear()
    assert train_studies(swept, tmp_path / "sweep", Compute("cpu")) == runs
    assert passes == []


def test_without_a_cache_the_weights_are_the_same(short: Path, tmp_path: Path) -> None:
    for room in (0, 3000, "8G"):
        root = tmp_path / str(room)
        cli(
            "train", "--no-controls", "--recipe", short, "--seeds", 0, "--activation-cache", room, "--root", root
        ).well()
        assert bool(list(root.glob("corpora/*/activations/*"))) == (room == "8G")
    assert weights(tmp_path / "0", "run_a") == weights(tmp_path / "8G", "run_a")
    cli(
        "train", "--no-controls", "--recipe", short, "--activation-cache", "much", "--root", tmp_path
    ).failed_in_one_line("'much'")
    # The limit is no part of what a run is.
    cli(
        "train", "--no-controls", "--recipe", short, "--seeds", 0, "--activation-cache", "1M", "--root", tmp_path / "0"
    ).well()


def test_names_of_several_hookpoints(tiny_recipe: Path) -> None:
    settings = settings_from(tiny_recipe)
    assert [s.name for s in studies_of("x", settings, ["a.b"], [0])] == ["x"]
    assert [s.name for s in studies_of("x", settings, [], [0])] == ["x"]
    assert [s.settings.subject.hookpoint for s in studies_of("x", settings, ["a.b", "c"], [0])] == ["a.b", "c"]
    with pytest.raises(BadInput, match="each name once"):
        train_studies(studies_of("x", settings, ["a", "a"], [0]), Path("nowhere"), Compute())


# --- NaN and infinity -----------------------------------------------------------------------------------------


def test_a_model_that_gives_nan_in_mid_training_stops_it_and_the_same_command_goes_on(
    short: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, calls = tmp_path / "runs", 0
    real = Subject.activations

    def breaks(self: Subject, tokens: Any, hookpoints: Sequence[str]) -> Any:
        nonlocal calls
        calls += 1
        found = real(self, tokens, hookpoints)
        if calls == 3:
            next(iter(found.values()))[2, 1, 3] = torch.nan
        return found

    train = ("train", "--no-controls", "--recipe", short, "--seeds", 0, 1, "--activation-cache", 0, "--root")
    monkeypatch.setattr("sae.corpus.BLOCK_TOKENS", 512)
    with monkeypatch.context() as patched:
        patched.setattr(Subject, "activations", breaks)
        ran = cli(*train, root, "--json")
    line = ran.failed_in_one_line("NaN at layers.1.input_layernorm in block", "sequence", "step ")
    steps = kept_steps(root / "run_a" / "training-state")
    said = int(line.split("step ")[1].split()[0])
    assert not (root / "run_a" / "sae.safetensors").exists()
    assert not steps or steps[-1] < said
    cli(*train, root).well()
    cli(*train, tmp_path / "undisturbed").well()
    for run in ("run_a", "run_b"):
        assert weights(root, run) == weights(tmp_path / "undisturbed", run)


def test_a_training_that_fails_before_its_first_state_leaves_its_name_free(short: Path, tmp_path: Path) -> None:
    root = tmp_path / "runs"
    cli(
        "train", "--no-controls", "--recipe", short, "--seeds", 0, "--lr", "1e30", "--root", root, "--json"
    ).failed_in_one_line("not finite", "learning_rate")
    assert not (root / "run_a").exists()
    cli("train", "--no-controls", "--recipe", short, "--seeds", 0, "--root", root).well()


# --- what does not fit ----------------------------------------------------------------------------------------


def part(**values: Any) -> memory.Part:
    given = {"num_latents": 4096, "k": 32, "batch_tokens": 65536, **values}
    seeds = given.pop("seeds", 3)
    return memory.Part(TrainingSettings.model_validate(given), seeds, 768, "layers.6.mlp")


def test_what_to_lower_is_said_in_numbers() -> None:
    need = memory.training_need([part()])
    at_half = memory.training_need([part(batch_tokens=32768)])
    said = memory.too_much([part()], int(at_half.total / 0.9) + 2**20)
    assert "training.batch_tokens 65536 needs about" in said
    assert said.endswith("lower training.batch_tokens to 32768")
    assert f"{need.total / 2**30:.3g} GiB" in said
    # The dictionaries themselves do not fit side by side.
    wide = part(num_latents=2**17, batch_tokens=2048, seeds=8)
    states = memory.training_need([wide])
    assert "train 4 at a time" in memory.too_much([wide], int((states.total - states.states * 0.45) / 0.9))
    # Not even one.
    said = memory.too_much([wide], 3 * 2**30)
    latents = int(said.split("num_latents from 131072 to ")[1].split(",")[0])
    assert memory.training_need([part(num_latents=latents, batch_tokens=2048, seeds=1)]).total <= 3 * 2**30
    assert "free some memory" in memory.too_much([wide], 1000)
    # It failed although the sums say that it fits: ask for less all the same.
    assert "lower training.batch_tokens to" in memory.too_much([part()], 2**45, failed=True)
    assert "lower training.batch_tokens to" in memory.too_much([part()], None, failed=True)


def test_what_plainly_cannot_fit_is_told_before_it_begins(
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
import cli, sae.architectures, sae.memory, sae.subject, sae.train_stage, sae.trainer
torch.set_num_threads(1)
sys.argv = ["cli.py", *sys.argv[1:]]
taken = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (taken + {room}, resource.RLIM_INFINITY))
for attempt in range(2):
    try:
        cli.main()
    except SystemExit as end:
        assert end.code == 1
    sae.memory.check_fits = lambda *_: None  # the second time it is met, not foreseen
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


def test_free_memory_is_at_most_what_the_limits_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    free = memory.free_bytes("cpu")
    assert free is None or 0 < free < 2**50
    monkeypatch.setattr(resource, "getrlimit", lambda _: (2**30, resource.RLIM_INFINITY))
    limited = memory.free_bytes("cpu")
    assert limited is not None
    assert limited <= 2**30


# --- what does not belong together ----------------------------------------------------------------------------


def test_an_sae_of_another_width_is_refused_by_both_names(tiny_root: Path) -> None:
    run = Run.open("run_a", tiny_root)
    for name in ("cfg.json", "sae.safetensors"):
        (run.folder / name).unlink()
    save_sae(run.folder, TopKSae.init(24, NUM_LATENTS, 2, seed=0))
    before = tree(tiny_root, under="run_*")
    cli("harvest", "--sae", "run_a", "--tokens", "2k", "--root", tiny_root, "--json").failed_in_one_line(
        "run 'run_a' is an SAE of activations of width 24", "layers.1.input_layernorm", "has width 16"
    )
    assert tree(tiny_root, under="run_*") == before


# --- W&B ------------------------------------------------------------------------------------------------------


class FakeWandb(ModuleType):
    """What of wandb is used, remembering what it was given."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.started: list[dict[str, Any]] = []
        self.rows: dict[str, list[dict[str, Any]]] = {}
        self.finished: list[str] = []
        self.failed: list[str] = []
        self.fails: Exception | None = None

    def Settings(self, **values: Any) -> Any:
        return SimpleNamespace(**values)

    def init(self, **values: Any) -> Any:
        if self.fails is not None:
            raise self.fails
        self.started.append(values)
        rows = self.rows.setdefault(values["name"], [])
        return SimpleNamespace(
            log=lambda row, step: rows.append({**row, "step": step}),
            finish=lambda exit_code=0: (self.failed if exit_code else self.finished).append(values["name"]),
        )


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_wandb_is_told_of_a_training_that_stops(
    short: Path, tmp_path: Path, wandb: FakeWandb, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise UserError("stopped")

    monkeypatch.setattr("sae.train_stage._Ending.row", fail)
    cli(
        "train", "--no-controls", "--recipe", short, "--seeds", 0, 1, "--wandb", "saes", "--root", tmp_path
    ).failed_in_one_line("stopped")
    assert sorted(wandb.failed) == ["run_a", "run_b"]
    assert wandb.finished == []


def test_the_precision_can_be_given(short: Path, tmp_path: Path) -> None:
    cli("train", "--no-controls", "--recipe", short, "--seeds", 0, "--precision", "bfloat16", "--root", tmp_path).well()
    assert read_json(tmp_path / "run_a" / "run.json")["settings"]["training"]["precision"] == "bfloat16"
    ran = cli(
        "train",
        "--no-controls",
        "--recipe",
        short,
        "--precision",
        "float8",
        "--root",
        tmp_path,
        "--name",
        "x",
        "--json",
    )
    ran.failed_in_one_line("precision", "bfloat16")


def test_wandb_is_given_the_rows_of_the_log_and_no_key(
    short: Path, tmp_path: Path, wandb: FakeWandb, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "secret-key")
    with_it, without = tmp_path / "with", tmp_path / "without"
    ran = cli(
        "train", "--no-controls", "--recipe", short, "--seeds", 0, 1, "--wandb", "saes", "--root", with_it, "--json"
    ).well()
    assert len(ran.out.splitlines()) == 1
    assert [(s["project"], s["name"], s["group"], s["config"]["seed"]) for s in wandb.started] == [
        ("saes", "run_a", "run", 0),
        ("saes", "run_b", "run", 1),
    ]
    assert "secret-key" not in f"{wandb.started} {ran.out} {ran.err} {tree(with_it)}"
    assert wandb.finished == ["run_a", "run_b"]
    for name, rows in wandb.rows.items():
        table = read_table(with_it / name / "training.parquet")
        assert [row["step"] for row in rows] == table["step"].tolist()
        for column in map(str, table.columns.drop("step")):
            np.testing.assert_array_equal([row[column] for row in rows], table[column])
    assert wandb.failed == []
    n = len(wandb.started)
    cli("train", "--no-controls", "--recipe", short, "--seeds", 0, 1, "--root", without).well()
    assert len(wandb.started) == n  # never on by itself
    assert weights(with_it, "run_a") == weights(without, "run_a")
    records = [{**Run.open("run_a", root).record, "created": ""} for root in (with_it, without)]
    assert records[0] == records[1]


def test_wandb_that_is_not_installed_or_refuses(
    short: Path, tmp_path: Path, wandb: FakeWandb, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "secret-key")
    train = (
        "train",
        "--no-controls",
        "--recipe",
        short,
        "--seeds",
        0,
        "--wandb",
        "saes",
        "--root",
        tmp_path / "runs",
        "--json",
    )
    wandb.fails = RuntimeError("401 for secret-key\nmore")
    line = cli(*train).failed_in_one_line("--wandb", "401 for …", "wandb login")
    assert "secret-key" not in line
    assert not (tmp_path / "runs" / "run_a").exists()
    monkeypatch.setitem(sys.modules, "wandb", None)
    ran: Ran = cli(*train)
    ran.failed_in_one_line("--wandb", "pip install wandb")
    assert len(ran.err.splitlines()) == 1  # before any work


def test_memory_errors_have_one_form() -> None:
    with pytest.raises(UserError, match="out of memory on cpu"), memory.out_of_memory_is_told([part()], "cpu"):
        torch.empty(2**62, dtype=torch.uint8)
    with pytest.raises(UserError, match="out of memory on cpu"), memory.out_of_memory_is_told([part()], "cpu"):
        np.empty(2**62, dtype=np.uint8)
