"""Compare two dictionaries by where their latents fire, and find counterparts of latents without a partner.

For both runs of a pair, from the firing stores and the decoder rows:

- the best one-to-one matching by Jaccard (tokens at which both fire over tokens at which either does), with P(partner
  fires | latent fires) and P(latent fires | partner fires);
- for latents not shared by weights: the nearest in the other SAE, the relation to latents that fire at the same tokens
  (:mod:`sae.alignment.relation`), and the best mix of up to four decoder rows (:mod:`sae.alignment.rebuilding`).

The matching is the best over pairs in which one is among the other's 24 nearest; ``gap_per_latent`` bounds how much the
other pairs could add. For the chance level, a second pass compares with the other's firings moved along the tokens
(``shifted``, :mod:`sae.alignment.nulls`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from sae.alignment import relation
from sae.alignment.alignment import UNMATCHED, Sides
from sae.alignment.cofiring import Cofirings, compute_jaccard, count_cofirings
from sae.alignment.matching.sparse import build_graph, solve
from sae.alignment.nulls import FIRING_COLUMNS, SHIFTED
from sae.alignment.rebuilding import rebuild
from sae.firings.store import FiringStore

SHOWN = 4  # nearest of each kind in the table

Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]


class Member(NamedTuple):
    """One of the two runs."""

    store: FiringStore
    W_dec: NDArray[Any]  # [M, D]
    decoder_partner: NDArray[np.int32]  # [M] in the other run, by decoder cosine; -1 without
    unshared: Bools  # [M] the latents whose counterparts in the other run are wanted
    null_of_other: NDArray[Any] | None  # [M_other, D] the other's rotated decoder rows, to rebuild from as a control


@dataclass(frozen=True)
class Behaviour:
    """A side for each run, with a row per latent [M] and the columns

    - ``latent``; ``n_firings`` over the tokens that both stores hold;
    - ``jaccard_partner`` (-1: none), ``jaccard`` and the conditional frequencies ``p_there`` and ``p_here``;
      ``max_jaccard_neighbor`` and ``max_jaccard``, matched or not;
    - ``decoder_partner_jaccard``, ``decoder_partner_p_there``, ``decoder_partner_p_here``: with the partner by cosine;
    - for the ``unshared``, else missing: ``relation``, ``relation_latents`` (lists), ``relation_covered``; ``rebuilt``
      (variance explained), ``rebuilt_from`` and ``rebuilt_weights`` (lists, largest first), ``rebuilt__rotated`` (from
      the other's rotated rows); ``nearest_decoder``, ``nearest_decoder_cosines``, ``nearest_firing`` and
      ``nearest_firing_jaccards`` (lists);
    - ``nulls.FIRING_COLUMNS`` again, as ``jaccard__shifted``, where that null was asked for.
    """

    sides: Sides
    n_tokens: int
    gap_per_latent: float


def compare_behaviour(
    a: Member, b: Member, device: str = "cpu", advance: Callable[[int], None] | None = None, offset: int | None = None
) -> Behaviour:
    """Compare two harvested dictionaries by their firings, in memory of a few arrays of their length.

    Args:
        device: the torch device that rebuilds decoder rows.
        advance: called with the number of latents done: M_a + M_b in all, twice that with a null.
        offset: tokens by which b's firings move for the null (:func:`sae.alignment.nulls.draw_offset`); None: no null.
    """
    of_a, of_b, gap = _count_and_match(a, b, advance)
    sides = (_side(a, b, of_a, device), _side(b, a, of_b, device))
    found = Behaviour(sides, of_a.counts.n_tokens, gap)
    del of_a, of_b
    if offset is not None:
        null_a, null_b, _ = _count_and_match(a, b, advance, offset)
        for side, one, of in ((sides[0], a, null_a), (sides[1], b, null_b)):
            columns = _firing_columns(one, of)
            for name in FIRING_COLUMNS:
                side[f"{name}__{SHIFTED}"] = columns[name]
    return found


class _Matched(NamedTuple):
    """One dictionary's counts, with its latents' partners by Jaccard."""

    counts: Cofirings
    partner: NDArray[np.int32]
    together: NDArray[np.int64]


def _count_and_match(
    a: Member, b: Member, advance: Callable[[int], None] | None, offset: int = 0
) -> tuple[_Matched, _Matched, float]:
    """Count and match both directions, b's firings moved back by ``offset``; also return the matching's gap."""
    n_tokens = min(a.store.n_tokens, b.store.n_tokens)
    of_a, of_b = (
        count_cofirings(one.store, other.store, one.decoder_partner[:, None], one.unshared, advance, shift)
        for one, other, shift in ((a, b, offset), (b, a, (n_tokens - offset) % max(n_tokens, 1)))
    )
    partner, together, gap = match_by_jaccard(of_a, of_b)
    return _Matched(of_a, partner, together), _Matched(of_b, *_invert(partner, together, len(b.unshared))), gap


def _invert(
    partner: NDArray[np.int32], together: NDArray[np.int64], m: int
) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Return a matching as seen from the ``m`` latents of the other dictionary."""
    inverse, count, matched = np.full(m, UNMATCHED, np.int32), np.zeros(m, np.int64), np.flatnonzero(partner >= 0)
    inverse[partner[matched]], count[partner[matched]] = matched, together[matched]
    return inverse, count


def match_by_jaccard(a: Cofirings, b: Cofirings) -> tuple[NDArray[np.int32], NDArray[np.int64], float]:
    """Match one to one with the largest sum of Jaccards, among pairs near each other on either side.

    Returns each latent's partner [M_a], -1 for none; at how many tokens both fire [M_a]; and a bound on what a matching
    over all pairs could add, per latent of the narrower.
    """
    n, m = len(a.near), len(b.near)
    if n > m:
        inverse, count, gap = match_by_jaccard(b, a)
        return *_invert(inverse, count, n), gap
    i, slot = np.nonzero(a.near >= 0)
    j, slot_b = np.nonzero(b.near >= 0)
    keys = np.concatenate([i * np.int64(m) + a.near[i, slot], b.near[j, slot_b] * np.int64(m) + j])
    keys, first = np.unique(keys, return_index=True)
    count = np.concatenate([a.near_together[i, slot], b.near_together[j, slot_b]])[first]
    rows, columns = keys // m, keys % m
    weights = compute_jaccard(count, a.firings[rows], b.firings[columns])
    # Each row also has a column of its own at no gain, so that a matching of all rows always exists.
    own = np.arange(n)
    edges = ((rows, own), (columns, m + own), (weights, np.zeros(n)))
    rows, columns, weights = (np.concatenate(of) for of in edges)
    found = solve(build_graph(rows, columns, weights, n, m + n), m + n)
    partner = np.where(found.partner < m, found.partner, UNMATCHED).astype(np.int32)
    together = np.zeros(n, np.int64)
    some = np.flatnonzero(partner >= 0)
    together[some] = count[np.searchsorted(keys, some * np.int64(m) + partner[some])]
    passed_over = np.minimum(_least(a, b.firings), _least(b, a.firings).max(initial=0.0))
    gains = found.u + found.v[m:]  # only its own row wants such a column, so its price belongs to the row
    return partner, together, float(np.maximum(passed_over - gains, 0).sum() / max(n, 1))


def _least(of: Cofirings, firings_there: NDArray[np.int64]) -> Floats:
    """Return a bound on the Jaccard of each latent with those that are not among its nearest: [M]."""
    last = of.near[:, -1]
    least = compute_jaccard(of.near_together[:, -1], of.firings, firings_there[last])
    return np.where(last >= 0, least, 0.0)


def _side(one: Member, other: Member, matched: _Matched, device: str) -> pd.DataFrame:
    of = matched.counts
    alone = np.flatnonzero(one.unshared)
    living = (of.firings_there > 0)[:, None]  # dead latents are not used
    rebuilt = rebuild(one.W_dec[alone], np.where(living, other.W_dec, 0), device)

    def lists(values: NDArray[Any], real: Bools) -> list[Any]:
        found: list[Any] = [None] * len(one.unshared)
        for row, latent in enumerate(alone):
            found[latent] = values[row][real[row]].tolist()
        return found

    def numbers(values: NDArray[Any]) -> NDArray[np.float32]:
        found = np.full(len(one.unshared), np.nan, np.float32)
        found[alone] = values
        return found

    by_firing = _firing_columns(one, matched)
    shown, shown_near = of.near[alone, :SHOWN], _near(of)[alone, :SHOWN].astype(np.float32)
    columns: dict[str, Any] = {
        "latent": np.arange(len(one.unshared)),
        "n_firings": of.firings,
        **{name: by_firing[name] for name in ("jaccard_partner", "jaccard", "p_there", "p_here")},
        "max_jaccard_neighbor": of.near[:, 0],
        "max_jaccard": by_firing["max_jaccard"],
        **{name: by_firing[name] for name in by_firing if name.startswith("decoder_partner_")},
        "relation": by_firing["relation"],
        "relation_latents": lists(of.members[alone], of.members[alone] >= 0),
        "relation_covered": by_firing["relation_covered"],
        "rebuilt": numbers(rebuilt.explained),
        "rebuilt_from": lists(rebuilt.rows, rebuilt.rows >= 0),
        "rebuilt_weights": lists(rebuilt.weights, rebuilt.rows >= 0),
        "nearest_decoder": lists(rebuilt.nearest, rebuilt.nearest >= 0),
        "nearest_decoder_cosines": lists(rebuilt.cosines, rebuilt.nearest >= 0),
        "nearest_firing": lists(shown, shown >= 0),
        "nearest_firing_jaccards": lists(shown_near, shown >= 0),
    }
    if one.null_of_other is not None:
        null = rebuild(one.W_dec[alone], np.where(living, one.null_of_other, 0), device)
        columns["rebuilt__rotated"] = numbers(null.explained)
    return pd.DataFrame(columns)


def _firing_columns(one: Member, matched: _Matched) -> dict[str, NDArray[Any]]:
    """Return the columns of firings alone, ``FIRING_COLUMNS``: [M] each."""
    of = matched.counts
    relations = np.full(len(one.unshared), None, object)
    relations[one.unshared] = np.array(relation.NAMES, object)[of.relation[one.unshared]]
    return {
        "jaccard_partner": matched.partner,
        **_frequencies("", of, matched.partner, matched.together),
        "max_jaccard": _near(of)[:, 0].astype(np.float32),
        **_frequencies("decoder_partner_", of, one.decoder_partner, of.asked_together[:, 0]),
        "relation": relations,
        "relation_covered": of.covered,
    }


def _near(of: Cofirings) -> Floats:
    """Return the Jaccards of each latent with its nearest, 0 where there is none: [M, N]."""
    return np.where(
        of.near >= 0, compute_jaccard(of.near_together, of.firings[:, None], of.firings_there[of.near]), 0.0
    )


def _frequencies(
    prefix: str, of: Cofirings, partner: NDArray[np.int32], together: NDArray[np.int64]
) -> dict[str, NDArray[np.float32]]:
    """Return the Jaccard and both conditional frequencies with a partner; NaN without, or where one never fires."""
    there = np.where(partner >= 0, of.firings_there[partner], 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        found = {
            "jaccard": together / (of.firings + there - together),
            "p_there": together / of.firings,
            "p_here": together / there,
        }
    return {prefix + name: np.where(partner >= 0, values, np.nan).astype(np.float32) for name, values in found.items()}
