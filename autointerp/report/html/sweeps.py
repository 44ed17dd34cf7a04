"""The sweeps of a study's subject model, as `sweep` leaves them beside the reports: for figure 4 of the paper."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from autointerp.findings.sweep_table import sweeps_of


def sweeps_at(root: Path, subject: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What the sweeps of the subject model under ``root`` say, by name; points in order.

    Per sweep: ``name``, ``axis`` (the first that was swept) and ``points``: ``at`` on the axis, ``name``, and for the
    definitions ``both`` and ``lenient`` the fraction shared, its ``interval`` and the largest by chance.
    """
    found = []
    for table in sorted(sweeps_of(root, subject), key=lambda table: str(table["sweep"])):
        axis = next(iter(table["axes"]))
        points = [_point(point, axis) for point in table["points"] if point["shared"] is not None]
        if points:
            found.append({"name": str(table["sweep"]), "axis": axis, "points": points})
    return found


def _point(point: dict[str, Any], axis: str) -> dict[str, Any]:
    shared = {}
    for name in ("both", "lenient"):
        of = point["shared"][name]
        shared[name] = {"value": of["value"], "interval": of["interval"], "chance": of["null"].get("rotated")}
    return {"name": point["name"], "at": point["values"][axis], **shared}
