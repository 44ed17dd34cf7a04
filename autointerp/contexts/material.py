"""What explaining and scoring read of a run: its firing store, through one sampler. No torch, no model."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from autointerp.contexts.near_duplicates import METHOD as GROUPING
from autointerp.contexts.near_duplicates import groups_of
from autointerp.contexts.neighbours import Neighbours
from autointerp.contexts.sampler import METHOD, ContextSampler
from sae.common.files import digest, read_table, write_table
from sae.common.progress import track
from sae.firings.store import FiringStore
from sae.settings import ContextSettings
from sae.study.run import Run


@dataclass(frozen=True)
class Material:
    """A run's contexts, and the digest of everything that decides which they are."""

    run: Run
    store: FiringStore
    settings: ContextSettings
    """How many contexts of what, and the sample seed."""

    @classmethod
    def of(cls, run: Run, settings: ContextSettings | None = None) -> Material:
        """``settings`` in place of the run's own, for a test set of another size."""
        return cls(run, run.store(), settings or run.settings.contexts)

    @functools.cached_property
    def sampler(self) -> ContextSampler:
        """Made when first drawn from: windows that nearly repeat each other are looked for then, once for a harvest."""
        settings = self.settings
        return ContextSampler(
            self.store,
            self.store.corpus.decode,
            settings,
            groups_of(self.run, self.store, settings.near_duplicate),
            Neighbours(self.store, self.decoder),
        )

    def decoder(self) -> npt.NDArray[np.floating]:
        """[M, D] the decoder, read from the run's weights."""
        from safetensors import safe_open

        with safe_open(self.run.weights_path, framework="numpy") as weights:
            return np.asarray(weights.get_tensor("W_dec"))

    @functools.cached_property
    def digest(self) -> str:
        """Two runs of a command with the same digest draw the same contexts for every latent. 64 hex characters."""
        contexts: dict[str, Any] = self.settings.model_dump(mode="json")
        return digest({"store": self.store.digest, "contexts": contexts, "method": [METHOD, GROUPING]})

    def eligibility(self) -> pd.DataFrame:
        """One row per latent: ``latent``, ``eligible`` and, where it is not, ``reason``. Counted once, then read.

        A dead latent is not eligible, and says so.
        """
        path = self.run.stage_path("contexts")
        if self.run.stage_inputs("contexts") == self.digest:
            return read_table(path)
        rows = []
        with track(f"counting contexts of {self.run.name}", self.store.num_latents, "latents") as bar:
            for latent in range(self.store.num_latents):
                eligible, reason = self.sampler.eligible(latent)
                rows.append((latent, eligible, reason))
                bar.advance()
        table = pd.DataFrame(rows, columns=["latent", "eligible", "ineligible_reason"])
        write_table(path, table, inputs=self.digest)
        return table
