"""Each architecture's encoding and gradient, against its paper's equations over dense matrices and autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gradient_check import EXPECTED, B, D, K, M, check_gradient, dense, example
from hypothesis import given
from hypothesis import strategies as st

from sae.dictionaries import entries
from sae.dictionaries.architectures import ARCHITECTURES
from sae.dictionaries.architectures.batchtopk import BatchTopKSae
from sae.dictionaries.architectures.gated import GatedSae
from sae.dictionaries.architectures.jumprelu import JumpReluSae
from sae.dictionaries.architectures.relu import ReluSae
from sae.dictionaries.entries import batch_topk
from sae.dictionaries.sae import AuxK, Firings, Objective, total_variance

KINDS = sorted(EXPECTED)


def test_the_equations_of_every_architecture_are_there() -> None:
    assert set(EXPECTED) == set(ARCHITECTURES)


def tight(monkeypatch: pytest.MonkeyPatch, share: float) -> None:
    """Pieces of seven rows, few slots at once; rows with more than ``share`` of M as dense products."""
    monkeypatch.setattr(entries, "_PIECE_BYTES", 7 * M * 8)
    monkeypatch.setattr(entries, "_SLOTS", 150)
    monkeypatch.setattr(entries, "_DENSE", share)


@pytest.mark.parametrize("share", [0.0, 0.4, 0.5, 1.0])
@pytest.mark.parametrize("n_dead", [0, 5, M])
@pytest.mark.parametrize("kind", KINDS)
def test_the_whole_gradient_is_that_of_autograd(
    kind: str, n_dead: int, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    tight(monkeypatch, share)
    sae, x = example(kind, seed=n_dead)
    dead = torch.zeros(M, dtype=torch.bool)
    dead[torch.randperm(M, generator=torch.Generator().manual_seed(1))[:n_dead]] = True
    check_gradient(sae, x, Objective(total_variance(x), B, AuxK(dead, 6, 0.4), 0.03, bandwidth=0.2))


@pytest.mark.parametrize("kind", KINDS)
def test_encode_and_decode_are_the_equations(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tight(monkeypatch, 0.5)
    sae, x = example(kind)
    objective = Objective(total_variance(x), B)
    expected = EXPECTED[kind](sae.parameters(), x, objective).activations
    if isinstance(sae, BatchTopKSae):
        sae.threshold.fill_(0.6)
        pre = ((x - sae.b_dec) @ sae.W_enc.T + sae.b_enc).relu()
        expected = pre * (pre > 0.6)
    firings = sae.encode(x)
    torch.testing.assert_close(dense(firings), expected)
    assert int((firings.activations > 0).sum()) == int((expected > 0).sum())
    assert (firings.indices[firings.activations == 0] == 0).all()
    assert firings.indices.shape[1] == int((expected > 0).sum(1).max())
    torch.testing.assert_close(sae.reconstruct(x), expected @ sae.W_dec + sae.b_dec)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_to_encode_and_nothing_that_fires(kind: str) -> None:
    sae, x = example(kind)
    assert len(sae.encode(x[:0]).indices) == 0
    sae.b_enc.fill_(-1e4)
    assert (sae.encode(x).activations == 0).all()
    torch.testing.assert_close(sae.reconstruct(x), sae.b_dec.expand_as(x))
    loss, gradient = sae.loss_and_gradient(x, Objective(total_variance(x), B, sparsity=0.1))
    assert (loss.firings == 0).all()
    assert all(bool(torch.isfinite(g).all()) for g in gradient.values())
    assert (gradient["W_enc"] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_moving_keeps_every_weight_under_its_name(kind: str) -> None:
    sae, x = example(kind)
    before = {name: w.clone() for name, w in sae.weights().items()}
    assert sae.encode(x.float()).activations.dtype == torch.float64
    sae.to(dtype=torch.float32)
    assert {w.dtype for w in [*sae.weights().values(), *sae.parameters().values()]} == {torch.float32}
    assert list(sae.weights()) == list(before)
    for name, weight in sae.weights().items():
        assert getattr(sae, name) is weight
        assert torch.equal(weight, before[name].float())
    assert {"W_enc", "W_dec", "b_dec"} < set(sae.parameters())
    assert sae.b_enc.shape == (M,)


@pytest.mark.parametrize("kind", KINDS)
def test_init_depends_on_the_seed_alone(kind: str) -> None:
    sample = torch.randn(200, D) + 3
    a, again, b = (ARCHITECTURES[kind].init(D, M, K, seed, sample) for seed in (0, 0, 1))
    assert all(torch.equal(x, y) for x, y in zip(a.weights().values(), again.weights().values(), strict=True))
    assert not torch.equal(a.W_enc, b.W_enc)
    assert torch.equal(a.b_dec, b.b_dec)
    torch.testing.assert_close(a.W_dec.norm(dim=1), torch.ones(M))
    assert a.k == K
    assert a.architecture == kind
    ARCHITECTURES[kind].init(D, M, M, 0)


def test_jumprelu_begins_at_four_times_k() -> None:
    sample = torch.randn(200, D) + 3
    sae = JumpReluSae.init(D, M, K, 0, sample)
    assert float((sae.encode(sample).activations > 0).sum(1).double().mean()) == pytest.approx(4 * K, rel=0.01)
    assert (JumpReluSae.init(D, M, M, 0, sample).threshold > 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_k_and_shapes_are_checked(kind: str) -> None:
    sae, _ = example(kind)
    make: Any = type(sae)
    weights = sae.weights()
    for k in (0, M + 1):
        with pytest.raises(ValueError, match=f"k = {k} is not between 1 and the number of latents, {M}"):
            make(**weights, k=k)
    if kind != "topk":
        assert make(**weights, k=None).k is None
    for name in set(weights) - {"W_enc"}:
        with pytest.raises(ValueError, match=name.replace("b_gate", "b_enc")):
            make(**{**weights, name: torch.zeros(3, 3, 3)}, k=K)
    if kind == "jumprelu":
        with pytest.raises(ValueError, match="positive"):
            make(**{**weights, "threshold": torch.zeros(M)}, k=K)


# --- the choice of BatchTopK --------------------------------------------------------------------------------------


@given(seed=st.integers(0, 2**32), rows=st.integers(1, 30), k=st.integers(1, 12), uneven=st.floats(0, 4))
def test_batch_topk_takes_the_largest_of_the_batch(seed: int, rows: int, k: int, uneven: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 5, generator=generator, dtype=torch.float64)
    x *= (uneven * torch.randn(rows, 1, generator=generator, dtype=torch.float64)).exp()  # a few tokens take it all
    weight = torch.randn(16, 5, generator=generator, dtype=torch.float64)
    bias = torch.randn(16, generator=generator, dtype=torch.float64)
    chosen = batch_topk(x, weight, bias, k)
    found = torch.zeros(rows, 16, dtype=torch.float64)
    slots = 0
    for row, group in chosen.groups:
        found[row] = dense(Firings(group.pre, group.indices), 16)
        slots += group.pre.numel()
    pre = (x @ weight.T + bias).relu()
    in_order = pre.flatten().sort(descending=True).values
    last = in_order[: rows * k][-1]
    torch.testing.assert_close(found, torch.where(pre >= last, pre, 0))
    assert float(chosen.least) == pytest.approx(float(last))
    assert slots <= 8 * rows * k + 16
    assert sorted(torch.cat([row for row, _ in chosen.groups]).tolist()) == list(range(rows))


def test_batch_topk_breaks_ties_to_the_wanted_number() -> None:
    chosen = batch_topk(torch.ones(6, 2), torch.ones(8, 2), torch.zeros(8), 3)
    assert sum(int((group.pre > 0).sum()) for _, group in chosen.groups) == 18
    assert float(chosen.least) == 2


def test_the_threshold_is_the_mean_smallest_activation() -> None:
    sae, x = example("batchtopk")
    assert isinstance(sae, BatchTopKSae)
    least = []
    for step in range(5):
        loss, _ = sae.loss_and_gradient(x[step * 10 : step * 10 + 14], Objective(1.0, 14))
        assert loss.least is not None
        least.append(float(loss.least))
        sae.measure(loss, step)
        assert float(sae.threshold) == pytest.approx(sum(least) / len(least))
    sae.measure(loss, 100_000)  # later on, each batch counts for a hundredth
    assert float(sae.threshold) == pytest.approx(0.99 * sum(least) / 5 + 0.01 * least[-1])


def test_relu_and_gated_agree_without_the_gate() -> None:
    relu, x = example("relu")
    assert isinstance(relu, ReluSae)
    zero = torch.zeros(M, dtype=torch.float64)
    gated = GatedSae(relu.W_enc, relu.b_enc, zero, relu.b_enc, relu.W_dec, relu.b_dec, K)
    torch.testing.assert_close(dense(gated.encode(x)), dense(relu.encode(x)))
