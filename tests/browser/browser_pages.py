"""Pages in a real, headless Chromium, watched for errors and for any attempt to reach the network."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import html_pages
import pytest
import small_study
from playwright.sync_api import Browser, Page, sync_playwright

FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
)
NAMES = ["run_a", "run_b", "run_c"]


@dataclass
class Watched:
    """A page, what its console said, and what it asked for."""

    page: Page
    said: list[str] = field(default_factory=list)
    asked_for: list[str] = field(default_factory=list)
    source: Path = Path()

    def open(self, address: str = "") -> Page:
        self.page.goto(self.source.as_uri() + address)
        self.page.wait_for_selector("html[data-ready=figures]", state="attached")
        return self.page

    def draw_all(self) -> None:
        """Every figure, one after another, as a reader scrolls by."""
        for figure in self.page.query_selector_all("[data-figure]"):
            figure.scroll_into_view_if_needed()
            name = figure.get_attribute("data-figure")
            self.page.wait_for_selector(f"[data-figure={name}][data-drawn]", state="attached", timeout=10_000)


Opened = Callable[..., Watched]


def chromium() -> str:
    """Where Chromium is: $CHROMIUM, else Debian's, else whatever is called so."""
    for name in (os.environ.get("CHROMIUM"), "chromium", "chromium-browser", "google-chrome"):
        if name and (path := shutil.which(name)):
            return path
    pytest.fail("there is no Chromium; `make test-browser` installs Debian's, or set $CHROMIUM to one", pytrace=False)


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
        one.page.on("dialog", lambda dialog: (one.said.append(dialog.message), dialog.dismiss()))
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
