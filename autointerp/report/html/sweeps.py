"""The sweeps of a study's subject model, as `sweep` leaves them beside the reports: for figure 4 of the paper."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sae.errors import BadInput
from sae.files import SCHEMA, read_json


def sweeps_at(root: Path, fingerprint: str | None) -> list[dict[str, Any]]:
    """What ``reports/NAME.sweep.json`` say of the subject model with this fingerprint, by name; points in order.

    Per sweep: ``name``, ``axis`` (the first that was swept) and ``points``: ``at`` on the axis, ``name``, and for the
    definitions ``both`` and ``lenient`` the fraction shared, its ``interval`` and the largest by chance.
    """
    found = []
    for path in sorted((root / "reports").glob("*.sweep.json")):
        try:
            table = read_json(path)
            if table["schema"] != SCHEMA or table["subject"]["fingerprint"] != fingerprint:
                continue
            axis = next(iter(table["axes"]))
            points = [_point(point, axis) for point in table["points"] if point["shared"] is not None]
        except (ValueError, KeyError, TypeError, AttributeError, StopIteration):
            raise BadInput(f"{str(path)!r} is damaged; delete it and give `python cli.py sweep` again") from None
        if points:
            found.append({"name": str(table["sweep"]), "axis": axis, "points": points})
    return found


def _point(point: dict[str, Any], axis: str) -> dict[str, Any]:
    shared = {}
    for name in ("both", "lenient"):
        of = point["shared"][name]
        chance = [value for value in of["null"].values() if value is not None]
        shared[name] = {"value": of["value"], "interval": of["interval"], "chance": max(chance, default=None)}
    return {"name": point["name"], "at": point["values"][axis], **shared}
