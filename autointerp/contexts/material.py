"""Read what explaining and scoring need of a run: its firing store, through one sampler. Needs no model."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import pandas as pd

from autointerp.contexts.near_duplicates import METHOD as GROUPING
from autointerp.contexts.near_duplicates import load_groups
from autointerp.contexts.neighbours import Neighbours
from autointerp.contexts.positions import Hashes
from autointerp.contexts.sampler import METHOD, ContextSampler
from autointerp.contexts.sides import Sides, split_by_document
from sae.common.files import digest, read_table, write_table
from sae.common.progress import say, track
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
            self._groups,
            Neighbours(self.store, self.run.read_decoder),
            self._sides.of_window if self._sides else None,
        )

    @functools.cached_property
    def _groups(self) -> Hashes:
        return load_groups(self.run, self.store, self.settings.near_duplicate)

    @functools.cached_property
    def _sides(self) -> Sides | None:
        """The split by document; ``None`` if runs from before split by text."""
        return split_by_document(self.store, self._groups) if self.settings.split == "document" else None

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
        if self._sides and self._sides.n_cut:
            say(
                f"{self.run.name}: few documents hold most of the text; {self._sides.n_cut} cut into sections, "
                "which the explainer and the judge share"
            )
        rows = []
        with track(f"counting contexts of {self.run.name}", self.store.num_latents, "latents") as bar:
            for latent in range(self.store.num_latents):
                rows.append((latent, *self.sampler.eligible(latent)))
                bar.advance()
        table = pd.DataFrame(rows, columns=["latent", "eligible", "ineligible_reason"])
        write_table(path, table, inputs=self.digest, split=self._sides.describe() if self._sides else None)
        return table
