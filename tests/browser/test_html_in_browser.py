"""The HTML report as a reader has it: figures, latents, keys, colours, a phone, a printer."""

from __future__ import annotations

import csv
import itertools
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import html_pages
import pytest
import small_study
from browser_pages import FLAGS, Watched, chromium
from html_pages import HOSTILE
from playwright.sync_api import Browser, sync_playwright

from autointerp.report.visible import visible

pytestmark = pytest.mark.browser
FIGURES = 16
NAMES = ["run_a", "run_b", "run_c"]
Opened = Callable[..., Watched]


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=chromium(), args=FLAGS)
        yield opened
        opened.close()


@pytest.fixture
def watched(browser: Browser) -> Iterator[Opened]:
    """Opens a file in a context of its own; at the end nothing may have been said or asked for."""
    made: list[Watched] = []

    def new(source: Path, *, width: int = 1280, height: int = 900, scheme: str = "light") -> Watched:
        context = browser.new_context(
            viewport={"width": width, "height": height},
            color_scheme="dark" if scheme == "dark" else "light",
            accept_downloads=True,
        )
        context.set_default_timeout(15_000)
        one = Watched(context.new_page(), source=source)
        # Software WebGL says of itself that it is slow; that is no fault of the page.
        one.page.on("console", lambda m: one.said.append(m.text) if "GPU stall" not in m.text else None)
        one.page.on("pageerror", lambda error: one.said.append(str(error)))
        one.page.on("dialog", lambda dialog: one.said.append(dialog.message))
        one.page.on("request", lambda request: one.asked_for.append(request.url))
        made.append(one)
        return one

    yield new
    for one in made:
        assert one.said == []
        assert {url for url in one.asked_for if not url.startswith(("file:", "blob:", "data:"))} == set()
        assert one.page.evaluate("window.harmed") is None
        one.page.context.close()


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a made-up study with every stage done, two runs scored."""
    root = tmp_path_factory.mktemp("finished")
    runs = small_study.whole(root, nulls=True)
    small_study.scored(runs[1], small_study.explained(runs[1], list(range(0, 108, 2))))
    html_pages.swept(root)
    return written(root)


@pytest.fixture(scope="session")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a study whose texts mean harm."""
    root = tmp_path_factory.mktemp("hostile")
    html_pages.hostile(root)
    return written(root)


def written(root: Path) -> Path:
    path = root / "page.html"
    path.write_text(html_pages.rendered(root, NAMES).html, encoding="utf-8")
    return path


def rows(one: Watched) -> list[str]:
    return [row.inner_text() for row in one.page.query_selector_all("#browser .rows [role=row]")]


def counted(one: Watched) -> str:
    return one.page.inner_text("#count")


def test_every_figure_is_drawn_in_light_and_dark(watched: Opened, finished: Path) -> None:
    for scheme in ("light", "dark"):
        one = watched(finished, scheme=scheme)
        one.open()
        one.draw_all()
        assert len(one.page.query_selector_all("[data-figure]")) == FIGURES
        for figure in one.page.query_selector_all("[data-figure]"):
            box = figure.query_selector(".plot .main-svg")
            assert box is not None
            assert (box.bounding_box() or {"height": 0})["height"] > 200


def test_a_point_tells_its_latent_and_opens_it(watched: Opened, finished: Path) -> None:
    one = watched(finished)
    page = one.open()
    page.locator("#figure-relation").scroll_into_view_if_needed()
    page.wait_for_selector("#figure-relation[data-drawn]")
    x, y = page.evaluate(
        """() => {
            const plot = document.querySelector("#figure-relation .plot");
            const { xaxis, yaxis } = plot._fullLayout;
            const box = plot.querySelector(".nsewdrag").getBoundingClientRect();
            const trace = plot.data[0];
            return [box.left + xaxis.d2p(trace.x[0]), box.top + yaxis.d2p(trace.y[0])];
        }"""
    )
    page.mouse.move(x - 3, y)
    page.mouse.move(x, y)
    page.wait_for_selector("#tip:not([hidden])")
    assert page.inner_text("#tip strong").startswith("latent ")
    page.mouse.click(x, y)
    page.wait_for_selector("dialog[open]")
    assert page.inner_text("#detail-title").startswith("Latent ")
    assert page.url.endswith(f"#latent={page.inner_text('#detail-title').removeprefix('Latent ')}")


def test_search_filters_and_order(watched: Opened, finished: Path) -> None:
    one = watched(finished)
    page = one.open()
    assert counted(one) == "120 of 120 latents"
    page.fill("#search", "token17")
    one.until("document.querySelector('#count').textContent.startsWith('1 of')")
    assert "token17" in rows(one)[0]
    page.fill("#search", "17")
    one.until("document.querySelectorAll('#browser .rows [role=row]').length < 6")
    assert rows(one)[0].startswith("17")
    page.click("button[type=reset]")
    one.until("document.querySelector('#count').textContent === '120 of 120 latents'")

    columns = page.evaluate("Report.data('columns')")
    page.select_option("#by-class", "one")
    page.fill("#least-score", "0.6")
    wanted = [
        latent
        for latent, score in zip(columns["scored"]["latent"], columns["scored"]["score"], strict=True)
        if score >= 0.6 and columns["classes"][columns["latents"]["shared_class"][latent]] == "one"
    ]
    one.until(f"document.querySelector('#count').textContent.startsWith('{len(wanted)} of')")
    page.click("[data-key=score] button")
    best = max(wanted, key=lambda latent: columns["scored"]["score"][columns["scored"]["latent"].index(latent)])
    assert rows(one)[0].split()[0] == str(best)
    assert page.get_attribute("[data-key=score]", "aria-sort") == "descending"
    page.fill("#search", "no such words")
    page.wait_for_selector("#browser .none")


def test_all_of_it_by_keyboard(watched: Opened, finished: Path) -> None:
    one = watched(finished)
    page = one.open()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the summary"
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "search"
    page.keyboard.press("ArrowDown")
    focused = "document.activeElement.getAttribute('aria-rowindex')"
    assert page.evaluate(focused) == "2"
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    assert page.evaluate(focused) == "4"
    page.keyboard.press("End")
    assert page.evaluate(focused) == "121"
    page.keyboard.press("Home")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    page.wait_for_selector("dialog[open]")
    assert page.inner_text("#detail-title") == "Latent 1"
    page.keyboard.press("ArrowRight")
    one.until("document.querySelector('#detail-title').textContent === 'Latent 2'")
    page.keyboard.press("ArrowLeft")
    one.until("document.querySelector('#detail-title').textContent === 'Latent 1'")
    page.keyboard.press("Escape")
    page.wait_for_selector("dialog:not([open])", state="attached")
    assert "#latent" not in page.url
    assert page.evaluate(focused) == "3"


def test_an_address_opens_a_latent(watched: Opened, finished: Path) -> None:
    one = watched(finished)
    page = one.open("#latent=17")
    assert page.inner_text("#detail-title") == "Latent 17"
    text = page.inner_text("dialog")
    for words in ("token17", "run_b", "run_c", "Scores and controls", "swap", "own explanation"):
        assert words in text
    page.evaluate("location.hash = 'latent=5'")
    one.until("document.querySelector('#detail-title').textContent === 'Latent 5'")
    page.evaluate("location.hash = 'latent=99999'")
    page.wait_for_selector("dialog:not([open])", state="attached")


def test_hostile_texts_are_shown_and_not_obeyed(watched: Opened, hostile: Path) -> None:
    one = watched(hostile)
    page = one.open("#latent=3")
    one.draw_all()
    told = page.text_content("dialog .said") or ""
    assert told == visible(f"3 {HOSTILE}".encode("utf-8", "replace").decode())
    assert "‹U+202E›" in told
    assert page.query_selector("dialog script, dialog img, dialog b") is None
    page.keyboard.press("Escape")
    page.fill("#search", "<img src=x")
    one.until("!document.querySelector('#count').textContent.startsWith('120')")
    assert "</script>" in rows(one)[0]
    hidden = [c for c in page.inner_text("body") if unicodedata.category(c) in ("Cc", "Cf") and c not in "\n\t"]
    assert hidden == []
    page.evaluate("location.hash = 'latent=7'")
    page.wait_for_selector("dialog .wrong")
    assert "bad reply" in page.inner_text("dialog")
    assert page.inner_text("#part-failures").count("bad reply") == 1


def test_control_characters_are_shown_as_in_the_terminal(watched: Opened, finished: Path) -> None:
    page = watched(finished).open()
    # What is not assigned differs with the version of Unicode; half of a pair cannot be handed over.
    some = [chr(c) for c in range(0x30000) if unicodedata.category(chr(c)) not in ("Cn", "Cs", "Co")][::3]
    some += [chr(c) for c in (*range(0xA0), 0x200B, 0x200D, 0x202E, 0x2028, 0x2029, 0xFEFF, 0xE0001, 0x1F469)]
    assert page.evaluate("texts => texts.map(Report.visible)", some) == [visible(c) for c in some]


def test_numbers_are_written_as_in_the_terminal(watched: Opened, finished: Path) -> None:
    from autointerp.report.numbers import percent
    from sae.common.amounts import decimal

    page = watched(finished).open()
    values = [0.0, 0.264, 1.0, -0.39, -0.0001, 0.9996, 12.345, None]
    assert page.evaluate("xs => xs.map((x) => Report.decimal(x))", values) == [decimal(x) for x in values]
    assert page.evaluate("xs => xs.map(Report.percent)", values[:3]) == [percent(x) for x in values[:3]]


def test_colours_can_be_chosen(watched: Opened, finished: Path) -> None:
    one = watched(finished)
    page = one.open()
    ground = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(ground)
    page.click("#theme")
    assert page.evaluate(ground) == light  # chosen, and the system's as well
    page.click("#theme")
    dark = page.evaluate(ground)
    assert dark != light
    page.locator("#figure-sweep").scroll_into_view_if_needed()
    page.wait_for_selector("#figure-sweep[data-drawn]")
    ink = "document.querySelector('#figure-sweep .xtick text').style.fill"
    assert page.evaluate(ink) == "rgb(155, 163, 173)"
    page.click("#theme")
    one.until(f"{ink} === 'rgb(93, 101, 112)'")


def test_data_of_a_figure_can_be_saved(watched: Opened, finished: Path, tmp_path: Path) -> None:
    page = watched(finished).open()
    page.click("#figure-cosines details summary")
    with page.expect_download() as saving:
        page.click("#figure-cosines details button")
    saving.value.save_as(tmp_path / "cosines.csv")
    head, *lines = csv.reader((tmp_path / "cosines.csv").read_text().splitlines())
    assert head == ["latent", "decoder cosine", "encoder cosine", "group"]
    against = page.evaluate("Report.data('columns').against[0]")
    assert len(lines) == 114
    assert all(float(line[1]) == against["decoder_cosine"][int(line[0])] for line in lines)
    page.select_option("#figure-cosines [data-choice]", "run_c")
    first = page.inner_text("#figure-cosines details td:nth-child(2)")
    against = page.evaluate("Report.data('columns').against[1]")
    number = int(page.inner_text("#figure-cosines details td:nth-child(1)"))
    assert float(first) == against["decoder_cosine"][number]
    with page.expect_download() as saving:
        page.click("#save-findings")
    assert saving.value.suggested_filename == "run_a.findings.json"


def test_spreadsheet_formulas_are_saved_as_text(watched: Opened, finished: Path, tmp_path: Path) -> None:
    page = watched(finished).open()
    with page.expect_download() as saving:
        page.evaluate("Report.saveCsv('x', ['a'], [['=cmd()'], [-0.5], ['say \"x\", y']])")
    saving.value.save_as(tmp_path / "x.csv")
    assert (tmp_path / "x.csv").read_text().split() == ["a", "'=cmd()", "-0.5", '"say', '""x"",', 'y"']


@pytest.mark.parametrize("address", ["", "#latent=17"])
def test_a_phone_scrolls_one_way_only(watched: Opened, finished: Path, address: str) -> None:
    one = watched(finished, width=390, height=844)
    page = one.open(address)
    if not address:
        one.draw_all()
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    sticks_out = """selector => [...document.querySelectorAll(selector)]
        .filter((node) => node.getBoundingClientRect().right > 391)
        .filter((node) => !node.closest(".scroll, .bar nav, .plot, [role=gridcell]"))
        .map((node) => node.outerHTML.slice(0, 80))"""
    assert page.evaluate(sticks_out, "dialog[open] *" if address else "main *") == []


def test_everything_that_can_be_pressed_has_a_name(watched: Opened, finished: Path) -> None:
    page = watched(finished).open("#latent=17")
    nameless: list[Any] = page.evaluate(
        """() => [...document.querySelectorAll("button, a[href], input, select, summary, [role=img], [role=region]")]
            .filter((node) => !(node.textContent.trim() || node.getAttribute("aria-label") || node.labels?.length))
            .map((node) => node.outerHTML.slice(0, 80))"""
    )
    assert nameless == []
    levels = page.evaluate(
        "[...document.querySelectorAll('main h1, main h2, main h3, main h4')].map((h) => +h.tagName[1])"
    )
    assert levels[0] == 1
    assert all(b <= a + 1 for a, b in itertools.pairwise(levels))


def test_it_prints_with_every_figure(watched: Opened, finished: Path) -> None:
    one = watched(finished)
    page = one.open()
    page.evaluate("Report.print(true)")
    assert len(page.query_selector_all("[data-figure][data-drawn]")) == FIGURES
    page.emulate_media(media="print")
    assert not page.is_visible("#browser")
    assert page.is_visible("#figure-sweep")
    page.set_viewport_size({"width": 700, "height": 990})
    wide = "[...document.querySelectorAll('.plot .svg-container')].map((node) => node.getBoundingClientRect().right)"
    assert max(page.evaluate(wide)) <= 700
    page.evaluate("Report.print(false)")
    assert page.pdf(format="A4").startswith(b"%PDF")


def test_without_scripts_the_tables_are_there(browser: Any, finished: Path) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(finished.as_uri())
    assert page.is_visible("#part-overlap table")
    assert page.is_visible("noscript p")
    context.close()
