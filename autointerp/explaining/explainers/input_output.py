"""Explain a latent by where it fires and by the tokens that it promotes and suppresses.

Explanations from both sides of a latent describe it better than those from either side (Gur-Arieh et al. 2025, arXiv
2501.08319).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from autointerp.explaining.explainers.llm import LlmExplainer
from autointerp.explaining.patterns import quote
from sae.study.logits import N_TOKENS

if TYPE_CHECKING:
    from autointerp.contexts.sampler import Context
    from sae.study.logits import Logits, TokenLogit


class InputOutputExplainer(LlmExplainer):
    """Also shows the tokens whose logits the latent raises and lowers most, if its hookpoint has such."""

    name = "input_output"
    prompts: ClassVar[str] = "input_output"
    needs_logits: ClassVar[bool] = True
    settings: ClassVar[Mapping[str, Any]] = {"tokens": N_TOKENS}

    def _list_values(self, background: Sequence[Context], logits: Logits | None) -> dict[str, Any]:  # noqa: ARG002
        if logits is None:
            return {"promoted": [], "suppressed": []}
        return {"promoted": _quote_all(logits.promoted), "suppressed": _quote_all(logits.suppressed)}


def _quote_all(tokens: Sequence[TokenLogit]) -> list[str]:
    return [quote(of.token) for of in tokens]
