"""Run the demo: every stage on the bundled subject model, offline, with an estimate of the time it takes."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from sae.common.overview import Cost, Overview, Speed, Stage, measure_speed
from sae.common.package_data import RECIPES
from sae.settings import Settings
from sae.study.recipes import settings_from

if TYPE_CHECKING:
    from autointerp.findings.shape import StudyFindings
    from sae.study.probe import TokenSeconds

RECIPE = RECIPES / "demo.toml"
STUDY = "demo"
SEEDS = (0, 1, 2)
N_LATENTS = 300

TEXT, TRAIN, HARVEST, ALIGN, EXPLAIN, SCORE, REPORT = STAGES = (
    "read and tokenise the text",
    f"train {len(SEEDS)} SAEs",
    "record which latents fire",
    "compare the SAEs",
    f"explain {N_LATENTS} latents",
    "score the explanations",
    "prepare the report",
)
_BARS = {TRAIN: "train", HARVEST: "harvest", ALIGN: "compare firings", EXPLAIN: "explain", SCORE: f"score {STUDY}"}
"""Start of the label of each stage's progress bar."""

# Costs on the reference machine (two threads, AVX2), replaced by measurements as the demo runs.
# `python benchmarks/demo_stages.py` measures these constants and prints them in this form.
REFERENCE_SPEED = Speed(python=0.0199, matmul=0.0218)
CORPUS_TOKENS = 2_960_000
FORWARD_SECONDS = 2.97e-05
"""Seconds per token for the subject model."""
STEP_SECONDS = 8.6e-09
"""Seconds of training per token, seed and latent (M + TOKEN_LATENTS)."""
TOKEN_LATENTS = 500
"""Cost of a token that does not depend on M, in latents. Measured with M = 512 and 2048."""
REFERENCE = {
    TEXT: Cost(start=10),
    TRAIN: Cost(start=1, work=1),
    HARVEST: Cost(start=0.1, work=0.24, end=0.011),
    ALIGN: Cost(start=8, work=1.8e-3, end=4e-5),
    EXPLAIN: Cost(start=1.6, work=0.022),
    SCORE: Cost(start=1.2, work=0.028, end=4e-3),
    REPORT: Cost(start=2.3),
}
"""Seconds before the bar of each stage moves, and per unit of :func:`units` while it moves and afterwards.

Training and harvest count in training steps; their forward pass is added."""


def run_demo(root: Path, threads: int | None = None, overview: Overview | None = None) -> tuple[StudyFindings, int]:
    """Run the unfinished stages of the demo. Return the findings and the number of failed latents."""
    settings = settings_from(RECIPE)
    done = stages_done(root)
    speed = measure_speed()
    overview = overview or Overview(stages(settings, speed), done)
    only_report = done >= {*STAGES} - {REPORT}
    with nullcontext() if only_report else overview.shown():
        return _run(root, threads, settings, overview, speed)


def _run(
    root: Path, threads: int | None, settings: Settings, overview: Overview, speed: Speed
) -> tuple[StudyFindings, int]:
    overview.begin(TEXT)
    # These imports take seconds; the overview is already shown.
    from autointerp.contexts.selection import Choice
    from autointerp.explaining.explain import explain_runs
    from autointerp.findings.study import findings_of
    from autointerp.journal.method import BASELINE
    from autointerp.llm.options import LlmOptions
    from autointerp.scoring.score import score_runs
    from sae.common.progress import waiting
    from sae.study.align import align_runs
    from sae.study.harvest import harvest_runs
    from sae.study.logits import ensure_logits
    from sae.study.probe import time_tokens
    from sae.study.run import MAIN_SCORER, Study
    from sae.study.stage import Compute
    from sae.study.train import train_studies

    compute = Compute("cpu", threads)
    if overview.stages[STAGES.index(TRAIN)].state != "done":
        overview.expect(costs(settings, speed, time_tokens(settings, compute)))
    (runs,) = train_studies([Study(STUDY, settings, SEEDS)], root, compute)
    overview.begin(HARVEST)
    harvest_runs(runs, compute)
    ensure_logits(runs, compute)
    overview.begin(ALIGN)
    align_runs(runs, compute)
    overview.begin(EXPLAIN)
    baseline = LlmOptions()  # no endpoint, even if the environment names a key
    explained = explain_runs(runs[:1], Choice(n=N_LATENTS), BASELINE, baseline, compute)
    overview.begin(SCORE)
    scored = score_runs(runs[:1], root, (MAIN_SCORER,), BASELINE, baseline)
    overview.begin(REPORT)
    with waiting(f"reading the study {STUDY}"):
        found = findings_of(runs[0], runs)
    return found, explained.n_failed + scored.n_failed


# --- how long it takes ------------------------------------------------------------------------------------------


def stages(settings: Settings, speed: Speed) -> list[Stage]:
    """Return the stages with their expected costs on a machine of this ``speed``."""
    return [Stage(name, _BARS.get(name), cost) for name, cost in costs(settings, speed).items()]


def stages_done(root: Path) -> set[str]:
    """Return the stages whose files show that they are finished."""
    if not any(root.glob(f"{STUDY}_*")):
        return set()  # avoids slow imports
    from sae.study.run import progress_of, study_runs

    runs = [progress_of(run) for run in study_runs(STUDY, root)]
    if len(runs) < len(SEEDS):
        return set()
    keys = {TEXT: "trained", TRAIN: "trained", HARVEST: "harvested", ALIGN: "aligned"}
    done = {name for name, key in keys.items() if all(run[key] for run in runs)}
    return done | ({EXPLAIN, SCORE} if runs[0]["scored"] else set())


def units(settings: Settings) -> dict[str, float]:
    """Return the amount of work in each stage, to which its cost is proportional."""
    n_latents, corpus = settings.training.num_latents, settings.corpus.max_tokens or CORPUS_TOKENS
    explained = min(N_LATENTS, n_latents)
    return {
        TEXT: 1,
        TRAIN: settings.training.tokens * len(SEEDS),
        HARVEST: min(settings.harvest.tokens, corpus) * len(SEEDS),
        ALIGN: n_latents * len(SEEDS) * (len(SEEDS) - 1) / 2,
        EXPLAIN: explained,
        SCORE: explained,
        REPORT: 1,
    }


def forward_tokens(settings: Settings) -> dict[str, float]:
    """Return the tokens of the forward passes; the harvest only reads those that training did not cache."""
    corpus = settings.corpus.max_tokens or CORPUS_TOKENS
    trained, harvested = (min(of.tokens, corpus) for of in (settings.training, settings.harvest))
    return {TRAIN: trained, HARVEST: max(0, harvested - trained)}


def costs(settings: Settings, speed: Speed, measured: TokenSeconds | None = None) -> dict[str, Cost]:
    """Return the seconds of each stage on a machine of this ``speed``; ``measured`` is the time per token."""
    python = speed.python / REFERENCE_SPEED.python
    if measured is None:
        mixed = (python + speed.matmul / REFERENCE_SPEED.matmul) / 2
        step = STEP_SECONDS * (settings.training.num_latents + TOKEN_LATENTS) * mixed
        forward = FORWARD_SECONDS * mixed
    else:
        forward, step = measured
    found = {}
    for name, of in units(settings).items():
        start, work, end = REFERENCE[name]
        seconds = step if name in (TRAIN, HARVEST) else python
        read = forward * forward_tokens(settings).get(name, 0)
        found[name] = Cost(start * python, work * of * seconds + read, end * of * seconds)
    return found
