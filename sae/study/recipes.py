"""Read settings from a recipe: a TOML file with the tables of :class:`sae.settings.Settings`.

A recipe with a ``[sweep]`` table is a sweep, which makes one study per point of a grid of settings:

    [sweep]
    training.num_latents = [256, 512, 1024]
    training.learning_rate = [8e-3, 5.6e-3, 4e-3]
    together = ["training.num_latents", "training.learning_rate"]
    seeds = [0, 1, 2]

Every list is an axis. Axes are crossed, but those in ``together`` advance together. Each point is a study named after
the sweep and its values (``widths_m256``); all read one stream of activations.
"""

from __future__ import annotations

import itertools
import math
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from sae.common.amounts import human, parse_amount
from sae.common.commands import shell_command
from sae.common.errors import BadInput, NotFound, suggest
from sae.common.files import check_regular
from sae.common.package_data import bundled_recipes
from sae.dictionaries.architectures import ARCHITECTURES
from sae.settings import Settings, validated
from sae.study.run import Study, check_name, label_hookpoint

_LARGEST = 1 << 20  # characters
_MOST_POINTS = 1000
_DEEP = re.compile(r"(\.[\w\"'-]{0,100}){100}")


def read_recipe(path: Path) -> dict[str, Any]:
    """Return the tables of a recipe file, or of a bundled recipe such as ``demo``, not yet validated."""
    bundled = bundled_recipes()
    file = path if path.is_file() else bundled.get(str(path), path)
    check_regular(file, "recipe")
    try:
        text = file.read_text(encoding="utf-8-sig")
        if len(text) > _LARGEST or _DEEP.search(text):  # tomllib needs the square of a key's parts in time
            raise ValueError("it is too long or too deep")
        values = tomllib.loads(text)
    except FileNotFoundError:
        nearby = [str(p) for p in path.parent.glob("*.toml")] if path.parent.is_dir() else []
        hint = f"; there is {suggest(str(path), nearby)}" if nearby else ""
        raise NotFound(f"recipe {str(path)!r} does not exist{hint}; bundled recipes: {', '.join(bundled)}") from None
    except (ValueError, RecursionError) as error:
        raise BadInput(f"recipe {str(path)!r} is not valid TOML: {error}") from None
    if not values:
        raise BadInput(f"recipe {str(path)!r} is empty; begin with a copy of a bundled one: {', '.join(bundled)}")
    return values


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


class Axis(NamedTuple):
    """A setting that a sweep may vary."""

    table: str
    key: str
    sign: str  # before the value in a point's name
    words: str

    def label(self, value: Any) -> str:
        """Format a value for a name: ``m256``, ``t1.5M``, ``relu``."""
        if self.key == "learning_rate":
            return f"{self.sign}{value:g}"
        if self.key == "target":
            return f"to-{label_hookpoint(str(value))}" if value else "sae"
        if self.key == "skip":
            return "skip" if value else ""
        if self.key == "hookpoint":
            return label_hookpoint(str(value))
        if self.key != "tokens":
            return f"{self.sign}{value}"
        short = human(value)
        return f"{self.sign}{short if parse_amount(short) == value else value}"


AXES = {
    "subject.hookpoint": Axis("subject", "hookpoint", "", "hookpoint"),
    "subject.target": Axis("subject", "target", "", "target"),
    "training.skip": Axis("training", "skip", "", "skip connection"),
    "training.num_latents": Axis("training", "num_latents", "m", "width"),
    "training.k": Axis("training", "k", "k", "k"),
    "training.tokens": Axis("training", "tokens", "t", "training tokens"),
    "training.architecture": Axis("training", "architecture", "", "architecture"),
    "training.learning_rate": Axis("training", "learning_rate", "lr", "learning rate"),
}

_ALWAYS_NAMED = ("subject.target", "training.skip")  # of axes that advance together

_OTHER_TABLES = ("sweep", "explain")  # of a recipe, which are not settings of a run


class Point(NamedTuple):
    """One setting of a sweep."""

    study: Study
    at: dict[str, Any]  # axis → value


@dataclass(frozen=True)
class Sweep:
    """A recipe's sweep."""

    name: str
    axes: dict[str, tuple[Any, ...]]
    together: tuple[str, ...]  # axes that advance together
    seeds: tuple[int, ...]
    points: tuple[Point, ...]
    explain: Mapping[str, Any] | None  # the recipe's ``[explain]``, not yet validated

    @property
    def studies(self) -> list[Study]:
        return [point.study for point in self.points]

    @property
    def tokens(self) -> int:
        """Tokens of the stream: those of the longest training."""
        return max(study.settings.training.tokens for study in self.studies)

    @property
    def trained_tokens(self) -> int:
        """Training tokens of all SAEs together."""
        return sum(study.settings.training.tokens * len(study.seeds) for study in self.studies)

    def describe(self) -> str:
        n, s = len(self.points), len(self.seeds)
        return f"{n} points × {s} seed{'s' * (s > 1)} = {n * s} SAEs"


def read_sweep(path: Path, name: str | None = None, seeds: Sequence[int] = ()) -> Sweep:
    """Read the sweep of a recipe. ``name`` and ``seeds`` default to the file's name and the recipe's seeds."""
    recipe, where = read_recipe(path), f"recipe {str(path)!r}"
    if not isinstance(recipe.get("sweep"), dict):
        known = [*Settings.model_fields, *_OTHER_TABLES]
        if unknown := next((key for key in recipe if key not in known), None):
            raise BadInput(f"{where}: unknown key {unknown!r}; did you mean {suggest(unknown, known)}?")
        raise BadInput(f"{where} has no [sweep] table; add one, or train it with `{shell_command('train')}`")
    table = dict(recipe["sweep"])
    together = table.pop("together", [])
    if not isinstance(together, list) or len(together) == 1 or not all(isinstance(axis, str) for axis in together):
        raise BadInput(f"{where}: together = {together!r} in [sweep]; give a list of at least two axes")
    chosen = tuple(seeds) or _seeds(table.pop("seeds", [0, 1, 2]), where)
    table.pop("seeds", None)
    axes = _axes(table, where)
    name = check_name(name or path.stem)
    base = {key: value for key, value in recipe.items() if key not in _OTHER_TABLES}
    points = [_point(name, at, base, chosen, frozenset(together[1:]), where) for at in _grid(axes, together, where)]
    names = [point.study.name for point in points]
    twice = next((n for n in names if names.count(n) > 1), None)
    if twice is not None:
        raise BadInput(f"{where}: two points are called {twice!r}; give the first axis of `together` distinct values")
    explain = recipe.get("explain")
    if explain is not None and not isinstance(explain, dict):
        raise BadInput(f"{where}: explain = {explain!r} is not a table; write [explain] and keys below it")
    # Of a dataset, all points read the same tokens.
    most = max(point.study.settings.most_tokens for point in points)
    studies = [replace(p.study, settings=p.study.settings.limit_dataset(most)) for p in points]
    points = [Point(study, point.at) for study, point in zip(studies, points, strict=True)]
    return Sweep(name, axes, tuple(together), chosen, tuple(points), explain)


def _axes(table: Mapping[str, Any], where: str) -> dict[str, tuple[Any, ...]]:
    found = {}
    for prefix, keys in table.items():
        for key, values in keys.items() if isinstance(keys, dict) else [("", keys)]:
            name = f"{prefix}.{key}" if key else prefix
            if name not in AXES:
                known = ", ".join(AXES)
                raise BadInput(f"{where}: unknown axis {name!r} in [sweep]; give seeds, together, or an axis: {known}")
            found[name] = _values(name, values, where)
    if not found:
        raise BadInput(f"{where}: [sweep] has no axis; give one such as training.num_latents = [256, 512]")
    return found


def _values(name: str, values: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(values, list) or len(values) < 2:
        raise BadInput(
            f"{where}: axis {name} = {values!r} does not vary; give a list of at least two values, "
            f"or set it in [{AXES[name].table}]"
        )
    read = []
    for value in values:
        try:
            amount = AXES[name].key in ("tokens", "num_latents", "k") and isinstance(value, str)
            read.append(parse_amount(value) if amount else value)
        except ValueError as error:
            raise BadInput(f"{where}: axis {name}: {error}") from None
    return tuple(read)


def _seeds(values: Any, where: str) -> tuple[int, ...]:
    if not isinstance(values, list) or not values or not all(type(v) is int and v >= 0 for v in values):
        raise BadInput(f"{where}: seeds = {values!r} in [sweep]; give a list of whole numbers, such as [0, 1, 2]")
    if len(set(values)) < len(values):
        raise BadInput(f"{where}: seeds = {values!r} in [sweep] has a seed twice; give each once")
    return tuple(values)


def _grid(axes: Mapping[str, tuple[Any, ...]], together: list[str], where: str) -> list[dict[str, Any]]:
    unknown = [name for name in together if name not in axes]
    if unknown:
        raise BadInput(f"{where}: together names {unknown[0]!r}, not an axis of [sweep]; give {', '.join(axes)}")
    lengths = {name: len(axes[name]) for name in together}
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"{name} {n}" for name, n in lengths.items())
        raise BadInput(f"{where}: axes in `together` need the same number of values, but have {listed}")
    free = [name for name in axes if name not in together[1:]]
    if (points := math.prod(len(axes[name]) for name in free)) > _MOST_POINTS:
        raise BadInput(f"{where}: [sweep] has {points} points; give at most {_MOST_POINTS}")
    for name, values in axes.items():
        twice = next((v for v in values if values.count(v) > 1), None)
        unnamed = together if set(together) & set(_ALWAYS_NAMED) else together[1:]  # others tell the points apart
        if twice is not None and name not in unnamed:
            raise BadInput(f"{where}: axis {name} has {twice!r} twice; give each value once")
    steps = [range(len(axes[name])) for name in free]
    grid = []
    for place in itertools.product(*steps):
        at = dict(zip(free, place, strict=True))
        grid.append({name: values[at[together[0] if name in together else name]] for name, values in axes.items()})
    return grid


def _point(
    name: str,
    values: dict[str, Any],
    base: Mapping[str, Any],
    seeds: tuple[int, ...],
    silent: frozenset[str],
    where: str,
) -> Point:
    merged = {table: dict(keys) if isinstance(keys, dict) else keys for table, keys in base.items()}
    for axis, value in values.items():
        table = merged.setdefault(AXES[axis].table, {})
        if isinstance(table, dict):  # otherwise validation reports it
            table[AXES[axis].key] = value
    settings = check_architecture(validated(merged, where), where)
    labels = [AXES[axis].label(value) for axis, value in values.items() if axis not in silent or axis in _ALWAYS_NAMED]
    label = "_".join([name, *filter(None, labels)])
    return Point(Study(check_name(label), settings, seeds), values)
