"""Every kind of bad input: one line that names it and says what to do, and nothing on disk has changed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import small_study
from tiny_study import NUM_LATENTS, Ran, cli, tree

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
    "a setting that there was not": ("train --recipe {recipe} --config x", ("corpus.config: not set there, 'x' now",)),
    "other settings": ("train --recipe {recipe} --k 3", ("'run_a'", "training.k: 2 there, 3 now")),
    "repeated seed": ("train --recipe {recipe} --seeds 1 1", ("seeds 1 1",)),
    "k above M": ("train --name wide --k 9 -M 8", ("training.k = 9", "training.num_latents = 8")),
    "k of nothing": ("train --name wide --k 0", ("training.k = 0",)),
    "unknown precision": ("train --name wide --dtype float8", ("subject.dtype = 'float8'", "float32")),
    "two corpora": ("train --name wide --text x --dataset y", ("--text", "--dataset")),
    "missing recipe": ("train --recipe {recipe}x", ("tiny.tomlx", "tiny.toml'")),
    "recipe that is a folder": ("train --recipe {folder}", ("is a directory",)),
    "unknown latent": (f"explain --sae run_a --indices 1,{NUM_LATENTS}", (f"latent {NUM_LATENTS} ", "0 to 63")),
    "latents upside down": ("explain --indices 5-3", ("'5-3'",)),
    "latents without end": ("explain --indices 0-99999999999", ("'0-99999999999'",)),
    "no latents": ("explain --indices ,", ("','",)),
    "latents in words": ("explain --indices 1,two", ("'two'",)),
    "no budget": ("explain --sae run_a --budget lots", ("'lots'", "2M")),
    "dollars without prices": ("score --sae run_a --budget $5", ("--price-in",)),
    "half a price": ("score --sae run_a --price-in 1", ("--price-out",)),
    "no precision": ("score --sae run_a --ci-half-width 0", ("--ci-half-width 0", "0.065")),
    "a cap without precision": ("score --sae run_a --max-contexts 80", ("--ci-half-width",)),
    "unknown against": ("explain --unshared-only --against run_q", ("'run_q'", "'run_b'")),
    "itself against": ("explain --unshared-only --against run_a", ("'run_a'", "'run_b'")),
    "unknown against in a report": ("report --against run_q", ("'run_q'",)),
    "shared and unshared": ("explain --unshared-only --shared-only", ("--unshared-only", "--shared-only")),
    "unknown protocol": ("score --protocol chat --llm-url x", ("'chat'", "batch")),
    "contexts of a single": (
        "score --llm-url http://x --protocol single --contexts-per-request 5",
        ("--protocol single", "--contexts-per-request 5"),
    ),
    "a server that nobody asks": ("score --judge ngram --judge-url http://x", ("--judge-url", "ngram", "--judge")),
    "a server that a dry run asks not": (
        "score --judge ngram --judge-vllm bundled --dry-run",
        ("--judge-vllm", "ngram"),
    ),
    "a protocol of n-grams": ("score --protocol single", ("--protocol", "ngram")),
    "a size of n-grams": ("score --contexts-per-request 5", ("--contexts-per-request", "ngram")),
    "an explainer that asks nobody": (
        "explain --explainer ngram --llm-url http://x",
        ("--llm-url", "ngram", "--explainer"),
    ),
    "a body that is no object": ("score --llm-url http://x --llm-body [1]", ("--llm-body", "JSON object")),
    "a body for nobody": ('explain --llm-body {{"a":1}}', ("--llm-body", "--llm-url")),
    "a body of n-grams": ('score --judge ngram --llm-url http://x --judge-body {{"a":1}}', ("--judge-body", "ngram")),
    "a body for no judge": ('score --judge-body {{"a":1}}', ("--judge-body", "--judge-url")),
    "a header of n-grams": ("score --judge ngram --llm-url http://x --judge-header a=b", ("--judge-header", "ngram")),
    "a header without a value": ("explain --llm-url http://x --llm-header a", ("--llm-header", "NAME=VALUE")),
    "a header without a server": ("sweep ks --llm-header a=b", ("--llm-header", "--llm-url")),
    "draws of n-grams": ("explain --draws 2", ("--draws 2", "ngram", "always answers the same")),
    "replicates of n-grams": ("score --replicates 2 --dry-run", ("--replicates 2", "ngram", "always answers the same")),
    "a temperature of one draw": ("explain --temperature 1", ("--draws",)),
    "a temperature of one replicate": ("score --draws 2 --temperature 1", ("--replicates",)),
    "no temperature": ("score --replicates 2 --temperature 0 --llm-url http://x", ("--temperature 0", "above 0")),
    "judges without a server each": (
        "score --llm-url http://x --judge-model a --judge-model b --judge-model c --judge-url http://y "
        "--judge-url http://z",
        ("--judge-url is given 2 times for 3 judges",),
    ),
    "a judge's header for two servers": (
        "score --llm-url http://x --judge-model a --judge-model b --judge-url http://y --judge-url http://z "
        "--judge-header api-key=0123456789",
        ("--judge-header", "several servers", "one --judge-url"),
    ),
    "a draw that is not scored": ("report --draw 3", ("no scores of draw 3", "there are draw 0 replicate 0")),
    "a judge that did not": ("report --judge gpt", ("--judge 'gpt'", "'ngram'")),
    "named and drawn": ("explain --indices 3 --latents 20", ("--indices", "--latents")),
    "no such address": ("explain --llm-url ftp://x", ("'ftp://x'",)),
    "unknown latent to show": ("show --latent 64", ("latent 64 ", "0 to 63")),
    "negative latent to show": ("show --latent -1", ("latent -1 ",)),
    "a page in no folder": ("report --html --to {folder}/no/such/x.html", ("--to", "no/such", "make it first")),
    "a table in no folder": ("export --table scores --format csv --to {folder}/no/x.csv", ("--to", "make it first")),
    "a table in the cache's place": (
        "export --table scores --format csv --to {folder}/cache.sqlite",
        ("--to", "cache.sqlite", "name another place"),
    ),
    "a page in a folder's place": ("report --html --to {folder}", ("--to", "is a folder")),
    "a page where nothing goes": ("report --html --to /proc/x.html", ("--to '/proc/x.html'",)),
    "one run to compare": ("compare --sae run_a", ("run_a",)),
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
    "unknown scorer": ("score --scorer fuzzing --scorer detectoin", ("'detectoin'", "'detection'")),
    "unknown explainer": ("explain --explainer magic", ("--explainer",)),
}


@pytest.mark.parametrize(("command", "words"), USAGE.values(), ids=USAGE)
def test_wrong_usage_exits_with_code_2(command: str, words: tuple[str, ...], untouched: Path) -> None:
    for more in ([], ["--json"]):
        ran = cli(*command.split(), "--root", untouched, *more)
        ran.failed_in_one_line(*words, code=2)
        assert len(ran.err.splitlines()) == 1
        assert bool(ran.out) == bool(more)


@pytest.mark.parametrize("text", ["k", "abc", "0", "-5", "1.5", "0.0001k", "nan", "inf", "1e400", "2M2", "1e99"])
def test_an_amount_that_is_none(text: str, untouched: Path, recipe: Path) -> None:
    cli("train", "--recipe", recipe, "--tokens", text, "--root", untouched).failed_in_one_line("--tokens", repr(text))
    cli("harvest", f"--tokens={text}", "--root", untouched).failed_in_one_line("--tokens", repr(text))


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


def test_an_empty_recipe_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.toml").write_text("# nothing yet")
    cli("train", "--recipe", tmp_path / "empty.toml", "--root", tmp_path).failed_in_one_line("empty.toml", "demo")


def test_a_missing_or_binary_text_is_refused(tmp_path: Path, recipe: Path) -> None:
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
    cli("harvest", "--sae", "run_b", "--root", root, "--json").failed_in_one_line(
        "'run_b'", "has not finished training"
    )


def test_a_dead_endpoint_is_reported_before_other_work(root: Path) -> None:
    """A harvest of an hour is not to be waited for only to hear that nobody listens."""
    shutil.rmtree(root / "run_a" / "firings")
    (root / "run_a" / "latents.firing.parquet").unlink()
    before = tree(root)
    ran = cli("explain", "--sae", "run_a", "--llm-url", "http://127.0.0.1:9/v1", "--root", root)
    ran.failed_in_one_line("127.0.0.1:9")
    assert "harvest" not in ran.err
    assert {name: stamp for name, stamp in tree(root).items() if "cache.sqlite" not in str(name)} == before


@pytest.mark.parametrize("stage", ["firing", "scores", "contexts"])
@pytest.mark.parametrize("command", ["report", "export --table latents --format csv --to {to}"])
def test_a_damaged_table_is_named(stage: str, command: str, untouched: Path, tmp_path: Path) -> None:
    root = tmp_path / "runs"
    shutil.copytree(untouched, root)
    damaged = root / "run_a" / f"latents.{stage}.parquet"
    damaged.write_text("garbage")
    ran = cli(*command.format(to=tmp_path / "t.csv").split(), "--sae", "run_a", "--root", root)
    ran.failed_in_one_line(damaged.name, "damaged", "delete it")
    assert not (tmp_path / "t.csv").exists()


def test_a_place_that_takes_no_file_is_named(untouched: Path) -> None:
    to = "/proc/scores.csv"
    ran = cli("export", "--sae", "run_a", "--table", "sample", "--format", "csv", "--to", to, "--root", untouched)
    ran.failed_in_one_line(to, "name another place")


def test_a_root_that_cannot_be_is_named(recipe: Path) -> None:
    cli("train", "--recipe", recipe, "--root", "/proc/foo").failed_in_one_line("--root '/proc/foo'", "another folder")


def test_a_recipes_text_is_not_passed_over(tmp_path: Path) -> None:
    for command in ("train --recipe", "sweep --dry-run"):
        axis = "[sweep]\ntraining.k = [2, 4]\n" if "sweep" in command else ""
        (tmp_path / "new.toml").write_text(f'[corpus]\nsource = ["/tmp"]\n{axis}')
        ran = cli(*command.split(), tmp_path / "new.toml", "--root", tmp_path / "runs")
        ran.failed_in_one_line("corpus.source", "kind = 'text'")
    assert not (tmp_path / "runs").exists()


def test_a_mistyped_table_of_a_sweep_is_named(tmp_path: Path) -> None:
    (tmp_path / "s.toml").write_text("[swep]\ntraining.k = [2, 4]\n")
    cli("sweep", tmp_path / "s.toml", "--root", tmp_path / "runs").failed_in_one_line("'swep'", "'sweep'")


def test_one_damaged_run_does_not_hide_the_others(root: Path) -> None:
    shutil.copytree(root / "run_b", root / "other_a")
    (root / "other_a" / "run.json").write_text("{")
    ran = cli("runs", "--root", root)
    assert ran.code == 1
    assert "run_a" in ran.out
    assert any(line.split() == ["other_a", "damaged"] for line in ran.out.splitlines())
    (line,) = ran.err.splitlines()
    assert "other_a" in line
    assert "damaged" in line
    assert [run["name"] for run in cli("runs", "--root", root, "--json").json["runs"]] == ["run_a", "run_b"]
    cli("show", "--latent", 3, "--root", root).well()  # the newest study is still found
    (root / "run_b" / "run.json").write_text("{")
    cli("report", "--full", "--sae", "run_a", "--root", root).failed_in_one_line("run_b", "damaged")
