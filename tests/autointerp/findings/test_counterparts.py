"""Totals of what latents do in other SAEs: what is missing is left out, and not taken for a zero or an agreement."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autointerp.findings import counterparts
from autointerp.findings.json_values import to_json
from sae.alignment.nulls import FIRING_COLUMNS


def counterpart_findings(*args: Any, **options: Any) -> Any:
    return to_json(counterparts.counterpart_findings(*args, **options))


def side(n: int, **columns: list) -> pd.DataFrame:
    empty = {
        "jaccard_partner": [-1] * n,
        "jaccard": [np.nan] * n,
        "max_jaccard": [np.nan] * n,
        "decoder_partner_jaccard": [np.nan] * n,
        "decoder_partner_p_there": [np.nan] * n,
        "decoder_partner_p_here": [np.nan] * n,
        "relation": [None] * n,
        "relation_covered": [np.nan] * n,
        "rebuilt": [np.nan] * n,
    }
    return pd.DataFrame({"latent": range(n), **empty, **columns})


def partners(*of: int) -> pd.DataFrame:
    return pd.DataFrame({"decoder_partner": of, "encoder_partner": of})


def test_without_partners_there_is_no_agreement() -> None:
    behaviour = {
        ("a", "b"): side(3, jaccard_partner=[0, -1, -1], relation=[None, "new", "new"], rebuilt=[np.nan, 0.2, 0.4])
    }
    found = counterpart_findings(behaviour, {("a", "b"): partners(1, -1, -1)}, {"a": np.ones(3, bool)})
    assert found is not None
    assert found["same_partner"] == {"decoder": 0.0, "encoder": 0.0, "shared": 0.0, "unshared": None}
    assert found["n_unshared"] == 2
    assert found["rebuilt"]["mean"] == pytest.approx(0.3)
    json.dumps(found, allow_nan=False)


def test_missing_frequencies_are_not_zeros() -> None:
    behaviour = {
        ("a", "b"): side(
            3,
            jaccard_partner=[0, 1, 2],
            decoder_partner_jaccard=[0.5, np.nan, 0.1],
            decoder_partner_p_there=[0.8, np.nan, 0.2],
            decoder_partner_p_here=[0.6, np.nan, np.nan],
            relation=[None, None, "split"],
        )
    }
    found = counterpart_findings(behaviour, {("a", "b"): partners(0, 2, 2)}, {"a": np.ones(3, bool)})
    assert found is not None
    assert found["of_decoder_partner"]["shared"] == {"jaccard": 0.5, "p_there": 0.8, "p_here": 0.6, "n": 1}
    assert found["of_decoder_partner"]["unshared"]["p_here"] is None
    assert found["same_partner"]["decoder"] == pytest.approx(2 / 3)
    assert [row["n"] for row in found["relations"] if row["relation"] == "split"] == [1]


@given(st.integers(0, 2**32 - 1))
def test_both_directions_of_cofiring_have_equal_means(seed: int) -> None:
    """Which is why a report shows one: every pair is seen from both sides."""
    rng, n = np.random.default_rng(seed), 12
    fires = {name: rng.random((n, 40)) < rng.uniform(0.1, 0.9, (n, 1)) for name in "ab"}
    for rows in fires.values():
        rows[:, 0] = True  # none is dead
    there = {"ab": rng.permutation(n)}
    there["ba"] = np.argsort(there["ab"])
    lone = rng.random(n) < 0.5  # of a; a pair is unshared on both of its sides
    unshared = {"ab": lone, "ba": lone[there["ba"]]}
    behaviour, alignments = {}, {}
    for pair, partner in there.items():
        mine, theirs = fires[pair[0]], fires[pair[1]][partner]
        both = (mine & theirs).sum(1)
        behaviour[pair[0], pair[1]] = side(
            n,
            decoder_partner_p_there=(both / mine.sum(1)).tolist(),
            decoder_partner_p_here=(both / theirs.sum(1)).tolist(),
            relation=["new" if lost else None for lost in unshared[pair]],
        )
        alignments[pair[0], pair[1]] = partners(*partner)
    found = counterpart_findings(behaviour, alignments, dict.fromkeys("ab", np.ones(n, bool)))
    assert found is not None
    for told in found["of_decoder_partner"].values():
        assert told["p_there"] == (None if told["p_here"] is None else pytest.approx(told["p_here"]))


def test_dead_latents_do_not_count() -> None:
    behaviour = {("a", "b"): side(2, jaccard_partner=[0, 1])}
    found = counterpart_findings(behaviour, {("a", "b"): partners(0, 0)}, {"a": np.array([True, False])})
    assert found is not None
    assert found["n"] == 1
    assert found["same_partner"]["decoder"] == 1.0
    assert counterpart_findings({}, {}, {}) is None


def test_the_null_keeps_the_totals_of_moved_firings() -> None:
    real: dict[str, list] = {
        "jaccard_partner": [0, 2, 1],
        "jaccard": [0.9, 0.5, 0.1],
        "max_jaccard": [0.9, 0.6, 0.2],
        "relation": [None, "split", "new"],
        "relation_covered": [np.nan, 0.9, np.nan],
        "decoder_partner_jaccard": [0.9, 0.4, 0.1],
    }
    moved: dict[str, list] = {
        **{name: [np.nan] * 3 for name in FIRING_COLUMNS},
        "jaccard_partner": [-1, 2, 0],
        "jaccard": [np.nan, 0.1, 0.2],
        "max_jaccard": [0.0, 0.1, 0.3],
        "relation": [None, "new", "broader"],
        "decoder_partner_jaccard": [0.0, 0.1, 0.3],
    }
    shifted: dict[str, list] = {f"{name}__shifted": of for name, of in moved.items()}
    whole = side(3, rebuilt=[np.nan, 0.2, 0.4], **real, **shifted)
    tables = {pair: partners(0, 2, 2) for pair in (("a", "b"), ("a", "c"))}
    alive = {"a": np.ones(3, bool)}
    found = counterpart_findings({("a", "b"): whole}, tables, alive)
    assert found is not None
    null = found["null"]["shifted"]
    alone = counterpart_findings({("a", "b"): side(3, **moved)}, tables, alive)
    assert alone is not None
    assert null["same_partner"] == alone["same_partner"] != found["same_partner"]
    assert null["of_decoder_partner"] == alone["of_decoder_partner"]
    assert (null["jaccard"], null["max_jaccard"]) == pytest.approx((0.15, 0.4 / 3))
    assert {row["relation"]: row["n"] for row in null["relations"] if row["n"]} == {"broader": 1, "new": 1}
    assert [row["n"] for row in null["relations"]] == [row["n"] for row in alone["relations"]]
    assert found["relations"][1]["n"] == 1
    json.dumps(found, allow_nan=False)
    without = counterpart_findings({("a", "b"): whole, ("a", "c"): side(3, **real)}, tables, alive)
    assert without is not None
    assert without["null"] is None  # half a null is none


def test_tokens_and_exactness_are_told_of_all_pairs() -> None:
    tables = {("a", "b"): side(2, jaccard_partner=[0, 1])}
    facts = {
        ("a", "b"): {"n_tokens": 500, "jaccard_gap_per_latent": 0.01},
        ("a", "c"): {"n_tokens": 400, "jaccard_gap_per_latent": 0.002},
    }
    found = counterpart_findings(tables, {("a", "b"): partners(0, 0)}, {"a": np.ones(2, bool)}, facts)
    assert found is not None
    assert (found["n_tokens"], found["jaccard_gap_per_latent"]) == (400, 0.01)  # what holds for each of them
    assert found["comparisons"][1] == {"runs": ["a", "c"], "n_tokens": 400, "jaccard_gap_per_latent": 0.002}


def test_a_latent_counted_for_two_is_one_observation() -> None:
    rng = np.random.default_rng(0)
    values = rng.random(60)
    once = {("a", "b"): side(60, relation=["new"] * 60, rebuilt=values.tolist())}
    both = {**once, ("a", "c"): once["a", "b"]}
    tables = {pair: partners(*range(60)) for pair in both}
    of_one, of_two = (counterpart_findings(x, tables, {"a": np.ones(60, bool)}) for x in (once, both))
    assert of_one is not None
    assert of_two is not None
    assert of_two["rebuilt"]["interval"] == pytest.approx(of_one["rebuilt"]["interval"])
    assert of_two["n_unshared"] == 2 * of_one["n_unshared"]
