"""Run a sweep: one study for every point of a recipe's grid.

Training and harvest each take one pass over the subject model for all points; alignment, explanations and scores
follow point by point. The table ``reports/NAME.sweep.json`` (flat rows in ``.parquet``) is rewritten if its inputs
have changed.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import Field

from autointerp.contexts.selection import Choice
from autointerp.explaining.explain import explain_runs
from autointerp.explaining.explainers import EXPLAINERS
from autointerp.findings.paper.sweeps import axes_of, finding_of_sweep
from autointerp.findings.sweep_points import summarise
from autointerp.findings.sweep_table import read_summary, summary_inputs, write_summary
from autointerp.llm.opening import resolve_name
from autointerp.llm.options import LlmOptions
from autointerp.scoring.judges import JUDGES
from autointerp.scoring.score import list_judges, score_runs
from sae.common.errors import UserError
from sae.common.progress import say
from sae.settings import Count, Table, check_table
from sae.study.align import align_runs
from sae.study.harvest import harvest_runs
from sae.study.recipes import Sweep
from sae.study.run import MAIN_SCORER, Run
from sae.study.stage import Compute
from sae.study.train import train_studies


class Explaining(Table):
    """The recipe's table ``[explain]``: the latents to explain and score at every point."""

    latents: Count = Field(200, ge=1, description="latents of each point's first run")
    with_partners: bool = Field(True, description="also their partners in the other seeds")


ScorePoint = Callable[[list[Run], Path, Compute], int]
"""Explains and scores the runs of a point; returns the number of failed latents."""


def explaining_of(sweep: Sweep) -> Explaining | None:
    """Return the recipe's checked ``[explain]``, or ``None``."""
    if sweep.explain is None:
        return None
    return check_table(Explaining, dict(sweep.explain), f"sweep {sweep.name!r}", "explain.")


def scoring_of(
    sweep: Sweep, wanted: bool | None, explainer: str, options: LlmOptions, judge: str | None = None
) -> ScorePoint | None:
    """Return how points are scored, or ``None``; ``wanted`` overrides the recipe.

    The default judge is the one with the explainer's name, else ``auto``.
    """
    recipe = explaining_of(sweep)
    if wanted is False or (wanted is None and recipe is None):
        return None
    asked, judge = recipe or Explaining(), judge or (explainer if explainer in JUDGES else "auto")
    resolve_name(EXPLAINERS, explainer, options)  # check both before training
    list_judges(judge, options)

    def score_point(runs: list[Run], root: Path, compute: Compute) -> int:
        choice = Choice(n=asked.latents, with_partners=asked.with_partners and len(runs) > 1)
        explained = explain_runs(runs[:1], choice, explainer, options, compute)
        of_point = [Run.open(name, root) for name in explained.runs]
        scored = score_runs(of_point, root, (MAIN_SCORER,), judge, options)
        return explained.n_failed + scored.n_failed

    return score_point


def run_sweep(
    sweep: Sweep, root: Path, compute: Compute, score_point: ScorePoint | None = None, nulls: bool = True
) -> tuple[dict[str, Any], int]:
    """Run the unfinished parts of ``sweep``. Return the summary and the number of failed latents."""
    say(f"sweep {sweep.name}: {sweep.describe()}")
    of_points = train_studies(sweep.studies, root, compute)
    harvest_runs([run for runs in of_points for run in runs], compute)
    failed = 0
    for number, (point, runs) in enumerate(zip(sweep.points, of_points, strict=True), start=1):
        say(f"point {number} of {len(sweep.points)}: {point.study.name}")
        if len(runs) > 1:
            align_runs(runs, compute, nulls)
        if score_point is not None:
            failed += score_point(runs, root, compute)
    inputs = summary_inputs(sweep, of_points)
    summary = read_summary(root, sweep.name)
    if summary is None or summary["inputs"] != inputs:
        summary = summarise(sweep, of_points, inputs)
        write_summary(root, summary)
    return summary, failed


def sweep_findings(table: dict[str, Any]) -> dict[str, Any]:
    """Return the sweep's table and the findings that its axes allow."""
    return {**table, "findings": [finding_of_sweep(name, table) for name in axes_of(table)]}


def forecast(sweep: Sweep, root: Path, compute: Compute) -> dict[str, Any]:
    """Return the planned training as JSON values. Times come from a probe of a few steps, or are ``None``."""
    from sae.study.probe import probe  # imports torch

    found, reason = None, None
    try:
        found = probe(sweep.studies, root, compute)
    except UserError as error:
        reason = str(error)
    return {
        "sweep": sweep.name,
        "axes": {name: list(values) for name, values in sweep.axes.items()},
        "seeds": list(sweep.seeds),
        "n_saes": len(sweep.points) * len(sweep.seeds),
        "stream_tokens": sweep.tokens,
        "trained_tokens": sweep.trained_tokens,
        "points": [
            {
                "name": point.study.name,
                "values": point.at,
                "tokens": point.study.settings.training.tokens,
                "training_seconds": None if found is None else found.studies[point.study.name],
            }
            for point in sweep.points
        ],
        "stream_seconds": None if found is None else found.stream,
        "training_seconds": None if found is None else found.seconds,
        "probe_steps": None if found is None else found.steps,
        "no_estimate": reason,
    }
