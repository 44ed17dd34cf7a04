"""Two dictionaries compared by what they do: where latents fire together, and what became of those without partner.

Matched directions say whether a latent came back as it was. This says what it does in the other dictionary, from the
firing stores of both and the decoder rows, for both runs of a pair:

- the best one-to-one matching by Jaccard (the share of tokens at which either fires, at which both do), beside those by
  cosine, with the two conditional frequencies P(partner fires | latent fires) and P(latent fires | partner fires);
- for latents that the weights do not find again: their nearest there, how they relate to what fires there
  (:mod:`sae.alignment.relation`), and the combination of at most four decoder rows that rebuilds theirs
  (:mod:`sae.alignment.rebuilding`).

The matching by Jaccard is the best over the pairs in which one is among the 24 nearest of the other. Pairs beyond have
a lower Jaccard than those 24; the metadata's ``gap_per_latent`` bounds what they could add.

Latents that fire often meet by chance, and the best of many looks good. So all that is about firings can be had again
with the other's firings moved along the tokens (``shifted``, :mod:`sae.alignment.nulls`): a second pass, as long as the
first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from sae.alignment import relation
from sae.alignment.cofiring import Cofirings, count_cofirings, jaccard
from sae.alignment.matching.sparse import Graph, solve
from sae.alignment.nulls import FIRING_COLUMNS, SHIFTED
from sae.alignment.pairs import Sides
from sae.alignment.rebuilding import rebuild
from sae.firings.store import FiringStore

UNMATCHED = -1
SHOWN = 4  # of the nearest of each kind, in the table

Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]


class Member(NamedTuple):
    """What is asked about one of the two runs."""

    store: FiringStore
    W_dec: NDArray[Any]
    """[M, D]"""
    decoder_partner: NDArray[np.int32]
    """[M] in the other run, by decoder cosine; -1 without"""
    lone: Bools
    """[M] the latents of which it is asked what they are in the other run"""
    null_of_other: NDArray[Any] | None
    """[M_other, D] decoder rows that share nothing with it, to rebuild from as a control"""


@dataclass(frozen=True)
class Behaviour:
    """A side for each run, with a row per latent [M] and the columns

    - ``latent``; ``n_firings`` over the tokens that both stores hold;
    - ``jaccard_partner`` (-1: none) and ``jaccard``, ``p_there``, ``p_here`` of the two: the conditional frequencies;
      ``max_jaccard_neighbor`` and ``max_jaccard``, taken or not;
    - ``decoder_partner_jaccard``, ``decoder_partner_p_there``, ``decoder_partner_p_here``: of its partner by cosine;
    - for those asked about, else missing: ``relation``, ``relation_latents`` (lists), ``relation_covered``;
      ``rebuilt`` (variance explained), ``rebuilt_from`` and ``rebuilt_weights`` (lists, largest first), and
      ``rebuilt__rotated``, the same out of the other's rows turned by a random rotation;
      ``nearest_decoder`` and ``nearest_decoder_cosines``, ``nearest_firing`` and ``nearest_firing_jaccards`` (lists);
    - those of ``nulls.FIRING_COLUMNS`` again, as ``jaccard__shifted`` and so on, where that null was asked for.
    """

    sides: Sides
    n_tokens: int
    gap_per_latent: float


def behaviour(
    a: Member,
    b: Member,
    device: str = "cpu",
    advance: Callable[[int], None] | None = None,
    offset: int | None = None,
) -> Behaviour:
    """Compare two harvested dictionaries by their firings.

    Memory: a few arrays of the length of the dictionaries, one latent's firings at a time.

    Args:
        device: where decoder rows are rebuilt, a name for torch.
        advance: told of latents done, M_a + M_b in all, twice that with a null.
        offset: tokens by which b's firings are moved for the null (:func:`sae.alignment.nulls.offset_of`); None for no
            null.
    """
    real = _counted(a, b, advance)
    sides = [_side(one, other, of, device) for one, other, of in ((a, b, real.a), (b, a, real.b))]
    found = Behaviour((sides[0], sides[1]), real.a.counts.n_tokens, real.gap)
    del real
    if offset is not None:
        null = _counted(a, b, advance, offset)
        for side, one, of in ((sides[0], a, null.a), (sides[1], b, null.b)):
            columns = _firing_columns(one, of)
            for name in FIRING_COLUMNS:
                side[f"{name}__{SHIFTED}"] = columns[name]
    return found


class _Matched(NamedTuple):
    """One dictionary's counts, with its latents' partners by Jaccard."""

    counts: Cofirings
    partner: NDArray[np.int32]
    together: NDArray[np.int64]


class _Pair(NamedTuple):
    a: _Matched
    b: _Matched
    gap: float


def _counted(a: Member, b: Member, advance: Callable[[int], None] | None, offset: int = 0) -> _Pair:
    """Both directions counted and matched, b's firings moved back by ``offset`` tokens against a's."""
    n_tokens = min(a.store.n_tokens, b.store.n_tokens)
    of_a, of_b = (
        count_cofirings(one.store, other.store, one.decoder_partner[:, None], one.lone, advance, shift)
        for one, other, shift in ((a, b, offset), (b, a, (n_tokens - offset) % max(n_tokens, 1)))
    )
    partner, together, gap = best_by_jaccard(of_a, of_b)
    inverse, together_b = np.full(len(b.lone), UNMATCHED, np.int32), np.zeros(len(b.lone), np.int64)
    matched = partner >= 0
    inverse[partner[matched]], together_b[partner[matched]] = np.flatnonzero(matched), together[matched]
    return _Pair(_Matched(of_a, partner, together), _Matched(of_b, inverse, together_b), gap)


def best_by_jaccard(a: Cofirings, b: Cofirings) -> tuple[NDArray[np.int32], NDArray[np.int64], float]:
    """The one-to-one matching with the largest sum of Jaccards, among pairs near each other on either side.

    Returns the partner of each latent of the first, [M_a], -1 for none; on how many tokens the two fire together,
    [M_a]; and by how much per latent of the narrower a matching over all pairs could exceed it at the most.
    """
    n, m = len(a.near), len(b.near)
    if n > m:
        inverse, count, gap = best_by_jaccard(b, a)
        partner, together, matched = np.full(n, UNMATCHED, np.int32), np.zeros(n, np.int64), inverse >= 0
        partner[inverse[matched]], together[inverse[matched]] = np.flatnonzero(matched), count[matched]
        return partner, together, gap
    i, slot = np.nonzero(a.near >= 0)
    j, slot_b = np.nonzero(b.near >= 0)
    keys = np.concatenate([i * np.int64(m) + a.near[i, slot], b.near[j, slot_b] * np.int64(m) + j])
    keys, first = np.unique(keys, return_index=True)
    count = np.concatenate([a.near_together[i, slot], b.near_together[j, slot_b]])[first]
    rows, columns = keys // m, keys % m
    weights = jaccard(count, a.firings[rows], b.firings[columns])
    # Each row may also take a column of its own at no gain, so that there always is a matching of all rows.
    starts = np.searchsorted(rows, np.arange(n + 1)) + np.arange(n + 1)
    at = np.arange(len(keys)) + rows
    ends = starts[1:] - 1
    all_columns, all_weights = np.empty(len(keys) + n, np.int32), np.zeros(len(keys) + n)
    all_columns[at], all_weights[at] = columns, weights
    all_columns[ends] = m + np.arange(n)
    found = solve(Graph(starts.astype(np.int64), all_columns, all_weights), m + n)
    partner = np.where(found.partner < m, found.partner, UNMATCHED).astype(np.int32)
    together = np.zeros(n, np.int64)
    some = np.flatnonzero(partner >= 0)
    together[some] = count[np.searchsorted(keys, some * np.int64(m) + partner[some])]
    passed_over = np.minimum(_least(a, b.firings), _least(b, a.firings).max(initial=0.0))
    gains = found.u + found.v[m:]  # only its own row ever wants such a column, so it need not have a price
    return partner, together, float(np.maximum(passed_over - gains, 0).sum() / max(n, 1))


def _least(of: Cofirings, firings_there: NDArray[np.int64]) -> Floats:
    """A bound on the Jaccard of each latent with those that are not among its nearest: [M]."""
    last = of.near[:, -1]
    least = jaccard(of.near_together[:, -1], of.firings, firings_there[last])
    return np.where(last >= 0, least, 0.0)


def _side(one: Member, other: Member, matched: _Matched, device: str) -> pd.DataFrame:
    of = matched.counts
    alone = np.flatnonzero(one.lone)
    living = (of.firings_there > 0)[:, None]  # what never fires is nothing to be made of
    rebuilt = rebuild(one.W_dec[alone], np.where(living, other.W_dec, 0), device)
    null = None
    if one.null_of_other is not None:
        null = rebuild(one.W_dec[alone], np.where(living, one.null_of_other, 0), device).explained

    def lists(values: NDArray[Any], real: Bools) -> list[Any]:
        found: list[Any] = [None] * len(one.lone)
        for row, latent in enumerate(alone):
            found[latent] = values[row][real[row]].tolist()
        return found

    def numbers(values: NDArray[Any]) -> NDArray[np.float32]:
        found = np.full(len(one.lone), np.nan, np.float32)
        found[alone] = values
        return found

    by_firing = _firing_columns(one, matched)
    shown, shown_near = of.near[alone, :SHOWN], _near(of)[alone, :SHOWN].astype(np.float32)
    columns: dict[str, Any] = {
        "latent": np.arange(len(one.lone)),
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
    if null is not None:
        columns["rebuilt__rotated"] = numbers(null)
    return pd.DataFrame(columns)


def _firing_columns(one: Member, matched: _Matched) -> dict[str, NDArray[Any]]:
    """The columns that rest on firings alone, ``FIRING_COLUMNS``: [M] each."""
    of = matched.counts
    told = np.full(len(one.lone), None, object)
    told[one.lone] = np.array(relation.NAMES, object)[of.relation[one.lone]]
    return {
        "jaccard_partner": matched.partner,
        **_frequencies("", of, matched.partner, matched.together),
        "max_jaccard": _near(of)[:, 0].astype(np.float32),
        **_frequencies("decoder_partner_", of, one.decoder_partner, of.asked_together[:, 0]),
        "relation": told,
        "relation_covered": of.covered,
    }


def _near(of: Cofirings) -> Floats:
    """The Jaccards of each latent with its nearest, 0 where there is none: [M, N]."""
    return np.where(of.near >= 0, jaccard(of.near_together, of.firings[:, None], of.firings_there[of.near]), 0.0)


def _frequencies(
    prefix: str, of: Cofirings, partner: NDArray[np.int32], together: NDArray[np.int64]
) -> dict[str, NDArray[np.float32]]:
    """Jaccard and both conditional frequencies with a partner each; NaN without one, or where one of them is silent."""
    there = np.where(partner >= 0, of.firings_there[partner], 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        found = {
            "jaccard": together / (of.firings + there - together),
            "p_there": together / of.firings,
            "p_here": together / there,
        }
    return {prefix + name: np.where(partner >= 0, values, np.nan).astype(np.float32) for name, values in found.items()}
