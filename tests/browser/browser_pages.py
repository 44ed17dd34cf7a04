"""Pages in a real, headless Chromium, watched for errors and for any attempt to reach the network."""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path

from playwright.sync_api import Page

FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
)


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

    def until(self, holds: str, seconds: float = 15) -> None:
        """Wait until the expression holds. (The page's own policy forbids what ``wait_for_function`` does.)"""
        until(self.page, holds, seconds)

    def draw_all(self) -> None:
        """Every figure, one after another, as a reader scrolls by."""
        for figure in self.page.query_selector_all("[data-figure]"):
            figure.scroll_into_view_if_needed()
            name = figure.get_attribute("data-figure")
            self.page.wait_for_selector(f"[data-figure={name}][data-drawn]", state="attached", timeout=10_000)


def until(page: Page, holds: str, seconds: float = 15) -> None:
    end = time.monotonic() + seconds
    while not page.evaluate(holds):
        assert time.monotonic() < end, f"after {seconds} s it does not hold that {holds}"
        page.wait_for_timeout(20)


def chromium() -> str:
    """Where Chromium is: $CHROMIUM, else Debian's, else whatever is called so."""
    for name in (os.environ.get("CHROMIUM"), "chromium", "chromium-browser", "google-chrome"):
        if name and (path := shutil.which(name)):
            return path
    raise FileNotFoundError("there is no Chromium; `make test-browser` installs Debian's, or set $CHROMIUM to one")
