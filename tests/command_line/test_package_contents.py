"""The wheel and the source distribution hold every file that the program opens, and nothing else.

``tests/slow/test_installed.py`` installs them and runs the program.
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterable
from pathlib import Path

import pytest

import cli as program
from autointerp.llm.prompts import conversation

REPOSITORY = Path(program.__file__).parent
METADATA = {"METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE"}

READ_ALL = """
import sys
from pathlib import Path
from autointerp.llm import prompts
from autointerp.command_line.demo import RECIPE
from sae.common.package_data import IS_CHECKOUT, TOP, bundled_recipes
from sae.study.recipes import read_recipe, settings_from
from sae.activations.bundled import BUNDLED
from sae.text.stdlib import MANIFEST

assert TOP == Path(sys.argv[1]).resolve() and not IS_CHECKOUT
assert (BUNDLED / "model.safetensors").stat().st_size > 1e6 and MANIFEST.is_file()
settings_from(RECIPE)
print(*bundled_recipes(), *(read_recipe(Path(name)) and name for name in bundled_recipes()))
examples = "_examples.toml"
names = [path.name.removesuffix(examples) for path in prompts.FOLDER.glob("*" + examples)]
print(*sorted(prompts.conversation(name).hash for name in names))
"""


def build(source: Path, to: Path, *targets: str) -> list[Path]:
    """Build ``targets`` (sdist, wheel) of the project in ``source``, without a download."""
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(to), *(w for t in targets for w in ("-t", t))]
    subprocess.run(command, cwd=source, check=True, capture_output=True, timeout=1200)
    return sorted(to.iterdir())


def below(folder: Path, name: str) -> Iterable[tuple[str, Path]]:
    """Each source file below ``folder``, with its path when ``folder`` is called ``name``."""
    for path in folder.rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            yield f"{name}/{path.relative_to(folder).as_posix()}", path


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The sdist and the wheel of this checkout."""
    sdist, wheel = sorted(
        build(REPOSITORY, tmp_path_factory.mktemp("dist"), "sdist", "wheel"), key=lambda path: path.suffix
    )
    return sdist, wheel


def test_the_wheel_holds_every_file_and_no_other(built: tuple[Path, Path]) -> None:
    expected = {
        **dict(below(REPOSITORY / "autointerp", "autointerp")),
        **dict(below(REPOSITORY / "sae", "sae")),
        **dict(below(REPOSITORY / "prompts", "autointerp/_prompts")),
        **dict(below(REPOSITORY / "eval_runs" / "recipes", "sae/_recipes")),
        "autointerp/_cli.py": REPOSITORY / "cli.py",
    }
    with zipfile.ZipFile(built[1]) as wheel:
        names = set(wheel.namelist())
        metadata = {name for name in names if ".dist-info/" in name}
        assert names - metadata == set(expected)
        assert {name.split("/", 1)[1] for name in metadata} == METADATA
        assert all(wheel.read(name) == path.read_bytes() for name, path in expected.items())


def test_the_sdist_builds_the_same_wheel(built: tuple[Path, Path], tmp_path: Path) -> None:
    sdist, wheel = built
    with tarfile.open(sdist) as packed:
        packed.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    assert not {"tests", "benchmarks", "docs"} & {path.name for path in source.iterdir()}
    (again,) = build(source, tmp_path / "dist", "wheel")
    assert again.read_bytes() == wheel.read_bytes()


def test_the_unpacked_wheel_reads_all_its_files(
    built: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed, empty = tmp_path / "installed", tmp_path / "empty"
    empty.mkdir()
    with zipfile.ZipFile(built[1]) as wheel:
        wheel.extractall(installed)
    monkeypatch.setenv("PYTHONPATH", str(installed))

    def ran(*words: object) -> str:
        command = [sys.executable, *map(str, words)]
        done = subprocess.run(command, cwd=empty, capture_output=True, text=True, timeout=1200)
        assert done.returncode == 0, done.stderr
        return done.stdout

    recipes, conversations = ran("-c", READ_ALL, installed).splitlines()
    assert recipes.split() == 2 * sorted(path.stem for path in (REPOSITORY / "eval_runs" / "recipes").iterdir())
    names = [path.name.removesuffix("_examples.toml") for path in (REPOSITORY / "prompts").glob("*_examples.toml")]
    assert conversations.split() == sorted(conversation(name).hash for name in names)
    assert ran("-m", "autointerp", "--help").startswith("Usage: python -m autointerp ")
    assert not list(empty.iterdir())
