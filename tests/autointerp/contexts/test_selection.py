"""Which latents are explained: properties over made-up overlap tables."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import small_study
from hypothesis import given
from hypothesis import strategies as st

from autointerp.contexts.selection import Choice, Sharing, check_choice, choose_latents, find_partners, find_unshared
from sae.alignment.alignment import read_alignment
from sae.alignment.overlap import DEFINITIONS, build_latent_table
from sae.common.errors import BadInput, NotFound
from sae.study.run import Run

M = 120
Made = tuple[Run, pd.DataFrame, list[int]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A run with two siblings, its overlap table, and the latents with enough contexts."""
    root = tmp_path_factory.mktemp("runs")
    runs = small_study.runs_of(root, m=M)
    small_study.harvested(runs)
    small_study.aligned(runs)
    run, *siblings = runs
    tables = {(run.name, x.name): read_alignment(root / "alignments", run.name, x.name).a for x in siblings}
    table = build_latent_table(run.name, [r.name for r in runs], tables, np.arange(M) < M - 6)
    return run, table, list(range(0, M - 6, 2))


numbers = st.integers(0, 10_000)
sharings = st.sampled_from(["any", "unshared", "shared"])


@given(st.integers(1, M), st.integers(1, M), numbers, sharings)
def test_asking_for_more_keeps_what_there_is(made: Made, few: int, more: int, seed: int, sharing: Sharing) -> None:
    first = choose_latents(*made, Choice(sharing, min(few, more), seed=seed))
    second = choose_latents(*made, Choice(sharing, max(few, more), seed=seed))
    assert set(first) <= set(second)
    for found in (first, second):
        assert found == sorted(set(found))
        assert set(found) <= set(made[2])
    assert len(second) == min(max(few, more), len(choose_latents(*made, Choice(sharing, None))))


@given(st.sampled_from(sorted(DEFINITIONS)), st.floats(0, 1), st.sets(st.sampled_from(["run_b", "run_c"])))
def test_every_eligible_latent_is_shared_or_not(
    made: Made, definition: str, threshold: float, against: set[str]
) -> None:
    def chosen(sharing: Sharing, names: tuple[str, ...]) -> set[int]:
        return set(choose_latents(*made, Choice(sharing, None, (), names, definition, threshold)))

    names = tuple(sorted(against))
    shared, unshared = chosen("shared", names), chosen("unshared", names)
    assert not shared & unshared
    assert shared | unshared == set(made[2])
    # Fewer runs to be found in: more that are found in none.
    assert chosen("unshared", ("run_b", "run_c")) <= unshared
    assert chosen("unshared", ()) == chosen("unshared", ("run_b", "run_c"))


@given(st.floats(0, 1), st.floats(0, 1), st.sampled_from(["strict", "both", "decoder"]))
def test_a_higher_bar_leaves_more_unshared(made: Made, a: float, b: float, definition: str) -> None:
    low, high = (
        find_unshared(made[0], made[1], Choice("unshared", definition=definition, threshold=t)) for t in sorted((a, b))
    )
    assert low <= high


def test_what_was_made_to_be_shared_is(made: Made) -> None:
    """The first 40 % are the same directions in every run, the others each run's own."""
    unshared = find_unshared(made[0], made[1], Choice("unshared"))
    assert len(unshared & set(range(int(0.4 * M)))) <= 3
    assert len(unshared & set(range(int(0.4 * M), M))) == M - int(0.4 * M)


@given(st.lists(st.integers(0, M - 1), min_size=1, max_size=9))
def test_latents_named_outright_are_taken(made: Made, indices: list[int]) -> None:
    """Eligible or not, and however many: they are what was asked for."""
    assert choose_latents(*made, Choice(n=1, indices=tuple(indices))) == sorted(set(indices))


@pytest.mark.parametrize("sharing", ["shared", "unshared"])
def test_latents_are_named_or_chosen(made: Made, sharing: Sharing) -> None:
    with pytest.raises(BadInput, match=f"--indices .* --{sharing}-only"):
        choose_latents(*made, Choice(sharing, indices=(1,)))


def test_the_sample_is_spread_over_the_latents(made: Made) -> None:
    chosen = {seed: tuple(choose_latents(*made, Choice(n=10, seed=seed))) for seed in range(20)}
    assert len(set(chosen.values())) == 20
    assert np.mean([x for found in chosen.values() for x in found]) == pytest.approx(np.mean(made[2]), abs=12)


@given(st.lists(st.integers(0, M - 1), unique=True, max_size=20))
def test_partners_are_the_decoder_matches(made: Made, latents: list[int]) -> None:
    found = find_partners(made[1], "run_b", latents)
    matched = made[1].set_index("latent")["decoder_partner__run_b"]
    assert found == sorted({int(matched[x]) for x in latents if matched[x] >= 0})
    assert len(found) <= len(latents)


@pytest.mark.parametrize("index", [-1, M, 10**9])
def test_a_latent_that_does_not_exist(made: Made, index: int) -> None:
    with pytest.raises(NotFound, match=f"latent {index} does not exist in run 'run_a'; it has latents 0 to {M - 1}"):
        choose_latents(*made, Choice(indices=(0, index)))


@pytest.mark.parametrize("name", ["run_a", "run_q", "b"])
def test_only_other_runs_of_the_study_count(made: Made, name: str) -> None:
    with pytest.raises(BadInput, match=f"--against '{name}' is not another run of study 'run'; did you mean 'run_"):
        check_choice(made[0], Choice("unshared", against=("run_b", name)))


def test_a_run_without_siblings(tmp_path: Path) -> None:
    (run,) = small_study.runs_of(tmp_path, 1)
    check_choice(run, Choice())
    with pytest.raises(BadInput, match="the study has no other run"):
        check_choice(run, Choice(against=("run_b",)))
    wanting = [Choice("unshared"), Choice("shared"), Choice(with_partners=True)]
    assert all(choice.needs_alignment for choice in wanting)
    for choice in wanting:
        with pytest.raises(BadInput, match="'run_a' is its study's only run"):
            check_choice(run, choice)
