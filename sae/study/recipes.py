"""Read settings from a recipe: a TOML file with the tables of :class:`sae.settings.Settings`."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from sae.common.commands import shell_command
from sae.common.errors import BadInput, NotFound, suggest
from sae.common.package_data import bundled_recipes
from sae.dictionaries.architectures import ARCHITECTURES
from sae.settings import Settings, validated


def read_recipe(path: Path) -> dict[str, Any]:
    """Return the tables of a recipe file, or of a bundled recipe such as ``demo``, not yet validated."""
    bundled = bundled_recipes()
    file = path if path.is_file() else bundled.get(str(path), path)
    try:
        return tomllib.loads(file.read_text())
    except FileNotFoundError:
        nearby = [str(p) for p in path.parent.glob("*.toml")] if path.parent.is_dir() else []
        hint = f"; there is {suggest(str(path), nearby)}" if nearby else ""
        raise NotFound(f"recipe {str(path)!r} does not exist{hint}; bundled recipes: {', '.join(bundled)}") from None
    except OSError as error:
        raise BadInput(f"recipe {str(path)!r} cannot be read: {(error.strerror or '').lower()}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadInput(f"recipe {str(path)!r} is not valid TOML: {error}") from None


def settings_from(recipe: Path | None, known: Settings | None = None, **tables: dict[str, Any]) -> Settings:
    """Return the given values over those of a recipe, else of an existing study (``known``), else the defaults."""
    if recipe is None:
        return check_architecture((known or Settings()).with_values(**tables), "the command line")
    values = read_recipe(recipe)
    if "sweep" in values:
        raise BadInput(f"recipe {str(recipe)!r} describes a sweep; give it to `{shell_command('sweep', str(recipe))}`")
    return check_architecture(validated(values, f"recipe {str(recipe)!r}").with_values(**tables), str(recipe))


def check_architecture(settings: Settings, where: str) -> Settings:
    """Return ``settings``, or raise :class:`BadInput` if their architecture has no file."""
    name = settings.training.architecture
    if name not in ARCHITECTURES:
        raise BadInput(
            f"{where}: training.architecture = {name!r} is not known; choose {suggest(name, ARCHITECTURES)} "
            "(the files in sae/dictionaries/architectures)"
        )
    return settings
