"""The training curves: what the log says, on one scale for all seeds, within any page and without colour."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import small_study
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console
from small_study import findings

from autointerp.findings import returning as seeds
from autointerp.findings import study
from autointerp.report import charts
from autointerp.report.dictionaries import training_curves
from autointerp.report.report import report_page
from autointerp.report.terminal import print_page
from sae.common.files import read_table, write_table

NAMES = ("loss", "FVU", "L0", "dead", "learning rate")


def printed(curves: dict[str, Any], width: int, encoding: str = "utf-8") -> list[str]:
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    console = Console(file=stream, width=width, color_system=None, force_terminal=False)
    print_page(list(training_curves(curves)), console)
    stream.flush()
    return stream.buffer.getvalue().decode(encoding).splitlines()  # type: ignore[attr-defined]


def curve(**columns: list[float | None]) -> dict[str, list[float | None]]:
    given: dict[str, list[float | None]] = {
        name: [1.0, 0.5] for name in ("step", "loss", "fvu", "l0", "dead_fraction", "learning_rate")
    }
    return {**given, **columns}


def test_the_findings_hold_the_log_of_every_seed(tmp_path: Path) -> None:
    runs = small_study.runs_of(tmp_path)
    log = read_table(runs[1].training_log_path)
    log["dead_fraction"] = [math.nan, *([0.25] * (len(log) - 1))]
    write_table(runs[1].training_log_path, log)
    tree = seeds.training_findings(runs)
    assert tree is not None
    assert list(tree.curves) == ["run_a", "run_b", "run_c"]
    found = pd.DataFrame(tree.curves["run_b"]).astype(float)
    assert found["step"].iloc[[0, -1]].tolist() == [1, 200]
    assert 50 <= len(found) <= 100
    same = log.set_index("step").loc[found["step"].astype(int)].reset_index()[list(found)].astype(float)
    pd.testing.assert_frame_equal(found, same)
    in_json = findings(tmp_path, [run.name for run in runs])["training"]["curves"]
    assert in_json["run_b"]["dead_fraction"][:2] == [None, 0.25]


@pytest.mark.parametrize("width", [60, 80, 100, 120])
@pytest.mark.parametrize("n", [1, 2, 3, 8, 27])
def test_every_seed_has_every_curve_within_the_page(n: int, width: int) -> None:
    curves = {f"a-rather-long-study-name_{i}": curve(loss=[9.0, 1.0 + i]) for i in range(n)}
    lines = printed(curves, width)
    assert max(map(cell_len, lines)) <= width
    tables = sum(line.startswith("loss") for line in lines)
    assert tables >= 1
    for name in NAMES:
        rows = [line for line in lines if line.startswith(name)]
        assert len(rows) == tables
        assert sum(len(set(block) & set(charts.HEIGHTS[1:])) > 0 for row in rows for block in row.split("  ")) == n
    assert sum("…" in line or "name_" in line for line in lines if "scale" in line) == tables


def test_seeds_share_a_scale() -> None:
    lines = printed({"run_a": curve(fvu=[0.8, 0.2]), "run_b": curve(fvu=[0.41, 0.41])}, 80)
    (row,) = [line for line in lines if line.startswith("FVU")]
    assert row.split() == ["FVU", ".200", "–", ".800", "█▁", "▅▅"]  # about half-way, in logarithms


def test_constants_draw_flat_lines_and_unknowns_are_skipped() -> None:
    lines = printed({"run_a": curve(l0=[0.1 + 0.2, 0.3], dead_fraction=[None, None], fvu=[None, 0.5])}, 80)
    assert next(line for line in lines if line.startswith("L0")).endswith("▄▄")
    assert not any(line.startswith("dead") for line in lines)
    assert next(line for line in lines if line.startswith("FVU")).endswith("▄")
    assert not any(printed({}, 80))


def test_the_whole_report_works_without_unicode(tmp_path: Path) -> None:
    runs = small_study.runs_of(tmp_path)
    found = study.findings(tmp_path, [run.name for run in runs])
    for encoding in ("utf-8", "ascii"):
        stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        console = Console(file=stream, width=80, color_system=None, force_terminal=False)
        print_page(report_page(found, is_full=True), console)
        stream.flush()
        text = stream.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]
        assert "learning rate" in text
        assert all(cell_len(line) <= 80 for line in text.splitlines())


@given(
    st.lists(st.floats() | st.just(math.nan), max_size=60),
    st.integers(1, 40),
    st.booleans(),
    st.tuples(st.floats(), st.floats()),
)
def test_a_sparkline_on_any_scale_never_fails(
    values: list[float], width: int, log: bool, span: tuple[float, float]
) -> None:
    line = charts.sparkline(values, width, log=log, span=span).plain
    assert len(line) <= width
    assert set(line) <= set(charts.HEIGHTS)
