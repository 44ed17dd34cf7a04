"""Judge a context by an n-gram explanation: parse the patterns in the sentence and combine their chances. No model.

Reads only the sentence and the context's tokens (and marks); see :mod:`autointerp.explaining.patterns` for the rule. A
sentence that no n-gram explainer wrote is a failure, not a "no".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from autointerp.explaining.patterns import LONGEST_RUN, parse_sentence
from autointerp.journal.method import BASELINE
from autointerp.scoring.judges.base import Judgement
from sae.common.files import digest

if TYPE_CHECKING:
    from autointerp.contexts.sampler import Context


class NgramJudge:
    """An :class:`autointerp.scoring.judges.base.Judge` that reads the sentences of the n-gram explainer."""

    name = BASELINE
    asks_model: ClassVar[bool] = False
    reads: ClassVar[str | None] = BASELINE
    prompt_hash = ""
    model = ""
    contexts_per_request = 1_000
    """Nothing is sent; this is how many judgements are worth one write to the journal."""

    def __init__(self, marked: bool = False) -> None:
        self._marked = marked
        # Verdicts from before marks existed keep their hash.
        self.settings_hash = digest({"method": 1, "longest_run": LONGEST_RUN} | ({"marked": True} if marked else {}))

    def of_marks(self) -> NgramJudge:
        """Return a judge of the chance that the latent fires on any of the marked tokens."""
        return NgramJudge(marked=True)

    async def judge(self, explanation_text: str, contexts: Sequence[Context]) -> list[Judgement]:
        """Return P(active) of each context, or of a marked token in it; active from one half."""
        patterns = parse_sentence(explanation_text)
        if patterns is None:
            reason = "the explanation is not an n-gram sentence; judge it with an LLM"
            return [Judgement(None, None, reason) for _ in contexts]
        costs = patterns.compute_costs()
        chances = [patterns.compute_probability(c.tokens, costs, c.marks if self._marked else None) for c in contexts]
        return [Judgement(p, p >= 0.5) for p in chances]
