"""Which precision a training gets, where that is written down, and that it binds whoever goes on."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from test_trainer import train
from tiny_study import write_recipe

from sae.activations.subject import Subject
from sae.common import precision
from sae.common.errors import SettingsDiffer, UserError
from sae.common.precision import Precision
from sae.common.progress import say_once
from sae.dictionaries.architectures.topk import TopKSae
from sae.dictionaries.sae import Objective, total_variance
from sae.settings import TrainingSettings
from sae.study import stage
from sae.study.recipes import settings_from
from sae.study.run import Run, Study
from sae.study.stage import Compute
from sae.study.train import train_studies

D, M, K, B = 16, 64, 4, 96
ROUNDED = pytest.mark.parametrize("mode", ["bfloat16", "int8"])


class Batches(Sequence[torch.Tensor]):
    fingerprint = "synthetic"

    def __init__(self, steps: int, fail_at: int | None = None) -> None:
        self.steps, self.fail_at = steps, fail_at

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: Any) -> Any:
        if step == self.fail_at:
            raise KeyboardInterrupt
        return torch.randn(B, D, generator=torch.Generator().manual_seed(step)).cumsum(1)


def settings(asked: str) -> TrainingSettings:
    given = {"num_latents": M, "k": K, "batch_tokens": B, "checkpoint_steps": 4, "precision": asked}
    return TrainingSettings.model_validate(given)


def fresh() -> TopKSae:
    return TopKSae.init(D, M, K, 0, Batches(1)[0])


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> dict[str, bool]:
    """What the machine says it can do."""
    can = {"multiply": True}
    say_once.cache_clear()
    monkeypatch.setattr(precision, "_multiplies_bfloat16", lambda _: can["multiply"])
    monkeypatch.setattr(precision, "has_int8_products", lambda: False)
    return can


def test_the_precision_is_requested_or_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    none, bits16, tiles, bits8 = ("float32", "bfloat16", "bfloat16", "int8")
    cases = ((0, 0, 0, none), (0, 1, 0, bits16), (0, 0, 1, tiles), (1, 0, 0, bits8), (1, 1, 1, bits8))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    for vnni, avx, amx, expected in cases:
        monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda vnni=vnni: bool(vnni))
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda avx=avx: bool(avx))
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: bool(amx))
        assert precision.resolve("auto", "cpu") == expected
        assert precision.resolve_float("auto", "cpu") == ("bfloat16" if avx or amx else "float32")
        for asked in ("float32", "bfloat16", "int8"):
            assert precision.resolve(asked, "cpu") == asked
    monkeypatch.delattr(torch.cpu, "_is_vnni_supported")
    assert precision.resolve("auto", "cpu") == "bfloat16"
    with pytest.raises(UserError, match="int8 is for CPUs"):
        precision.resolve("int8", "cuda")
    assert precision.resolve("auto", "meta") == "float32"
    for capability, expected in (((7, 5), "float32"), ((8, 0), "bfloat16"), ((9, 0), "bfloat16")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, capability=capability: capability)
        assert precision.resolve("auto", "cuda") == expected


LIMITS = ["AVX2", "AVX512_CORE", "AVX512_CORE_VNNI", "AVX512_CORE_BF16", "AVX512_CORE_FP16", "AVX512_CORE_AMX", "ALL"]


@pytest.mark.parametrize("limit", LIMITS)
def test_libraries_limited_by_the_environment_count_as_such(limit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor with every instruction, whose libraries may use only some: what an ordinary CPU sees."""
    for name in ("_is_vnni_supported", "_is_avx512_bf16_supported", "_is_amx_tile_supported", "_is_amx_fp16_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: True)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    at = LIMITS.index(limit)
    assert precision.has_int8_products() == (at >= 2)
    assert precision.is_emulated("bfloat16", "cpu") == (at < 3)
    assert precision.is_emulated("float16", "cpu") == (at < 4)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert precision.resolve("auto", "cpu") == "float32"
    assert all(precision.is_emulated(kind, "cpu") for kind in ("int8", "bfloat16", "float16"))


@ROUNDED
def test_activations_and_gradients_are_not_rounded(mode: Precision) -> None:
    sae, x = fresh(), Batches(1)[0]
    plain, rounded = (
        sae.loss_and_gradient(x, Objective(total_variance(x), len(x), precision=of)) for of in ("float32", mode)
    )
    assert torch.equal(plain[0].firings, rounded[0].firings)  # the same latents are chosen here
    for name, gradient in plain[1].items():
        torch.testing.assert_close(rounded[1][name], gradient, rtol=1e-5, atol=1e-7)


@ROUNDED
def test_resumed_bit_for_bit(mode: Precision, tmp_path: Path) -> None:
    whole, parted = fresh(), fresh()
    train(Batches(10), [whole], settings(mode), [tmp_path / "whole_a" / "training-state"])
    folder = tmp_path / "parted_a" / "training-state"
    with pytest.raises(KeyboardInterrupt):
        train(Batches(10, fail_at=6), [parted], settings(mode), [folder])
    again = fresh()
    assert train(Batches(10), [again], settings(mode), [folder])[0].resumed_from == 4
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters().values(), again.parameters().values(), strict=True))


def test_an_unfinished_training_does_not_change_its_precision(tmp_path: Path, machine: dict[str, bool]) -> None:
    folder = tmp_path / "run_a" / "training-state"
    with pytest.raises(KeyboardInterrupt):
        train(Batches(10, fail_at=6), [fresh()], settings("auto"), [folder])
    machine["multiply"] = False
    with pytest.raises(SettingsDiffer, match="precision: 'bfloat16' there, 'float32' now"):
        train(Batches(10), [fresh()], settings("auto"), [folder])
    assert train(Batches(10), [fresh()], settings("bfloat16"), [folder])[0].resumed_from == 4


@pytest.mark.parametrize("first", [True, False])
def test_a_study_grows_in_its_first_precision(
    first: bool, machine: dict[str, bool], tiny_recipe: Path, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    """A seed added on a machine of another kind is the seed that would have been trained with the first."""
    texts = tiny_recipe.parent / "texts"
    base = settings_from(write_recipe(tmp_path / "short.toml", tiny_llama_dir, texts, tokens=2048))
    together, grown = tmp_path / "together", tmp_path / "grown"
    machine["multiply"] = first
    train_studies([Study("run", base, (0, 1))], together, Compute("cpu"))
    train_studies([Study("run", base, (0,))], grown, Compute("cpu"))
    machine["multiply"] = not first
    train_studies([Study("run", base, (0, 1))], grown, Compute("cpu"))
    for name in ("run_a", "run_b"):
        assert Run.open(name, grown).record["precision"] == ("bfloat16" if first else "float32")
        weights = [(root / name / "sae.safetensors").read_bytes() for root in (together, grown)]
        assert weights[0] == weights[1]
    asked = base.with_values(training={"precision": "float32"})
    with pytest.raises(SettingsDiffer, match="precision"):
        train_studies([Study("run", asked, (2,))], grown, Compute("cpu"))


def test_trainings_from_before_the_choice_are_float32(
    machine: dict[str, bool], tiny_recipe: Path, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    assert machine["multiply"]
    texts = tiny_recipe.parent / "texts"
    base = settings_from(write_recipe(tmp_path / "short.toml", tiny_llama_dir, texts, tokens=2048))
    train_studies([Study("run", base, (0,))], tmp_path, Compute("cpu"))
    path = tmp_path / "run_a" / "run.json"
    record = json.loads(path.read_text())
    del record["precision"], record["settings"]["training"]["precision"], record["digest"]
    path.write_text(json.dumps(record))
    train_studies([Study("run", base, (0, 1))], tmp_path, Compute("cpu"))
    assert Run.open("run_b", tmp_path).record["precision"] == "float32"


@pytest.mark.parametrize("first", [True, False])
def test_a_study_keeps_the_dtype_it_began_with(
    first: bool,
    machine: dict[str, bool],
    tiny_recipe: Path,
    tiny_llama_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    texts = tiny_recipe.parent / "texts"
    base = settings_from(write_recipe(tmp_path / "short.toml", tiny_llama_dir, texts, tokens=2048))
    auto = base.with_values(subject={"dtype": "auto"}, training={"precision": "float32"})
    machine["multiply"] = first
    train_studies([Study("run", auto, (0,))], tmp_path, Compute("cpu"))
    begun_in = "bfloat16" if first else "float32"
    assert not _warnings(capsys)
    machine["multiply"] = not first
    train_studies([Study("run", auto, (0, 1))], tmp_path, Compute("cpu"))
    warnings = _warnings(capsys)
    for name in ("run_a", "run_b"):
        run = Run.open(name, tmp_path)
        assert run.settings.subject.dtype == run.record["subject"]["dtype"] == begun_in
    assert len(warnings) == first
    assert all("subject.dtype is bfloat16" in line for line in warnings)
    other = base.with_values(subject={"dtype": "float32" if first else "bfloat16"}, training={"precision": "float32"})
    with pytest.raises(SettingsDiffer, match="dtype"):
        train_studies([Study("run", other, (2,))], tmp_path, Compute("cpu"))


@pytest.mark.parametrize("mode", ["bfloat16", "int8"])
def test_an_emulated_precision_warns_once(
    mode: str, machine: dict[str, bool], tiny_llama_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    machine["multiply"] = False
    for _ in range(2):
        precision.warn_if_emulated("training.precision", mode, "cpu")
        precision.warn_if_emulated("training.precision", "float32", "cpu")
    (line,) = _warnings(capsys)
    assert f"training.precision is {mode}" in line
    assert "AVX-512" in line
    assert "auto" in line
    machine["multiply"] = True
    assert Subject.load(str(tiny_llama_dir)).dtype == torch.bfloat16
    machine["multiply"] = False
    assert Subject.load(str(tiny_llama_dir)).dtype == torch.float32
    assert not _warnings(capsys)
    Subject.load(str(tiny_llama_dir), dtype="bfloat16")
    assert "subject.dtype is bfloat16" in _warnings(capsys)[0]


def _warnings(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning:")]


@pytest.mark.parametrize(
    ("text", "cpus"),
    [("200000 100000", 2), ("150000 100000", 2), ("50000 100000", 1), ("max 100000", None), ("", None)],
)
def test_threads_do_not_exceed_a_containers_quota(text: str, cpus: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", lambda _: text)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    assert stage._cpus_allowed() == (cpus or 64)
