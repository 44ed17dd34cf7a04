"""Match the latents of two dictionaries one to one, with the largest sum of cosines and a proof that it is largest.

Encoder rows and decoder rows are matched separately, at unit length, over all pairs (Paulo & Belrose, arXiv 2501.16615;
``sae.alignment.matching.best``). Tables about two runs, one file per pair, have a row per latent of each.

Column prices v (zero or more, where columns are left over) bound *every* matching:

    sum over pairs of c[i, j]  ≤  Σ_j v[j] + Σ_i max_j (c[i, j] - v[j])  =  Σ_j v[j] + Σ_i u[i],

since a row gains at most u after paying its column's price, and each price is paid at most once. A matching that
attains the bound is optimal; the difference is the *gap*. The prices are stored, so :func:`verify` checks a matching
from the weights alone, without trusting the solver.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, Literal, NotRequired

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from pydantic import with_config
from typing_extensions import TypedDict

from sae.common.commands import command
from sae.common.errors import BadInput, NotFound, suggest
from sae.common.files import SCHEMA, read_table, table_metadata, write_table
from sae.common.records import OPEN, read_record, write_record

Sides = tuple[pd.DataFrame, pd.DataFrame]

SPACES = ("encoder", "decoder")
UNMATCHED = -1
_BLOCK = 256  # rows at a time: a block of a 32k-wide matrix is 64 MB


@with_config(OPEN)
class Figures(TypedDict):
    """A certificate's figures in one space."""

    matched: int
    sum: float
    mean: float
    upper_bound: float
    gap: float
    gap_per_latent: float
    certified: bool


@with_config(OPEN)
class Certificate(TypedDict):
    """The content of ``A--B.json``."""

    schema: Literal[1]
    runs: list[str]
    latents: list[int]
    encoder: Figures
    decoder: Figures
    nulls: NotRequired[dict[str, str]]
    inputs: Any


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
    device: str = "cpu",
) -> Alignment:
    """Match two dictionaries exactly, in encoder and decoder space.

    Memory holds a rounded copy of one space's rows and about 3 kB per latent of candidates.

    Args:
        W_enc_a, W_dec_a: [M_a, D] rows of the first, of any length.
        W_enc_b, W_dec_b: [M_b, D] rows of the second; M_b may differ from M_a.
        names: of the runs, for messages and for the certificate.
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
            f"{names[0]} has d_in {first[0].shape[1]}, d_out {first[1].shape[1]} and {names[1]} has d_in "
            f"{second[0].shape[1]}, d_out {second[1].shape[1]}: "
            "only dictionaries of the same hookpoint can be aligned"
        )
    n_a, n_b = len(first[0]), len(second[0])
    if n_a > n_b:  # the solver and the prices need the narrower dictionary in the rows
        exchanged = (names[1], names[0])
        return align(*second, *first, names=exchanged, device=device).swapped()
    from sae.alignment.matching.best import find_best_matching  # loads torch, which readers of alignments do without

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
        found = find_best_matching(rows, columns, device=device)
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
        matched = sum(float((rows[block] * columns[partner[block]]).sum()) for block in _blocks(len(rows)))
        if len(rows) < len(columns):
            prices = np.maximum(prices, 0)
        earned = sum(float((rows[block] @ columns.T - prices).max(axis=1).sum()) for block in _blocks(len(rows)))
        found[space] = _certificate(matched, earned + float(prices.sum()), len(rows))
    return found


def list_pairs(runs: Sequence[str]) -> list[tuple[str, str]]:
    """Return every pair of runs, each once, in the order given."""
    repeated = sorted({name for name in runs if list(runs).count(name) > 1})
    if repeated:
        raise BadInput(f"{repeated[0]!r} is named twice: a run is aligned with other runs, name each once")
    if len(runs) < 2:
        raise BadInput(f"{runs[0]!r} alone cannot be aligned: name at least two runs" if runs else "no runs to align")
    return list(combinations(runs, 2))


def pair_path(folder: Path, a: str, b: str) -> Path | None:
    """Return the path of a pair's table, whichever of the two was named first; ``None`` if there is none."""
    both = (folder / f"{a}--{b}.parquet", folder / f"{b}--{a}.parquet")
    return next((path for path in both if path.exists()), None)


def pair_inputs(folder: Path, a: str, b: str) -> Any:
    """Return the ``inputs`` that the pair's table was made from, ``None`` if there is none; others make it stale."""
    path = pair_path(folder, a, b)
    return table_metadata(path).get("inputs") if path else None


def write_sides(path: Path, names: tuple[str, str], sides: Sides, **metadata: Any) -> None:
    """Write both sides as one table with a first column ``run``."""
    named = [side.assign(run=name) for name, side in zip(names, sides, strict=True)]
    table = pd.concat(named, ignore_index=True)
    write_table(path, table[["run", *(c for c in table if c != "run")]], runs=list(names), **metadata)


def read_sides(folder: Path, a: str, b: str, columns: Sequence[str] | None = None) -> Sides:
    """Read the table of two runs as seen from ``a`` and from ``b``; of ``columns``, those that it has."""
    path = pair_path(folder, a, b)
    if path is None:
        known = [p.stem for p in folder.glob("*--*.parquet")]
        hint = f"; there is {suggest(f'{a}--{b}', known)}" if known else ""
        raise NotFound(f"{a!r} and {b!r} are not aligned yet{hint}; run `{command(folder.parent, 'align', a, b)}`")
    try:
        table = read_table(path, None if columns is None else ["run", *columns])
        one, other = (table[table["run"] == name].drop(columns="run").reset_index(drop=True) for name in (a, b))
    except (BadInput, FileNotFoundError, ValueError, KeyError):
        again = command(folder.parent, "align", a, b)
        raise BadInput(f"{str(path)!r} cannot be read; delete it and run `{again}`") from None
    return one, other


def write_alignment(folder: Path, a: str, b: str, alignment: Alignment, inputs: Any) -> Path:
    """Store an alignment as ``<a>--<b>.parquet`` (both runs' rows), and its certificate as ``<a>--<b>.json``.

    An existing ``<b>--<a>`` is replaced under that name. ``inputs`` (any JSON value, usually a digest) goes into both
    files. The table is written last and its ``inputs`` count, so a crash in between is harmless.
    """
    path = pair_path(folder, a, b)
    if path is not None and path.name != f"{a}--{b}.parquet":
        a, b, alignment = b, a, alignment.swapped()
    path = folder / f"{a}--{b}.parquet"
    write_record(path.with_suffix(".json"), {**alignment.certificate, "runs": [a, b], "inputs": inputs})
    write_sides(path, (a, b), (alignment.a, alignment.b), inputs=inputs)
    return path


def read_alignment(folder: Path, a: str, b: str) -> Alignment:
    """Read the stored alignment of two runs, in either order, as seen from ``a``."""
    sides = read_sides(folder, a, b)
    path = (pair_path(folder, a, b) or folder).with_suffix(".json")
    again = f"delete it and its .parquet and run `{command(folder.parent, 'align', a, b)}`"
    try:
        certificate = read_record(path, Certificate, again)
    except FileNotFoundError:
        raise BadInput(f"{str(path)!r} is missing; {again}") from None
    is_turned = certificate["runs"] != [a, b]
    rows = [len(side) for side in sides]
    expected = ([b, a], rows[::-1]) if is_turned else ([a, b], rows)
    if (certificate["runs"], certificate["latents"]) != expected or certificate["inputs"] != pair_inputs(folder, a, b):
        raise BadInput(f"{str(path)!r} does not belong to its .parquet; {again}")
    whole = dict(certificate)
    return Alignment(*sides[::-1], whole).swapped() if is_turned else Alignment(*sides, whole)


def read_both_ways(folder: Path, runs: Sequence[str]) -> dict[tuple[str, str], pd.DataFrame]:
    """Return the stored tables of all ordered pairs of runs: (x, y) → a row per latent of x, in terms of y."""
    found = {}
    for a, b in list_pairs(runs):
        alignment = read_alignment(folder, a, b)
        found[a, b], found[b, a] = alignment.a, alignment.b
    return found


def _checked(weights: ArrayLike, name: str, space: str) -> NDArray[Any]:
    rows = np.asarray(weights)
    if rows.ndim != 2 or not rows.size:
        raise BadInput(f"{name}: the {space} has shape {rows.shape}, not [M, D]; is its file complete?")
    if rows.dtype.kind != "f":
        rows = rows.astype(np.float64)
    broken = np.concatenate([~np.isfinite(rows[block]).all(axis=1) for block in _blocks(len(rows))]).nonzero()[0]
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


def normalize_rows(weights: ArrayLike) -> NDArray[np.float64]:
    """Return [M, D] rows at unit length, in float64; rows of zeros stay zero."""
    rows = np.array(weights, dtype=np.float64)
    # Scaled first, so that very small and very large rows have a norm.
    largest = np.abs(rows).max(axis=1, keepdims=True)
    np.divide(rows, largest, out=rows, where=largest > 0)
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    np.divide(rows, length, out=rows, where=length > 0)
    return rows


def _blocks(n: int) -> Iterator[slice]:
    for start in range(0, n, _BLOCK):
        yield slice(start, start + _BLOCK)
