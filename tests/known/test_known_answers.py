"""The whole program on dictionaries made by hand: what is known beforehand must come out, by every explainer and judge.

Everything runs through the commands. What stands in for training is the import of checkpoints that were written here.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import rule_model
from fake_server import FakeServer
from hand_built import (
    BACK,
    BEFORE,
    CONTEXT,
    FAR,
    POSITION,
    TOKEN,
    Seed,
    V,
    latents,
    make_study,
    place,
    rule_score,
    write_corpus,
    write_model,
    write_recipe,
)
from tiny_study import cli

from autointerp.journal.journal import Journal
from autointerp.scoring.intervals import balanced_accuracy
from sae.alignment.alignment import read_alignment
from sae.alignment.overlap import find_shared
from sae.common.estimate import proportion
from sae.common.files import read_table
from sae.study.run import Run

KNOWN = latents()
M = len(KNOWN)
RNG = np.random.default_rng(0)
SHUFFLED = Seed("known_b", RNG.permutation(M), np.full(M, 0.95))
REPLACED = Seed("known_c", np.where(np.arange(M) % 3 == 0, -1, RNG.permutation(M)), np.full(M, 0.95))


def of_kind(*kinds: str) -> list[int]:
    return [i for i, latent in enumerate(KNOWN) if latent.kind in kinds]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "hand-built")


@pytest.fixture(scope="module")
def harvested(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    """Three seeds, harvested and aligned: the known latents, the same in another order, a third of them replaced."""
    made = tmp_path_factory.mktemp("known")
    recipe = write_recipe(made / "known.toml", model, write_corpus(made / "corpus.jsonl"))
    make_study(made / "runs", made, "known", [Seed("known_a", np.arange(M), np.ones(M)), SHUFFLED, REPLACED], recipe)
    return made / "runs"


@pytest.fixture(scope="module")
def by_ngrams(harvested: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All latents of the first seed, explained and scored by the n-gram baseline."""
    root = Path(shutil.copytree(harvested, tmp_path_factory.mktemp("ngrams") / "runs"))
    cli("explain", "--sae", "known_a", "--latents", M, "--root", root).well()
    cli("score", "--sae", "known_a", "--root", root).well()
    return root


def scores_of(root: Path, judge: str, control: str = "none") -> pd.DataFrame:
    """The first seed's scores by latent; all of them must be there."""
    table = read_table(Run.open("known_a", root).stage_path("scores"))
    table = table[(table["control"] == control) & (table["judge"] == judge)].set_index("latent")
    assert (table["status"] == "ok").all()
    return table


def pooled_interval(root: Path, judge: str, among: Sequence[int]) -> tuple[float, float]:
    """The 95 % interval of the balanced accuracy of all verdicts on ``among`` together."""
    with Journal(Run.open("known_a", root).journal_path) as journal:
        verdicts = journal.verdicts(judge=judge, control="none", latent=list(among))
    found = balanced_accuracy(verdicts["truth"], verdicts["label"])
    return found.low, found.high


def check_known(root: Path, judge: str, among: Sequence[int]) -> None:
    """Each kind scores what the rule that made it scores; what nothing explains scores one half."""
    own, run = scores_of(root, judge), Run.open("known_a", root)
    assert set(own.index) >= set(among)
    values = own["balanced_accuracy"]
    chosen = {kind: [i for i in of_kind(kind) if i in among] for kind in ("token", "digit", "bigram", "noise")}
    assert all(chosen.values())
    assert values[chosen["token"]].min() >= 0.98
    assert values[chosen["digit"]].min() >= 0.98
    # Of one firing in eight the first word stands outside the context: nobody can score more than .95 on average.
    assert values[chosen["bigram"]].mean() >= 0.9
    # Intervals of 95 %: over eight sample seeds they hold 190 of 200 rules' scores, with this one all but one.
    ruled = chosen["token"] + chosen["digit"] + chosen["bigram"]
    held = [own["ba_low"][i] <= rule_score(run, i, KNOWN[i]) <= own["ba_high"][i] for i in ruled]
    assert sum(held) >= len(held) - 1
    low, high = pooled_interval(root, judge, chosen["noise"])
    assert low <= 0.5 <= high
    assert abs(values[chosen["noise"]].mean() - 0.5) < 0.04
    assert values[chosen["bigram"]].min() > values[chosen["noise"]].max()


# --- what was made by hand is what it is said to be ------------------------------------------------------------------


def test_the_stream_holds_token_and_position(harvested: Path, model: Path) -> None:
    from sae.activations.subject import Subject

    corpus = Run.open("known_a", harvested).corpus()
    tokens = corpus.rows(np.arange(20)).astype(np.int64)
    stream = Subject.load(str(model), dtype="float32").activations(tokens, ["h.0"])["h.0"].numpy()
    one_hot, places = np.eye(V), np.arange(CONTEXT)
    assert np.allclose(stream[:, :, TOKEN : TOKEN + V], one_hot[tokens], atol=1e-4)
    assert np.allclose(stream[:, :, POSITION : POSITION + CONTEXT], np.eye(CONTEXT)[None], atol=1e-4)
    before = tokens[:, np.maximum(places - 1, 0)]
    assert np.allclose(stream[:, :, BEFORE : BEFORE + V], one_hot[before], atol=1e-4)
    back = np.where(places >= FAR, tokens[:, np.maximum(places - FAR, 0)], place("begin"))
    assert np.allclose(stream[:, :, BACK : BACK + V], one_hot[back], atol=1e-4)


def test_latents_fire_on_what_they_are_said_to(harvested: Path) -> None:
    run = Run.open("known_a", harvested)
    store = run.store()
    windows = np.arange(store.n_windows)
    tokens = store.tokens(windows).reshape(-1, CONTEXT)
    for i, latent in enumerate(KNOWN):
        fires = np.isin(tokens, [place(word) for word in latent.seen])
        if latent.after is not None:
            fires[:, 1:] &= tokens[:, :-1] == place(latent.after)
        fires[:, FAR:] |= np.isin(tokens[:, :-FAR], [place(word) for word in latent.back])
        fires[:, -1] = False  # the end of the text, at which a harvest records nothing
        assert np.array_equal(store.activations(i, windows).reshape(-1, CONTEXT) > 0, fires)


# --- alignment --------------------------------------------------------------------------------------------------------


def test_the_planted_permutation_is_recovered(harvested: Path) -> None:
    table = read_alignment(harvested / "alignments", "known_a", "known_b").a
    there = np.argsort(SHUFFLED.origin)
    assert np.array_equal(table["encoder_partner"], there)
    assert np.array_equal(table["decoder_partner"], there)
    assert table["encoder_cosine"].to_numpy() == pytest.approx(0.95, abs=1e-3)
    assert table["decoder_cosine"].to_numpy() == pytest.approx(0.95, abs=1e-3)
    assert find_shared(table, "strict").all()


def test_only_unreplaced_parts_are_shared(harvested: Path) -> None:
    table = read_alignment(harvested / "alignments", "known_a", "known_c").a
    where = {int(latent): there for there, latent in enumerate(REPLACED.origin) if latent >= 0}
    kept = np.array([i in where for i in range(M)])
    assert 0.5 < kept.mean() < 0.8
    assert np.array_equal(find_shared(table, "strict"), kept)
    assert [table["decoder_partner"][i] for i in where] == list(where.values())
    found = cli("report", "--sae", "known_a", "--json", "--root", harvested).well().json
    pairs = found["overlap"]["strict"]["pairs"]
    assert pairs["known_a--known_b"] == 1
    assert pairs["known_a--known_c"] == pytest.approx(kept.mean())


# --- scores -----------------------------------------------------------------------------------------------------------


def test_the_ngram_baseline_finds_what_is_known(by_ngrams: Path) -> None:
    check_known(by_ngrams, "ngram", range(M))
    swapped = scores_of(by_ngrams, "ngram", control="swap")["balanced_accuracy"]
    assert abs(swapped.mean() - 0.5) < 0.02


def test_what_words_explain_in_part_scores_in_between(by_ngrams: Path) -> None:
    own, run = scores_of(by_ngrams, "ngram")["balanced_accuracy"], Run.open("known_a", by_ngrams)
    mixed = of_kind("mixed")
    true = np.array([rule_score(run, i, KNOWN[i]) for i in mixed])
    assert own[mixed].mean() == pytest.approx(true.mean(), abs=0.03)
    assert own[mixed].corr(pd.Series(true, mixed)) > 0.6


FEW = [*of_kind("token")[:3], *of_kind("bigram")[:4], *of_kind("digit"), *of_kind("noise")[:4]]


@pytest.mark.parametrize(
    ("protocol", "among"), [("batch", of_kind("token", "bigram", "digit", "noise")), ("single", FEW)]
)
def test_model_that_finds_the_rule_is_scored_right(
    harvested: Path, tmp_path: Path, protocol: str, among: list[int]
) -> None:
    root = Path(shutil.copytree(harvested, tmp_path / "runs"))
    chosen = ",".join(map(str, among))
    with FakeServer(rule_model.follows_rules) as server:
        llm = ("--llm-url", server.url, "--concurrency", 4, "--root", root)
        cli("explain", "--sae", "known_a", "--indices", chosen, *llm).well()
        cli("score", "--sae", "known_a", "--protocol", protocol, "--control-latents", 0, *llm).well()
    with Journal(Run.open("known_a", root).journal_path) as journal:
        said = journal.explanations(explainer="llm").set_index("latent")["text"]
    for i in among:
        latent = KNOWN[i]
        expected = {
            "token": f'The word "{"".join(latent.seen)}".',
            "bigram": f'The word "{"".join(latent.seen)}" right after "{latent.after}".',
            "digit": rule_model.ANY_DIGIT,
            "noise": rule_model.NO_PATTERN,
        }
        assert said[i] == expected[latent.kind]
    check_known(root, "llm", among)


@pytest.mark.parametrize(
    "says",
    [
        pytest.param(lambda _: True, id="always yes"),
        pytest.param(lambda _: False, id="always no"),
        pytest.param(rule_model.coin, id="coin"),
    ],
)
def test_judge_that_does_not_read_scores_one_half(harvested: Path, tmp_path: Path, says: object) -> None:
    root = Path(shutil.copytree(harvested, tmp_path / "runs"))
    among = of_kind("token", "noise", "digit", "bigram") if says is rule_model.coin else FEW
    cli("explain", "--sae", "known_a", "--indices", ",".join(map(str, among)), "--root", root).well()
    with FakeServer(rule_model.judge_that(says)) as server:  # type: ignore[arg-type]
        cli("score", "--sae", "known_a", "--llm-url", server.url, "--control-latents", 0, "--root", root).well()
    own = scores_of(root, "llm")
    covered = (own["ba_low"] <= 0.5) & (own["ba_high"] >= 0.5)
    if says is rule_model.coin:
        # Nineteen intervals in twenty are to cover; how many of these do may itself be off by chance.
        assert proportion(covered.sum(), len(own)).high >= 0.95
        low, high = pooled_interval(root, "llm", among)
        assert low <= 0.5 <= high
    else:
        assert covered.all()
        assert (own["balanced_accuracy"] == 0.5).all()
