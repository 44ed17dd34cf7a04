"""The interface of an explainer: activating contexts in, one plain sentence out, or the reason for a failure.

The judge gets only the sentence, not the activations, the latent's index or the contexts: the score measures how much
of the behaviour the words alone carry.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, Self

from autointerp.journal.method import Method, Repeatable
from autointerp.journal.usage import Usage
from sae.common.errors import NotApplicable
from sae.study.logits import Logits, LogitTable

if TYPE_CHECKING:
    from autointerp.contexts.material import Material
    from autointerp.contexts.sampler import BackgroundKind, Context
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
    """A way of explaining. If it asks no model, it is created without arguments; else see :class:`ModelExplainer`.

    Two attributes are optional. ``background_kind = "hard"`` asks for silent contexts in which a similar latent fires.
    ``needs_logits = True`` asks for the tokens that the latent promotes: :meth:`explain` and
    :meth:`ModelExplainer.request` get a further argument, a :class:`sae.study.logits.Logits`, or None where there are
    no such tokens.
    """

    needs_background: int  # number of silent contexts that :meth:`explain` needs

    async def explain(self, latent: int, contexts: Sequence[Context], background: Sequence[Context]) -> Explanation:
        """Explain in one line what ``contexts``, in which the latent fires, have in common.

        ``latent`` is for logs only and never reaches a model. A problem with this latent is returned as a failure; one
        that every latent would have (no server, a refused key) raises :class:`sae.common.errors.UserError`.
        """
        ...


class ModelExplainer(Explainer, Repeatable, Protocol):
    """An explainer that asks a language model."""

    @classmethod
    async def open(cls, client: LlmClient, options: LlmOptions) -> Self:
        """Create an explainer that asks ``client``."""
        ...

    @classmethod
    def plan(cls, client: LlmClient, options: LlmOptions) -> tuple[Self, list[str]]:
        """Create one for ``--dry-run`` without sending anything, and list what is therefore unknown, in sentences."""
        ...

    def request(self, contexts: Sequence[Context], background: Sequence[Context]) -> Request:
        """Return the request that :meth:`explain` would send."""
        ...


class Evidence:
    """What an explainer is shown of the latents of one run."""

    def __init__(self, explainer: Explainer, material: Material) -> None:
        """Raise NotFound if the explainer needs the run's logits and they have not been computed."""
        self._sampler, self._n = material.sampler, explainer.needs_background
        self._kind: BackgroundKind = getattr(explainer, "background_kind", "random")
        self._needs_logits = needs_logits(explainer)
        self.without_logits: str | None = None  # why they do not apply
        self._logits: LogitTable | None = None
        if self._needs_logits:
            try:
                self._logits = LogitTable(material.run)
            except NotApplicable as error:
                self.without_logits = str(error)

    def of(self, latent: int) -> tuple[Any, ...]:
        """Return the arguments of :meth:`Explainer.explain` after ``latent``."""
        contexts, background = self._sampler.explaining(latent), self._sampler.background(latent, self._n, self._kind)
        logits = None if self._logits is None else self._logits[latent]
        return (contexts, background, logits) if self._needs_logits else (contexts, background)


def list_texts(contexts: Sequence[Context], background: Sequence[Context], logits: Logits | None = None) -> list[str]:
    """Return the texts that an explainer was shown, which its explanation may quote."""
    tokens = [] if logits is None else [of.token for of in [*logits.promoted, *logits.suppressed]]
    return [*(context.text for context in [*contexts, *background]), *tokens]


def needs_logits(explainer: Explainer | type[Explainer]) -> bool:
    return bool(getattr(explainer, "needs_logits", False))
