"""Explain a latent by showing a language model where it fires (after Paulo et al. 2024, arXiv 2410.13928).

The model sees text with the firing pieces marked and nothing else. Its answer ends in one line, ``[EXPLANATION]: …``;
an answer without that line is a failure. If it repeats one of the prompt's examples, the model is asked once more
without that example. A copy in the second answer is a failure, and so is a copy of the instructions.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self

from autointerp.contexts.marking import choose_marks, mark_text
from autointerp.explaining.copies import find_copied
from autointerp.explaining.explainers.base import Explanation
from autointerp.journal.usage import Usage
from autointerp.llm.capabilities import Capabilities
from autointerp.llm.client import LlmClient
from autointerp.llm.exchange import Answer, AnswerFailed, Request, one_line, without_thinking
from autointerp.llm.prompts import Conversation, conversation
from sae.common.files import digest

if TYPE_CHECKING:
    from autointerp.contexts.sampler import Context
    from autointerp.llm.options import LlmOptions
    from sae.study.logits import Logits

LONGEST = 1500  # most characters of an explanation
THRESHOLD = 0.3  # tokens above this share of a context's peak activation are marked
_COPY_SHOWN = 80  # characters of a copied text in the reason
MAX_TOKENS = 1000  # of the answer, thinking included; doubled for answers that were cut off

_FORMAT = 1  # part of the settings hash: raise it when the same contexts would be written out differently
# Repetitions are bounded, so that no answer takes long to search.
_LINE = re.compile(
    r"^[ \t*_#>`]{0,20}\[?\s{0,5}explanation\s{0,5}\]?[\s*_`]{0,20}:[\s*_`]*", re.IGNORECASE | re.MULTILINE
)
_LEFT_MARK = re.compile(r"""["'“”]?(?:<<(\S(?:[^<>\n]*\S)?)>>|[⟦⦃](\S(?:[^⟦⟧⦃⦄\n]*\S)?)[⟧⦄])["'“”]?""")


class LlmExplainer:
    """An :class:`autointerp.explaining.explainers.base.Explainer` that asks a language model.

    :param draw: number of this one of several independent explanations, which differ if ``temperature`` is above 0.
    """

    name = "llm"
    asks_model: ClassVar[bool] = True
    needs_background = 0
    prompts: ClassVar[str] = "explain"  # the conversation
    settings: ClassVar[Mapping[str, Any]] = {}  # what else an answer depends on

    def __init__(self, client: LlmClient, *, draw: int = 0, temperature: float = 0.0) -> None:
        self._client, self._draw, self._temperature = client, draw, temperature
        self._conversation = conversation(self.prompts)
        self.prompt_hash = self._conversation.hash
        self.settings_hash = digest(
            {"format": _FORMAT, "temperature": temperature, "threshold": THRESHOLD, "max_tokens": MAX_TOKENS}
            | client.settings
            | dict(self.settings)
        )

    @classmethod
    async def open(cls, client: LlmClient, options: LlmOptions) -> Self:  # noqa: ARG003
        return cls(client)

    @classmethod
    def plan(cls, client: LlmClient, options: LlmOptions) -> tuple[Self, list[str]]:  # noqa: ARG003
        return cls(client), []

    def repeated(self, number: int, temperature: float) -> Self:
        """Return the same explainer, asked for draw ``number`` at ``temperature``."""
        return type(self)(self._client, draw=number, temperature=temperature)

    @property
    def model(self) -> str:
        return self._client.model

    @property
    def capabilities(self) -> Capabilities:
        """What the model's servers can do, as far as it is known."""
        return self._client.capabilities

    async def explain(
        self,
        latent: int,  # noqa: ARG002 - never shown to the model
        contexts: Sequence[Context],
        background: Sequence[Context],
        logits: Logits | None = None,
    ) -> Explanation:
        """Ask for one sentence about ``contexts``."""
        if not contexts:
            return Explanation(None, "no contexts to explain from")
        shown, usage = self._conversation, Usage()
        for _ in range(2):
            try:
                # A copy is accepted here, so that it is kept in the cache and never paid for again.
                request = self.request(contexts, background, logits, shown=shown)
                text, answer = await self._client.ask(request, parse_explanation)
            except AnswerFailed as failed:
                return Explanation(None, failed.reason, usage + failed.usage)
            usage += answer.usage
            copied = find_copied(text, [*shown.examples, shown.instructions])
            if copied is None:
                return Explanation(text, usage=usage)
            if copied == len(shown.examples):
                break
            shown = shown.without(copied)
        return Explanation(None, f"copied from the prompt: {one_line(text, _COPY_SHOWN)}", usage)

    def request(
        self,
        contexts: Sequence[Context],
        background: Sequence[Context] = (),
        logits: Logits | None = None,
        *,
        shown: Conversation | None = None,
    ) -> Request:
        """Return the request that :meth:`explain` sends, after the messages of ``shown`` (default: all examples)."""
        opening, closing = choose_marks([context.text for context in [*contexts, *background]])
        snippets = [mark_text(c.tokens, c.marked(THRESHOLD), opening, closing) for c in contexts]
        values = self._list_values(background, logits)
        return Request(
            (shown or self._conversation).messages(opening=opening, closing=closing, snippets=snippets, **values),
            max_tokens=MAX_TOKENS,
            temperature=self._temperature,
            seed=self._draw if self._temperature > 0 else None,
            replicate=self._draw,
        )

    def _list_values(self, background: Sequence[Context], logits: Logits | None) -> dict[str, Any]:  # noqa: ARG002
        """Return the values of the conversation's template apart from the marked snippets."""
        return {}


def parse_explanation(answer: Answer) -> str:
    """Return the sentence after the last ``[EXPLANATION]:``, on one line and without leftover marks.

    :raises AnswerFailed: there is no such line, or it is empty or too long.
    """
    text = without_thinking(answer.text)
    *_, last = itertools.chain([None], _LINE.finditer(text))
    if last is None:
        raise AnswerFailed("the answer has no line that begins with [EXPLANATION]:")
    # One paragraph: text after a blank line is a comment on the answer.
    paragraph = re.split(r"\n\s*\n", text[last.end() :].strip(), maxsplit=1)[0]
    sentence = " ".join(paragraph.split()).strip("*_` ")
    sentence = _LEFT_MARK.sub(lambda found: f'"{found[1] or found[2]}"', sentence)
    if not any(c.isalnum() for c in sentence):
        raise AnswerFailed("the line [EXPLANATION]: has nothing after it")
    if len(sentence) > LONGEST:
        raise AnswerFailed(f"the explanation is {len(sentence)} characters long; at most {LONGEST} make a sentence")
    return sentence
