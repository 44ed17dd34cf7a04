"""What the tests in a browser share; see ``browser_pages``."""

from browser_pages import browser, finished, hostile, watched

__all__ = ["browser", "finished", "hostile", "watched"]
