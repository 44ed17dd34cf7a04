"""The command doctor, and what does not belong together: copies between runs, and files of another kind."""

from __future__ import annotations

import os
import shutil
import sqlite3
from pathlib import Path

import pytest
from fake_server import FakeServer
from tiny_study import cli


def checks(root: Path, *arguments: object, code: int = 0) -> dict[str, tuple[str, str]]:
    """What doctor says: check → state and sentence."""
    ran = cli("doctor", "--root", root, "--json", *arguments)
    assert ran.code == code, ran
    return {check["what"]: (check["state"], check["says"]) for check in ran.json["checks"]}


def bad(root: Path) -> dict[str, str]:
    return {what: says for what, (state, says) in checks(root, code=1).items() if state == "bad"}


def test_all_is_well(untouched: Path) -> None:
    found = checks(untouched)
    assert not [what for what, (state, _) in found.items() if state == "bad"]
    for what in ("run_a weights", "run_a firing store", "run_b firing store"):
        assert found[what][1].startswith("digests match")
    assert {"disk", "memory", "cpu", "run_a journal", "alignment run_a--run_b"} <= set(found)
    lines = cli("doctor", "--sae", "run_b", "--root", untouched).well().out.splitlines()
    assert all(line[:5] in ("ok   ", "note ") for line in lines)
    assert not any("run_a" in line for line in lines)


def test_an_endpoint_is_asked(untouched: Path) -> None:
    with FakeServer() as server:
        assert checks(untouched, "--llm-url", server.url)[f"LLM endpoint {server.url}"][0] == "ok"
    ran = cli("doctor", "--llm-url", "http://127.0.0.1:9/v1", "--root", untouched)
    assert ran.code == 1
    assert "bad  LLM endpoint http://127.0.0.1:9/v1: " in ran.out
    assert ran.err.startswith("error: doctor: 1 of ")


@pytest.mark.parametrize(
    ("part", "what"),
    [
        ("run_a/run.json", "run_a record"),
        ("run_a/sae.safetensors", "run_a weights"),
        ("run_a/cfg.json", "run_a weights"),
        ("run_a/weights.json", "run_a weights"),
        ("run_a/firings/store.json", "run_a firing store"),
        ("run_a/firings/index-*/activations.npy", "run_a firing store"),
        ("run_a/firings/shards/*/counts.npy", "run_a firing store"),
        ("run_a/latents.overlap.parquet", "run_a tables"),
        ("run_a/training.parquet", "run_a tables"),
        ("corpora/*/tokens.bin", "corpus"),
        ("corpora/*/documents.bin", "corpus"),
        ("corpora/*/tokenizer.json", "corpus"),
        ("alignments/run_a--run_b.json", "alignment run_a--run_b"),
        ("alignments/run_a--run_b.parquet", "alignment run_a--run_b"),
    ],
)
def test_a_flipped_byte_is_found(root: Path, part: str, what: str) -> None:
    path = next(root.glob(part))
    content = bytearray(path.read_bytes())
    content[len(content) // 4] ^= 4
    path.write_bytes(content)
    found = bad(root)
    assert any(name.startswith(what) for name in found), found
    assert all("; " in says for says in found.values())  # and what to do


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ("run.json", "is of run 'run_b'; rename"),
        ("sae.safetensors", "does not match its digest"),
        ("weights.json", "the weights of another run"),
        ("firings", "is of another run"),
        ("journal.sqlite", "the journal of another run"),
        ("latents.overlap.parquet", "is a copy of 'run_b/latents.overlap.parquet'"),
    ],
)
def test_a_copy_from_another_run_is_refused(root: Path, part: str, words: str) -> None:
    cli("explain", "--sae", "run_b", "--explainer", "ngram", "--latents", 2, "--root", root).well()
    source, target = root / "run_b" / part, root / "run_a" / part
    if source.is_dir():
        shutil.rmtree(target)
        shutil.copytree(source, target)
    else:
        shutil.copyfile(source, target)
    assert any(words in says for says in bad(root).values())
    for command in (("show", "--latent", 3), ("explain", "--explainer", "ngram", "--latents", 7)):
        ran = cli(*command, "--sae", "run_a", "--root", root)
        assert "Traceback" not in ran.err
        assert ran.code in (0, 1)


def test_a_copied_run_is_not_another_seed(root: Path) -> None:
    shutil.copytree(root / "run_a", root / "run_c")
    cli("report", "--root", root, "--sae", "run_a").failed_in_one_line("run_c", "is of run 'run_a'")


def test_swapped_databases_are_told(root: Path) -> None:
    path = root / "run_a" / "journal.sqlite"
    with sqlite3.connect(root / "other.sqlite") as other:
        other.execute("CREATE TABLE answer (key TEXT)")
        other.execute("PRAGMA user_version = 4")
    other.close()
    shutil.copyfile(root / "other.sqlite", path)
    for command in (("report",), ("show", "--latent", 3), ("score",)):
        cli(*command, "--sae", "run_a", "--root", root).failed_in_one_line("journal.sqlite", "another kind")
    path.write_bytes(b"")
    for command in (("report",), ("show", "--latent", 3)):
        cli(*command, "--sae", "run_a", "--root", root).failed_in_one_line("journal.sqlite", "is empty")


def set_application_id(path: Path, application_id: int) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA journal_mode = DELETE")
        connection.execute(f"PRAGMA application_id = {application_id}")
    connection.close()


def test_doctor_upgrades_no_journal(root: Path) -> None:
    path = root / "run_a" / "journal.sqlite"
    set_application_id(path, 0)
    before = path.read_bytes()
    assert checks(root, "--sae", "run_a")["run_a journal"][0] == "ok"
    assert path.read_bytes() == before
    assert not list(path.parent.glob("journal.sqlite-*"))


@pytest.mark.parametrize(
    "part",
    [
        "run_b/run.json",
        "run_a/weights.json",
        "run_a/latents.firing.parquet",
        "run_a/firings/store.json",
        "run_a/firings/index-*/positions.npy",
        "alignments/run_a--run_b.json",
        "alignments/run_a--run_b.parquet",
        "alignments/dips.json",
        "corpora/*/corpus.json",
    ],
)
def test_a_pipe_among_the_files_blocks_nothing(root: Path, part: str) -> None:
    cli("report", "--root", root).well()
    path = next(root.glob(part))
    path.unlink()
    os.mkfifo(path)
    for command in ("doctor", "report"):
        ran = cli(command, "--sae", "run_a", "--root", root)
        assert ran.code in (0, 1)
        assert "Traceback" not in ran.err


def test_a_lost_firing_table_is_reported(root: Path) -> None:
    (root / "run_a" / "latents.firing.parquet").unlink()
    assert checks(root)["run_a tables"] == ("note", "no current firing table; run `harvest`")
    ran = cli("report", "--sae", "run_a", "--root", root).well()
    assert "harvest --sae run_a" in " ".join(ran.out.split())


@pytest.mark.parametrize("damage", ["[]", '{"schema": 99}'])
def test_another_damaged_study_stops_no_command(root: Path, damage: str) -> None:
    (root / "theirs_a").mkdir()
    (root / "theirs_a" / "run.json").write_text(damage)
    shutil.rmtree(root / "run_a" / "firings")
    for command in (
        "harvest --sae run_a",
        "align run_a run_b",
        "score",
        "report --sae run_a",
        "runs --prune --dry-run",
    ):
        cli(*command.split(), "--root", root).well()
