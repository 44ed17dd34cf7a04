"""The wheel and an editable install, in an environment of their own and from an empty folder.

The environment borrows the packages of this one, so nothing is downloaded.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
REPOSITORY = Path(__file__).parents[2]
SMALL = [
    "--hookpoint",
    "layers.2.mlp",
    "--context",
    "128",
    "--num-latents",
    "256",
    "--k",
    "4",
    "--tokens",
    "50k",
    "--batch-tokens",
    "2048",
]
NOTEBOOK = """
from autointerp import Run
run = Run.open("run_a")
assert len(run.latents()) == 256 and len(run.explanations()) >= 5
"""


class Installed:
    """An environment that has the program, and an empty folder to use it in."""

    def __init__(self, folder: Path, *what: str) -> None:
        venv.create(folder / "venv", with_pip=False)
        self.bin, self.work = folder / "venv" / "bin", folder / "work"
        self.work.mkdir()
        (site,) = (folder / "venv" / "lib").glob("python*/site-packages")
        borrowed = [path for path in sys.path if Path(path).name == "site-packages"]
        (site / "borrowed.pth").write_text("\n".join(borrowed) + "\n")
        pip = [sys.executable, "-m", "pip", "--python", str(self.bin / "python"), "install", "--no-deps", "--no-index"]
        subprocess.run([*pip, "--ignore-installed", "--no-build-isolation", *what], check=True, timeout=1200)

    def run(self, *words: object) -> subprocess.CompletedProcess[str]:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        command = [str(self.bin / str(words[0])), *map(str, words[1:])]
        return subprocess.run(
            command, cwd=self.work, env=environment, capture_output=True, text=True, timeout=600, check=False
        )

    def well(self, *words: object) -> str:
        ran = self.run(*words)
        assert ran.returncode == 0, f"{words}\n{ran.stdout}\n{ran.stderr}"
        return ran.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """The wheel that pip builds of the checkout, installed."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", str(folder / "dist")]
    subprocess.run([*build, str(REPOSITORY)], check=True, timeout=1200)
    (built,) = (folder / "dist").iterdir()
    return Installed(folder, str(built))


def test_help_and_module_run_in_an_empty_folder(wheel: Installed) -> None:
    assert "Usage: autointerp " in wheel.well("autointerp", "--help")
    assert "cli.py" not in wheel.well("autointerp", "train", "--help")
    assert "$ python -m autointerp demo" in wheel.well("python", "-m", "autointerp", "runs")
    assert not list(wheel.work.iterdir())


def test_neither_sees_a_module_called_cli(wheel: Installed) -> None:
    (wheel.work / "cli.py").write_text("raise SystemExit('not ours')\n")
    try:
        wheel.well("python", "-m", "autointerp", "--help")
    finally:
        (wheel.work / "cli.py").unlink()


def test_bundled_recipes_have_names(wheel: Installed) -> None:
    points = json.loads(wheel.well("autointerp", "sweep", "tokens", "--dry-run", "--json", "--threads", 1))
    assert points["command"] == "sweep"
    missing = wheel.run("autointerp", "train", "--recipe", "eval_runs/recipes/demo.toml")
    assert missing.returncode == 1
    assert "does not exist; bundled recipes: architectures, demo, ks" in missing.stderr


def test_a_small_study_runs_from_training_to_report(wheel: Installed) -> None:
    seeds = ("--seeds", 0, 1, "--no-controls", "--threads", 1)
    wheel.well("autointerp", "train", "--name", "run", *seeds, *SMALL)
    assert (wheel.work / "eval_runs" / "run_a" / "sae.safetensors").is_file()
    assert json.loads((wheel.work / "eval_runs" / "run_a" / "run.json").read_text())["git_commit"] is None
    wheel.well("autointerp", "harvest", "--tokens", "100k", "--threads", 1)
    wheel.well("autointerp", "align", "--threads", 1)
    wheel.well("autointerp", "explain", "--latents", 5)
    wheel.well("autointerp", "score")
    shown = wheel.well("autointerp", "report")
    assert "$ autointerp " in shown
    assert "cli.py" not in shown
    assert "run_a.html" in wheel.well("autointerp", "report", "--html")
    wheel.well("python", "-c", NOTEBOOK)


def test_an_editable_install_reads_the_checkout(tmp_path: Path) -> None:
    editable = Installed(tmp_path, "-e", str(REPOSITORY))
    code = "from sae.common.package_data import IS_CHECKOUT, TOP; print(IS_CHECKOUT, TOP)"
    assert editable.well("python", "-c", code).split() == ["True", str(REPOSITORY)]
    assert "Usage: autointerp " in editable.well("autointerp", "--help")
    assert "$ autointerp demo" in editable.well("autointerp", "runs")
