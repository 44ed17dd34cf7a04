"""The commands as a user meets them: a whole study end to end, by the n-gram baseline and by a language model."""

from __future__ import annotations

import asyncio
import gc
import json
import shutil
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_server import FakeServer
from small_harvest import latents_at
from tiny_study import NUM_LATENTS, K, Ran, change_record, cli, journal, tree

from autointerp.explaining.explainers.ngram import NgramExplainer
from sae.alignment.nulls import FIRING_COLUMNS, draw_offset
from sae.common.files import read_table, table_metadata, write_table
from sae.firings.store import FiringStore
from sae.study.run import Run

# --- a whole study ------------------------------------------------------------------------------------------


def test_every_command_prints_one_object(tiny_done: tuple[Path, dict[str, Ran]]) -> None:
    for name, ran in tiny_done[1].items():
        assert ran.well().json["command"] == name


def test_train_says_what_there_is(tiny_done: tuple[Path, dict[str, Ran]]) -> None:
    runs = tiny_done[1]["train"].json["runs"]
    assert [(run["name"], run["seed"], run["study"]) for run in runs] == [("run_a", 0, "run"), ("run_b", 1, "run")]
    assert all(run["trained"] and not run["harvested"] for run in runs)
    assert {(run["num_latents"], run["k"]) for run in runs} == {(NUM_LATENTS, K)}


def test_the_report_holds_what_was_asked_for(tiny_done: tuple[Path, dict[str, Ran]]) -> None:
    found = tiny_done[1]["report"].json
    for name in ("strict", "both", "decoder", "lenient"):
        overlap = found["overlap"][name]
        assert 0 <= overlap["value"] <= 1
        assert overlap["interval"][0] <= overlap["value"] <= overlap["interval"][1]
        assert overlap["pairs"]
    assert len(found["overlap"]["only_one"]) == len(found["overlap"]["all_of_n"])
    assert {"mean_encoder", "mean_decoder"} <= set(found["similarity"])
    assert {"mean", "quartiles", "n_scored", "n_failed", "control"} <= set(found["scores"])
    assert found["scores"]["n_scored"] == tiny_done[1]["score"].json["n_done"] > 0
    assert {"spearman", "interval"} <= set(found["relation"])
    assert {"definition", "explainer", "judge"} <= set(found["methods"])


def test_unshared_only_means_what_it_says(tiny_done: tuple[Path, dict[str, Ran]]) -> None:
    outcome = tiny_done[1]["explain"].json
    assert outcome["n_done"] == outcome["n_new"] == 6
    overlap = read_table(tiny_done[0] / "run_a" / "latents.overlap.parquet").set_index("latent")
    firing = read_table(tiny_done[0] / "run_a" / "latents.firing.parquet").set_index("latent")
    explained = [row["latent"] for row in journal(tiny_done[0] / "run_a" / "journal.sqlite")["explanation"]]
    assert len(explained) == len(set(explained))
    assert not firing.loc[explained, "dead"].any()
    # Lenient: encoder and decoder pick the same partner.
    partners = overlap.loc[explained, ["encoder_partner__run_b", "decoder_partner__run_b"]]
    assert (partners.iloc[:, 0] != partners.iloc[:, 1]).all()


def test_show_tells_all_of_one_latent(tiny_done: tuple[Path, dict[str, Ran]]) -> None:
    found = tiny_done[1]["show"].json
    assert (found["run"], found["latent"]) == ("run_a", 3)
    assert [match["run"] for match in found["matches"]] == ["run_b"]


def test_runs_says_how_far_each_has_come(tiny_done: tuple[Path, dict[str, Ran]]) -> None:
    first, second = tiny_done[1]["runs"].json["runs"]
    stages = ("trained", "harvested", "aligned", "explained", "scored")
    assert [first[stage] for stage in stages] == [True] * 5
    assert [second[stage] for stage in stages] == [True, True, True, False, False]


@pytest.mark.parametrize("command", ["train", "harvest", "align", "explain", "score", "report", "show", "runs"])
def test_the_same_for_people(command: str, root: Path, recipe: Path) -> None:
    more: dict[str, Sequence[object]] = {
        "train": ("--recipe", recipe, "--no-controls", "--seeds", 0, 1),
        "explain": ("--latents", 2),
        "show": ("--latent", 3),
    }
    ran = cli(command, *more.get(command, ()), "--root", root).well()
    assert "seed" in ran.out or "run_a" in ran.out
    assert not ran.out.startswith("{")


def test_a_second_call_does_nothing(root: Path, recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, rows = tree(root), journal(root / "run_a" / "journal.sqlite", times=True)

    def refuse(*_: object) -> None:
        raise AssertionError("asked again")

    monkeypatch.setattr(NgramExplainer, "explain", refuse)
    monkeypatch.setattr("autointerp.scoring.judges.ngram.NgramJudge.judge", refuse)
    monkeypatch.setattr("sae.activations.subject.Subject.load", refuse)
    monkeypatch.setattr("sae.study.align.align", refuse)
    assert (
        "already trained"
        in cli("train", "--no-controls", "--seeds", 0, 1, "--recipe", recipe, "--root", root).well().err
    )
    cli("harvest", "--root", root).well()
    cli("align", "--root", root).well()
    again = cli("explain", "--unshared-only", "--definition", "lenient", "--latents", 6, "--root", root, "--json")
    assert (again.well().json["n_done"], again.json["n_new"]) == (6, 0)
    judged = cli("score", "--root", root, "--json")
    assert (judged.well().json["n_done"], judged.json["n_new"]) == (6, 0)
    assert tree(root) == before
    assert journal(root / "run_a" / "journal.sqlite", times=True) == rows


def test_alignment_has_its_nulls_and_what_latents_do(root: Path) -> None:
    found = cli("align", "--root", root, "--json").well().json
    assert set(found["overlap"]["nulls"]) == {"rotated"}
    assert found["overlap"]["strict"]["null"].keys() == {"rotated"}
    assert found["similarity"]["pw_mcc"]["value"] > max(found["similarity"]["pw_mcc"]["null"].values())
    assert len(found["overlap"]["sweep"]["threshold"]) == len(found["overlap"]["sweep"]["strict"]) == 51
    assert {"statistic", "value", "interval", "p_value"} <= set(found["similarity"]["bimodality"])
    whole = found["counterparts"]
    assert sum(row["n"] for row in whole["relations"]) == whole["n_unshared"] > 0
    assert found["apart"] is None
    store = Run.open("run_a", root).store()
    assert whole["n_tokens"] == store.n_tokens
    gap = whole["jaccard_gap_per_latent"]
    comparison = {"runs": ["run_a", "run_b"], "n_tokens": store.n_tokens, "jaccard_gap_per_latent": gap}
    assert whole["comparisons"] == [comparison]
    assert 0 <= gap < 1
    null = whole["null"]["shifted"]
    assert sum(row["n"] for row in null["relations"]) == whole["n_unshared"]
    assert null["jaccard"] < whole["jaccard"]
    assert null["same_partner"]["decoder"] < whole["same_partner"]["decoder"]
    table = read_table(root / "run_a" / "latents.overlap.parquet")
    for name in ("jaccard", "p_there", "p_here", "relation", "rebuilt", "rebuilt__rotated", "max_jaccard_neighbor"):
        assert f"{name}__run_b" in table
    assert {f"{name}__shifted__run_b" for name in FIRING_COLUMNS} <= set(table)
    lone = table["relation__run_b"].notna()
    assert not (lone & table["shared_strict__run_b"]).any()
    assert table.loc[lone, "rebuilt__run_b"].between(0, 1).all()
    assert {"stability_strict", "similarity__rotated"} <= set(table)
    assert "encoder_cosine__rotated" in read_table(root / "alignments" / "run_a--run_b.parquet")
    latent = int(lone.to_numpy().argmax())
    shown = cli("show", "--sae", "run_a", "--latent", latent, "--root", root, "--json").well().json
    assert shown["matches"][0]["behaviour"]["relation"] == table["relation__run_b"][latent]
    assert shown["matches"][0]["behaviour"]["rebuilt"] == pytest.approx(table["rebuilt__run_b"][latent])
    told = cli("show", "--sae", "run_a", "--latent", latent, "--root", root).well().out
    assert "rebuilt as" in told
    report = cli("report", "--full", "--root", root).well().out
    assert "What other SAEs have in place of unshared latents" in report
    assert "By chance: the other SAE's firings moved" in " ".join(report.split())


def test_align_answers_under_the_given_definition_and_threshold(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("matched again")

    path = root / "alignments" / "run_a--run_b.parquet"
    old = read_table(path).assign(encoder_cosine__gaussian=0.5)  # as earlier versions wrote
    write_table(path, old, inputs=table_metadata(path)["inputs"])
    monkeypatch.setattr("sae.study.align.align", refuse)
    monkeypatch.setattr("sae.alignment.behaviour.compare_behaviour", refuse)
    before = tree(root)
    options = ("--definition", "decoder", "--threshold", "0.3", "--root", root)
    found, reported = cli("align", *options, "--json").well().json, cli("report", *options, "--json").well().json
    assert (found["overlap"]["definition"], found["overlap"]["threshold"]) == ("decoder", 0.3)
    assert "over" in reported["overlap"]
    assert found["overlap"] == {key: value for key, value in reported["overlap"].items() if key != "over"}
    plain = cli("align", "--root", root, "--json").well().json["overlap"]
    assert found["overlap"]["decoder"]["value"] > plain["decoder"]["value"]
    assert found["overlap"]["only_one"] == found["overlap"]["decoder"]["only_one"] != plain["only_one"]
    page = cli("align", *options).well().out
    assert "both cosines > .3" in " ".join(page.split())
    assert tree(root) == before  # what is on disk is what it was
    cli("align", "--definition", "loose", "--root", root).failed_in_one_line("loose", code=2)
    cli("align", "--threshold", "1.5", "--root", root).failed_in_one_line("--threshold", code=2)


def check_what_latents_do(root: Path) -> None:
    """The overlap table of run_a against every token of both stores."""
    a, b = (Run.open(name, root).store() for name in ("run_a", "run_b"))

    def table_of(store: FiringStore) -> np.ndarray:
        fires = np.zeros((store.n_tokens, store.num_latents), bool)
        for window in range(store.n_windows):
            for offset, latents in enumerate(latents_at(store, window)):
                fires[window * store.window + offset, latents] = True
        return fires

    one, other = table_of(a), table_of(b)
    told = read_table(root / "run_a" / "latents.overlap.parquet")
    offset = draw_offset(("run_a", "run_b"), a.n_tokens, a.window * a.windows_per_sequence)
    for there, suffix in ((other, ""), (np.roll(other, -offset, axis=0), "__shifted")):
        together = one.T.astype(np.int64) @ there
        either = one.sum(axis=0)[:, None] + there.sum(axis=0) - together
        exact = together / np.maximum(either, 1)
        np.testing.assert_allclose(told[f"max_jaccard{suffix}__run_b"], exact.max(axis=1), atol=1e-6)
        partner = told["decoder_partner__run_b"].to_numpy()
        here = np.arange(len(partner))
        known = one.sum(axis=0) > 0
        np.testing.assert_allclose(
            told[f"decoder_partner_p_there{suffix}__run_b"][known],
            (together[here, partner] / np.maximum(one.sum(axis=0), 1))[known],
            atol=1e-6,
        )


def test_what_latents_do_is_what_the_store_says(root: Path) -> None:
    check_what_latents_do(root)


def test_a_grown_harvest_is_compared_again_with_chance(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sae.firings.harvest.SHARD_BLOCKS", 1)
    for name in ("run_a", "run_b"):
        shutil.rmtree(root / name / "firings")
    cli("harvest", "--tokens", "5k", "--root", root).well()
    few = cli("align", "--root", root, "--json").well().json["counterparts"]
    check_what_latents_do(root)
    cli("harvest", "--tokens", "10k", "--root", root).well()
    store = Run.open("run_a", root).store()
    assert store.n_shards > 1
    # By a stage that only needs the tables: it must not leave out the null that was there.
    cli("explain", "--sae", "run_a", "--unshared-only", "--latents", 1, "--root", root).well()
    check_what_latents_do(root)
    found = cli("report", "--root", root, "--json").well().json["counterparts"]
    assert few["n_tokens"] < found["n_tokens"] == store.n_tokens
    assert found["null"].keys() == {"shifted"}
    assert found["rebuilt"]["null"] is not None


def test_a_kill_while_nulls_are_added_loses_none(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(root / "alignments")
    cli("align", "--no-nulls", "--root", root).well()

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt  # after the .json, before the table

    with monkeypatch.context() as patched:
        patched.setattr("sae.alignment.alignment.write_sides", killed)
        cli("align", "--root", root)
    assert set(cli("align", "--root", root, "--json").well().json["overlap"]["nulls"]) == {"rotated"}


def test_a_report_does_without_stores_and_weights(root: Path) -> None:
    shutil.rmtree(root / "run_b" / "firings")
    (root / "run_b" / "sae.safetensors").unlink()
    assert "What other SAEs have in place" in cli("report", "--full", "--sae", "run_a", "--root", root).well().out


def test_widths_that_differ_are_told_before_any_work(root: Path) -> None:
    record = json.loads((root / "run_b" / "run.json").read_text())
    record["subject"]["d_in"] += 1
    change_record(root / "run_b" / "run.json", subject=record["subject"])
    shutil.rmtree(root / "run_a" / "firings")
    ran = cli("align", "run_a", "run_b", "--root", root, "--json")
    ran.failed_in_one_line("same width", "run_a", "run_b")
    assert "harvest" not in ran.err


def test_nulls_can_be_left_out_and_come_later(root: Path) -> None:
    shutil.rmtree(root / "alignments")
    found = cli("align", "--no-nulls", "--root", root, "--json").well().json
    assert found["overlap"]["nulls"] == {}
    assert found["counterparts"]["null"] is None
    assert found["counterparts"]["rebuilt"]["null"] is None
    cli("align", "--no-nulls", "--root", root).well()
    later = cli("align", "--root", root, "--json").well().json
    assert set(later["overlap"]["nulls"]) == {"rotated"}
    assert later["counterparts"]["null"].keys() == {"shifted"}
    assert later["counterparts"]["relations"] == found["counterparts"]["relations"]
    assert "similarity__rotated" in read_table(root / "run_a" / "latents.overlap.parquet")


def test_aligning_across_studies_by_force_is_reported(root: Path, recipe: Path) -> None:
    cli(
        "train", "--no-controls", "--name", "other", "--seeds", 0, "--tokens", "10k", "--recipe", recipe, "--root", root
    ).well()
    before = tree(root, under="run_*")
    cli("align", "run_a", "other_a", "--root", root, "--json").failed_in_one_line("different studies", "--force")
    ran = cli("align", "run_a", "other_a", "--force", "--root", root, "--json").well()
    assert "different studies" in ran.json["apart"]
    assert ran.json["counterparts"] is not None  # the same text in the same order
    assert "Aligned by --force" in cli("align", "run_a", "other_a", "--force", "--root", root).well().out
    assert "only the seed changes" not in cli("align", "run_a", "other_a", "--force", "--root", root).well().out
    assert tree(root, under="run_*") == before  # its own study is as it was
    assert "of another study: run_a and other_a" in " ".join(
        cli("report", "--full", "--root", root, "--sae", "run_a").well().out.split()
    )


def test_seeds_grow_without_touching_what_exists(root: Path, recipe: Path) -> None:
    before = {**tree(root, under="run_*"), **tree(root, under="alignments")}
    grown = cli("train", "--no-controls", "--seeds", 0, 1, 2, "--recipe", recipe, "--root", root, "--json").well()
    assert [run["name"] for run in grown.json["runs"]] == ["run_a", "run_b", "run_c"]
    assert {**tree(root, under="run_[ab]"), **tree(root, under="alignments")} == before
    # A stage that now wants the third run brings it up, and leaves the weights, stores and old pairs as they are.
    cli("explain", "--sae", "run_a", "--unshared-only", "--latents", 2, "--root", root).well()
    after = tree(root)
    derived = ("latents.overlap.parquet", "latents.contexts.parquet", "latents.sample.parquet")
    assert {name: after[name] for name in before if not name.endswith(derived)} == {
        name: value for name, value in before.items() if not name.endswith(derived)
    }
    assert "alignments/run_b--run_c.parquet" in after
    assert "decoder_partner__run_c" in read_table(root / "run_a" / "latents.overlap.parquet")


def test_an_existing_study_supplies_its_settings(root: Path) -> None:
    before = {run: (root / run / "sae.safetensors").read_bytes() for run in ("run_a", "run_b")}
    alone = cli("train", "--name", "run", "--no-controls", "--root", root, "--json").well().json
    assert [run["seed"] for run in alone["runs"]] == [0, 1]  # its own seeds, not the default's three
    more = cli("train", "--name", "run", "--seeds", 0, 1, 7, "--no-controls", "--root", root, "--json").well().json
    assert [run["seed"] for run in more["runs"]] == [0, 1, 7]
    assert {run["num_latents"] for run in more["runs"]} == {NUM_LATENTS}
    assert {run: (root / run / "sae.safetensors").read_bytes() for run in before} == before
    cli("train", "--name", "run", "--k", K + 1, "--root", root).failed_in_one_line("training.k")


def test_a_seed_trained_later_equals_one_trained_together(root: Path, recipe: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    cli("train", "--no-controls", "--seeds", 1, "--recipe", recipe, "--root", alone).well()
    assert (alone / "run_a" / "sae.safetensors").read_bytes() == (root / "run_b" / "sae.safetensors").read_bytes()


def test_an_explanation_is_made_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    real = NgramExplainer.explain

    async def counted(self: NgramExplainer, latent: int, *rest: Any) -> Any:
        asked.append(latent)
        return await real(self, latent, *rest)

    monkeypatch.setattr(NgramExplainer, "explain", counted)
    path = root / "run_a" / "journal.sqlite"
    before = journal(path, times=True)["explanation"]
    more = cli("explain", "--sae", "run_a", "--latents", 12, "--root", root, "--json").well().json
    after = journal(path, times=True)["explanation"]
    assert after[: len(before)] == before
    assert more["n_done"] == 12
    assert sorted(asked) == sorted(row["latent"] for row in after[len(before) :])
    assert not set(asked) & {row["latent"] for row in before}


def test_score_without_a_name_scores_all_explained(root: Path) -> None:
    explained = cli("explain", "--sae", "run_b", "--latents", 4, "--root", root, "--json").well().json
    scored = cli("score", "--root", root, "--json").well().json
    assert scored["runs"] == ["run_a", "run_b"]
    assert scored["n_new"] == explained["n_done"]
    assert scored["n_done"] == 6 + explained["n_done"]
    table = read_table(root / "run_b" / "latents.scores.parquet")
    assert len(table[table["control"] == "none"]) == explained["n_done"]


def test_score_with_a_name_explains_first(root: Path) -> None:
    ran = cli("score", "--sae", "run_b", "--control-latents", 0, "--root", root, "--json").well()
    assert "not explained yet" in ran.err
    assert ran.json["n_done"] == ran.json["n_new"] > 6


def test_score_goes_on_explaining_where_it_was_stopped(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that `score` had only half explained is not scored in half."""
    whole = cli("score", "--sae", "run_b", "--root", root, "--json").well().json["n_done"]
    for left in (root / "run_b").glob("*journal.sqlite*"):
        left.unlink()
    real, n = NgramExplainer.explain, 0

    async def stops(self: NgramExplainer, *rest: Any) -> Any:
        nonlocal n
        n += 1
        if n == 4:  # once: a second one, of another task, would break into the clearing up after the first
            raise KeyboardInterrupt
        if n > 4:
            await asyncio.Event().wait()
        return await real(self, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(NgramExplainer, "explain", stops)
        assert cli("score", "--sae", "run_b", "--root", root).code == 130
    gc.collect()  # the stopped task is reported now: later, within `ast.parse`, that is an error of CPython 3.11
    assert len(journal(root / "run_b" / "journal.sqlite")["explanation"]) == 3
    assert cli("score", "--sae", "run_b", "--root", root, "--json").well().json["n_done"] == whole
    # Once it is through, what is asked for by hand stays what is scored.
    assert "not explained" not in cli("score", "--sae", "run_b", "--root", root).well().err


def test_partners_are_explained_too(root: Path) -> None:
    found = cli("explain", "--sae", "run_a", "--latents", 4, "--with-partners", "--root", root, "--json").well().json
    assert found["runs"] == ["run_a", "run_b"]
    assert journal(root / "run_b" / "journal.sqlite")["explanation"]


def test_dead_latent_named_outright_is_skipped_with_reason(root: Path) -> None:
    path = root / "run_a" / "latents.firing.parquet"
    firing = read_table(path)
    rare = int(firing.sort_values("n_windows")["latent"].iloc[0])
    named = ("explain", "--sae", "run_a", "--indices", rare, "--root", root)
    found = cli(*named, "--json").well().json
    ((reason, n),) = found["left_out"].items()
    assert "too few contexts" in reason
    assert n == found["n_left_out"] == 1
    assert (found["n_done"], found["n_failed"], found["failures"]) == (0, 0, {})
    assert found["retry"] is None, "no retry could mend it"
    assert found["next"] is None, "there is nothing to score"
    shown = cli(*named).well().out
    assert "skipped because" in shown
    assert "asks again" not in shown
    scored = cli("score", "--sae", "run_a", "--root", root, "--json").well().json
    assert scored["left_out"] == {f"no explanation: {reason}": 1}
    assert (scored["n_failed"], scored["retry"]) == (0, None)


# --- a language model ---------------------------------------------------------------------------------------


def test_a_language_model_explains_and_judges_once(root: Path) -> None:
    with FakeServer() as server:
        there = ("--llm-url", server.url, "--root", root, "--json")
        explained = cli("explain", "--sae", "run_b", "--latents", 3, *there).well().json
        assert explained["backend"] == "llm (fake-model)"
        assert explained["n_new"] == 3
        scored = cli("score", "--sae", "run_b", *there).well().json
        assert scored["n_done"] == 3
        report = cli("report", "--sae", "run_b", "--root", root, "--json").well().json
        assert "llm" in json.dumps(report["methods"]["explainer"])
        assert report["scores"]["n_scored"] == 3
        sent = len(server.requests)
        assert sent >= 6
        again = cli("explain", "--sae", "run_b", "--latents", 3, *there).well().json
        assert (again["n_done"], again["n_new"]) == (3, 0)
        assert cli("score", "--sae", "run_b", *there).well().json["n_new"] == 0
        assert len(server.requests) == sent
        # The n-gram baseline's work stands beside it, and the n-gram judge leaves foreign words alone.
        note = cli("score", "--sae", "run_b", "--root", root, "--json").well().json
        assert "skipped" in " ".join(note["notes"])


def test_answers_that_fail_are_told_and_tried_again(root: Path) -> None:
    with FakeServer("no explanation in any form") as server:
        there = ("--llm-url", server.url, "--root", root, "--json")
        ran = cli("explain", "--sae", "run_b", "--latents", 2, *there)
        assert ran.code == 3
        assert ran.json["n_failed"] == 2


def test_a_key_in_the_environment_alone_configures_nothing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-not-a-key-at-all")
    ran = cli("explain", "--sae", "run_a", "--unshared-only", "--definition", "lenient", "--latents", 6, "--root", root)
    assert "ngram" in ran.well().out
    cli("explain", "--explainer", "llm", "--root", root).failed_in_one_line("--explainer llm", "--llm-url")


def test_an_endpoint_that_is_down(root: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    for command in ("explain", "score"):
        cli(command, "--sae", "run_b", "--llm-url", url, "--root", root, "--json").failed_in_one_line(url)
        assert not (root / "run_b" / "journal.sqlite").exists()
