"""Which latent of one dictionary is which of another: the best one-to-one matching, and the proof that it is best.

The rows of the encoders, and separately those of the decoders, are brought to unit length; among all one-to-one
pairings the one with the largest sum of cosines is taken (Paulo & Belrose, arXiv 2501.16615). Encoder and decoder are
matched independently: whether they name the same partner is itself a finding.

A matching is easy to get subtly wrong and impossible to judge by eye, so each comes with prices that bound what *any*
matching could reach. For whatever prices v on the columns (zero or more, where columns may be left over),

    sum over pairs of c[i, j]  ≤  Σ_j v[j] + Σ_i max_j (c[i, j] - v[j])  =  Σ_j v[j] + Σ_i u[i],

since a row gains at most u after paying its column's price, and each price is paid at most once. A matching that
attains the bound is optimal; the difference is the *gap*. The prices lie beside the matching on disk, so the claim can
be checked later from the weights alone, in memory of one block (:func:`verify`), without trusting the solver.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import linear_sum_assignment

from sae.errors import BadInput, NotFound, nearest
from sae.files import SCHEMA, read_json, read_table, table_metadata, write_json, write_table
from sae.progress import say

Array = NDArray[np.float64]

SPACES = ("encoder", "decoder")
UNMATCHED = -1
_BLOCK = 256  # rows at a time: a block of a 32k-wide matrix is 64 MB
_MAX_PASSES = 50  # over the matrix while prices are sought; real pairs need about ten
_TOLERANCE = 1e-12  # prices rise by more than this or not at all: below it lies rounding
_SAY_ABOVE = 2**30  # bytes


@dataclass(frozen=True)
class Alignment:
    """Two dictionaries matched in both spaces.

    ``a`` has a row per latent of the first [M_a], ``b`` one per latent of the second [M_b], with the columns

    - ``latent``;
    - ``encoder_partner``, ``decoder_partner``: its partner in the other dictionary, -1 if it has none (where widths
      differ, as many of the wider are left over); ``encoder_cosine``, ``decoder_cosine``: theirs, NaN without partner;
    - ``max_encoder_neighbor``, ``max_decoder_neighbor``: the latent of the other that is nearest whether or not it is
      taken (the lowest number among equals), and ``max_encoder_cosine``, ``max_decoder_cosine``;
    - ``encoder_price``, ``decoder_price``: the prices that prove the matching (see the module's head).

    A latent whose row is zero has cosine 0 with every other. ``certificate`` is the JSON object written beside the
    table: per space the matched sum, the upper bound over all matchings, and the gap between them.
    """

    a: pd.DataFrame
    b: pd.DataFrame
    certificate: dict[str, Any]

    def swapped(self) -> Alignment:
        """The same alignment as seen from ``b``."""
        swapped = dict(self.certificate)
        for key in ("runs", "latents"):
            swapped[key] = swapped[key][::-1]
        return Alignment(self.b, self.a, swapped)


def align(
    W_enc_a: ArrayLike,
    W_dec_a: ArrayLike,
    W_enc_b: ArrayLike,
    W_dec_b: ArrayLike,
    *,
    names: tuple[str, str] = ("a", "b"),
) -> Alignment:
    """Match two dictionaries exactly, in encoder and decoder space.

    One dense matrix of M_a × M_b float64 cosines is held at a time; where that is more than 1 GiB the size is said.

    Args:
        W_enc_a, W_dec_a: [M_a, D] rows of the first, of any length.
        W_enc_b, W_dec_b: [M_b, D] rows of the second; M_b may differ from M_a.
        names: of the runs, for messages and for the certificate.
    Raises:
        BadInput: the dictionaries live in spaces of different width, hold NaN, or are too large for this machine.
    """
    first = [_unit_rows(W, names[0], space) for W, space in zip((W_enc_a, W_dec_a), SPACES, strict=True)]
    second = [_unit_rows(W, names[1], space) for W, space in zip((W_enc_b, W_dec_b), SPACES, strict=True)]
    for name, (encoder, decoder) in zip(names, (first, second), strict=True):
        if len(encoder) != len(decoder):
            raise BadInput(
                f"{name}: {len(encoder)} encoder rows but {len(decoder)} decoder rows; is its file complete?"
            )
    if first[0].shape[1] != second[0].shape[1] or first[1].shape[1] != second[1].shape[1]:
        raise BadInput(
            f"{names[0]} has d_in {first[0].shape[1]} and {names[1]} has {second[0].shape[1]}: "
            "only dictionaries of the same hookpoint can be aligned"
        )
    n_a, n_b = len(first[0]), len(second[0])
    if n_a > n_b:  # the solver and the prices want the narrower dictionary in the rows
        return align(W_enc_b, W_dec_b, W_enc_a, W_dec_a, names=(names[1], names[0])).swapped()
    table_a = pd.DataFrame({"latent": np.arange(n_a)})
    table_b = pd.DataFrame({"latent": np.arange(n_b)})
    certificate: dict[str, Any] = {
        "schema": SCHEMA,
        "runs": list(names),
        "latents": [n_a, n_b],
        "method": "maximum-weight one-to-one assignment over all pairs, cosines in float64 "
        "(scipy.optimize.linear_sum_assignment)",
        "bound": "sum of column prices v plus sum over rows of max(c - v); prices by longest-path relaxation from "
        "the matching",
    }
    for space, rows, columns in zip(SPACES, first, second, strict=True):
        cosines = _cosines(rows, columns, names)
        partner = match(cosines)
        prices = dual_prices(cosines, partner)
        matched = cosines[np.arange(n_a), partner]
        inverse = np.full(n_b, UNMATCHED)
        inverse[partner] = np.arange(n_a)
        for table, partners, axis in ((table_a, partner, 1), (table_b, inverse, 0)):
            cosine = np.where(partners == UNMATCHED, np.nan, matched[partners if axis == 0 else slice(None)])
            table[f"{space}_partner"] = partners.astype(np.int32)
            table[f"{space}_cosine"] = cosine.astype(np.float32)
            table[f"max_{space}_neighbor"] = cosines.argmax(axis=axis).astype(np.int32)
            table[f"max_{space}_cosine"] = cosines.max(axis=axis).astype(np.float32)
        earned = np.concatenate([(cosines[block] - prices).max(axis=1) for block in _blocks(n_a)])
        table_a[f"{space}_price"], table_b[f"{space}_price"] = earned, prices
        certificate[space] = _certificate(float(matched.sum()), float(earned.sum() + prices.sum()), n_a)
        del cosines
    return Alignment(table_a, table_b, certificate)


def match(cosines: Array) -> NDArray[np.int64]:
    """The column of each row in the assignment with the largest sum, exact. [n, m], n ≤ m; unchanged on return."""
    # Negated in place and back: asking SciPy to maximise would copy the matrix.
    np.negative(cosines, out=cosines)
    try:
        return np.asarray(linear_sum_assignment(cosines)[1], dtype=np.int64)
    finally:
        np.negative(cosines, out=cosines)


def dual_prices(cosines: Array, partner: NDArray[np.int64], max_passes: float = _MAX_PASSES) -> Array:
    """Column prices [m], zero or more, under which every row of [n, m] prefers the partner that it has.

    Row i prefers its partner p when v[j] ≥ v[p] + c[i, j] - c[i, p] for all j: the prices are the longest paths in the
    graph with these weights, found by relaxation from zero. Only rows whose partner's price rose since they were last
    looked at are looked at again, so that some ten passes' worth of work does for many more rounds (measured on
    4,096 × 4,096: 136 rounds, 9 passes). If the matching is not optimal the graph has a cycle of positive length and
    prices rise for ever: the work is bounded by ``max_passes``, and whatever was reached still gives a valid, if wide,
    bound; all prices zero are returned if that bounds better.
    """
    n, m = cosines.shape
    prices = np.zeros(m)
    own = cosines[np.arange(n), partner]
    seen = np.full(n, -np.inf)
    budget = max_passes * n
    while budget > 0:
        stirred = np.flatnonzero(prices[partner] > seen + _TOLERANCE)
        if not len(stirred):
            return prices
        for start in range(0, len(stirred), _BLOCK):
            rows = stirred[start : start + _BLOCK]
            seen[rows] = prices[partner[rows]]
            offers = cosines[rows] + (seen[rows] - own[rows])[:, None]
            np.maximum(prices, offers.max(axis=0), out=prices)
        budget -= len(stirred)
    return min(prices, np.zeros(m), key=lambda v: upper_bound(cosines, v))


def upper_bound(cosines: Array, prices: Array) -> float:
    """What no one-to-one matching of [n, m] cosines, n ≤ m, can exceed, from any column prices [m].

    Where m > n columns are left over, and negative prices would not bound: they are taken as 0.
    """
    n, m = cosines.shape
    v = prices if n == m else np.maximum(prices, 0)
    return float(v.sum() + sum((cosines[block] - v).max(axis=1).sum() for block in _blocks(n)))


def verify(
    alignment: Alignment, W_enc_a: ArrayLike, W_dec_a: ArrayLike, W_enc_b: ArrayLike, W_dec_b: ArrayLike
) -> dict[str, dict[str, Any]]:
    """Check an alignment against the weights that it was made from, trusting none of its numbers.

    The partners must be one-to-one; sums and bounds are computed again, block by block, from the weights and the stored
    prices: time of one matrix product, memory of a few hundred rows of it. Returns per space the same figures as the
    certificate; ``certified`` is False for a matching that is not optimal, however it came about.
    """
    if len(alignment.a) > len(alignment.b):
        return verify(alignment.swapped(), W_enc_b, W_dec_b, W_enc_a, W_dec_a)
    found = {}
    for space, W_a, W_b in zip(SPACES, (W_enc_a, W_dec_a), (W_enc_b, W_dec_b), strict=True):
        rows, columns = _unit_rows(W_a, "a", space), _unit_rows(W_b, "b", space)
        partner = alignment.a[f"{space}_partner"].to_numpy()
        prices = alignment.b[f"{space}_price"].to_numpy(dtype=np.float64)
        one_to_one = len(rows) == len(partner) and len(columns) == len(prices)
        one_to_one = one_to_one and partner.min() >= 0 and len(np.unique(partner)) == len(partner)
        if not one_to_one or partner.max() >= len(columns):
            raise BadInput(f"the {space} matching is not one-to-one between these dictionaries; align them again")
        matched = float(np.einsum("ij,ij->", rows, columns[partner]))
        if len(rows) < len(columns):
            prices = np.maximum(prices, 0)
        earned = sum(float((rows[block] @ columns.T - prices).max(axis=1).sum()) for block in _blocks(len(rows)))
        found[space] = _certificate(matched, earned + float(prices.sum()), len(rows))
    return found


def null_cosine(d_in: int, n_a: int, n_b: int, seed: int = 0) -> float:
    """The mean matched cosine of two dictionaries of random directions: what a matching finds where nothing is shared.

    The best of many pairings is well above 0 by selection alone, the more so the wider the dictionaries; a mean matched
    cosine (PW-MCC, arXiv 2505.20254) means something only beside this.
    """
    rng = np.random.default_rng(seed)
    rows, columns = (_unit_rows(rng.normal(size=(n, d_in)), "random", "decoder") for n in sorted((n_a, n_b)))
    cosines = _cosines(rows, columns, ("random", "random"))
    return float(cosines[np.arange(len(rows)), match(cosines)].mean())


def pairs(runs: Sequence[str]) -> list[tuple[str, str]]:
    """Every pair of runs, each once, in the order given."""
    repeated = sorted({name for name in runs if list(runs).count(name) > 1})
    if repeated:
        raise BadInput(f"{repeated[0]!r} is named twice: a run is aligned with other runs, name each once")
    if len(runs) < 2:
        raise BadInput(f"{runs[0]!r} alone cannot be aligned: name at least two runs" if runs else "no runs to align")
    return list(combinations(runs, 2))


def alignment_path(folder: Path, a: str, b: str) -> Path | None:
    """The stored table of a pair, whichever of the two was named first; ``None`` if there is none."""
    both = (folder / f"{a}--{b}.parquet", folder / f"{b}--{a}.parquet")
    return next((path for path in both if path.exists()), None)


def alignment_inputs(folder: Path, a: str, b: str) -> Any:
    """The ``inputs`` that the stored alignment was made from, to tell whether it is stale; ``None`` if not there."""
    path = alignment_path(folder, a, b)
    return table_metadata(path).get("inputs") if path else None


def write_alignment(folder: Path, a: str, b: str, alignment: Alignment, inputs: Any) -> Path:
    """Store an alignment as ``<a>--<b>.parquet`` and, beside it, its certificate as ``.json``.

    The table holds the rows of both runs, told apart by its first column ``run``. A pair has one file: where it is
    already stored the other way round, it is replaced under that name. ``inputs`` (any JSON value, as a rule a digest)
    goes into both. The table is written last and is the one whose ``inputs`` count, so a crash in between is harmless.
    """
    path = alignment_path(folder, a, b)
    if path is not None and path.name != f"{a}--{b}.parquet":
        a, b, alignment = b, a, alignment.swapped()
    path = folder / f"{a}--{b}.parquet"
    write_json(path.with_suffix(".json"), {**alignment.certificate, "runs": [a, b], "inputs": inputs})
    sides = [side.assign(run=name) for name, side in ((a, alignment.a), (b, alignment.b))]
    table = pd.concat(sides, ignore_index=True)
    write_table(path, table[["run", *(c for c in table if c != "run")]], inputs=inputs, runs=[a, b])
    return path


def read_alignment(folder: Path, a: str, b: str) -> Alignment:
    """The stored alignment of two runs as seen from ``a``, whichever was named first when it was made."""
    path = alignment_path(folder, a, b)
    if path is None:
        known = [p.stem for p in folder.glob("*--*.parquet")]
        hint = f"; there is {nearest(f'{a}--{b}', known)}" if known else ""
        raise NotFound(f"{a!r} and {b!r} are not aligned yet{hint}; run: align {a} {b}")
    try:
        table, certificate = read_table(path), read_json(path.with_suffix(".json"))
        runs = certificate["runs"]
        sides = [table[table["run"] == name].drop(columns="run").reset_index(drop=True) for name in runs]
    except (OSError, ValueError, KeyError):
        raise BadInput(f"{str(path)!r} or its .json cannot be read; delete both and run: align {a} {b}") from None
    found = Alignment(sides[0], sides[1], certificate)
    return found if runs == [a, b] else found.swapped()


def both_ways(folder: Path, runs: Sequence[str]) -> dict[tuple[str, str], pd.DataFrame]:
    """The stored tables of all pairs of runs: (x, y) → a row per latent of x, in terms of y. For ``sae.overlap``."""
    found = {}
    for a, b in pairs(runs):
        alignment = read_alignment(folder, a, b)
        found[a, b], found[b, a] = alignment.a, alignment.b
    return found


def _unit_rows(weights: ArrayLike, name: str, space: str) -> Array:
    rows = np.array(weights, dtype=np.float64)
    if rows.ndim != 2 or not rows.size:
        raise BadInput(f"{name}: the {space} has shape {rows.shape}, not [M, D]; is its file complete?")
    broken = np.flatnonzero(~np.isfinite(rows).all(axis=1))
    if len(broken):
        raise BadInput(
            f"{name}: {len(broken)} {space} rows hold NaN or infinity (the first is latent {broken[0]}); train it again"
        )
    # Scaled first, so that rows as small or large as float32 allows have a norm.
    largest = np.abs(rows).max(axis=1, keepdims=True)
    np.divide(rows, largest, out=rows, where=largest > 0)
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    np.divide(rows, length, out=rows, where=length > 0)
    return rows


def _cosines(rows: Array, columns: Array, names: tuple[str, str]) -> Array:
    size = len(rows) * len(columns) * 8
    words = (
        f"{names[0]} × {names[1]}: the cosines of {len(rows):,} × {len(columns):,} latents take {size / 2**30:.1f} GiB"
    )
    if size > _SAY_ABOVE:
        say(f"{words} of memory, one space at a time")
    try:
        return rows @ columns.T
    except MemoryError:
        raise BadInput(f"{words}, more than this machine can give; align narrower dictionaries") from None


def _certificate(matched: float, bound: float, n: int) -> dict[str, Any]:
    gap = bound - matched
    certified = abs(gap) <= 1e-9 * n  # rounding in float64 sums of n terms of size 1 stays far below this
    return {
        "matched": n,
        "sum": matched,
        "mean": matched / n,
        "upper_bound": bound,
        "gap": max(gap, 0.0) if certified else gap,
        "certified": certified,
    }


def _blocks(n: int) -> Iterator[slice]:
    for start in range(0, n, _BLOCK):
        yield slice(start, start + _BLOCK)
