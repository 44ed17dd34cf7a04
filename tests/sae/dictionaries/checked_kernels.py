"""Every compiled loop on numbers of every odd kind: with NUMBA_BOUNDSCHECK=1 an index out of bounds is an error.

A script, because bounds checks are chosen when Numba is imported. It also fails where a loop exists that it does not
run.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from made_store import store_of
from numba.core.registry import CPUDispatcher

import sae
from sae.alignment import cofiring, dip
from sae.alignment.matching import candidates, directions
from sae.alignment.matching import sparse as sparse_assignment
from sae.dictionaries.kernels import cpu

SAE = Path(sae.__file__).parent
ROWS, LATENTS, WIDTH = 4, 45, 6
TINY, HUGE = float(np.float32(1e-45)), float(np.finfo(np.float32).max)
KINDS: dict[str, list[float]] = {
    "infinity": [np.inf],
    "infinity and one number": [np.inf, np.inf, np.inf, np.inf, 1.0],
    "minus infinity": [-np.inf],
    "both infinities": [np.inf, -np.inf],
    "NaN": [np.nan],
    "NaN and numbers": [np.nan, 1.0, 0.5, np.nan, -np.nan, 2.0],
    "all at once": [np.nan, np.inf, -np.inf, -0.0, 0.0, HUGE, -HUGE, TINY, 1.0, 1.0, -1.0],
    "zeros": [0.0, -0.0],
    "ties": [1.0],
    "two values": [1.0, 1.0, 1.0, 2.0],
    "subnormal": [TINY, 2 * TINY, -TINY, 3e-39],
    "huge": [HUGE, HUGE / 2, -HUGE, 1e38],
    "of all sizes": [HUGE, 1e20, 1.0, 1e-20, TINY, 0.0],
}


def numbers(kind: str, *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Numbers of a kind in any order."""
    chosen = np.random.default_rng(seed).choice(np.array(KINDS[kind], np.float32), shape)
    return torch.from_numpy(chosen).to(dtype)


def check_slots(activations: torch.Tensor, latents: torch.Tensor, num_latents: int) -> None:
    assert bool(((latents >= 0) & (latents < num_latents)).all())
    assert not bool((activations < 0).any())


def steps_of_training(kind: str) -> None:
    """The choice of latents in every precision, and what follows from it."""
    for dtype in (torch.float32, torch.float64):
        pre = numbers(kind, ROWS, LATENTS, dtype=dtype)
        for k in (1, 3, 8, LATENTS):
            activations, latents = cpu.topk(pre, k)
            check_slots(activations, latents, LATENTS)
            expected = torch.where(pre.isnan(), 0, pre).relu().topk(k).values
            assert torch.equal(activations.sort(1, descending=True).values, expected), (kind, dtype, k)
    x, weight, bias = (numbers(kind, *shape, seed=1) for shape in ((ROWS, WIDTH), (LATENTS, WIDTH), (LATENTS,)))
    ordinary = torch.randn(LATENTS, WIDTH, generator=torch.Generator().manual_seed(0))
    for w, b in ((weight, bias), (ordinary, torch.zeros(LATENTS))):
        rough = numbers(kind, ROWS, LATENTS, seed=2).bfloat16()
        x8, w8 = cpu.quantise(x), cpu.quantise(w)
        products = (x8.rows.float() @ w8.rows.float().T).int()
        for k in (1, 8, LATENTS):
            check_slots(*cpu.rounded_topk(rough, x, w, b, k), LATENTS)
            check_slots(*cpu.quantised_topk(products, x8, w8, x, w, b, k), LATENTS)
            check_slots(*cpu.product_topk(x, w, b, k), LATENTS)
    activations, latents = cpu.topk(numbers(kind, ROWS, LATENTS, seed=3), 5)
    cpu.decode(activations, latents, weight, bias[:WIDTH].clone())
    residual, products, _ = cpu.residuals(activations, latents, weight, bias[:WIDTH].clone(), x)
    W_dec, _, _, firings = cpu.weight_gradients(activations, products, latents, residual, x, 0.5, LATENTS)
    assert int(firings.sum()) == int((activations > 0).sum())
    moments = [numbers(kind, LATENTS, WIDTH, seed=seed) for seed in (4, 5)]
    for unit_rows in (False, True):
        cpu.adam(weight.clone(), W_dec, *moments, step=1, rate=0.1, unit_rows=unit_rows)


def steps_of_alignment(kind: str) -> None:
    """Products and the search through them, prices, lists of neighbours, and the matching."""
    rows = directions.Directions.of(numbers(kind, LATENTS, WIDTH).numpy())
    i, j = (np.random.default_rng(seed).integers(0, LATENTS, 50) for seed in (0, 1))
    directions.compute_cosines(rows, rows, i, j)
    n, m = 70, 130  # more than a strip of neighbours
    u, v = (numbers(kind, size, seed=size).numpy() for size in (n, m))
    for precision in ("float32", "bfloat16"):
        of = torch.float32 if precision == "float32" else torch.bfloat16
        a, b = (directions.Screen(torch.zeros(size, WIDTH, dtype=of), 0.0) for size in (n, m))
        tiles = candidates.Tiles(a, b)
        tile = numbers(kind, n, m, seed=7).to(of)
        for summed in (False, True):
            for found in tiles.find_above(tile, u, v, 0.01, summed):
                search_what_was_found(found, u, v)
    matchings(kind)


def search_what_was_found(found: tuple[np.ndarray, ...], u: np.ndarray, v: np.ndarray) -> None:
    i, j, x = (part.copy() for part in found)
    prices = u.astype(np.float64), v.astype(np.float64)
    for doubted in (False, True):
        most, dropped = np.full(len(u), 2), np.full(len(u), -np.inf)
        candidates.choose_most(i, x, prices[1][j], prices[0], most, dropped, 0.1, 0.01, doubted)
    who, near = np.full((len(u), 3), -1, np.int32), np.full((len(u), 3), -np.inf, np.float32)
    filled, threshold = np.zeros(len(u), np.int64), np.full(len(u), -np.inf, np.float32)
    candidates.insert_nearest(i, j, x, who, near, filled, threshold)
    assert filled.max(initial=0) <= 3
    assert who.max(initial=-1) < len(v)


def matchings(kind: str) -> None:
    """Square, with columns left over, and from the solution of a graph with other weights."""
    for n, m in ((12, 12), (9, 14)):
        starts = np.arange(0, n * m + 1, m)
        columns = np.tile(np.arange(m, dtype=np.int32), n)
        good = np.random.default_rng(0).random(n * m)
        warm = sparse_assignment.solve(sparse_assignment.Graph(starts, columns, good), m)
        odd = numbers(kind, n * m).numpy().astype(np.float64)
        for before in (None, warm):
            try:
                found = sparse_assignment.solve(sparse_assignment.Graph(starts, columns, odd), m, before)
                assert len(set(found.partner.tolist())) == n
            except ValueError as error:
                assert "no matching" in str(error)  # noqa: PT017
    rows = np.repeat(np.arange(12), 12)
    order = np.argsort(-numbers(kind, 144).numpy(), kind="stable")
    sparse_assignment.match_greedily(rows, np.tile(np.arange(12), 12), order, 12, 12)


def statistics(kind: str) -> None:
    dip.compute_dip(numbers(kind, 40).numpy().astype(np.float64))
    dip.compute_dip(np.sort(numbers(kind, 40).numpy().astype(np.float64)))


def counts_of_firings() -> None:
    """No floats in these: the indices are the stores' own whole numbers."""
    fires = np.random.default_rng(0).random((600, 30)) < 0.04
    fires[:, 0] = fires[:, 1:4].any(1)  # split in the other, which lacks it
    store, other, asked = store_of(fires), store_of(fires[:, 1:]), np.zeros((30, 1), np.int32)
    for shift in (0, 3):
        cofiring.count_cofirings(store, other, asked, np.ones(30, np.bool_), shift=shift)


def loops() -> Iterator[tuple[str, CPUDispatcher]]:
    for path in sorted(SAE.rglob("*.py")):
        if "numba" in path.read_text() and path.name != "cuda_programs.py":
            module = importlib.import_module(".".join(path.relative_to(SAE.parent).with_suffix("").parts))
            for name, value in vars(module).items():
                if isinstance(value, CPUDispatcher) and value.py_func.__module__ == module.__name__:
                    yield f"{module.__name__}.{name}", value


def main() -> None:
    from numba.core import config

    assert config.BOUNDSCHECK == 1
    torch.set_num_threads(1)
    for kind in KINDS:
        steps_of_training(kind)
        steps_of_alignment(kind)
        statistics(kind)
    counts_of_firings()
    left_out = [name for name, loop in loops() if not loop.signatures]
    assert not left_out, left_out
    print("all within bounds")


if __name__ == "__main__":
    main()
