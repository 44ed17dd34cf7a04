"""What a command would cost, as `--dry-run` tells it: figures, in words and as JSON."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Forecast:
    """What a command would cost. ``None``: not known."""

    stage: str
    model: str
    counted_by: str
    exact: bool
    """Whether prompt tokens were counted by the model's own tokenizer and template."""
    protocol: str | None = None
    """Of the judge, where it has several: that of all these figures."""
    requests: int = 0
    requests_at_least: int = 0
    """Less than ``requests`` only where adaptive scoring may stop earlier."""
    answered_before: int = 0
    """Contexts or latents that the journal has answers for."""
    from_cache: int = 0
    """Requests whose answer is kept."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    completion_at_most: int = 0
    seconds: float | None = None
    dollars: float | None = None
    notes: list[str] = field(default_factory=list)
    cheaper: Forecast | None = None
    """By the other protocol, where only the server can tell which one it will be."""

    def as_dict(self) -> dict[str, Any]:
        cheaper = None if self.cheaper is None else {key: getattr(self.cheaper, key) for key in _OF_PROTOCOL}
        return {"dry_run": True, **self.__dict__, "cheaper": cheaper}

    @property
    def cost(self) -> tuple[float, int]:
        """What forecasts are compared by: the price, where there are prices, and the tokens."""
        return self.dollars or 0.0, self.prompt_tokens + self.completion_tokens

    def render(self) -> None:
        from rich.console import Console
        from rich.markup import escape

        about = "" if self.exact else " (an estimate)"
        most = "at most " if self.cheaper else ""
        lines = [
            f"{self.stage} would send {most}{self._requests()} to {self.model or 'no model'}",
            *([self._in_words(self.cheaper)] if self.cheaper else []),
            f"  answered before {self.answered_before:,}, in the answer cache {self.from_cache:,}",
            f"  prompt tokens {self.prompt_tokens:,}{about}, of them cached by the server {self.cached_tokens:,}",
            f"  written tokens about {self.completion_tokens:,}, at most {self.completion_at_most:,}",
            f"  counted by {self.counted_by}",
            "  time unknown: nothing was asked of this model before"
            if self.seconds is None
            else f"  time about {self.seconds:,.0f} s",
            "  price unknown: give --price-in and --price-out"
            if self.dollars is None
            else f"  price about ${self.dollars:,.4f}",
            *(f"  {note}" for note in self.notes),
        ]
        console = Console(soft_wrap=True, highlight=False)
        for line in lines:
            console.print(escape(line))

    def _requests(self) -> str:
        least = f" (at least {self.requests_at_least:,})" if self.requests_at_least < self.requests else ""
        return f"{self.requests:,} requests{least}"

    def _in_words(self, cheaper: Forecast) -> str:
        price = "" if cheaper.dollars is None else f", about ${cheaper.dollars:,.4f}"
        return (
            f"  all figures are of --protocol {self.protocol}, the dearer; --protocol {cheaper.protocol} would be "
            f"{cheaper._requests()}, {cheaper.prompt_tokens:,} prompt tokens{price}; "
            "without --protocol the command chooses when it has asked the server what it can do"
        )


_OF_PROTOCOL = (
    *("protocol", "requests", "requests_at_least", "answered_before", "from_cache", "prompt_tokens", "cached_tokens"),
    *("completion_tokens", "completion_at_most", "seconds", "dollars"),
)
