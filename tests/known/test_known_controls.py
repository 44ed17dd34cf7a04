"""Control SAEs of which it is known what they can score, and a judge that knows what it must not."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hand_built import (
    Seed,
    latents,
    make_control,
    make_study,
    of_random_directions,
    of_what_is_not_seen,
    write_corpus,
    write_model,
    write_recipe,
)
from tiny_study import cli

from autointerp.contexts.sampler import Context
from autointerp.scoring.judges.base import Judgement
from autointerp.scoring.judges.ngram import NgramJudge

M = len(latents())


@pytest.fixture(scope="module")
def explained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The known latents and two control SAEs, all explained by n-grams."""
    made = tmp_path_factory.mktemp("controls")
    recipe = write_recipe(made / "known.toml", write_model(made / "model"), write_corpus(made / "corpus.jsonl"))
    (run,) = make_study(made / "runs", made, "known", [Seed("known_a", np.arange(M), np.ones(M))], recipe)
    make_control(run, "frozen", of_what_is_not_seen(40))
    make_control(run, "untrained", of_random_directions(40))
    cli("explain", "--sae", "known_a", "--latents", M, "--root", run.root).well()
    return run.root


def test_meaningful_latents_score_above_both_control_saes(explained: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(explained, tmp_path / "runs"))
    cli("score", "--sae", "known_a", "--root", root).well()
    report = cli("report", "--sae", "known_a", "--root", root, "--json").well().json["scores"]
    frozen, untrained = report["control_saes"]
    assert (frozen["kind"], untrained["kind"]) == ("frozen", "untrained")
    assert frozen["mean"] == pytest.approx(0.5, abs=0.03), "nothing that a context shows says when it fires"
    assert frozen["n_scored"] == 40
    for row in (frozen, untrained):
        assert row["above"]["mean"] == pytest.approx(report["mean"] - row["mean"])
        assert row["above"]["interval"][0] > 0.05
    assert frozen["above"]["interval"][0] > 0.2
    assert report["control"]["leaks"] is False
    told = " ".join(cli("report", "--full", "--sae", "known_a", "--root", root).well().out.split())
    assert "score higher than those of an SAE whose random decoder was never trained" in told
    assert "score higher than those of an SAE that was not trained at all" in told
    assert "finds some answers without the explanation" not in told


def test_a_cheating_judge_is_found_out(explained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def peeks(self: NgramJudge, _: str, contexts: Sequence[Context]) -> list[Judgement]:  # noqa: ARG001
        return [Judgement(None, context.active) for context in contexts]

    monkeypatch.setattr(NgramJudge, "judge", peeks)
    root = Path(shutil.copytree(explained, tmp_path / "runs"))
    cli("score", "--sae", "known_a", "--root", root).well()
    report = cli("report", "--sae", "known_a", "--root", root, "--json").well().json["scores"]
    assert (report["mean"], report["control"]["mean"]) == (1, 1)
    assert report["control"]["leaks"] is True
    told = " ".join(cli("report", "--full", "--sae", "known_a", "--root", root).well().out.split())
    assert "judge finds some answers without the explanation" in told
    assert "score no higher than those of an SAE that was not trained at all" in told
