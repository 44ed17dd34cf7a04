"""The choice by rounded pre-activations: what it returns is exact, and what it can mistake is a near tie."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from sae.common.precision import Precision
from sae.dictionaries.architectures.topk import TopKSae
from sae.dictionaries.encoding import product_of_int8, topk_firings
from sae.dictionaries.kernels import cpu, plain
from sae.dictionaries.kernels.cpu_shortlist import BFLOAT16_MARGIN

ROUNDED = pytest.mark.parametrize("precision", ["bfloat16", "int8"])


def random_sizes(seed: int, n: int, num_latents: int, d_in: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d_in, generator=generator) * torch.rand(n, 1, generator=generator) * 3
    weight = torch.nn.functional.normalize(torch.randn(num_latents, d_in, generator=generator), dim=1)
    return x, weight, torch.randn(num_latents, generator=generator) * 0.1


def dense(slots: Sequence[Tensor], num_latents: int) -> Tensor:
    """Activations [B, M] from slots."""
    out = torch.zeros(len(slots[0]), num_latents, dtype=slots[0].dtype)
    return out.scatter_add_(1, slots[1], slots[0])


def one_hot_setting(values: list[list[float]]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A product whose results are given: one token a row, and weights that pick the token's numbers out."""
    pre = torch.tensor(values).bfloat16()
    m = pre.shape[1]
    return pre, pre.float(), torch.eye(m), torch.zeros(m)


NUMBERS = st.sampled_from([-np.inf, -3.0, -1e-30, -0.0, 0.0, 1e-30, 0.25, 1.0, 1.0078125, 2.0, 3.0, 3e38]) | st.floats(
    -4, 4, width=16
)


@settings(max_examples=120, deadline=None)
@given(data=st.data(), m=st.integers(1, 70), k=st.integers(1, 12))
def test_the_largest_of_given_numbers(data: st.DataObject, m: int, k: int) -> None:
    """Where bfloat16 tells all numbers apart, the choice is that of torch.topk, ties, signs and infinities included."""
    k = min(k, m)
    finite = NUMBERS.filter(np.isfinite)
    pre, x, weight, bias = one_hot_setting([data.draw(st.lists(finite, min_size=m, max_size=m)) for _ in range(2)])
    activations, latents = cpu.rounded_topk(pre, x, weight, bias, k)
    expected = pre.float().relu().topk(k).values
    assert torch.equal(activations.sort(1, descending=True).values, expected)
    filled = activations > 0
    assert torch.equal(activations[filled], x.gather(1, latents)[filled])
    assert (latents[~filled] == 0).all()
    for row, fires in zip(latents, filled, strict=True):
        assert len(row[fires].unique()) == int(fires.sum())


@ROUNDED
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), m=st.integers(1, 600), k=st.integers(1, 40), d=st.integers(1, 70))
def test_only_near_ties_differ_from_float32(precision: Precision, seed: int, m: int, k: int, d: int) -> None:
    x, weight, bias = random_sizes(seed, 20, m, d)
    k = min(k, m)
    pre = x @ weight.T + bias
    firings = topk_firings(x, weight, bias, k, precision)
    assert firings.indices.dtype == torch.int64
    filled = firings.activations > 0
    assert (firings.indices[~filled] == 0).all()
    exact = pre.gather(1, firings.indices)
    torch.testing.assert_close(firings.activations[filled], exact[filled], rtol=1e-6, atol=2e-6)
    # No latent that was left out exceeds one that was taken by more than the product can be wrong: half a unit in
    # the last place for each of the two factors, summed over the width, and the units that are looked at in any case.
    # What 8 bits may hide is less: six standard deviations of a sum of roundings are computed exactly.
    taken = dense(firings, m) > 0
    best_rejected = torch.where(taken, -torch.inf, pre).max(1).values
    worst_taken = torch.where(filled, firings.activations, torch.inf).min(1).values
    worst_taken = torch.where(filled.all(1), worst_taken, 0)
    bound = 2 * 2**-8 * (x.abs() @ weight.abs().T + bias.abs()).max(1).values + 2**-8 * best_rejected.abs()
    bound = torch.full_like(bound, 1e-5) if precision == "int8" else bound
    assert (best_rejected <= worst_taken + bound).all()


@ROUNDED
@pytest.mark.parametrize("outlying", [1, 50])
def test_without_ties_the_choice_equals_float32(precision: Precision, outlying: float) -> None:
    """On random numbers too few sit within an error of the K-th for any to be hidden by the margin.

    Language models have coordinates far larger than all others, which make the steps of 8 bits coarse.
    """
    x, weight, bias = random_sizes(3, 400, 1024, 64)
    x[:, 7] *= outlying
    expected = dense(cpu.topk(torch.addmm(bias, x, weight.T), 16), 1024)
    found = dense(topk_firings(x, weight, bias, 16, precision), 1024)
    differing = ((found > 0) != (expected > 0)).any(1).float().mean()
    assert float(differing) < 0.01
    same = (found > 0) & (expected > 0)
    torch.testing.assert_close(found[same], expected[same], rtol=1e-5, atol=1e-6)


def test_the_margin_is_looked_at() -> None:
    """A latent that rounding put some units behind the K-th is found when its exact pre-activation is the larger."""
    for behind in range(1, BFLOAT16_MARGIN + 1):
        bits = torch.tensor([[16256, 16256 - behind, 16000, 15000]], dtype=torch.int16)  # 1.0 and below
        weight = torch.eye(4)
        x = torch.tensor([[0.99, 1.01, 0.5, 0.1]])
        activations, latents = cpu.rounded_topk(bits.view(torch.bfloat16), x, weight, torch.zeros(4), 1)
        assert latents.item() == 1
        assert activations.item() == pytest.approx(1.01)


def test_fewer_positive_than_slots() -> None:
    pre, x, weight, bias = one_hot_setting([[-1.0, 0.5, -2.0, 0.25], [-1.0, -1.0, -0.5, 0.0]])
    activations, latents = cpu.rounded_topk(pre, x, weight, bias, 3)
    assert activations.tolist() == [[0.5, 0.25, 0.0], [0.0, 0.0, 0.0]]
    assert latents.tolist() == [[1, 3, 0], [0, 0, 0]]


@ROUNDED
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf])
@pytest.mark.parametrize("place", [0, 3, 40])
@pytest.mark.parametrize("where", ["bias", "weight", "x"])
def test_what_is_not_finite_surfaces(precision: Precision, bad: float, place: int, where: str) -> None:
    """Whatever its sign: a processor's own NaN is negative, and no comparison finds it."""
    x, weight, bias = random_sizes(5, 3, 1041, 8)
    if where == "x":
        x[:, place % 8] = torch.tensor(bad)
    elif where == "weight":
        weight[place] = torch.tensor(bad) * x.sum(1).sign()[0]
        x = x * (x.sum(1).sign() * x.sum(1).sign()[0])[:, None]
    else:
        bias[place] = torch.tensor(bad)
    firings = topk_firings(x, weight, bias, 4, precision)
    assert not torch.isfinite(firings.activations).all(1).any()


@ROUNDED
def test_a_product_that_overflows_surfaces(precision: Precision) -> None:
    x, weight, bias = random_sizes(6, 2, 50, 8)
    firings = topk_firings(x * 1e25, weight * 1e25, bias, 4, precision)
    assert not torch.isfinite(firings.activations).all(1).any()


@ROUNDED
def test_more_nans_than_slots(precision: Precision) -> None:
    x, weight, bias = random_sizes(7, 2, 50, 8)
    firings = topk_firings(x, weight, torch.full_like(bias, torch.nan), 4, precision)
    assert torch.isnan(firings.activations).all()


@pytest.mark.parametrize("value", [1.0, 0.0, -1.0])
def test_all_alike(value: float) -> None:
    pre = torch.full((2, 40_000), value).bfloat16()
    weight, bias = torch.zeros(40_000, 1), torch.full((40_000,), value)
    activations, latents = cpu.rounded_topk(pre, torch.zeros(2, 1), weight, bias, 10)
    assert (activations == max(value, 0)).all()
    assert all(len(row.unique()) == (10 if value > 0 else 1) for row in latents)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8"])
def test_rows_are_worked_on_in_pieces(precision: Precision, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias = random_sizes(8, 30, 64, 8)
    whole = topk_firings(x, weight, bias, 5, precision)
    monkeypatch.setattr("sae.dictionaries.encoding._CPU_BFLOAT16_BYTES", 7 * 64 * 2)
    monkeypatch.setattr("sae.dictionaries.encoding._PRE_ACTIVATION_BYTES", 7 * 64 * 4)
    pieces = topk_firings(x, weight, bias, 5, precision)
    assert torch.equal(dense(whole, 64) > 0, dense(pieces, 64) > 0)
    torch.testing.assert_close(whole.activations, pieces.activations, rtol=1e-6, atol=1e-6)
    assert topk_firings(x[:0], weight, bias, 5, precision).activations.shape == (0, 5)


@ROUNDED
def test_the_same_whatever_the_number_of_threads(precision: Precision, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias = random_sizes(9, 33, 200, 16)
    found: list[Any] = []
    for threads in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        found.append(topk_firings(x, weight, bias, 9, precision))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


def test_pytorch_operations_mean_the_same() -> None:
    x, weight, bias = random_sizes(10, 50, 300, 16)
    pre = torch.addmm(bias, x, weight.T).bfloat16()
    loops = dense(cpu.rounded_topk(pre, x, weight, bias, 8), 300)
    operations = dense(plain.rounded_topk(pre, x, weight, bias, 8), 300)
    torch.testing.assert_close(loops, operations, rtol=1e-5, atol=1e-5)


@ROUNDED
def test_float64_is_never_rounded(precision: Precision) -> None:
    x, weight, bias = (t.double() for t in random_sizes(11, 10, 30, 8))
    exact, asked = topk_firings(x, weight, bias, 4), topk_firings(x, weight, bias, 4, precision)
    assert torch.equal(exact.activations, asked.activations)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), cuts=st.lists(st.integers(0, 60), max_size=4))
def test_int8_encoding_does_not_depend_on_the_batch(seed: int, cuts: list[int]) -> None:
    """Bit for bit: whatever else is encoded with it, and however many threads there are."""
    x, weight, bias = random_sizes(seed, 60, 300, 33)
    sae = TopKSae(weight, bias, weight.clone(), torch.zeros(33), 7)
    whole = topk_firings(x, weight, bias, 7, "int8")
    parts = [topk_firings(part, weight, bias, 7, "int8") for part in x.tensor_split(sorted(cuts))]
    assert torch.equal(torch.cat([p.activations for p in parts]), whole.activations)
    assert torch.equal(torch.cat([p.indices for p in parts]), whole.indices)
    torch.testing.assert_close(dense(sae.encode_fast(x), 300), dense(sae.encode(x), 300), rtol=1e-5, atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), n=st.integers(1, 20), d=st.integers(1, 90), scale=st.sampled_from([1e-20, 1, 1e12]))
def test_int8_rows_are_off_by_half_a_step(seed: int, n: int, d: int, scale: float) -> None:
    matrix = random_sizes(seed, n, 1, d)[0] * scale
    matrix[0] = 0
    of = cpu.quantise(matrix)
    assert of.rows.dtype == torch.int8
    assert int(of.rows.abs().max()) <= 127
    back = of.rows.double() * of.steps[:, None].double()
    assert ((back - matrix.double()).abs() <= 0.5001 * of.steps[:, None].double()).all()
    torch.testing.assert_close(of.steps * 127, matrix.abs().max(1).values)
    torch.testing.assert_close(of.lengths.double(), matrix.double().norm(dim=1), rtol=1e-5, atol=0)


def test_int8_rounding_errors_have_the_assumed_spread() -> None:
    """sigma of ``cpu_shortlist`` is not exceeded, and not much too wide."""
    x, weight, _ = random_sizes(12, 200, 500, 256)
    of, by = cpu.quantise(x), cpu.quantise(weight)
    known = (of.rows.double() @ by.rows.double().T) * of.steps[:, None].double() * by.steps.double()
    error = known - x.double() @ weight.double().T
    sigma = ((of.steps**2 * by.lengths.max() ** 2 + by.steps.max() ** 2 * of.lengths**2) / 12).sqrt().double()
    share = error.std(1) / sigma
    assert float(share.max()) < 1
    assert float(share.min()) > 0.5
    assert float((error / sigma[:, None]).abs().max()) < 6


def test_value_that_8_bits_make_negative_is_found() -> None:
    """Many latents just above zero: rounding puts half of them below, and all are in the result all the same."""
    x, weight, _ = random_sizes(13, 5, 40, 16)
    weight = weight - (weight @ x[0])[:, None] * x[0] / (x[0] @ x[0])  # now at right angles to the first token
    bias = torch.full((40,), 1e-4)
    exact = (x[:1] @ weight.T + bias)[0]
    assert (exact > 0).all()
    firings = topk_firings(x[:1], weight, bias, 40, "int8")
    assert len(firings.indices[0].unique()) == 40
    assert (firings.activations > 0).all()


@pytest.mark.parametrize(("of", "expected"), [(0.0, [[0.0] * 3] * 2), (2.0, [[2.0] * 3] * 2), (-2.0, [[0.0] * 3] * 2)])
def test_no_activation_at_all_in_8_bits(of: float, expected: list[list[float]]) -> None:
    weight = torch.nn.functional.normalize(torch.ones(9, 4), dim=1)
    assert topk_firings(torch.zeros(2, 4), weight, torch.full((9,), of), 3, "int8").activations.tolist() == expected
    assert topk_firings(torch.ones(2, 4), weight * 0, torch.full((9,), of), 3, "int8").activations.tolist() == expected


@pytest.mark.parametrize("sizes", [(1, 1, 1), (3, 5, 1), (3, 5, 2), (3, 5, 7), (40, 33, 200), (16, 64, 1100)])
@pytest.mark.parametrize("has", [True, False])
def test_products_of_8_bits_are_exact(sizes: tuple[int, int, int], has: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the processor's instructions for them and without."""
    if not has:
        monkeypatch.setattr("sae.dictionaries.encoding.has_int8_products", lambda: False)
    (n, m, d), generator = sizes, torch.Generator().manual_seed(1)
    x, w = (torch.randint(-127, 128, (rows, d), dtype=torch.int8, generator=generator) for rows in (n, m))
    found = product_of_int8(x, w, torch.empty(n, m, dtype=torch.int32))
    assert torch.equal(found, (x.long() @ w.long().T).int())
