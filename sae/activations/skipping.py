"""Decide which tokens of the text no dictionary sees: not trained on, no firing, not counted.

A skipped token is still read by the subject model and still shown in contexts. The mask is made from the tokens and the
activations when a stream is read, so the activations on disk are the same with and without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from sae.common.errors import BadInput, suggest

MEDIAN_BLOCKS = 4
"""Blocks of the corpus, the first ones of its fixed random draw, whose tokens have the median norm of ``max_norm``."""
_SPECIAL = ("bos", "eos", "pad", "unk", "sep", "cls", "mask")


@dataclass(frozen=True)
class Skip:
    """Which tokens are skipped: the first ``positions`` of a sequence, ``token_ids``, norms over ``norm_limit``."""

    positions: int = 0
    token_ids: tuple[int, ...] = ()
    norm_limit: float | None = None

    def __bool__(self) -> bool:
        return self != Skip()

    def by_token(self, tokens: np.ndarray) -> np.ndarray:
        """Return which tokens of whole sequences [n, T] their position or their id excludes: bool [n, T]."""
        skipped: np.ndarray = np.isin(tokens, self.token_ids)
        skipped[:, : self.positions] = True
        return skipped

    def by_norm(self, values: torch.Tensor) -> torch.Tensor:
        """Return which of ``values`` [n, T, D] have too large a norm: bool [n, T]."""
        if self.norm_limit is None:
            return torch.zeros(values.shape[:2], dtype=torch.bool, device=values.device)
        return compute_norms(values) > self.norm_limit

    def record(self) -> dict[str, Any]:
        """Return the JSON form, for digests and records; empty if nothing is skipped."""
        if not self:
            return {}
        found = {"positions": self.positions, "token_ids": list(self.token_ids), "norm_limit": self.norm_limit}
        return {"skip": found}


def compute_norms(values: torch.Tensor) -> torch.Tensor:
    """Return the norms of ``values`` [n, T, D], float32 [n, T], the same in batches of any shape."""
    return values.double().square().sum(dim=-1).sqrt().float()


def resolve_tokens(names: Sequence[str], tokenizer: Any, source: str) -> tuple[int, ...]:
    """Return the ids of ``names``, ascending: a number, a special name (bos, eos, …), a token, or its text.

    Raises BadInput for a name that is not exactly one token of the model ``source``.
    """
    return tuple(sorted({_resolve_token(name, tokenizer, source) for name in names}))


def _resolve_token(name: str, tokenizer: Any, source: str) -> int:
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    where = f"excluded token {name!r} (--exclude-tokens)"
    if name.isascii() and name.isdecimal():
        largest = max(vocabulary.values(), default=-1)
        if int(name) > largest:
            raise BadInput(f"{where} is not an id of model {source!r}; give 0 to {largest}")
        return int(name)
    if name in _SPECIAL:
        found = getattr(tokenizer, f"{name}_token_id", None)
        if found is None:
            has = [other for other in _SPECIAL if getattr(tokenizer, f"{other}_token_id", None) is not None]
            raise BadInput(
                f"{where}: the tokenizer of model {source!r} has none; it has {', '.join(has) or 'no special token'}"
            )
        return int(found)
    if name in vocabulary:
        return vocabulary[name]
    ids = tokenizer(name, add_special_tokens=False)["input_ids"]
    if len(ids) == 1:
        return int(ids[0])
    pieces = f"is {len(ids)} tokens ({', '.join(map(str, ids[:8]))})" if ids else "is no token"
    raise BadInput(
        f"{where} {pieces} of model {source!r}; give one token or its id, or a special name such as "
        f"{suggest(name, _SPECIAL)}"
    )
