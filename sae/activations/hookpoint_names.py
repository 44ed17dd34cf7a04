"""Suggest hookpoints for a name from another program, in an error message.

TransformerLens and SAELens (``blocks.2.hook_resid_post``), dictionary_learning (``resid_post_layer_2``), sparsify and
other model families (``transformer.h.2.mlp``) all number the blocks.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

INPUT = ":in"  # ends the name of a module's input
_LAYER = re.compile(r"(?:layers?|blocks?|h|l)[._ -]?(\d+)(?!\d)", re.IGNORECASE)
_ATTENTION, _MLP = re.compile(r"attn|attention"), re.compile(r"mlp|feed_?forward|ffn?(?![a-z])")
_NO_MODULE = re.compile(r"norm|dropout|(^|_)ln")
_EMBEDDING = re.compile(r"emb|wte")
_TYPING_ERROR = 0.85  # similarity from which on a name is a misspelling


def likely_hookpoints(name: str, known: Sequence[str]) -> list[str]:
    """Return the hookpoints of ``known`` (forward order) that ``name`` may mean, best first; empty without a block."""
    if close := difflib.get_close_matches(name, known, n=1, cutoff=_TYPING_ERROR):
        return close
    name = name.lower()
    blocks = _blocks(known)
    number = _LAYER.search(name) or re.search(r"(\d+)", name)
    if not blocks or number is None:
        return [each for each in known if _EMBEDDING.search(each)][:1] if _EMBEDDING.search(name) else []
    prefix, last = blocks
    layer, rest = min(int(number[1]), last), name[number.end() :].strip("./_ ")
    own = f"{prefix}{layer}"
    below = [each.removeprefix(f"{own}.") for each in known if each.startswith(f"{own}.")]
    if close := difflib.get_close_matches(rest, below, n=1, cutoff=_TYPING_ERROR):
        return [f"{own}.{close[0]}"]
    said = name[: number.start()] + rest  # some names have the place before the number
    if "resid_pre" in said:
        before = known[: known.index(own)]
        return [f"{prefix}{layer - 1}"] if layer else [each for each in before if _EMBEDDING.search(each)][:1] or [own]
    attention, mlp = (_child(own, below, kind) for kind in (_ATTENTION, _MLP))
    if "resid_mid" in said:  # a sum, which no module outputs: suggest the attention and the block
        return [*attention, own]
    if _ATTENTION.search(said):
        return attention or [own]
    return mlp or [own] if _MLP.search(said) else [own]


def _blocks(known: Sequence[str]) -> tuple[str, int] | None:
    """Return the prefix of a block's number and the largest number, for the stack with the most blocks."""
    found: dict[str, int] = {}
    for name in known:
        numbered = re.fullmatch(r"(.*?\.)(\d+)", name)
        if numbered:
            found[numbered[1]] = max(int(numbered[2]), found.get(numbered[1], 0))
    return max(found.items(), key=lambda each: each[1]) if found else None


def _child(block: str, below: Sequence[str], kind: re.Pattern[str]) -> list[str]:
    """Return the block's module of a kind, without norms and dropouts."""
    fitting = [name for name in below if "." not in name and kind.search(name) and not _NO_MODULE.search(name)]
    return [f"{block}.{fitting[0]}"] if fitting else []
