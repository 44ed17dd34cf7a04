"""Every architecture in training: to where L0 is wanted, back from the dead, and through an interruption."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from test_firings import USED, FakeStream, N, stream
from test_firings import D as STREAM_D
from test_trainer import B, Batches, D, K, M, folders, settings, train

from sae.activations.stream import ActivationStream
from sae.common.errors import BadInput
from sae.dictionaries.architectures import ARCHITECTURES
from sae.dictionaries.architectures.gated import GatedSae
from sae.dictionaries.sae import Objective, Sae, total_variance
from sae.firings.harvest import harvest
from sae.firings.store import FiringStore, latent_statistics
from sae.settings import TrainingSettings

__all__ = ["stream"]  # a fixture

KINDS = sorted(ARCHITECTURES)
PENALISED = sorted(kind for kind, of in ARCHITECTURES.items() if of.penalised)


def fresh(kind: str, *seeds: int) -> list[Sae]:
    return [ARCHITECTURES[kind].init(D, M, K, seed, Batches(1)[0]) for seed in seeds]


def of(kind: str, **values: object) -> TrainingSettings:
    return settings(architecture=kind, **values)


def same(a: Sae, b: Sae) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.weights().values(), b.weights().values(), strict=True))


def mean_l0(sae: Sae, steps: range) -> float:
    return sum(float((sae.encode(Batches(1)[step]).activations > 0).sum()) for step in steps) / (B * len(steps))


@pytest.mark.parametrize("stops", [(3,), (6, 14, 19)])
@pytest.mark.parametrize("kind", KINDS)
def test_resuming_is_bit_for_bit(kind: str, stops: tuple[int, ...], tmp_path: Path) -> None:
    values = of(kind, tokens=20 * B, dead_tokens=3 * B)
    straight, resumed, broken = fresh(kind, 0, 1), fresh(kind, 0, 1), folders(tmp_path / "broken", 2)
    expected = train(Batches(20), straight, values, folders(tmp_path / "straight", 2))
    for stop in stops:
        with pytest.raises(KeyboardInterrupt):
            train(Batches(20, fail_at=stop), fresh(kind, 0, 1), values, broken)
    logs = train(Batches(20), resumed, values, broken)
    assert logs[0].resumed_from == stops[-1] // 4 * 4
    for a, b, log, reference in zip(straight, resumed, logs, expected, strict=True):
        assert same(a, b)
        assert log.rows == reference.rows
    assert not same(*straight)


@pytest.mark.parametrize("kind", KINDS)
def test_alone_with_others_or_twice_the_same(kind: str, tmp_path: Path) -> None:
    together, alone, again = fresh(kind, 0, 1), fresh(kind, 1), fresh(kind, 1)
    for i, saes in enumerate((together, alone, again)):
        train(Batches(12), saes, of(kind), folders(tmp_path / str(i), len(saes)))
    assert same(together[1], alone[0])
    assert same(alone[0], again[0])


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=[pytest.mark.slow] * (kind in PENALISED)) for kind in KINDS])
def test_it_learns_and_fires_as_often_as_asked(kind: str, tmp_path: Path) -> None:
    (sae,) = fresh(kind, 0)
    steps = 2000 if kind in PENALISED else 800  # to settle, the coefficient takes a run as long as real ones are
    table = train(Batches(steps), [sae], of(kind, tokens=steps * B), folders(tmp_path, 1))[0].table()
    last, first = table.iloc[-1], table.iloc[0]
    assert last["fvu"] < first["fvu"]
    assert last["fvu"] < 0.5
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(M))
    fires = mean_l0(sae, range(5000, 5100))  # batches that it has not seen
    assert fires <= K if kind == "topk" else fires == pytest.approx(K, rel=0.1)
    sums = last["fvu"] + last["auxk"] / 32 + last["sparsity"]
    if kind in PENALISED:
        assert last["sparsity"] > 0
        assert last["sparsity_coefficient"] > 0
        assert last["loss"] > sums + 0.01 if kind == "gated" else last["loss"] == pytest.approx(sums)
    else:
        assert (table[["sparsity", "sparsity_coefficient"]] == 0).all(axis=None)
        assert last["loss"] == pytest.approx(sums)


class Rich(Batches):
    """More directions than there are latents, so that there is work for all."""

    def __init__(self, steps: int) -> None:
        super().__init__(steps, directions_in_all=60)


def killed(kind: str, way: str = "") -> Sae:
    """A dictionary whose first 25 latents never fire: too short to be among the largest, or too low to be positive."""
    sae = ARCHITECTURES[kind].init(D, M, K, 0, Rich(1)[0])
    if way == "magnitude":
        assert isinstance(sae, GatedSae)
        sae.b_mag[:25] -= 1.5
    elif sae.penalised:
        sae.b_enc[:25] -= 1.5
    else:
        sae.W_enc[:25] *= 0.05
        sae.b_enc[:25] -= 0.02
    return sae


def silent(sae: Sae) -> int:
    fired = torch.zeros(M, dtype=torch.bool)
    for step in range(5000, 5050):
        found = sae.loss_and_gradient(x := Rich(1)[step], Objective(total_variance(x), len(x)))[0].firings
        fired |= found > 0
    return int((~fired[:25]).sum())


@pytest.mark.parametrize(
    ("kind", "way"),
    [
        ("topk", ""),
        ("gated", "magnitude"),
        *(pytest.param(kind, "", marks=pytest.mark.slow) for kind in KINDS if kind != "topk"),
    ],
)
def test_latents_killed_on_purpose_are_brought_back(kind: str, way: str, tmp_path: Path) -> None:
    steps = 800 if kind == "jumprelu" else 400
    left, fvu = {}, {}
    for name, begin, coefficient in (
        ("whole", ARCHITECTURES[kind].init(D, M, K, 0, Rich(1)[0]), 1 / 32),
        ("left alone", killed(kind, way), 0.0),
        ("revived", killed(kind, way), 1 / 32),
    ):
        before = silent(begin)
        values = of(kind, tokens=steps * B, dead_tokens=5 * B, auxk=coefficient)
        table = train(Rich(steps), [begin], values, folders(tmp_path / name, 1))[0].table()
        left[name], fvu[name] = silent(begin), table["fvu"].tail(10).mean()
        assert before < 3 if name == "whole" else before > 15
    assert left["left alone"] > 20
    # BatchTopK makes do with fewer latents than it has, at no higher an error.
    assert left["revived"] <= left["whole"] + (10 if kind == "batchtopk" else 3)
    if kind in ("topk", "batchtopk"):  # the same L0, so errors compare
        assert fvu["revived"] < 1.05 * fvu["whole"] < fvu["left alone"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_nonfinite_loss_stops_before_the_weights_change(kind: str, tmp_path: Path) -> None:
    (sae,) = fresh(kind, 0)
    sae.W_dec *= 1e25
    before = {name: w.clone() for name, w in sae.weights().items()}
    with pytest.raises(BadInput, match=r"run_a: the fvu is not finite at step 1 of 4"):
        train(Batches(4), [sae], of(kind), folders(tmp_path, 1))
    assert all(torch.equal(before[name], w) for name, w in sae.weights().items())


@pytest.mark.parametrize("kind", KINDS)
def test_a_harvest_is_what_the_dictionary_computes(kind: str, stream: FakeStream, tmp_path: Path) -> None:
    sample = stream.values.flatten(0, 1)
    sae = ARCHITECTURES[kind].init(STREAM_D, M, K, 3, sample)
    if kind == "batchtopk":
        sae.weights()["threshold"].fill_(0.9)
    sae.b_enc[:5] = -100.0
    folder = tmp_path / "a" / "firings"
    harvest(
        cast(ActivationStream, stream), {"a": sae}, {"a": folder}, {"a": ""}, tokens=N * USED, window=4, order_seed=0
    )
    store = FiringStore.open(folder)
    order = stream.corpus.order(0, 0)
    firings = sae.encode(stream.values[torch.as_tensor(order)][:, :USED].flatten(0, 1))
    dense = torch.zeros(N * USED, M).scatter_add_(1, firings.indices, firings.activations).numpy()
    dense[stream.corpus.is_special(stream.corpus.rows(order)[:, :USED]).ravel()] = 0
    per_token = (dense > 0).sum(1)
    if kind != "topk":
        assert per_token.max() > per_token[per_token > 0].min()
    assert store.n_firings == (dense > 0).sum()
    for latent in range(M):
        position, activation = store.firings(latent)
        assert np.array_equal(position, np.flatnonzero(dense[:, latent]))
        np.testing.assert_allclose(activation, dense[position, latent], rtol=1e-3)
    assert latent_statistics(store)["dead"].to_numpy()[:5].all()
