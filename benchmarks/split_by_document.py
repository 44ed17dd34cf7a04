"""Measure what scores gain from documents whose other windows the explainer saw, by splitting texts in two ways.

    python benchmarks/split_by_document.py [--sae demo_a] [--latents 400] [--splits 4] [--json] [--out x.json]

Latents are explained and judged anew by the n-gram baseline, on texts that are split ``by text`` (a window of some tens
of tokens is on one side with its near-duplicates, as in runs from before), or ``by document``, as the program does it.
The same latents take part in both, and each split is drawn several times. A row is a split of both kinds: mean scores,
and their difference with the standard error over latents. Needs a harvested run. Takes minutes.
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from outcome import about, leave, parser_of
from rich.console import Console
from rich.progress import track
from rich.table import Table

from autointerp.contexts.material import Material
from autointerp.contexts.near_duplicates import load_groups
from autointerp.contexts.sampler import ContextSampler
from autointerp.contexts.sides import split_by_document, split_by_text
from autointerp.explaining.explainers.ngram import NgramExplainer
from autointerp.scoring.judges.ngram import NgramJudge
from sae.firings.store import mix_bits
from sae.study.run import Run


def scores(sampler: ContextSampler, latents: list[int]) -> npt.NDArray[np.float64]:
    """[L] balanced accuracies by the n-gram baseline; NaN where there is no explanation or too few contexts."""
    explainer, judge = NgramExplainer(), NgramJudge()

    async def one(latent: int) -> float:
        shown, silent = sampler.explaining(latent), sampler.background(latent, explainer.needs_background)
        explanation, test = await explainer.explain(latent, shown, silent), sampler.testing(latent)
        if explanation.text is None or len(test.active) < sampler.settings.min_active or not test.inactive:
            return float("nan")
        active, inactive = [await judge.judge(explanation.text, kind) for kind in (test.active, test.inactive)]
        return float(np.mean([j.label for j in active]) + 1 - np.mean([j.label for j in inactive])) / 2

    return np.array([asyncio.run(one(latent)) for latent in latents])


def row_of(material: Material, latents: list[int], seed: int) -> dict[str, Any]:
    store, settings = material.store, material.settings
    groups = load_groups(material.run, store, settings.near_duplicate)
    sides = {
        "by text": split_by_text(mix_bits(groups ^ np.uint64(seed))),
        "by document": split_by_document(store, groups, seed).of_window,
    }
    found = {
        name: scores(ContextSampler(store, store.corpus.decode, settings, groups, sides=side), latents)
        for name, side in sides.items()
    }
    gain = found["by text"] - found["by document"]
    gain = gain[~np.isnan(gain)]
    return {
        "split": seed,
        "latents": len(gain),
        **{name: round(float(np.nanmean(values)), 4) for name, values in found.items()},
        "difference": round(float(gain.mean()), 4),
        "standard error": round(float(gain.std(ddof=1) / np.sqrt(len(gain))), 4),
    }


def shown(rows: list[dict[str, Any]]) -> None:
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*map(str, row.values()))
    Console().print(table)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--sae", default="demo_a")
    parser.add_argument("--root", type=Path, default=Path("eval_runs"))
    parser.add_argument("--latents", type=int, default=400, help="of the run, drawn at random from the eligible ones")
    parser.add_argument("--splits", type=int, default=4)
    asked = parser.parse_args()
    begun = time.time()
    material = Material.of(Run.open(asked.sae, asked.root))
    eligible = material.eligibility().query("eligible")["latent"].to_numpy()
    drawn = np.random.default_rng(0).permutation(eligible)[: asked.latents].tolist()
    console = Console(stderr=True)
    rows = [row_of(material, drawn, seed) for seed in track(range(asked.splits), "splitting", console=console)]
    documents = len(material.store.corpus.document_ends)
    leave(asked, rows, about(begun, run=asked.sae, documents=documents), lambda: shown(rows))


if __name__ == "__main__":
    main()
