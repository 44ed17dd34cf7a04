"""What the paper found as a setting changes: width, k, training tokens, architecture. Measured on sweeps.

A slope is that of a line through a sweep's points, by least squares on the logarithm to base 2 of the setting: the
change when it doubles. Where a sweep varies more than the one setting, each combination of the others has a level of
its own. Intervals: seeds that every point has are left out in turn, at all points together (jackknife); this is widened
to what the points' bootstraps over latents give, the points taken as independent.
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
"""Architectures are compared where their mean L0 is within this fraction of TopK's."""
_MORE_STABLE = {"relu": "ReLU + L1", "gated": "Gated"}

_ABOUT = {
    about.id: about
    for about in (
        About(
            "width",
            "overlap falls as width grows, strict and lenient",
            "−.047 per doubling (same partner −.024): .813 at 32 latents, .416 at 32,768, .276 at 131,072",
            "change of the fraction shared (both) when the width doubles",
            SIGNED,
        ),
        About(
            "k",
            "overlap falls as k grows",
            "−.079 per doubling: .416 at k 32, .177 at k 256",
            "change of the fraction shared (both) when k doubles",
            SIGNED,
        ),
        About(
            "tokens",
            "overlap grows with training tokens",
            "+.081 per doubling: .073 at 0.8B, .416 at 8B, .612 at 80B",
            "change of the fraction shared (both) when the training doubles",
            SIGNED,
        ),
        About(
            "architecture",
            "ReLU + L1 and Gated are more stable than TopK",
            "decoder alone: Gated .856, L1 .824, TopK .742",
            "fraction shared (decoder), mean of ReLU + L1 and Gated, less TopK's",
            SIGNED,
        ),
    )
}
AXES = {
    "width": "training.num_latents",
    "k": "training.k",
    "tokens": "training.tokens",
    "architecture": "training.architecture",
}
"""finding → the axis of a sweep that it takes"""


def findings_of_sweeps(
    sweeps: Sequence[Mapping[str, Any]], advice: Callable[[str], tuple[str, str | None]]
) -> list[Finding]:
    """The four rows, each of the first of ``sweeps`` that varies what it is about.

    ``advice`` gives, by a finding's id, what would provide its data: in words, and as a command where there is one.
    """
    found = []
    for name, axis in AXES.items():
        sweep = next((s for s in sweeps if axis in s["axes"]), None)
        if sweep is None:
            words, command = advice(name)
            found.append(_ABOUT[name].missing(f"no sweep over {axis} of this subject is at hand{words}", command))
        else:
            found.append(finding_of_sweep(name, sweep))
    return found


def finding_of_sweep(name: str, sweep: Mapping[str, Any]) -> Finding:
    """The finding called ``name`` from a sweep that varies what it is about."""
    rows = [row for row in sweep["points"] if row["shared"] is not None]
    if name == "architecture":
        return architecture_finding(sweep, rows)
    return {"width": width_finding, "k": k_finding, "tokens": tokens_finding}[name](sweep, rows)


def width_finding(sweep: Mapping[str, Any], rows: Rows) -> Finding:
    """Agrees where the slopes of the fraction shared (both) and of that with the same partner (lenient) lie below 0.

    Each with its whole interval. Disagrees where each lies wholly above 0.
    """
    both, method = slope(sweep, rows, AXES["width"], "both")
    lenient, _ = slope(sweep, rows, AXES["width"], "lenient")
    verdict = every([against(both, 0, -1), against(lenient, 0, -1)])
    same = f"same partner {_signed(lenient)}; {_ends(rows, AXES['width'], 'lenient')}"
    why = f"tested: both slopes below 0; {_ends(rows, AXES['width'], 'both')}; {same}; {_made(sweep, method)}"
    return _ABOUT["width"].row(both, verdict, why)


def k_finding(sweep: Mapping[str, Any], rows: Rows) -> Finding:
    """Agrees where the slope of the fraction shared (both) lies wholly below 0, disagrees where wholly above."""
    found, method = slope(sweep, rows, AXES["k"], "both")
    why = f"tested: below 0; {_ends(rows, AXES['k'], 'both')}; {_made(sweep, method)}"
    return _ABOUT["k"].row(found, against(found, 0, -1), why)


def tokens_finding(sweep: Mapping[str, Any], rows: Rows) -> Finding:
    """Agrees where the slope of the fraction shared (both) lies wholly above 0, disagrees where wholly below."""
    found, method = slope(sweep, rows, AXES["tokens"], "both")
    why = f"tested: above 0; {_ends(rows, AXES['tokens'], 'both')}; {_made(sweep, method)}"
    return _ABOUT["tokens"].row(found, against(found, 0), why)


def architecture_finding(sweep: Mapping[str, Any], rows: Rows) -> Finding:
    """Agrees where ReLU + L1 and Gated each share more than TopK by decoder, disagrees where each shares less.

    With the whole interval of the difference, over the other settings at which all three were trained; each must have
    an L0 within :data:`L0_WITHIN` of TopK's. The value is the mean of the two differences.
    """
    axis, about = AXES["architecture"], _ABOUT["architecture"]
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
    told = ", ".join(f"{_MORE_STABLE[kind]} {_signed(e)}" for kind, (e, _) in found.items())
    fvu = ", ".join(
        f"{row['values'][axis]} {decimal(row['fvu'])}" for row in (*topk, *(r for of in others.values() for r in of))
    )
    if apart:
        return about.row(mean, UNDECIDED, f"L0 is not matched: {'; '.join(apart)}; {told}; FVU {fvu}")
    why = f"tested: each above 0; {told}; FVU {fvu}; {_made(sweep, method)}"
    return about.row(mean, every([against(e) for e, _ in found.values()]), why)


# --- figures -------------------------------------------------------------------------------------------------------


def slope(sweep: Mapping[str, Any], rows: Rows, axis: str, definition: str) -> tuple[Estimate, str]:
    """The change of the fraction shared under ``definition`` when the axis doubles, and how its interval was made."""
    x = np.log2([float(row["values"][axis]) for row in rows]) if rows else np.empty(0)
    weight = _slope_weights(x, [_others(sweep, row, axis) for row in rows])
    return _combined(rows, weight, definition)


def _slope_weights(x: np.ndarray, groups: Sequence[Any]) -> np.ndarray | None:
    """What each point [n] weighs in the least-squares slope with a level for each group; ``None`` where x is fixed."""
    centred = x.copy()
    for group in set(groups):
        inside = np.array([other == group for other in groups])
        centred[inside] -= x[inside].mean()
    total = float(centred @ centred)
    return centred / total if total > 1e-12 else None


def _trained_alike(sweep: Mapping[str, Any], rows: Rows, axis: str, kinds: Sequence[str]) -> tuple[Rows, str]:
    """The rows at whose other settings each of ``kinds`` has one; or what is lacking, in words."""
    at = {kind: {_others(sweep, row, axis) for row in rows if row["values"][axis] == kind} for kind in kinds}
    if none := [kind for kind, settings in at.items() if not settings]:
        return [], f"no {' and no '.join(none)}"
    common = set.intersection(*at.values())
    kept = [row for row in rows if row["values"][axis] in kinds and _others(sweep, row, axis) in common]
    return kept, "" if kept else f"no settings at which {', '.join(kinds)} were all trained"


def _difference(rows: Rows, of: Rows, less: Rows) -> tuple[Estimate, str]:
    """The mean of some rows less that of others, by the decoder definition. Rows weigh the same."""
    weight = np.zeros(len(rows))
    for part, sign in ((of, 1.0), (less, -1.0)):
        for i, row in enumerate(rows):
            weight[i] += sign / len(part) * sum(row is other for other in part)
    return _combined(rows, weight, "decoder")


def _combined(rows: Rows, weight: np.ndarray | None, definition: str) -> tuple[Estimate, str]:
    """A weighted sum of the points' fractions with its interval (this module's head)."""
    if weight is None or any(row["shared"][definition]["value"] is None for row in rows):
        return UNKNOWN, LATENTS
    told = [estimate_of(row["shared"][definition]["value"], row["shared"][definition]["interval"]) for row in rows]
    value = float(weight @ [e.value for e in told])
    error = math.sqrt(float(weight**2 @ [standard_error(e) ** 2 for e in told]))
    of_latents = normal(value, error)
    common = sorted(set.intersection(*(set(row["shared"][definition]["without"]) for row in rows)))
    if len(common) < 3:
        return of_latents, LATENTS
    left_out = [float(weight @ [row["shared"][definition]["without"][seed] for row in rows]) for seed in common]
    return wider(jackknife(value, left_out), of_latents), SEEDS


def _others(sweep: Mapping[str, Any], row: Mapping[str, Any], axis: str) -> tuple[Any, ...]:
    """What else tells the row from others: its values on all axes that do not advance with this one."""
    tied = set(sweep["together"]) if axis in sweep["together"] else {axis}
    return tuple((name, value) for name, value in row["values"].items() if name not in tied and name != axis)


# --- words ---------------------------------------------------------------------------------------------------------


def _ends(rows: Rows, axis: str, definition: str) -> str:
    """The first and the last value: ``.62 at 256, .41 at 4,096``."""
    if not rows:
        return "no point has two aligned seeds"
    ordered = sorted(rows, key=lambda row: row["values"][axis])
    return ", ".join(_at(row, axis, definition) for row in (ordered[0], ordered[-1]))


def _at(row: Mapping[str, Any], axis: str, definition: str) -> str:
    value = row["shared"][definition]["value"]
    return f"{decimal(value)} at {row['values'][axis]:,}"


def _signed(e: Estimate) -> str:
    return estimate(e.value, (e.low, e.high), sign=True)


def _made(sweep: Mapping[str, Any], method: str) -> str:
    seeds = len(sweep["seeds"])
    return f"sweep {sweep['sweep']}, {len(sweep['points'])} points, {seeds} seeds; {method}"


def axes_of(sweep: Mapping[str, Any]) -> Iterator[str]:
    """The ids of the findings that a sweep's axes allow."""
    return (name for name, axis in AXES.items() if axis in sweep["axes"])
