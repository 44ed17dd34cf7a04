"""The interface of a judge: an explanation and contexts in, P(active) of each context out.

A judge may read a context's ``text``, ``tokens`` and ``marks`` only. The other fields are the answers, or would reveal
them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Protocol, Self

from autointerp.journal.method import Method, Repeatable
from autointerp.journal.usage import Usage

if TYPE_CHECKING:
    from autointerp.contexts.sampler import Context
    from autointerp.llm.client import LlmClient
    from autointerp.llm.exchange import Request
    from autointerp.llm.options import LlmOptions


@dataclass(frozen=True)
class Judgement:
    """A judge's answer for one context. A failure has neither ``p`` nor ``label``: it is not a "no"."""

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
    """A way of judging. One that asks no model is created without arguments; else see :class:`ModelJudge`."""

    reads: ClassVar[str | None]
    """The one explainer whose sentences it can read; ``None``: any text."""

    @property
    def contexts_per_request(self) -> int:
        """The number of contexts in a request, a good unit for journaling."""
        ...

    def of_marks(self) -> Judge:
        """Return this judge, asked about marked tokens: P(active) is the probability that the marks are right."""
        ...

    async def judge(self, explanation_text: str, contexts: Sequence[Context]) -> list[Judgement]:
        """Return one judgement per context, in the same order.

        A problem with one request is returned as failures of its contexts; one that every request would have (no
        server, a refused key) is raised as :class:`sae.common.errors.UserError`.
        """
        ...


class ModelJudge(Judge, Repeatable, Protocol):
    """A judge that asks a language model: how to create it, and its requests."""

    @classmethod
    async def open(cls, client: LlmClient, options: LlmOptions) -> Self:
        """Return a judge that asks ``client``, with its model checked first."""
        ...

    @classmethod
    def plan(cls, client: LlmClient, options: LlmOptions) -> Mapping[str, Self]:
        """Map protocols to judges for ``--dry-run``, sending nothing.

        Several if the choice depends on the servers; a judge with a single protocol may call it ``""``.
        """
        ...

    def of_marks(self) -> Self: ...

    def request(self, explanation: str, contexts: Sequence[Context]) -> Request:
        """Return the request for at most ``contexts_per_request`` contexts."""
        ...

    def answer_like(self, request: Request) -> str:
        """Return an answer as long as a real answer to ``request``."""
        ...
