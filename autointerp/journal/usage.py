"""Count the cost of answers, as sums over requests, latents and stages.

Only requests really sent count as spent. Answers from the cache are counted apart, so a resumed study shows the cost of
*this* command and what earlier ones had paid for.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

LONGEST_TOKEN = 128  # characters of the longest token of GPT-2, GPT-4 and Llama 3: a run of white space
MOST_TOKENS = 8  # of one character: byte-level tokenizers make up to 4, and normalisation may double the characters


def is_plausible_count(tokens: int, characters: int, more: int) -> bool:
    """Return whether a text of ``characters`` can have ``tokens`` tokens.

    :param more: extra tokens: a chat template, a hidden system prompt, thinking.
    """
    least = max(1, -(-characters // LONGEST_TOKEN)) if characters else 0
    return least <= tokens <= MOST_TOKENS * characters + more


@dataclass(frozen=True)
class Usage:
    """Requests and tokens spent on a piece of work. Add two with ``+``; ``Usage()`` is zero."""

    requests: int = 0  # requests sent to a server, those that failed and were repeated included
    prompt_tokens: int = 0  # tokens read by the model, as the server counts them; 0 if that is missing or impossible
    cached_tokens: int = 0  # of the prompt tokens, those the *server* had cached (a repeated few-shot prefix)
    completion_tokens: int = 0  # tokens written by the model; 0 likewise
    from_cache: int = 0  # answers taken from our own cache, for which nothing was sent
    seconds: float = 0.0  # wall time spent waiting for answers, summed over requests (which overlap), in seconds

    @property
    def tokens(self) -> int:
        """Read and written."""
        return self.prompt_tokens + self.completion_tokens

    def __add__(self, other: Usage) -> Usage:
        return Usage(*map(operator.add, vars(self).values(), vars(other).values()))
