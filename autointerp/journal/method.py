"""Identify a way of explaining or judging, so that its answers can be found again and never mixed up."""

from __future__ import annotations

from typing import Any, ClassVar, Protocol, Self, TypeVar, cast

M = TypeVar("M")

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


class Repeatable(Method, Protocol):
    """A method that can be asked the same again. Its first answer, number 0, is the one that it thinks likeliest."""

    def repeated(self, number: int, temperature: float) -> Self:
        """Return the method that gives independent answer ``number`` (from 1), sampled at ``temperature``."""
        ...


def repeat(method: M, number: int, temperature: float) -> M:
    """Return the method for answer ``number``, which is itself for 0; for others it must be :class:`Repeatable`."""
    return cast(M, cast(Any, method).repeated(number, temperature)) if number else method
