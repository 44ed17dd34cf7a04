"""The Triton programs, by Triton's interpreter, against the loops of the CPU; and that they compile for a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fresh_triton import compiled_steps, interpreted_steps
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from sae.dictionaries.kernels import cpu

few = settings(
    max_examples=8, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="module")
def steps() -> Iterator[Any]:
    with interpreted_steps() as module:
        yield module


def first_largest(pre: Tensor, k: int) -> tuple[list[list[float]], list[list[int]]]:
    """Top-k by sorting: of equal values the first, in the order of the latents, then empty slots."""
    values, latents = [], []
    for row in pre.reshape(-1, pre.shape[-1]).double().tolist():
        order = sorted(range(len(row)), key=lambda m, row=row: (-row[m], m))[:k]  # type: ignore[misc]
        chosen = sorted(m for m in order if row[m] > 0)
        empty = k - len(chosen)
        values.append([row[m] for m in chosen] + [0.0] * empty)
        latents.append(chosen + [0] * empty)
    return values, latents


# ------------------------------------------------------------------------------------------------------------- top-k


@few
@given(st.data())
def test_topk_is_that_of_sorting(steps: Any, data: st.DataObject) -> None:
    seeds, m = data.draw(st.integers(1, 3)), data.draw(st.sampled_from([1, 7, 8, 19, 37]))
    k = data.draw(st.integers(1, min(m, 9)))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    pre = torch.randn(seeds, 1, m, generator=generator)
    # Wide apart, many alike, or few positive.
    pre = data.draw(st.sampled_from([pre * 1e20, pre.round(), pre - 2.5, pre.clamp(-0.5, 0.5)])).to(dtype)
    values, latents = steps.topk(pre, k)
    assert values.dtype == (torch.float32 if dtype == torch.bfloat16 else dtype)
    assert (values.reshape(-1, k).tolist(), latents.reshape(-1, k).tolist()) == first_largest(pre, k)


@pytest.mark.parametrize("k", [1, 3])
def test_a_row_of_equal_values_exceeds_any_shortlist(steps: Any, k: int) -> None:
    pre = torch.full((2, 37), 0.25)
    pre[0, 30] = 7.0
    pre[1, :5] = -1.0
    values, latents = steps.topk(pre, k)
    assert (values.tolist(), latents.tolist()) == first_largest(pre, k)


def test_nan_is_not_lost(steps: Any) -> None:
    pre = torch.arange(1.0, 12.0)[None]
    pre[0, 4], pre[0, 7] = float("nan"), float("inf")
    values, latents = steps.topk(pre, 2)
    assert latents.tolist() == [[4, 7]]
    assert torch.isnan(values[0, 0])


def test_rounded_topk_chooses_among_exact_values(steps: Any) -> None:
    generator = torch.Generator().manual_seed(3)
    centred, weight = torch.randn(2, 1, 6, generator=generator), torch.randn(2, 40, 6, generator=generator)
    bias = torch.randn(2, 40, generator=generator)
    exact = centred @ weight.mT + bias[:, None]
    found = steps.rounded_topk(exact.bfloat16(), centred, weight, bias, 3)
    for seed in range(2):
        expected = cpu.topk(exact[seed], 3)
        activations, latents = (t[seed] for t in found)
        torch.testing.assert_close(activations.sort(1).values, expected[0].sort(1).values)
        torch.testing.assert_close(activations, exact[seed].gather(1, latents))


# --------------------------------------------------------------------------------- decoding, gradient, update


@few
@given(st.data())
def test_decoding_and_gradients_are_those_of_the_cpu(steps: Any, data: st.DataObject) -> None:
    seeds, tokens, k = (data.draw(st.integers(1, n)) for n in (3, 3, 5))
    m, width = data.draw(st.integers(1, 4)), data.draw(st.sampled_from([1, 5, 16]))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    activations = random(seeds, tokens, k).relu()  # half of the slots are empty
    latents = torch.randint(m, activations.shape, generator=generator) * (activations > 0)
    weight, bias, x, centred = random(seeds, m, width), random(seeds, width), random(tokens, width), random(seeds, 1, 1)
    centred = centred + x
    decoded = steps.decode(activations, latents, weight, bias)
    residual, products, squares = steps.residuals(activations, latents, weight, bias, x)
    found = steps.weight_gradients(activations, products, latents, residual, centred, 0.3, m)
    for s in range(seeds):
        slots = activations[s], latents[s]
        torch.testing.assert_close(decoded[s], cpu.decode(*slots, weight[s], bias[s]))
        error = cpu.residuals(*slots, weight[s], bias[s], x)
        for ours, theirs in zip((residual[s], products[s], squares[s]), error, strict=True):
            torch.testing.assert_close(ours.to(dtype), theirs.to(dtype))  # the squares are float64 sums of dtype
        expected = cpu.weight_gradients(slots[0], products[s], slots[1], residual[s], centred[s], 0.3, m)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours[s], theirs)


def test_one_seed_needs_no_axis(steps: Any) -> None:
    pre, weight, x = torch.tensor([[0.5, -1.0, 2.0]]), torch.eye(3), torch.ones(1, 3)
    slots = steps.topk(pre, 2)
    assert [t.tolist() for t in slots] == [[[0.5, 2.0]], [[0, 2]]]
    residual, products, squares = steps.residuals(*slots, weight, torch.zeros(3), x)
    assert residual.tolist() == [[-0.5, -1.0, 1.0]]
    assert squares.shape == ()
    W_dec, _, _, firings = steps.weight_gradients(slots[0], products, slots[1], residual, x, 1.0, 3)
    assert W_dec.shape == (3, 3)
    assert firings.tolist() == [1, 0, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(2, 3, 5), (2, 9)])
def test_adam_is_that_of_the_cpu(steps: Any, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.functional.normalize(torch.randn(*shape, generator=generator).to(dtype), dim=-1)
    unit_rows = len(shape) == 3
    ours = [weight.clone(), torch.zeros_like(weight), torch.zeros_like(weight)]
    theirs = [t.clone().flatten(0, -2) if unit_rows else t.clone().flatten() for t in ours]
    for step in (1, 2):
        grad = torch.randn(*shape, generator=generator).to(dtype)
        steps.adam(ours[0], grad, *ours[1:], step=step, rate=0.01, unit_rows=unit_rows)
        cpu.adam(theirs[0], grad.view(theirs[0].shape), *theirs[1:], step=step, rate=0.01, unit_rows=unit_rows)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.view(b.shape), b)
    if unit_rows:
        torch.testing.assert_close(ours[0].norm(dim=-1), torch.ones(shape[:-1], dtype=dtype))


# ---------------------------------------------------------------------------------------------- for a real GPU


def test_every_program_compiles_for_a_gpu_and_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the interpreter lets pass: types, names, and what a processor has of shared memory."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    tokens, m, width, k = 1, 32768, 768, 32
    pre, rows = torch.ones(1, tokens, m, dtype=torch.bfloat16), torch.ones(1, tokens, width)
    weight, slots = torch.ones(1, 4, width), torch.ones(1, tokens, k)
    latents = torch.zeros(1, tokens, k, dtype=torch.int64)
    with compiled_steps(80) as (steps, programs):
        steps.rounded_topk(pre, rows, weight, weight[..., 0], k)
        steps.residuals(slots, latents, weight, rows[:, 0], rows[0])
        steps.weight_gradients(slots, slots, latents, rows, rows, 0.5, 4)
        for unit_rows in (True, False):
            steps.adam(*[weight] * 4, step=1, rate=0.1, unit_rows=unit_rows)
    assert len(programs) == 9
    assert all(program.metadata.shared <= 48 * 1024 for program in programs)
    assert all(program.asm["cubin"] for program in programs)
