"""A study as the stages would have left it on disk, made up: known sharing, known relation, no model.

Some directions are the same in every seed up to a little noise, the others are each seed's own; the shared ones
fire more often; a score rises with similarity. So what the findings must say is known beforehand.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from autointerp.findings import study
from autointerp.findings.json_values import to_json
from autointerp.journal.journal import Journal
from sae.alignment.alignment import Alignment, align, write_alignment
from sae.alignment.nulls import add_null
from sae.common.files import write_json, write_table
from sae.settings import Settings
from sae.study.run import Run, make_suffix, write_record

HARVESTED = 2_000_000
EXPLAINED_BY = {
    "explainer": "ngram",
    "explainer_model": "",
    "explain_settings_hash": "e" * 64,
    "explain_prompt_hash": "",
}
JUDGED_BY = {
    "judge": "ngram",
    "model": "",
    "scorer": "detection",
    "settings_hash": "s" * 64,
    "judge_prompt_hash": "",
}


def findings(*args: Any, **options: Any) -> Any:
    return to_json(study.findings(*args, **options))


NASTY = "[red]markup[/red] \x1b[31mescape\x07 line\nbreak \u202eright-to-left\u200b \ud800 tab\t"


PROVENANCE: dict[str, Any] = {
    "subject": {"source": "bundled", "fingerprint": "f" * 64, "dtype": "float32", "d_in": 32},
    "hookpoint": "gpt_neox.layers.2.mlp",
    "corpus": {"key": "0" * 16, "fingerprint": "c" * 64, "kind": "stdlib", "n_tokens": 3_200_000},
    "batch_order": {"seed": 0, "fingerprint": "b" * 64, "steps": 244},
}


def runs_of(
    root: Path, seeds: int = 3, *, study: str = "run", m: int = 120, d: int = 32, frozen: str = "nothing"
) -> list[Run]:
    """Trained runs: ``run.json``, weights (empty) and a training log."""
    training = {"num_latents": m, "k": 4, "tokens": 1_000_000, "frozen": frozen}
    settings = Settings().with_values(training=training)
    found = []
    for seed in range(seeds):
        run = Run(f"{study}_{make_suffix(seed)}", root)
        write_record(run, seed, study, settings, PROVENANCE | {"subject": {**PROVENANCE["subject"], "d_in": d}})
        run.weights_path.touch()
        write_json(run.folder / "cfg.json", {})
        step = np.arange(1, 201)
        fvu = 0.2 + 0.7 * np.exp(-step / 30) + 0.01 * seed
        log = pd.DataFrame(
            {
                "step": step,
                "tokens": step * 5000,
                "loss": fvu * 1.01,
                "fvu": fvu,
                "auxk": 0.01,
                "l0": 4.0,
                "dead_fraction": 0.05,
                "learning_rate": 1e-3,
            }
        )
        write_table(run.training_log_path, log)
        found.append(run)
    return found


def harvested(runs: list[Run], *, tokens: int = HARVESTED, shared: float = 0.4) -> None:
    """Firing tables: the first ``shared`` latents fire about ten times as often; the last twentieth never."""
    for run in runs:
        m, rng = run.settings.training.num_latents, np.random.default_rng(run.seed)
        mean = np.where(np.arange(m) < shared * m, -2.0, -3.0)
        counts = (10 ** rng.normal(mean, 0.4) * tokens).astype(int)
        counts[-max(1, m // 20) :] = 0
        table = pd.DataFrame(
            {
                "latent": np.arange(m),
                "n_firings": counts,
                "firing_frequency": counts / tokens,
                "n_windows": counts // 2,
                "mean_activation": 1.0,
                "max_activation": 4.0,
                "dead": counts == 0,
            }
        )
        write_table(run.stage_path("firing"), table)
        eligible = pd.DataFrame({"latent": np.arange(m), "eligible": counts > 200, "ineligible_reason": ""})
        write_table(run.stage_path("contexts"), eligible)


def aligned(runs: list[Run], *, shared: float = 0.4, noise: float = 0.35, nulls: bool = False) -> None:
    """Alignments of all pairs. Latent i of the first ``shared`` is the same direction in every run."""
    m, d = runs[0].settings.training.num_latents, runs[0].record["subject"]["d_in"]
    common = np.random.default_rng(99).normal(size=(m, d))
    weights = {}
    for run in runs:
        rng = np.random.default_rng(1000 + (run.seed or 0))
        base = np.where((np.arange(m) < shared * m)[:, None], common, rng.normal(size=(m, d)))
        weights[run.name] = [base + noise * rng.normal(size=(m, d)) for _ in range(2)]
    for i, a in enumerate(runs):
        for b in runs[i + 1 :]:
            one, other = ((weights[run.name][0], weights[run.name][1]) for run in (a, b))
            found = align(*one, *other, names=(a.name, b.name))
            if nulls:
                sides = add_null((found.a, found.b), one, other, (a.name, b.name))
                found = Alignment(*sides, found.certificate)
            write_alignment(a.root / "alignments", a.name, b.name, found, "inputs")


def explained(run: Run, latents: list[int], *, failing: dict[int, str] | None = None) -> dict[int, int]:
    """Explanations in the journal; returns latent → explanation id."""
    failing = failing or {}
    numbers = {}
    with Journal(run.journal_path) as journal:
        for latent in latents:
            text = f'Active where the text contains " token{latent}." (lift 12.1) or "def __" (lift 8.0).'
            numbers[latent] = journal.add_explanation(
                latent=latent,
                explainer="ngram",
                settings_hash="e" * 64,
                prompt_hash="",
                model="",
                contexts=[1, 2],
                text=None if latent in failing else text,
                failure=failing.get(latent),
            )
    return {latent: n for latent, n in numbers.items() if latent not in failing}


def scored(
    run: Run,
    numbers: dict[int, int],
    *,
    values: dict[int, float] | None = None,
    control: bool = True,
    failing: dict[int, str] | None = None,
    more: list[dict[str, Any]] | None = None,
) -> pd.DataFrame:
    """A score table. Scores default to .60 for each seed's own and .75 for shared latents, give or take; control .5."""
    rng = np.random.default_rng(7)
    m = run.settings.training.num_latents
    rows = []
    for latent, number in numbers.items():
        value = float(np.clip((0.75 if latent < 0.4 * m else 0.60) + rng.normal(0, 0.08), 0.3, 1.0))
        value = (values or {}).get(latent, value)
        rows.append(_row(latent, number, "none", value, (failing or {}).get(latent)))
        if control:
            rows.append(_row(latent, number, "swap", float(np.clip(rng.normal(0.5, 0.04), 0, 1)), None))
    table = pd.DataFrame([*rows, *(more or [])])
    write_table(run.stage_path("scores"), table)
    return table


def _row(latent: int, number: int, control: str, value: float, failure: str | None) -> dict[str, Any]:
    failed = failure is not None
    return {
        "latent": latent,
        "explanation_id": number,
        **EXPLAINED_BY,
        **JUDGED_BY,
        "control": control,
        "status": f"failed: {failure}" if failed else "ok",
        "n_active": 50,
        "n_inactive": 50,
        "n_failed": 30 if failed else 0,
        "balanced_accuracy": np.nan if failed else value,
        "ba_low": np.nan if failed else value - 0.08,
        "ba_high": np.nan if failed else min(1.0, value + 0.07),
        "tpr": np.nan if failed else value,
        "tnr": np.nan if failed else value,
        "auroc": np.nan if failed else min(1.0, value + 0.03),
        "auroc_low": np.nan if failed else value - 0.05,
        "auroc_high": np.nan if failed else min(1.0, value + 0.1),
    }


class Piece:
    """A context with just what is needed to show it."""

    def __init__(self, tokens: list[str], activations: list[float]) -> None:
        self.tokens, self.activations = tokens, activations


def contexts(_: str, latent: int) -> list[Piece]:
    """Five made-up contexts of a latent, the strongest first; the second is hostile."""
    tokens = ["    def", " __", "init", "__(", "self", ", other", "):", "\n", "        self"]
    tokens += [".", f"token{latent}", " = other", "\n"]
    found = []
    for i in range(5):
        words = [NASTY, *tokens] if i == 1 else tokens
        activations = [0.0] * len(words)
        activations[-4], activations[-3], activations[-2] = 1.0 / (i + 1), 4.0 / (i + 1), 1.5 / (i + 1)
        found.append(Piece(words, activations))
    return found


def whole(root: Path, *, seeds: int = 3, m: int = 120, n_scored: int = 80, nulls: bool = False) -> list[Run]:
    """Every stage done."""
    runs = runs_of(root, seeds, m=m)
    harvested(runs)
    if seeds > 1:
        aligned(runs, nulls=nulls)
    latents = list(range(0, int(m * 0.9), max(1, int(m * 0.9) // n_scored)))
    scored(runs[0], explained(runs[0], latents))
    return runs
