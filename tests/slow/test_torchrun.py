"""`torchrun … cli.py train` as users run it: the weights of one process, killed or not, and one line for an error."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
from safetensors.torch import load_file
from test_kills import environment, same
from tiny_study import write_recipe, write_texts

from sae.common.files import read_json

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

REPOSITORY = Path(__file__).parents[2]
SEEDS = {"seeds": ("0", "1", "2"), "data": ("0",)}
MILESTONES = {
    "1": "corpora/*/corpus.json",
    "torchrun": "run_a/training-state/step-*.safetensors",
    "0": "run_a/training-state/step-*.safetensors",
}
"""who is killed, and what has newly appeared by then"""


def command(root: Path, recipe: Path, mode: str) -> list[str]:
    """Two ranks that train; with three seeds they share those, with one the data."""
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *("cli.py", "train", "--no-controls", "--name", "run", "--recipe", str(recipe), "--root", str(root), "--json"),
        *("--device", "cpu", "--seeds", *SEEDS[mode]),
    ]


def run(root: Path, recipe: Path, mode: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(root, recipe, mode), capture_output=True, text=True, cwd=REPOSITORY, env=environment(None), timeout=1200
    )


@contextmanager
def begun(root: Path, recipe: Path, mode: str) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        command(root, recipe, mode),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=REPOSITORY,
        env=environment(None),
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def ranks(process: subprocess.Popen[bytes]) -> dict[int, int]:
    """The process of each rank that runs."""
    found = {}
    for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        for value in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            if value.startswith(b"RANK="):
                found[int(value[5:])] = int(child)
    return found


def all_ranks(process: subprocess.Popen[bytes]) -> dict[int, int]:
    """:func:`ranks`, once both are there."""
    wait_for(lambda: len(ranks(process)) == 2)
    return ranks(process)


def all_gone(of_ranks: dict[int, int]) -> bool:
    """Whether these processes have ended; one that nobody has waited for yet counts as ended."""
    for process in of_ranks.values():
        try:
            if Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                return False
        except OSError:
            continue
    return True


def wait_for_file(
    process: subprocess.Popen[bytes], root: Path, pattern: str, before: Collection[Path] = frozenset()
) -> None:
    wait_for(lambda: process.poll() is not None or bool(set(root.glob(pattern)) - set(before)))


def wait_for(happened: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, tiny_llama_dir: Path) -> Path:
    folder = tmp_path_factory.mktemp("torchrun")
    return write_recipe(
        folder / "tiny.toml", tiny_llama_dir, write_texts(folder / "texts", n_lines=2000), tokens=120_000
    )


@pytest.fixture(scope="module", params=SEEDS)
def undisturbed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, recipe: Path) -> Path:
    """The root of a training by two ranks in one of the two ways, of which its name tells."""
    root = tmp_path_factory.mktemp("undisturbed") / request.param
    ended = run(root, recipe, request.param)
    assert ended.returncode == 0, ended.stderr
    assert f"2 ranks, --parallel {request.param}: " in ended.stderr
    assert ended.stdout.count("\n") == 1
    return root


def test_two_ranks_are_one_process(undisturbed: Path, recipe: Path, tmp_path: Path) -> None:
    mode, root = undisturbed.name, tmp_path / "one"
    words = (
        "train",
        "--no-controls",
        "--recipe",
        str(recipe),
        "--root",
        str(root),
        "--device",
        "cpu",
        "--seeds",
        *SEEDS[mode],
    )
    subprocess.run([sys.executable, "cli.py", *words], check=True, cwd=REPOSITORY, env=environment(None), timeout=1200)
    if mode == "seeds":
        same(undisturbed, root)
        return
    assert read_json(undisturbed / "run_a/run.json")["ranks"] == {"parallel": "data", "number": 2}
    one, other = (load_file(r / "run_a/sae.safetensors") for r in (root, undisturbed))
    for name in one:  # float32: near, for so short a training, but not the same
        assert float((one[name] - other[name]).norm() / one[name].norm()) < 0.2


def test_killed_and_run_again(undisturbed: Path, recipe: Path, tmp_path: Path) -> None:
    """A rank, torchrun itself, the other rank: killed with -9 some time after each of several files has appeared."""
    mode, root = undisturbed.name, tmp_path / "killed"
    rng = random.Random(mode)
    for victim, milestone in MILESTONES.items():
        before = set(root.glob(milestone))
        with begun(root, recipe, mode) as process:
            of_ranks = all_ranks(process)
            wait_for_file(process, root, milestone, before)
            time.sleep(rng.uniform(0, 0.1))
            assert process.poll() is None
            os.kill(process.pid if victim == "torchrun" else of_ranks[int(victim)], signal.SIGKILL)
            assert process.wait(60) != 0
            wait_for(partial(all_gone, of_ranks), seconds=30)
    ended = run(root, recipe, mode)
    assert ended.returncode == 0, ended.stderr
    same(root, undisturbed)


def test_an_error_is_told_once(recipe: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.toml"
    bad.write_text(recipe.read_text().replace('hookpoint = "layers.1', 'hookpoint = "layers.7'))
    ended = run(tmp_path / "root", bad, "data")
    assert ended.returncode != 0
    lines = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert "layers.7" in lines[0]
    assert ended.stdout.count("\n") == 1
    assert '"error": ' in ended.stdout


def test_one_job_at_a_time(recipe: Path, tmp_path: Path) -> None:
    """The lock is the job's: its ranks do not lock each other out, and another job does not get in."""
    root = tmp_path / "root"
    with begun(root, recipe, "seeds") as process:
        wait_for_file(process, root, MILESTONES["torchrun"])
        for rank in ranks(process).values():
            os.kill(rank, signal.SIGSTOP)
        ended = run(root, recipe, "seeds")
        of_ranks = ranks(process)
        for rank in of_ranks.values():
            os.kill(rank, signal.SIGKILL)
        process.wait(60)
    assert ended.returncode != 0
    lines = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert lines == ["error: another command is using study 'run'; wait for it, then run this command again"]
