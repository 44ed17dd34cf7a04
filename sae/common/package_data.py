"""Where the files that come with the program lie: in a wheel inside its packages, in a checkout at the top.

``pyproject.toml`` says which folder of the checkout goes where in the wheel.
"""

from __future__ import annotations

from pathlib import Path

TOP = Path(__file__).resolve().parents[2]
"""The checkout, or the ``site-packages`` that the wheel was installed into."""
IS_CHECKOUT = not (TOP / "sae" / "_recipes").is_dir()
"""Whether the program runs from its repository (also as an editable install)."""


def data_folder(packaged: str, in_checkout: str) -> Path:
    """Return a folder of data files, of which the wheel and the checkout each have their own path below the top."""
    return TOP / (in_checkout if IS_CHECKOUT else packaged)


RECIPES = data_folder(packaged="sae/_recipes", in_checkout="eval_runs/recipes")


def bundled_recipes() -> dict[str, Path]:
    """Return the recipes that come with the program, by name."""
    return {path.stem: path for path in sorted(RECIPES.glob("*.toml"))}


def shown_path(path: Path) -> str:
    """Return a bundled file's path for a message: relative to the checkout, or the whole path of an installed file."""
    return path.relative_to(TOP).as_posix() if IS_CHECKOUT else str(path)
