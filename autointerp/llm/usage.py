"""What answers cost, as a sum that can be added up over requests, latents and stages.

Only what was really sent is counted as spent. An answer that came out of the cache costs nothing and is
counted apart, so that a resumed study shows what *this* invocation spent and what earlier ones had paid for.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Usage:
    """Requests and tokens spent on some piece of work. Add two with ``+``; ``Usage()`` is nothing."""

    requests: int = 0
    """Requests sent to a server, those that failed and were repeated included."""
    prompt_tokens: int = 0
    """Tokens read by the model, as the server counts them."""
    cached_tokens: int = 0
    """Of the prompt tokens, those the *server* had cached (a repeated few-shot prefix)."""
    completion_tokens: int = 0
    """Tokens written by the model."""
    from_cache: int = 0
    """Answers taken from our own cache, for which nothing was sent."""
    seconds: float = 0.0
    """Wall time spent waiting for answers, summed over requests (which overlap), in seconds."""

    @property
    def tokens(self) -> int:
        """Read and written."""
        return self.prompt_tokens + self.completion_tokens

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.requests + other.requests,
            self.prompt_tokens + other.prompt_tokens,
            self.cached_tokens + other.cached_tokens,
            self.completion_tokens + other.completion_tokens,
            self.from_cache + other.from_cache,
            self.seconds + other.seconds,
        )
