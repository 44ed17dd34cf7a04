"""The chance level: how similar two dictionaries look that share nothing.

The best of many pairings looks good by selection alone, most of all for wide dictionaries in a narrow space. So each
run is also matched with a copy of its sibling that can share something only by chance:

    rotated     the sibling's encoder and decoder, both multiplied by one random rotation (Haar), drawn from the pair's
                names and a seed. Lengths, clusters, near-duplicates and angles within a dictionary stay the same.

and its firings are compared with

    shifted     the sibling's firings, moved far along the harvested tokens, circularly. Every latent fires as often as
                before, in the same bursts and with the same latents of its dictionary, but at other tokens.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from sae.alignment.alignment import Sides, align
from sae.alignment.bootstrap import Tables

ROTATED, SHIFTED = "rotated", "shifted"
NULLS = {ROTATED: "the sibling rotated at random: the same geometry within it, nothing in common but by chance"}
FIRING_NULLS = {SHIFTED: "the sibling's firings moved far along the tokens: as often, in the same bursts, elsewhere"}
COLUMNS = tuple(
    name for space in ("encoder", "decoder") for name in (f"{space}_partner", f"{space}_cosine", f"max_{space}_cosine")
)  # of an alignment's table, stored for the rotated sibling as ``<column>__rotated``
FIRING_COLUMNS = (
    *("jaccard_partner", "jaccard", "p_there", "p_here", "max_jaccard", "relation", "relation_covered"),
    *("decoder_partner_jaccard", "decoder_partner_p_there", "decoder_partner_p_here"),
)  # of a side of :class:`sae.alignment.behaviour.Behaviour`, stored as ``<column>__shifted``

_ROWS = 4096  # rotated at a time

Weights = tuple[NDArray[Any], NDArray[Any]]  # encoder and decoder rows, [M, D] each


def add_null(sides: Sides, a: Weights, b: Weights, names: tuple[str, str], **options: Any) -> Sides:
    """Add the columns of the rotated sibling to both sides; ``options`` go to :func:`sae.alignment.alignment.align`."""
    # To rotate one is to rotate the other by the inverse: one matching serves both sides.
    matched = align(*a, *rotate_sibling(b, names), **options)
    one, other = (
        side.assign(**{f"{column}__{ROTATED}": found[column].to_numpy() for column in COLUMNS})
        for side, found in zip(sides, (matched.a, matched.b), strict=True)
    )
    return one, other


def read_null(table: pd.DataFrame) -> pd.DataFrame | None:
    """Return a side of an alignment with the rotated sibling; ``None`` if it was aligned without nulls."""
    columns = [f"{column}__{ROTATED}" for column in COLUMNS]
    return table[columns].set_axis(list(COLUMNS), axis="columns") if set(columns) <= set(table) else None


def read_nulls(runs: Sequence[str], alignments: Tables) -> dict[str, Tables]:
    """Return {"rotated": the alignments of ``runs`` with rotated siblings}; empty unless every pair has one."""
    found: dict[tuple[str, str], pd.DataFrame] = {}
    for pair in ((a, b) for a in runs for b in runs if a != b):
        table = read_null(alignments[pair])
        if table is None:
            return {}
        found[pair] = table
    return {ROTATED: found} if found else {}


def rotate_sibling(weights: Weights, pair: tuple[str, str], seed: int = 0) -> Weights:
    """Return the ``weights`` of the sibling (last in ``pair``), encoder and decoder rotated alike, in float32.

    The rows of a transcoder's decoder may have another width; then they get a rotation of their own.
    """
    rng = np.random.default_rng([seed, zlib.crc32(f"{ROTATED} {'--'.join(pair)}".encode())])
    turns: dict[int, NDArray[np.float32]] = {}
    for rows in weights:
        if rows.shape[1] not in turns:
            turns[rows.shape[1]] = draw_rotation(rows.shape[1], rng).astype(np.float32)
    encoder, decoder = (
        np.concatenate(
            [rows[i : i + _ROWS].astype(np.float32) @ turns[rows.shape[1]] for i in range(0, len(rows), _ROWS)]
        )
        for rows in weights
    )
    return encoder, decoder


def draw_rotation(d: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Draw an orthogonal matrix [D, D], each as likely as any other (Mezzadri, arXiv math-ph/0609050)."""
    q, r = np.linalg.qr(rng.normal(size=(d, d)))
    return np.asarray(q * np.sign(np.diag(r)))


def draw_offset(pair: tuple[str, str], n_tokens: int, per_sequence: int, seed: int = 0) -> int:
    """Draw the number of tokens by which the second run's firings are moved against the first's (``shifted``).

    It is a quarter to three quarters of ``n_tokens``, in whole sequences of ``per_sequence``, plus a quarter to three
    quarters of a sequence, so that starts of sequences do not meet. Seen from the second run the first is moved back by
    as much, so both directions of a pair have the same null.
    """
    first, second = sorted(pair)
    rng = np.random.default_rng([seed, zlib.crc32(f"{SHIFTED} {first}--{second}".encode())])
    whole = int(rng.integers(n_tokens // 4, 3 * n_tokens // 4 + 1)) // per_sequence * per_sequence
    offset = (whole + per_sequence // 4 + int(rng.integers(per_sequence // 2 + 1))) % n_tokens
    return offset if pair == (first, second) else (n_tokens - offset) % n_tokens
