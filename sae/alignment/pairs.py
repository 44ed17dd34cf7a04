"""Read and write the tables about two runs, with a row per latent of each: one file per pair."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from sae.common.commands import command
from sae.common.errors import BadInput, NotFound, suggest
from sae.common.files import read_table, table_metadata, write_table

Sides = tuple[pd.DataFrame, pd.DataFrame]


def pair_path(folder: Path, a: str, b: str) -> Path | None:
    """Return the path of a pair's table, whichever of the two was named first; ``None`` if there is none."""
    both = (folder / f"{a}--{b}.parquet", folder / f"{b}--{a}.parquet")
    return next((path for path in both if path.exists()), None)


def pair_inputs(folder: Path, a: str, b: str) -> Any:
    """Return the ``inputs`` that the pair's table was made from, ``None`` if there is none; others make it stale."""
    path = pair_path(folder, a, b)
    return table_metadata(path).get("inputs") if path else None


def write_sides(path: Path, names: tuple[str, str], sides: Sides, **metadata: Any) -> None:
    """Write both sides as one table with a first column ``run``."""
    named = [side.assign(run=name) for name, side in zip(names, sides, strict=True)]
    table = pd.concat(named, ignore_index=True)
    write_table(path, table[["run", *(c for c in table if c != "run")]], runs=list(names), **metadata)


def read_sides(folder: Path, a: str, b: str, columns: Sequence[str] | None = None) -> Sides:
    """Read the table of two runs as seen from ``a`` and from ``b``; of ``columns``, those that it has."""
    path = pair_path(folder, a, b)
    if path is None:
        known = [p.stem for p in folder.glob("*--*.parquet")]
        hint = f"; there is {suggest(f'{a}--{b}', known)}" if known else ""
        raise NotFound(f"{a!r} and {b!r} are not aligned yet{hint}; run `{command(folder.parent, 'align', a, b)}`")
    try:
        table = read_table(path, None if columns is None else ["run", *columns])
        one, other = (table[table["run"] == name].drop(columns="run").reset_index(drop=True) for name in (a, b))
    except (BadInput, OSError, ValueError, KeyError):
        again = command(folder.parent, "align", a, b)
        raise BadInput(f"{str(path)!r} cannot be read; delete it and run `{again}`") from None
    return one, other
