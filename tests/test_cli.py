"""The commands as a user meets them: a whole study end to end, and every kind of bad input."""

from __future__ import annotations

import json
import resource
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import small_study
from fake_server import FakeServer
from hypothesis import given
from hypothesis import strategies as st
from tiny_study import NUM_LATENTS, K, Ran, cli, journal, tree

import cli as program
from autointerp.explainers.ngram import NgramExplainer
from sae.errors import BadInput
from sae.files import read_table

REPOSITORY = Path(program.__file__).parent
COMMANDS = ("demo", "train", "harvest", "align", "explain", "score", "report", "show", "runs")


@pytest.fixture
def recipe(tiny_recipe: Path) -> Path:
    return tiny_recipe


@pytest.fixture
def root(tiny_root: Path) -> Path:
    return tiny_root


@pytest.fixture
def untouched(tiny_done: tuple[Path, dict[str, Ran]]) -> Iterator[Path]:
    """The finished study itself, checked to be as it was afterwards."""
    root = tiny_done[0]
    before, rows = tree(root), journal(root / "run_a" / "journal.sqlite", times=True)
    yield root
    assert tree(root) == before
    assert journal(root / "run_a" / "journal.sqlite", times=True) == rows


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
    assert explained == sorted(explained)
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
        "train": ("--recipe", recipe, "--seeds", 0, 1),
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
    monkeypatch.setattr("autointerp.judges.ngram.NgramJudge.judge", refuse)
    monkeypatch.setattr("sae.subject.Subject.load", refuse)
    monkeypatch.setattr("sae.alignment.align", refuse)
    assert "already trained" in cli("train", "--seeds", 0, 1, "--recipe", recipe, "--root", root).well().err
    cli("harvest", "--root", root).well()
    cli("align", "--root", root).well()
    again = cli("explain", "--unshared-only", "--definition", "lenient", "--latents", 6, "--root", root, "--json")
    assert (again.well().json["n_done"], again.json["n_new"]) == (6, 0)
    judged = cli("score", "--root", root, "--json")
    assert (judged.well().json["n_done"], judged.json["n_new"]) == (6, 0)
    assert tree(root) == before
    assert journal(root / "run_a" / "journal.sqlite", times=True) == rows


def test_seeds_grow_without_touching_what_exists(root: Path, recipe: Path) -> None:
    before = {**tree(root, under="run_*"), **tree(root, under="alignments")}
    grown = cli("train", "--seeds", 0, 1, 2, "--recipe", recipe, "--root", root, "--json").well()
    assert [run["name"] for run in grown.json["runs"]] == ["run_a", "run_b", "run_c"]
    assert {**tree(root, under="run_[ab]"), **tree(root, under="alignments")} == before
    # A stage that now wants the third run brings it up, and leaves the weights, stores and old pairs as they are.
    cli("explain", "--sae", "run_a", "--unshared-only", "--latents", 2, "--root", root).well()
    after = tree(root)
    derived = ("latents.overlap.parquet", "latents.contexts.parquet")
    assert {name: after[name] for name in before if not name.endswith(derived)} == {
        name: value for name, value in before.items() if not name.endswith(derived)
    }
    assert "alignments/run_b--run_c.parquet" in after
    assert "decoder_partner__run_c" in read_table(root / "run_a" / "latents.overlap.parquet")


def test_a_seed_trained_later_equals_one_trained_beside_others(root: Path, recipe: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    cli("train", "--seeds", 1, "--recipe", recipe, "--root", alone).well()
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


def test_score_without_a_name_scores_what_is_explained_everywhere(root: Path) -> None:
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
        if n > 3:
            raise KeyboardInterrupt
        return await real(self, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(NgramExplainer, "explain", stops)
        assert cli("score", "--sae", "run_b", "--root", root).code == 130
    assert len(journal(root / "run_b" / "journal.sqlite")["explanation"]) == 3
    assert cli("score", "--sae", "run_b", "--root", root, "--json").well().json["n_done"] == whole
    # Once it is through, what is asked for by hand stays what is scored.
    assert "not explained" not in cli("score", "--sae", "run_b", "--root", root).well().err


def test_partners_are_explained_too(root: Path) -> None:
    found = cli("explain", "--sae", "run_a", "--latents", 4, "--with-partners", "--root", root, "--json").well().json
    assert found["runs"] == ["run_a", "run_b"]
    assert journal(root / "run_b" / "journal.sqlite")["explanation"]


def test_a_dead_latent_named_outright_is_a_failure_with_a_reason(root: Path) -> None:
    path = root / "run_a" / "latents.firing.parquet"
    firing = read_table(path)
    rare = int(firing.sort_values("n_windows")["latent"].iloc[0])
    ran = cli("explain", "--sae", "run_a", "--indices", rare, "--root", root, "--json")
    assert ran.code == 3
    ((reason, n),) = ran.json["failures"].items()
    assert "too few contexts" in reason
    assert n == 1
    assert "--sae run_a" in ran.json["retry"]
    assert cli("score", "--sae", "run_a", "--root", root, "--json").code == 3


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
        assert "left out" in " ".join(note["notes"])


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


# --- bad input ----------------------------------------------------------------------------------------------

BAD: dict[str, tuple[str, tuple[str, ...]]] = {
    "unknown run": ("harvest --sae run_x", ("'run_x'", "did you mean", "'run_a'")),
    "unknown run to explain": ("explain --sae rnu_a", ("'rnu_a'", "'run_a'")),
    "unknown run to report": ("report --sae nope", ("'nope'", "'run_a'")),
    "unknown run to align": ("align run_a run_z", ("'run_z'", "'run_a'")),
    "one run to align": ("align run_a", ("'run_a'", "two runs")),
    "slash in the name": ("train --name a/b --recipe {recipe}", ("'a/b'",)),
    "reserved name": ("train --name reports --recipe {recipe}", ("'reports'", "reserved")),
    "hidden name": ("train --name .run --recipe {recipe}", ("'.run'",)),
    "endless name": (f"train --name {'x' * 300} --recipe {{recipe}}", ("300 characters",)),
    "other settings": ("train --recipe {recipe} --k 3", ("'run_a'", "training.k: 2 there, 3 now")),
    "repeated seed": ("train --recipe {recipe} --seeds 1 1", ("seeds 1 1",)),
    "k above M": ("train --name wide --k 9 -M 8", ("training.k = 9", "training.num_latents = 8")),
    "k of nothing": ("train --name wide --k 0", ("training.k = 0",)),
    "unknown precision": ("train --name wide --dtype float8", ("subject.dtype = 'float8'", "float32")),
    "two corpora": ("train --name wide --text x --dataset y", ("--text", "--dataset")),
    "missing recipe": ("train --recipe {recipe}x", ("tiny.tomlx", "tiny.toml'")),
    "recipe that is a folder": ("train --recipe {folder}", ("cannot be read",)),
    "unknown latent": (f"explain --sae run_a --indices 1,{NUM_LATENTS}", (f"latent {NUM_LATENTS} ", "0 to 63")),
    "latents upside down": ("explain --indices 5-3", ("'5-3'",)),
    "latents without end": ("explain --indices 0-99999999999", ("'0-99999999999'",)),
    "no latents": ("explain --indices ,", ("','",)),
    "latents in words": ("explain --indices 1,two", ("'two'",)),
    "unknown against": ("explain --unshared-only --against run_q", ("'run_q'", "'run_b'")),
    "itself against": ("explain --unshared-only --against run_a", ("'run_a'", "'run_b'")),
    "unknown against in a report": ("report --against run_q", ("'run_q'",)),
    "shared and unshared": ("explain --unshared-only --shared-only", ("--unshared-only", "--shared-only")),
    "unknown scorer": ("score --scorer detectoin", ("'detectoin'", "'detection'")),
    "unknown protocol": ("score --protocol chat --llm-url x", ("'chat'", "batch")),
    "no such address": ("explain --llm-url ftp://x", ("'ftp://x'",)),
    "unknown latent to show": ("show --latent 64", ("latent 64 ", "0 to 63")),
    "negative latent to show": ("show --latent -1", ("latent -1 ",)),
    "unknown device": ("harvest --tokens 99M --device abacus", ("'abacus'",)),
    "no threads": ("harvest --tokens 99M --threads 0", ("--threads 0",)),
}


@pytest.mark.parametrize(("command", "words"), BAD.values(), ids=BAD)
@pytest.mark.parametrize("as_json", [False, True], ids=["tables", "json"])
def test_bad_input_is_one_line(
    command: str, words: tuple[str, ...], as_json: bool, untouched: Path, recipe: Path, tmp_path: Path
) -> None:
    arguments = command.format(recipe=recipe, folder=tmp_path).split(" ")
    ran = cli(*arguments, "--root", untouched, *["--json"] * as_json)
    ran.failed_in_one_line(*words)
    assert len(ran.err.splitlines()) == 1
    assert bool(ran.out) == as_json


USAGE: dict[str, tuple[str, tuple[str, ...]]] = {
    "no such command": ("trian", ("'trian'", "--help")),
    "no such option": ("train --sead 1", ("--sead",)),
    "seed in words": ("train --seeds one", ("--seeds",)),
    "negative seed": ("train --seeds -1", ("-1",)),
    "no latents": ("explain --latents 0", ("--latents",)),
    "unknown definition": ("explain --definition srtict", ("--definition",)),
    "cosine above one": ("explain --threshold 1.5", ("--threshold",)),
    "nobody at work": ("explain --concurrency 0", ("--concurrency",)),
    "no latent to show": ("show", ("--latent",)),
    "unknown explainer": ("explain --explainer magic", ("--explainer",)),
}


@pytest.mark.parametrize(("command", "words"), USAGE.values(), ids=USAGE)
def test_wrong_usage_is_one_line_and_exit_code_2(command: str, words: tuple[str, ...], untouched: Path) -> None:
    for more in ([], ["--json"]):
        ran = cli(*command.split(), "--root", untouched, *more)
        ran.failed_in_one_line(*words, code=2)
        assert len(ran.err.splitlines()) == 1
        assert bool(ran.out) == bool(more)


@pytest.mark.parametrize("text", ["", "k", "abc", "0", "-5", "1.5", "0.0001k", "nan", "inf", "1e400", "2M2", "1e99"])
def test_an_amount_that_is_none(text: str, untouched: Path, recipe: Path) -> None:
    cli("train", "--recipe", recipe, "--tokens", text, "--root", untouched).failed_in_one_line("--tokens", repr(text))
    cli("harvest", f"--tokens={text}", "--root", untouched).failed_in_one_line("--tokens", repr(text))


@given(st.integers(1, 10**9), st.sampled_from(["", "k", "K", "M", "G", "B"]))
def test_amounts_are_exact(thousandths: int, suffix: str) -> None:
    """Three decimals of any size: what is a whole number is taken as just that, and nothing else is."""
    scale = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9}[suffix.lower()]
    text = f"{thousandths // 1000}.{thousandths % 1000:03d}{suffix}"
    whole, rest = divmod(thousandths * scale, 1000)
    if rest or not 1 <= whole <= 10**15:
        with pytest.raises(BadInput, match="not an amount"):
            program._amount("--tokens", text)
    else:
        assert program._amount("--tokens", text) == whole


@given(st.lists(st.tuples(st.integers(0, 500), st.integers(0, 20)), min_size=1, max_size=6))
def test_indices_are_what_they_say(spans: list[tuple[int, int]]) -> None:
    text = ",".join(f"{first}-{first + n}" if n else str(first) for first, n in spans)
    expected = {i for first, n in spans for i in range(first, first + n + 1)}
    found = program._indices(text)
    assert set(found) == expected
    assert len(found) == len(expected)
    assert program._indices(text.replace(",", ", ")) == found
    assert program._indices(None) == ()


@given(st.lists(st.sampled_from(["train", "--seeds", "--text", "--name", "--json", "0", "1", "a.txt"]), max_size=12))
def test_lists_may_be_given_at_once(arguments: list[str]) -> None:
    """Nothing but list options' names is added, and in a list option every value has its name before it."""
    spread = program._spread_lists(arguments)
    lists = {"--seeds", "--text", "--against"}
    assert [a for a in spread if a not in lists] == [a for a in arguments if a not in lists]
    assert {a for a in spread if a in lists} <= {a for a in arguments if a in lists}
    assert program._spread_lists(spread) == spread


def fresh(tmp_path: Path, recipe: Path, *arguments: object) -> tuple[Ran, Path]:
    """``train`` in an empty root that is to stay without runs."""
    root = tmp_path / "fresh"
    ran = cli("train", "--recipe", recipe, *arguments, "--root", root, "--json")
    assert not list(root.glob("*/run.json"))
    assert not list(root.rglob("*.part"))
    assert not list(root.rglob("*.safetensors"))
    return ran, root


def test_an_unknown_hookpoint_names_the_nearest(tmp_path: Path, recipe: Path) -> None:
    ran, _ = fresh(tmp_path, recipe, "--hookpoint", "layers.1.mpl")
    ran.failed_in_one_line("'layers.1.mpl'", "did you mean 'layers.1.mlp'")


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ("[training]\nnum_latent = 5", ("'training.num_latent'", "'num_latents'")),
        ("[trainnig]\nk = 5", ("'trainnig'", "'training'")),
        ("[training]\nk = 'many'", ("training.k", "'many'")),
        ("training = 5", ("training",)),
        ("[training\n", ("not valid TOML",)),
    ],
)
def test_a_recipe_that_cannot_be_one(table: str, words: tuple[str, ...], tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(table)
    ran, root = fresh(tmp_path, path)
    ran.failed_in_one_line("bad.toml", *words)
    assert not root.exists()


def test_a_text_shorter_than_one_sequence(tmp_path: Path, recipe: Path) -> None:
    (tmp_path / "short.txt").write_text("too short")
    ran, _ = fresh(tmp_path, recipe, "--text", tmp_path / "short.txt")
    ran.failed_in_one_line("short.txt", "corpus.context = 32")


def test_a_text_that_is_not_there_or_is_none(tmp_path: Path, recipe: Path) -> None:
    ran, _ = fresh(tmp_path, recipe, "--text", tmp_path / "absent.txt")
    ran.failed_in_one_line("absent.txt")
    (tmp_path / "binary.txt").write_bytes(bytes(range(256)) * 100)
    ran, _ = fresh(tmp_path, recipe, "--text", tmp_path / "binary.txt")
    ran.failed_in_one_line("binary.txt")


def test_a_folder_that_is_no_checkpoint(tmp_path: Path, recipe: Path, tiny_llama_dir: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    fresh(tmp_path, recipe, "--model", empty)[0].failed_in_one_line(empty, "config.json")
    fresh(tmp_path, recipe, "--model", tmp_path / "absent")[0].failed_in_one_line("absent")
    fresh(tmp_path, recipe, "--model", recipe)[0].failed_in_one_line("tiny.toml", "a file")
    cut = Path(shutil.copytree(tiny_llama_dir, tmp_path / "cut"))
    (weights,) = cut.glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:1000])
    fresh(tmp_path, recipe, "--model", cut)[0].failed_in_one_line(cut)


def test_sequences_longer_than_the_model_reads(tmp_path: Path, recipe: Path) -> None:
    ran, _ = fresh(tmp_path, recipe, "--context", 64)
    ran.failed_in_one_line("64 positions", "65", "corpus.context to 63")


def test_a_root_that_is_a_file(tmp_path: Path, recipe: Path) -> None:
    (tmp_path / "file").write_text("x")
    cli("train", "--recipe", recipe, "--root", tmp_path / "file", "--json").failed_in_one_line("file'")


@pytest.mark.parametrize("command", ["harvest", "align", "explain", "report", "show --latent 1", "explain --llm-url x"])
def test_there_are_no_runs_yet(command: str, tmp_path: Path) -> None:
    ran = cli(*command.split(), "--root", tmp_path / "none", "--json")
    ran.failed_in_one_line("no runs", "none'", "python cli.py train")
    assert not (tmp_path / "none").exists()
    assert cli("runs", "--root", tmp_path / "none", "--json").well().json["runs"] == []


def test_nothing_is_explained_yet(tmp_path: Path) -> None:
    small_study.runs_of(tmp_path)
    cli("score", "--root", tmp_path, "--json").failed_in_one_line("has explanations", "python cli.py explain")


@pytest.mark.parametrize("option", ["--unshared-only", "--shared-only", "--with-partners"])
def test_one_seed_alone_shares_nothing(option: str, tmp_path: Path) -> None:
    small_study.runs_of(tmp_path, 1)
    before = tree(tmp_path)
    ran = cli("explain", option, "--root", tmp_path, "--json")
    ran.failed_in_one_line("'run_a'", "only run", "train")
    assert len(ran.err.splitlines()) == 1  # before any harvest
    assert tree(tmp_path) == before


def test_runs_of_different_studies_are_not_aligned(tmp_path: Path) -> None:
    small_study.runs_of(tmp_path, 1, study="left")
    small_study.runs_of(tmp_path, 1, study="right")
    ran = cli("align", "left_a", "right_a", "--root", tmp_path, "--json")
    ran.failed_in_one_line("left_a, right_a", "different studies")


def test_a_run_whose_weights_are_cut_short(root: Path) -> None:
    weights = root / "run_a" / "sae.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    for command in (("harvest",), ("align",), ("explain", "--latents", 2)):
        cli(*command, "--root", root, "--json").failed_in_one_line("run_a")


def test_a_record_that_is_damaged(root: Path) -> None:
    (root / "run_a" / "run.json").write_text("{")
    cli("report", "--sae", "run_a", "--root", root, "--json").failed_in_one_line("run.json", "damaged")


def test_a_training_under_way_is_not_harvested(root: Path) -> None:
    (root / "run_b" / "cfg.json").unlink()
    cli("harvest", "--sae", "run_b", "--root", root, "--json").failed_in_one_line("'run_b'", "not trained to its end")


# --- speed --------------------------------------------------------------------------------------------------

HELP = """
import sys
from cli import main
sys.argv = ["cli.py", *sys.argv[1:]]
try:
    main()
finally:
    heavy = {"torch", "pandas", "transformers", "numpy", "openai"} & set(sys.modules)
    assert not heavy, heavy
"""


def seconds_used() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return children.ru_utime + children.ru_stime


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_is_quick_and_imports_nothing_heavy(command: str) -> None:
    before = seconds_used()  # of computing, which other work on the machine does not lengthen as it does the clock
    arguments = [sys.executable, "-c", HELP, *command.split(), "--help"]
    ran = subprocess.run(arguments, cwd=REPOSITORY, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert "--help" in ran.stdout
    assert seconds_used() - before < 0.5


def test_look_ups_never_import_torch(root: Path) -> None:
    code = """
import sys
from tiny_study import cli
root = sys.argv[1]
for command in (["explain", "--latents", "8"], ["score"], ["report"], ["show", "--latent", "3"], ["runs"]):
    cli(*command, "--root", root).well()
    assert "torch" not in sys.modules, command
"""
    places = [str(REPOSITORY), str(REPOSITORY / "tests")]
    start = f"import sys; sys.path[:0] = {places!r}\n"
    ran = subprocess.run([sys.executable, "-c", start + code, str(root)], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


def test_no_command_at_all_is_the_help() -> None:
    assert "train" in cli().well().out
