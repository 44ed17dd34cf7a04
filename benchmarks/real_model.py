"""Explain and score latents with a real language model: the reference results in ``eval_runs/reference/``.

    python benchmarks/real_model.py --llm-url http://127.0.0.1:8080/v1 --out eval_runs/reference/real-model.json
    python benchmarks/real_model.py --llm-url … --judge-url http://127.0.0.1:8081/v1   # a second judge

Trains the study of ``benchmarks/real_model.toml`` under ``--root``, then runs `explain` and `score` as a user would.
``--latents`` of its first run are explained and scored by the protocol ``single``. ``--both`` of them have the
swapped control, are scored by the protocol ``batch`` and by a second judge as well, and are explained by each of
``--explainers``. The n-gram baseline comes with `score`, on the same contexts. The command resumes if stopped. A
model of 1.5B parameters takes about an hour and a half on two CPU cores.

Written are one row for each explainer, judge and protocol (mean scores of latents with their standard errors, share of
contexts without a verdict), tokens and time of each stage and model, ten explanations from best to worst, and the
finding ``relation`` of the report.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from outcome import about, leave, parser_of
from rich.console import Console
from rich.table import Table

from autointerp import Run
from autointerp.journal.journal import open_journal
from autointerp.scoring.setups import records_of, rows_of, setups_of

HERE = Path(__file__).resolve().parent.parent
RECIPE = HERE / "benchmarks" / "real_model.toml"
NAME, SHOWN = "real", 10
Row = dict[str, Any]


def run_cli(*words: object) -> str:
    """Run a command of the program, show its progress, and return its output."""
    said = [sys.executable, HERE / "cli.py", *words]
    done = subprocess.run([str(word) for word in said], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode not in (0, 3):  # 3: some latents failed, which the rows show
        raise SystemExit(f"`{' '.join(map(str, words))}` failed")
    return done.stdout


def summarise(rows: pd.DataFrame, head: Row) -> Row:
    """Return the means over latents of one set-up, own explanations and swapped ones."""
    own, swapped = (rows[(rows["control"] == kind) & (rows["status"] == "ok")] for kind in ("none", "swap"))
    tried = rows[(rows["control"] == "none") & rows["judge"].notna()]
    judged = float(tried[["n_active", "n_inactive"]].to_numpy().sum())
    n_failed = float(tried["n_failed"].sum())
    keys = ("name", "explainer", "explainer_model", "judge", "model", "scorer")
    return {
        **{key: head[key] for key in keys},
        "latents": len(own),
        "not_explained": int((rows["status"] != "ok").sum()),
        **{name: _mean(own[name]) for name in ("balanced_accuracy", "auroc", "tpr", "tnr")},
        "swapped": _mean(swapped["balanced_accuracy"]),
        "contexts_failed": n_failed / max(1.0, judged + n_failed),
    }


def _mean(values: pd.Series) -> list[float] | None:
    """Return the mean and its standard error."""
    known = values.dropna().to_numpy(float)
    return [float(known.mean()), float(known.std(ddof=1) / np.sqrt(len(known)))] if len(known) > 1 else None


def list_examples(run: Run) -> list[Row]:
    """Return the language model's explanations of ``SHOWN`` latents, evenly spaced from the best score to the worst."""
    scores, texts = run.scores(), run.explanations().set_index("id")["text"]
    (setup, *_) = setups_of(scores, explainer="llm", judge="llm")
    rows = rows_of(scores, setup)
    own = rows[(rows["control"] == "none") & (rows["status"] == "ok")].sort_values("balanced_accuracy", ascending=False)
    chosen = own.iloc[np.unique(np.linspace(0, len(own) - 1, SHOWN).round().astype(int))]
    return [
        {"latent": row["latent"], "balanced_accuracy": row["balanced_accuracy"], "text": texts[row["explanation_id"]]}
        for row in records_of(chosen)
    ]


def list_costs(run: Run) -> list[Row]:
    """Return tokens, requests and the servers' seconds of each stage and model."""
    with open_journal(run) as journal:
        return records_of(journal.usage())


def measure(given: Any) -> dict[str, Any]:
    """Run all stages and return the record."""
    root = ["--root", given.root]
    run_cli("train", "--recipe", RECIPE, "--name", NAME, "--seeds", 0, 1, *root)
    asked = ["--llm-url", given.llm_url, *(["--llm-model", given.llm_model] if given.llm_model else [])]
    asked += ["--concurrency", given.concurrency, *root]
    run, sibling = (Run.open(f"{NAME}_{letter}", given.root) for letter in "ab")
    run_cli("align", run.name, sibling.name, *root)
    setups: list[Row] = []
    names: list[str] = []

    def explain(n: int, explainer: str = "llm") -> None:
        rest = ["--control-sae-latents", 0, "--explainer", explainer]
        run_cli("explain", "--sae", run.name, "--latents", n, *rest, *asked)

    def score(protocol: str, n_controls: int, *rest: object) -> None:
        which = ["--protocol", protocol, "--control-latents", n_controls]
        run_cli("score", "--sae", run.name, *which, *rest, *asked)
        new = [setup for setup in setups_of(run.scores()) if setup not in setups]
        setups.extend(new)
        names.extend([protocol] * len(new))

    explain(given.both)
    score("single", given.both)
    score("batch", 0)
    if given.judge_url:
        score("single", 0, "--judge-url", given.judge_url)
    explain(given.latents)
    score("single", given.both)
    for explainer in given.explainers:
        explain(given.both, explainer)
        score("single", 0)
    scores = run.scores()
    report = json.loads(run_cli("report", "--sae", run.name, "--json", *root))
    return {
        "rows": [summarise(rows_of(scores, s), {"name": n, **s}) for n, s in zip(names, setups, strict=True)],
        "costs": list_costs(run),
        "examples": list_examples(run),
        "relation": report.get("relation"),
    }


def show(record: dict[str, Any]) -> None:
    names = ("protocol", "explainer", "judge", "latents", "balanced accuracy", "swapped", "AUROC", "no verdict")
    table = Table(*names)
    for row in record["rows"]:
        means = [f"{m[0]:.3f} ± {m[1]:.3f}" if (m := row[k]) else "" for k in ("balanced_accuracy", "swapped", "auroc")]
        judge = row["model"] or row["judge"]
        explainer = row["explainer_model"] or row["explainer"]
        table.add_row(row["name"], explainer, judge, str(row["latents"]), *means, f"{row['contexts_failed']:.1%}")
    console = Console(width=140)
    console.print(table)
    for row in record["examples"]:
        console.print(f"{row['balanced_accuracy']:.2f}  {row['text']}", markup=False, highlight=False)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--llm-url", required=True)
    parser.add_argument("--llm-model")
    parser.add_argument("--judge-url", help="a server of a second judge")
    parser.add_argument("--latents", type=int, default=40, help="explained and scored")
    parser.add_argument("--both", type=int, default=10, help="of them scored in every way")
    parser.add_argument(
        "--explainers", nargs="*", default=["contrastive", "input_output"], help="compared with the default"
    )
    parser.add_argument("--concurrency", type=int, default=4)
    parser.add_argument("--root", type=Path, default=Path("build/real-model"))
    given = parser.parse_args()
    begun = time.time()
    record = measure(given)
    rest = {key: record[key] for key in ("costs", "examples", "relation")}
    leave(given, record["rows"], about(begun, **rest), lambda: show(record))


if __name__ == "__main__":
    main()
