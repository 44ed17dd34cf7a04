"""What reports are made of: blocks, numbers, and texts by others, which stay within their width and act on nothing."""

from __future__ import annotations

import io
import math
import shlex
import unicodedata
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from printed import ACTS_ON_A_TERMINAL, COLOURS, console
from rich.cells import cell_len
from rich.console import Console

from autointerp.report import charts
from autointerp.report.blocks import Command
from autointerp.report.numbers import listed, percent
from autointerp.report.terminal import over_lines, print_page
from autointerp.report.visible import highlighted, marking, shown, visible
from sae.common.amounts import decimal, interval

# --- blocks -----------------------------------------------------------------------------------------------

sizes = st.lists(st.floats(0, 1e6, allow_subnormal=False), min_size=1, max_size=8)


@given(sizes, st.integers(1, 120))
def test_shares_fill_the_width_and_hide_nothing(values: list[float], width: int) -> None:
    cells = charts.shares(values, width)
    if sum(values) <= 0:
        assert sum(cells) == 0
        return
    assert sum(cells) == width
    assert min(cells) >= 0
    if len(values) <= width:
        assert all(n > 0 for n, value in zip(cells, values, strict=True) if value > 0)
    lifted = sum(1 for value in values if 0 < value / sum(values) * width < 1)
    assert all(abs(n - v / sum(values) * width) <= 1 + lifted for n, v in zip(cells, values, strict=True))


@given(sizes, st.integers(1, 120))
def test_a_stacked_bar_is_as_long_as_asked(values: list[float], width: int) -> None:
    bar = charts.stacked_bar([charts.Part(value, "", "█") for value in values], width)
    assert bar.cell_len == (width if sum(values) > 0 else 0)


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=60), st.integers(1, 8), st.integers(1, 3))
def test_columns_show_every_bin_that_is_not_empty(counts: list[int], height: int, cell: int) -> None:
    lines = [line.plain for line in charts.columns(counts, height, cell=cell)]
    assert len(lines) == height
    assert {len(line) for line in lines} == {cell * len(counts)}
    bottom = lines[-1][::cell]
    assert [c != " " for c in bottom] == [n > 0 for n in counts]
    if max(counts) > 0:
        assert lines[0][cell * counts.index(max(counts))] == "█"


@given(
    st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), min_size=1, max_size=30),
    st.integers(1, 7),
    st.booleans(),
)
def test_stacked_columns_keep_both_layers(pairs: list[tuple[int, int]], height: int, colour: bool) -> None:
    lower, upper = charts.Layer([a for a, _ in pairs], "red", "░"), charts.Layer([b for _, b in pairs], "blue", "█")
    lines = charts.stacked_columns(lower, upper, height, colour=colour)
    assert {line.cell_len for line in lines} == {len(pairs)}
    assert [c != " " for c in lines[-1].plain] == [a + b > 0 for a, b in pairs]


@given(st.lists(st.floats() | st.just(math.nan), max_size=100), st.integers(1, 40), st.booleans())
def test_a_sparkline_never_fails_and_never_overflows(values: list[float], width: int, log: bool) -> None:
    assert charts.sparkline(values, width, log=log).cell_len <= width


def test_a_sparkline_falls_with_its_values() -> None:
    line = charts.sparkline([8, 4, 2, 1], 4, log=True).plain
    assert line[0] == "█"
    assert line[-1] == "▁"
    assert list(line) == sorted(line, reverse=True)


@given(st.floats(-2, 2), st.floats(-2, 2), st.floats(-2, 2), st.integers(3, 60))
def test_a_whisker_keeps_its_length(value: float, low: float, high: float, width: int) -> None:
    low, value, high = sorted((low, value, high))
    drawn_ = charts.whisker(value, low, high, -1, 1, width, mark=0).plain
    assert len(drawn_) == width
    assert drawn_.count("●") == 1
    assert "●" not in charts.whisker(math.nan, low, high, -1, 1, width).plain


def test_axis_labels_never_touch() -> None:
    rule, labels = charts.axis(30, [charts.Tick(15, "chance"), *(charts.Tick(i, f".{i}") for i in range(0, 31, 3))])
    assert rule.cell_len == 30
    assert labels.plain.split() == sorted(set(labels.plain.split()), key=labels.plain.index)
    assert "chance" in labels.plain.split()


# --- numbers ----------------------------------------------------------------------------------------------


def test_numbers_are_written_in_one_way() -> None:
    assert [decimal(x, 2) for x in (0.264, -0.39, 1, 0, -0.001, None, math.nan)] == [
        ".26",
        "−.39",
        "1.00",
        ".00",
        ".00",
        "–",
        "–",
    ]
    assert decimal(0.14, 2, sign=True) == "+.14"
    assert percent(0.2641) == "26.4 %"
    assert percent(None) == "–"
    assert interval([0.25, 0.5], 2) == "[.25, .50]"
    assert interval(None) == ""
    assert interval([None, 1.0]) == ""
    assert listed(["a"]) == "a"
    assert listed(["a", "b", "c"]) == "a, b and c"


# --- text by others ---------------------------------------------------------------------------------------


@given(st.text(alphabet=st.characters(), max_size=60))
def test_no_character_acts_on_the_terminal(text: str) -> None:
    for safe in (visible(text), shown(text).plain):
        assert not {unicodedata.category(c) for c in safe} & ACTS_ON_A_TERMINAL
        safe.encode()  # lone surrogates would fail
    assert visible(text) == shown(text).plain


def test_signs_for_what_is_not_shown() -> None:
    assert visible("a\nb\tc") == "a↵b⇥c"
    assert visible("\x1b[31m") == "␛[31m"
    assert visible("\u202eabc") == "‹U+202E›abc"
    assert visible("שלום naïve 日本 🙂") == "שלום naïve 日本 🙂"


tokens = st.lists(st.text(max_size=12), min_size=1, max_size=40)


@given(tokens, st.randoms(use_true_random=False), st.integers(6, 100), st.sampled_from(COLOURS))
def test_a_context_fits_and_keeps_its_strongest_token(words: list[str], rng: Any, width: int, colour: Any) -> None:
    activations = [rng.choice([0.0, 0.0, rng.random()]) for _ in words]
    line = highlighted(words, activations, marking(console(80, colour)), width=width)
    assert line.cell_len <= width
    assert "\n" not in line.plain
    peak = max(range(len(words)), key=lambda i: activations[i])
    strongest = visible(words[peak])
    if activations[peak] > 0 and cell_len(strongest) + 4 <= width:
        assert strongest in line.plain


def test_marks_without_colour_and_shades_with_it() -> None:
    words, activations = ["a ", "b ", "c ", "d "], [0.1, 1.0, 0.5, 0.0]
    plain = highlighted(words, activations, marking(console(80)))
    assert plain.plain == "a «b c »d "
    shaded = highlighted(words, activations, marking(console(80, "truecolor")))
    assert shaded.plain == "a b c d "
    assert len({str(span.style) for span in shaded.spans if "black on" in str(span.style)}) == 2


@given(
    st.lists(st.text(st.characters(codec="utf-8", categories=["L", "N", "P", "Zs"]), max_size=30), min_size=1),
    st.integers(20, 120),
)
def test_a_multiline_command_is_one_command(words: list[str], width: int) -> None:
    command = shlex.join(words)
    lines = over_lines(command, width)
    assert shlex.split("\n".join(lines).replace("\\\n", "")) == words  # as a shell does, and shlex does not
    longest = max(cell_len(shlex.quote(word)) for word in words) + len("     \\")
    assert all(cell_len(line) <= max(width, longest) for line in lines)


def test_an_option_stays_beside_its_value() -> None:
    command = "python cli.py score --sae run_a --scorer fuzzing --precision 0.065 --root 'my runs'"
    assert over_lines(command, 100) == [command]
    assert over_lines(command, 40) == [
        "python cli.py score --sae run_a \\",
        "    --scorer fuzzing --precision 0.065 \\",
        "    --root 'my runs'",
    ]
    page = io.StringIO()
    print_page([Command(command)], Console(width=44, file=page))
    assert page.getvalue().splitlines()[0].rstrip() == "  $ python cli.py score --sae run_a \\"
