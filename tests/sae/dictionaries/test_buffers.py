"""Memory that is used again: never while anybody can still see it."""

from __future__ import annotations

import gc
from collections.abc import Callable

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from sae.dictionaries.kernels.buffers import SMALLEST, Buffers

LARGE = SMALLEST // 4 + 8  # elements of float32


def address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def test_what_nobody_holds_is_given_out_again() -> None:
    buffers = Buffers()
    first = buffers.empty((LARGE,), torch.float32)
    place = address(first)
    del first
    assert address(buffers.empty((LARGE,), torch.float32)) == place
    assert address(buffers.empty((2, LARGE // 2), torch.int32)) == place


@pytest.mark.parametrize(
    "hold",
    [
        lambda t: t[3:5],
        lambda t: t.view(-1, 2).T,
        lambda t: t.detach(),
        lambda t: t.numpy(),
        lambda t: t.numpy()[5:],
        lambda t: t.unbind()[0],
        lambda t: torch.nn.Parameter(t),
    ],
)
def test_any_view_keeps_it(hold: Callable[[torch.Tensor], object]) -> None:
    buffers = Buffers()
    first = buffers.empty((LARGE - LARGE % 2,), torch.float32).fill_(7)
    held = hold(first)
    del first
    gc.collect()
    buffers.empty((LARGE,), torch.float32).fill_(8)
    assert float(torch.as_tensor(held).detach().flatten()[0]) == 7


@settings(max_examples=100, deadline=None)
@given(steps=st.lists(st.tuples(st.booleans(), st.integers(1, 4)), max_size=30))
def test_no_two_tensors_share_memory(steps: list[tuple[bool, int]]) -> None:
    buffers, held = Buffers(), []
    for number, (keep, size) in enumerate(steps):
        tensor = buffers.empty((size, LARGE), torch.float32)
        assert tensor.shape == (size, LARGE)
        assert tensor.is_contiguous()
        assert tensor.data_ptr() % 64 == 0
        if keep:
            held.append((number, tensor[:, ::1000].fill_(number)))
        else:
            tensor[:, ::1000].fill_(-1)
    for number, view in held:
        assert (view == number).all()


def test_what_nobody_wants_goes_back() -> None:
    buffers = Buffers()
    buffers.empty((8, LARGE), torch.float32)
    for _ in range(100):
        buffers.empty((LARGE,), torch.float32)
    buffers.empty((2, LARGE), torch.float32)
    assert len(buffers._pieces) == 2


def test_small_request_does_not_hold_a_large_piece() -> None:
    buffers = Buffers()
    place = address(buffers.empty((8, LARGE), torch.float32))
    assert address(buffers.empty((LARGE,), torch.float32)) != place


def test_small_tensors_are_not_kept() -> None:
    buffers = Buffers()
    assert buffers.empty((3, 4), torch.bfloat16).shape == (3, 4)
    assert buffers.empty((0, 4), torch.float32).shape == (0, 4)
    assert not buffers._pieces
