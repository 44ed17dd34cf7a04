"""Every stage killed with `kill -9` again and again, and run to its end: what is on disk is as if nothing had been.

The moments are spread over the durable steps of the stage that is killed (see ``dying_cli``), the first and the
last among them; some deaths come a little after a step, in the middle of a computation. The `demo` chain is
killed from outside.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dying_cli import TOTAL
from fake_server import FakeServer
from tiny_study import journal, records, tree, write_recipe, write_texts

from sae.common.files import read_json, read_table

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

DYING = Path(__file__).with_name("dying_cli.py")
REPOSITORY = Path(__file__).parents[2]
KILLS = 3
MILESTONES = (
    "corpora/*/tokens.part",
    "demo_b/training-state/*.safetensors",
    "demo_a/firings/shards/*",
    "alignments/demo_a--demo_c.parquet",
    "alignments/behaviour/demo_a--demo_b.parquet",
    "demo_a/journal.sqlite",
)
STAGES: dict[str, tuple[str, ...]] = {
    "train": ("train", "--no-controls", "--seeds", "0", "1"),
    "harvest": ("harvest",),
    "align": ("align",),
    "explain": ("explain", "--sae", "run_a", "--latents", "30"),
    "score": ("score", "--sae", "run_a"),
}


class Here:
    """Where the undisturbed study lies, stage by stage, and how many durable steps each stage took."""

    def __init__(self, folder: Path, recipe: Path) -> None:
        self.folder, self.recipe = folder, recipe
        self.steps: dict[str, int] = {}

    def arguments(self, stage: str) -> tuple[str, ...]:
        return (*STAGES[stage], "--recipe", str(self.recipe)) if stage == "train" else STAGES[stage]

    def before(self, stage: str) -> Path:
        """The root as it was when ``stage`` began."""
        return self.folder / f"before-{stage}"

    def after(self, stage: str) -> Path:
        stages = [*STAGES, "end"]
        return self.before(stages[stages.index(stage) + 1])


def environment(recipe: Path | None) -> dict[str, str]:
    one = {"OMP_NUM_THREADS": "1"}  # so small a study gains nothing by more, and waits for them on a busy machine
    return {**os.environ, **one, **({} if recipe is None else {"DEMO_RECIPE": str(recipe)})}


def run(
    root: Path, *arguments: str, moment: int = 0, delay: float = 0.0, recipe: Path | None = None
) -> tuple[int, int]:
    """A command that dies at ``moment``. Returns its exit code (-9: killed) and how many durable steps it took.

    ``recipe`` stands in for the demo's.
    """
    ran = subprocess.run(
        [sys.executable, str(DYING), str(moment), str(delay), "--", *arguments, "--root", str(root)],
        capture_output=True,
        text=True,
        env=environment(recipe),
        timeout=1200,
    )
    assert ran.returncode in (0, -signal.SIGKILL), ran.stderr
    if ran.returncode:
        return ran.returncode, moment
    return 0, int(ran.stderr.rsplit(TOTAL, 1)[1])


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory, tiny_llama_dir: Path) -> Here:
    """The undisturbed study: the root is copied before every stage."""
    folder = tmp_path_factory.mktemp("kills")
    texts = write_texts(folder / "texts", n_lines=7000)  # three shards of a harvest
    found = Here(folder, write_recipe(folder / "small.toml", tiny_llama_dir, texts, checkpoint_steps=20))
    root = folder / "undisturbed"
    root.mkdir()
    for stage in STAGES:
        shutil.copytree(root, found.before(stage))
        _, found.steps[stage] = run(root, *found.arguments(stage))
    shutil.copytree(root, found.before("end"))
    return found


def contents(root: Path) -> dict[str, Any]:
    """All that later stages or readers may depend on, in a form that can be compared.

    Left out: times, what the activations were cached as (they are computed again when lacking), and the
    remembered hashes of the text files (which depend on how long ago these were written).
    """
    found: dict[str, Any] = {}
    for name, file_hash in tree(root).items():
        path = root / name
        if "/activations/" in name or path.name == "hashes.json":
            continue
        if path.name == "run.json":
            found[name] = {k: v for k, v in read_json(path).items() if k not in ("created", "git_commit", "digest")}
        elif path.suffix == ".parquet":
            found[name] = [{k: plain(v) for k, v in row.items()} for row in records(read_table(path))]
        else:
            found[name] = file_hash
    for path in sorted(root.glob("*/journal.sqlite")):
        stored = journal(path)
        found[str(path.relative_to(root))] = {
            "explanation": stored["explanation"],
            "verdict": [{k: v for k, v in row.items() if k != "id"} for row in stored["verdict"]],
        }
    return found


def plain(value: Any) -> Any:
    return [None if x != x else x for x in value.tolist()] if isinstance(value, np.ndarray) else value


def same(a: Path, b: Path) -> None:
    one, other = contents(a), contents(b)
    assert sorted(one) == sorted(other)
    for name in one:
        assert one[name] == other[name], name


def spread(n: int, kills: int) -> list[int]:
    """``kills`` moments from the first step to the last of ``n``."""
    return sorted({round(x) for x in np.linspace(1, n, kills)})


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_killed_from_one_beginning(stage: str, here: Here, tmp_path: Path) -> None:
    """Killed once, at each of several moments, and then run to its end."""
    assert here.steps[stage] >= KILLS
    for i, moment in enumerate(spread(here.steps[stage], KILLS)):
        root = Path(shutil.copytree(here.before(stage), tmp_path / f"{i}"))
        code, _ = run(root, *here.arguments(stage), moment=moment)
        assert code == -signal.SIGKILL
        run(root, *here.arguments(stage))
        same(root, here.after(stage))


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_killed_again_and_again(stage: str, here: Here, tmp_path: Path) -> None:
    """Killed a third of the way through what is left, each time a little after a step: in mid-computation."""
    root = Path(shutil.copytree(here.before(stage), tmp_path / "root"))
    moment = max(1, here.steps[stage] // 3)
    deaths = 0
    for delay in (0.03, 0.1, 0.0):
        code, _ = run(root, *here.arguments(stage), moment=moment, delay=delay)
        deaths += code != 0
    assert deaths >= 1
    run(root, *here.arguments(stage))
    same(root, here.after(stage))


def test_the_whole_demo_killed_from_outside(here: Here, tmp_path: Path) -> None:
    """`demo` from nothing to its report, killed from outside, some time after each of several files has appeared."""
    texts = here.folder / "texts"
    model = read_json(here.before("end") / "run_a" / "run.json")["subject"]["source"]
    recipe = write_recipe(tmp_path / "demo.toml", Path(model), texts, tokens=32_000, checkpoint_steps=20)
    undisturbed, root = tmp_path / "undisturbed", tmp_path / "killed"
    run(undisturbed, "demo", recipe=recipe)
    rng = random.Random(5)
    deaths = 0
    for milestone in MILESTONES:
        process = subprocess.Popen(
            [sys.executable, str(DYING), "0", "--", "demo", "--root", str(root)],
            env=environment(recipe),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while process.poll() is None and not any(root.glob(milestone)):
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.2))
        process.kill()
        deaths += process.wait() == -signal.SIGKILL
    assert deaths >= 4
    run(root, "demo", recipe=recipe)
    same(root, undisturbed)


def test_answers_of_a_language_model_survive(here: Here, tmp_path: Path) -> None:
    """Explaining and scoring with a language model: nothing that was answered is asked of the server again."""
    root = Path(shutil.copytree(here.before("explain"), tmp_path / "root"))
    explain = ("explain", "--sae", "run_a", "--latents", "12", "--concurrency", "3")
    score = ("score", "--sae", "run_a", "--concurrency", "3")
    with FakeServer() as server:
        there = ("--llm-url", server.url)
        undisturbed = Path(shutil.copytree(root, tmp_path / "undisturbed"))
        for command in (explain, score):
            run(undisturbed, *command, *there)
        needed = len(server.requests)
        server.requests.clear()
        for command in (explain, score):
            for moment in (25, 40):
                run(root, *command, *there, moment=moment)
            run(root, *command, *there)
        # What was under way when the process died is lost, at most one request for each slot and death.
        assert needed <= len(server.requests) <= needed + 4 * 3
    left_out = ("id", "explanation_id")  # the order in which answers come is the server's
    for table in ("explanation", "verdict"):
        one, other = (
            sorted(
                (
                    {k: v for k, v in row.items() if k not in left_out}
                    for row in journal(r / "run_a" / "journal.sqlite")[table]
                ),
                key=str,
            )
            for r in (root, undisturbed)
        )
        assert one == other
    columns = ["latent", "control", "judge", "status", "balanced_accuracy", "auroc", "n_active", "n_inactive"]
    tables = [read_table(r / "run_a" / "latents.scores.parquet")[columns] for r in (root, undisturbed)]
    one, other = (records(t.sort_values(["latent", "control", "judge"]).reset_index(drop=True)) for t in tables)
    assert one == other
