"""The paper's findings about settings: width, k, training tokens, architecture. Measured on sweeps.

A slope is the change when the setting doubles: that of a least-squares line over its logarithm to base 2. In a sweep
over several settings, each combination of the others has its own level. Intervals: a jackknife over the common seeds,
widened to the points' bootstraps over latents, with the points taken as independent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from autointerp.findings.paper.finding import SIGNED, UNDECIDED, About, Finding, against, estimate_of, every
from autointerp.findings.paper.intervals import LATENTS, SEEDS, jackknife, normal, standard_error, wider
from sae.common.amounts import decimal, estimate
from sae.common.estimate import UNKNOWN, Estimate

Rows = Sequence[Mapping[str, Any]]
L0_WITHIN = 0.1
"""Architectures are compared if their mean L0 is within this fraction of TopK's."""
_MORE_STABLE = {"relu": "ReLU + L1", "gated": "Gated"}

ABOUT = {
    "width": About(
        "width",
        "overlap falls as width grows, strict and lenient",
        "−.047 per doubling (same partner −.024): .813 at 32 latents, .416 at 32,768, .276 at 131,072",
        "change of the fraction shared (both) when the width doubles",
        SIGNED,
    ),
    "k": About(
        "k",
        "overlap falls as k grows",
        "−.079 per doubling: .416 at k 32, .177 at k 256",
        "change of the fraction shared (both) when k doubles",
        SIGNED,
    ),
    "tokens": About(
        "tokens",
        "overlap grows with training tokens",
        "+.081 per doubling: .073 at 0.8B, .416 at 8B, .612 at 80B",
        "change of the fraction shared (both) when the training doubles",
        SIGNED,
    ),
    "architecture": About(
        "architecture",
        "ReLU + L1 and Gated are more stable than TopK",
        "decoder alone: Gated .856, L1 .824, TopK .742",
        "fraction shared (decoder), mean of ReLU + L1 and Gated, less TopK's",
        SIGNED,
    ),
}
AXES = {
    "width": "training.num_latents",
    "k": "training.k",
    "tokens": "training.tokens",
    "architecture": "training.architecture",
}
"""finding → the axis of a sweep that it needs"""
SLOPES = {"width": (("both", "lenient"), -1), "k": (("both",), -1), "tokens": (("both",), 1)}
"""finding → the definitions whose slopes are tested, and the sign that the paper reports"""


def findings_of_sweeps(
    sweeps: Sequence[Mapping[str, Any]], advice: Callable[[str], tuple[str, str | None]]
) -> list[Finding]:
    """Return the four rows, each from the first of ``sweeps`` over its axis.

    ``advice`` maps a finding's id to the words and the command (or ``None``) that would provide its data.
    """
    found = []
    for name, axis in AXES.items():
        sweep = next((s for s in sweeps if axis in s["axes"]), None)
        if sweep is None:
            words, command = advice(name)
            found.append(ABOUT[name].missing(f"there is no sweep over {axis} of this subject{words}", command))
        else:
            found.append(finding_of_sweep(name, sweep))
    return found


def finding_of_sweep(name: str, sweep: Mapping[str, Any]) -> Finding:
    """Return the finding called ``name`` from a sweep over its axis."""
    rows = [row for row in sweep["points"] if row["shared"] is not None]
    return architecture_finding(sweep, rows) if name == "architecture" else slope_finding(name, sweep, rows)


def slope_finding(name: str, sweep: Mapping[str, Any], rows: Rows) -> Finding:
    """Agrees if the slope of the fraction shared, under each definition of :data:`SLOPES`, has the paper's sign.

    The whole interval counts. Disagrees if all have the other sign.
    """
    axis, (definitions, sign) = AXES[name], SLOPES[name]
    slopes = {definition: slope(sweep, rows, axis, definition) for definition in definitions}
    both, method = slopes["both"]
    tested = f"{'both slopes ' if len(slopes) > 1 else ''}{'above' if sign > 0 else 'below'} 0"
    same = ""
    if "lenient" in slopes:
        same = f"same partner {_signed(slopes['lenient'][0])}; {_ends(rows, axis, 'lenient')}; "
    why = f"tested: {tested}; {_ends(rows, axis, 'both')}; {same}{_made(sweep, method)}"
    return ABOUT[name].row(both, every([against(found, 0, sign) for found, _ in slopes.values()]), why)


def architecture_finding(sweep: Mapping[str, Any], rows: Rows) -> Finding:
    """Agrees if ReLU + L1 and Gated each share more than TopK by decoder, disagrees if each shares less.

    The whole interval of each difference counts, over the other settings at which all three were trained; each must
    have an L0 within :data:`L0_WITHIN` of TopK's. The value is the mean of the two differences.
    """
    axis, about = AXES["architecture"], ABOUT["architecture"]
    rows, lacking = _trained_alike(sweep, rows, axis, ("topk", *_MORE_STABLE))
    if lacking:
        return about.missing(f"sweep {sweep['sweep']} has {lacking}", None)
    topk = [row for row in rows if row["values"][axis] == "topk"]
    others = {kind: [row for row in rows if row["values"][axis] == kind] for kind in _MORE_STABLE}
    found = {kind: _difference(rows, of, topk) for kind, of in others.items()}
    mean, method = _difference(rows, [row for of in others.values() for row in of], topk)
    apart = [
        f"{_MORE_STABLE[kind]} L0 {row['l0']:.2f} against {base['l0']:.2f}"
        for kind, of in others.items()
        for row in of
        for base in topk
        if _others(sweep, row, axis) == _others(sweep, base, axis) and abs(row["l0"] / base["l0"] - 1) > L0_WITHIN
    ]
    differences = ", ".join(f"{_MORE_STABLE[kind]} {_signed(e)}" for kind, (e, _) in found.items())
    fvu = ", ".join(
        f"{row['values'][axis]} {decimal(row['fvu'])}" for row in (*topk, *(r for of in others.values() for r in of))
    )
    if apart:
        return about.row(mean, UNDECIDED, f"L0 is not matched: {'; '.join(apart)}; {differences}; FVU {fvu}")
    why = f"tested: each above 0; {differences}; FVU {fvu}; {_made(sweep, method)}"
    return about.row(mean, every([against(e) for e, _ in found.values()]), why)


# --- figures -------------------------------------------------------------------------------------------------------


def slope(sweep: Mapping[str, Any], rows: Rows, axis: str, definition: str) -> tuple[Estimate, str]:
    """Return the change of the fraction shared when the axis doubles, and the method of its interval."""
    x = np.log2([float(row["values"][axis]) for row in rows]) if rows else np.empty(0)
    weight = _slope_weights(x, [_others(sweep, row, axis) for row in rows])
    return _combined(rows, weight, definition)


def _slope_weights(x: np.ndarray, groups: Sequence[Any]) -> np.ndarray | None:
    """Return the weights of the points [n] in a least-squares slope with a level per group; ``None`` if x is fixed."""
    centred = x.copy()
    for group in set(groups):
        inside = np.array([other == group for other in groups])
        centred[inside] -= x[inside].mean()
    total = float(centred @ centred)
    return centred / total if total > 1e-12 else None


def _trained_alike(sweep: Mapping[str, Any], rows: Rows, axis: str, kinds: Sequence[str]) -> tuple[Rows, str]:
    """Return the rows with other settings at which all ``kinds`` were trained, or say what is lacking."""
    at = {kind: {_others(sweep, row, axis) for row in rows if row["values"][axis] == kind} for kind in kinds}
    if none := [kind for kind, settings in at.items() if not settings]:
        return [], f"no {' and no '.join(none)}"
    common = set.intersection(*at.values())
    kept = [row for row in rows if row["values"][axis] in kinds and _others(sweep, row, axis) in common]
    return kept, "" if kept else f"no settings at which {', '.join(kinds)} were all trained"


def _difference(rows: Rows, of: Rows, less: Rows) -> tuple[Estimate, str]:
    """Return the mean of some rows less that of others, by the decoder definition, with equal weights."""
    weight = np.zeros(len(rows))
    for part, sign in ((of, 1.0), (less, -1.0)):
        for i, row in enumerate(rows):
            weight[i] += sign / len(part) * sum(row is other for other in part)
    return _combined(rows, weight, "decoder")


def _combined(rows: Rows, weight: np.ndarray | None, definition: str) -> tuple[Estimate, str]:
    """Return a weighted sum of the points' fractions with its interval (see the module docstring)."""
    if weight is None or any(row["shared"][definition]["value"] is None for row in rows):
        return UNKNOWN, LATENTS
    estimates = [estimate_of(row["shared"][definition]["value"], row["shared"][definition]["interval"]) for row in rows]
    value = float(weight @ [e.value for e in estimates])
    error = math.sqrt(float(weight**2 @ [standard_error(e) ** 2 for e in estimates]))
    of_latents = normal(value, error)
    common = sorted(set.intersection(*(set(row["shared"][definition]["without"]) for row in rows)))
    if len(common) < 3:
        return of_latents, LATENTS
    left_out = [float(weight @ [row["shared"][definition]["without"][seed] for row in rows]) for seed in common]
    return wider(jackknife(value, left_out), of_latents), SEEDS


def _others(sweep: Mapping[str, Any], row: Mapping[str, Any], axis: str) -> tuple[Any, ...]:
    """Return the row's values on all axes that do not advance with this one."""
    tied = set(sweep["together"]) if axis in sweep["together"] else {axis}
    return tuple((name, value) for name, value in row["values"].items() if name not in tied and name != axis)


# --- words ---------------------------------------------------------------------------------------------------------


def _ends(rows: Rows, axis: str, definition: str) -> str:
    """Format the first and the last value: ``.62 at 256, .41 at 4,096``."""
    if not rows:
        return "no point has two aligned seeds"
    ordered = sorted(rows, key=lambda row: row["values"][axis])
    ends = [(row["shared"][definition]["value"], row["values"][axis]) for row in (ordered[0], ordered[-1])]
    return ", ".join(f"{decimal(value)} at {place:,}" for value, place in ends)


def _signed(e: Estimate) -> str:
    return estimate(e.value, (e.low, e.high), sign=True)


def _made(sweep: Mapping[str, Any], method: str) -> str:
    return f"sweep {sweep['sweep']}, {len(sweep['points'])} points, {len(sweep['seeds'])} seeds; {method}"


def axes_of(sweep: Mapping[str, Any]) -> Iterator[str]:
    """Return the ids of the findings that a sweep's axes allow."""
    return (name for name, axis in AXES.items() if axis in sweep["axes"])
