"""Progress goes to standard error, says how much and how fast, and never breaks the work it is about."""

from __future__ import annotations

import io
import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from sae.common import progress
from sae.common.amounts import human
from sae.common.progress import peak_memory_bytes, say, track, waiting

SCALES = {"": 1, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}


@pytest.mark.parametrize(
    ("n", "text"),
    [
        (0, "0"),
        (7, "7"),
        (950, "950"),
        (999, "999"),
        (999.6, "1k"),
        (1000, "1k"),
        (12_345, "12.3k"),
        (999_499, "999k"),
        (999_936, "1M"),
        (2_000_000, "2M"),
        (999_999_999, "1G"),
        (3.2e12, "3.2T"),
        (-999_936, "-1M"),
        (0.05, "0.05"),
    ],
)
def test_counts_in_three_digits(n: float, text: str) -> None:
    assert human(n) == text


@given(st.floats(0, 9.99e14))
def test_a_count_reads_as_about_what_it_is(n: float) -> None:
    text = human(n)
    number, suffix = re.fullmatch(r"([\d.e-]+)([kMGT]?)", text).groups()  # type: ignore[union-attr]
    assert float(number) * SCALES[suffix] == pytest.approx(n, rel=0.00501)
    assert float(number) < 1000
    assert "e+" not in text


@given(st.floats(1, 9e14), st.floats(1, 9e14))
def test_more_never_reads_as_less(a: float, b: float) -> None:
    def value(text: str) -> float:
        return float(text.rstrip("kMGT")) * SCALES[text[-1] if text[-1].isalpha() else ""]

    assert value(human(min(a, b))) <= value(human(max(a, b)))


def test_nan_does_not_break_a_line() -> None:
    assert human(float("inf")) == "inf"
    assert human(float("nan")) == "nan"
    assert human(1e18) == "1e+18"


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    out = io.StringIO()
    monkeypatch.setattr(progress, "console", Console(file=out, highlight=False, width=40))
    return out


def test_what_is_said_goes_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    say("hello")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "hello\n")


@pytest.mark.parametrize("message", ["[red]no markup[/red] [/nothing]", "a" * 300, "[bold", "run[0]"])
def test_messages_are_plain_and_one_line(message: str, lines: io.StringIO) -> None:
    say(message)
    assert lines.getvalue() == message + "\n"


def test_a_stage_ends_with_amount_rate_and_memory(lines: io.StringIO) -> None:
    with track("train [x]", 10, "tokens", done=4) as bar:
        for _ in range(6):
            bar.advance(note="[/] FVU 0.1")
    assert bar.done == 10
    (line,) = lines.getvalue().splitlines()
    assert re.fullmatch(r"train \[x\]: 6 tokens in \d+\.\d s · \S+ tokens/s · peak memory \d+\.\d\d GiB", line)


def test_a_failed_stage_is_not_shown_as_done(lines: io.StringIO) -> None:
    with pytest.raises(ValueError, match="broken"), track("train", 10):
        raise ValueError("broken")
    assert lines.getvalue() == ""


def test_without_a_terminal_a_line_now_and_then(lines: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 10_000, 20))  # twenty seconds at every look
    monkeypatch.setattr(time, "monotonic", lambda: float(next(clock)))
    with track("harvest", 8, "tokens") as bar:
        for _ in range(8):
            bar.advance()
    *now_and_then, last = lines.getvalue().splitlines()
    assert 2 <= len(now_and_then) <= 4
    assert all(re.match(r"harvest: \d of 8 tokens, \d+ s left", line) for line in now_and_then)
    assert last.startswith("harvest: 8 tokens in ")


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    monkeypatch.setattr(progress, "console", Console(file=out, force_terminal=True, highlight=False, width=100))
    with track("align [a]", 3, "pairs", done=1) as bar:
        bar.advance(note="[b] × c")
        bar.advance()
    assert "align [a]: 2 pairs in" in out.getvalue()


def test_what_is_waited_for_says_for_how_long(lines: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 10_000, 20))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(clock)))
    with waiting("loading [x]") as note:
        for _ in range(6):
            note("[b]weights\x1b[0m")
    found = lines.getvalue().splitlines()
    assert 2 <= len(found) <= 4
    assert all(re.fullmatch(r"loading \[x\]: \d+ s \[b\]weights\N{REPLACEMENT CHARACTER}\[0m", line) for line in found)


def test_waiting_on_a_terminal_stands_below_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    monkeypatch.setattr(progress, "console", Console(file=out, force_terminal=True, highlight=False, width=100))
    with track("align", 1, "pairs") as bar:
        with waiting("loading [x]") as note:
            note("[b]weights")
        bar.advance()
    assert "align: 1 pair in" in out.getvalue()
    assert "loading [x]" in out.getvalue()
    assert "[b]weights" in out.getvalue()


def test_a_stage_does_not_count_what_it_waited(lines: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with track("explain", 10, "latents") as bar:
        now += 2
        with waiting("loading"):
            now += 90
        now += 3
        bar.advance(10)
    assert "10 latents in 5.0 s · 2 latents/s" in lines.getvalue()


def test_memory_only_grows() -> None:
    before = peak_memory_bytes()
    assert 10 * 2**20 < before <= peak_memory_bytes() < 2**45
