"""Commands that ask an explainer or a judge for more, of the kind that was asked before."""

from __future__ import annotations

from typing import Literal

from autointerp.findings.evidence import Study, Told

MODEL = ("--llm-url", "URL")
"""Stands in a command for where the language model is: without it the n-gram baseline would be asked."""


def asking(study: Study, told: Told, stage: Literal["explain", "score"], *words: str) -> str:
    """The command of a stage for the focus run; with a place for the model's address where one was asked before.

    To explain, that is the explainer of ``told``; to score, the judge of the study's set-up or, where nothing is scored
    yet, the explainer again.
    """
    explained_by = str(told.table["model"].iloc[-1] or "") if len(told.table) else ""
    judged_by = explained_by if study.setup is None else str(study.setup.get("model") or "")
    asks_model = explained_by if stage == "explain" else judged_by
    return study.command(stage, "--sae", study.focus.name, *words, *(MODEL if asks_model else ()))
