"""``compare`` as a user meets it: two names, an alignment where there is none, one object, one line for an error."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from tiny_study import NUM_LATENTS, cli


def test_two_runs_are_compared_and_explained_pairs_shown(root: Path) -> None:
    both = ("--sae", "run_a", "--sae", "run_b", "--root", root)
    before = cli("compare", *both, "--json").well().json
    assert before["command"] == "compare"
    assert len(before["pairs"]) == NUM_LATENTS
    assert before["lacking"]["n_explained_one"] > 0
    for command in before["lacking"]["explain"]:
        assert "--with-partners" in command
    cli("explain", "--sae", "run_a", "--with-partners", "--latents", 30, "--root", root).well()
    cli("score", "--root", root).well()
    found = cli("compare", *both, "--definition", "lenient", "--json").well().json
    assert found["lacking"]["n_explained_both"] >= 10
    assert found["agreement"]["together"]["n"] >= 10
    assert len(found["shown"]["latents"]) == 8
    shown = cli("compare", *both, "--definition", "lenient", "--sort", "score", "--latents", 3).well().out
    assert "3 of the" in shown
    assert max(map(len, shown.splitlines())) <= 80
    by_latent = {pair["latent"]: pair for pair in found["pairs"]}
    scored = [p for p in found["pairs"] if p["score_gap"] is not None]
    best = max(scored, key=lambda p: (sum(side["score"]["value"] for side in p["sides"]), -p["latent"]))
    assert f"{best['latent']} ↔ {by_latent[best['latent']]['partner']}" in shown
    for kind, is_shared in (("--shared-only", True), ("--unshared-only", False)):
        only = cli("compare", *both, "--definition", "lenient", kind, "--json").well().json
        assert {by_latent[latent]["is_shared"] for latent in only["shown"]["latents"]} <= {is_shared}


def test_unaligned_runs_are_aligned_first(root: Path) -> None:
    expected = cli("compare", "--sae", "run_a", "--sae", "run_b", "--root", root, "--json").well().json
    shutil.rmtree(root / "alignments")
    ran = cli("compare", "--sae", "run_a", "--sae", "run_b", "--root", root, "--json").well()
    assert "run_a and run_b are not aligned yet, doing that first" in ran.err
    assert ran.json["pairs"] == expected["pairs"]
    again = cli("compare", "--sae", "run_a", "--sae", "run_b", "--root", root, "--json").well()
    assert "not aligned" not in again.err
    assert cli("compare", "run_a", "run_b", "--root", root, "--json").well().json == again.json
    assert cli("compare", "run_a", "--sae", "run_b", "--root", root, "--json").well().json == again.json


BAD = {
    "no run": ("", "not 0 runs"),
    "one run": ("--sae run_a", "not 1 run"),
    "the same twice": ("--sae run_a --sae run_a", "'run_a' twice"),
    "three": ("--sae run_a --sae run_b --sae run_a", "not 3 runs"),
    "unknown": ("--sae run_a --sae run_x", "'run_x'"),
    "no explanations by it": ("--sae run_a --sae run_b --explainer nobody", "--explainer 'nobody'"),
    "both kinds": ("--sae run_a --sae run_b --shared-only --unshared-only", "exclude each other"),
}


@pytest.mark.parametrize(("words", "said"), BAD.values(), ids=BAD)
@pytest.mark.parametrize("as_json", [False, True], ids=["tables", "json"])
def test_bad_input_is_one_line(untouched: Path, words: str, said: str, as_json: bool) -> None:
    ran = cli("compare", *words.split(), "--root", untouched, *["--json"] * as_json)
    ran.failed_in_one_line(said)
