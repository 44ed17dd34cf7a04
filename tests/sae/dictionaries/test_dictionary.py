"""The dictionary and the sparse steps, against dense PyTorch and against each other."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae.common.errors import BadInput
from sae.dictionaries import encoding
from sae.dictionaries.architectures.topk import TopKSae
from sae.dictionaries.kernels import cpu, plain
from sae.dictionaries.kernels.steps import Kernels
from sae.dictionaries.sae import Firings, geometric_median


def dense(firings: Firings, num_latents: int) -> torch.Tensor:
    """[B, M] activations; empty slots add nothing."""
    out = torch.zeros(len(firings.indices), num_latents, dtype=firings.activations.dtype)
    return out.scatter_add_(1, firings.indices, firings.activations)


def random_sae(d_in: int = 12, num_latents: int = 40, k: int = 5, dtype: torch.dtype = torch.float64) -> TopKSae:
    sae = TopKSae.init(d_in, num_latents, k, seed=3, x_sample=torch.randn(64, d_in) + 1).to(dtype=dtype)
    sae.b_enc += torch.randn(num_latents, dtype=dtype) * 0.1
    return sae


@settings(max_examples=150, deadline=None)
@given(data=st.data(), rows=st.integers(1, 4), width=st.integers(1, 300), levels=st.sampled_from([2, 5, 1000]))
def test_topk_is_the_k_largest_positive_values(data: st.DataObject, rows: int, width: int, levels: int) -> None:
    k = data.draw(st.integers(1, width))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    # Few levels make ties; a negative offset makes rows with fewer than k positive values.
    pre = torch.from_numpy(rng.integers(0, levels, (rows, width)) - data.draw(st.integers(0, levels))).float() / 7
    activations, latents = cpu.topk(pre, k)
    expected = pre.relu().topk(k).values
    assert torch.equal(activations.sort(descending=True).values, expected)
    filled = activations > 0
    assert torch.equal(pre.gather(1, latents)[filled], activations[filled])
    assert (latents[~filled] == 0).all()
    assert (activations >= 0).all()
    for row, full in zip(latents, filled, strict=True):
        assert len(set(row[full].tolist())) == int(full.sum())


def test_topk_of_extreme_values() -> None:
    pre = torch.tensor([[1e-45, 3e38, -torch.inf, 1e-30, 0.0, 2.0], [-1.0, -2.0, 0.0, -0.0, -1e-45, -3.0]])
    activations, latents = cpu.topk(pre, 3)
    assert sorted(latents[0].tolist()) == [1, 3, 5]
    assert (activations[1] == 0).all()


def test_results_do_not_depend_on_threads() -> None:
    sae, x = random_sae(64, 500, 9, torch.float32), torch.randn(333, 64)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            pre = torch.linspace(-1, 1, 333 * 500).reshape(500, 333).T.contiguous()
            activations, latents = cpu.topk(pre, 9)
            residual, products, squares = cpu.residuals(activations, latents, sae.W_dec, sae.b_dec, x)
            gradients = cpu.weight_gradients(activations, products, latents, residual, x, 0.5, 500)
            results.append([activations, latents, residual, products, squares, *gradients])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("k", [1, 4, 7])
def test_the_two_kernels_mean_the_same(k: int) -> None:
    torch.manual_seed(0)
    sae = random_sae(10, 33, k)
    x = torch.randn(50, 10, dtype=torch.float64)
    pre = x @ sae.W_enc.T - 0.3  # leaves some slots empty
    ours, theirs = Firings(*cpu.topk(pre, k)), Firings(*plain.topk(pre, k))
    assert torch.equal(dense(ours, 33), dense(theirs, 33))
    assert (ours.activations == 0).any() == (theirs.activations == 0).any()
    torch.testing.assert_close(cpu.decode(*ours, sae.W_dec, sae.b_dec), plain.decode(*ours, sae.W_dec, sae.b_dec))
    a, b = (m.residuals(*ours, sae.W_dec, sae.b_dec, x) for m in (cpu, plain))
    torch.testing.assert_close(a, b)
    arguments = ours.activations, a[1], ours.indices, a[0], x, 0.7, 33
    torch.testing.assert_close(cpu.weight_gradients(*arguments), plain.weight_gradients(*arguments))


@pytest.mark.parametrize("kernels", [cpu, plain])
@pytest.mark.parametrize("shape", [(6, 5), (7,)])
def test_adam_is_torch_adam(kernels: Kernels, shape: tuple[int, ...]) -> None:
    torch.manual_seed(1)
    weight = torch.randn(shape, dtype=torch.float64)
    reference = torch.nn.Parameter(weight.clone())
    optimiser = torch.optim.Adam([reference], lr=0.01, betas=(0.9, 0.999), eps=6.25e-10)
    moments = torch.zeros_like(weight), torch.zeros_like(weight)
    for step in range(1, 6):
        gradient = torch.randn(shape, dtype=torch.float64)
        reference.grad = gradient.clone()
        optimiser.step()
        kernels.adam(weight, gradient, *moments, step=step, rate=0.01, unit_rows=False)
    torch.testing.assert_close(weight, reference.data)


def test_plain_kernels_take_a_seeds_axis() -> None:
    """Each seed's results are those that it has alone, empty slots and all."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    pre, weight, bias, centre, x = random(3, 20, 11), random(3, 11, 4), random(3, 11), random(3, 4), random(20, 4)
    centred = x - centre[:, None]
    slots = plain.topk(pre - 1, 5)
    decoded, rounded = plain.decode(*slots, weight, centre), plain.rounded_topk(pre, centred, weight, bias, 2)
    residual, products, squares = plain.residuals(*slots, weight, centre, x)
    gradients = plain.weight_gradients(slots[0], products, slots[1], residual, centred, 0.3, 11)
    together = [*slots, decoded, *rounded, residual, products, squares, *gradients]
    for s in range(3):
        activations, latents = plain.topk(pre[s] - 1, 5)
        of_one = plain.residuals(activations, latents, weight[s], centre[s], x)
        alone = [
            *(activations, latents, plain.decode(activations, latents, weight[s], centre[s])),
            *(*plain.rounded_topk(pre[s], centred[s], weight[s], bias[s], 2), *of_one),
            *plain.weight_gradients(activations, of_one[1], latents, of_one[0], centred[s], 0.3, 11),
        ]
        for ours, theirs in zip(together, alone, strict=True):
            torch.testing.assert_close(ours[s], theirs)


def test_unit_rows_stay_unit() -> None:
    torch.manual_seed(2)
    start = torch.nn.functional.normalize(torch.randn(8, 6, dtype=torch.float64), dim=1)
    along = start * torch.randn(8, 1, dtype=torch.float64)
    across = torch.randn(8, 6, dtype=torch.float64)
    across -= (across * start).sum(1, keepdim=True) * start
    weights = []
    for gradient in (along + across, across):
        weight, first, second = start.clone(), torch.zeros(8, 6).double(), torch.zeros(8, 6).double()
        cpu.adam(weight, gradient, first, second, step=1, rate=0.05, unit_rows=True)
        weights.append(weight)
    torch.testing.assert_close(weights[0], weights[1])
    torch.testing.assert_close(weights[0].norm(dim=1), torch.ones(8).double())
    assert not torch.allclose(weights[0], start)


def test_moments_do_not_become_subnormal() -> None:
    weight, gradient = torch.ones(1, 4), torch.zeros(1, 4)
    first, second = torch.full((1, 4), 1e-5), torch.full((1, 4), 5e-30)
    for step in range(1, 2000):
        cpu.adam(weight, gradient, first, second, step=step, rate=0.0, unit_rows=False)
    assert (first == 0).all()
    assert (second == 0).all()


def test_encode_and_decode_are_the_equations(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(4)
    sae, x = random_sae(), torch.randn(30, 12, dtype=torch.float64) + 1
    monkeypatch.setattr(encoding, "_PRE_ACTIVATION_BYTES", 7 * 40 * 8)  # 7 rows at a time
    firings = sae.encode(x)
    assert firings.activations.shape == firings.indices.shape == (30, 5)
    pre = ((x - sae.b_dec) @ sae.W_enc.T + sae.b_enc).relu()
    kept = torch.where(pre >= pre.topk(5).values[:, -1:], pre, 0)
    torch.testing.assert_close(dense(firings, 40), kept)
    torch.testing.assert_close(sae.decode(firings), kept @ sae.W_dec + sae.b_dec)
    torch.testing.assert_close(sae.reconstruct(x), sae.decode(firings))


@settings(max_examples=40)
@given(
    seed=st.integers(0, 10_000),
    n=st.integers(0, 300),
    m=st.integers(1, 300),
    d=st.integers(1, 40),
    share=st.floats(0, 1),
)
def test_product_in_tiles_is_the_product(seed: int, n: int, m: int, d: int, share: float) -> None:
    rng = torch.Generator().manual_seed(seed)
    x, weight, bias = torch.randn(n, d, generator=rng), torch.randn(m, d, generator=rng), torch.randn(m, generator=rng)
    k = max(1, round(share * m))
    activations, latents = cpu.product_topk(x, weight, bias, k)
    pre = x.double() @ weight.double().T + bias.double()
    expected = pre.clamp(min=0).topk(k, dim=1).values
    torch.testing.assert_close(activations.double().sort(dim=1, descending=True).values, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        activations.double(), pre.gather(1, latents).where(activations > 0, 0), rtol=1e-5, atol=1e-5
    )
    assert not latents[activations == 0].any()


@pytest.mark.parametrize("memory", [1, 64 * 500 * 4, cpu.TILE_BYTES])
def test_a_tiled_product_is_bitwise_independent_of_threads(memory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "TILE_BYTES", memory)
    torch.manual_seed(0)
    x, weight, bias = torch.randn(1500, 24), torch.randn(500, 24), torch.randn(500)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(cpu.product_topk(x, weight, bias, 7))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for of in found[1:] for one, other in zip(found[0], of, strict=True))


@pytest.mark.parametrize("capability", ["AVX2", "AVX512"])
def test_a_dictionary_multiplies_in_tiles_without_avx512(capability: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    in_tiles = mock.Mock(side_effect=cpu.product_topk)
    monkeypatch.setattr(cpu, "product_topk", in_tiles)
    sae, x = TopKSae.init(8, 16, 2, seed=0), torch.randn(3, 8)
    torch.testing.assert_close(dense(sae.encode(x), 16), dense(sae.to(dtype=torch.float64).encode(x), 16).float())
    assert in_tiles.call_count == (capability == "AVX2")


def test_encode_takes_any_float_and_refuses_another_width() -> None:
    sae = TopKSae.init(8, 16, 2, seed=0)
    assert sae.encode(torch.randn(3, 8).bfloat16()).activations.dtype == torch.float32
    assert len(sae.encode(torch.empty(0, 8)).indices) == 0
    with pytest.raises(BadInput, match=r"width 8.*hookpoint"):
        sae.encode(torch.randn(3, 9))


def test_init_depends_on_the_seed_alone() -> None:
    sample = torch.randn(50, 16) + 3
    a, again, b = (TopKSae.init(16, 64, 4, seed, sample) for seed in (0, 0, 1))
    assert torch.equal(a.W_enc, again.W_enc)
    assert not torch.equal(a.W_enc, b.W_enc)
    assert torch.equal(a.b_dec, b.b_dec)
    assert float(a.W_enc.abs().max()) <= 0.25
    torch.testing.assert_close(a.W_dec.norm(dim=1), torch.ones(64))
    torch.testing.assert_close(torch.nn.functional.cosine_similarity(a.W_dec, a.W_enc), torch.ones(64))


def test_geometric_median_withstands_outliers() -> None:
    torch.manual_seed(0)
    inner = torch.randn(400, 3) * 0.1 + torch.tensor([1.0, 2.0, 3.0])
    median = geometric_median(torch.cat([inner, torch.full((40, 3), 1e4)]))
    assert float((median - torch.tensor([1.0, 2.0, 3.0])).norm()) < 0.1
    torch.testing.assert_close(geometric_median(torch.ones(5, 3)), torch.ones(3).double())


def test_shapes_are_checked() -> None:
    with pytest.raises(ValueError, match="W_dec has shape"):
        TopKSae(torch.zeros(4, 3), torch.zeros(4), torch.zeros(3, 4), torch.zeros(3), k=1)
    with pytest.raises(ValueError, match="k = 5"):
        TopKSae(torch.zeros(4, 3), torch.zeros(4), torch.zeros(4, 3), torch.zeros(3), k=5)
    with pytest.raises(ValueError, match="contiguous"):
        cpu.topk(torch.randn(6, 4).T, 2)
