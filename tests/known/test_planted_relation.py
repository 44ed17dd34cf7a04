"""A planted relation of interpretability and similarity, through the whole program, scored by few verdicts.

What is true is known in two ways: how the latents were made decides their similarity, and the same explanations judged
on some forty times as many contexts give their scores as they would be without noise.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hand_built import Latent, Seed, latents, make_study, write_corpus, write_model, write_recipe
from scipy import stats
from tiny_study import cli

from autointerp.contexts.sampler import ContextSampler
from autointerp.journal.journal import Journal
from autointerp.scoring.judges.ngram import NgramJudge
from sae.common.files import read_table
from sae.study.run import Run

KNOWN = latents()
M = len(KNOWN)
FEW, MANY = 10, 400  # contexts of either kind


def how_clear(latent: Latent) -> float:
    """About what the rule by which the latent was made would score."""
    if latent.kind == "noise":
        return 0.5
    if latent.kind == "bigram":
        return 0.94
    return 0.5 + 0.5 / (1 + 0.75 * len(latent.back))


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seeds; the clearer a latent, the nearer is its partner, apart from chance. Explained and scored."""
    made = tmp_path_factory.mktemp("planted")
    rng = np.random.default_rng(1)
    clear = stats.rankdata([how_clear(latent) for latent in KNOWN]) / M
    cosine = 0.45 + 0.5 * np.clip(0.75 * clear + 0.25 * rng.random(M), 0, 1)
    recipe = write_recipe(made / "r.toml", write_model(made / "model"), write_corpus(made / "corpus.jsonl"), FEW)
    seeds = [Seed("planted_a", np.arange(M), np.ones(M)), Seed("planted_b", rng.permutation(M), np.ones(M))]
    seeds[1] = Seed("planted_b", seeds[1].origin, cosine[seeds[1].origin])
    make_study(made / "runs", made, "planted", seeds, recipe)
    cli("explain", "--sae", "planted_a", "--latents", M, "--root", made / "runs").well()
    cli("score", "--sae", "planted_a", "--control-latents", 0, "--root", made / "runs").well()
    return made / "runs"


def scores_on(run: Run, n: int, seed: int) -> np.ndarray:
    """[M] the scores of the run's explanations on another draw of ``n`` contexts of either kind."""
    values = {"n_active": n, "n_inactive": n, "sample_seed": seed}
    settings = run.settings.with_values(contexts=values).contexts
    store = run.store()
    sampler = ContextSampler(store, store.corpus.decode, settings)
    with Journal(run.journal_path) as journal:
        texts = journal.explanations().set_index("latent")["text"]
    found = []
    for latent in range(M):
        test_set = sampler.testing(latent)
        said = [asyncio.run(NgramJudge().judge(texts[latent], of)) for of in (test_set.active, test_set.inactive)]
        yes, no = (np.mean([judgement.label for judgement in judged]) for judged in said)
        found.append((yes + 1 - no) / 2)
    return np.array(found)


def test_a_planted_relation_is_recovered_from_few_verdicts(planted: Path) -> None:
    found: dict[str, Any] = cli("report", "--sae", "planted_a", "--json", "--root", planted).well().json
    relation, run = found["relation"], Run.open("planted_a", planted)
    assert relation["n"] == M
    similarity = read_table(run.stage_path("overlap")).sort_values("latent")["similarity"].to_numpy()
    true = float(stats.spearmanr(scores_on(run, MANY, seed=5), similarity).statistic)
    assert true > 0.7
    low, high = relation["corrected"]["interval"]
    assert low <= true <= high
    assert relation["spearman"] < relation["corrected"]["value"]
    assert abs(relation["corrected"]["value"] - true) < abs(relation["spearman"] - true)
    # The reliability is that of another draw of contexts, which was never asked for; of one draw it is off by chance.
    own = read_table(run.stage_path("scores")).set_index("latent")["balanced_accuracy"].reindex(range(M))
    retest = float(np.mean([stats.spearmanr(own, scores_on(run, FEW, seed=seed)).statistic for seed in range(6, 11)]))
    low, high = found["scores"]["reliability"]["interval"]
    assert low <= retest <= high
    assert 0.5 < found["scores"]["reliability"]["value"] < 0.97
