"""Harvests of a few hundred tokens in many small shards, and the same activations in full, for brute force."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from sae.activations.skipping import Skip
from sae.activations.stream import ActivationStream
from sae.common.files import write_json
from sae.dictionaries.architectures.topk import TopKSae
from sae.firings import harvest as harvesting
from sae.firings import index as firing_index
from sae.firings.harvest import harvest
from sae.firings.store import FiringStore
from sae.text.corpus import Corpus

D, M, K, T, WINDOW, N, SPECIAL = 8, 40, 4, 19, 4, 30, 0
USED = T // WINDOW * WINDOW


def a_corpus(folder: Path, tokens: np.ndarray) -> Corpus:
    """A stored corpus of ``tokens`` [N, T], of which token 0 is special."""
    folder.mkdir(parents=True)
    (folder / "tokens.bin").write_bytes(tokens.astype(np.uint16).tobytes())
    record = {
        "key": folder.name,
        "fingerprint": hashlib.sha256(tokens.tobytes()).hexdigest(),
        "context": tokens.shape[1],
        "n_sequences": tokens.shape[0],
        "dtype": "<u2",
        "special_ids": [SPECIAL],
        "info": {},
    }
    write_json(folder / "corpus.json", record)
    return Corpus.open(folder)


class FakeStream:
    """Activations that depend on row and position alone, and a record of what was asked for."""

    hookpoint = "layers.1.mlp"
    subject = SimpleNamespace(fingerprint="beef", dtype=torch.float32)
    skip = Skip()
    find_kept = ActivationStream.find_kept
    find_kept_by_token = ActivationStream.find_kept_by_token

    def __init__(self, corpus: Corpus) -> None:
        self.corpus = corpus
        shape = (corpus.n_sequences, corpus.context, D)
        self.values = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        self.asked: list[int] = []

    def rows(self, index: np.ndarray) -> torch.Tensor:
        self.asked += index.tolist()
        return self.values[torch.as_tensor(index)]


def small_stream(folder: Path, monkeypatch: pytest.MonkeyPatch) -> FakeStream:
    """Activations over a corpus in ``folder``, and everything that works in pieces made to need several."""
    monkeypatch.setattr("sae.text.corpus.BLOCK_TOKENS", 2 * T)
    monkeypatch.setattr(harvesting, "SHARD_BLOCKS", 2)  # four sequences a shard, so that there are several
    monkeypatch.setattr(firing_index, "_BLOCK_FIRINGS", 50)
    monkeypatch.setattr(firing_index, "_SEQUENCES_AT_ONCE_TOKENS", 3 * T)
    monkeypatch.setattr(os, "fsync", lambda _: None)  # a killed process needs none, and it is slow
    monkeypatch.setattr("sae.firings.store._BLOCK_FIRINGS", 50)
    tokens = np.random.default_rng(0).integers(0, 25, (N, T))
    return FakeStream(a_corpus(folder / "corpora" / "c0ffee", tokens))


def an_sae(seed: int) -> TopKSae:
    sae = TopKSae.init(D, M, K, seed)
    sae.b_enc[:5] = -100.0  # some latents are dead, and some tokens fire fewer than k
    return sae


def digest_weights(sae: TopKSae) -> str:
    return hashlib.sha256(b"".join(t.numpy().tobytes() for t in sae.weights().values())).hexdigest()


def run(stream: FakeStream, root: Path, names: str = "a", tokens: int = N * USED, **changed: Any) -> list[FiringStore]:
    saes = {name: an_sae(ord(name)) for name in names}
    folders = {name: root / name / "firings" for name in names}
    weights = {name: digest_weights(sae) for name, sae in saes.items()}
    arguments: dict[str, Any] = {"weights": weights, "window": WINDOW, "order_seed": 7, **changed}
    harvest(stream, saes, folders, tokens=tokens, **arguments)  # type: ignore[arg-type]
    return [FiringStore.open(folder) for folder in folders.values()]


def dense(stream: FakeStream, sae: TopKSae, n_sequences: int = N) -> np.ndarray:
    """Brute force: activations [n_sequences * USED, M] in float16, none at special tokens."""
    order = stream.corpus.order(0, 7)[:n_sequences]
    out = np.zeros((n_sequences * USED, M), np.float16)
    for rank, row in enumerate(order):
        values, indices = sae.encode(stream.values[row, :USED])
        table = torch.zeros(USED, M).scatter_add_(1, indices, values).numpy()
        table[stream.corpus.is_special(stream.corpus.tokens[row, :USED])] = 0
        out[rank * USED : (rank + 1) * USED] = table
    return out


def latents_at(store: FiringStore, window: int) -> list[np.ndarray]:
    """Return the latents that fire at each of the window's tokens, as the shards have them."""
    shard, token = divmod(window * store.window, store.tokens_per_shard)
    latents, counts, window_offsets = store.shard(shard)
    first = token // store.window
    here = latents[int(window_offsets[first]) : int(window_offsets[first + 1])]
    ends = np.cumsum(counts[token : token + store.window], dtype=np.int64)
    return np.split(np.asarray(here), ends[:-1])
