"""What two dictionaries that share nothing would look like: the null beside every figure about what is shared.

The best of many pairings looks good by selection alone, the more so the wider the dictionaries and the narrower the
space. Two dictionaries stand in for the sibling, each in its own way unable to share anything but by chance:

    rotated     the sibling itself, its encoder and decoder turned by one random rotation (Haar): all that is inside it
                stays, its lengths, clusters, near-duplicates, and how its encoder goes with its decoder
    gaussian    as many random directions, encoder and decoder drawn apart

The one space of rows that encoder and decoder share is why both turn alike. What is drawn depends on the pair's names
and a seed, so a pair's null is the same each time. Matched like the real sibling, over all pairs and both spaces, a
null has every figure that the real one has: :func:`as_alignment` makes its table look like an alignment's.

Firings have a null of their own:

    shifted     the sibling's firings moved along the harvested tokens, circularly and far: every latent fires as often
                as before, in the same bursts, and beside the same others of its dictionary, but at other tokens
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from sae.alignment.alignment import align
from sae.alignment.pairs import Sides

NULLS = {
    "rotated": "the sibling turned by a random rotation: same inner geometry, nothing in common but by chance",
    "gaussian": "random directions in the sibling's place",
}
SHIFTED = "shifted"
FIRING_NULLS = {SHIFTED: "the sibling's firings moved far along the tokens: as often, in the same bursts, elsewhere"}
COLUMNS = tuple(
    name for space in ("encoder", "decoder") for name in (f"{space}_partner", f"{space}_cosine", f"max_{space}_cosine")
)
"""of an alignment's table, kept for each null as ``<column>__<null>``"""
FIRING_COLUMNS = (
    *("jaccard_partner", "jaccard", "p_there", "p_here", "max_jaccard", "relation", "relation_covered"),
    *("decoder_partner_jaccard", "decoder_partner_p_there", "decoder_partner_p_here"),
)
"""of a side of :class:`sae.alignment.behaviour.Behaviour`, kept as ``<column>__shifted``"""

_ROWS = 4096  # turned at a time

Array = NDArray[Any]
Weights = tuple[Array, Array]
"""encoder and decoder rows, [M, D] each"""


def with_nulls(sides: Sides, a: Weights, b: Weights, names: tuple[str, str], **options: Any) -> Sides:
    """The two sides of an alignment, with the columns of each null beside their own.

    ``a`` and ``b`` are the weights that were aligned; ``options`` go to :func:`sae.alignment.alignment.align`.
    """
    one, other = (side.copy() for side in sides)
    for null in NULLS:
        matched = align(*a, *null_of(null, b, names), **options)
        # A rotation of one is the inverse rotation of the other. Random directions in a's place are others.
        back = matched if null == "rotated" else align(*null_of(null, a, names[::-1]), *b, **options)
        for side, found in ((one, matched.a), (other, back.b)):
            for column in COLUMNS:
                side[f"{column}__{null}"] = found[column].to_numpy()
    return one, other


def as_alignment(table: pd.DataFrame, null: str) -> pd.DataFrame | None:
    """A side of an alignment as it would be under a null; ``None`` where it was aligned without nulls."""
    if any(f"{column}__{null}" not in table for column in COLUMNS):
        return None
    return table[[f"{column}__{null}" for column in COLUMNS]].set_axis(list(COLUMNS), axis="columns")


def null_of(name: str, weights: Weights, pair: tuple[str, str], seed: int = 0) -> Weights:
    """What stands in for a dictionary under a null: encoder and decoder, [M, D] float32 each.

    Args:
        name: ``rotated`` or ``gaussian``.
        weights: of the sibling.
        pair: the names of the two runs that are compared.
    """
    return _MAKERS[name](weights, np.random.default_rng([seed, zlib.crc32(f"{name} {'--'.join(pair)}".encode())]))


def offset_of(pair: tuple[str, str], n_tokens: int, per_sequence: int, seed: int = 0) -> int:
    """By how many tokens the firings of the second of ``pair`` are moved against those of the first under ``shifted``.

    From about a quarter to three quarters of ``n_tokens``, and from a quarter to three quarters of a sequence beside
    whole sequences, of which each has ``per_sequence``: two latents that both fire at the beginning of sequences do not
    keep meeting there. It depends on the two names and the seed. Seen from the second, the first is moved back by as
    much, so that both directions of a pair are of one and the same null.
    """
    first, second = sorted(pair)
    rng = np.random.default_rng([seed, zlib.crc32(f"{SHIFTED} {first}--{second}".encode())])
    whole = int(rng.integers(n_tokens // 4, 3 * n_tokens // 4 + 1)) // per_sequence * per_sequence
    offset = (whole + per_sequence // 4 + int(rng.integers(per_sequence // 2 + 1))) % n_tokens
    return offset if pair == (first, second) else (n_tokens - offset) % n_tokens


def rotation(d: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """A random orthogonal matrix [D, D], each as likely as any other (Mezzadri, arXiv math-ph/0609050)."""
    q, r = np.linalg.qr(rng.normal(size=(d, d)))
    return np.asarray(q * np.sign(np.diag(r)))


def _rotated(weights: Weights, rng: np.random.Generator) -> Weights:
    turn = rotation(weights[0].shape[1], rng).astype(np.float32)
    encoder, decoder = (
        np.concatenate([rows[i : i + _ROWS].astype(np.float32) @ turn for i in range(0, len(rows), _ROWS)])
        for rows in weights
    )
    return encoder, decoder


def _gaussian(weights: Weights, rng: np.random.Generator) -> Weights:
    encoder, decoder = (rng.standard_normal(rows.shape, dtype=np.float32) for rows in weights)
    return encoder, decoder


_MAKERS: dict[str, Callable[[Weights, np.random.Generator], Weights]] = {"rotated": _rotated, "gaussian": _gaussian}
