"""Judge a context by an n-gram explanation: read the sentence, find its patterns, combine their chances. No model.

Nothing but the sentence and the context's tokens is used (and their marks, where it is asked about these), as with
every judge; the rule is in :mod:`autointerp.explaining.patterns`. A sentence that an n-gram explainer did not write is
a failure, not a "no": there is nothing in it that this judge can read.
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
        # What was judged before there were marks keeps its hash.
        self.settings_hash = digest({"method": 1, "longest_run": LONGEST_RUN} | ({"marked": True} if marked else {}))

    def of_marks(self) -> NgramJudge:
        """Judges the chance that the latent fires on any of the marked tokens."""
        return NgramJudge(marked=True)

    async def judge(self, explanation_text: str, contexts: Sequence[Context]) -> list[Judgement]:
        """P(active) for each context (on a marked token, where asked about these); active from one half on."""
        patterns = parse_sentence(explanation_text)
        if patterns is None:
            reason = "the explanation is not an n-gram sentence; judge it with an LLM"
            return [Judgement(None, None, reason) for _ in contexts]
        costs = patterns.compute_costs()
        chances = [patterns.compute_probability(c.tokens, costs, c.marks if self._marked else None) for c in contexts]
        return [Judgement(p, p >= 0.5) for p in chances]
