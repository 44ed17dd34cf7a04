"""Match the latents of two dictionaries one to one, with the largest sum of cosines and a proof that it is largest.

Encoder rows and decoder rows are matched separately, at unit length (Paulo & Belrose, arXiv 2501.16615). Small pairs
are matched with all cosines in memory (``sae.alignment.matching.dense``), wide ones without
(``sae.alignment.matching.best``), always over all pairs.

Column prices v (zero or more, where columns are left over) bound *every* matching:

    sum over pairs of c[i, j]  ≤  Σ_j v[j] + Σ_i max_j (c[i, j] - v[j])  =  Σ_j v[j] + Σ_i u[i],

since a row gains at most u after paying its column's price, and each price is paid at most once. A matching that
attains the bound is optimal; the difference is the *gap*. The prices are stored, so :func:`verify` checks a matching
from the weights alone, without trusting the solver.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from sae.alignment.matching.dense import Matching, blocks, match_all_pairs, normalize_rows
from sae.alignment.pairs import pair_path, read_sides, write_sides
from sae.common.commands import command
from sae.common.errors import BadInput
from sae.common.files import SCHEMA, read_json, write_json

SPACES = ("encoder", "decoder")
UNMATCHED = -1
_DENSE = 2048**2  # pairs up to which SciPy is as fast as the search, which is compiled first


@dataclass(frozen=True)
class Alignment:
    """Two dictionaries matched in both spaces.

    ``a`` has a row per latent of the first [M_a], ``b`` one per latent of the second [M_b], with ``latent`` and

    - ``encoder_partner``, ``decoder_partner``: -1 if the latent has none (in the wider dictionary); ``encoder_cosine``,
      ``decoder_cosine``: with the partner, NaN without;
    - ``max_encoder_neighbor``, ``max_decoder_neighbor``: the nearest latent of the other, matched or not (the lowest
      number among equals); ``max_encoder_cosine``, ``max_decoder_cosine``: with that;
    - ``encoder_price``, ``decoder_price``: the prices that prove the matching.

    A row of zeros has cosine 0 with every other. ``certificate`` has, per space, the matched sum, the upper bound over
    all matchings, and the gap between them.
    """

    a: pd.DataFrame
    b: pd.DataFrame
    certificate: dict[str, Any]

    def swapped(self) -> Alignment:
        """Return the same alignment as seen from ``b``."""
        reversed_ = {key: self.certificate[key][::-1] for key in ("runs", "latents")}
        return Alignment(self.b, self.a, self.certificate | reversed_)


def align(
    W_enc_a: ArrayLike,
    W_dec_a: ArrayLike,
    W_enc_b: ArrayLike,
    W_dec_b: ArrayLike,
    *,
    names: tuple[str, str] = ("a", "b"),
    precision: Literal["auto", "float32", "bfloat16"] = "auto",
    device: str = "cpu",
) -> Alignment:
    """Match two dictionaries exactly, in encoder and decoder space.

    Memory holds a rounded copy of one space's rows and about 3 kB per latent of candidates; all pairs up to 2,048².

    Args:
        W_enc_a, W_dec_a: [M_a, D] rows of the first, of any length.
        W_enc_b, W_dec_b: [M_b, D] rows of the second; M_b may differ from M_a.
        names: of the runs, for messages and for the certificate.
        precision: of the products that search wide pairs; it can change which of equally good matchings results.
        device: the torch device that forms these products.
    Raises:
        BadInput: the dictionaries differ in D or hold NaN.
    """
    first = [_checked(W, names[0], space) for W, space in zip((W_enc_a, W_dec_a), SPACES, strict=True)]
    second = [_checked(W, names[1], space) for W, space in zip((W_enc_b, W_dec_b), SPACES, strict=True)]
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
    if n_a > n_b:  # the solver and the prices need the narrower dictionary in the rows
        exchanged = (names[1], names[0])
        return align(*second, *first, names=exchanged, precision=precision, device=device).swapped()
    table_a = pd.DataFrame({"latent": np.arange(n_a)})
    table_b = pd.DataFrame({"latent": np.arange(n_b)})
    certificate: dict[str, Any] = {
        "schema": SCHEMA,
        "runs": list(names),
        "latents": [n_a, n_b],
        "method": "maximum-weight one-to-one assignment over all pairs, cosines in float64",
        "bound": "sum of column prices v plus sum over rows of max(c - v)",
    }
    for space, rows, columns in zip(SPACES, first, second, strict=True):
        found = _match(rows, columns, precision, device)
        inverse = np.full(n_b, UNMATCHED, np.int32)
        inverse[found.partner] = np.arange(n_a)
        cosine = np.where(inverse == UNMATCHED, np.nan, found.cosine[inverse])
        sides = (table_a, found.partner, found.cosine, found.u), (table_b, inverse, cosine, found.v)
        for (table, partner, own, price), near in zip(sides, found.nearest, strict=True):
            table[f"{space}_partner"] = partner
            table[f"{space}_cosine"] = own.astype(np.float32)
            table[f"max_{space}_neighbor"] = near.who
            table[f"max_{space}_cosine"] = near.cosine.astype(np.float32)
            table[f"{space}_price"] = price
        certificate[space] = _certificate(found.sum, found.upper_bound, n_a)
        if found.candidates:
            certificate.setdefault("search", {})[space] = {
                "candidates": found.candidates,
                "rounds": found.rounds,
                "products": round(found.share_of_pairs, 4),
            }
    return Alignment(table_a, table_b, certificate)


def verify(
    alignment: Alignment, W_enc_a: ArrayLike, W_dec_a: ArrayLike, W_enc_b: ArrayLike, W_dec_b: ArrayLike
) -> dict[str, dict[str, Any]]:
    """Check an alignment against the weights, without trusting its numbers.

    Partners must be one-to-one; sums and bounds are recomputed in blocks from weights and stored prices, in one matrix
    product's time. Returns the certificate's figures per space; ``certified`` is False if the matching is not optimal.
    """
    if len(alignment.a) > len(alignment.b):
        return verify(alignment.swapped(), W_enc_b, W_dec_b, W_enc_a, W_dec_a)
    found = {}
    for space, W_a, W_b in zip(SPACES, (W_enc_a, W_dec_a), (W_enc_b, W_dec_b), strict=True):
        rows, columns = (normalize_rows(_checked(W, name, space)) for W, name in ((W_a, "a"), (W_b, "b")))
        partner = alignment.a[f"{space}_partner"].to_numpy()
        prices = alignment.b[f"{space}_price"].to_numpy(dtype=np.float64)
        one_to_one = len(rows) == len(partner) and len(columns) == len(prices)
        one_to_one = one_to_one and partner.min() >= 0 and len(np.unique(partner)) == len(partner)
        if not one_to_one or partner.max() >= len(columns):
            raise BadInput(f"the {space} matching is not one-to-one between these dictionaries; align them again")
        matched = sum(float((rows[block] * columns[partner[block]]).sum()) for block in blocks(len(rows)))
        if len(rows) < len(columns):
            prices = np.maximum(prices, 0)
        earned = sum(float((rows[block] @ columns.T - prices).max(axis=1).sum()) for block in blocks(len(rows)))
        found[space] = _certificate(matched, earned + float(prices.sum()), len(rows))
    return found


def pairs(runs: Sequence[str]) -> list[tuple[str, str]]:
    """Return every pair of runs, each once, in the order given."""
    repeated = sorted({name for name in runs if list(runs).count(name) > 1})
    if repeated:
        raise BadInput(f"{repeated[0]!r} is named twice: a run is aligned with other runs, name each once")
    if len(runs) < 2:
        raise BadInput(f"{runs[0]!r} alone cannot be aligned: name at least two runs" if runs else "no runs to align")
    return list(combinations(runs, 2))


def write_alignment(folder: Path, a: str, b: str, alignment: Alignment, inputs: Any) -> Path:
    """Store an alignment as ``<a>--<b>.parquet`` (both runs' rows), and its certificate as ``<a>--<b>.json``.

    An existing ``<b>--<a>`` is replaced under that name. ``inputs`` (any JSON value, usually a digest) goes into both
    files. The table is written last and its ``inputs`` count, so a crash in between is harmless.
    """
    path = pair_path(folder, a, b)
    if path is not None and path.name != f"{a}--{b}.parquet":
        a, b, alignment = b, a, alignment.swapped()
    path = folder / f"{a}--{b}.parquet"
    write_json(path.with_suffix(".json"), {**alignment.certificate, "runs": [a, b], "inputs": inputs})
    write_sides(path, (a, b), (alignment.a, alignment.b), inputs=inputs)
    return path


def read_alignment(folder: Path, a: str, b: str) -> Alignment:
    """Read the stored alignment of two runs, in either order, as seen from ``a``."""
    sides = read_sides(folder, a, b)
    path = (pair_path(folder, a, b) or folder).with_suffix(".json")
    try:
        certificate = read_json(path)
        runs = certificate["runs"]
    except (OSError, ValueError, KeyError):
        again = command(folder.parent, "align", a, b)
        raise BadInput(f"{str(path)!r} cannot be read; delete it and its .parquet and run `{again}`") from None
    return Alignment(*sides, certificate) if runs == [a, b] else Alignment(*sides[::-1], certificate).swapped()


def read_both_ways(folder: Path, runs: Sequence[str]) -> dict[tuple[str, str], pd.DataFrame]:
    """Return the stored tables of all ordered pairs of runs: (x, y) → a row per latent of x, in terms of y."""
    found = {}
    for a, b in pairs(runs):
        alignment = read_alignment(folder, a, b)
        found[a, b], found[b, a] = alignment.a, alignment.b
    return found


def _match(
    rows: NDArray[Any], columns: NDArray[Any], precision: Literal["auto", "float32", "bfloat16"], device: str
) -> Matching:
    """Match rows [n, D] to columns [m, D], n ≤ m, by the solver for their size."""
    n, m, d = len(rows), len(columns), rows.shape[1]
    if n * m <= _DENSE:
        found = match_all_pairs(normalize_rows(rows) @ normalize_rows(columns).T)
        found = replace(found, upper_bound=found.upper_bound + n * (d + 16) * 2.0**-52)  # float64's error in a cosine
        # Rows in a plane or near a line form chains so long that the prices are not found in time.
        if _certificate(found.sum, found.upper_bound, n)["certified"]:
            return found
    from sae.alignment.matching.best import find_best_matching  # loads torch, which small pairs and readers do without

    return find_best_matching(rows, columns, precision=precision, device=device)


def _checked(weights: ArrayLike, name: str, space: str) -> NDArray[Any]:
    rows = np.asarray(weights)
    if rows.ndim != 2 or not rows.size:
        raise BadInput(f"{name}: the {space} has shape {rows.shape}, not [M, D]; is its file complete?")
    if rows.dtype.kind != "f":
        rows = rows.astype(np.float64)
    broken = np.concatenate([~np.isfinite(rows[block]).all(axis=1) for block in blocks(len(rows))]).nonzero()[0]
    if len(broken):
        raise BadInput(
            f"{name}: {len(broken)} {space} rows hold NaN or infinity (the first is latent {broken[0]}); train it again"
        )
    return rows


def _certificate(matched: float, bound: float, n: int) -> dict[str, Any]:
    gap = bound - matched
    certified = abs(gap) <= 1e-9 * n  # rounding in float64 sums of n terms of size 1 stays far below this
    gap = max(gap, 0.0) if certified else gap
    figures = {"matched": n, "sum": matched, "mean": matched / n, "upper_bound": bound}
    return {**figures, "gap": gap, "gap_per_latent": gap / n, "certified": certified}
