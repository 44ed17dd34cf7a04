"""What every explainer is: activating contexts in, one plain sentence out, or the reason why there is none.

An explanation is plain text because text is all a judge may have. Whatever an explainer knows and does not
write down (activations, the latent's number, the contexts themselves) is lost, and that loss is the point: the
score says how much of the latent's behaviour the words alone carry.
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
    """One sentence about a latent, or why there is none; never both and never neither."""

    text: str | None
    """The explanation, one line. ``None`` when it failed."""
    failure: str | None = None
    """The reason in one line, when there is no text."""
    usage: Usage = field(default_factory=Usage)
    """What this explanation cost; nothing for an explainer that asks no model."""

    def __post_init__(self) -> None:
        if (self.text is None) == (self.failure is None):
            raise ValueError("an explanation has either a text or a failure")


class Explainer(Method, Protocol):
    """A way of explaining. One that asks no model is made without arguments; else see :class:`ModelExplainer`."""

    @property
    def needs_background(self) -> int:
        """How many contexts in which the latent is silent :meth:`explain` wants."""
        ...

    async def explain(self, latent: int, contexts: Sequence[Context], background: Sequence[Context]) -> Explanation:
        """Say in one line what ``contexts`` have in common, in which the latent fires.

        ``latent`` only names the work (logs, errors); it never reaches a model. What goes wrong with this one
        latent comes back as a failure; what would go wrong with every latent (no server, a refused key) is raised
        as :class:`sae.common.errors.UserError`.
        """
        ...


class ModelExplainer(Explainer, Protocol):
    """An explainer that asks a language model: how it is made, and what it would send."""

    @classmethod
    async def open(cls, client: LlmClient, options: LlmOptions) -> Self:
        """One that asks ``client``, whose model is checked before anything is asked."""
        ...

    @classmethod
    def plan(cls, client: LlmClient, options: LlmOptions) -> tuple[Self, list[str]]:
        """As :meth:`open`, but sends nothing, for ``--dry-run``; and what is not known therefore, in sentences."""
        ...

    def request(self, contexts: Sequence[Context]) -> Request:
        """What is sent for ``contexts``."""
        ...
