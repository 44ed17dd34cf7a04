"""Totals of what latents do in other SAEs: what is missing is left out, and not taken for a zero or an agreement."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest

from autointerp.counterparts import counterpart_findings


def side(n: int, **columns: list) -> pd.DataFrame:
    empty = {
        "jaccard_partner": [-1] * n,
        "jaccard": [np.nan] * n,
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


def test_dead_latents_do_not_count() -> None:
    behaviour = {("a", "b"): side(2, jaccard_partner=[0, 1])}
    found = counterpart_findings(behaviour, {("a", "b"): partners(0, 0)}, {"a": np.array([True, False])})
    assert found is not None
    assert found["n"] == 1
    assert found["same_partner"]["decoder"] == 1.0
    assert counterpart_findings({}, {}, {}) is None


def test_a_latent_counted_for_two_others_is_one_observation() -> None:
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
