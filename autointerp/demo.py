"""The study of `make demo`: every stage on the bundled subject model, offline, from the recipe beside the runs.

It is the same code that users run on their own model; this module only says with what.
"""

from __future__ import annotations

from pathlib import Path

from autointerp.explain import explain_runs
from autointerp.llm.options import LlmOptions
from autointerp.method import BASELINE
from autointerp.score import score_runs
from autointerp.selection import Choice
from sae.align_stage import align_runs
from sae.harvest_stage import harvest_runs
from sae.package_data import RECIPES
from sae.run import MAIN_SCORER, Run
from sae.settings import settings_from
from sae.stage import Compute
from sae.train_stage import train_study

RECIPE = RECIPES / "demo.toml"
STUDY = "demo"
SEEDS = (0, 1, 2)
N_LATENTS = 400


def run_demo(root: Path, compute: Compute) -> tuple[list[Run], int]:
    """Do what is missing of the demo study. Returns its runs and how many latents failed."""
    runs = train_study(STUDY, SEEDS, settings_from(RECIPE), root, compute)
    harvest_runs(runs, compute)
    align_runs(runs, compute)
    baseline = LlmOptions()  # no endpoint: explainer and judge are the n-gram baseline, whatever the environment holds
    explained = explain_runs(runs[:1], Choice(n=N_LATENTS), BASELINE, baseline, compute)
    scored = score_runs(runs[:1], root, (MAIN_SCORER,), BASELINE, baseline)
    return runs, explained.n_failed + scored.n_failed
