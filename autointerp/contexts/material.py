"""Read what explaining and scoring need of a run: its firing store, through one sampler. Needs no model."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import pandas as pd

from autointerp.contexts.near_duplicates import METHOD as GROUPING
from autointerp.contexts.near_duplicates import load_groups
from autointerp.contexts.neighbours import Neighbours
from autointerp.contexts.sampler import METHOD, ContextSampler
from sae.common.files import digest, read_table, write_table
from sae.common.progress import track
from sae.firings.store import FiringStore
from sae.settings import ContextSettings
from sae.study.run import Run


@dataclass(frozen=True)
class Material:
    """A run's contexts, and the digest of everything they depend on."""

    run: Run
    store: FiringStore
    settings: ContextSettings
    """The number of contexts of each kind, and the sample seed."""

    @classmethod
    def of(cls, run: Run, settings: ContextSettings | None = None) -> Material:
        """Open the contexts of ``run``, with other ``settings`` for a test set of another size."""
        return cls(run, run.store(), settings or run.settings.contexts)

    @functools.cached_property
    def sampler(self) -> ContextSampler:
        """The sampler; the first use finds near-duplicate windows, once for each harvest."""
        return ContextSampler(
            self.store,
            self.store.corpus.decode,
            self.settings,
            load_groups(self.run, self.store, self.settings.near_duplicate),
            Neighbours(self.store, self.run.read_decoder),
        )

    @functools.cached_property
    def digest(self) -> str:
        """Equal digests mean equal contexts for every latent. 64 hex characters."""
        contexts = self.settings.model_dump(mode="json")
        return digest({"store": self.store.digest, "contexts": contexts, "method": [METHOD, GROUPING]})

    def eligibility(self) -> pd.DataFrame:
        """Return one row per latent: ``latent``, ``eligible`` and ``ineligible_reason``. Counted once, then read."""
        path = self.run.stage_path("contexts")
        if self.run.stage_inputs("contexts") == self.digest:
            return read_table(path)
        rows = []
        with track(f"counting contexts of {self.run.name}", self.store.num_latents, "latents") as bar:
            for latent in range(self.store.num_latents):
                rows.append((latent, *self.sampler.eligible(latent)))
                bar.advance()
        table = pd.DataFrame(rows, columns=["latent", "eligible", "ineligible_reason"])
        write_table(path, table, inputs=self.digest)
        return table
