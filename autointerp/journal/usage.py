"""Count the cost of answers, as sums over requests, latents and stages.

Only requests really sent count as spent. Answers from the cache are counted apart, so a resumed study shows the cost of
*this* command and what earlier ones had paid for.
"""

from __future__ import annotations

from dataclasses import dataclass

LONGEST_TOKEN = 128
"""Characters of the longest token in the vocabularies of GPT-2, GPT-4 and Llama 3: a run of white space."""
MOST_TOKENS = 8
"""Tokens of one character, at most: byte-level tokenizers make up to 4, and normalisation may double the characters."""


def is_plausible_count(tokens: int, characters: int, more: int) -> bool:
    """Return whether a text of ``characters`` can have ``tokens`` tokens.

    :param more: extra tokens: a chat template, a hidden system prompt, thinking.
    """
    least = max(1, -(-characters // LONGEST_TOKEN)) if characters else 0
    return least <= tokens <= MOST_TOKENS * characters + more


@dataclass(frozen=True)
class Usage:
    """Requests and tokens spent on a piece of work. Add two with ``+``; ``Usage()`` is zero."""

    requests: int = 0
    """Requests sent to a server, those that failed and were repeated included."""
    prompt_tokens: int = 0
    """Tokens read by the model, as the server counts them; 0 where it reports none, or a count that cannot be right."""
    cached_tokens: int = 0
    """Of the prompt tokens, those the *server* had cached (a repeated few-shot prefix)."""
    completion_tokens: int = 0
    """Tokens written by the model; 0 likewise."""
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
