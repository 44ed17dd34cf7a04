"""Slopes and differences over a sweep's points: planted directions are found, noise is not called a finding."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autointerp.findings.json_values import to_json
from autointerp.findings.paper.finding import AGREES, DISAGREES, UNDECIDED, Verdict
from autointerp.findings.paper.sweeps import axes_of, finding_of_sweep, findings_of_sweeps, slope
from sae.alignment.overlap import DEFINITIONS

AXIS = "training.num_latents"


def point(
    at: dict[str, Any], value: float, *, half: float = 0.01, seeds: int = 3, noise: float = 0.0, **more: Any
) -> Any:
    rng = np.random.default_rng(zlib.crc32(str(at).encode()))
    without = {str(s): value + noise * rng.normal() for s in range(seeds)} if seeds > 2 else {}
    shared = {"value": value, "interval": [value - half, value + half], "without": without}
    return {"values": at, "shared": dict.fromkeys(DEFINITIONS, shared), "l0": 8.0, "fvu": 0.3, **more}


def swept(
    points: list[Any], axes: dict[str, list[Any]] | None = None, together: tuple[str, ...] = ()
) -> dict[str, Any]:
    axes = axes or {AXIS: [p["values"][AXIS] for p in points]}
    return {"sweep": "s", "axes": axes, "together": list(together), "seeds": [0, 1, 2], "points": points}


def widths(f: Callable[[float], float], **more: Any) -> dict[str, Any]:
    return swept([point({AXIS: 2**i}, f(i), **more) for i in (8, 9, 10, 11)])


@pytest.mark.parametrize(
    ("f", "verdict"),
    [(lambda i: 1 - i / 20, AGREES), (lambda i: i / 20, DISAGREES), (lambda i: 0.5 + 0 * i, UNDECIDED)],
    ids=["falls", "rises", "stays"],
)
@pytest.mark.parametrize("seeds", [2, 3])
def test_width(f: Callable[[float], float], verdict: Verdict, seeds: int) -> None:
    row = finding_of_sweep("width", widths(f, seeds=seeds))
    assert row.verdict == verdict
    assert row.value == pytest.approx(f(1) - f(0), abs=1e-9)
    assert ("jackknife" in row.why) == (seeds > 2)


def test_seeds_that_differ_widely_are_inconclusive() -> None:
    assert finding_of_sweep("width", widths(lambda i: 0.6 - i / 200, half=0.001, noise=0.2)).verdict == UNDECIDED


@pytest.mark.parametrize(("name", "axis", "sign"), [("k", "training.k", -1), ("tokens", "training.tokens", 1)])
def test_k_and_tokens(name: str, axis: str, sign: int) -> None:
    def along(step: float) -> dict[str, Any]:
        points = [point({axis: 2**i}, 0.5 + step * i) for i in (1, 2, 3)]
        return swept(points, {axis: [2, 4, 8]})

    assert finding_of_sweep(name, along(0.1 * sign)).verdict == AGREES
    assert finding_of_sweep(name, along(-0.1 * sign)).verdict == DISAGREES
    assert finding_of_sweep(name, along(0.0)).verdict == UNDECIDED


@given(st.lists(st.floats(0.1, 0.9), min_size=2, max_size=6), st.floats(-0.05, 0.05))
def test_the_slope_is_least_squares_with_group_levels(levels: list[float], step: float) -> None:
    points = [
        point({AXIS: 2**i, "training.k": k}, level + step * i) for k, level in enumerate(levels, 1) for i in (1, 2, 4)
    ]
    sweep = swept(points, {AXIS: [2, 4, 16], "training.k": list(range(1, len(levels) + 1))})
    found, _ = slope(sweep, points, AXIS, "both")
    assert found.value == pytest.approx(step, abs=1e-9)


def test_the_slope_is_numpys() -> None:
    rng = np.random.default_rng(0)
    y = rng.random(5)
    points = [point({AXIS: 2 ** (i + 3)}, float(v)) for i, v in enumerate(y)]
    found, _ = slope(swept(points), points, AXIS, "both")
    assert found.value == pytest.approx(np.polyfit(np.arange(5), y, 1)[0])


def test_rate_that_follows_the_width_is_no_group() -> None:
    rate = "training.learning_rate"
    points = [point({AXIS: 2**i, rate: 1 / 2**i}, 1 - i / 10) for i in (1, 2, 3)]
    sweep = swept(points, {AXIS: [2, 4, 8], rate: [1 / 2, 1 / 4, 1 / 8]}, (AXIS, rate))
    assert finding_of_sweep("width", sweep).value == pytest.approx(-0.1)


def architectures(relu: float, gated: float, **of_gated: Any) -> dict[str, Any]:
    axis = "training.architecture"
    points = [point({axis: "topk"}, 0.7), point({axis: "relu"}, relu), point({axis: "gated"}, gated, **of_gated)]
    return swept(points, {axis: ["topk", "relu", "gated"]})


@pytest.mark.parametrize(
    ("relu", "gated", "verdict"),
    [(0.8, 0.85, AGREES), (0.5, 0.6, DISAGREES), (0.8, 0.5, UNDECIDED), (0.705, 0.8, UNDECIDED)],
    ids=["both more", "both less", "one of each", "one hardly"],
)
def test_architecture(relu: float, gated: float, verdict: Verdict) -> None:
    row = finding_of_sweep("architecture", architectures(relu, gated))
    assert row.verdict == verdict
    assert row.value == pytest.approx((relu + gated) / 2 - 0.7)


def test_architectures_are_compared_at_common_settings_alone() -> None:
    axis, k = "training.architecture", "training.k"

    def row(kind: str, at: int, value: float) -> Any:
        return point({axis: kind, k: at}, value, l0=float(at))

    unlike = [row("topk", 32, 0.5), row("relu", 80, 0.8), row("gated", 75, 0.8)]
    axes: dict[str, list[Any]] = {axis: ["topk", "relu", "gated"], k: [32, 75, 80]}
    told = finding_of_sweep("architecture", swept(unlike, axes))
    assert told.verdict == UNDECIDED
    assert "no settings at which" in told.why
    alike = [row(kind, 16, value) for kind, value in (("topk", 0.5), ("relu", 0.4), ("gated", 0.4))]
    told = finding_of_sweep("architecture", swept([*unlike, *alike], axes))
    assert told.verdict == DISAGREES
    assert told.value == pytest.approx(-0.1)


def test_architectures_of_other_sparsity_are_not_compared() -> None:
    row = finding_of_sweep("architecture", architectures(0.8, 0.85) | {})
    assert row.verdict == AGREES
    sweep = architectures(0.8, 0.85)
    sweep["points"][2]["l0"] = 9.0
    row = finding_of_sweep("architecture", sweep)
    assert row.verdict == UNDECIDED
    assert "Gated L0 9.00 against 8.00" in row.why
    sweep["points"].pop()
    assert "no gated" in finding_of_sweep("architecture", sweep).why


def test_points_with_one_seed_are_left_out() -> None:
    sweep = widths(lambda i: 1 - i / 20)
    for of in sweep["points"][1:]:
        of["shared"] = None
    row = finding_of_sweep("width", sweep)
    assert row.verdict == UNDECIDED
    assert to_json(row)["value"] is None


def test_each_row_uses_its_first_sweep() -> None:
    found = findings_of_sweeps([widths(lambda i: 1 - i / 20)], lambda name: (f"; words for {name}", f"sweep {name}"))
    assert [row.id for row in found] == ["width", "k", "tokens", "architecture"]
    assert found[0].command is None
    assert [row.command for row in found[1:]] == ["sweep k", "sweep tokens", "sweep architecture"]
    assert "words for k" in found[1].why
    assert list(axes_of(widths(lambda i: i))) == ["width"]
