"""Explain a latent by contexts in which it fires, and contexts in which similar latents fire and it does not.

As the contrastive explainer of delphi. All come from the explainer's side of the split: no test context is among them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from autointerp.explaining.explainers.llm import LlmExplainer

if TYPE_CHECKING:
    from autointerp.contexts.sampler import BackgroundKind, Context
    from sae.study.logits import Logits


class ContrastiveExplainer(LlmExplainer):
    """Also shows contexts in which a latent with a similar decoder, or that fires together with it, fires alone."""

    name = "contrastive"
    prompts: ClassVar[str] = "contrastive"
    needs_background = 5
    background_kind: ClassVar[BackgroundKind] = "hard"
    settings: ClassVar[Mapping[str, Any]] = {"silent": needs_background}

    def _list_values(self, background: Sequence[Context], logits: Logits | None) -> dict[str, Any]:  # noqa: ARG002
        return {"silent": [context.text for context in background]}
