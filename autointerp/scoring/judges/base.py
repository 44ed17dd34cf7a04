"""What every judge is: an explanation and contexts in, P(active) for each context out.

A judge may look at a context's ``text``, ``tokens`` and ``marks`` and at nothing else of it. ``activations``,
``active``, ``stratum``, ``kind`` and ``window`` are the answers, or would give them away.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Protocol, Self

from autointerp.journal.method import Method
from autointerp.journal.usage import Usage

if TYPE_CHECKING:
    from autointerp.contexts.sampler import Context
    from autointerp.llm.client import LlmClient
    from autointerp.llm.exchange import Request
    from autointerp.llm.options import LlmOptions


@dataclass(frozen=True)
class Judgement:
    """What a judge says of one context. A failure has neither ``p`` nor ``label``: it is not a "no"."""

    p: float | None
    """P(active) in [0, 1], where the judge gives a probability; else ``None``."""
    label: bool | None
    """The judge's yes or no; ``None`` only when it failed."""
    failure: str | None = None
    """The reason in one line, when there is no label."""
    usage: Usage = field(default_factory=Usage)
    """What the request cost, on the *first* context of each request, so that a plain sum is right."""

    def __post_init__(self) -> None:
        if (self.label is None) == (self.failure is None):
            raise ValueError("a judgement has either a label or a failure")
        if self.p is not None and (self.failure is not None or not 0.0 <= self.p <= 1.0):
            raise ValueError(f"P(active) = {self.p} is no probability of a judgement that was made")


class Judge(Method, Protocol):
    """A way of judging. One that asks no model is made without arguments; else see :class:`ModelJudge`."""

    reads: ClassVar[str | None]
    """The one explainer whose sentences it can read; ``None``: any text."""

    @property
    def contexts_per_request(self) -> int:
        """How many contexts go into one request: the unit in which a caller does well to journal."""
        ...

    def of_marks(self) -> Judge:
        """The judge of this kind that is asked whether the latent fires on the marked tokens: P(active) is then the
        chance that the marks are right."""
        ...

    async def judge(self, explanation_text: str, contexts: Sequence[Context]) -> list[Judgement]:
        """One judgement for each context, in the same order, whatever their number.

        What goes wrong with one request comes back as failures of its contexts; what would go wrong with every
        request (no server, a refused key) is raised as :class:`sae.common.errors.UserError`.
        """
        ...


class ModelJudge(Judge, Protocol):
    """A judge that asks a language model: how it is made, and what it would send."""

    @classmethod
    async def open(cls, client: LlmClient, options: LlmOptions) -> Self:
        """One that asks ``client``, whose model is checked before anything is asked."""
        ...

    @classmethod
    def plan(cls, client: LlmClient, options: LlmOptions) -> Mapping[str, Self]:
        """As :meth:`open`, but sends nothing, for ``--dry-run``: its protocol → the judge. Several where which one it
        will be is only known when the servers have been asked; a judge with one protocol alone may call it ``""``."""
        ...

    def of_marks(self) -> Self: ...

    def request(self, explanation: str, contexts: Sequence[Context]) -> Request:
        """What is sent for ``contexts``, of which there are at most ``contexts_per_request``."""
        ...

    def answer_like(self, request: Request) -> str:
        """An answer as long as those that ``request`` is given."""
        ...
