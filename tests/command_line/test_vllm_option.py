"""``--vllm``: a server for the length of a command, where there is something to ask, and only then."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_vllm_python import FakeVllm, heed_interrupts
from tiny_study import Ran, cli, journal, tree

import cli as program

EXPLAINED = ("--sae", "run_a", "--latents", 4)


@pytest.fixture
def vllm(tmp_path: Path) -> Iterator[FakeVllm]:
    fake = FakeVllm(tmp_path / "fake")
    yield fake
    left = fake.living()
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left


def run(vllm: FakeVllm, root: Path, command: str, *arguments: object, model: object = "bundled") -> Ran:
    return cli(command, *arguments, "--vllm", model, "--vllm-python", vllm.python, "--root", root, "--json")


def test_explain_starts_one_only_for_what_is_new(vllm: FakeVllm, root: Path) -> None:
    first = run(vllm, root, "explain", *EXPLAINED).well()
    assert first.json["n_new"] == 4
    assert first.json["backend"].startswith("llm (pystdlib-4m-")
    assert len(vllm.starts()) == 1
    assert not vllm.living()
    assert (root / "logs").is_dir()
    assert [row["name"] for row in cli("runs", "--root", root, "--json").json["runs"]] == ["run_a", "run_b"]

    again = run(vllm, root, "explain", *EXPLAINED).well()
    assert (again.json["n_done"], again.json["n_new"]) == (4, 0)
    # What was answered is kept beside the journal too.
    (root / "run_a" / "journal.sqlite").unlink()
    kept = run(vllm, root, "explain", *EXPLAINED).well()
    assert (kept.json["n_done"], kept.json["n_new"]) == (4, 4)
    assert len(vllm.starts()) == 1

    assert run(vllm, root, "explain", "--sae", "run_a", "--latents", 5).well().json["n_new"] == 1
    assert len(vllm.starts()) == 2


def test_score_and_explain_share_one_server_per_model(vllm: FakeVllm, root: Path) -> None:
    scored = run(vllm, root, "score", "--sae", "run_b", "--control-latents", 2)
    assert scored.code in (0, 3), scored.err
    assert scored.json["n_done"] > 0
    assert len(vllm.starts()) == 1
    again = run(vllm, root, "score", "--sae", "run_b", "--control-latents", 2)
    assert again.json["n_done"] == scored.json["n_done"]
    if scored.code == 0:
        assert len(vllm.starts()) == 1


def test_two_models_are_served_one_after_the_other(
    vllm: FakeVllm, root: Path, tmp_path: Path, tiny_neox_dir: Path
) -> None:
    judge = Path(shutil.copytree(tiny_neox_dir, tmp_path / "the-judge"))
    more = ("--judge-vllm", judge, "--control-latents", 2)
    scored = run(vllm, root, "score", "--sae", "run_b", *more)
    assert scored.code in (0, 3), scored.err
    assert scored.json["backend"].startswith("llm (the-judge-")
    explaining, judging = vllm.starts()
    assert "pystdlib" in str(explaining["arguments"])
    assert str(judge) in judging["arguments"]
    assert judging["beside"] == []
    verdicts = journal(root / "run_b" / "journal.sqlite")["verdict"]
    (model,) = {row["model"] for row in verdicts if row["judge"] == "llm"}
    assert model.startswith("the-judge-")


def test_the_next_command_names_the_server(vllm: FakeVllm, root: Path) -> None:
    ran = run(vllm, root, "explain", *EXPLAINED, "--vllm-args", "--max-model-len 64").well()
    assert f"--vllm bundled --vllm-python '{vllm.python}' --vllm-args '--max-model-len 64'" in ran.json["next"]


def test_a_dying_server_fails_only_the_command(vllm: FakeVllm, root: Path) -> None:
    vllm.behave(die="ValueError: no room")
    rows = journal(root / "run_a" / "journal.sqlite")
    ran = run(vllm, root, "explain", *EXPLAINED)
    assert ran.code == 1
    assert ran.err.splitlines()[-1] == f"error: {ran.json['error']}"
    assert "ended with code 1 before it was ready: ValueError: no room; see its log" in ran.json["error"]
    assert "loading" in ran.err
    assert len(vllm.starts()) == 1
    assert journal(root / "run_a" / "journal.sqlite") == rows


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--vllm", "./none"), ("./none", "does not exist")),
        (("--vllm", "bundled", "--vllm-python", "/no/python"), ("--vllm-python", "/no/python")),
        (("--vllm", "bundled", "--vllm-python", sys.executable), ("not installed", "make vllm")),
        (("--vllm", "bundled", "--llm-url", "http://127.0.0.1:9"), ("--vllm", "--llm-url", "one of the two")),
        (("--vllm", "bundled", "--vllm-args", "--port 1"), ("--vllm-args", "--port")),
    ],
)
def test_impossible_options_are_reported_before_starting(
    arguments: tuple[str, ...], words: tuple[str, ...], untouched: Path
) -> None:
    before = tree(untouched)
    cli("explain", *EXPLAINED, *arguments, "--root", untouched, "--json").failed_in_one_line(*words)
    assert tree(untouched) == before


def test_ctrl_c_stops_it(vllm: FakeVllm, root: Path) -> None:
    vllm.behave(never=True)
    command = [sys.executable, str(Path(program.__file__)), "explain", *map(str, EXPLAINED), "--vllm", "bundled"]
    command += ["--vllm-python", str(vllm.python), "--root", str(root)]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=heed_interrupts
    ) as process:
        vllm.wait_for_start()
        os.killpg(process.pid, signal.SIGINT)
        _, said = process.communicate(timeout=1200)
    assert process.returncode == 130
    assert said.splitlines()[-1].startswith("interrupted; finished work is kept")
    assert "Traceback" not in said
    assert not vllm.living()
