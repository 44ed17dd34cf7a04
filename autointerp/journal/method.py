"""Identify a way of explaining or judging, so that its answers can be found again and never mixed up."""

from __future__ import annotations

from typing import ClassVar, Protocol

BASELINE = "ngram"  # explains the latents of every other explainer too, and judges its own sentences
CHANCE = 0.5  # the balanced accuracy, and the AUROC, of a judge who knows nothing
ENOUGH_TO_CALL_DEAD = 1_000_000  # tokens without a firing before the word is used


class Method(Protocol):
    """Two methods with equal name, hashes and model give interchangeable answers."""

    asks_model: ClassVar[bool]  # if so, a model has to be named, and requests are counted and paid for
    name: str  # short and stable, as stored in the journal: ``llm``, ``ngram``
    settings_hash: str  # digest of every parameter that an answer depends on
    prompt_hash: str  # digest of every word sent to a model; empty for a method that asks none

    @property
    def model(self) -> str:
        """The model that is asked; empty for a method that asks none."""
        ...
