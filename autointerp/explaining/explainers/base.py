"""The interface of an explainer: activating contexts in, one plain sentence out, or the reason for a failure.

The judge gets only the sentence, not the activations, the latent's index or the contexts: the score measures how much
of the behaviour the words alone carry.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, Self

from autointerp.journal.method import Method
from autointerp.journal.usage import Usage

if TYPE_CHECKING:
    from autointerp.contexts.sampler import Context
    from autointerp.llm.client import LlmClient
    from autointerp.llm.exchange import Request
    from autointerp.llm.options import LlmOptions


@dataclass(frozen=True)
class Explanation:
    """One sentence about a latent, or the reason why there is none."""

    text: str | None  # one line; ``None`` for a failure
    failure: str | None = None  # the reason in one line, if there is no text
    usage: Usage = field(default_factory=Usage)  # the cost; nothing for an explainer that asks no model

    def __post_init__(self) -> None:
        if (self.text is None) == (self.failure is None):
            raise ValueError("an explanation has either a text or a failure")


class Explainer(Method, Protocol):
    """A way of explaining. If it asks no model, it is created without arguments; else see :class:`ModelExplainer`."""

    needs_background: int  # number of silent contexts that :meth:`explain` needs

    async def explain(self, latent: int, contexts: Sequence[Context], background: Sequence[Context]) -> Explanation:
        """Explain in one line what ``contexts``, in which the latent fires, have in common.

        ``latent`` is for logs only and never reaches a model. A problem with this latent is returned as a failure; one
        that every latent would have (no server, a refused key) raises :class:`sae.common.errors.UserError`.
        """
        ...


class ModelExplainer(Explainer, Protocol):
    """An explainer that asks a language model."""

    @classmethod
    async def open(cls, client: LlmClient, options: LlmOptions) -> Self:
        """Create an explainer that asks ``client``."""
        ...

    @classmethod
    def plan(cls, client: LlmClient, options: LlmOptions) -> tuple[Self, list[str]]:
        """Create one for ``--dry-run`` without sending anything, and list what is therefore unknown, in sentences."""
        ...

    def request(self, contexts: Sequence[Context]) -> Request:
        """Return the request for ``contexts``."""
        ...
