"""Several seeds worked on as one: each seed's numbers are those that it has alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fresh_triton import interpreted_steps
from test_trainer import Batches, folders, settings, train

from sae.dictionaries.architectures.relu import ReluSae
from sae.dictionaries.architectures.topk import TopKSae
from sae.dictionaries.kernels import plain
from sae.dictionaries.kernels.steps import Kernels
from sae.dictionaries.sae import AuxK, Objective, Sae, total_variance
from sae.training import stacked
from sae.training.stacked import Stack, stack_on_gpu

D, M, K = 12, 40, 4


def fresh(seeds: int, dtype: torch.dtype = torch.float32, d_in: int = D, num_latents: int = M) -> list[TopKSae]:
    x = torch.randn(16, d_in, generator=torch.Generator().manual_seed(1))
    saes = [TopKSae.init(d_in, num_latents, min(K, num_latents), seed, x).to(dtype=dtype) for seed in range(seeds)]
    for sae in saes:
        sae.b_enc += 0.1 * torch.randn(sae.b_enc.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    return saes


def dead(n: int, num_latents: int = M) -> torch.Tensor:
    """``n`` of the latents."""
    order = torch.randperm(num_latents, generator=torch.Generator().manual_seed(n))
    return torch.zeros(num_latents, dtype=torch.bool).scatter_(0, order[:n], True)


def check(saes: list[TopKSae], x: torch.Tensor, objectives: list[Objective], kernels: Kernels = plain) -> None:
    """That the stack's losses and gradients are those of each dictionary alone, to the rounding of its type."""
    alone = [sae.loss_and_gradient(x, objective) for sae, objective in zip(saes, objectives, strict=True)]
    together = Stack(saes, kernels).loss_and_gradient(x, objectives)
    tolerance = 1e-12 if x.dtype == torch.float64 else 2e-5
    for (loss, gradient), (loss_alone, gradient_alone) in zip(together, alone, strict=True):
        for name in ("fvu", "auxk", "sparsity", "firings"):
            one, other = getattr(loss, name), getattr(loss_alone, name)
            assert (one.dtype, one.shape) == (other.dtype, other.shape)
            torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)
        assert set(gradient) == set(gradient_alone)
        for name, of_alone in gradient_alone.items():
            assert gradient[name].is_contiguous()
            torch.testing.assert_close(
                gradient[name], of_alone, rtol=tolerance, atol=tolerance * float(of_alone.abs().max())
            )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("piece_bytes", [1, 4 * M * 8 * 7, 1 << 20])
@pytest.mark.parametrize("seeds", [1, 3])
def test_each_seed_has_the_gradient_it_has_alone(
    monkeypatch: pytest.MonkeyPatch, seeds: int, piece_bytes: int, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(stacked, "_PIECE_BYTES", piece_bytes)
    x = Batches(1)[0].to(dtype)
    auxk = [AuxK(dead(n), k, 0.4) for n, k in ((30, 6), (0, 6), (5, 6))]
    objectives = [Objective(total_variance(x), len(x), of_seed) for of_seed in auxk[:seeds]]
    check(fresh(seeds, dtype), x, objectives)


def test_without_auxk_and_with_one_token() -> None:
    x = Batches(1)[0]
    check(fresh(2), x, [Objective(3.0, len(x))] * 2)
    check(fresh(2), x[:1], [Objective(3.0, 1, AuxK(dead(M), 3, 0.1))] * 2)


def test_rounded_products_choose_as_one_seed_alone_does() -> None:
    x = Batches(1)[0]
    check(fresh(2), x, [Objective(total_variance(x), len(x), precision="bfloat16")] * 2)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_by_triton(precision: str) -> None:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(3, 5, generator=generator)
    auxk = [AuxK(dead(n, 11), 2, 0.4) for n in (5, 0)]
    with interpreted_steps() as steps:
        check(
            fresh(2, d_in=5, num_latents=11),
            x,
            [Objective(7.0, len(x), of_seed, precision="bfloat16" if precision == "bfloat16" else "float32")
             for of_seed in auxk],
            steps,
        )  # fmt: skip


def test_a_stack_equals_its_dictionaries() -> None:
    saes = fresh(2)
    before = [{name: t.clone() for name, t in sae.parameters().items()} for sae in saes]
    stack = Stack(saes, plain)
    for seed, (sae, old) in enumerate(zip(saes, before, strict=True)):
        for name, tensor in sae.parameters().items():
            assert torch.equal(tensor, old[name])
            tensor.add_(1)
            assert torch.equal(stack.weights[name][seed], old[name] + 1)


def test_training_in_a_stack_is_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = settings(tokens=20 * 64, dead_tokens=3 * 64, learning_rate=1e-3)
    alone = [TopKSae.init(D, M, K, seed, Batches(1)[0]) for seed in (0, 1)]
    logs = train(Batches(20), alone, values, folders(tmp_path / "alone", 2))

    def always(saes: list[TopKSae]) -> Stack:
        return Stack(saes, plain)

    monkeypatch.setattr("sae.training.trainer.stack_on_gpu", always)
    together = [TopKSae.init(D, M, K, seed, Batches(1)[0]) for seed in (0, 1)]
    places = folders(tmp_path / "together", 2)
    with pytest.raises(KeyboardInterrupt):
        train(Batches(20, fail_at=11), together, values, places)
    together = [TopKSae.init(D, M, K, seed, Batches(1)[0]) for seed in (0, 1)]
    stacked_logs = train(Batches(20), together, values, places)
    assert stacked_logs[0].resumed_from == 8
    for one, other, log, stacked_log in zip(alone, together, logs, stacked_logs, strict=True):
        for name, weight in one.parameters().items():
            torch.testing.assert_close(other.parameters()[name], weight, rtol=1e-4, atol=1e-5)
        assert [row["auxk"] for row in stacked_log.rows] == pytest.approx([row["auxk"] for row in log.rows], rel=1e-3)


def test_a_stack_exists_only_where_useful() -> None:
    assert stack_on_gpu([]) is None
    assert stack_on_gpu(fresh(2)) is None  # in main memory
    others: list[Sae] = [ReluSae.init(D, M, K, 0)]
    assert stack_on_gpu(others) is None
