"""Compiled loops on infinity, NaN, ties and numbers of all sizes: what they choose, and that they stay in bounds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from checked_kernels import KINDS, check_slots
from hypothesis import given

from sae.dictionaries.kernels import cpu

ODD = st.sampled_from(sorted({x for values in KINDS.values() for x in values if x == x})) | st.floats(width=32)


@pytest.mark.timeout(1800)  # it compiles all of them
def test_compiled_loops_stay_in_bounds(tmp_path: Path) -> None:
    """With a cache of its own, since one that is there holds loops without checks, and compiled as fast as can be."""
    script = Path(__file__).with_name("checked_kernels.py")
    numba = {"NUMBA_BOUNDSCHECK": "1", "NUMBA_OPT": "0", "NUMBA_LOOP_VECTORIZE": "0", "NUMBA_SLP_VECTORIZE": "0"}
    places = os.pathsep.join(map(str, (script.parents[3], script.parents[1] / "firings")))
    environment = {
        **numba,
        "NUMBA_CACHE_DIR": str(tmp_path),
        "PYTHONPATH": places,
    }
    ran = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, env={**os.environ, **environment}, timeout=900
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == "all within bounds\n"


@given(st.data(), st.integers(1, 60), st.integers(1, 12))
def test_the_largest_of_odd_numbers(data: st.DataObject, m: int, k: int) -> None:
    rows = [data.draw(st.lists(ODD, min_size=m, max_size=m)) for _ in range(2)]
    pre = torch.tensor(rows)
    activations, latents = cpu.topk(pre, min(k, m))
    expected = torch.where(pre.isnan(), 0, pre).relu().topk(min(k, m)).values
    assert torch.equal(activations.sort(1, descending=True).values, expected)
    check_slots(activations, latents, m)
    filled = activations > 0
    assert torch.equal(activations[filled], pre.gather(1, latents)[filled])
    for row, fires in zip(latents, filled, strict=True):
        assert len(row[fires].unique()) == int(fires.sum())
