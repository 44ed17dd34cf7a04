"""Find the data files of the program: inside the packages of a wheel, or at the top of a checkout (pyproject.toml)."""

from __future__ import annotations

from pathlib import Path

TOP = Path(__file__).resolve().parents[2]  # the checkout, or the ``site-packages`` that the wheel was installed into
IS_CHECKOUT = not (TOP / "sae" / "_recipes").is_dir()  # also true of an editable install


def data_folder(packaged: str, in_checkout: str) -> Path:
    """Return a folder of data files, from its path in the wheel and its path in the checkout."""
    return TOP / (in_checkout if IS_CHECKOUT else packaged)


RECIPES = data_folder(packaged="sae/_recipes", in_checkout="eval_runs/recipes")


def bundled_recipes() -> dict[str, Path]:
    return {path.stem: path for path in sorted(RECIPES.glob("*.toml"))}


def shown_path(path: Path) -> str:
    """Return a bundled file's path for a message: relative in a checkout, else absolute."""
    return path.relative_to(TOP).as_posix() if IS_CHECKOUT else str(path)
